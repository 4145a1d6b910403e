"""The training inputs of a pixel decoder, computed by its frozen encoders.

    uint8 [b 3 h w] -+- VisualTokenizer: encode, reconstruct_features -> features [b n d]
                     +- AutoencoderKL                                 -> latents [b c h/f w/f]

For small data sets both can be computed once per image, and once for its horizontal flip, and kept
in memory as float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Bool, Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavit_tok.checkpoints.files import atomic
from lavit_tok.checkpoints.weights import PACKAGE, require_finite, require_on_hub, update_digest
from lavit_tok.codes import VisualCodes
from lavit_tok.decode.pipeline import load_model
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.training.denoising import vae_latents
from lavit_tok.training.frozen import Frozen


@dataclass(frozen=True)
class Encoded:
    """Features and latents of the same images."""

    features: Float[Tensor, "batch patches width"]
    latents: Float[Tensor, "batch channels h w"]


class FrozenEncoders:
    """Tokenizer and VAE, both frozen.

    Args:
        tokenizer: "default", directory or Hub id.
        vae: "selected", directory of an AutoencoderKL, or Hub id (owner/name/subfolder).
    """

    def __init__(self, tokenizer: str, vae: str) -> None:
        self._tokenizer = Frozen(VisualTokenizer.from_pretrained(tokenizer))
        self._vae: Frozen[Any] = Frozen(load_vae(vae))

    @property
    def tokenizer(self) -> VisualTokenizer:
        """The tokenizer."""
        return self._tokenizer.module

    @property
    def vae(self) -> Any:
        """The AutoencoderKL."""
        return self._vae.module

    def to(self, device: torch.device | str) -> None:
        """Move both."""
        self._tokenizer.to(device)
        self._vae.to(device)

    @torch.no_grad()
    def codes(self, images: UInt8[Tensor, "batch 3 h w"]) -> VisualCodes:
        """Codes, through the tokenizer's own preprocessing, deterministic."""
        return self.tokenizer.encode(
            images.cpu() if images.shape[-1] != self.tokenizer.config.image_size else images
        )

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "batch 3 h w"]) -> Encoded:
        """Reconstructed features of the codes, and latents of the VAE; all in float32."""
        # Without autocast: under bf16 about 3 % of the codes would differ.
        with torch.autocast(images.device.type, enabled=False):
            features = self.tokenizer.reconstruct_patches(self.codes(images)).joined
        return Encoded(features, vae_latents(self.vae, images))

    def digest(self) -> Any:
        """A hash object over all weights."""
        sha = hashlib.sha256()
        for module in (self.tokenizer, self.vae):
            update_digest(sha, module)
        sha.update(str(self.vae.config.scaling_factor).encode())
        return sha


class EncodedSet:
    """All images of a split, encoded once.

    Args:
        pixels: the images.
        index: the number of each image in a batch's `index`.
        encoders: the frozen encoders.
        flipped: encode the horizontal flip of each image too.
        folder: where to keep the result, under a name that depends on weights and images; None
            keeps it in memory only.
        batch_size: images that are encoded at a time.
        report: called with (done, total) after each batch.
    """

    def __init__(
        self,
        pixels: UInt8[Tensor, "n 3 h w"],
        index: Int64[Tensor, " n"],
        encoders: FrozenEncoders,
        flipped: bool = True,
        folder: Path | None = None,
        batch_size: int = 128,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.views = 2 if flipped else 1  # stored per image: itself, then its flip
        self.position = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64)
        self.position[index] = torch.arange(len(index))
        path = None
        if folder is not None:
            sha = encoders.digest()
            sha.update(pixels.contiguous().numpy().tobytes())
            path = folder / f"encoded-{sha.hexdigest()[:16]}-{self.views}.safetensors"
        if path is not None and path.is_file():
            stored = load_file(path)
        else:
            stored = self._encode(pixels, encoders, batch_size, report)
            if path is not None:
                with atomic(path) as partial:
                    save_file(stored, partial)
        self.features, self.latents = stored["features"], stored["latents"]

    def __call__(
        self,
        index: Int64[Tensor, " batch"],
        flipped: Bool[Tensor, " batch"],
        device: torch.device | str,
    ) -> Encoded:
        """These images, or their flips where `flipped` is true; float32."""
        position = self.position[index.cpu()]
        if self.views == 1 and bool(flipped.any()):
            raise ValueError("flipped images were not encoded before training")
        if bool((position < 0).any()):
            missing = index[position < 0].tolist()
            raise ValueError(f"images {missing} were not encoded before training")
        position = self.views * position + flipped.cpu().long()
        features, latents = self.features[position], self.latents[position]
        return Encoded(features.float().to(device), latents.float().to(device))

    def _encode(
        self, pixels: Tensor, encoders: FrozenEncoders, batch_size: int, report: Any
    ) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for start in range(0, len(pixels), batch_size):
            images = pixels[start : start + batch_size]
            if self.views == 2:
                images = torch.stack([images, images.flip(3)], 1).flatten(0, 1)
            encoded = encoders(images.to(encoders.tokenizer.device))
            for name, values in (("features", encoded.features), ("latents", encoded.latents)):
                half = values.half().cpu()
                if not bool(half.isfinite().all()):
                    raise ValueError(
                        f"{name} of images {start} to {start + batch_size} do not fit float16"
                    )
                if name not in stored:
                    stored[name] = half.new_empty((self.views * len(pixels), *half.shape[1:]))
                first = self.views * start
                stored[name][first : first + len(half)] = half
            if report is not None:
                report(start + len(images) // self.views, len(pixels))
        return stored


def load_vae(name: str) -> AutoencoderKL:
    """An AutoencoderKL: "selected", a directory, read strictly, or a Hub id (safetensors only)."""
    if name == "selected":  # of the shipped models only this one has an autoencoder
        name = str(PACKAGE / name / "decoder" / "vae")
    if Path(name).is_dir():
        return load_model(Path(name), AutoencoderKL)
    vae = AutoencoderKL.from_pretrained(**_hub_path(name), use_safetensors=True)
    require_finite(vae, name)
    return vae


def load_unet(
    config: dict[str, Any] | None, pretrained: str | None, sizes: dict[str, int]
) -> UNet2DConditionModel:
    """A U-Net of these sizes, with random weights (config) or pretrained (directory, Hub id).

    Pretrained weights may lack input channels: the kernel of the new ones is zero, so that they do
    not change the prediction at first (as in InstructPix2Pix).

    Raises:
        ValueError: neither or both given, or pretrained sizes that do not fit.
    """
    if (config is None) == (pretrained is None):
        raise ValueError("expected either unet.config or unet.pretrained")
    if pretrained is None:
        config = config or {}
        wrong = {k: (v, sizes[k]) for k, v in config.items() if k in sizes and v != sizes[k]}
        if wrong:
            raise ValueError(
                f"unet.config: values do not fit VAE and condition (given, required): {wrong}"
            )
        return UNet2DConditionModel.from_config({**config, **sizes})
    if Path(pretrained).is_dir():
        unet = load_model(Path(pretrained), UNet2DConditionModel)
    else:
        unet = UNet2DConditionModel.from_pretrained(**_hub_path(pretrained), use_safetensors=True)
        require_finite(unet, pretrained)
    got = {name: unet.config[name] for name in sizes}
    if got["in_channels"] < sizes["in_channels"]:
        _widen_input(unet, sizes["in_channels"])
        got["in_channels"] = sizes["in_channels"]
    if got != sizes:
        raise ValueError(
            f"unet.pretrained {pretrained}: expected sizes {sizes} for VAE and condition, got {got}"
        )
    return unet.train()


@torch.no_grad()
def _widen_input(unet: UNet2DConditionModel, channels: int) -> None:
    old: Any = unet.conv_in
    new: Any = nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding)
    new.weight.zero_()
    new.weight[:, : old.in_channels] = old.weight
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)


def _hub_path(name: str) -> dict[str, Any]:
    """owner/name[/subfolder] as diffusers' arguments."""
    require_on_hub(name)
    names = name.split("/")
    return {
        "pretrained_model_name_or_path": "/".join(names[:2]),
        "subfolder": names[2] if len(names) == 3 else None,
    }
