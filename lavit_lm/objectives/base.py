"""Objective: how examples become sequences, what is predicted, and with which loss.

    segments     -layout->  TokenSequence: ids, roles, targets, prefix     -packing.py, masks.py->
    PackedBatch  -model->   ModelOutput: hidden states, inputs, heads      -losses->  named sums
    named sums   -total->   the loss of a training step

A new objective is one class in one file; docs/objectives.md contains a complete one. How a model is
prompted, how images enter it and what it generates for an image are records beside the objective
(records.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lavit_lm.models.losses import LossSum, ModelOutput, cross_entropy
from lavit_lm.objectives.records import Connectors, ImageOutput, PromptTemplates
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.segments import ImageSegment, Segment, SegmentLength
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

PairOrder = Literal["both", "image_first", "text_first", "given"]


class Objective(ABC):
    """One way to learn text and images in one sequence; a frozen dataclass of plain values."""

    name: ClassVar[str]
    """The objective's name in a saved model's lavit_lm.json."""

    @property
    def prompt_templates(self) -> PromptTemplates:
        """The text around prompts."""
        return PromptTemplates()

    @property
    def connectors(self) -> Connectors:
        """How images enter the LM; by default as codes, without further modules."""
        return Connectors()

    @property
    def image_output(self) -> ImageOutput:
        """What is generated for an image; by default codes, at most one for each patch."""
        return ImageOutput()

    @property
    def restricted_softmax(self) -> bool:
        """Whether ids are predicted among those only that can be at their position; see LaVIT."""
        return False

    @property
    def vector_noise(self) -> float:
        """Noise on the input vectors of images in training; see sequence_model.noisy_vectors."""
        return 0.0

    @abstractmethod
    def layout(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """Build the training sequence of an example.

        All randomness comes from the generator; the same numbers are drawn whatever the example
        contains.

        Raises:
            ValueError: an example that this objective cannot learn from, named by its key.
        """

    def sequence_length(
        self,
        lengths: Sequence[SegmentLength],
        processor: MultimodalProcessor,
        generator: torch.Generator,
    ) -> int | None:
        """The length of the sequence that `layout` builds for segments of these lengths.

        Returns: None if it cannot be computed; the sampler then builds the sequence to plan blocks.
        """
        return None

    @abstractmethod
    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        output: Literal["text", "image"],
    ) -> TokenSequence:
        """Build the sequence after which a text is generated, or an image if it ends with <img>.

        Raises:
            ValueError: a prompt that this objective cannot continue.
        """

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """Build a sequence of which only the answer is predicted, for its likelihood."""
        kind = "image" if answer.is_image else "text"
        raise ValueError(f"{self.name}: the likelihood of {kind} segments is not defined")

    def losses(self, output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
        """Named sums over targets; by default {"text", "image"}, cross-entropy in nats."""
        return cross_entropy(output, batch)

    @abstractmethod
    def total(self, losses: dict[str, LossSum]) -> Tensor:
        """The loss to minimize."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON from which the class builds the objective again."""
        return asdict(self)  # type: ignore[call-overload]


S = TypeVar("S", Segment, SegmentLength)
"""A segment, or its length."""


def ordered(
    segments: Sequence[S], order: PairOrder, draw: float, key: str = ""
) -> tuple[list[S], bool]:
    """Sort an image-text pair into the requested order.

    Args:
        segments: of an example, or their lengths.
        order: "both" puts the image first where `draw` is below 0.5.
        draw: a uniform random number in 0..1.
        key: of the example, for messages.

    Returns: the segments, and whether they are a pair that was sorted; other examples keep their
    order, as does a pair of which only one is a target: an image to a given text, or a text to a
    given image.

    Raises:
        ValueError: no segments.
    """
    if not segments:
        raise ValueError(f"example {key!r} has no segments: there is nothing to learn from it")
    is_pair = sorted(s.is_image for s in segments) == [False, True]
    if order == "given" or not is_pair or not all(s.is_target for s in segments):
        return list(segments), False
    image_first = order == "image_first" or (order == "both" and draw < 0.5)
    return sorted(segments, key=lambda s: s.is_image != image_first), True


def require_pixels(segment: ImageSegment, name: str, key: str = "") -> ImageSegment:
    """The segment, if it has pixels. Raises ValueError."""
    if segment.image is None:
        of = f"example {key!r}" if key else "the prompt"
        raise ValueError(
            f"{name} needs the pixels of images, and {of} has only the codes of one: pass the "
            "image itself"
        )
    return segment
