"""The records beside an objective: prompt templates, connectors, and image outputs.

image  -Connectors->  codes, or vectors of a bridge  -LM->  codes or vectors  -ImageOutput->  image
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.vocabulary.processor import MultimodalProcessor

if TYPE_CHECKING:
    from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer


@dataclass(frozen=True)
class PromptTemplates:
    """The text around a user's input, as in the objective's training data.

    Args:
        caption: text after an image that is to be captioned.
        image: prompt for generating an image; {} is the user's text.
        answer: text after an image for a question about it; {} is the question.
    """

    caption: str = ""
    image: str = "{}"
    answer: str = "Question: {} Answer:"


def unchanged(batch: PackedBatch, visual: Any, processor: MultimodalProcessor) -> PackedBatch:
    """The batch as it is."""
    return batch


@dataclass(frozen=True)
class Connectors:
    """How images enter the LM, and which modules an objective adds to it.

    Args:
        bridge: (visual tokenizer, hidden_size) -> a module that maps (uint8 [k 3 h w], bool [k
            patches]) to [m hidden_size], one vector for each `is_embedding` position; None: images
            enter as codes only.
        regressor: hidden_size -> a module [t hidden_size] -> [t hidden_size] that predicts vectors;
            None: ids only.
        codes: whose codes the LM reads or predicts: of "all" images, of those "not before text", or
            of "none"; the pixels of the others are enough.
        reads_vectors: whether the bridge reads vectors that another model generated, float [k n d],
            in place of pixels.
        complete_batch: called with a batch on its device, the frozen visual tokenizer and the
            processor; fills in ids that only the visual tokenizer can compute.
    """

    bridge: Callable[[Any, int], nn.Module] | None = None
    regressor: Callable[[int], nn.Module] | None = None
    codes: Literal["all", "not before text", "none"] = "all"
    reads_vectors: bool = False
    complete_batch: Callable[[PackedBatch, Any, MultimodalProcessor], PackedBatch] = unchanged

    @property
    def needs_pixels(self) -> bool:
        """Whether examples need the pixels of their images."""
        return self.bridge is not None and not self.reads_vectors

    def build(
        self, visual: VisualTokenizer, hidden_size: int
    ) -> tuple[nn.Module | None, nn.Module | None]:
        """New (bridge, regressor), initialized from torch's global generator, in this order."""
        bridge = None if self.bridge is None else self.bridge(visual, hidden_size)
        return bridge, None if self.regressor is None else self.regressor(hidden_size)


@dataclass(frozen=True)
class ImageVectors:
    """Images as a model generated them in vectors.

    Args:
        vectors: float [b n d].
        unconditional: float [1 n d], the vectors that the same model generates after an empty
            prompt; classifier-free guidance subtracts their condition.
    """

    vectors: Float[Tensor, "b n d"]
    unconditional: Float[Tensor, "1 n d"]


@runtime_checkable
class ImageDecoder(Protocol):
    """Decodes what a model generated for images."""

    def decode(self, outputs: Any, generator: Any = None, **options: Any) -> list[Any]:
        """Decode a batch of images.

        Args:
            outputs: VisualCodes, or ImageVectors; see ImageOutput.kind.
            generator: source of the noise; a list with one for each image makes each independent of
                its batch.
            options: num_inference_steps, guidance_scale, and whatever else the decoder accepts.

        Returns: an image for each, PIL by default.
        """
        ...


class CodesDecoder:
    """ImageDecoder of a PixelDecoder pipeline: images from codes."""

    def __init__(self, pipeline: PixelDecoder) -> None:
        self.pipeline = pipeline

    @property
    def codebook_size(self) -> int:
        """K, of the codes that can be decoded."""
        return self.pipeline.conditioner.config.codebook_size

    @property
    def fingerprint(self) -> str:
        """Identifies that codebook, see VisualTokenizer.fingerprint."""
        return self.pipeline.conditioner.fingerprint()

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str = "cpu") -> CodesDecoder:
        """Load "default", a directory or a Hub id. Raises WeightsError."""
        from lavit_tok import PixelDecoder  # late: a vocabulary alone needs no diffusers

        pipeline = PixelDecoder.from_pretrained(name, device=device)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline)

    def decode(self, outputs: VisualCodes, generator: Any = None, **options: Any) -> Any:
        """See ImageDecoder; options, such as output_type, are those of PixelDecoder's call.

        The mode is "sample" by default, if the decoder has it: the expected image is closer to an
        original, which generated codes do not have, and blurred.
        """
        if "sample" in self.pipeline.modes:
            options = {"mode": "sample", **options}
        result: Any = self.pipeline(outputs, generator=generator, **options)
        return result.images


@dataclass(frozen=True)
class ImageOutput:
    """What a model generates for an image, and within which limits.

    Args:
        kind: "codes" or "vectors".
        min_length: fewest codes or vectors of an image; None: the visual tokenizer's number of
            patches.
        max_length: most codes or vectors of an image; None: as above.
        emits_start: whether the model itself predicts the id that begins an image.
        load_decoder: (name, device) -> ImageDecoder; the name is "default", a directory or a Hub
            id.
        prompt_codes: codes of an image in a prompt or document, at most all; None for any number,
            unless min_length is greater than 1.
    """

    kind: Literal["codes", "vectors"] = "codes"
    min_length: int | None = 1
    max_length: int | None = None
    emits_start: bool = True
    load_decoder: Callable[[str, torch.device], ImageDecoder] = CodesDecoder.from_pretrained
    prompt_codes: int | None = None

    def limits(self, patches: int) -> tuple[int, int]:
        """(least, greatest) number of codes or vectors of an image."""
        limits = self.min_length, self.max_length
        return tuple(patches if n is None else n for n in limits)  # type: ignore[return-value]

    def encode_budget(self, patches: int) -> int | None:
        """The `budget` for encoding images of prompts and documents; None for any number."""
        least = self.limits(patches)[0]
        if least > 1:
            return least
        return None if self.prompt_codes is None else min(self.prompt_codes, patches)
