"""A tokenizer of nested codes at laptop size: 32 pixels, 16 patches."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, Any] = {
    "encoder": {
        "model_type": "efficientnet_lite",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "sources": [-1, 3],
    },
    "codebook_size": 16,
    "code_dim": 4,
    "patch_dim": 6,
    "reconstructor_depth": 1,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "sequence": "nested",
    "color_cells": 4,
}
"""Arguments of TokenizerConfig."""
