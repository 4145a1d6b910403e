"""MultimodalProcessor: a text tokenizer and its visual vocabulary, which together turn any segment into ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary


@dataclass(frozen=True)
class MultimodalProcessor:
    """What an objective needs to write rows of ids.

    Args:
        tokenizer: a fast `transformers` tokenizer that holds the visual tokens.
        vocabulary: where they are.

    Raises:
        ValueError: a tokenizer without an end-of-text token: no row could be closed, no generation would stop.
    """

    tokenizer: Any
    vocabulary: VisualVocabulary

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the text tokenizer has no end-of-text token (eos_token): no text would ever end"
            )

    @classmethod
    def of(cls, tokenizer: Any) -> MultimodalProcessor:
        """From a tokenizer that was extended by VisualVocabulary.extend, also one loaded by plain AutoTokenizer."""
        return cls(tokenizer, VisualVocabulary.of(tokenizer))

    def text(self, text: str) -> list[int]:
        """Ids of a user's words, never a special one."""
        return self.vocabulary.encode_text(self.tokenizer, text)

    def codes(self, codes: Int64[Tensor, " n"]) -> list[int]:
        """Ids of an image's codes. Raises VocabularyError for codes of another codebook."""
        return self.vocabulary.to_ids(codes).tolist()

    @property
    def start(self) -> list[int]:
        """What a row begins with: the tokenizer's begin-of-text id, or nothing where it has none."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    @property
    def stop(self) -> int:
        """The id that ends a row."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """The id at places that nobody reads."""
        pad = self.tokenizer.pad_token_id
        return self.stop if pad is None else int(pad)
