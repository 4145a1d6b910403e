"""MultimodalProcessor: text tokenizer and visual vocabulary, which turn text and codes into ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

KEPT_TEXTS, KEPT_LENGTH = 1 << 14, 1000
"""The ids of so many texts of at most so many characters are kept: a few windows of examples."""


@dataclass(frozen=True)
class MultimodalProcessor:
    """What an objective needs to build sequences of ids.

    Args:
        text_tokenizer: a fast `transformers` tokenizer that contains the image tokens.
        vocabulary: the ids of the image tokens.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """

    text_tokenizer: Any
    vocabulary: VisualVocabulary
    _recent: dict[str, list[int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.text_tokenizer.eos_token_id is None:
            raise ValueError(
                "the text tokenizer has no end-of-text token (eos_token): no text would ever end"
            )

    @classmethod
    def from_tokenizer(cls, text_tokenizer: Any) -> MultimodalProcessor:
        """From a tokenizer that VisualVocabulary.extend extended, now or before it was saved."""
        return cls(text_tokenizer, VisualVocabulary.from_tokenizer(text_tokenizer))

    def text(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        # An example's text is encoded when its length is planned, and again when it is built
        ids = self._recent.get(text) if isinstance(text, str) else None
        if ids is None:
            ids = self.vocabulary.encode_text(self.text_tokenizer, text)
            if len(text) <= KEPT_LENGTH:
                if len(self._recent) >= KEPT_TEXTS:
                    self._recent.clear()
                self._recent[text] = ids
        return [*ids]

    def codes(self, codes: Int64[Tensor, " n"]) -> list[int]:
        """Ids of the codes of an image, of nested codes of the first that have ids.

        Raises:
            VocabularyError: codes outside the codebook.
        """
        return self.vocabulary.list_ids(codes[: self.vocabulary.max_codes])

    def count(self, codes: int) -> int:
        """How many ids `codes` gives for so many codes."""
        most = self.vocabulary.max_codes
        return codes if most is None else min(codes, most)

    def decode(self, ids: Any) -> str:
        """The text of ids, without special tokens and image tokens."""
        return self.vocabulary.decode_text(self.text_tokenizer, ids)

    @cached_property
    def start(self) -> list[int]:
        """Ids that begin a sequence: the begin-of-text id, or none if the tokenizer has none."""
        bos = self.text_tokenizer.bos_token_id
        return [] if bos is None else [bos]

    @cached_property
    def stop(self) -> int:
        """The end-of-text id, which ends a sequence."""
        return int(self.text_tokenizer.eos_token_id)

    @cached_property
    def pad(self) -> int:
        """The id at positions that no token attends to."""
        pad = self.text_tokenizer.pad_token_id
        return self.stop if pad is None else int(pad)
