"""Prompts: a user's texts and images -> segments -> the sequence that a model continues."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from lavit_lm.objectives.base import Objective
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualCodes

Prompt = str | Sequence[Any]
"""Text, or a list of texts and images: anything that VisualTokenizer.encode accepts, with files as
pathlib.Path (a string is text), or VisualCodes of one image."""


class Templated(list[Any]):
    """A prompt that contains the text of its templates."""


@dataclass(frozen=True)
class Prompts:
    """Builds the prompts of one model.

    Args:
        processor: its text tokenizer and visual vocabulary.
        visual_tokenizer: its VisualTokenizer; None for a model of text.
        objective: the objective of its training.
    """

    processor: MultimodalProcessor
    visual_tokenizer: Any
    objective: Objective

    def sequence(self, prompt: Prompt, output: Literal["text", "image"]) -> TokenSequence:
        """The sequence after which a text or an image is generated. Raises ValueError."""
        segments = self.segments(prompt, before_text=output == "text")
        return self.objective.prompt(segments, self.processor, output)

    def for_image(self, prompt: Prompt) -> TokenSequence:
        """The sequence after which an image is generated, with the objective's prompt template."""
        if not isinstance(prompt, Templated):
            prompt = apply_template(prompt, self.objective.prompt_templates.image)
        return self.sequence(prompt, "image")

    def segments(self, prompt: Prompt, before_text: bool = False) -> list[Segment]:
        """The segments of a prompt, see `segment`."""
        return [self.segment(part, before_text) for part in as_list(prompt)]

    def segment(self, part: Any, before_text: bool = False) -> Segment:
        """A text, or an image with codes and pixels as the objective needs them.

        Args:
            part: of a prompt.
            before_text: only a text comes after it, for which some objectives need no codes.

        Raises:
            ValueError: codes of several images, or of another codebook; an image without a visual
                tokenizer.
        """
        if isinstance(part, str):
            return TextSegment(part)
        if self.visual_tokenizer is None:
            raise ValueError(
                f"this model reads text only, it has no visual tokenizer: got {type(part).__name__}"
            )
        config = self.visual_tokenizer.config
        if isinstance(part, VisualCodes):
            if len(part) != 1:
                raise ValueError(f"expected codes of one image in a prompt, got {len(part)}")
            part.check(config.codebook_size)
            return ImageSegment(part[0].cpu())
        images = batch_of(part)
        if len(images) != 1:
            raise ValueError(
                f"expected one image in each element of a prompt, got {len(images)}: all but the "
                "first would be left out; list them as elements of their own"
            )
        pixels = self.visual_tokenizer.image_processor.to_uint8(images)
        codes_of = self.objective.connectors.codes
        if codes_of == "none" or (codes_of == "not before text" and before_text):
            return ImageSegment(image=pixels[0])
        budget = self.objective.image_output.encode_budget(config.num_patches)
        codes = self.visual_tokenizer.encode(pixels, budget=budget)
        assert codes.keep is not None
        return ImageSegment(codes[0].cpu(), pixels[0], codes.keep[0].cpu())


def as_list(prompt: Prompt) -> list[Any]:
    """The texts and images of a prompt. Raises ValueError for anything but a text or a list."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple):
        raise ValueError(
            "expected a prompt that is a text, or a list of texts and images, got "
            f"{type(prompt).__name__}: [image] is a prompt of one image"
        )
    return list(prompt)


def prompt_batch(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a batch. Raises ValueError for a single text, which is not a batch."""
    if not isinstance(prompts, list | tuple):
        raise ValueError(
            f"expected a list of prompts, got {type(prompts).__name__}: each of its items would be "
            "a prompt of its own; [prompt] is a batch of one"
        )
    return list(prompts)


def is_batch(images: Any) -> bool:
    """Whether this is a batch as VisualTokenizer.encode accepts it, not one image."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 4
    one = isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image | VisualCodes)
    return isinstance(images, Iterable) and not one and not hasattr(images, "read")


def batch_of(images: Any) -> list[Any]:
    """One image or a batch -> a list.

    Raises:
        ValueError: a set or a dict, whose order does not identify the image of each result.
    """
    if isinstance(images, set | frozenset | dict):
        raise ValueError(
            f"expected an image or a list of images, got a {type(images).__name__}: results could "
            "not be assigned to its images"
        )
    return list(images) if is_batch(images) else [images]


def require_text(prompt: Prompt) -> Prompt:
    """The prompt itself. Raises ValueError for a blank string, most likely an unset variable."""
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError(
            f"expected a prompt of text or images, got {prompt!r}; [] generates without a prompt"
        )
    return prompt


def apply_template(prompt: Prompt, template: str) -> list[Any]:
    """The prompt in place of {} in a template; text is joined with adjacent text."""
    before, _, after = template.partition("{}")
    parts = as_list(prompt)
    if before:
        joins = bool(parts) and isinstance(parts[0], str)
        parts = [before + parts[0], *parts[1:]] if joins else [before, *parts]
    if after:
        joins = bool(parts) and isinstance(parts[-1], str)
        parts = [*parts[:-1], parts[-1] + after] if joins else [*parts, after]
    return parts


def path_or_image(source: Any) -> Any:
    """The source of an image; a string is the path of a file."""
    return Path(source) if isinstance(source, str) else source
