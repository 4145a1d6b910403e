"""Energy score: how well random images agree with a true one, by features of a frozen network.

    score = (|f(a) - f(x)| + |f(b) - f(x)|) / 2 - |f(a) - f(b)| / 2,   a, b two draws, x the image

summed over maps f, mean over their positions, |.| the Euclidean norm over channels. It is a proper
scoring rule (Gneiting and Raftery, 2007, section 4.2): its expectation is smallest if draws have
the distribution of x at every position of every map. Two equal draws are the mean absolute error,
whose best image is blurred; the last term rewards different ones, with a weight that can be lower.

The maps are those of an EfficientNet-Lite, and the 3 x 3 neighborhoods of pixels at full, half and
a quarter of the size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.encode.efficientnet import EfficientNetLite

MEAN, STD = 0.498, 0.502  # of the network's input, for pixels in 0..1
AREAS = (1, 2, 4)  # sides of the squares of pixels that neighborhoods are averages of
PIXEL_SCALE = 3.0  # a deviation of colors in -1..1 of a third counts as that of a channel


class FeatureMaps:
    """Maps of a frozen network, each channel of unit deviation.

    Args:
        network: frozen.
        stages: whose maps are returned; 0 is the stem, 1 to 7 the stages.
        images: -1..1, whose channels have unit deviation in each map.
    """

    def __init__(
        self,
        network: EfficientNetLite,
        stages: Sequence[int],
        images: Float[Tensor, "n 3 h w"],
    ) -> None:
        self.network, self.stages = network, tuple(stages)
        self.scales: list[Tensor] | None = None
        with torch.no_grad():
            self.scales = [x.std((0, 2, 3), keepdim=True) + 1e-3 for x in self(images)]

    def __call__(self, images: Float[Tensor, "batch 3 h w"]) -> list[Tensor]:
        """A map [batch channels height width] for every stage."""
        maps = self.network.maps(((images + 1) / 2 - MEAN) / STD, max(self.stages))
        found = [maps[stage].float() for stage in self.stages]
        if self.scales is None:
            return found
        return [x / scale for x, scale in zip(found, self.scales, strict=True)]


def neighborhoods(images: Float[Tensor, "batch 3 h w"]) -> list[Tensor]:
    """3 x 3 pixels around every pixel, as channels, at full, half and a quarter of the size."""
    parts = [F.unfold(F.avg_pool2d(images, side), 3) for side in AREAS]
    return [PIXEL_SCALE * part for part in parts]


def energy_score(
    true: Sequence[Tensor], drawn: Sequence[Tensor], repulsion: float = 1.0
) -> Float[Tensor, ""]:
    """The mean score of one or two draws for every image.

    Args:
        true: maps [n channels ...] of the images.
        drawn: the same [n or 2 n, channels ...] of one draw for each, then of another for each.
        repulsion: weight of the last term, which needs two draws; 1 is the proper score.
    """
    scores = []
    for x, maps in zip(true, drawn, strict=True):
        a, b = maps[: len(x)], maps[-len(x) :]
        near = _distance(a, x) if len(maps) == len(x) else (_distance(a, x) + _distance(b, x)) / 2
        scores.append(near - repulsion * _distance(a, b) / 2 if repulsion else near)
    return torch.stack(scores).sum()


def _distance(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    """Mean over positions of the root of the mean squared difference of channels."""
    return ((a - b).square().mean(1) + 1e-8).sqrt().mean()  # the root has a gradient at 0
