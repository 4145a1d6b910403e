"""The other tokenizers at laptop size, as factories that a command line can name: `small_tokenizers:emu3`."""

from __future__ import annotations

from typing import Any

SIZE = 32
SMALL: dict[str, dict[str, Any]] = {
    "emu3": {"base_channels": 32, "num_res_blocks": 1, "hidden_size": 128, "codebook_size": 64},
    "chameleon": {
        "base_channels": 32,
        "num_res_blocks": 1,
        "latent_channels": 32,
        "embed_dim": 32,
        "num_embeddings": 64,
    },
    "janus": {
        "base_channels": 32,
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_embeddings": 64,
    },
    "vqmodel": {
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 8,
        "num_vq_embeddings": 64,
    },
}


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
    import adapters  # beside the benchmarks; whoever runs one has them on the path

    return adapters.KINDS[name](SIZE, **SMALL[name])
