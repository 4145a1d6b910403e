"""TokenizerConfig: JSON in and out, and every wrong entry refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lavit_tok import ConfigError, TokenizerConfig


def test_json_round_trip(tiny_config: TokenizerConfig, tmp_path: Path):
    for config in (
        tiny_config,
        TokenizerConfig(),
        TokenizerConfig.lavit(),
        TokenizerConfig.lavit(attention="compat"),
    ):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config.to_dict()))
        assert TokenizerConfig.from_json(path) == config
        assert TokenizerConfig.from_dict(config.to_dict()) == config


def test_sizes_follow_from_the_encoder():
    lavit = TokenizerConfig.lavit()
    assert (
        lavit.width,
        lavit.num_patches,
        lavit.mlp_width,
        lavit.codebook_size,
        lavit.code_dim,
    ) == (
        1408,
        256,
        6144,
        16384,
        32,
    )
    default = TokenizerConfig()
    assert (default.width, default.image_size, default.patch_size, default.num_patches) == (
        192,
        64,
        8,
        64,
    )


def test_a_config_cannot_be_changed(tiny_config: TokenizerConfig):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config.codebook_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", None),
        ("encoder", []),
        ("encoder", {"hidden_size": 32}),
        ("encoder_norm", "no"),
        ("codebook_size", 1),
        ("codebook_size", 16.0),
        ("codebook_size", True),
        ("codebook_size", "16"),
        ("code_dim", 0),
        ("merger_depth", -1),
        ("reconstructor_depth", -1),
        ("num_heads", 0),
        ("num_heads", 5),
        ("num_heads", 2.0),
        ("mlp_ratio", 0),
        ("mlp_ratio", "4"),
        ("mlp_ratio", float("nan")),
        ("mlp_ratio", float("inf")),
        ("mlp_ratio", None),
        ("layer_norm_eps", -1e-5),
        ("layer_norm_eps", "small"),
        ("attention", "loose"),
        ("attention", None),
        ("attention", ["strict"]),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_setting_is_named(
    tiny_config: TokenizerConfig, tmp_path: Path, name: str, value: Any
):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(tiny_config, **{name: value})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tiny_config.to_dict(), name: value}))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{name}"):
        TokenizerConfig.from_json(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", None, "encoder.hidden_size"),
        ("hidden_size", 34, "multiple of 4"),
        ("hidden_size", "32", "encoder.hidden_size"),
        ("image_size", 30, "multiple of patch_size"),
        ("image_size", [32, 64], "encoder.image_size"),
        ("image_size", -32, "encoder.image_size"),
        ("patch_size", 0, "encoder.patch_size"),
    ],
)
def test_a_wrong_size_of_the_encoder_is_named(
    tiny_config: TokenizerConfig, name: str, value: Any, message: str
):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny_config, encoder={**tiny_config.encoder, name: value})


def test_square_pairs_and_counted_patches_are_understood(tiny_config: TokenizerConfig):
    pair = dataclasses.replace(tiny_config, encoder={**tiny_config.encoder, "image_size": [32, 32]})
    assert pair.image_size == 32
    counted = {**tiny_config.encoder, "model_type": "siglip2_vision_model", "num_patches": 16}
    del counted["image_size"]
    assert dataclasses.replace(tiny_config, encoder=counted).image_size == 32


def test_unknown_settings_and_other_formats_are_refused(tiny_config: TokenizerConfig):
    values = tiny_config.to_dict()
    with pytest.raises(ConfigError, match=re.escape("unknown entries ['merger_dept', 'selector']")):
        TokenizerConfig.from_dict({**values, "merger_dept": 3, "selector": {}})
    with pytest.raises(ConfigError, match="version 1, got lavit_tok"):
        TokenizerConfig.from_dict({**values, "format_version": 2})
    with pytest.raises(ConfigError, match=r"got lavit_tok\.decoder"):
        TokenizerConfig.from_dict({**values, "format": "lavit_tok.decoder"})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 100_000, "\x00"])
def test_broken_json_names_the_file(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"config\.json: (cannot be read as JSON|expected a JSON object)"
    ):
        TokenizerConfig.from_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        TokenizerConfig.from_json(path)
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read as JSON"):
        TokenizerConfig.from_json(tmp_path / "absent.json")
