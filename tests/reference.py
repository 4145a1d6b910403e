"""Slow, obvious versions of the stages: one image, one patch, one head at a time, in float64.

They share only the weights with the library: no padding, no ragged batches, no fused kernels. They
follow LaVIT (ICLR 2024) and the formulas of lavit_tok/nn/attention.py literally.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

EPS = 1e-6


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x.double() @ layer.weight.double().T + layer.bias.double()


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    x = x.double()
    centerd = x - x.mean(-1, keepdim=True)
    scaled = centerd / (centerd.pow(2).mean(-1, keepdim=True) + layer.eps).sqrt()
    return scaled * layer.weight.double() + layer.bias.double()


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    return linear(layers[2], gelu(linear(layers[0], x)))


def weights_of_a_query(scores: list[float], policy: list[float], formula: str) -> list[float]:
    """The attention weights of one query over its keys, straight from the formula."""
    n = len(scores)
    if formula == "compat":
        top = max(scores)
        raised = [float(np.exp(a - top)) * p for a, p in zip(scores, policy, strict=True)]
        return [(e + EPS / n) / (sum(raised) + EPS) for e in raised]
    allowed = [a for a, p in zip(scores, policy, strict=True) if p > 0]
    if not allowed:
        return [0.0] * n
    top = max(allowed)
    raised = [float(np.exp(min(a - top, 30.0))) * p for a, p in zip(scores, policy, strict=True)]
    return [e / sum(raised) for e in raised]


@torch.no_grad()
def attention(module: Any, x: Tensor, context: Tensor, policy: Tensor, formula: str) -> Tensor:
    """[q d], [k d], 0/1 policy [q k] -> [q d]; a query, a head, a key at a time."""
    q, k, v = linear(module.query, x), linear(module.key, context), linear(module.value, context)
    dim = q.shape[1] // module.heads
    out = torch.zeros(len(x), q.shape[1], dtype=torch.float64)
    for i in range(len(x)):
        for h in range(module.heads):
            part = slice(h * dim, (h + 1) * dim)
            scores = [float(q[i, part] @ k[j, part]) / dim**0.5 for j in range(len(context))]
            weights = weights_of_a_query(scores, policy[i].tolist(), formula) if scores else []
            for j, w in enumerate(weights):
                out[i, part] += w * v[j, part]
    return linear(module.out, out)


def block(
    module: Any, x: Tensor, context: Tensor, own: Tensor, other: Tensor, formula: str
) -> Tensor:
    normed = layer_norm(module.norm_self, x)
    x = x + attention(module.self_attention, normed, normed, own, formula)
    x = x + attention(
        module.cross_attention, layer_norm(module.norm_cross, x), context, other, formula
    )
    return x + mlp(module.mlp, layer_norm(module.norm_mlp, x))


def score(selector: Any, features: Tensor) -> Tensor:
    """[n d] -> log-probabilities [n 2]."""
    norm, first, _ = selector.local
    x = gelu(linear(first, layer_norm(norm, features)))
    half = x.shape[1] // 2
    x = torch.stack([torch.cat([patch[:half], x[:, half:].mean(0)]) for patch in x])
    x = linear(
        selector.judge[4], gelu(linear(selector.judge[2], gelu(linear(selector.judge[0], x))))
    )
    return torch.stack(
        [patch - (patch - patch.max()).exp().sum().log() - patch.max() for patch in x]
    )


def bayer(row: int, column: int, side: int) -> int:
    """Rank in the Bayer matrix (side a power of 2): the bits, interleaved and reversed."""
    rank, weight = 0, 1
    for bit in reversed(range(side.bit_length() - 1)):
        r, c = row >> bit & 1, column >> bit & 1
        rank, weight = rank + weight * (2 * (r ^ c) + r), weight * 4
    return rank


def select(log_probs: Tensor, dither: bool = False) -> list[bool]:
    """Keep where keep is more probable, with ordered noise if dithered; at least the best patch."""
    difference = [float(p[0] - p[1]) for p in log_probs]
    if dither:
        side = math.isqrt(len(difference))
        whole = 1 << (side - 1).bit_length()
        ranks = [bayer(i // side, i % side, whole) for i in range(len(difference))]
        even = [(sorted(ranks).index(rank) + 0.5) / len(ranks) for rank in ranks]
        difference = [d + math.log(u / (1 - u)) for d, u in zip(difference, even, strict=True)]
    keep = [d > 0 for d in difference]
    if not any(keep):
        keep[difference.index(max(difference))] = True
    return keep


def merge(merger: Any, features: Tensor, keep: list[bool]) -> Tensor:
    """[n d] and a keep mask of one image -> [kept d]."""
    features = features.double()
    n = len(keep)
    context = layer_norm(merger.norm_in, features)
    entering = features
    if merger.position is not None:
        entering = context = context + merger.position.double()
    # in compat all patches are computed: they leak into each other
    indices = [i for i in range(n) if keep[i] or merger.formula == "compat"]
    x = entering[indices]
    for module in merger.blocks:
        if merger.formula == "compat":
            own = torch.tensor(
                [[float((j < i and keep[j]) or i == j) for j in indices] for i in indices]
            )
            other = torch.tensor([[float(not keep[j]) for j in range(n)] for _ in indices])
            x = block(module, x, context, own, other, "compat")
        else:
            own = torch.tensor([[float(j <= i) for j in indices] for i in indices])
            dropped = context[~torch.tensor(keep)]
            x = block(module, x, dropped, own, torch.ones(len(indices), len(dropped)), "strict")
    x = layer_norm(merger.norm_out, x)
    return x[torch.tensor(keep)] if merger.formula == "compat" else x


def project(quantizer: Any, merged: Tensor) -> Tensor:
    z = linear(quantizer.projection[2], linear(quantizer.projection[0], merged).tanh())
    return z / z.norm(dim=1, keepdim=True)


def nearest(z: Tensor, entries: Tensor) -> list[int]:
    """The entry of least squared distance for each vector, in float64."""
    found = []
    for vector in z.double():
        distances = [float(((vector - entry) ** 2).sum()) for entry in entries.double()]
        found.append(distances.index(min(distances)))
    return found


def reconstruct(module: Any, vectors: Tensor) -> Tensor:
    """The codebook entries of one image [m c] -> [n d]."""
    codes = linear(module.project_in, vectors) + module.position[: len(vectors)].double()
    x = module.queries.double()
    for part in module.blocks:
        all_queries, all_codes = torch.ones(len(x), len(x)), torch.ones(len(x), len(codes))
        x = block(part, x, codes, all_queries, all_codes, "strict")
    x = layer_norm(module.norm_out, x)
    return linear(module.project_out[2], linear(module.project_out[0], x).tanh())


def pixels(image: Image.Image, processor: Any) -> Tensor:
    """PIL RGB -> float [1 3 h w]: resize to the square, /255, mean, standard deviation."""
    small = image.convert("RGB").resize((processor.size, processor.size), Image.Resampling.BICUBIC)
    values = np.asarray(small).astype(np.float64) / 255
    values = (values - np.array(processor.image_mean)) / np.array(processor.image_std)
    return torch.from_numpy(values.transpose(2, 0, 1)[None]).float()


@torch.no_grad()
def encode(tokenizer: Any, image: Image.Image) -> list[int]:
    """The codes of one image."""
    features = tokenizer.encoder(pixels(image, tokenizer.image_processor))[0]
    keep = select(score(tokenizer.selector, features), tokenizer.config.dither)
    z = project(tokenizer.quantizer, merge(tokenizer.merger, features, keep))
    return nearest(z, tokenizer.quantizer.codebook.embeddings)


def ema_step(
    entries: Tensor, counts: Tensor, sums: Tensor, z: Tensor, decay: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """One step of EMA k-means on the unit sphere (van den Oord 2017, appendix A), by vector.

    N_k = decay N_k + (1 - decay) n_k;  m_k = decay m_k + (1 - decay) sum of the vectors of k;
    e_k = m_k / N_k brought to unit length (N_k smoothed by eps, which normalization removes again).
    """
    codes = [int((entries.double() @ vector.double()).argmax()) for vector in z]
    new_counts, new_sums = decay * counts.double(), decay * sums.double()
    for vector, code in zip(z.double(), codes, strict=True):
        new_counts[code] += 1 - decay
        new_sums[code] += (1 - decay) * vector
    smoothed = (new_counts + eps) / (new_counts.sum() + len(entries) * eps) * new_counts.sum()
    moved = new_sums / smoothed[:, None]
    return moved / moved.norm(dim=1, keepdim=True), new_counts, new_sums, codes
