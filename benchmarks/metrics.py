"""The measures of reconstruction: feature cosines and their floors; PSNR, SSIM, retrieval, LPIPS, Frechet distances."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from lavit_tok import VisualTokenizer
from lavit_tok.encode.image_processor import CLIP_MEAN, CLIP_STD

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

THUMBNAIL = 16
SSIM_BORDER = 5


def thumbnails(images: Tensor, side: int = THUMBNAIL) -> Tensor:
    """Pictures [n 3 h w] as rows of side x side RGB: what retrieval compares, float32 [n 3 * side^2]."""
    return F.adaptive_avg_pool2d(images.float(), side).flatten(1)


def found_own(drawn: Tensor, sources: Tensor, chunk: int = 256) -> Tensor:
    """Whether each row [n d] is nearest to its own source's row, of [m d]: bool [n].

    Row i is of source i; further sources only make it harder. A tie counts as found.
    """
    found = []
    sources = sources.double()
    for start in range(0, len(drawn), chunk):
        rows = drawn[start : start + chunk].double()
        distances = torch.cdist(rows, sources, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.diagonal(start) <= distances.amin(1))
    return torch.cat(found)


def retrieval(drawn: Tensor, sources: Tensor, side: int = THUMBNAIL) -> float:
    """Share of drawn pictures [n 3 h w] whose nearest source [m 3 h w], in side x side RGB, is their own."""
    return float(found_own(thumbnails(drawn, side), thumbnails(sources, side)).double().mean())


def psnr_ssim(drawn: Tensor, sources: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each picture, [n] each; float [n 3 h w] in 0..1, so data_range is 1.

    SSIM is that of Wang et al. (2004): Gaussian window of 11x11 pixels, sigma 1.5, over all places where it fits
    into the picture. In scikit-image: structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False). torchmetrics' own mean takes in 5 pixels of border under a mirrored picture, which is
    0.01 to 0.04 lower on pictures of 48 to 128 pixels, so the mean is taken here.
    """
    psnr = peak_signal_noise_ratio(drawn, sources, data_range=1.0, reduction="none", dim=(1, 2, 3))
    _, everywhere = structural_similarity_index_measure(
        drawn, sources, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = everywhere[..., SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER]
    return {"psnr": psnr.reshape(-1), "ssim": inside.double().mean((1, 2, 3))}


def pixel_scores(drawn: Tensor, sources: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM, means over pictures, and retrieval; float [n 3 h w] in 0..1, so data_range is 1."""
    pairs = psnr_ssim(drawn, sources[: len(drawn)])
    means = {name: float(values.mean()) for name, values in pairs.items()}
    return means | {"retrieval": retrieval(drawn, sources)}


def lpips_metric() -> Any:
    """LPIPS (AlexNet) by torchmetrics. Raises ImportError without torchvision, which has its weights."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity("alex", normalize=True).eval()


def lpips(metric: Any, drawn: Tensor, sources: Tensor) -> Tensor:
    """LPIPS of each picture, [n]; float [n 3 h w] in 0..1."""
    return torch.stack([metric(a[None], b[None]) for a, b in zip(drawn, sources, strict=True)])


# Feature spaces of Frechet distances: uint8 [b 3 h w] -> [b d]


class EncoderSpace(nn.Module):
    """A tokenizer's own patch features, averaged over patches."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self._tokenizer = [
            tokenizer
        ]  # not a sub-module: torchmetrics moves and casts what it holds
        self.num_features = tokenizer.config.width

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokenizer = self._tokenizer[0]
        return tokenizer.features(tokenizer.preprocess(images)).mean(1).float()


class VisionSpace(nn.Module):
    """The pooled output of a `transformers` vision model, of a kind that the command line names.

    Pictures are resized to the model's square, bicubic with antialiasing, and normalised as that kind was trained.
    """

    def __init__(self, kind: str, weights: str) -> None:
        super().__init__()
        if kind not in VISION:
            raise ValueError(
                f"--spaces {kind}:{weights}: expected encoder, or one of {sorted(VISION)} with a folder"
            )
        name, mean, std = VISION[kind]
        self.model = (
            getattr(transformers, name).from_pretrained(weights, use_safetensors=True).eval()
        )
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
        self.num_features = self.model.config.hidden_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        size = self.model.config.image_size
        pixels = F.interpolate(
            images.float() / 255, (size, size), mode="bicubic", antialias=True
        ).clamp(0, 1)
        like = next(self.model.parameters())
        pixels = ((pixels - self.mean) / self.std).to(like.device, like.dtype)
        return self.model(pixel_values=pixels).pooler_output.float().cpu()


HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VISION = {
    "clip": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD),
    "dinov2": ("Dinov2Model", *IMAGENET),
    "siglip": ("SiglipVisionModel", *HALF),
}


def inception(weights: Any, antialias: bool) -> nn.Module:
    """torchmetrics' Inception-v3 2048-d with torch-fidelity's weights; resized to 299 with or without antialiasing."""
    return FrechetInceptionDistance(
        2048, feature_extractor_weights_path=weights, antialias=antialias
    ).inception


class _AsTheyAre(nn.Module):
    """For torchmetrics: features that are already computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_of_features(sources: Tensor, drawn: Tensor) -> float:
    """Frechet distance of two sets of features [n d] and [m d], in float64, by torchmetrics."""
    metric = FrechetInceptionDistance(_AsTheyAre(sources.shape[1]))
    metric.update(sources.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def frechet(space: nn.Module, sources: Tensor, drawn: Tensor, batch: int) -> float:
    """Frechet distance of uint8 pictures [n 3 h w] in a space; sources are the same crops that were encoded."""
    return frechet_of_features(
        *(torch.cat([space(part) for part in x.split(batch)]) for x in (sources, drawn))
    )
