"""The pixel decoders of LaVIT's release: conditioner, U-Net, VAE and scheduler."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lavit_tok.checkpoints.released import names
from lavit_tok.checkpoints.released.pickled import FileMapping, PickledTensors, TensorRecipe, expand
from lavit_tok.checkpoints.weights import (
    WeightsError,
    empty,
    read_json,
    require_layers,
    weight_files,
)
from lavit_tok.config import TokenizerConfig
from lavit_tok.decode.conditioner import Conditioner
from lavit_tok.decode.pipeline import SCHEDULERS, PixelDecoder, build_empty


def build(
    root: Path,
    kind: names.DecoderKind,
    files: dict[str, PickledTensors],
    config: TokenizerConfig,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Conditioner, U-Net and VAE without weights, sized by tensors and configs.

    Raises:
        WeightsError: a config or shapes that fit no model.
    """
    folder = root / names.FOLDERS[kind]
    for name, file in _diffusers_files(root, kind).items():
        path = folder / name / "config.json"
        require_layers(read_json(path), len(file.shapes), str(path))
    unet = build_empty(folder / "unet", UNet2DConditionModel, dtype)
    vae = build_empty(folder / "vae", AutoencoderKL, dtype)
    sizes = _condition_sizes(kind, files, config)
    conditioner = empty(lambda: Conditioner.for_tokenizer(config, **sizes), dtype)
    return {"conditioner": conditioner, "unet": unet.eval(), "vae": vae.eval()}


def _condition_sizes(
    kind: names.DecoderKind, files: dict[str, PickledTensors], config: TokenizerConfig
) -> dict[str, Any]:
    shapes, label = files[kind].shapes, files[kind].label
    biases = (
        ["unet_proj.bias"]
        if kind == "lowres"
        else ["unet_proj_1.bias", "unet_proj_2.bias", "unet_attnpool.c_proj.bias"]
    )
    absent = [name for name in biases if len(shapes.get(name, ())) != 1]
    if absent:
        raise WeightsError(
            f"{label}: tensors that determine sizes are missing or mis-shaped: {absent}"
        )
    widths = [shapes[name][0] for name in biases]
    if kind == "highres":
        return {
            "style": "sdxl",
            "cross_dims": widths[:2],
            "pooled_dim": widths[2],
            "pool_heads": config.num_heads,
        }
    null = files["null"].shapes.get("tensor", ())
    if (
        len(null) != 3
        or null[0] != 1
        or not 1 <= null[1] <= config.num_patches
        or null[2] != widths[0]
    ):
        expected = f"[1, 1..{config.num_patches}, {widths[0]}]"
        raise WeightsError(
            f"{files['null'].label}: expected one tensor {expected}, got {files['null'].shapes}"
        )
    return {"style": "sd", "cross_dims": widths, "null_length": null[1]}


def add_mappings(
    root: Path,
    kind: names.DecoderKind,
    files: dict[str, PickledTensors],
    models: nn.ModuleDict,
    mappings: list[FileMapping],
) -> list[FileMapping]:
    """Add the decoder's tensors to the tokenizer's; one file contains both models' tensors."""
    own = expand(names.CONDITION[kind], 0, "conditioner.")
    joined = [
        FileMapping(p.file, {**p.recipes, **own}) if p.file is files[kind] else p for p in mappings
    ]
    if kind == "lowres":
        joined.append(
            FileMapping(files["null"], {"conditioner.projection.null": TensorRecipe(("tensor",))})
        )
    for name, file in _diffusers_files(root, kind).items():
        joined.append(
            FileMapping(
                file,
                {
                    f"{name}.{tensor}": TensorRecipe((tensor,))
                    for tensor in models[name].state_dict()
                },
            )
        )
    return joined


def _diffusers_files(root: Path, kind: names.DecoderKind) -> dict[str, PickledTensors]:
    return {
        name: PickledTensors(
            weight_files(root / names.FOLDERS[kind] / name, names.DIFFUSERS_FILE),
            f"{names.FOLDERS[kind]}/{name}/{names.DIFFUSERS_FILE}",
            _modern if name == "vae" else str,
        )
        for name in ("unet", "vae")
    }


def _modern(name: str) -> str:
    """The present name of a tensor of an old VAE."""
    match = re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\.weight|\.bias)", name)
    return (
        match[1] + names.OLD_VAE[match[2]] + match[3]
        if match and match[2] in names.OLD_VAE
        else name
    )


def shared(ours: dict[str, Tensor], filled: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conditioner's codebook and reconstructor, sharing the memory of the tokenizer's."""
    absent = ours.keys() - filled.keys()
    tokenizer = {
        "conditioner.codebook.": "tokenizer.quantizer.codebook.",
        "conditioner.reconstructor.": "tokenizer.reconstructor.",
    }
    return {
        n: filled[new + n.removeprefix(old)]
        for n in absent
        for old, new in tokenizer.items()
        if n.startswith(old)
    }


def pipeline(root: Path, kind: names.DecoderKind, models: nn.ModuleDict) -> PixelDecoder:
    """The filled models as a PixelDecoder. Raises WeightsError for sizes that do not match."""
    folder = root / names.FOLDERS[kind]
    conditioner, unet, vae = (models[name] for name in ("conditioner", "unet", "vae"))
    try:
        return PixelDecoder(conditioner, unet, vae, load_ddim(folder / "scheduler"))  # type: ignore[arg-type]
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from None


def load_ddim(directory: Path) -> DDIMScheduler:
    """DDIM, the published sampler, with the noise schedule of any scheduler's config.

    Entries of other schedulers are left out: the files of Stable Diffusion 1.5 and XL have some.

    Raises:
        WeightsError: entries that no scheduler has.
    """
    path = directory / "scheduler_config.json"
    values = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    known = set().union(
        *(inspect.signature(getattr(diffusers, name).__init__).parameters for name in SCHEDULERS)
    )
    unknown = sorted(values.keys() - known)
    if unknown:
        raise WeightsError(
            f"{path}: unknown entries {unknown}: without them the noise schedule would differ"
        )
    accepted = inspect.signature(DDIMScheduler.__init__).parameters
    return DDIMScheduler(**{key: value for key, value in values.items() if key in accepted})
