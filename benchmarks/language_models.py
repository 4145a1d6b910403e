"""What the benchmarks of language models share: models of stated shapes with random weights, and rows to train on.

token shards, or made-up captions and codes of the measured lengths  ->  rows {key, caption, codes}  ->  RaggedLayout
"""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import timing
import torch
from torch import nn

from lavit_lm.vocabulary.text_tokenizer import train_text_tokenizer
from lavit_tok import Shards

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "llama",
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
"""small: about twice the shipped LM. 1b: Llama 3.2 1B's, but for its vocabulary; 0.97e9 weights without embeddings."""
TEXT_IDS = 4096  # of a text tokenizer that is trained here
LENGTHS = Path(__file__).parents[1] / "results" / "tokens_per_image.json"


def shape(name: str) -> dict[str, Any]:
    """The `transformers` config of a name of SHAPES, a JSON file of one, or a recipe of lavit-lm (its model.lm).

    Raises:
        ValueError: none of these.
    """
    if name in SHAPES:
        return dict(SHAPES[name])
    expected = f"--model: expected {', '.join(SHAPES)}, a JSON file of a config with its model_type, or a recipe"
    try:
        text = Path(name).read_text()
        if name.endswith((".yaml", ".yml")):
            import yaml

            found = yaml.safe_load(text)["model"]["lm"]
        else:
            found = json.loads(text)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{expected}, got {name!r}: {error}") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise ValueError(f"{expected}, got {name!r} without model_type")
    return found


# Rows


@dataclass(frozen=True)
class Source:
    """Samples and the text tokenizer that reads them."""

    pairs: Any
    """Rows with key, caption and codes."""
    text_tokenizer: str
    """Its directory or Hub id."""
    fingerprint: str | None
    """Of the codebook that shards were made with; None for made-up codes."""
    described: str


def add_source(found: Any) -> None:
    """The arguments that `source` reads."""
    where = found.add_mutually_exclusive_group(required=True)
    where.add_argument("--shards", help="folder that `lavit-tok shards` wrote")
    where.add_argument(
        "--synthetic", action="store_true", help="made-up rows, as long as the default data's"
    )
    found.add_argument("--split", default="train", help="of the shards")
    found.add_argument(
        "--text-tokenizer", help="directory or Hub id; with --shards, one is trained if not given"
    )
    found.add_argument(
        "--rows", type=common.positive, help="at most this many, evenly spaced; synthetic 8192"
    )
    found.add_argument(
        "--lengths", type=Path, default=LENGTHS, help="tokens_per_image.json behind --synthetic"
    )


def source(a: Namespace, folder: Path, codebook_size: int) -> Source:
    """Rows as the arguments ask for. Raises ValueError (ShardError) for shards or lengths that cannot be read."""
    if a.synthetic:
        pairs = synthetic(a.rows or 8192, histogram(a.lengths), codebook_size, a.seed)
        fingerprint, described = (
            None,
            f"{len(pairs)} made-up rows, code counts as in {a.lengths.name}",
        )
    else:
        shards = Shards.open(a.shards, a.split)
        pairs = shards.dataset()
        if a.rows:
            pairs = pairs.select(common.evenly(a.rows, len(pairs)))
        fingerprint, described = (
            shards.fingerprint,
            f"{len(pairs)} rows of split {a.split!r} of the shards",
        )
    if a.text_tokenizer:
        return Source(pairs, a.text_tokenizer, fingerprint, described)
    captions = (
        [caption for caption in pairs["caption"] if caption]
        if not a.synthetic
        else [p["caption"] for p in pairs]
    )
    tokenizer = train_text_tokenizer(captions, TEXT_IDS)
    tokenizer.save_pretrained(folder / "text")
    return Source(
        pairs,
        str(folder / "text"),
        fingerprint,
        f"{described}; {len(tokenizer)} text ids learnt from them",
    )


def histogram(path: Path) -> list[int]:
    """How many pictures have 0, 1, 2, ... codes, as tokens_per_image.py measured it."""
    try:
        counts = [int(count) for count in json.loads(path.read_text())["histogram"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the JSON that tokens_per_image.py writes: {error}"
        ) from None
    if sum(counts[1:]) == 0:
        raise ValueError(f"{path}: its histogram has no picture with a code")
    return counts


def synthetic(count: int, counts: list[int], codebook_size: int, seed: int) -> list[dict[str, Any]]:
    """Made-up captions of about 30 letters, as the default data's, and uniform codes in the measured numbers."""
    rng = np.random.default_rng(seed)
    words = np.array(made_up_words(rng, 1500))
    chances = np.array([0, *counts[1:]], dtype=np.float64)
    lengths = rng.choice(len(chances), size=count, p=chances / chances.sum())
    return [
        {
            "key": str(i),
            "caption": " ".join(rng.choice(words, size=2 + rng.poisson(4))),
            "codes": rng.integers(codebook_size, size=length).tolist(),
        }
        for i, length in enumerate(lengths)
    ]


def made_up_words(rng: np.random.Generator, count: int) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return ["".join(rng.choice(syllables, size=rng.integers(1, 4))) for _ in range(count)]


# Arithmetic


def autocast(device: str, dtype: str) -> Any:
    """What Lightning's "bf16-mixed" does, for models beside it; nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def flops_per_place(model: Any, length: int) -> tuple[int, int]:
    """FLOPs of forward and backward for one place: (6 N, 6 N + attention).

    N counts the weights of matrix products: the output layer, but no table that is only looked up. Attention adds
    12 x layers x width x length for a full matrix (PaLM, arXiv:2204.02311, appendix B), of which a mask uses a part.
    """
    output = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(output)}
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 6 * weights, 6 * weights + 12 * config.num_hidden_layers * width * length


def matmul_peak(device: str, dtype: str, size: int | None = None, repeats: int = 10) -> float:
    """FLOPs a second of one square matrix product, the best of some: what this device reaches, not its data sheet."""
    size = size or (8192 if device.startswith("cuda") else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    (times,) = timing.interleaved([lambda: a @ b], repeats, device)
    return 2 * size**3 / min(wall for wall, _ in times[:repeats])
