"""What a user gives -> rows: texts and pictures to segments, put as the objective's training data put them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavit_lm.objectives.base import Objective
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualCodes, VisualTokenizer

Prompt = str | Sequence[Any]
"""Text, or a list of texts and pictures: anything VisualTokenizer.encode takes, files as pathlib.Path since a string is
text, or VisualCodes of one picture."""


@dataclass(frozen=True)
class Prompts:
    """Reads prompts for one model.

    Args:
        lexicon: its text tokenizer and visual vocabulary.
        visual: its visual tokenizer.
        objective: what it was trained with.
    """

    processor: MultimodalProcessor
    visual: VisualTokenizer
    objective: Objective

    def row(self, prompt: Prompt, opens: Literal["text", "image"]) -> TokenSequence:
        """The row after which a text or a picture is to be said. Raises ValueError."""
        return self.objective.prompt(self.segments(prompt), self.processor, opens)

    def for_image(self, prompt: Prompt) -> TokenSequence:
        """The row after which a picture is to be said, in the words that the model was trained to paint after."""
        return self.row(worded(prompt, self.objective.prompt_templates.image), "image")

    def segments(self, prompt: Prompt) -> list[Segment]:
        return [self.segment(part) for part in parts(prompt)]

    def segment(self, part: Any) -> Segment:
        """A text, or a picture with whatever the objective may read of it.

        Raises:
            ValueError: codes of several pictures, or of another codebook.
        """
        if isinstance(part, str):
            return TextSegment(part)
        if isinstance(part, VisualCodes):
            if len(part) != 1:
                raise ValueError(f"expected codes of one picture in a prompt, got {len(part)}")
            part.check(self.visual.config.codebook_size)
            return ImageSegment(part[0].cpu())
        pixels = self.visual.image_processor.to_uint8(part)
        if not self.objective.connectors.needs_codes:
            return ImageSegment(image=pixels[0])
        budget = self.objective.image_output.encode_budget(self.visual.config.num_patches)
        codes = self.visual.encode(pixels, budget=budget)
        assert codes.keep is not None
        return ImageSegment(codes[0].cpu(), pixels[0], codes.keep[0].cpu())


def parts(prompt: Prompt) -> list[Any]:
    """The prompt as a list."""
    return [prompt] if isinstance(prompt, str) else list(prompt)


def require_words(prompt: Prompt) -> Prompt:
    """The prompt, unless it is a string without any word: most likely an unset variable. Raises ValueError."""
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError(
            f"expected a prompt of words or pictures, got {prompt!r}: a picture of anything would be painted; "
            "[] asks for one"
        )
    return prompt


def worded(prompt: Prompt, prompt_templates: str) -> list[Any]:
    """The prompt between the words that the model was trained to paint after."""
    before, _, after = prompt_templates.partition("{}")
    whole = parts(prompt)
    if before:
        whole = (
            [before + whole[0], *whole[1:]]
            if whole and isinstance(whole[0], str)
            else [before, *whole]
        )
    if after:
        whole = (
            [*whole[:-1], whole[-1] + after]
            if whole and isinstance(whole[-1], str)
            else [*whole, after]
        )
    return whole


def path_or_image(source: Any) -> Any:
    """Where only a picture can be meant, a string is its file."""
    return Path(source) if isinstance(source, str) else source
