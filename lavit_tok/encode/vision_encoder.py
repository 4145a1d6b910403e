"""Room 2: pixels -> patch features, by any vision transformer of `transformers`, frozen.

    float [b 3 h w]  ->  the residual stream after the last block, class and register tokens dropped  ->  float [b n d]

LaVIT reads its encoder before the final norm; many transformers models only return what comes after it. A hook on the
last block reads the stream the same way in all of them, so one table of names is all that a new encoder needs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lavit_tok.config import ConfigError

ENCODERS = {
    "blip_2_vision_model": ("Blip2VisionConfig", "Blip2VisionModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
    "siglip2_vision_model": ("Siglip2VisionConfig", "Siglip2VisionModel"),
    "vit": ("ViTConfig", "ViTModel"),
}
"""model_type -> transformers' config and model class. A weights directory can name only these; no other is built."""

NOT_SETTINGS = frozenset(
    {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
)
"""Entries of a transformers config file that say nothing about the network; allowed and dropped."""


class VisionEncoder(nn.Module):
    """A frozen vision transformer, read after its last block.

    Args:
        model: the transformers model; its parameters are frozen and it stays in eval mode.
        norm: apply the model's own final norm to the features.
    """

    def __init__(self, model: nn.Module, norm: bool = False) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.norm = norm
        self.config: Any = model.config
        # Not a sub-module twice: kept in a list so that state_dict names each tensor once.
        self._last_block = [_blocks(model)[-1]]

    @classmethod
    def from_config(cls, config: dict[str, Any], norm: bool = False) -> VisionEncoder:
        """Random weights from a JSON config with a model_type of ENCODERS.

        Raises:
            ConfigError: any other type, a setting that this type does not have, or values it cannot be built from.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in ENCODERS:
            raise ConfigError(
                f"encoder.model_type: expected one of {sorted(ENCODERS)}, got {kind!r}"
            )
        config_class, model_class = (getattr(transformers, name) for name in ENCODERS[kind])
        values = {k: v for k, v in config.items() if k not in NOT_SETTINGS}
        unknown = sorted(values.keys() - _settings(config_class))
        if unknown:
            # transformers would keep a misspelt one unread, and fetch code from the Hub for attn_implementation.
            raise ConfigError(f"encoder: {kind} has no settings {unknown}")
        try:
            return cls(model_class(config_class(**values)), norm)
        except (
            Exception
        ) as error:  # validators and constructors of transformers raise nearly anything
            raise ConfigError(
                f"encoder: transformers cannot build {kind} from {values}: {error}"
            ) from error

    @classmethod
    def from_pretrained(cls, name: str, norm: bool = False, **kwargs: Any) -> VisionEncoder:
        """A public encoder by directory or Hub id, e.g. "openai/clip-vit-base-patch16"; safetensors only.

        A whole CLIP, SigLIP or BLIP-2 will do: its vision tower is taken.

        Raises:
            ValueError: a type not in ENCODERS, or weights that lack tensors of the encoder (transformers would draw
                random ones and only warn).
        """
        whole = transformers.AutoConfig.from_pretrained(name)
        config = getattr(whole, "vision_config", whole)
        if config.model_type not in ENCODERS:
            raise ValueError(
                f"{name}: expected a model of type {sorted(ENCODERS)}, got {config.model_type!r}"
            )
        if (
            whole.model_type == "blip-2"
        ):  # its tower is stored under a prefix that Blip2VisionModel does not know
            kwargs["key_mapping"] = {r"^vision_model\.": ""}
        model_class = getattr(transformers, ENCODERS[config.model_type][1])
        model, report = model_class.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
        absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
        if absent:
            raise ValueError(
                f"{name}: {len(absent)} tensors of the encoder are missing or mis-shaped: {absent[:20]}"
            )
        return cls(model, norm)

    def json_config(self) -> dict[str, Any]:
        """The encoder's config as TokenizerConfig.encoder stores it: what differs from the class defaults; sizes."""
        sizes = ("hidden_size", "image_size", "patch_size", "num_patches")
        values = {name: getattr(self.config, name) for name in sizes if hasattr(self.config, name)}
        differing = self.config.to_diff_dict()
        known = _settings(type(self.config)) - NOT_SETTINGS
        values.update({k: v for k, v in differing.items() if k in known})
        return {**values, "model_type": self.config.model_type}

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in eval mode: the encoder is frozen."""
        return super().train(False)

    def forward(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patches width"]:
        """Features of every patch, without a gradient, unless the weights were given one (a language model's copy)."""
        trained = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self._features(pixels)

    def _features(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        seen: list[Tensor] = []

        def read(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = self._last_block[0].register_forward_hook(read)
        try:
            self.model(**self._inputs(pixels))
        finally:
            handle.remove()
        # Not last_hidden_state: that is after the norm in most of these models, but before it in CLIP's.
        features = _final_norm(self.model)(seen[-1]) if self.norm else seen[-1]
        patch = self.config.patch_size
        count = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        return features[:, features.shape[1] - count :]

    def _inputs(self, pixels: Float[Tensor, "batch 3 h w"]) -> dict[str, Tensor]:
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if self.config.model_type != "siglip2_vision_model":
            return {"pixel_values": pixels}
        patch = (
            self.config.patch_size
        )  # SigLIP2 takes patches that are already cut out, of any grid
        cut = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        grid = torch.tensor(
            [[pixels.shape[2] // patch, pixels.shape[3] // patch]] * len(pixels),
            device=pixels.device,
        )
        mask = torch.ones(cut.shape[:2], dtype=torch.int64, device=pixels.device)
        return {"pixel_values": cut, "pixel_attention_mask": mask, "spatial_shapes": grid}


def _settings(config_class: Any) -> set[str]:
    """The names of every setting that a transformers config class knows."""
    return set(config_class().to_dict())


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of transformer blocks: the longest list of modules of one class."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    if not lists:
        raise ValueError(
            f"{type(model).__name__}: no list of transformer blocks found, so no last block to read"
        )
    return max(lists, key=len)


def _final_norm(model: nn.Module) -> nn.Module:
    """The model's norm after the last block, by the names that transformers gives it."""
    for name in ("post_layernorm", "layernorm", "norm"):
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == name:
                return module
    raise ValueError(
        f"{type(model).__name__}: no final norm found, so encoder_norm cannot be applied"
    )
