"""Codes <-> ids: the image tokens in an LM's vocabulary. Only this module translates between them.

    id      0 ........ begin-1   begin     end        first ............... first + K - 1
    token   text tokens          <|img|>   <|/img|>   <|vis_00000|> ... <|vis_{K-1}|>

Nested codes index a table of K entries for each stage (lavit_tok/nn/nested_order.py), so that one
number has as many meanings as there are stages. Each has an id of its own, first + stage * K +
code; with K 4096:

    rank    0              1              2              3              4              5
    code    17             803            17             4              90             17
    token   vis_00_00017   vis_01_00803   vis_02_00017   vis_03_00004   vis_04_00090   vis_04_00017

These tokens are added after the last id of the *tokenizer*, which in a padded LM is not the last
embedding. Names of codes have a fixed width, so that none is a prefix of another. All are special
tokens that text is never encoded to. Drawings in this package write <img> and </img> for begin and
end, and a code for the token of the code: <img> 7 3 9 </img>.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import AddedToken

from lavit_lm.vocabulary.embeddings import check_embeddings, extend_embeddings
from lavit_lm.vocabulary.text_tokenizer import VocabularyError, clear_special_ids, encode_plain
from lavit_tok.nn.nested_order import rank_stages

__all__ = ["BEGIN", "CODE", "END", "VisualVocabulary", "VocabularyError"]

BEGIN, END = "<|img|>", "<|/img|>"
CODE = re.compile(r"<\|vis_(?:\d+_)?(\d+)\|>")
"""The name of a code's token; its group is the code."""
MAX_STAGES = 28  # of images of 1024 x 1024 patches
WIDTH = 5  # digits in the name of a code, unless the codebook needs more


@dataclass(frozen=True)
class VisualVocabulary:
    """The ids of the image tokens in an LM's vocabulary.

    Args:
        begin: id of <|img|>, before the codes of an image.
        end: id of <|/img|>, after them.
        first: id of code 0, of the first stage.
        codebook_size: K; code k has the id first + k, or of nested codes first + stage * K + k.
        stages: of nested codes, all that have ids; 0 for codes of one table.

    Raises:
        VocabularyError: ids below 0, ids that overlap, or an impossible number of stages.
    """

    begin: int
    end: int
    first: int
    codebook_size: int
    stages: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.stages <= MAX_STAGES:
            raise VocabularyError(f"stages: expected 0..{MAX_STAGES}, got {self.stages}")
        codes = range(self.first, self.stop)
        if self.codebook_size < 1 or min(self.begin, self.end, self.first) < 0:
            raise VocabularyError(f"expected at least one code and no id below 0, got {self}")
        if self.begin == self.end or self.begin in codes or self.end in codes:
            raise VocabularyError(f"begin, end and codes must have different ids, got {self}")

    @classmethod
    def extend(
        cls,
        tokenizer: Any,
        model: Any,
        codebook_size: int,
        generator: torch.Generator | None = None,
        stages: int = 0,
    ) -> VisualVocabulary:
        """Add the image tokens to a tokenizer and their embeddings to an LM, in place.

        Args:
            tokenizer: any fast tokenizer of `transformers`.
            model: its causal LM, which may have more embeddings than the tokenizer has ids; None to
                extend the tokenizer alone. Extend a model before wrapping it with peft.
            codebook_size: K.
            generator: draws the new embeddings (see embeddings.py); None for torch's own.
            stages: of nested codes; later ones get no ids. 0 for codes of one table.

        Raises:
            VocabularyError: a slow tokenizer, one that has image tokens, or another LM's; an
                impossible number of stages.
        """
        if type(codebook_size) is not int or codebook_size < 1:
            raise VocabularyError(
                f"expected a codebook of at least one code, got {codebook_size!r}"
            )
        present = [n for n in _added(tokenizer) if n in (BEGIN, END) or CODE.fullmatch(n)]
        if present:
            raise VocabularyError(
                f"this tokenizer already has {len(present)} image tokens ({present[0]} ...): read "
                "them with VisualVocabulary.from_tokenizer; a code must not have two ids"
            )
        first_free = max(tokenizer.get_vocab().values(), default=-1) + 1
        if model is not None:
            check_embeddings(model, first_free)
        if type(stages) is not int or not 0 <= stages <= MAX_STAGES:
            raise VocabularyError(f"stages: expected 0..{MAX_STAGES}, got {stages!r}")
        names = [BEGIN, END, *_code_names(codebook_size, stages)]
        # In one call: 16,386 tokens take 0.03 s; as additional_special_tokens they load slowly.
        tokens = [AddedToken(name, special=True, normalized=False) for name in names]
        tokenizer.add_tokens(tokens, special_tokens=True)
        clear_special_ids(tokenizer)
        vocabulary = cls.from_tokenizer(tokenizer)
        if vocabulary.begin < first_free:
            raise VocabularyError(
                f"the tokenizer gave {BEGIN} the id {vocabulary.begin}, which another token has"
            )
        if model is not None:
            extend_embeddings(model, first_free, vocabulary.stop, generator)
        return vocabulary

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> VisualVocabulary:
        """Read the vocabulary from an extended tokenizer.

        Raises:
            VocabularyError: tokens are missing, or their ids are not contiguous.
        """
        known = _added(tokenizer)
        names = [name for name in known if CODE.fullmatch(name)]
        missing = [name for name in (BEGIN, END) if name not in known]
        missing += [] if names else ["<|vis_00000|> and the other codes"]
        if missing:
            raise VocabularyError(
                f"this tokenizer has no {', '.join(missing)}: VisualVocabulary.extend adds them"
            )
        if len({len(name) for name in names}) > 1:
            raise VocabularyError(
                f"names of codes have different lengths ({names[0]}, {names[-1]})"
            )
        parts = [name[len("<|vis_") : -len("|>")].split("_") for name in names]
        stages = len({stage for stage, *code in parts if code})
        size = -(-len(names) // max(1, stages))
        expected = _code_names(size, stages)
        ids = [known.get(name) for name in expected]
        if None in ids:
            raise VocabularyError(
                f"this tokenizer has {len(names)} codes, but none named {expected[ids.index(None)]}"
            )
        first: int = ids[0]  # type: ignore[assignment]
        moved = next((code for code in range(len(ids)) if ids[code] != first + code), None)
        if moved is not None:
            raise VocabularyError(
                f"ids of the codes are not contiguous: {expected[0]} has id {first}, "
                f"{expected[moved]} id {ids[moved]}; every later code would be read as another one"
            )
        return cls(known[BEGIN], known[END], first, size, stages)

    @property
    def stop(self) -> int:
        """One past the id of the last code."""
        return self.first + max(1, self.stages) * self.codebook_size

    @cached_property
    def rank_stages(self) -> Int64[Tensor, " ranks"]:
        """The stage of every rank that has ids; empty for codes of one table."""
        return torch.tensor(rank_stages(self.stages), dtype=torch.int64)

    @property
    def max_codes(self) -> int | None:
        """Nested codes of an image that have ids; None for codes of one table, of any number."""
        return len(self.rank_stages) if self.stages else None

    def to_ids(self, codes: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Ids of codes; nested codes are all codes of an image from rank 0, in the last dimension.

        Raises:
            VocabularyError: codes outside 0..K-1, or more nested codes than max_codes.
        """
        _check_integers(codes)
        wrong = (codes < 0) | (codes >= self.codebook_size)
        if bool(wrong.any()):
            raise VocabularyError(
                f"expected codes in 0..{self.codebook_size - 1}, got {int(codes[wrong][0])}: codes "
                "of another tokenizer?"
            )
        return codes + self._offsets(codes)

    def list_ids(self, codes: Int64[Tensor, " n"]) -> list[int]:
        """`to_ids` of one image as a list; for so few codes a list is faster than tensors.

        Raises:
            VocabularyError: see to_ids.
        """
        _check_integers(codes)
        listed = codes.tolist()
        if listed and (min(listed) < 0 or max(listed) >= self.codebook_size):
            self.to_ids(codes)  # raises
        if not self.stages:
            return [self.first + code for code in listed]
        if len(listed) > len(self._rank_offsets):
            self.to_ids(codes)  # raises
        return [first + code for first, code in zip(self._rank_offsets, listed, strict=False)]

    @cached_property
    def _rank_offsets(self) -> list[int]:
        """The id of code 0 at every rank of nested codes."""
        return (self.first + self.rank_stages * self.codebook_size).tolist()

    def to_codes(self, ids: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Codes of ids, the inverse of to_ids.

        Raises:
            VocabularyError: an id that is not a code's, or of another stage than its rank's.
        """
        _check_integers(ids)
        wrong = ~self.is_code(ids)
        if bool(wrong.any()):
            raise VocabularyError(
                f"expected ids of codes, {self.first}..{self.stop - 1}, got {int(ids[wrong][0])}"
            )
        codes = ids - self._offsets(ids)
        wrong = (codes < 0) | (codes >= self.codebook_size)
        if bool(wrong.any()):
            rank = int(wrong.nonzero()[0, -1])
            stage = int(ids[wrong][0] - self.first) // self.codebook_size
            raise VocabularyError(
                f"expected a code of stage {int(self.rank_stages[rank])} at rank {rank}, got id "
                f"{int(ids[wrong][0])} of stage {stage}: nested codes are in the order of their "
                "ranks"
            )
        return codes

    def _offsets(self, codes: Int64[Tensor, "..."]) -> int | Int64[Tensor, " n"]:
        """The id of code 0 at every rank."""
        if not self.stages:
            return self.first
        if codes.shape[-1] > len(self.rank_stages):
            raise VocabularyError(
                f"expected at most {self.max_codes} codes of an image, got {codes.shape[-1]}: "
                f"there are ids of {self.stages} stages"
            )
        stages = self.rank_stages[: codes.shape[-1]].to(codes.device)
        return self.first + stages * self.codebook_size

    def require_stages(self, stages: int) -> None:
        """Raise VocabularyError unless a visual tokenizer's codes can be those of this vocabulary.

        Args:
            stages: VisualTokenizer.stages.
        """
        if bool(self.stages) != bool(stages) or self.stages > stages:
            kinds = [
                f"nested codes of {n} stages" if n else "codes of one table"
                for n in (self.stages, stages)
            ]
            raise VocabularyError(
                f"there are ids for {kinds[0]}, the visual tokenizer has {kinds[1]}: ids would be "
                "of other codes, or codes without ids"
            )

    def stage_ids(self, stage: int) -> range:
        """Ids of a stage's codes; codes of one table are stage 0."""
        start = self.first + stage * self.codebook_size
        return range(start, start + self.codebook_size)

    def is_code(self, ids: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """True at ids of codes."""
        return (ids >= self.first) & (ids < self.stop)

    def is_visual(self, ids: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """True at ids of begin, end and codes."""
        return self.is_code(ids) | (ids == self.begin) | (ids == self.end)

    def masks(
        self, size: int, device: torch.device | str | None = None
    ) -> list[Bool[Tensor, " size"]]:
        """For each rank True at codes that may be there; one mask for all ranks of one table.

        Args:
            size: width of the logits, which may exceed the number of ids.
            device: of the masks.

        Returns: with begin 3, end 4, first 5, K 2 and 2 stages, masks(10) is
            . . . . . X X . . .
            . . . . . . . X X .
        """
        if size < self.stop:
            raise VocabularyError(
                f"logits of width {size} do not include the ids of codes, up to {self.stop - 1}"
            )
        ids = torch.arange(size, device=device)
        ranges = [self.stage_ids(stage) for stage in range(max(1, self.stages))]
        masks = [(ids >= one.start) & (ids < one.stop) for one in ranges]
        return [masks[stage] for stage in self.rank_stages.tolist()] if self.stages else masks

    def pattern(self, min_codes: int, max_codes: int) -> str:
        r"""A regular expression of an image's tokens, for servers that generate by a grammar.

        Args:
            min_codes: codes of the image at least.
            max_codes: codes of the image at most.

        Returns: with 2 stages, 1 and 2 it is
            <\|vis_00_\d+\|>(<\|vis_01_\d+\|>)?<\|/img\|>

        Raises:
            VocabularyError: not 1 <= min_codes <= max_codes, or more nested codes than have ids.
        """
        if not 1 <= min_codes <= max_codes <= (self.max_codes or max_codes):
            raise VocabularyError(
                f"expected 1 <= min_codes <= max_codes <= {self.max_codes}, got {min_codes} and "
                f"{max_codes}"
            )
        end = r"<\|/img\|>"
        if not self.stages:
            return rf"(<\|vis_\d+\|>){{{min_codes},{max_codes}}}{end}"
        pattern = ""
        for rank in reversed(range(max_codes)):
            pattern = rf"<\|vis_{int(self.rank_stages[rank]):02d}_\d+\|>{pattern}"
            pattern = pattern if rank < min_codes else f"({pattern})?"
        return pattern + end

    def encode_text(self, tokenizer: Any, text: str) -> list[int]:
        """Encode text without any special or image token, whatever it contains; see encode_plain.

        Raises:
            VocabularyError: not valid text, or text that this tokenizer cannot encode in another
                way.
        """
        return encode_plain(tokenizer, text, self._is_visual_id)

    def decode_text(self, tokenizer: Any, ids: Iterable[int] | Tensor) -> str:
        """The text of ids, without image tokens and special tokens.

        Raises:
            VocabularyError: an id without a token, such as the padding of a padded LM.
        """
        listed = [int(i) for i in ids]
        bad = next((i for i in listed if i < 0 or tokenizer.convert_ids_to_tokens(i) is None), None)
        if bad is not None:
            raise VocabularyError(
                f"id {bad} is no token of this tokenizer ({len(tokenizer)} tokens)"
            )
        text = [i for i in listed if not self._is_visual_id(i)]
        return tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _is_visual_id(self, token_id: int) -> bool:
        return token_id in (self.begin, self.end) or self.first <= token_id < self.stop


def stages_for(max_codes: int | None, visual_stages: int) -> int:
    """How many stages of a visual tokenizer's codes get ids; 0 for codes that are not nested.

    Args:
        max_codes: nested codes of an image at most; None for all.
        visual_stages: VisualTokenizer.stages.

    Raises:
        VocabularyError: a number at which no stage ends.
    """
    ends = [len(rank_stages(stages)) for stages in range(1, visual_stages + 1)]
    if not ends or max_codes is None or max_codes >= ends[-1]:
        return visual_stages
    if max_codes not in ends:
        raise VocabularyError(
            f"max_codes: expected the end of a stage of nested codes, one of {ends}, got "
            f"{max_codes!r}"
        )
    return ends.index(max_codes) + 1


def _code_names(codebook_size: int, stages: int) -> list[str]:
    """Names of all codes' tokens, in the order of their ids."""
    width = max(WIDTH, len(str(codebook_size - 1)))
    before = [f"{stage:02d}_" for stage in range(stages)] or [""]
    return [f"<|vis_{s}{code:0{width}d}|>" for s in before for code in range(codebook_size)]


def _added(tokenizer: Any) -> dict[str, int]:
    """Names and ids of the added tokens. Raises VocabularyError for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"expected a fast tokenizer of transformers, got {type(tokenizer).__name__}"
        )
    return {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}


def _check_integers(values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype != torch.int64:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise VocabularyError(f"expected an int64 tensor, got {got}")
