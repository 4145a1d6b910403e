"""Any vision transformer, frozen, read before its final norm."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lavit_tok import ConfigError, TokenizerConfig, VisualTokenizer
from lavit_tok.encode.vision_encoder import ENCODERS, VisionEncoder

WIDTH, PATCHES = 16, 16


def tiny(kind: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
    }
    config |= {"num_patches": PATCHES} if kind.startswith("siglip2") else {"image_size": 16}
    if not kind.startswith("dinov2"):
        config["intermediate_size"] = 32
    return {**config, **changes}


def made(config: dict[str, Any], norm: bool = False) -> VisionEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = VisionEncoder.from_config(config, norm)
        for parameter in encoder.parameters():  # BLIP-2's initial weights are 1e-10
            parameter.data.normal_(std=0.3)
    return encoder


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_type_gives_one_feature_a_patch(kind: str):
    encoder = made(tiny(kind))
    features = encoder(noise())
    assert (
        features.shape == (2, PATCHES, WIDTH)
        and features.isfinite().all()
        and not features.requires_grad
    )
    assert torch.equal(features, encoder(noise()))
    torch.testing.assert_close(encoder(noise()[1:]), features[1:], rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_threads_get_the_features_of_their_own_images():
    """Both are in the last block at a time, and neither returns before the other has left it."""
    encoder = made(tiny("clip_vision_model"))
    batches = noise(4).split(2)
    expected = [encoder(batch) for batch in batches]
    before, after = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    encoder._last_block[0].register_forward_pre_hook(lambda *_: [before.wait(), None][1])
    encoder.model.register_forward_hook(lambda *_: [after.wait(), None][1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(encoder, batches))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_config_survives_json(kind: str):
    encoder = made(tiny(kind))
    again = VisionEncoder.from_config(encoder.json_config())
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(noise()), encoder(noise()))
    assert again.json_config() == encoder.json_config()
    config = TokenizerConfig(encoder=encoder.json_config(), num_heads=2)
    assert (config.width, config.num_patches, config.image_size) == (WIDTH, PATCHES, 16)
    assert VisualTokenizer(config).features(noise()).shape == (2, PATCHES, WIDTH)


@pytest.mark.parametrize(
    ("kind", "special"),
    [
        ("clip_vision_model", 1),
        ("dinov2", 1),
        ("dinov2_with_registers", 1 + 4),
        ("dinov3_vit", 1 + 3),
        ("siglip_vision_model", 0),
        ("blip_2_vision_model", 1),
        ("vit", 1),
    ],
)
def test_features_are_the_stream_before_the_final_norm(kind: str, special: int):
    """transformers' own hidden states, without class and register tokens."""
    encoder = made(tiny(kind, **({"num_register_tokens": 3} if kind == "dinov3_vit" else {})))
    with torch.no_grad():
        output = encoder.model(pixel_values=noise(), output_hidden_states=True)
    if (
        not output.hidden_states
    ):  # a record that this class does not keep: its last_hidden_state is after the norm
        pytest.fail(f"{kind} gives no hidden states")
    stream = output.hidden_states[-1]
    assert stream.shape[1] == PATCHES + special
    assert torch.equal(encoder(noise()), stream[:, special:])


def test_features_are_what_the_blocks_alone_give():
    """The way of the LaVIT release, a step at a time: embeddings, every block, no norm."""
    encoder = made(tiny("blip_2_vision_model"))
    with torch.no_grad():
        x = encoder.model.encoder(inputs_embeds=encoder.model.embeddings(noise())).last_hidden_state
    assert torch.equal(encoder(noise()), x[:, 1:])


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_final_norm_on_request(kind: str):
    plain, normed = made(tiny(kind)), made(tiny(kind), norm=True)
    with torch.no_grad():
        after = normed.model(**normed._inputs(noise())).last_hidden_state[:, -PATCHES:]
    if (
        kind == "clip_vision_model"
    ):  # its last_hidden_state is before the norm; the pooled class token is after it
        inner = getattr(plain.model, "vision_model", plain.model)
        assert torch.equal(plain(noise()), after)
        after = inner.post_layernorm(after)
    assert torch.equal(normed(noise()), after)
    assert (normed(noise()) - plain(noise())).abs().max() > 1e-3


def test_one_block_is_enough_to_be_found():
    for kind in ENCODERS:
        assert made(tiny(kind, num_hidden_layers=1))(noise()).shape == (2, PATCHES, WIDTH)


def test_frozen_for_good(tiny_tokenizer: VisualTokenizer):
    encoder = tiny_tokenizer.encoder
    tiny_tokenizer.train()
    assert tiny_tokenizer.merger.training
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not encoder(pixels).requires_grad


def test_dropout_of_a_config_never_drops():
    encoder = made(tiny("vit", hidden_dropout_prob=0.9, attention_probs_dropout_prob=0.9)).train()
    assert torch.equal(encoder(noise()), encoder(noise()))


def test_a_copy_reads_its_own_blocks():
    encoder = made(tiny("clip_vision_model"))
    before = encoder(noise())
    twin = copy.deepcopy(encoder)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin(noise()).abs().max() == 0
    assert torch.equal(encoder(noise()), before)
    names = list(encoder.state_dict())
    assert len(names) == len(set(names)) and not any("_last_block" in name for name in names)


def test_hooks_are_removed_even_after_an_error():
    encoder = made(tiny("clip_vision_model"))
    with pytest.raises(ValueError, match="size"):
        encoder(torch.zeros(1, 3, 20, 20))
    assert not encoder._last_block[0]._forward_hooks
    encoder(noise())
    assert not encoder._last_block[0]._forward_hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "expected one of .*got 'llama'"),
        ({"model_type": None}, "got None"),
        ({"model_type": ["vit"]}, "expected one of"),
        ({"hiden_layers": 3}, r"no config entries \['hiden_layers'\]"),
        # These two would make transformers fetch and run code from the Hub.
        ({"attn_implementation": "someone/kernel"}, r"no config entries \['attn_implementation'\]"),
        (
            {"_attn_implementation": "someone/kernel"},
            r"no config entries \['_attn_implementation'\]",
        ),
        ({"auto_map": {"AutoModel": "code.Model"}}, r"no config entries \['auto_map'\]"),
        ({"num_hidden_layers": "2"}, "cannot build"),
        ({"num_attention_heads": 0}, "cannot build"),
        ({"num_attention_heads": 3}, "cannot build"),
        ({"hidden_act": "import os"}, "cannot build"),
    ],
)
def test_a_config_that_names_anything_else_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        VisionEncoder.from_config({**tiny("clip_vision_model"), **changes})


def test_an_encoder_of_another_width_is_refused(tiny_config: TokenizerConfig):
    with pytest.raises(ConfigError, match="expected features of width 32, got 16"):
        VisualTokenizer(tiny_config, encoder=made(tiny("vit")))


@pytest.mark.parametrize("kind", ENCODERS)
def test_from_a_local_directory(kind: str, tmp_path: Path):
    encoder = made(tiny(kind))
    encoder.model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = VisionEncoder.from_pretrained(str(tmp_path))
    assert torch.equal(loaded(noise()), encoder(noise()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.json_config() == encoder.json_config()


def test_the_vision_tower_of_a_whole_model(tmp_path: Path):
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    vision = {k: v for k, v in tiny("clip_vision_model").items() if k != "model_type"}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision)
    ).eval()
    whole.save_pretrained(tmp_path)
    loaded = VisionEncoder.from_pretrained(str(tmp_path))
    with torch.no_grad():
        hidden = whole.vision_model(noise(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(loaded(noise()), hidden[-1][:, 1:], rtol=0, atol=1e-6)


def test_a_directory_of_another_model_or_without_safetensors(tmp_path: Path):
    transformers.BertConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"expected a model of type .* got 'bert'"):
        VisionEncoder.from_pretrained(str(tmp_path / "bert"))
    encoder = made(tiny("clip_vision_model"))
    encoder.model.config.save_pretrained(tmp_path / "pickled")
    torch.save(encoder.model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        VisionEncoder.from_pretrained(str(tmp_path / "pickled"))


def test_numbers_that_are_none_are_refused(tmp_path: Path):
    encoder = made(tiny("clip_vision_model"))
    with torch.no_grad():
        next(encoder.model.parameters()).view(-1)[0] = torch.nan
    encoder.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity"):
        VisionEncoder.from_pretrained(str(tmp_path))
