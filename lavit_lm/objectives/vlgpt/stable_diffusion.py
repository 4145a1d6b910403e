"""ConditionedDiffusion of Stable Diffusion with an IP-Adapter, for VL-GPT's detokenizer at full size; see pixels/conditions.py.

captions -CLIP text encoder-> e_t [b 77 768] -------------------> U-Net's own cross-attention -.
pictures -CLIP image encoder-> e_v [b 257 1280] -IP-Adapter-> its second cross-attention ------+-> pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lavit_lm.objectives.vlgpt.conditions import DiffusionConditions, Shape
from lavit_tok import VisualTokenizer, WeightsError


class StableDiffusionConditions:
    """Stable Diffusion's text condition beside an IP-Adapter's image condition, each attended to on its own.

    Shapes follow from the models: of SD 1.5 the text is 77 x 768; the image is 257 x 1280 for adapters that read all of
    their encoder's last but one layer ("plus"), else the 1 x 1024 of its projection.

    Args:
        model: directory or Hub id of a Stable Diffusion pipeline. Its classes are the ones named here, whatever its
            model_index.json says.
        adapter: directory or Hub id of the adapter.
        folder: of the adapter's weights, with a folder image_encoder in it.
        weights: their file, safetensors.

    Raises:
        WeightsError: parts that are missing or unreadable.
    """

    kind: ClassVar[str] = "stable_diffusion"

    def __init__(
        self,
        model: str,
        adapter: str = "h94/IP-Adapter",
        folder: str = "models",
        weights: str = "ip-adapter-plus_sd15.safetensors",
    ) -> None:
        from transformers import (
            CLIPImageProcessorPil,
            CLIPTextModel,
            CLIPTokenizer,
            CLIPVisionModelWithProjection,
        )

        self.settings = {
            "kind": self.kind,
            "model": model,
            "adapter": adapter,
            "folder": folder,
            "weights": weights,
        }
        if not weights.endswith(".safetensors"):
            raise WeightsError(
                f"{weights}: expected a safetensors file; other formats can run code when they are read"
            )
        safe: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
        try:
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
            self.text_encoder: Any = CLIPTextModel.from_pretrained(
                model, subfolder="text_encoder", **safe
            )
            at = f"{folder}/image_encoder"
            self.image_encoder: Any = CLIPVisionModelWithProjection.from_pretrained(
                adapter, subfolder=at, **safe
            )
            self.grid = _reads_a_grid(adapter, folder, weights)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{model}, {adapter}: {error}") from None
        for encoder in (self.text_encoder, self.image_encoder):
            encoder.requires_grad_(False).eval()
        side = self.image_encoder.config.image_size
        square = {"height": side, "width": side}
        self.processor: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
        self.text_shape: Shape = (
            self.tokenizer.model_max_length,
            self.text_encoder.config.hidden_size,
        )
        c = self.image_encoder.config
        whole = ((side // c.patch_size) ** 2 + 1, c.hidden_size)
        self.image_shape: Shape = whole if self.grid else (1, c.projection_dim)
        self.device = torch.device("cpu")
        self._pipeline: Any = None

    @classmethod
    def load(cls, visual: VisualTokenizer | None, **settings: Any) -> StableDiffusionConditions:
        """Its encoders are its own; the visual tokenizer is not asked."""
        return cls(**settings)

    def to(self, device: torch.device | str) -> StableDiffusionConditions:
        self.device = torch.device(device)
        for part in (self.text_encoder, self.image_encoder, self._pipeline):
            if part is not None:
                part.to(device)
        return self

    @torch.no_grad()
    def image_condition(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """By the encoder's own preprocessing: shorter side to its size, then its centre."""
        opened = [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in images]
        return self._seen(self.processor(opened, return_tensors="pt").pixel_values)

    @torch.no_grad()
    def text_condition(self, captions: Sequence[str]) -> Float[Tensor, "b m e"]:
        """Padded to the encoder's length, and cut off there."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.text_shape[0]}
        ids = self.tokenizer(list(captions), return_tensors="pt", **options).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.float()

    @torch.no_grad()
    def nulls(self) -> DiffusionConditions:
        """As the adapter was trained: the text "", and a grey picture's grid, or zeros in the place of one vector."""
        side = self.image_encoder.config.image_size
        grey = torch.zeros(1, 3, side, side)
        image = (
            self._seen(grey) if self.grid else torch.zeros(1, *self.image_shape, device=self.device)
        )
        return DiffusionConditions(image, self.text_condition([""]))

    @property
    def pipeline(self) -> Any:
        """diffusers' StableDiffusionPipeline with the adapter; U-Net and VAE are read when it is first asked for."""
        if self._pipeline is None:
            from diffusers import (
                AutoencoderKL,
                DDIMScheduler,
                StableDiffusionPipeline,
                UNet2DConditionModel,
            )

            model, s = self.settings["model"], self.settings
            try:
                self._pipeline = StableDiffusionPipeline(
                    vae=AutoencoderKL.from_pretrained(model, subfolder="vae", use_safetensors=True),
                    text_encoder=self.text_encoder,
                    tokenizer=self.tokenizer,
                    unet=UNet2DConditionModel.from_pretrained(
                        model, subfolder="unet", use_safetensors=True
                    ),
                    scheduler=DDIMScheduler.from_pretrained(model, subfolder="scheduler"),
                    safety_checker=None,
                    feature_extractor=self.processor,
                    image_encoder=self.image_encoder,
                    requires_safety_checker=False,
                )
                # Without it tensors are read as they come, and missing ones stay unset.
                strict = {"low_cpu_mem_usage": False}
                self._pipeline.load_ip_adapter(
                    s["adapter"], subfolder=s["folder"], weight_name=s["weights"], **strict
                )
            except OSError as error:
                raise WeightsError(f"{model}, {s['adapter']}: {error}") from None
            self._pipeline.set_progress_bar_config(disable=True)
            self._pipeline.to(self.device)
        return self._pipeline

    def draw(
        self,
        condition: DiffusionConditions,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: Any = None,
    ) -> list[Image.Image]:
        batch = next((len(one) for one in condition if one is not None), 0)
        if not batch:
            raise ValueError("both conditions are left out: nothing is left to draw from")
        null = self.nulls()
        free = [one.expand(batch, -1, -1) for one in null if one is not None]
        image, text = (
            a if one is None else one.to(self.device)
            for one, a in zip(condition, free, strict=True)
        )
        guided = guidance_scale > 1  # as diffusers has it
        seen = torch.cat([free[0], image]) if guided else image
        return self.pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=free[1] if guided else None,
            ip_adapter_image_embeds=[seen[:, None] if self.grid else seen],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        ).images

    def _seen(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n c"]:
        shown = self.image_encoder(pixels.to(self.device), output_hidden_states=self.grid)
        return (shown.hidden_states[-2] if self.grid else shown.image_embeds[:, None]).float()


def _reads_a_grid(adapter: str, folder: str, weights: str) -> bool:
    """Whether an IP-Adapter reads all of its encoder's tokens, as its weights tell, and not one vector alone."""
    file = Path(adapter) / folder / weights
    if not Path(adapter).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(adapter, weights, subfolder=folder or None))
        except Exception as error:  # the hub's errors are of many kinds
            raise WeightsError(
                f"{adapter}: neither a directory nor a Hub id that can be fetched: {error}"
            ) from None
    if not file.is_file():
        raise WeightsError(f"{file}: expected the weights of an IP-Adapter, found none")
    with safe_open(file, framework="pt") as opened:
        return "image_proj.proj.weight" not in opened.keys()  # noqa: SIM118
