"""Small visual tokenizers of others; a command names one by function: `small_tokenizers:emu3`."""

from __future__ import annotations

from typing import Any

SIZE = 32
_VQ = {"base_channels": 32, "num_res_blocks": 1, "latent_channels": 32, "num_embeddings": 64}
SMALL: dict[str, dict[str, Any]] = {
    "emu3": {"base_channels": 32, "num_res_blocks": 1, "hidden_size": 128, "codebook_size": 64},
    "chameleon": {**_VQ, "embed_dim": 32},
    "janus": _VQ,
    "vqmodel": {"block_out_channels": (32,) * 3, "layers_per_block": 1, "latent_channels": 8},
}
SMALL["vqmodel"] |= {"num_vq_embeddings": 64}


def emu3(device: str) -> Any:
    return small("emu3")


def chameleon(device: str) -> Any:
    return small("chameleon")


def janus(device: str) -> Any:
    return small("janus")


def vqmodel(device: str) -> Any:
    return small("vqmodel")


def no_tokenizer(device: str) -> Any:
    return object()


def small(name: str) -> Any:
    import adapters  # of the benchmarks, which are on the path while one runs

    return adapters.KINDS[name](SIZE, **SMALL[name])
