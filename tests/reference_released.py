"""LaVIT's released model as plain functions of its tensors, one image at a time, in float64.

It shares nothing with the library: no classes, no renaming, no batches. `weights` is a file of the
release as loaded by torch.load; `heads` is the number of attention heads. Source: LaVIT (ICLR 2024)
and its public release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
EPS = 1e-6


def read(path: Path) -> Weights:
    return {name: value.double() for name, value in torch.load(path, weights_only=True).items()}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centerd = x - x.mean(-1, keepdim=True)
    return (
        centerd / (centerd.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]
        + w[name + ".bias"]
    )


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, name + ".fc2", gelu(linear(w, name + ".fc1", x)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, policy: Tensor | None = None) -> Tensor:
    """[q d], [k d], [k d] -> [q d]; a 0/1 policy [q k] as released, maximum over all keys."""
    outs = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = a @ b.T / a.shape[1] ** 0.5
        e = (scores - scores.max(1, keepdim=True).values).exp()
        if policy is None:
            weights = e / e.sum(1, keepdim=True)
        else:
            weights = (e * policy + EPS / len(b)) / ((e * policy).sum(1, keepdim=True) + EPS)
        outs.append(weights @ c)
    return torch.cat(outs, 1)


def encode_features(w: Weights, pixels: Tensor, heads: int) -> Tensor:
    """[3 h w] -> [n d]: after the last block, no final norm, class token dropped."""
    kernel = w["patch_embed.proj.weight"]
    p = kernel.shape[-1]
    grid = pixels.shape[-1] // p
    cuts = [
        pixels[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten()
        for i in range(grid)
        for j in range(grid)
    ]
    patches = torch.stack(cuts).double() @ kernel.flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"][0], patches]) + w["pos_embed"][0]
    number = 0
    while f"blocks.{number}.norm1.weight" in w:
        b = f"blocks.{number}."
        q, k, v = (norm(w, b + "norm1", x, 1e-6) @ w[b + "attn.qkv.weight"].T).chunk(3, 1)
        out = attend(q + w[b + "attn.q_bias"], k, v + w[b + "attn.v_bias"], heads)
        x = x + linear(w, b + "attn.proj", out)
        x = x + mlp(w, b + "mlp", norm(w, b + "norm2", x, 1e-6))
        number += 1
    return x[1:]


def score(w: Weights, features: Tensor) -> Tensor:
    """[n d] -> log-probabilities [n 2], keep first."""
    x = gelu(linear(w, "token_predictor.in_conv.1", norm(w, "token_predictor.in_conv.0", features)))
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half], x[:, half:].mean(0, keepdim=True).expand(len(x), -1)], 1)
    for layer in ("0", "2"):
        x = gelu(linear(w, f"token_predictor.out_conv.{layer}", x))
    x = linear(w, "token_predictor.out_conv.4", x)
    return x - x.exp().sum(1, keepdim=True).log()


def merge(w: Weights, features: Tensor, keep: Tensor, heads: int) -> Tensor:
    """[n d], bool [n] -> [kept d]."""
    n, p = len(keep), "causal_encoder."
    origin = norm(w, p + "ln_vision", features)
    own = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            own[i, j] = float(bool(keep[j]) or i == j)
    other = (~keep).double().expand(n, n)
    x, number = features, 0
    while f"{p}blocks.{number}.norm0.weight" in w:
        b = f"{p}blocks.{number}."
        q, k, v = linear(w, b + "token_causal_attn.qkv", norm(w, b + "norm0", x)).chunk(3, 1)
        x = x + linear(w, b + "token_causal_attn.proj", attend(q, k, v, heads, own))
        a = b + "token_cross_attn."
        q, k, v = (
            linear(w, a + "query", norm(w, b + "norm1", x)),
            linear(w, a + "key", origin),
            None,
        )
        v = linear(w, a + "value", origin)
        x = x + linear(w, a + "proj", attend(q, k, v, heads, other))
        x = x + mlp(w, b + "mlp", norm(w, b + "norm2", x))
        number += 1
    return norm(w, p + "norm", x)[keep]


def project(w: Weights, merged: Tensor) -> Tensor:
    z = linear(w, "encode_task_layer.2", linear(w, "encode_task_layer.0", merged).tanh())
    return z / z.norm(dim=1, keepdim=True)


def nearest(w: Weights, z: Tensor) -> list[int]:
    return [int((w["quantize.embedding.weight"] - row).pow(2).sum(1).argmin()) for row in z]


def decode_features(w: Weights, vectors: Tensor, heads: int) -> Tensor:
    """Codebook entries of one image [m c] -> [n d]."""
    codes = linear(w, "in_proj", vectors) + w["pos_embed"][0, : len(vectors)]
    x, number = w["query_embed"][0], 0
    while f"blocks.{number}.norm0.weight" in w:
        b = f"blocks.{number}."
        q, k, v = linear(w, b + "self_attn.qkv", norm(w, b + "norm0", x)).chunk(3, 1)
        x = x + linear(w, b + "self_attn.proj", attend(q, k, v, heads))
        a = b + "cross_attn."
        q, k, v = (
            linear(w, a + "query", norm(w, b + "norm1", x)),
            linear(w, a + "key", codes),
            linear(w, a + "value", codes),
        )
        x = x + linear(w, a + "proj", attend(q, k, v, heads))
        x = x + mlp(w, b + "mlp", norm(w, b + "norm2", x))
        number += 1
    return linear(
        w, "decode_task_layer.2", linear(w, "decode_task_layer.0", norm(w, "norm", x)).tanh()
    )


def pool(w: Weights, x: Tensor, heads: int) -> Tensor:
    """[n d] -> [pooled]: the mean token looks once at itself and all others."""
    p = "unet_attnpool."
    x = torch.cat([x.mean(0, keepdim=True), x]) + w[p + "positional_embedding"]
    parts = (linear(w, p + "q_proj", x[:1]), linear(w, p + "k_proj", x), linear(w, p + "v_proj", x))
    return linear(w, p + "c_proj", attend(*parts, heads))[0]


# A random release of any size


def block(
    g: torch.Generator, prefix: str, width: int, hidden: int, own: str, cross: str
) -> Weights:
    made = {}
    for name in ("norm0", "norm1", "norm2"):
        made |= layer_norm(g, f"{prefix}.{name}", width)
    made |= dense(g, f"{prefix}.{own}.qkv", width, 3 * width) | dense(
        g, f"{prefix}.{own}.proj", width, width
    )
    for name in ("query", "key", "value", "proj"):
        made |= dense(g, f"{prefix}.{cross}.{name}", width, width)
    return (
        made
        | dense(g, f"{prefix}.mlp.fc1", width, hidden)
        | dense(g, f"{prefix}.mlp.fc2", hidden, width)
    )


def dense(g: torch.Generator, name: str, inputs: int, outputs: int) -> Weights:
    weight = torch.randn(outputs, inputs, generator=g) * 1.5 * inputs**-0.5
    return {name + ".weight": weight, name + ".bias": torch.randn(outputs, generator=g) * 0.2}


def layer_norm(g: torch.Generator, name: str, width: int) -> Weights:
    return {
        name + ".weight": 1 + 0.3 * torch.randn(width, generator=g),
        name + ".bias": 0.2 * torch.randn(width, generator=g),
    }


def write(root: Path, seed: int, skipped: Sequence[str] = (), **s: Any) -> None:
    """The files of visual_tokenizer/ and language_model/ and the null embedding, of sizes s."""
    g = torch.Generator().manual_seed(seed)
    d, n = s["width"], (s["image"] // s["patch"]) ** 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def eva() -> Weights:
        made = {
            "cls_token": draw(1, 1, d),
            "pos_embed": draw(1, n + 1, d),
            "patch_embed.proj.bias": draw(d),
        }
        made["patch_embed.proj.weight"] = draw(d, 3, s["patch"], s["patch"]) / s["patch"]
        for i in range(s["layers"]):
            b = f"blocks.{i}"
            made |= layer_norm(g, f"{b}.norm1", d) | layer_norm(g, f"{b}.norm2", d)
            made |= {f"{b}.attn.q_bias": draw(d), f"{b}.attn.v_bias": draw(d)}
            made[f"{b}.attn.qkv.weight"] = draw(3 * d, d) * d**-0.5
            made |= dense(g, f"{b}.attn.proj", d, d)
            made |= dense(g, f"{b}.mlp.fc1", d, s["encoder_mlp"]) | dense(
                g, f"{b}.mlp.fc2", s["encoder_mlp"], d
            )
        return made | layer_norm(g, "norm", d) | dense(g, "head", d, 10)

    def merger(depth: int) -> Weights:
        made = layer_norm(g, "causal_encoder.ln_vision", d) | layer_norm(
            g, "causal_encoder.norm", d
        )
        for i in range(depth):
            made |= block(
                g,
                f"causal_encoder.blocks.{i}",
                d,
                s["mlp"],
                "token_causal_attn",
                "token_cross_attn",
            )
        return made

    def encoder() -> Weights:
        rows = draw(s["codes"], s["code_dim"])
        made = {
            "quantize.embedding.weight": rows / rows.norm(dim=1, keepdim=True),
            **merger(s["merger_depth"]),
        }
        made |= {
            "quantize.embedding.cluster_size": torch.ones(s["codes"])
        }  # a leftover of training
        made |= layer_norm(g, "token_predictor.in_conv.0", d) | dense(
            g, "token_predictor.in_conv.1", d, d
        )
        for layer, i, o in ((0, d, d // 2), (2, d // 2, d // 4), (4, d // 4, 2)):
            made |= dense(g, f"token_predictor.out_conv.{layer}", i, o)
        return (
            made
            | dense(g, "encode_task_layer.0", d, d)
            | dense(g, "encode_task_layer.2", d, s["code_dim"])
        )

    def decoder() -> Weights:
        made = {
            "pos_embed": draw(1, n, d),
            "query_embed": draw(1, n, d),
            **dense(g, "in_proj", s["code_dim"], d),
        }
        for i in range(s["reconstructor_depth"]):
            made |= block(g, f"blocks.{i}", d, s["mlp"], "self_attn", "cross_attn")
        made |= layer_norm(g, "norm", d)
        return made | dense(g, "decode_task_layer.0", d, d) | dense(g, "decode_task_layer.2", d, d)

    low, first, second = s["low"], *s["high"]

    def highres() -> Weights:
        made = decoder() | dense(g, "unet_proj_1", d, first) | dense(g, "unet_proj_2", d, second)
        made |= {"unet_attnpool.positional_embedding": draw(n + 1, d)}
        for name, out in (("k_proj", d), ("q_proj", d), ("v_proj", d), ("c_proj", second)):
            made |= dense(g, f"unet_attnpool.{name}", d, out)
        return made

    files: dict[str, Callable[[], Any]] = {
        "visual_tokenizer/eva_vitg_psz14.bin": eva,
        "visual_tokenizer/tokenizer_encoder.bin": encoder,
        "visual_tokenizer/tokenizer_decoder.bin": lambda: decoder() | dense(g, "unet_proj", d, low),
        "visual_tokenizer/highres_tokenizer_decoder.bin": highres,
        "language_model/visual_weight.bin": lambda: (
            merger(s["merger_depth"] + 1) | dense(g, "vit_proj", d, s["llm"])
        ),
        "pixel_decoding/uncond_embeddings.bin": lambda: draw(1, s["null"], low),
    }
    for name, make in files.items():
        if name not in skipped:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(), root / name)
