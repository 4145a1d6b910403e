"""Feature cosines with their floors, PSNR, SSIM, LPIPS, retrieval, Frechet distances."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from lavit_tok import VisualTokenizer


def feature_mean(tokenizer: VisualTokenizer, batches: Iterable[Tensor]) -> Tensor:
    """The mean feature [d] over all patches of all images, in float64."""
    total, count = torch.zeros(tokenizer.config.width, dtype=torch.float64), 0
    for batch in batches:
        patches = tokenizer.features(tokenizer.preprocess(batch)).flatten(0, 1).double().cpu()
        total, count = total + patches.sum(0), count + len(patches)
    return total / count


def cosines(features: Tensor, reconstructed: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Plain and centered cosine of features [b n d], averaged over patches: [b] each.

    Args:
        mean: [d], the data set's mean feature, which the centered cosine subtracts from both sides.
            All features have a large mean in common, so that a plain cosine flatters.
    """
    mean = mean.to(features)
    return {
        "plain": cosine(features, reconstructed),
        "centered": cosine(features - mean, reconstructed - mean),
    }


def cosine_floors(features: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Cosines of predictions without codes, the mean feature of the set or of the image: [b] each.

    The centered cosine of the set's mean is 0 by definition (it is the zero vector then).
    """
    mean, own = mean.to(features), features.mean(1, keepdim=True)
    return {
        "plain_floor_set_mean": cosine(features, mean),
        "plain_floor_image_mean": cosine(features, own),
        "centered_floor_image_mean": cosine(features - mean, own - mean),
    }


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over patches of the cosine of [b n d] with what broadcasts to it: float64 [b]."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).double().mean(1)


THUMBNAIL = 16
SSIM_BORDER = 5


def thumbnails(images: Tensor, side: int = THUMBNAIL) -> Tensor:
    """Images [n 3 h w] as vectors of side x side RGB [n 3 * side^2], which retrieval compares."""
    return F.adaptive_avg_pool2d(images.float(), side).flatten(1)


def retrieved(decoded: Tensor, sources: Tensor, chunk: int = 256) -> Tensor:
    """Whether each vector of [n d] is nearest to its own source among [m d], m >= n: bool [n].

    Vector i is of source i; further sources make it harder. A tie counts as found.
    """
    found, sources = [], sources.double()
    for start in range(0, len(decoded), chunk):
        part = decoded[start : start + chunk].double()
        distances = torch.cdist(part, sources, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.diagonal(start) <= distances.amin(1))
    return torch.cat(found)


def psnr_ssim(decoded: Tensor, sources: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each image, [n] each; float [n 3 h w] in 0..1, so data_range is 1.

    SSIM as Wang et al. (2004) define it: Gaussian window of 11x11 pixels, sigma 1.5, over all
    positions where it fits into the image. torchmetrics' own mean includes a reflected border of 5
    pixels, which is 0.01 to 0.04 lower on images of 48 to 128 pixels, so the mean is taken here.
    """
    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    psnr = peak_signal_noise_ratio(decoded, sources, dim=(1, 2, 3), **options)
    options["return_full_image"] = True
    _, full = structural_similarity_index_measure(decoded, sources, **options)
    inside = full[..., SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER]
    return {"psnr": psnr.reshape(-1), "ssim": inside.double().mean((1, 2, 3))}


def lpips_metric() -> Any:
    """LPIPS (AlexNet) of each pair of images. Raises ImportError without torchvision."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).eval()
    return lambda a, b: torch.stack([metric(x[None], y[None]) for x, y in zip(a, b, strict=True)])


Space = Callable[[Tensor], Tensor]
"""A feature space of Frechet distances: uint8 [b 3 h w] -> float [b d]."""


def encoder_space(tokenizer: VisualTokenizer) -> Space:
    """A tokenizer's own patch features, averaged over patches."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return tokenizer.features(tokenizer.preprocess(images)).mean(1).float().cpu()

    return features


def inception_space(weights: Any, antialias: bool, device: str) -> Space:
    """torchmetrics' Inception-v3 2048-d with torch-fidelity's weights."""
    options = {"feature_extractor_weights_path": weights, "antialias": antialias}
    network = FrechetInceptionDistance(2048, **options).inception.to(device)
    return torch.no_grad()(lambda images: network(images.to(device)).cpu())


def feature_spaces(tokenizer: Any, inception: Any, device: str) -> dict[bool | None, Space]:
    """The tokenizer's space as None, and Inception's by antialias if its weights are given."""
    found: dict[bool | None, Space] = {None: encoder_space(tokenizer)}
    antialias = (True, False) if inception else ()
    return found | {x: inception_space(inception, x, device) for x in antialias}


class _Precomputed(nn.Module):
    """For torchmetrics: features that are already computed."""

    num_features: int

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(sources: Tensor, decoded: Tensor) -> float:
    """Frechet distance of two sets of features [n d] and [m d], in float64, by torchmetrics."""
    features = _Precomputed()
    features.num_features = sources.shape[1]
    metric = FrechetInceptionDistance(features)
    metric.update(sources.double(), real=True)
    metric.update(decoded.double(), real=False)
    return float(metric.compute())
