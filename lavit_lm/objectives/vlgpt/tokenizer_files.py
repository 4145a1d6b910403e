"""VL-GPT's tokenizer and detokenizer as a directory.

config.json                 sizes, visual tokenizer and fingerprint of its codebook, diffusion model
tokenizer.safetensors       loaded to train a language model
detokenizer.safetensors     loaded to decode the vectors that it generates
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavit_lm.objectives.vlgpt.tokenizer import Detokenizer, VLGPTTokenizer, VLGPTTokenizerConfig
from lavit_lm.vision.resampler import CausalResampler
from lavit_tok import VisualTokenizer, WeightsError
from lavit_tok.checkpoints.files import atomic_files
from lavit_tok.checkpoints.weights import (
    check_layers,
    check_replaceable,
    empty,
    load_weights,
    read_header,
    save_weights,
)

FORMAT, VERSION = "lavit_lm.vlgpt_tokenizer", 1
KEYS = ("visual_tokenizer", "fingerprint", "sizes", "image", "text", "diffusion", "learned")
TOKENIZER, DETOKENIZER = "tokenizer.safetensors", "detokenizer.safetensors"


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise WeightsError for a directory that holds anything but an older tokenizer of VL-GPT."""
    check_replaceable(out, DETOKENIZER)


def save_tokenizer(
    out: str | os.PathLike[str],
    model: VLGPTTokenizer,
    visual_tokenizer: str,
    diffusion: dict[str, Any],
    learned: Sequence[str] = ("image", "text"),
) -> None:
    """Write the directory.

    Args:
        out: the directory.
        model: tokenizer and detokenizer.
        visual_tokenizer: where the visual tokenizer is, whose features the model reads.
        diffusion: config of the diffusion model, see load_diffusion.
        learned: the conditions that were learned; images are generated from these only.

    Raises:
        WeightsError: the directory holds other files, or weights are NaN or infinite.
    """
    check_out(out)
    image, text = model.shapes
    values = {
        "format": FORMAT,
        "version": VERSION,
        "visual_tokenizer": visual_tokenizer,
        "fingerprint": model.fingerprint,
        "sizes": asdict(model.config),
        "image": image,
        "text": text,
        "diffusion": diffusion,
        "learned": list(learned),
    }
    with atomic_files(Path(out)) as folder:
        save_weights(model.tokenizer, folder, single=TOKENIZER)
        save_weights(model.detokenizer, folder, single=DETOKENIZER)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of config.json. Raises WeightsError for a directory that stage 1 did not write."""
    path = Path(directory) / "config.json"
    try:
        values = read_header(path, FORMAT, VERSION, KEYS)
        return {**values, "sizes": VLGPTTokenizerConfig(**values["sizes"])}
    except (WeightsError, TypeError) as error:
        raise WeightsError(
            f"{path}: expected the directory of a VL-GPT tokenizer, as written by lavit-lm "
            f"fit-tokenizer: {error}"
        ) from None


def load_tokenizer(directory: str | os.PathLike[str], visual: VisualTokenizer) -> CausalResampler:
    """The tokenizer of a directory.

    Raises:
        WeightsError: files or tensors that are missing, unexpected or mis-shaped, or another visual
            tokenizer.
    """
    values = read_config(directory)
    if values["fingerprint"] != visual.fingerprint():
        raise WeightsError(
            f"{directory}: trained on features of the visual tokenizer "
            f"{values['visual_tokenizer']!r} "
            f"({values['fingerprint']}), got another ({visual.fingerprint()}): its vectors would "
            "be noise"
        )
    check_layers(asdict(values["sizes"]), Path(directory), TOKENIZER, "sizes")
    build = partial(values["sizes"].resampler, visual)
    empty(build, torch.float32, Path(directory), TOKENIZER)  # the shapes, before memory is used
    tokenizer = build()
    load_weights(tokenizer, directory, TOKENIZER)
    return tokenizer


def load_detokenizer(directory: str | os.PathLike[str]) -> tuple[Detokenizer, dict[str, Any]]:
    """(detokenizer of a directory, its config). Raises WeightsError."""
    values = read_config(directory)
    image, text = (None if values[n] is None else tuple(values[n]) for n in ("image", "text"))
    check_layers(asdict(values["sizes"]), Path(directory), DETOKENIZER, "sizes")
    build = partial(Detokenizer, values["sizes"], image, text)
    detokenizer = empty(build, torch.float32, Path(directory), DETOKENIZER)
    load_weights(detokenizer, directory, DETOKENIZER)
    return detokenizer, values
