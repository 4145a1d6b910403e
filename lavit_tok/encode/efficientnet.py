"""EfficientNet-Lite as a frozen encoder: maps of several stages joined on the patch grid.

    pixels [b 3 128 128] -> stem and seven stages (strides 2 to 32) -> the chosen stages' maps, each
    brought to the patch grid (averaged down, or bilinearly up) -> joined, standardized, projected
    -> features [b n d]

Deep stages represent what a patch shows, shallow ones its colors and edges. Channels differ in
scale by orders of magnitude, so each is standardized (constants kept with the weights), and each
stage is weighted, before a cosine compares them. The projection keeps the directions of largest
weighted variance, and may stress the largest of them.

Architecture: EfficientNet (Tan and Le, 2019) in its Lite form: no squeeze-and-excitation, ReLU6, a
stem and a head of fixed width. recipes/default/encoder.py makes it of weights under Apache-2.0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.checkpoints.weights import load_weights
from lavit_tok.config import ConfigError

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride, expansion and channels of every stage of Lite0."""
STEM = 32
COLOR_CELLS = 4
EPS = 1e-3


class SameConv(nn.Conv2d):
    """A convolution that divides the size by its stride; odd padding is larger at the end."""

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d p q"]:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = [
            max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[:-3:-1]
        ]  # width, height
        if any(pads):
            x = F.pad(
                x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2]
            )
        return super().forward(x)


def unit(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution and batch norm."""
    convolution = SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, EPS))


class InvertedBottleneck(nn.Module):
    """Expand, depthwise convolution, project; the input is added where its shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = unit(inputs, width) if expansion > 1 else None
        self.depthwise = unit(width, width, kernel, stride, width)
        self.project = unit(width, outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d p q"]:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class EfficientNetLite(nn.Module):
    """Lite0 scaled by width and depth; gives the map of every stage, the stem's first.

    Args:
        width: multiplies the channels of all stages, rounded to multiples of 8; stem and head stay.
        depth: multiplies the blocks of the stages, rounded up; the first and the last stage stay.
        classes: outputs of the classifier; 0 leaves head and classifier out.
        stages: how many stages are built (7 for a classifier).
    """

    def __init__(
        self, width: float = 1.0, depth: float = 1.0, classes: int = 0, stages: int = 7
    ) -> None:
        super().__init__()
        self.stem = unit(3, STEM, 3, 2)
        channels = STEM
        self.stages = nn.ModuleList()
        self.channels = [STEM]  # of the maps
        for index, (blocks, kernel, stride, expansion, out) in enumerate(STAGES[:stages]):
            outputs = _rounded(out * width)
            count = blocks if index in (0, len(STAGES) - 1) else math.ceil(blocks * depth)
            first = [InvertedBottleneck(channels, outputs, kernel, stride, expansion)]
            more = [
                InvertedBottleneck(outputs, outputs, kernel, 1, expansion) for _ in range(count - 1)
            ]
            self.stages.append(nn.Sequential(*first, *more))
            channels = outputs
            self.channels.append(channels)
        self.head = unit(channels, 1280) if classes else None
        self.classifier = nn.Linear(1280, classes) if classes else None

    def maps(self, pixels: Float[Tensor, "batch 3 h w"], stages: int | None = None) -> list[Tensor]:
        """The stem's map, then that of every stage, or of this number of them."""
        found = [F.relu6(self.stem(pixels))]
        for stage in self.stages[:stages]:
            found.append(stage(found[-1]))
        return found

    def pooled(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 1280"]:
        """What the classifier reads: the mean over the image of the head's map."""
        assert self.head is not None
        return F.relu6(self.head(self.maps(pixels)[-1])).mean((2, 3))

    def forward(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        assert self.classifier is not None
        return self.classifier(self.pooled(pixels))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but not below nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


@dataclass(frozen=True)
class JoinedConfig:
    """Sizes of a JoinedEncoder, as TokenizerConfig.encoder stores them beside the model_type.

    Raises:
        ConfigError: an unknown source, none at all, or a width above that of the joined channels.
    """

    model_type: ClassVar[str] = "efficientnet_lite"
    image_size: int = 128
    patch_size: int = 8
    hidden_size: int = 192
    """Width of the features: directions kept of the joined channels."""
    sources: tuple[int, ...] = (-1, 3, 5, 7)
    """What is joined: -1 is the colors of 4x4 parts of every patch, 0 the stem, 1 to 7 the
    stages."""

    def __post_init__(self) -> None:
        if not self.sources or not set(self.sources) <= set(range(-1, len(STAGES) + 1)):
            raise ConfigError(
                f"encoder.sources: expected some of -1..{len(STAGES)}, got {self.sources}"
            )
        if not 0 < self.hidden_size <= sum(self.channels):
            raise ConfigError(
                f"encoder.hidden_size: expected 1..{sum(self.channels)}, got {self.hidden_size}"
            )

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    @property
    def channels(self) -> list[int]:
        """Channels of every source."""
        stages = {index + 1: stage[4] for index, stage in enumerate(STAGES)}
        return [{-1: 3 * COLOR_CELLS**2, 0: STEM, **stages}[source] for source in self.sources]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JoinedConfig:
        """From TokenizerConfig.encoder. Raises ConfigError for unknown entries."""
        values = {name: value for name, value in values.items() if name != "model_type"}
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"encoder: {cls.model_type} has no entries {unknown}")
        if isinstance(values.get("sources"), list):  # JSON has no tuples
            values["sources"] = tuple(values["sources"])
        return cls(**values)


class JoinedEncoder(nn.Module):
    """Frozen: pixels -> standardized, projected features of every patch.

    `mean` and `scale` (the weight of a source's channels divided by their standard deviation) and
    `basis` (orthogonal columns) are buffers: constants that a script measures on training images
    and keeps with the weights.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(self, config: JoinedConfig | None = None) -> None:
        super().__init__()
        self.config = config or JoinedConfig()
        self.network = EfficientNetLite(stages=max(0, *self.config.sources))
        joined = sum(self.config.channels)
        self.register_buffer("mean", torch.zeros(joined))
        self.register_buffer("scale", torch.ones(joined))
        self.register_buffer("basis", torch.eye(joined, self.config.hidden_size))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> JoinedEncoder:
        """From the config.json and model.safetensors that recipes/default/encoder.py writes."""
        encoder = cls(
            JoinedConfig.from_dict(json.loads((Path(directory) / "config.json").read_text()))
        )
        load_weights(encoder, directory)
        return encoder

    def json_config(self) -> dict[str, Any]:
        """The config as TokenizerConfig.encoder stores it."""
        values = dataclasses.asdict(self.config)
        return {
            "model_type": self.config.model_type,
            **values,
            "sources": list(self.config.sources),
        }

    def train(self, mode: bool = True) -> JoinedEncoder:
        """Stays in eval mode: the encoder is frozen."""
        return super().train(False)

    def joined(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patches joined"]:
        """The channels of all sources on the patch grid, as the network gives them."""
        grid = self.config.grid
        maps = self.network.maps(pixels)
        found = []
        for source in self.config.sources:
            if source == -1:
                found.append(patch_colors(pixels, grid))
                continue
            values = maps[source]
            if values.shape[-1] > grid:
                values = F.adaptive_avg_pool2d(values, grid)
            elif values.shape[-1] < grid:
                values = F.interpolate(values, (grid, grid), mode="bilinear", align_corners=False)
            found.append(values.flatten(2).transpose(1, 2))
        return torch.cat(found, -1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches hidden"]:
        """Features of every patch; without gradient, unless some parameter requires one."""
        is_trained = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            joined = self.joined(pixels.to(self.basis.dtype))
            return ((joined - self.mean) * self.scale) @ self.basis


def patch_colors(
    pixels: Float[Tensor, "batch c h w"], grid: int, cells: int = COLOR_CELLS
) -> Float[Tensor, "batch patches out"]:
    """Mean colors of cells x cells parts of every patch, ordered color, y, x."""
    small = F.adaptive_avg_pool2d(pixels, grid * cells)
    return F.unfold(small, cells, stride=cells).transpose(1, 2)
