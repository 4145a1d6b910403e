"""Causal LMs of a few thousand weights, with tokenizers of their families that are trained here.

Tests have no network, so nothing comes from the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

TEXTS = [
    "a red apple on a wooden table",
    "two dogs run along the beach at sunset",
    "a photo of the old town hall in the rain",
    "an apple and a table in the old town",
]
SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
GPT2_SHAPE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: LlamaConfig(**{**SHAPE, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**SHAPE, **more}),
    "qwen3": lambda **more: Qwen3Config(**{**SHAPE, "head_dim": 8, **more}),
    "gemma": lambda **more: GemmaConfig(**{**SHAPE, "head_dim": 8, **more}),
    "mistral": lambda **more: MistralConfig(**{**SHAPE, **more}),
    "gpt2": lambda **more: GPT2Config(**{**GPT2_SHAPE, **more}),
    # Its output layer has a bias.
    "phi": lambda **more: PhiConfig(**{**SHAPE, "num_key_value_heads": 2}, **more),
}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "mistral", "gpt2"]


def small_tokenizer(family: str) -> Any:
    """The tokenizer class of the family, with a few merges trained on TEXTS."""
    if family in ("llama", "mistral", "gemma"):
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        specials = (
            ["<pad>", "<eos>", "<bos>", "<unk>"] if family == "gemma" else ["<unk>", "<s>", "</s>"]
        )
        splitter: Any = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        state = _train([*specials, *byte_tokens], splitter, alphabet=[])
        return (GemmaTokenizer if family == "gemma" else LlamaTokenizer)(
            vocab=state["vocab"], merges=state["merges"]
        )
    state = _train(["<|endoftext|>"], pre_tokenizers.ByteLevel(add_prefix_space=False), _bytes())
    tokenizer = (GPT2Tokenizer if family in ("gpt2", "phi") else Qwen2Tokenizer)(
        vocab=state["vocab"], merges=state["merges"]
    )
    if family not in ("gpt2", "phi"):
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<tool_call>")])
    return tokenizer


def small_lm(family: str, rows: int, tied: bool = False, seed: int = 0, **more: Any) -> Any:
    """A random LM whose embedding columns differ in mean and deviation, as trained ones do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CONFIGS[family](
            vocab_size=rows, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, **more
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        columns = torch.linspace(0.5, 2, 16)
        with torch.no_grad():
            for layer, shift in (
                (model.get_output_embeddings(), 0.3),
                (model.get_input_embeddings(), 1.0),
            ):
                layer.weight.copy_(
                    0.1 * (torch.randn(rows, 16) * columns + shift * columns.flip(0))
                )
    return model


def _train(specials: list[str], splitter: Any, alphabet: list[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    size = len(specials) + max(len(alphabet), 40) + 30
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _bytes() -> list[str]:
    return list(pre_tokenizers.ByteLevel.alphabet())
