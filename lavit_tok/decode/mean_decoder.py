"""MeanDecoder: reconstructed features and colors -> the expected image, in one forward pass.

    features and colors [b n d + 3 k k] -> 1x1 -> blocks on the patch grid   -> twice the side
                                               -> blocks, half as wide       -> twice the side
                                               -> blocks, half as wide again -> twice the side
    + the colors alone, enlarged bilinearly                              = pixels [b 3 h w]

A network trained on squared error predicts the mean of all images that share the codes: the closest
on average and blurred where the codes leave detail open. Blocks are diffusers' residual blocks;
sides are doubled by pixel shuffle (Shi et al., 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.decode.conditioner import patch_grid
from lavit_tok.nn.ranges import require_integers


class MeanDecoder(ModelMixin, ConfigMixin):
    """`Reconstruction.joined` of nested codes -> pixels.

    Args:
        width: dimension of the features.
        patches: of an image, a square number.
        color_cells: the colors are those of this number of cells per patch side, at least 1.
        channels: of the blocks on each grid; each doubles the side, so that three make 8 pixels of
            the side of a patch.
        layers: residual blocks on each grid.
        groups: of the group norms, a divisor of all channels.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        width: int = 192,
        patches: int = 256,
        color_cells: int = 4,
        channels: tuple[int, ...] | list[int] = (128, 64, 32),
        layers: int = 1,
        groups: int = 8,
    ) -> None:
        super().__init__()
        require_integers(MeanDecoder.__init__, self.config, 1)
        self.conv_in = nn.Conv2d(width + 3 * color_cells**2, channels[0], 1)
        self.blocks: Any = nn.ModuleList()
        for size, following in zip(channels, [*channels[1:], 3], strict=True):
            blocks = [
                ResnetBlock2D(in_channels=size, temb_channels=None, groups=groups)
                for _ in range(layers)
            ]
            last = following == 3
            up = nn.Conv2d(size, 4 * following, 3 if last else 1, padding=int(last))
            self.blocks.append(nn.ModuleList([*blocks, up]))
        nn.init.zeros_(up.weight)  # at first the colors alone
        nn.init.zeros_(up.bias)  # type: ignore[arg-type]
        self.eval()

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self._side * 2 ** len(self.config.channels)

    @property
    def _side(self) -> int:
        return math.isqrt(self.config.patches)

    def enlarged(
        self, joined: Float[Tensor, "batch patches joined"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The colors alone, enlarged bilinearly: about -1..1."""
        cells = self.config.color_cells
        colors = patch_grid(joined[..., self.config.width :], self._side, cells)
        size = (self.image_size, self.image_size)
        return F.interpolate(colors, size, mode="bilinear", align_corners=False)

    def forward(
        self, joined: Float[Tensor, "batch patches joined"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pixels, about -1..1."""
        return self._decode(joined, lambda grid, x: x)

    def _decode(
        self,
        joined: Float[Tensor, "batch patches joined"],
        enter: Callable[[int, Tensor], Tensor],
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pixels; `enter` is applied to the hidden states before the blocks of each grid."""
        joined = joined.to(self.conv_in.weight.dtype)
        x = self.conv_in(patch_grid(joined, self._side, 1))
        for grid, (*blocks, up) in enumerate(self.blocks):
            x = enter(grid, x)
            for block in blocks:
                x = block(x, None)
            x = F.pixel_shuffle(up(x), 2)
        return self.enlarged(joined) + x
