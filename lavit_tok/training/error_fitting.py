"""Fit the error heads of a trained tokenizer to the errors that it makes.

    images -frozen encoder, codebook-> all codes -first 1, 2, 4, ... n-> errors
    features, residual errors -ErrorHead-> predicted errors;  loss = squared difference

Heads that are trained together with the codes lag behind: errors decrease until the last step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.encode.error_head import ErrorHead, doublings, summary
from lavit_tok.encode.rate_control import COLOR_ERROR_SCALE
from lavit_tok.training.optimizers import parameter_groups

NOISE = 0.1
"""Added to the summaries of features, in standard deviations: there are few images to fit to."""
Features = Float[Tensor, "batch patches width"]
Colors = Float[Tensor, "batch patches out"]


@torch.no_grad()
def measured_errors(
    tokenizer: Any, features: Features, colors: Colors
) -> tuple[dict[str, Float[Tensor, "batch points"]], Float[Tensor, "batch patches"]]:
    """Errors with 1, 2, 4, ... n exact codes; residual errors of 1, 2, 3, ... n codes.

    Args:
        tokenizer: a VisualTokenizer of nested codes.
        features: of the encoder.
        colors: of the patches, 0..1.
    """
    n, mean = features.shape[1], tokenizer.mean_feature
    codes, left = tokenizer.quantizer.encode(features, n)
    found: dict[str, list[Tensor]] = {"cosine": [], "psnr": []}
    for count in doublings(n):
        lengths = torch.full((len(features),), count, device=features.device)
        vectors = tokenizer.quantizer.codebook.decode(codes[:, :count], lengths)
        output = tokenizer.reconstructor(vectors, lengths)
        cosine = F.cosine_similarity(features - mean, output.features.float() - mean, dim=-1)
        found["cosine"].append(1 - cosine.mean(1))
        difference = output.colors.float().clamp(0, 1) - colors
        found["psnr"].append(COLOR_ERROR_SCALE * difference.square().mean((1, 2)).sqrt())
    return {kind: torch.stack(values, 1) for kind, values in found.items()}, left


def fit_error_heads(
    tokenizer: Any,
    batches: Iterable[tuple[Features, Colors]],
    seed: int = 0,
    steps: int = 1500,
    batch_size: int = 128,
    lr: float = 2e-3,
) -> dict[str, float]:
    """Replace the error heads of a tokenizer by newly fitted ones.

    Args:
        tokenizer: a VisualTokenizer of nested codes; everything but the heads stays.
        batches: features and colors of some thousand images.
        seed: of the heads' initial weights and the order of images.
        steps: of AdamW; the learning rate falls to 0 as half a cosine.
        batch_size: images of a step.
        lr: first learning rate.

    Returns:
        Root mean squared difference of predicted and measured errors of every kind, over the last
        tenth of the images, which no step used.
    """
    config = tokenizer.config
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Tensor] = []
    distances: list[Tensor] = []
    targets: dict[str, list[Tensor]] = {kind: [] for kind in tokenizer.error_heads}
    for features, colors in batches:
        errors, left = measured_errors(tokenizer, features, colors)
        inputs.append(summary(features, tokenizer.error_heads["cosine"].levels))
        distances.append(left)
        for kind, values in targets.items():
            values.append(errors[kind])
    x, left = torch.cat(inputs), torch.cat(distances)
    counts = torch.tensor(doublings(config.num_patches), device=x.device)
    last = len(x) - len(x) // 10
    deviation, mean = torch.std_mean(x[:last], 0, correction=0)
    deviation = deviation.clamp(min=1e-4)
    difference: dict[str, float] = {}
    for kind, values in targets.items():
        y = torch.cat(values)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = ErrorHead(config.width, config.num_patches, config.error_hidden).to(x.device)
        head.mean.copy_(mean)
        head.deviation.copy_(deviation)
        optimizer = torch.optim.AdamW(parameter_groups(head.parameters(), 0.05), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            picked = torch.randint(last, (batch_size,), generator=generator).to(x.device)
            noise = torch.randn(batch_size, x.shape[1], generator=generator).to(x.device)
            noisy = x[picked] + NOISE * deviation * noise
            loss = (head.at(noisy, left[picked], counts) - y[picked]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            error = head.at(x[last:], left[last:], counts) - y[last:]
        difference[kind] = float(error.square().mean().sqrt())
        tokenizer.error_heads[kind].load_state_dict(head.state_dict())
    return difference
