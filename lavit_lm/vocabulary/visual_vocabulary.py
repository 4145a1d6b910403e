"""Codes <-> ids: a language model's vocabulary with images in it, and the only place where the two are translated.

    id     0 ........ begin-1   begin     end        first ................ first + K - 1      ... rows of a padded LM
    token  the LM's own text    <|img|>   <|/img|>   <|vis_00000|> ... <|vis_{K-1}|>            (no token)

Begin, end and codes are added in this order behind the last id of the *tokenizer*, which in a padded LM is not the last
row of the embedding. Names have a fixed width, so that none is the prefix of another. They are special tokens that
text never turns into: what a user writes stays text, also when it looks like one of them.
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

from lavit_lm.vocabulary.embedding_rows import check_model, extend_model
from lavit_lm.vocabulary.text_tokenizer import VocabularyError, encode_plain, forget

__all__ = ["BEGIN", "CODE", "END", "VisualVocabulary", "VocabularyError"]

BEGIN, END = "<|img|>", "<|/img|>"
CODE = re.compile(r"<\|vis_(\d+)\|>")
WIDTH = 5  # digits of a code's name, unless the codebook needs more


@dataclass(frozen=True)
class VisualVocabulary:
    """Where the image tokens lie in one LM's vocabulary.

    Args:
        begin: id of <|img|>, before the codes of an image.
        end: id of <|/img|>, after them.
        first: id of code 0.
        codebook_size: K; code k has id first + k.
    """

    begin: int
    end: int
    first: int
    codebook_size: int

    def __post_init__(self) -> None:
        codes = range(self.first, self.first + self.codebook_size)
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
        """Give a tokenizer the K + 2 image tokens and an LM rows for them, in place.

        The new rows are drawn from normals with the mean and deviation that each dimension has over the LM's own rows.

        Args:
            tokenizer: any fast tokenizer of `transformers`.
            model: its causal LM, whose embedding may have more rows than the tokenizer has ids; None to extend the
                tokenizer alone. Extend before wrapping it with peft.
            codebook_size: K.
            generator: draws the new rows; None for torch's own.

        Raises:
            VocabularyError: a slow tokenizer; image tokens that are already there; an LM that is not this tokenizer's.
        """
        if (
            isinstance(codebook_size, bool)
            or not isinstance(codebook_size, int)
            or codebook_size < 1
        ):
            raise VocabularyError(
                f"expected a codebook of at least one code, got {codebook_size!r}"
            )
        known = _added(tokenizer)
        present = [name for name in known if name in (BEGIN, END) or CODE.fullmatch(name)]
        if present:
            raise VocabularyError(
                f"this tokenizer has {len(present)} image tokens already ({present[0]} ...): read them with "
                "VisualVocabulary.of(tokenizer); a second set would give every code two ids"
            )
        own = max(tokenizer.get_vocab().values(), default=-1) + 1
        if model is not None:
            check_model(model, own)
        width = max(WIDTH, len(str(codebook_size - 1)))
        names = [BEGIN, END, *(f"<|vis_{code:0{width}d}|>" for code in range(codebook_size))]
        tokens = [AddedToken(name, special=True, normalized=False) for name in names]
        tokenizer.add_tokens(tokens, special_tokens=True)
        forget(tokenizer)
        vocabulary = cls.of(tokenizer)
        if vocabulary.begin < own:
            raise VocabularyError(
                f"the tokenizer gave {BEGIN} the id {vocabulary.begin}, which one of its own tokens has"
            )
        if model is not None:
            extend_model(model, own, vocabulary.stop, generator)
        return vocabulary

    @classmethod
    def of(cls, tokenizer: Any) -> VisualVocabulary:
        """Read the vocabulary back from a tokenizer that was extended, here or before it was saved.

        Raises:
            VocabularyError: which tokens are missing, or where their ids are not contiguous.
        """
        known = _added(tokenizer)
        missing = [name for name in (BEGIN, END) if name not in known]
        names = [name for name in known if CODE.fullmatch(name)]
        ids = {int(name[len("<|vis_") : -len("|>")]): known[name] for name in names}
        if missing or not ids:
            lacks = missing + ([] if ids else ["<|vis_00000|> and the other codes"])
            raise VocabularyError(
                f"this tokenizer has no {', '.join(lacks)}: VisualVocabulary.extend adds them"
            )
        if len({len(name) for name in names}) > 1:
            raise VocabularyError(
                f"codes have names of different lengths ({names[0]}, {names[-1]}): some have two ids"
            )
        size = len(ids)
        absent = next((code for code in range(size) if code not in ids), None)
        if absent is not None:
            raise VocabularyError(
                f"this tokenizer has codes up to {max(ids)}, but none named <|vis_{absent:05d}|>"
            )
        moved = next((code for code in range(size) if ids[code] != ids[0] + code), None)
        if moved is not None:
            raise VocabularyError(
                f"ids of the codes are not contiguous: code 0 is id {ids[0]}, code {moved} is id {ids[moved]}; "
                "read as contiguous, every later code would be another one"
            )
        return cls(known[BEGIN], known[END], ids[0], size)

    @property
    def stop(self) -> int:
        """One past the id of the last code."""
        return self.first + self.codebook_size

    def to_ids(self, codes: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Ids of codes. Raises VocabularyError for codes outside 0..K-1, which would be text or no token at all."""
        _check_integers(codes)
        wrong = (codes < 0) | (codes >= self.codebook_size)
        if bool(wrong.any()):
            raise VocabularyError(
                f"codes must lie in 0..{self.codebook_size - 1}, got {int(codes[wrong][0])}: another tokenizer's codes?"
            )
        return codes + self.first

    def to_codes(self, ids: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Codes of ids. Raises VocabularyError for an id that is no code, naming the first."""
        _check_integers(ids)
        wrong = ~self.is_code(ids)
        if bool(wrong.any()):
            raise VocabularyError(
                f"expected ids of codes, {self.first}..{self.stop - 1}, got {int(ids[wrong][0])}"
            )
        return ids - self.first

    def is_code(self, ids: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (ids >= self.first) & (ids < self.stop)

    def is_visual(self, ids: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """True at begin, end and codes."""
        return self.is_code(ids) | (ids == self.begin) | (ids == self.end)

    def mask(self, size: int, device: torch.device | str | None = None) -> Bool[Tensor, " size"]:
        """True at codes, for logits of a width that may reach beyond the tokenizer's last id.

        With begin 3, end 4, first 5 and K 2, mask(9) is  . . . . . X X . .
        """
        if size < self.stop:
            raise VocabularyError(
                f"logits of width {size} have no place for codes up to id {self.stop - 1}"
            )
        ids = torch.arange(size, device=device)
        return self.is_code(ids)

    def encode_text(self, tokenizer: Any, text: str) -> list[int]:
        """Ids of what a user wrote: never an image token, never a special token, whatever it says; no bos, no eos.

        Raises:
            VocabularyError: no text, or text that this tokenizer can only read as a special token.
        """
        return encode_plain(tokenizer, text, self._visual)

    def decode_text(self, tokenizer: Any, ids: Iterable[int] | Tensor) -> str:
        """The text of ids; image tokens and special tokens are left out.

        Raises:
            VocabularyError: an id that is no token, such as that of a padded LM's free rows.
        """
        listed = [int(i) for i in ids]
        bad = next((i for i in listed if i < 0 or tokenizer.convert_ids_to_tokens(i) is None), None)
        if bad is not None:
            raise VocabularyError(
                f"id {bad} is no token of this tokenizer ({len(tokenizer)} tokens)"
            )
        text = [i for i in listed if not self._visual(i)]
        return tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _visual(self, token_id: int) -> bool:
        return token_id in (self.begin, self.end) or self.first <= token_id < self.stop


def _added(tokenizer: Any) -> dict[str, int]:
    """Names and ids of the tokens added to a fast tokenizer. Raises VocabularyError for any other."""
    if not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"expected a fast tokenizer of transformers, got {type(tokenizer).__name__}"
        )
    return {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}


def _check_integers(values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype != torch.int64:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise VocabularyError(f"expected an int64 tensor, got {got}")
