"""What a pretrained diffusion model is conditioned on, and pictures drawn from that: what VL-GPT's detokenizer learns.

    pictures [b 3 h w] -its image encoder-> e_v [b n c] -.
    captions [b]       -its text encoder--> e_t [b m e] --+-> diffusion model -> pictures
                        one may be left out: the model's own null stands in its place

Training asks for the first two columns only: `draw` alone runs the diffusion model.
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
"""(tokens, width) of a condition."""


class DiffusionConditions(NamedTuple):
    """Of a batch of pictures; None where there is none, or it is left out."""

    image: Float[Tensor, "b n c"] | None
    text: Float[Tensor, "b m e"] | None


@runtime_checkable
class ConditionedDiffusion(Protocol):
    """One diffusion model's; what another class has to have to be learnt by the detokenizer."""

    settings: dict[str, Any]
    """Plain JSON from which condition_kinds.load_conditions makes it again."""
    image_shape: Shape | None
    """(n, c); None where the model has no image condition."""
    text_shape: Shape | None
    """(m, e); None where the model has no text condition."""

    def to(self, device: torch.device | str) -> ConditionedDiffusion: ...

    def image_condition(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """e_v, by the model's own frozen image encoder."""
        ...

    def text_condition(self, captions: Sequence[str]) -> Float[Tensor, "b m e"]:
        """e_t, by the model's own frozen text encoder."""
        ...

    def nulls(self) -> DiffusionConditions:
        """What stands for no picture and for no text, [1 n c] and [1 m e]; None where `draw` has its own."""
        ...

    def draw(
        self,
        condition: DiffusionConditions,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Any,
    ) -> list[Image.Image]:
        """A picture for each condition of a batch. Raises ValueError where nothing is left to draw from."""
        ...


class PixelDecoderConditions:
    """A PixelDecoder's: X_rec, the features of every patch that a picture's codes tell, which its projection reads.

    It was trained without captions and has no text condition: z_t has no tokens, and the loss no second term.

    Args:
        decoder: what draws.
        visual: the tokenizer whose codes it draws; None where nothing but drawing is asked.
        name: what the decoder was loaded from.

    Raises:
        ValueError: a tokenizer of other codes than the decoder's.
    """

    kind: ClassVar[str] = "pixel_decoder"
    text_shape = None

    def __init__(
        self, decoder: PixelDecoder, visual: VisualTokenizer | None, name: str = "default"
    ) -> None:
        self.decoder, self.visual = decoder, visual
        self.settings = {"kind": self.kind, "decoder": name}
        c = decoder.conditioner.config
        self.image_shape: Shape = (c.patches, c.width)
        own = None if visual is None else (visual.config.num_patches, visual.config.codebook_size)
        if own not in (None, (c.patches, c.codebook_size)):
            raise ValueError(
                f"the pixel decoder {name!r} draws (patches, codes) of {(c.patches, c.codebook_size)}, the visual "
                f"tokenizer makes {own}: its codes would be read as unrelated ones"
            )
        decoder.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls, visual: VisualTokenizer | None, decoder: str = "default"
    ) -> PixelDecoderConditions:
        """Raises WeightsError."""
        return cls(PixelDecoder.from_pretrained(decoder), visual, decoder)

    def to(self, device: torch.device | str) -> PixelDecoderConditions:
        self.decoder.to(device)
        return self

    @torch.no_grad()
    def image_condition(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """X_rec of the pictures' codes."""
        if self.visual is None:
            raise ValueError(
                "these conditions were loaded to draw: the image encoder, a visual tokenizer, is missing"
            )
        return self.decoder.conditioner.features(
            self.visual.to(images.device).encode(images)
        ).float()

    def text_condition(self, captions: Sequence[str]) -> Float[Tensor, "b m e"]:
        raise ValueError("a PixelDecoder has no text condition: it was trained without captions")

    def nulls(self) -> DiffusionConditions:
        """None: its null is no features but an embedding of its own, which `draw` lays beside."""
        return DiffusionConditions(None, None)

    def draw(
        self,
        condition: DiffusionConditions,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: Any = None,
    ) -> list[Image.Image]:
        if condition.image is None:
            raise ValueError(
                "a PixelDecoder has no other condition than the image: nothing is left to draw from"
            )
        own = self.decoder.conditioner
        given = own.projection(condition.image.to(self.decoder.device))
        options = num_inference_steps, guidance_scale, generator
        return self.decoder.decode_condition(given, own.unconditional(given), *options)
