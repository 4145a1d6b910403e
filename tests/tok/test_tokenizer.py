"""VisualTokenizer against a per-image loop, itself in other batches, and bad input."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers.tensors import generator
from PIL import Image

from lavit_tok import (
    CodeError,
    ConfigError,
    ImageError,
    TokenizerConfig,
    VisualCodes,
    VisualImageProcessor,
    VisualTokenizer,
)
from lavit_tok.encode.allocation import ordered_noise


def crops(photos: list[Path], count: int = 12) -> list[Image.Image]:
    """Random crops of photographs."""
    rng = random.Random(0)
    found = []
    for i in range(count):
        photo = Image.open(photos[i % len(photos)]).convert("RGB")
        width, height = rng.randrange(30, photo.width), rng.randrange(30, photo.height)
        left, top = (
            rng.randrange(photo.width - width + 1),
            rng.randrange(photo.height - height + 1),
        )
        found.append(photo.crop((left, top, left + width, top + height)))
    return found


@pytest.mark.parametrize("attention", ["strict", "compat"])
def test_codes_equal_the_loop_over_images(
    tiny_tokenizer: VisualTokenizer, photos: list[Path], attention: Any
):
    tiny_tokenizer.merger.formula = attention
    images = crops(photos, 6)
    codes = tiny_tokenizer.encode(images)
    assert codes.to_list() == [reference.encode(tiny_tokenizer, image) for image in images]
    assert len(set(codes.lengths.tolist())) > 1 and int(codes.lengths.min()) >= 1


def test_encode_is_the_rooms_one_after_another(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    for options in ({}, {"budget": 3}, {"budget": 0.5}, {"sample": True}):
        rng = [{"generator": generator()} if "sample" in options else {} for _ in range(2)]
        with torch.no_grad():
            x = tiny_tokenizer.preprocess(photos)
            f = tiny_tokenizer.features(x)
            k = tiny_tokenizer.select(tiny_tokenizer.score(f), **options, **rng[0])  # type: ignore[arg-type]
            z = tiny_tokenizer.project(tiny_tokenizer.merge(f, k))
            by_hand = tiny_tokenizer.quantize(z, k.sum(1))
        codes = tiny_tokenizer.encode(photos, **options, **rng[1])  # type: ignore[arg-type]
        assert (x.shape, f.shape, k.shape) == ((4, 3, 32, 32), (4, 16, 32), (4, 16))
        assert z.shape == (int(k.sum()), 4)
        assert codes.to_list() == by_hand.to_list() and torch.equal(codes.lengths, by_hand.lengths)
        assert codes.keep is not None and torch.equal(codes.keep, k) and codes.codebook_size == 16
        assert codes.values.dtype == codes.lengths.dtype == torch.int64
        assert torch.equal(
            tiny_tokenizer.encode_pixels(x, **options, **_again(options)).values, codes.values
        )  # type: ignore[arg-type]


def _again(options: dict[str, Any]) -> dict[str, Any]:
    return {"generator": generator()} if "sample" in options else {}


def test_deterministic_and_sampled(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    first = tiny_tokenizer.encode(photos)
    torch.manual_seed(99)
    assert tiny_tokenizer.encode(photos).to_list() == first.to_list()
    tiny_tokenizer.train()
    assert tiny_tokenizer.encode(photos).to_list() == first.to_list()
    one, same, other = (
        tiny_tokenizer.encode(photos, sample=True, generator=generator(s)) for s in (1, 1, 2)
    )
    assert one.to_list() == same.to_list()
    assert one.keep is not None and other.keep is not None and not torch.equal(one.keep, other.keep)


def test_budgets(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    for budget in (1, 5, 16):
        assert tiny_tokenizer.encode(photos, budget=budget).lengths.tolist() == [budget] * 4
    shared = tiny_tokenizer.encode(photos, budget=0.25)
    assert int(shared.lengths.sum()) == 16 and int(shared.lengths.min()) >= 1
    assert len(set(shared.lengths.tolist())) > 1
    for bad in (0, -3, 1.5, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            tiny_tokenizer.encode(photos, budget=bad)


def test_inputs_of_every_kind_give_the_same_codes(
    tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    expected = tiny_tokenizer.encode(photos[0]).to_list()
    image = Image.open(photos[0]).convert("RGB")
    array = np.asarray(image)
    for same in (
        str(photos[0]),
        photos[0].read_bytes(),
        image,
        array,
        torch.from_numpy(array.copy()),
        [photos[0]],
    ):
        assert tiny_tokenizer.encode(same).to_list() == expected
    small = tiny_tokenizer.image_processor.to_uint8(photos)
    for batch in (small, list(small), small.numpy(), small.permute(0, 2, 3, 1).numpy()):
        assert tiny_tokenizer.encode(batch).to_list() == tiny_tokenizer.encode(photos).to_list()


def test_a_bad_picture_stops_the_batch_by_name(
    tiny_tokenizer: VisualTokenizer, photos: list[Path], tmp_path: Path
):
    bad = tmp_path / "broken.png"
    bad.write_bytes(photos[0].read_bytes()[:500])
    with pytest.raises(ImageError, match=r"broken\.png"):
        tiny_tokenizer.encode([photos[0], bad])
    with pytest.raises(ImageError, match="expected uint8"):
        tiny_tokenizer.encode(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="at least one image"):
        tiny_tokenizer.encode([])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_pixels(tiny_tokenizer: VisualTokenizer, bad: float):
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[1, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        tiny_tokenizer.encode_pixels(pixels)
    with pytest.raises(ValueError, match="empty batch"):
        tiny_tokenizer.encode_pixels(pixels[:0])
    with pytest.raises(ValueError, match=r"expected float \[batch 3 32 32\]"):
        tiny_tokenizer.features(torch.zeros(2, 3, 32, 40))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_pixels_of_another_type_or_shape(tiny_tokenizer: VisualTokenizer, shape: tuple[int, ...]):
    for pixels in (torch.zeros(shape), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(
            ValueError, match=r"expected float \[batch 3 32 32\] from preprocess\(\), got"
        ):
            tiny_tokenizer.features(pixels)


def test_features_with_nan_are_refused_by_every_room(tiny_tokenizer: VisualTokenizer):
    features = torch.randn(2, 16, 32, generator=generator())
    features[1, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tiny_tokenizer.select(tiny_tokenizer.score(features))
    keep = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="NaN"):
        tiny_tokenizer.quantize(
            tiny_tokenizer.project(tiny_tokenizer.merge(features, keep)), keep.sum(1)
        )


def test_codes_that_do_not_fit(tiny_tokenizer: VisualTokenizer):
    good = VisualCodes.from_list([[0, 15], [3]])
    assert tiny_tokenizer.reconstruct_features(good).shape == (2, 16, 32)
    assert torch.equal(
        tiny_tokenizer.lookup(good), tiny_tokenizer.quantizer.codebook.embeddings[[0, 15, 3]]
    )
    for codes, message in (
        (VisualCodes.from_list([[16]]), r"0\.\.15, got 16\.\.16"),
        (VisualCodes.from_list([[3]], 32), "a codebook of 32 entries, this one has 16"),
        (VisualCodes.from_list([]), "no images"),
        (VisualCodes.from_list([[1], []]), r"lengths 0\.\.1"),
        (VisualCodes.from_list([[1], [2] * 17]), r"lengths 1\.\.17"),
    ):
        with pytest.raises(CodeError, match=message):
            tiny_tokenizer.reconstruct_features(codes)


def test_reconstruct_equals_the_slow_version(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    codes = tiny_tokenizer.encode(photos)
    output = tiny_tokenizer.reconstruct_features(codes)
    assert output.shape == (4, 16, 32) and not output.requires_grad
    for one, own in zip(output, codes, strict=True):
        vectors = tiny_tokenizer.quantizer.codebook.embeddings[own]
        slow = reference.reconstruct(tiny_tokenizer.reconstructor, vectors)
        torch.testing.assert_close(one.double(), slow, rtol=0, atol=2e-5)


def test_save_and_load(tiny_tokenizer: VisualTokenizer, photos: list[Path], tmp_path: Path):
    expected = tiny_tokenizer.encode(photos)
    tiny_tokenizer.save_pretrained(tmp_path)
    files = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert {f.name for f in tmp_path.iterdir()} == files
    loaded = VisualTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tiny_tokenizer.config and not loaded.training
    assert loaded.encode(photos).to_list() == expected.to_list()
    assert torch.equal(
        loaded.reconstruct_features(expected), tiny_tokenizer.reconstruct_features(expected)
    )
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in tiny_tokenizer.state_dict().items())


def test_save_and_load_in_half_the_bytes(
    tiny_tokenizer: VisualTokenizer, photos: list[Path], tmp_path: Path
):
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    one, two = (VisualTokenizer.from_pretrained(tmp_path / "half") for _ in range(2))
    assert (
        one.dtype == torch.float32 and one.encode(photos).to_list() == two.encode(photos).to_list()
    )
    for name, value in tiny_tokenizer.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(one.state_dict()[name], expected), name
    tiny_tokenizer.save_pretrained(
        tmp_path / "again"
    )  # the type of one save does not stick to the next
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == sizes[1]


def test_bfloat16_keeps_decisions_in_float32(
    tiny_tokenizer: VisualTokenizer, photos: list[Path], tmp_path: Path
):
    before = {k: v.clone() for k, v in tiny_tokenizer.state_dict().items()}
    tiny_tokenizer.to(torch.bfloat16)
    assert tiny_tokenizer.dtype == torch.bfloat16
    for name, value in tiny_tokenizer.state_dict().items():
        pinned = name.startswith(("selector.", "quantizer.codebook."))
        assert value.dtype == (torch.float32 if pinned else torch.bfloat16), name
        assert not pinned or torch.equal(value, before[name])
    codes = tiny_tokenizer.encode(photos)
    assert (
        codes.to_list() == tiny_tokenizer.encode(photos).to_list() and int(codes.lengths.min()) >= 1
    )
    assert tiny_tokenizer.preprocess(photos).dtype == torch.bfloat16
    assert tiny_tokenizer.reconstruct_features(codes).dtype == torch.bfloat16
    tiny_tokenizer.float().save_pretrained(tmp_path)
    loaded = VisualTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.encode(photos).to_list() == codes.to_list()
    assert loaded.selector.judge[0].weight.dtype == torch.float32


def test_frozen_encoder_and_gradients(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    """Everything but encoder and codebook gets gradients through the separate stages."""
    t = tiny_tokenizer.train()
    features = t.features(t.preprocess(photos))
    log_probs = t.score(features)
    keep = t.select(log_probs)
    z = t.project(t.merge(features, keep))
    (z.square().mean() + z[:, 0].mean() + log_probs.mean()).backward()
    silent = {n.split(".")[0] for n, p in t.named_parameters() if p.grad is None}
    assert silent == {"encoder", "reconstructor"}
    assert not t.quantizer.codebook.embeddings.requires_grad


def test_copies_are_independent(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    expected = tiny_tokenizer.encode(photos).to_list()
    twin = copy.deepcopy(tiny_tokenizer)
    assert twin.encode(photos).to_list() == expected
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert tiny_tokenizer.encode(photos).to_list() == expected


def test_other_settings_work_end_to_end(tiny_config: TokenizerConfig, photos: list[Path]):
    for change in (
        {"merger_depth": 0},
        {"encoder_norm": True},
        {"attention": "compat"},
    ):
        config = dataclasses.replace(tiny_config, **change)  # type: ignore[arg-type]
        tokenizer = VisualTokenizer(config)
        codes = tokenizer.encode(photos, budget=5)
        assert (
            codes.lengths.tolist() == [5] * 4
            and tokenizer.reconstruct_features(codes).isfinite().all()
        )


def test_sharing_on_the_hub():
    """huggingface_hub's methods exist; test_save_and_load reads what they write."""
    parameters = inspect.signature(VisualTokenizer.push_to_hub).parameters
    assert {"repo_id", "commit_message", "private", "token", "branch"} <= set(parameters)
    assert {"save_directory", "dtype"} <= set(
        inspect.signature(VisualTokenizer.save_pretrained).parameters
    )


def test_the_image_processor_is_saved_and_used(
    tiny_config: TokenizerConfig, photos: list[Path], tmp_path: Path
):
    processor = VisualImageProcessor(32, "pad", [0.5] * 3, [0.5] * 3, [0, 0, 0])
    VisualTokenizer(tiny_config, image_processor=processor).save_pretrained(tmp_path)
    assert VisualImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    loaded = VisualTokenizer.from_pretrained(tmp_path)
    expected = processor(photos, return_tensors="pt").pixel_values
    assert torch.equal(loaded.preprocess(photos), expected)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: cannot be read"):
        VisualTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected size 32, the encoder's image_size, got 64"):
        VisualTokenizer(tiny_config, image_processor=VisualImageProcessor(64))


def test_fingerprint_names_the_codebook(tiny_tokenizer: VisualTokenizer, tmp_path: Path):
    first = tiny_tokenizer.fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0
    tiny_tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
    assert VisualTokenizer.from_pretrained(tmp_path).fingerprint() == first
    tiny_tokenizer.quantizer.codebook.embeddings[0, 0] += 0.01
    assert tiny_tokenizer.fingerprint() != first


@pytest.mark.parametrize("ambient", ["autocast", "bfloat16", "float64", "inference"])
def test_codes_do_not_depend_on_the_ambient_precision(
    ambient: str, photos: list[Path], tiny_tokenizer: VisualTokenizer, tmp_path: Path
) -> None:
    """Under autocast one image in eight got other codes, under a bfloat16 default nearly half."""
    tiny_tokenizer.save_pretrained(tmp_path)
    images = crops(photos, 24)
    expected = tiny_tokenizer.encode(images)
    features = tiny_tokenizer.reconstruct_features(expected)
    sampled = tiny_tokenizer.encode(images, sample=True, generator=generator())
    ordered_noise.cache_clear()  # computed anew, under the surrounding default dtype
    try:
        with contextlib.ExitStack() as stack:
            if ambient == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            elif ambient == "inference":
                stack.enter_context(torch.inference_mode())
            else:
                torch.set_default_dtype(getattr(torch, ambient))
            for tokenizer in (tiny_tokenizer, VisualTokenizer.from_pretrained(tmp_path)):
                codes = tokenizer.encode(images)
                assert codes.to_list() == expected.to_list()
                assert torch.equal(tokenizer.reconstruct_features(codes), features)
                again = tokenizer.encode(images, sample=True, generator=generator())
                assert again.to_list() == sampled.to_list()
    finally:
        torch.set_default_dtype(torch.float32)
        ordered_noise.cache_clear()


def test_a_budget_above_the_number_of_patches_warns_once(
    photos: list[Path], tiny_tokenizer: VisualTokenizer
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for budget in (16, 97, 97):
            codes = tiny_tokenizer.encode(photos, budget=budget)
            assert codes.lengths.tolist() == [16] * len(photos)
    (warning,) = caught
    assert "at most 16 codes per image, one for each patch, got 97" in str(warning.message)


def test_a_number_is_no_image(tiny_tokenizer: VisualTokenizer, unchecked: None) -> None:
    with pytest.raises(ImageError, match=r"expected a PIL image, path, bytes or uint8 .*got int"):
        tiny_tokenizer.encode(3)
