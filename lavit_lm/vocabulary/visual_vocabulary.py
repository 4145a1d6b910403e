"""Codes <-> ids: the image tokens in an LM's vocabulary. Only this module translates between them.

    id      0 ........ begin-1   begin     end        first ............... first + K - 1
    token   text tokens          <|img|>   <|/img|>   <|vis_00000|> ... <|vis_{K-1}|>

These tokens are added after the last id of the *tokenizer*, which in a padded LM is not the last
embedding. Names of codes have a fixed width, so that none is a prefix of another. All are special
tokens that text is never encoded to. Drawings in this package write <img> and </img> for begin and
end, and a code for the token of the code: <img> 7 3 9 </img>.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import AddedToken

from lavit_lm.vocabulary.embeddings import check_embeddings, extend_embeddings
from lavit_lm.vocabulary.text_tokenizer import VocabularyError, clear_special_ids, encode_plain

__all__ = ["BEGIN", "CODE", "END", "VisualVocabulary", "VocabularyError"]

BEGIN, END = "<|img|>", "<|/img|>"
CODE = re.compile(r"<\|vis_(\d+)\|>")
WIDTH = 5  # digits in the name of a code, unless the codebook needs more


@dataclass(frozen=True)
class VisualVocabulary:
    """The ids of the image tokens in an LM's vocabulary.

    Args:
        begin: id of <|img|>, before the codes of an image.
        end: id of <|/img|>, after them.
        first: id of code 0.
        codebook_size: K; code k has the id first + k.

    Raises:
        VocabularyError: ids below 0, or ids that overlap.
    """

    begin: int
    end: int
    first: int
    codebook_size: int

    def __post_init__(self) -> None:
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
    ) -> VisualVocabulary:
        """Add the K + 2 image tokens to a tokenizer and their embeddings to an LM, in place.

        Args:
            tokenizer: any fast tokenizer of `transformers`.
            model: its causal LM, which may have more embeddings than the tokenizer has ids; None to
                extend the tokenizer alone. Extend a model before wrapping it with peft.
            codebook_size: K.
            generator: draws the new embeddings (see embeddings.py); None for torch's own.

        Raises:
            VocabularyError: a slow tokenizer, one that has image tokens, or another LM's.
        """
        if (
            isinstance(codebook_size, bool)
            or not isinstance(codebook_size, int)
            or codebook_size < 1
        ):
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
        width = max(WIDTH, len(str(codebook_size - 1)))
        names = [BEGIN, END, *(f"<|vis_{code:0{width}d}|>" for code in range(codebook_size))]
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
        ids = {int(name[len("<|vis_") : -len("|>")]): known[name] for name in names}
        missing = [name for name in (BEGIN, END) if name not in known]
        missing += [] if ids else ["<|vis_00000|> and the other codes"]
        if missing:
            raise VocabularyError(
                f"this tokenizer has no {', '.join(missing)}: VisualVocabulary.extend adds them"
            )
        if len({len(name) for name in names}) > 1:
            raise VocabularyError(
                f"names of codes have different lengths ({names[0]}, {names[-1]})"
            )
        absent = next((code for code in range(len(ids)) if code not in ids), None)
        if absent is not None:
            raise VocabularyError(
                f"this tokenizer has codes up to {max(ids)}, but none named <|vis_{absent:05d}|>"
            )
        moved = next((code for code in range(len(ids)) if ids[code] != ids[0] + code), None)
        if moved is not None:
            raise VocabularyError(
                f"ids of the codes are not contiguous: code 0 has id {ids[0]}, code {moved} id "
                f"{ids[moved]}; every later code would be read as another one"
            )
        return cls(known[BEGIN], known[END], ids[0], len(ids))

    @property
    def stop(self) -> int:
        """One past the id of the last code."""
        return self.first + self.codebook_size

    def to_ids(self, codes: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Ids of codes. Raises VocabularyError for codes outside 0..K-1."""
        _check_integers(codes)
        wrong = (codes < 0) | (codes >= self.codebook_size)
        if bool(wrong.any()):
            raise VocabularyError(
                f"expected codes in 0..{self.codebook_size - 1}, got {int(codes[wrong][0])}: codes "
                "of another tokenizer?"
            )
        return codes + self.first

    def to_codes(self, ids: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Codes of ids. Raises VocabularyError for an id that is not a code's."""
        _check_integers(ids)
        wrong = ~self.is_code(ids)
        if bool(wrong.any()):
            raise VocabularyError(
                f"expected ids of codes, {self.first}..{self.stop - 1}, got {int(ids[wrong][0])}"
            )
        return ids - self.first

    def is_code(self, ids: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """True at ids of codes."""
        return (ids >= self.first) & (ids < self.stop)

    def is_visual(self, ids: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """True at ids of begin, end and codes."""
        return self.is_code(ids) | (ids == self.begin) | (ids == self.end)

    def mask(self, size: int, device: torch.device | str | None = None) -> Bool[Tensor, " size"]:
        """True at codes, for logits of a width that may exceed the number of ids.

        With begin 3, end 4, first 5 and K 2, mask(9) is  . . . . . X X . .
        """
        if size < self.stop:
            raise VocabularyError(
                f"logits of width {size} do not include the ids of codes, up to {self.stop - 1}"
            )
        return self.is_code(torch.arange(size, device=device))

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
