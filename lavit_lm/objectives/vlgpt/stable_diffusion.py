"""FrozenDiffusion of Stable Diffusion with an IP-Adapter, for VL-GPT's detokenizer at full size.

captions -CLIP text encoder-> e_t [b 77 768] --------------> U-Net's own cross-attention -.
images -CLIP image encoder-> e_v [b 257 1280] -IP-Adapter-> second cross-attention -------+-> images
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

from lavit_lm.objectives.vlgpt.diffusion import ConditionEmbeddings, Shape
from lavit_tok import VisualTokenizer, WeightsError
from lavit_tok.checkpoints.weights import require_finite


class StableDiffusion:
    """Stable Diffusion's text condition, and an IP-Adapter's image condition.

    Shapes follow from the models: for SD 1.5 the text is 77 x 768; the image is 257 x 1280 for
    adapters that read all tokens of their encoder's penultimate layer ("plus"), else the 1 x 1024
    of its projection.

    Args:
        model: directory or Hub id of a Stable Diffusion pipeline; it is loaded into the classes
            named here, whatever its model_index.json names.
        adapter: directory or Hub id of the adapter.
        folder: of the adapter's weights; contains a folder image_encoder.
        weights: the weights file, safetensors.

    Raises:
        WeightsError: components that are missing or unreadable.
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

        self.config = {
            "kind": self.kind,
            "model": model,
            "adapter": adapter,
            "folder": folder,
            "weights": weights,
        }
        if not weights.endswith(".safetensors"):
            raise WeightsError(
                f"{weights}: expected a safetensors file; loading other formats can run code"
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
            self.all_tokens = _uses_all_tokens(adapter, folder, weights)
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
        self.image_shape: Shape = whole if self.all_tokens else (1, c.projection_dim)
        self.device = torch.device("cpu")
        self._pipeline: Any = None

    @classmethod
    def load(cls, visual: VisualTokenizer | None, **arguments: Any) -> StableDiffusion:
        """The visual tokenizer is not used: the model has its own encoders."""
        return cls(**arguments)

    def to(self, device: torch.device | str) -> StableDiffusion:
        """Move the model."""
        self.device = torch.device(device)
        for part in (self.text_encoder, self.image_encoder, self._pipeline):
            if part is not None:
                part.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """By the encoder's own preprocessing: resize the shorter side, then center crop."""
        pil = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        return self._image_embeddings(self.processor(pil, return_tensors="pt").pixel_values)

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Float[Tensor, "b m e"]:
        """Padded or truncated to the encoder's length."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.text_shape[0]}
        ids = self.tokenizer(list(captions), return_tensors="pt", **options).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.float()

    @torch.no_grad()
    def null_embeddings(self) -> ConditionEmbeddings:
        """As the adapter was trained: the text "", and a mean-color image or a zero vector."""
        side = self.image_encoder.config.image_size
        if self.all_tokens:
            image = self._image_embeddings(torch.zeros(1, 3, side, side))  # the mean color
        else:
            image = torch.zeros(1, *self.image_shape, device=self.device)
        return ConditionEmbeddings(image, self.encode_texts([""]))

    @property
    def pipeline(self) -> Any:
        """A StableDiffusionPipeline with the adapter; U-Net and VAE are loaded on first use."""
        if self._pipeline is None:
            from diffusers import (
                AutoencoderKL,
                DDIMScheduler,
                StableDiffusionPipeline,
                UNet2DConditionModel,
            )

            model, s = self.config["model"], self.config
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
                # With low_cpu_mem_usage diffusers leaves tensors that the file lacks uninitialized.
                strict = {"low_cpu_mem_usage": False}
                self._pipeline.load_ip_adapter(
                    s["adapter"], subfolder=s["folder"], weight_name=s["weights"], **strict
                )
            except OSError as error:
                raise WeightsError(f"{model}, {s['adapter']}: {error}") from None
            require_finite(self._pipeline.vae, f"{model}/vae")
            require_finite(self._pipeline.unet, f"{model}/unet, {s['adapter']}")
            self._pipeline.set_progress_bar_config(disable=True)
            self._pipeline.to(self.device)
        return self._pipeline

    def generate(
        self,
        embeddings: ConditionEmbeddings,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: Any = None,
    ) -> list[Image.Image]:
        """See FrozenDiffusion."""
        batch = next((len(condition) for condition in embeddings if condition is not None), 0)
        if not batch:
            raise ValueError("both conditions are left out: nothing to generate from")
        null = [n.expand(batch, -1, -1) for n in self.null_embeddings() if n is not None]
        image, text = (
            n if condition is None else condition.to(self.device)
            for condition, n in zip(embeddings, null, strict=True)
        )
        guided = guidance_scale > 1  # diffusers' own condition for guidance
        images = torch.cat([null[0], image]) if guided else image
        return self.pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=null[1] if guided else None,
            ip_adapter_image_embeds=[images[:, None] if self.all_tokens else images],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        ).images

    def _image_embeddings(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n c"]:
        output = self.image_encoder(pixels.to(self.device), output_hidden_states=self.all_tokens)
        if self.all_tokens:
            return output.hidden_states[-2].float()
        return output.image_embeds[:, None].float()


def _uses_all_tokens(adapter: str, folder: str, weights: str) -> bool:
    """Whether an IP-Adapter reads all tokens of its encoder, or one pooled vector."""
    file = Path(adapter) / folder / weights
    if not Path(adapter).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(adapter, weights, subfolder=folder or None))
        except Exception as error:  # the Hub raises errors of many kinds
            raise WeightsError(
                f"{adapter}: neither a directory nor a Hub id that can be fetched: {error}"
            ) from None
    if not file.is_file():
        raise WeightsError(f"{file}: expected the weights of an IP-Adapter, found no such file")
    with safe_open(file, framework="pt") as opened:
        return "image_proj.proj.weight" not in opened.keys()  # noqa: SIM118
