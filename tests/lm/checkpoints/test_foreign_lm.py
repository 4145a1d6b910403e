"""Directories of language models from anywhere: no code runs, and what is wrong is named."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import edit, rewrite
from helpers.lm_parts import processor_and_model

from lavit_lm import MultimodalLM
from lavit_lm.cli import main
from lavit_lm.models.loading import load_lm
from lavit_lm.objectives.lavit import LaVIT
from lavit_tok import PixelDecoder, VisualTokenizer, WeightsError

EVIL = "import pathlib\npathlib.Path(__file__).with_name('it-ran').touch()\nclass Evil: pass\n"


@pytest.fixture
def lm(tiny_tokenizer: VisualTokenizer) -> MultimodalLM:
    processor, model = processor_and_model("llama")
    return MultimodalLM(model, processor, tiny_tokenizer, None, LaVIT(continuous=False))


@pytest.fixture
def directory(lm: MultimodalLM, tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    lm.save_pretrained(tmp_path / "lm", str(tmp_path / "visual"))
    return tmp_path / "lm"


def refused(directory: Path, photos: list[Path], capsys: Any, *parts: str) -> None:
    """The command line ends with one line and code 2 in 10 s; no code of it has run."""
    capsys.readouterr()  # progress bars of saving
    reports = logging.StreamHandler(sys.stderr)  # that of transformers is for the real stderr
    logging.getLogger("transformers").addHandler(reports)
    start = time.monotonic()
    try:
        assert main(["caption", str(photos[0]), "--model", str(directory)]) == 2
    finally:
        logging.getLogger("transformers").removeHandler(reports)
    assert time.monotonic() - start < 10
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in parts), err
    assert not (directory / "it-ran").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("entry", ["auto_map", "custom_generate"])
def test_code_is_refused_by_name(
    directory: Path,
    photos: list[Path],
    capsys: Any,
    monkeypatch: Any,
    file: str,
    entry: str,
    unchecked: None,
):
    (directory / "evil.py").write_text(EVIL)
    value = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    more = {"model_type": "evil"} if file == "config.json" else {"tokenizer_class": "Evil"}
    edit(directory / file, **{entry: value}, **more)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    refused(directory, photos, capsys, file, entry)
    assert sys.stdin.tell() == 0  # nothing was asked
    with pytest.raises(ValueError, match=entry):
        load_lm(str(directory), None, 0, False, 0)  # type: ignore[arg-type]


def test_code_in_another_config_file(directory: Path, photos: list[Path], capsys: Any):
    """Transformers reads config.5.0.0.json instead, if config.json lists it."""
    (directory / "config.5.0.0.json").write_text('{"auto_map": {"AutoConfig": "evil.Evil"}}')
    refused(directory, photos, capsys, "config.5.0.0.json", "auto_map")


def test_folder_of_code_and_other_models(directory: Path, photos: list[Path], capsys: Any):
    (directory / "custom_generate").mkdir()
    refused(directory, photos, capsys, "custom_generate")
    (directory / "custom_generate").rmdir()
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/evil"}')
    refused(directory, photos, capsys, "adapter_config.json")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["evil/kernel", {"": "evil/kernel"}])
def test_kernel_of_the_hub(directory: Path, photos: list[Path], capsys: Any, name: str, value: Any):
    edit(directory / "config.json", **{name: value})
    refused(directory, photos, capsys, "attn_implementation", "evil/kernel")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    directory: Path, photos: list[Path], capsys: Any, value: float
):
    name = "model.norm.weight"
    rewrite(directory / "model.safetensors", lambda tensors: tensors[name].fill_(value))
    refused(directory, photos, capsys, "NaN or infinity", name)


def test_tensors_of_another_config_are_listed(directory: Path, photos: list[Path], capsys: Any):
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    edit(directory / "config.json", vocab_size=5)
    refused(directory, photos, capsys, "embed_tokens.weight: expected [5, ", f"got [{rows}, ")
    edit(directory / "config.json", vocab_size=rows, model_type="gpt2")
    refused(directory, photos, capsys, "missing_keys", "unexpected_keys")


def test_a_text_tokenizer_of_100_megabytes(directory: Path, photos: list[Path], capsys: Any):
    """Reading it would take 600 megabytes of memory, and half a gigabyte takes three."""
    os.truncate(directory / "tokenizer.json", 100 << 20)
    refused(directory, photos, capsys, "tokenizer.json: expected at most 67108864 bytes")


def test_weights_stored_as_integers(directory: Path, photos: list[Path], capsys: Any):
    name = "model.embed_tokens.weight"
    rewrite(directory / "model.safetensors", lambda x: x.update({name: x[name].int()}))
    refused(directory, photos, capsys, name, "expected floating-point numbers, got I32")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 1e300),
        ("attention_dropout", 2),
        ("num_hidden_layers", 10**7),
        ("vocab_size", 10**7),
        ("vocab_size", 10**10),
        ("intermediate_size", 10**7),
        ("num_attention_heads", 7),
        ("num_attention_heads", 10**7),
        ("hidden_size", 5),
        ("hidden_size", "x"),
        ("num_hidden_layers", None),
    ],
)
def test_numbers_of_the_config(
    directory: Path, photos: list[Path], capsys: Any, entry: str, value: Any
):
    edit(directory / "config.json", **{entry: value})
    refused(directory, photos, capsys, "config")


@pytest.mark.parametrize(
    "change",
    [
        {"objective": None},
        {"objective": {"name": "lavit", "image_weight": float("nan")}},
        {"objective": {"name": "emu", "depth": 10**7}},
        {"visual_tokenizer": 5},
        {"codebook_size": 15},
        {"codebook_size": 10**10},
        {"codebook_size": "16"},
        {"fingerprint": None},
    ],
)
def test_damaged_lavit_lm_json(directory: Path, photos: list[Path], capsys: Any, change: Any):
    edit(directory / "lavit_lm.json", **change)
    refused(directory, photos, capsys, str(directory) if "visual_tokenizer" not in change else "5")


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_tokenizer(directory: Path, photos: list[Path], capsys: Any, keep: float):
    path = directory / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refused(directory, photos, capsys, str(directory))


def test_tokenizer_without_its_last_code(directory: Path, photos: list[Path], capsys: Any):
    path = directory / "tokenizer.json"
    edit(path, added_tokens=json.loads(path.read_text())["added_tokens"][:-1])
    refused(directory, photos, capsys, "expected 16", "got 15")


def test_pickle_and_pipe(directory: Path, photos: list[Path], capsys: Any):
    path = directory / "model.safetensors"
    path.write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    refused(directory, photos, capsys, "safetensors")
    path.unlink()

    os.mkfifo(path)
    refused(directory, photos, capsys, "regular file")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("merger_depth", 10**7),
        ("codebook_size", 10**10),
        ("codebook_size", 10**8),
        ("layer_norm_eps", float("nan")),
    ],
)
def test_sizes_of_a_tokenizer(directory: Path, name: str, value: Any):
    edit(directory.parent / "visual/config.json", **{name: value})
    with pytest.raises(WeightsError, match=f"{name}|do not fit"):
        VisualTokenizer.from_pretrained(directory.parent / "visual")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("unet", "layers_per_block", 10**6),
        ("unet", "norm_eps", -1),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", float("inf")),
        ("conditioner", "depth", 10**7),
        ("conditioner", "codebook_size", 10**10),
        ("scheduler", "num_train_timesteps", 10**9),
        ("scheduler", "prediction_type", "evil"),
        ("scheduler", "beta_start", float("nan")),
        ("scheduler", "beta_end", 2),
    ],
)
def test_sizes_of_a_decoder(tiny_decoder: Any, tmp_path: Path, file: str, name: str, value: Any):
    tiny_decoder.save_pretrained(tmp_path)
    config = "scheduler_config.json" if file == "scheduler" else "config.json"
    edit(tmp_path / file / config, **{name: value})
    with pytest.raises(WeightsError, match=name):
        PixelDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", float("nan")),
        ("guidance_scale", 1e30),
        ("temperature", float("inf")),
        ("temperature", 1e-300),
        ("temperature", -1),
        ("top_p", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("top_k", 1.5),
    ],
)
def test_arguments_of_sampling(lm: MultimodalLM, unchecked: None, name: str, value: Any):
    with pytest.raises(ValueError, match=rf"{name}: expected .*\.\."):
        lm.generate_codes("rain", **{name: value})


@pytest.mark.parametrize("num_beams", [0, 513, 10_000, 2.0])
def test_number_of_beams(lm: MultimodalLM, photos: list[Path], unchecked: None, num_beams: Any):
    with pytest.raises(ValueError, match=r"num_beams: expected an integer in 1\.\.512"):
        lm.caption(photos[0], 4, num_beams=num_beams)


def test_objectives_with_nan():
    with pytest.raises(ValueError, match="image_weight"):
        LaVIT(image_weight=float("nan"))


def test_batches_of_images(lm: MultimodalLM, photos: list[Path], unchecked: None):
    """Each image has one result, whatever VisualTokenizer.encode accepts as a batch."""
    expected = lm.caption(photos[:3], 4)
    assert len(expected) == 3 and lm.caption(photos[0], 4) == expected[0]
    assert lm.caption(tuple(photos[:3]), 4) == expected
    assert lm.caption((p for p in photos[:3]), 4) == expected
    pixels = lm.visual_tokenizer.image_processor.to_uint8(photos[:3])
    assert lm.caption(pixels, 4) == lm.caption(pixels.permute(0, 2, 3, 1).numpy(), 4) == expected
    answers = lm.answer(pixels, "What?", max_new_tokens=4)
    assert answers == [lm.answer(p, "What?", max_new_tokens=4) for p in photos[:3]]
    assert len(lm.rank("a", pixels)) == 3
    for wrong in (set(photos[:2]), [photos[:2]], [pixels], {"a": photos[0]}):
        with pytest.raises(ValueError, match="expected"):
            lm.caption(wrong, 4)
        with pytest.raises(ValueError, match="expected"):
            lm.rank("a", wrong)
    for prompt in (pixels, photos[0], (p for p in photos), {photos[0]}, [pixels], [photos[:2]]):
        with pytest.raises(ValueError, match="expected"):
            lm.generate_codes(prompt)


def test_a_text_is_no_batch(lm: MultimodalLM, photos: list[Path], unchecked: None):
    with pytest.raises(ValueError, match="list of prompts"):
        lm.generate_codes_batch("ab")
    with pytest.raises(ValueError, match="list of prompts"):
        lm.generate_text_batch("ab")
    with pytest.raises(ValueError, match="list of candidates"):
        lm.rank([photos[0]], "abc")
