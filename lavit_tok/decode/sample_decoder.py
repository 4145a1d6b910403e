"""SampleDecoder: reconstructed features and colors, and noise -> a plausible image, in one pass.

    features and colors [b n d + 3 k k] -> 1x1 -> + noise, blocks on the patch grid -> twice the
                                           side -> + noise, blocks, half as wide -> twice the side
                                                -> ...
    + the colors alone, enlarged bilinearly                                   = pixels [b 3 h w]

A MeanDecoder that also reads noise, at each position as much of it as a linear map of the hidden
states decides, since some areas are known better than others. Trained on an energy score
(training/energy_score.py), its images are draws from the images that share the codes. The noise is
one tensor on the finest grid of the blocks; coarser grids read its averages.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.decode.mean_decoder import MeanDecoder


class SampleDecoder(MeanDecoder):
    """`Reconstruction.joined` of nested codes and noise -> pixels.

    Args:
        width: as of MeanDecoder, likewise the arguments that follow it.
        patches: of an image, a square number.
        color_cells: the colors are those of this number of cells per patch side, at least 1.
        channels: of the blocks on each grid.
        layers: residual blocks on each grid.
        groups: of the group norms, a divisor of all channels.
        noise_channels: of the noise, at least 1.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 192,
        patches: int = 256,
        color_cells: int = 4,
        channels: tuple[int, ...] | list[int] = (128, 64, 32),
        layers: int = 1,
        groups: int = 8,
        noise_channels: int = 8,
    ) -> None:
        super().__init__(width, patches, color_cells, channels, layers, groups)
        if type(noise_channels) is not int or noise_channels < 1:
            raise ValueError(
                f"noise_channels: expected an integer of at least 1, got {noise_channels!r}"
            )
        self.noise: Any = nn.ModuleList(
            nn.Conv2d(noise_channels, size, 1, bias=False) for size in channels
        )
        self.gain: Any = nn.ModuleList(nn.Conv2d(size, size, 1) for size in channels)
        layer: Any
        gain: Any
        for layer, gain in zip(self.noise, self.gain, strict=True):
            # At first nearly the image of the decoder without noise
            nn.init.normal_(layer.weight, std=0.1 * noise_channels**-0.5)
            nn.init.zeros_(gain.weight)
            nn.init.ones_(gain.bias)
        self.eval()

    @classmethod
    def from_mean_decoder(
        cls, decoder: MeanDecoder, layers: int = 1, noise_channels: int = 8
    ) -> SampleDecoder:
        """A new decoder that starts at the images of a mean decoder.

        Args:
            decoder: with at most `layers` blocks on each grid; further blocks add nothing at first.
            layers: residual blocks on each grid.
            noise_channels: of the noise.

        Raises:
            ValueError: a mean decoder of more blocks.
        """
        c = decoder.config
        if layers < c.layers:
            raise ValueError(f"layers: expected at least {c.layers}, got {layers}")
        sizes = (c.width, c.patches, c.color_cells, tuple(c.channels), layers, c.groups)
        new = cls(*sizes, noise_channels)
        new.conv_in.load_state_dict(decoder.conv_in.state_dict())
        for (*blocks, up), (*known, known_up) in zip(new.blocks, decoder.blocks, strict=True):
            up.load_state_dict(known_up.state_dict())
            for block, source in zip(blocks, known, strict=False):
                block.load_state_dict(source.state_dict())
            for block in blocks[len(known) :]:
                nn.init.zeros_(block.conv2.weight)
                nn.init.zeros_(block.conv2.bias)
        return new

    def noise_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of the noise for a batch."""
        side = self._side * 2 ** (len(self.config.channels) - 1)
        return batch, self.config.noise_channels, side, side

    def forward(  # type: ignore[override]  # noise, beside what a mean decoder reads
        self,
        joined: Float[Tensor, "batch patches joined"],
        noise: Float[Tensor, "batch channels rows columns"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pixels, about -1..1.

        Args:
            joined: features and colors.
            noise: of unit variance, of `noise_shape`.
        """

        def with_noise(grid: int, x: Tensor) -> Tensor:
            cells = noise.shape[-1] // x.shape[-1]
            # The mean of n independent numbers has the deviation n^-1/2
            averages = F.avg_pool2d(noise.to(x.dtype), cells) * cells
            return x + self.gain[grid](x) * self.noise[grid](averages)

        return self._decode(joined, with_noise)
