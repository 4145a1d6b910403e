"""Pixels -> patch features, by any vision transformer of `transformers`, frozen.

    float [b 3 h w]  ->  residual stream after the last block, class and register tokens removed
                     ->  float [b n d]

LaVIT uses its encoder's features before the final norm; many transformers models only return them
after it. A hook on the last block reads the residual stream in the same way in all of them, so that
a new encoder needs only an entry in the table of names.
"""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
import transformers
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lavit_tok.checkpoints.weights import find_directory, read_json, require_finite
from lavit_tok.config import ConfigError
from lavit_tok.encode.efficientnet import JoinedConfig, JoinedEncoder

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
"""model_type -> config and model class of transformers; a config file cannot choose any other."""

METADATA = frozenset(
    {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
)
"""Entries of a transformers config file that do not describe the network; accepted and dropped."""


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
        # In a list, since a second attribute would register the block and save its tensors twice.
        self._last_block = [_blocks(model)[-1]]

    @classmethod
    def from_config(cls, config: dict[str, Any], norm: bool = False) -> Any:
        """An encoder with random weights, from a config with a model_type of ENCODERS.

        Raises:
            ConfigError: another model_type, unknown entries, or values that no model has.
        """
        kind = config.get("model_type")
        if kind == JoinedConfig.model_type:
            return JoinedEncoder(JoinedConfig.from_dict(config))
        if not isinstance(kind, str) or kind not in ENCODERS:
            raise ConfigError(
                f"encoder.model_type: expected one of {sorted(ENCODERS)}, got {kind!r}"
            )
        config_class, model_class = (getattr(transformers, name) for name in ENCODERS[kind])
        values = {k: v for k, v in config.items() if k not in METADATA}
        if unknown := sorted(values.keys() - _entries(config_class)):
            # transformers would ignore a misspelled entry, and with attn_implementation it would
            # download and run code from the Hub.
            raise ConfigError(f"encoder: {kind} has no config entries {unknown}")
        try:
            return cls(model_class(config_class(**values)), norm)
        except Exception as error:  # constructors of transformers raise nearly any exception
            raise ConfigError(
                f"encoder: transformers cannot build {kind} from {values}: {error}"
            ) from error

    @classmethod
    def from_pretrained(cls, name: str, norm: bool = False, **kwargs: Any) -> Any:
        """A public encoder by directory or Hub id, e.g. "openai/clip-vit-base-patch16".

        Of a complete CLIP, SigLIP or BLIP-2 the vision model is loaded; safetensors only.

        Raises:
            ValueError: a type not in ENCODERS, or missing tensors, which transformers would
                initialize randomly with only a warning.
        """
        directory = find_directory(name, None)
        if read_json(directory / "config.json").get("model_type") == JoinedConfig.model_type:
            return JoinedEncoder.from_directory(directory)
        complete = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        config = getattr(complete, "vision_config", complete)
        if config.model_type not in ENCODERS:
            raise ValueError(
                f"{name}: expected a model of type {sorted(ENCODERS)}, got {config.model_type!r}"
            )
        if complete.model_type == "blip-2":  # stored under a prefix that Blip2VisionModel lacks
            kwargs["key_mapping"] = {r"^vision_model\.": ""}
        model_class = getattr(transformers, ENCODERS[config.model_type][1])
        model, report = model_class.from_pretrained(
            directory, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
        absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
        if absent:
            count = f"{len(absent)} tensors of the encoder"
            raise ValueError(f"{name}: {count} are missing or mis-shaped: {absent[:20]}")
        require_finite(model, name)
        return cls(model, norm)

    def json_config(self) -> dict[str, Any]:
        """The config as TokenizerConfig.encoder stores it: sizes, and non-default entries."""
        sizes = ("hidden_size", "image_size", "patch_size", "num_patches")
        values = {name: getattr(self.config, name) for name in sizes if hasattr(self.config, name)}
        known = _entries(type(self.config)) - METADATA
        values.update({k: v for k, v in self.config.to_diff_dict().items() if k in known})
        return {**values, "model_type": self.config.model_type}

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    def forward(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patches width"]:
        """Features of every patch.

        Without gradient, unless some parameter requires one: a language model may train a copy.
        """
        is_trained = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            return self._features(pixels)

    def _features(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        outputs: list[Tensor] = []
        thread = get_ident()  # batches of other threads may be in the same block

        def read(module: nn.Module, args: Any, output: Any) -> None:
            if get_ident() == thread:
                outputs.append(output[0] if isinstance(output, tuple) else output)

        handle = self._last_block[0].register_forward_hook(read)
        try:
            self.model(**self._inputs(pixels))
        finally:
            handle.remove()
        # Not last_hidden_state: it is after the norm in most of these models, before it in CLIP's.
        features = _final_norm(self.model)(outputs[-1]) if self.norm else outputs[-1]
        patch = self.config.patch_size
        count = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        return features[:, features.shape[1] - count :]

    def _inputs(self, pixels: Float[Tensor, "batch 3 h w"]) -> dict[str, Tensor]:
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if self.config.model_type != "siglip2_vision_model":
            return {"pixel_values": pixels}
        # SigLIP2 takes a sequence of flattened patches and the shape of their grid.
        patch = self.config.patch_size
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        grid = torch.tensor([[n // patch for n in pixels.shape[2:]]], device=pixels.device)
        mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=pixels.device)
        shapes = grid.repeat(len(pixels), 1)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _entries(config_class: Any) -> set[str]:
    """Names of all entries of a transformers config class."""
    return set(config_class().to_dict())


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The model's transformer blocks: the longest list of modules of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    uniform = [m for m in lists if len({type(x) for x in m}) == 1]
    if not uniform:
        name = type(model).__name__
        raise ValueError(f"{name}: no list of transformer blocks found, so no last block to read")
    return max(uniform, key=len)


def _final_norm(model: nn.Module) -> nn.Module:
    """The model's norm after the last block, by its names in transformers."""
    for name in ("post_layernorm", "layernorm", "norm"):
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == name:
                return module
    name = type(model).__name__
    raise ValueError(f"{name}: no final norm found, so encoder_norm cannot be applied")
