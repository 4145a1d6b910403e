"""The measures of reconstruction: feature cosines and their floors; PSNR, SSIM, retrieval, LPIPS, Frechet distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from lavit_tok import VisualTokenizer

# Features


def feature_mean(tokenizer: VisualTokenizer, batches: Any) -> Tensor:
    """The mean feature [d] over all patches of all pictures, in float64."""
    total, count = torch.zeros(tokenizer.config.width, dtype=torch.float64), 0
    for batch in batches:
        rows = tokenizer.features(tokenizer.preprocess(batch)).flatten(0, 1).double().cpu()
        total, count = total + rows.sum(0), count + len(rows)
    return total / count


def cosines(features: Tensor, rebuilt: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Cosines of a batch [b n d], averaged over patches: [b] each. `mean` [d] is the data set's mean feature.

    The two floors say what no codes at all, and one vector an image, would score. The centred cosine of the mean
    feature itself is 0 by definition (it is the zero vector then), so it is not computed.
    """
    own = features.mean(1, keepdim=True)
    floors = {
        "plain_floor_set_mean": cosine(features, mean.to(features)),
        "plain_floor_image_mean": cosine(features, own),
        "centred_floor_image_mean": cosine(features - mean.to(features), own - mean.to(features)),
    }
    return plain_and_centred(features, rebuilt, mean) | floors


def plain_and_centred(features: Tensor, rebuilt: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """The two cosines of `cosines` without the floors: [b] each."""
    mean = mean.to(features)
    return {"plain": cosine(features, rebuilt), "centred": cosine(features - mean, rebuilt - mean)}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over patches of the cosine of [b n d] with anything that broadcasts to it: [b], float64."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).double().mean(1)


# Pixels


def retrieval(drawn: Tensor, sources: Tensor, side: int = 16) -> float:
    """Share of drawn pictures [n 3 h w] whose nearest source [m 3 h w], in side x side RGB, is their own.

    Drawn picture i is of source i; further sources only make it harder. A tie counts as found.
    """
    small = [F.adaptive_avg_pool2d(x.float(), side).flatten(1).double() for x in (drawn, sources)]
    distances = torch.cdist(*small, compute_mode="donot_use_mm_for_euclid_dist")
    return float((distances.diagonal() <= distances.amin(1)).double().mean())


def pixel_scores(drawn: Tensor, sources: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM, means over pictures, and retrieval; float [n 3 h w] in 0..1, so data_range is 1."""
    candidates, sources = sources, sources[: len(drawn)]
    psnr = peak_signal_noise_ratio(drawn, sources, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(drawn, sources, data_range=1.0, reduction="none")
    return {"psnr": float(psnr.mean()), "ssim": float(ssim.mean()), "retrieval": retrieval(drawn, candidates)}


def lpips(drawn: Tensor, sources: Tensor) -> float:
    """LPIPS (AlexNet) by torchmetrics, which needs torchvision and its AlexNet weights. Raises ImportError without."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    for pair in zip(drawn.split(64), sources.split(64), strict=True):
        metric.update(*pair)
    return float(metric.compute())


class EncoderSpace(nn.Module):
    """uint8 [b 3 h w] -> the tokenizer's own patch features, averaged over patches [b d]."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self._tokenizer = [tokenizer]  # not a sub-module: torchmetrics moves and casts what it holds
        self.num_features = tokenizer.config.width

    def forward(self, images: Tensor) -> Tensor:
        tokenizer = self._tokenizer[0]
        return tokenizer.features(tokenizer.preprocess(images)).mean(1).float()


def frechet(metric: FrechetInceptionDistance, sources: Tensor, drawn: Tensor, batch: int) -> float:
    """The metric over uint8 [n 3 h w] pairs; sources are the same crops that were encoded."""
    for images, real in ((sources, True), (drawn, False)):
        for part in images.split(batch):
            metric.update(part, real=real)
    return float(metric.compute())
