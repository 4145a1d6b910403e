"""The frozen diffusion model whose condition embeddings VL-GPT's detokenizer estimates.

    images [b 3 h w] -its image encoder-> e_v [b n c] -.
    captions [b]     -its text encoder--> e_t [b m e] --+-> diffusion model -> images
                      a missing one is replaced by the model's own null embedding

Training runs the encoders only; `generate` alone runs the diffusion model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lavit_tok import PixelDecoder, VisualTokenizer

Shape = tuple[int, int]
"""(tokens, width) of condition embeddings."""


class ConditionEmbeddings(NamedTuple):
    """Condition embeddings of a batch; None for a condition that is missing or left out."""

    image: Float[Tensor, "b n c"] | None
    text: Float[Tensor, "b m e"] | None


@runtime_checkable
class FrozenDiffusion(Protocol):
    """A pretrained diffusion model and its condition encoders."""

    config: dict[str, Any]
    """Plain JSON from which load_diffusion makes it again."""
    image_shape: Shape | None
    """(n, c); None if the model has no image condition."""
    text_shape: Shape | None
    """(m, e); None if the model has no text condition."""

    def to(self, device: torch.device | str) -> FrozenDiffusion:
        """Move the model."""
        ...

    def encode_images(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """e_v, by the model's own frozen image encoder."""
        ...

    def encode_texts(self, captions: Sequence[str]) -> Float[Tensor, "b m e"]:
        """e_t, by the model's own frozen text encoder."""
        ...

    def null_embeddings(self) -> ConditionEmbeddings:
        """Embeddings [1 n c], [1 m e] of no image and no text; None if `generate` has its own."""
        ...

    def generate(
        self,
        embeddings: ConditionEmbeddings,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Any,
    ) -> list[Image.Image]:
        """An image for each batch element. Raises ValueError if both conditions are missing."""
        ...


def load_diffusion(config: dict[str, Any], visual: VisualTokenizer | None) -> FrozenDiffusion:
    """Load a diffusion model by its "kind", one of two, never a class path from a file.

    Args:
        config: {"kind": "pixel_decoder", "decoder": ...} or {"kind": "stable_diffusion", "model":
            ..., ...}.
        visual: the visual tokenizer; None to generate only.

    Raises:
        ValueError: another kind, or arguments that it does not have.
        WeightsError: weights that cannot be read.
    """
    from lavit_lm.objectives.vlgpt.stable_diffusion import StableDiffusion

    kinds: dict[str, Any] = {k.kind: k for k in (PixelDecoderDiffusion, StableDiffusion)}
    arguments = {name: value for name, value in config.items() if name != "kind"}
    try:
        return kinds[config["kind"]].load(visual, **arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"conditions: expected one of {sorted(kinds)} and its arguments, got {config}: {error}"
        ) from None


class PixelDecoderDiffusion:
    """FrozenDiffusion of a PixelDecoder, conditioned on features reconstructed from codes.

    It was trained without captions and has no text condition: z_t has no tokens, and the loss no
    second term. A sample decoder can replace the diffusion model and has no denoising steps; its
    condition is the features and colors of all nested codes.

    Args:
        decoder: generates the images.
        visual: the tokenizer whose codes it decodes; None to generate only.
        name: what the decoder was loaded from.

    Raises:
        ValueError: a decoder of means alone; a tokenizer of other codes than the decoder's.
    """

    kind: ClassVar[str] = "pixel_decoder"
    text_shape = None

    def __init__(
        self, decoder: PixelDecoder, visual: VisualTokenizer | None, name: str = "selected"
    ) -> None:
        if "sample" not in decoder.modes:
            raise ValueError(
                f"expected a pixel decoder with a diffusion model or a sample decoder, got {name!r}"
            )
        self.decoder, self.visual = decoder, visual
        self.config = {"kind": self.kind, "decoder": name}
        c = decoder.conditioner.config
        self.image_shape: Shape = (c.patches, c.width + 3 * c.color_cells**2)
        expected = (c.patches, c.codebook_size)
        given = None if visual is None else (visual.config.num_patches, visual.config.codebook_size)
        if given not in (None, expected):
            raise ValueError(
                f"the pixel decoder {name!r} decodes (patches, codebook size) {expected}, the "
                "visual "
                f"tokenizer has {given}: its codes would be decoded as unrelated ones"
            )
        decoder.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls, visual: VisualTokenizer | None, decoder: str = "selected"
    ) -> PixelDecoderDiffusion:
        """Raises WeightsError."""
        return cls(PixelDecoder.from_pretrained(decoder), visual, decoder)

    def to(self, device: torch.device | str) -> PixelDecoderDiffusion:
        """Move the model."""
        self.decoder.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """Features of every patch, reconstructed from the images' codes."""
        if self.visual is None:
            raise ValueError("loaded to generate only: there is no visual tokenizer to encode with")
        every = self.visual.config.num_patches if self.visual.nested else None
        codes = self.visual.to(images.device).encode(images, every)
        return self.decoder.conditioner.features(codes).float()

    def encode_texts(self, captions: Sequence[str]) -> Float[Tensor, "b m e"]:
        """Raises ValueError: there is no text condition."""
        raise ValueError("a PixelDecoder has no text condition: it was trained without captions")

    def null_embeddings(self) -> ConditionEmbeddings:
        """None: `generate` adds the projection's learned null embedding itself."""
        return ConditionEmbeddings(None, None)

    def generate(
        self,
        embeddings: ConditionEmbeddings,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: Any = None,
    ) -> list[Image.Image]:
        """See FrozenDiffusion."""
        if embeddings.image is None:
            raise ValueError(
                "a PixelDecoder has no condition but the image: nothing to generate from"
            )
        if self.decoder.unet is None:
            return self.decoder.decode_features(embeddings.image, "sample", generator)
        conditioner = self.decoder.conditioner
        condition = conditioner.projection(embeddings.image.to(self.decoder.device))
        options = num_inference_steps, guidance_scale, generator
        return self.decoder.decode_condition(
            condition, conditioner.unconditional(condition), *options
        )
