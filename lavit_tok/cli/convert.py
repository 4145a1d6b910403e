"""`lavit-tok convert`: a LaVIT release -> our format, safetensors and JSON.

OUT/tokenizer   VisualTokenizer.from_pretrained("OUT/tokenizer")
OUT/decoder     PixelDecoder.from_pretrained("OUT/decoder")
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from lavit_tok.checkpoints.released import names
from lavit_tok.checkpoints.released.loader import load_released
from lavit_tok.checkpoints.weights import WeightsError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(arguments: argparse.Namespace) -> int:
    """Load a release strictly and write both models. Raises WeightsError if `out` is not empty."""
    release, out = arguments.release, arguments.out
    if not release.is_dir():
        raise WeightsError(
            f"{release}: expected the directory of a LaVIT release, no such directory"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out}: expected a new or empty directory to write to")
    kind: Any = _which(release) if arguments.decoder == "auto" else arguments.decoder
    tokenizer, decoder = load_released(
        release,
        None if kind == "none" else kind,
        attention=arguments.attention,
        num_heads=arguments.num_heads,
        dtype=DTYPES[arguments.dtype],
    )
    tokenizer.save_pretrained(out / "tokenizer")
    if decoder is not None:
        decoder.save_pretrained(out / "decoder")
    c = tokenizer.config
    parts = [
        f"tokenizer (width {c.width}, {c.codebook_size} codes)",
        f"{kind} decoder" if decoder else "no decoder",
    ]
    parts.append(
        f"vectors of {c.continuous_width} for a language model"
        if tokenizer.continuous
        else "codes only"
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {', '.join(parts)}: {size / 1e6:.1f} MB in {out}", file=sys.stderr)
    return 0


def _which(release: Path) -> str:
    """The better decoder that is there."""
    for kind in ("highres", "lowres"):
        if (release / names.FOLDERS[kind]).is_dir() and (release / names.FILES[kind]).is_file():
            return kind
    return "none"
