"""EfficientNet-Lite and the features joined of it: padding, shapes, constants, files, and the
published names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lavit_tok import ConfigError
from lavit_tok.checkpoints.weights import save_weights
from lavit_tok.encode.efficientnet import (
    EfficientNetLite,
    JoinedConfig,
    JoinedEncoder,
    SameConv,
    patch_colors,
)
from lavit_tok.encode.vision_encoder import VisionEncoder

RECIPE = Path(__file__).resolve().parents[3] / "recipes/default/encoder.py"


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (8, 5, 2), (7, 3, 2), (7, 5, 2)]
)
def test_padding_puts_the_odd_pixel_at_the_end(size: int, kernel: int, stride: int) -> None:
    """Against a loop over output positions, each window starting where TensorFlow's 'SAME' starts
    it."""
    torch.manual_seed(0)
    convolution = SameConv(1, 1, kernel, stride, bias=False)
    image = torch.randn(1, 1, size, size)
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    expected = torch.zeros(out, out)
    for r in range(out):
        for c in range(out):
            for p in range(kernel):
                for q in range(kernel):
                    y, x = r * stride - before + p, c * stride - before + q
                    if 0 <= y < size and 0 <= x < size:
                        expected[r, c] += (
                            image[0, 0, y, x] * convolution.weight[0, 0, p, q].detach()
                        )
    assert torch.allclose(convolution(image)[0, 0], expected, atol=1e-5)


@torch.no_grad()
def test_maps_and_sizes() -> None:
    network = EfficientNetLite(classes=10).eval()
    shapes = [tuple(found.shape[1:]) for found in network.maps(torch.zeros(1, 3, 128, 128))]
    assert shapes == [
        (32, 64, 64), (16, 64, 64), (24, 32, 32), (40, 16, 16), (80, 8, 8), (112, 8, 8), (192, 4,
        4), (320, 4, 4),
    ]  # fmt: skip
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert sum(p.numel() for p in EfficientNetLite(classes=1000).parameters()) == 4_652_008
    assert (
        EfficientNetLite(1.1, 1.2, stages=7).stages[6][0].project[0].weight.shape[0] == 352
    )  # Lite2


def test_colors_of_parts_of_patches() -> None:
    pixels = torch.arange(3 * 8 * 8).view(1, 3, 8, 8).float()
    found = patch_colors(pixels, grid=2, cells=2)
    assert found.shape == (1, 4, 12)
    lower_right = pixels[0, :, 4:, 4:]
    assert torch.equal(found[0, 3], F.avg_pool2d(lower_right, 2).flatten())


@torch.no_grad()
def test_joined_features_are_standardized_and_projected() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder.from_config(
        {
            "model_type": "efficientnet_lite",
            "image_size": 32,
            "hidden_size": 20,
            "sources": [-1, 2, 5],
        }
    )
    assert isinstance(encoder, JoinedEncoder) and encoder.config.channels == [48, 24, 112]
    pixels = torch.randn(2, 3, 32, 32)
    joined = encoder.joined(pixels)
    assert joined.shape == (2, 16, 184)
    assert torch.equal(joined[..., :48], patch_colors(pixels, 4))
    encoder.mean.copy_(torch.randn(184))
    encoder.scale.copy_(torch.rand(184))
    encoder.basis.copy_(torch.randn(184, 20))
    expected = ((joined - encoder.mean) * encoder.scale) @ encoder.basis
    assert torch.allclose(encoder(pixels), expected)
    assert not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_files_and_configs(tmp_path: Path) -> None:
    encoder = JoinedEncoder(JoinedConfig(image_size=32, hidden_size=20, sources=(-1, 3)))
    save_weights(encoder, tmp_path)
    import json

    (tmp_path / "config.json").write_text(json.dumps(encoder.json_config()))
    loaded = VisionEncoder.from_pretrained(str(tmp_path))
    assert loaded.config == encoder.config
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    with pytest.raises(ConfigError, match="no entries"):
        JoinedConfig.from_dict({"model_type": "efficientnet_lite", "depth": 3})
    with pytest.raises(ConfigError, match="hidden_size"):
        JoinedConfig(sources=(-1,), hidden_size=49)


def test_the_recipe_renames_published_tensors_and_measures_constants() -> None:
    spec = importlib.util.spec_from_file_location("encoder_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    own = EfficientNetLite(classes=1000).state_dict()
    published = {f"published.{index}": value for index, value in enumerate(own.values())}
    renamed = recipe.converted(published)
    assert list(renamed) == list(own)
    with pytest.raises(ValueError, match="expected 296 tensors"):
        recipe.converted(dict(list(published.items())[1:]))
    encoder = JoinedEncoder(JoinedConfig(image_size=32, hidden_size=16, sources=(-1, 3)))
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    recipe.calibrate(encoder, images)
    features = encoder((images.float() / 255 - recipe.MEAN) / recipe.STD).flatten(0, 1)
    assert torch.allclose(features.mean(0), torch.zeros(16), atol=1e-3)
    covariance = torch.cov(features.T)
    assert torch.allclose(covariance, covariance.diagonal().diag(), atol=1e-3)
    assert bool((covariance.diagonal().diff() <= 1e-4).all())  # largest first
    assert float(covariance.trace()) == pytest.approx(16, rel=1e-3)
