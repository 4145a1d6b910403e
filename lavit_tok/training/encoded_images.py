"""What a pixel decoder is trained on, from its frozen parts: pictures -> X_rec of their codes, latents of the VAE.

    uint8 [b 3 h w] -+- VisualTokenizer: encode, reconstruct -> features [b n d]
                     +- AutoencoderKL                        -> latents [b c h/f w/f]

For small data both can be computed once, of each picture and if wanted of its mirror image, and kept in memory as
float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavit_tok.codes import VisualCodes
from lavit_tok.decode.pipeline import load_model
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.training.denoising import vae_latents


@dataclass(frozen=True)
class Encoded:
    """Features and latents of the same pictures."""

    features: Float[Tensor, "batch patches width"]
    latents: Float[Tensor, "batch channels h w"]


class FrozenParts:
    """Tokenizer and VAE. No nn.Module, so that neither optimizer nor checkpoint nor DDP sees their tensors.

    Args:
        tokenizer: directory, Hub id or "default".
        vae: directory of an AutoencoderKL, or Hub id (owner/name, or owner/name/subfolder).
    """

    def __init__(self, tokenizer: str, vae: str) -> None:
        self.tokenizer = VisualTokenizer.from_pretrained(tokenizer).requires_grad_(False)
        self.vae: Any = load_vae(vae).requires_grad_(False)

    def to(self, device: torch.device | str) -> FrozenParts:
        self.tokenizer.to(device)
        self.vae.to(device)
        return self

    @torch.no_grad()
    def codes(self, images: UInt8[Tensor, "batch 3 h w"]) -> VisualCodes:
        """Codes, through the tokenizer's own preprocessing, deterministic."""
        return self.tokenizer.encode(
            images.cpu() if images.shape[-1] != self.tokenizer.config.image_size else images
        )

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "batch 3 h w"]) -> Encoded:
        """Features of the codes, and the mode of the VAE's posterior, scaled to unit variance; all in float32."""
        with torch.autocast(
            images.device.type, enabled=False
        ):  # under bf16 some 3 % of the codes would differ
            features = self.tokenizer.reconstruct_features(self.codes(images))
        return Encoded(features, vae_latents(self.vae, images))

    def fingerprint(self) -> Any:
        """A hash that every weight has gone into."""
        digest = hashlib.sha256()
        for module in (self.tokenizer, self.vae):
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        digest.update(str(self.vae.config.scaling_factor).encode())
        return digest


class EncodedSet:
    """All pictures of a split, encoded once.

    Args:
        pixels: the pictures.
        index: the number that a batch calls each of them by.
        parts: what encodes them.
        mirrored: encode the mirror image of each picture too.
        folder: where to keep the result, under a name made from weights and pictures; None keeps it in memory only.
        batch_size: pictures encoded at a time.
        report: called with (done, total) after each batch.
    """

    def __init__(
        self,
        pixels: UInt8[Tensor, "n 3 h w"],
        index: Int64[Tensor, " n"],
        parts: FrozenParts,
        flipped: bool = True,
        folder: Path | None = None,
        batch_size: int = 128,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sides = 2 if flipped else 1
        self.position = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64)
        self.position[index] = torch.arange(len(index))
        path = None
        if folder is not None:
            digest = parts.fingerprint()
            digest.update(pixels.contiguous().numpy().tobytes())
            path = folder / f"encoded-{digest.hexdigest()[:16]}-{self.sides}.safetensors"
        if path is not None and path.is_file():
            stored = load_file(path)
        else:
            stored = self._encode(pixels, parts, batch_size, report)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(stored, path.with_suffix(".partial"))
                path.with_suffix(".partial").replace(
                    path
                )  # a run that is stopped here leaves no half file
        self.features, self.latents = stored["features"], stored["latents"]

    def __call__(
        self, index: Int64[Tensor, " batch"], flipped: Tensor, device: torch.device | str
    ) -> Encoded:
        """Rows of these pictures, or of their mirror images where `mirrored` (bool [batch]) says so; float32."""
        rows = self.position[index.cpu()]
        if self.sides == 1 and bool(flipped.any()):
            raise ValueError("mirror images were not encoded before training")
        if bool((rows < 0).any()):
            raise ValueError(
                f"pictures {index[rows < 0].tolist()} were not encoded before training"
            )
        rows = self.sides * rows + flipped.cpu().long()
        return Encoded(
            self.features[rows].float().to(device), self.latents[rows].float().to(device)
        )

    def _encode(
        self, pixels: Tensor, parts: FrozenParts, batch_size: int, report: Any
    ) -> dict[str, Tensor]:
        device = parts.tokenizer.device
        stored: dict[str, Tensor] = {}
        for start, part in _batches(pixels, batch_size):
            if self.sides == 2:
                part = torch.stack([part, part.flip(3)], 1).flatten(
                    0, 1
                )  # picture, its mirror image, next picture ...
            encoded = parts(part.to(device))
            for name, values in (("features", encoded.features), ("latents", encoded.latents)):
                half = values.half().cpu()
                if not bool(half.isfinite().all()):
                    raise ValueError(
                        f"{name} of a picture from the {start}th on do not fit float16"
                    )
                rows = stored.setdefault(
                    name, torch.empty((self.sides * len(pixels), *half.shape[1:]), dtype=half.dtype)
                )
                rows[self.sides * start : self.sides * start + len(half)] = half
            if report is not None:
                report(start + len(part) // self.sides, len(pixels))
        return stored


def _batches(pixels: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, pixels[start : start + size]) for start in range(0, len(pixels), size))


def load_vae(name: str) -> AutoencoderKL:
    """An AutoencoderKL from a directory, read strictly, or from the Hub by diffusers (safetensors only)."""
    if Path(name).is_dir():
        return load_model(Path(name), AutoencoderKL)
    return AutoencoderKL.from_pretrained(**_on_hub(name), use_safetensors=True)


def load_unet(
    config: dict[str, Any] | None, start: str | None, sizes: dict[str, int]
) -> UNet2DConditionModel:
    """A U-Net of these sizes: random from a config, or from pretrained weights (a directory or Hub id).

    Pretrained weights may lack input channels; the kernel of the new ones is zero, so they change nothing at first
    (as InstructPix2Pix starts).

    Raises:
        ValueError: neither or both given, or pretrained sizes that do not fit.
    """
    if (config is None) == (start is None):
        raise ValueError("expected either unet (a config) or unet_from (pretrained weights)")
    if start is None:
        wrong = {
            k: (v, sizes[k]) for k, v in (config or {}).items() if k in sizes and v != sizes[k]
        }
        if wrong:
            raise ValueError(
                f"unet: settings do not fit VAE and condition (given, needed): {wrong}"
            )
        return UNet2DConditionModel.from_config({**(config or {}), **sizes})
    if Path(start).is_dir():
        unet = load_model(Path(start), UNet2DConditionModel)
    else:
        unet = UNet2DConditionModel.from_pretrained(**_on_hub(start), use_safetensors=True)
    got = {name: unet.config[name] for name in sizes}
    if got["in_channels"] < sizes["in_channels"]:
        _widen_input(unet, sizes["in_channels"])
        got["in_channels"] = sizes["in_channels"]
    if got != sizes:
        raise ValueError(
            f"unet_from {start}: expected sizes {sizes}, to fit VAE and condition, got {got}"
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


def _on_hub(name: str) -> dict[str, Any]:
    """owner/name[/subfolder] as diffusers' arguments."""
    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise ValueError(
            f"{name}: expected an existing directory, or a Hub id owner/name or owner/name/subfolder"
        )
    return {
        "pretrained_model_name_or_path": "/".join(parts[:2]),
        "subfolder": parts[2] if len(parts) == 3 else None,
    }
