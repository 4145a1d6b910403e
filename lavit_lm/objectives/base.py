"""What an objective is: what is laid out, who sees whom, what is predicted, which loss. It owns no training loop.

    segments  -layout->  Row: ids, roles, what is predicted (id or vector), who sees whom    -packing.py, masks.py->
    batch     -model->   Seen: states, inputs, heads                                          -losses->  named sums
    sums      -total->   one number to descend

A file of one class is all that another objective takes; docs/objectives.md has one written out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lavit_lm.models.losses import ModelOutput, Sum, cross_entropy
from lavit_lm.sequences.packing import Packed
from lavit_lm.sequences.segments import ImageSegment, Segment, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

Order = Literal["both", "image_first", "text_first", "given"]


class ObjectiveModules(NamedTuple):
    """What an objective adds to an LM; see SequenceModel."""

    bridge: nn.Module | None = None
    """(uint8 [k 3 h w], bool [k patches]) -> [m width], as many vectors as the rows' fed places."""
    regressor: nn.Module | None = None
    """[t width] -> [t width]."""


@dataclass(frozen=True)
class PromptTemplates:
    """How a user's wish is put to the model.

    Args:
        caption: what is said after a picture that is to be described.
        image: what is said to have a picture painted; {} is the user's text.
        answer: what is said after a picture to ask about it; {} is the question.
    """

    caption: str = ""
    image: str = "{}"
    answer: str = "Question: {} Answer:"


class Objective(ABC):
    """One way to learn text and pictures in one sequence. Subclasses are frozen dataclasses of plain settings."""

    name: ClassVar[str]
    """In a model's lavit_lm.json."""
    image_output: ClassVar[Literal["codes", "vectors"]] = "codes"
    """What the model says for a picture."""
    prompt_templates: ClassVar[PromptTemplates] = PromptTemplates()
    emits_image_start: ClassVar[bool] = True
    """Whether the model itself can say that a picture comes now."""

    @property
    def needs_pixels(self) -> bool:
        """Whether rows need the pictures themselves, beside their codes or in place of them."""
        return False

    def settings(self) -> dict[str, Any]:
        """What a model's directory says of it: plain JSON, from which its class makes it again."""
        return asdict(self)  # type: ignore[call-overload]

    @abstractmethod
    def layout(
        self,
        sample: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """One row of a sample, as it is trained on.

        All chance comes from the generator, and every draw is made whatever the sample is, so that rows do not change
        their neighbours'.

        Raises:
            ValueError: a sample that this objective cannot learn from, by its key.
        """

    @abstractmethod
    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        opens: Literal["text", "image"],
    ) -> TokenSequence:
        """The row after which a text or a picture is to be said; for a picture it ends with what opens one.

        Raises:
            ValueError: a request that this objective cannot meet.
        """

    def scoring_sequence(
        self, context: Sequence[Segment], answer: Segment, processor: MultimodalProcessor
    ) -> TokenSequence:
        """A row of which only the answer is predicted, for its likelihood."""
        raise ValueError(
            f"{self.name}: a likelihood of {type(answer).__name__.lower()}s is not defined"
        )

    def on_device(self, batch: Packed, visual: Any, processor: MultimodalProcessor) -> Packed:
        """A batch as it has come to the device, with ids that only the visual tokenizer can tell; by default as it is.

        Args:
            visual: the frozen VisualTokenizer, which may be on another device.
        """
        return batch

    def losses(self, seen: ModelOutput, batch: Packed) -> dict[str, Sum]:
        """Named sums; by default {"text": ..., "image": ...}, sums of nats."""
        return cross_entropy(seen, batch)

    @abstractmethod
    def total(self, losses: dict[str, Sum]) -> Tensor:
        """The loss to descend."""

    def parts(self, visual: Any, width: int) -> ObjectiveModules:
        """New bridge and regression head, drawn from torch's own generator.

        Args:
            visual: the frozen VisualTokenizer.
            width: the LM's.
        """
        return ObjectiveModules()

    def decoder(self, name: str, device: torch.device) -> Any:
        """What draws the pictures that the model says: called with codes, or with vectors and those of no prompt.

        Args:
            name: "default", a directory or a Hub id.
        """
        from lavit_tok import PixelDecoder  # here, since a vocabulary alone needs no diffusers

        drawn = PixelDecoder.from_pretrained(name, device=device)
        drawn.set_progress_bar_config(disable=True)
        return drawn

    def lengths(self, patches: int) -> tuple[int, int]:
        """How many codes, or vectors, a picture that is said has at least and at most."""
        return 1, patches


def ordered(sample: Sequence[Segment], order: Order, chance: float, key: str = "") -> list[Segment]:
    """A pair of a picture and a text in the order asked for, "both" by chance in 0..1; anything else as it is.

    Raises:
        ValueError: no segments at all.
    """
    segments = list(sample)
    if not segments:
        raise ValueError(f"sample {key!r} has no segments: nothing could be learnt from it")
    if order != "given" and sorted(type(s).__name__ for s in segments) == [
        "ImageSegment",
        "TextSegment",
    ]:
        image_first = order == "image_first" or (order == "both" and chance < 0.5)
        segments.sort(key=lambda s: isinstance(s, ImageSegment) != image_first)
    return segments


def require_pixels(image: ImageSegment, name: str, key: str = "") -> ImageSegment:
    """The image, if it has the picture itself. Raises ValueError."""
    if image.image is None:
        of = f"sample {key!r}" if key else "the prompt"
        raise ValueError(
            f"{name} reads pictures, and {of} has only the codes of one: give the picture itself"
        )
    return image
