"""The command line, in process, with a tiny tokenizer and decoder on real photographs."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from lavit_tok import DecodeBatch, TokenizerConfig, VisualTokenizer
from lavit_tok.cli.parser import COMMANDS, main, quality
from lavit_tok.data.code_files import (
    CodeFileError,
    CodeFileHeader,
    CodeRecord,
    code_writer,
    read_codes,
)

HEADER = CodeFileHeader("t", 16, 16)
NOT_UTF8 = os.fsdecode(b"a\xff\xc3(.png")


@pytest.fixture
def weights(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, tmp_path: Path) -> Path:
    """Folders `tokenizer` and `decoder`."""
    tiny_tokenizer.save_pretrained(tmp_path / "weights/tokenizer")
    tiny_decoder.save_pretrained(tmp_path / "weights/decoder")
    return tmp_path / "weights"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG but not really")
    return path


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(weights: Path, capsys: Any) -> Callable[..., Any]:
    """Runs a command with the tiny models; its output, after a look at the exit code."""
    tokenizer, decoder = ["--tokenizer", weights / "tokenizer"], ["--decoder", weights / "decoder"]
    options: dict[str, list[Any]] = {"encode": tokenizer, "decode": [*decoder, "--steps", 1]}
    options["reconstruct"] = [*tokenizer, *options["decode"]]

    def call(command: str, *parts: Any, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([str(part) for part in [command, *options.get(command, []), *parts]]) == code
        return capsys.readouterr()

    return call


def code_file(path: Path, codes: dict[str, list[int]], header: CodeFileHeader = HEADER) -> Path:
    """A file of these codes; returns its path."""
    with code_writer(path, header) as writer:
        writer.add([CodeRecord(key, one) for key, one in codes.items()])
    return path


def test_encode_to_stdout(weights: Path, photos: list[Path], run: Any) -> None:
    header, *records = json_lines(run("encode", *photos, "--batch-size", 3).out)
    tokenizer = VisualTokenizer.from_pretrained(weights / "tokenizer")
    assert header == {
        "format": "lavit_tok.codes",
        "version": 1,
        "tokenizer": str(weights / "tokenizer"),
        "codebook_size": 16,
        "patches": 16,
        "fingerprint": tokenizer.fingerprint(),
    }
    codes = tokenizer.encode(photos)
    assert codes.keep is not None
    assert [record["key"] for record in records] == list(map(str, photos))
    assert [record["codes"] for record in records] == codes.to_list()
    assert [record["length"] for record in records] == codes.lengths.tolist()
    kept = [mask.nonzero().flatten().tolist() for mask in codes.keep]
    assert [record["keep"] for record in records] == kept


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_encode_folder_then_decode(
    weights: Path, photos: list[Path], broken: Path, tmp_path: Path, suffix: str, run: Any
) -> None:
    folder, out = tmp_path / "in", tmp_path / f"new/codes{suffix}"
    (folder / "deeper").mkdir(parents=True)
    for i, photo in enumerate(photos):
        with Image.open(photo) as image:
            image.resize((40, 30)).save(folder / ("deeper" if i % 2 else "") / photo.name)
    (folder / "broken.png").write_bytes(broken.read_bytes())
    message = run("encode", folder, "--out", out, "--batch-size", 2).err
    rejects = Path(f"{out}.rejects.jsonl")
    assert "encoded 4 of 5 images" in message and f"1 skipped, listed in {rejects}" in message
    (reject,) = json_lines(rejects.read_text())
    assert reject["key"] == str(folder / "broken.png") and "not an image" in reject["reason"]
    names = [out.name, rejects.name]
    assert sorted(p.name for p in out.parent.iterdir()) == names, "no partial file is left behind"

    header, records = read_codes(out)
    good = list(records)
    fingerprint = VisualTokenizer.from_pretrained(weights / "tokenizer").fingerprint()
    assert header == CodeFileHeader(str(weights / "tokenizer"), 16, 16, fingerprint)
    assert {Path(record.key).name for record in good} == {photo.name for photo in photos}
    if suffix == ".parquet":
        assert pq.read_table(out).column_names == ["key", "codes", "length", "keep"]

    def decoded(*more: Any) -> list[np.ndarray]:
        where = tmp_path / "-".join(map(str, more))
        run("decode", out, "--steps", 2, *more, "--out", where)
        paths = sorted(where.iterdir())
        stems = [Path(record.key).stem for record in good]
        assert [p.name for p in paths] == [f"{i:06d}-{stem}.png" for i, stem in enumerate(stems)]
        return [np.asarray(Image.open(path)).astype(int) for path in paths]

    together, alone = decoded("--seed", 5), decoded("--seed", 5, "--batch-size", 1)
    for image, single, other in zip(together, alone, decoded("--seed", 6), strict=True):
        assert image.shape == (16, 16, 3)
        assert np.abs(image - single).max() <= 1 < np.abs(image - other).max()


def test_budget_and_sampling(photos: list[Path], run: Any) -> None:
    def lengths(*more: Any) -> list[int]:
        return [record["length"] for record in json_lines(run("encode", *photos, *more).out)[1:]]

    assert lengths("--budget", 5) == [5] * 4
    assert sum(lengths("--budget", 0.25)) == 16
    sampled = [lengths("--sample", "--seed", seed) for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1]
    assert len({tuple(s) for s in sampled}) > 1


def test_list_on_stdin(photos: list[Path], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos[1]}\n\n{photos[2]}\n"))
    records = json_lines(run("encode", photos[0], "-").out)[1:]
    assert [record["key"] for record in records] == list(map(str, photos[:3]))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--quality 0.5", ["no head that predicts the error of kind 'cosine'", "verify=True"]),
        ("--rate 0.01", ["no head that predicts the error of kind 'cosine'", "verify=True"]),
        ("--quality 20dB --budget 4", ["expected one of budget, quality and rate"]),
        ("--quality 0.999 --verify", ["quality: image 0 reached a centered cosine of"]),
    ],
)
def test_encode_passes_quality_and_rate(
    line: str, expected: list[str], photos: list[Path], run: Any
) -> None:
    """The shipped kind of tokenizer has no error head: the message offers verify and budgets."""
    error = run("encode", photos[0], *line.split(), code=2).err
    assert all(text in error for text in expected) and error.count("\n") == 1


def test_quality_as_text() -> None:
    assert quality("0.85") == 0.85
    assert quality("20dB") == quality("20.0db") == ("psnr", 20.0)


def test_a_single_bad_image_is_one_line(broken: Path, tmp_path: Path, run: Any) -> None:
    for command in (["encode"], ["reconstruct", "--out", tmp_path / "out"]):
        captured = run(*command, broken, code=2)
        expected = f"lavit-tok: error: {broken}: not an image in a format that Pillow supports\n"
        assert (captured.out, captured.err) == ("", expected)


def test_only_bad_images(broken: Path, tmp_path: Path, run: Any) -> None:
    out, missing = tmp_path / "codes.parquet", tmp_path / "missing.png"
    message = run("encode", broken, missing, "--out", out, code=1).err
    assert f"none of 2 could be used; the first is {broken}" in message and not out.exists()
    rejects = json_lines(Path(f"{out}.rejects.jsonl").read_text())
    assert [record["key"] for record in rejects] == [str(broken), str(missing)]


def test_rejects_without_a_file_go_to_stderr(broken: Path, photos: list[Path], run: Any) -> None:
    captured = run("encode", broken, photos[0])
    assert len(json_lines(captured.out)) == 2
    assert f"skipped {broken}: not an image" in captured.err
    assert "encoded 1 of 2 images" in captured.err


def test_bad_rows_are_skipped_and_listed(tmp_path: Path, run: Any) -> None:
    codes = {"good": [1, 2, 3], "large": [16], "empty": [], "long": [1] * 17}
    path, out = code_file(tmp_path / "codes.jsonl", codes), tmp_path / "out"
    with open(path, "a") as file:
        file.write('{"key": "text", "codes": ["1"]}\nnot json\n')
        file.write('{"key": "short", "codes": [1], "length": 2}\n')
        file.write('{"key": "../../up/../good", "codes": [15]}\n')
    message = run("decode", path, "--out", out).err
    assert "decoded 2 of 8 records" in message
    assert f"6 skipped, listed in {out / 'rejects.jsonl'}" in message
    names = ["000000-good.png", "000007-good.png", "rejects.jsonl"]
    assert sorted(p.name for p in out.iterdir()) == names
    rejects = json_lines((out / "rejects.jsonl").read_text())
    assert {record["key"]: record["reason"] for record in rejects} == {
        "large": "expected codes in 0..15, got 16..16",
        "empty": "expected 1..16 codes, got 0",
        "long": "expected 1..16 codes, got 17",
        "text": "codes: expected a list of integers",
        "line 7": "not a JSON object",
        "short": "length is 2, but there are 1 codes",
    }


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (CodeFileHeader("t", 1024, 16), ["codebook of 16 entries, as the decoder has, got 1024"]),
        (CodeFileHeader("other", 16, 16, "0123456789abcdef"), ["0123456789abcdef (tokenizer 'o"]),
        (CodeFileHeader("other", 16, 16), []),  # of an older version: not compared
    ],
)
def test_codes_of_another_codebook(
    header: CodeFileHeader, expected: list[str], weights: Path, tmp_path: Path, run: Any
) -> None:
    path = code_file(tmp_path / "codes.parquet", {"a": [1, 2, 3]}, header)
    message = run("decode", path, "--out", tmp_path / "out", code=2 if expected else 0).err
    if header.fingerprint:
        expected = [*expected, VisualTokenizer.from_pretrained(weights / "tokenizer").fingerprint()]
    if expected:
        assert all(text in message for text in [str(path), *expected])
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b'{"format": "other", "version": 1}\n', b"\xff\x00"]
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_files_that_hold_no_codes(content: bytes, suffix: str, tmp_path: Path, run: Any) -> None:
    path = tmp_path / f"codes{suffix}"
    path.write_bytes(content)
    message = run("decode", path, "--out", tmp_path, code=2).err
    assert str(path) in message and message.count("\n") == 1


def test_parquet_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavit_tok.data.code_files.ROW_GROUP", 300)
    path, header = tmp_path / "codes.parquet", CodeFileHeader("owner/name", 16384, 256)
    kept = [None if i % 3 else [0, i % 7] for i in range(1500)]
    records = [CodeRecord(f"image {i}", list(range(i % 5)), kept[i]) for i in range(1500)]
    with code_writer(path, header) as writer:
        for start in range(0, len(records), 200):
            writer.add(records[start : start + 200])
    found, read = read_codes(path)
    assert found == header and list(read) == records


def test_a_job_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    def die(path: Path) -> None:
        with code_writer(path, CodeFileHeader("t", 16, 16)) as writer:
            writer.add([CodeRecord("a", [1])])
            raise KeyboardInterrupt

    for suffix in (".parquet", ".jsonl"):
        path = tmp_path / f"codes{suffix}"
        path.write_text("old")
        with pytest.raises(KeyboardInterrupt):
            die(path)
        assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes.jsonl", "codes.parquet"]


def test_reconstruct(
    weights: Path, photos: list[Path], broken: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "out"
    images = photos[0], broken, photos[0]
    text = run("reconstruct", *images, "--steps", 2, "--out", out, "--scheduler", "dpm").out
    tokenizer = VisualTokenizer.from_pretrained(weights / "tokenizer")
    length = int(tokenizer.encode(photos[0]).lengths[0])
    assert text.count(f"{length} of 16 codes  {photos[0]}") == 2
    assert f"{length:.1f} codes per image on average, 2 images; 1 skipped" in text
    assert f"sheet: {out / 'sheet.png'}" in text
    names = ["000000-astronaut.png", "000002-astronaut.png", "rejects.jsonl", "sheet.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    sheet, first = (np.asarray(Image.open(out / name)) for name in ("sheet.png", names[0]))
    assert np.array_equal(sheet[: len(first)], first)
    original, kept, drawn = (first[20:276, x : x + 256] for x in (4, 264, 524))
    same = (original == kept).all(-1).reshape(4, 64, 4, 64).all((1, 3))
    assert same.sum() == length  # the kept patches are untouched
    with Image.open(photos[0]) as photo:
        resized = np.asarray(photo.resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(original, resized) and drawn.std() > 0


@pytest.fixture
def recipe(tiny_config: TokenizerConfig, photos: list[Path], tmp_path: Path) -> Path:
    """Two steps of stage 1 on crops of the photographs, in a folder of its own."""
    folder = tmp_path / "images/train"
    folder.mkdir(parents=True)
    for i in range(12):
        with Image.open(photos[i % 4]) as image:
            crop = image.crop((i * 10, 0, i * 10 + 150, 150)).resize((32, 32))
        crop.save(folder / f"{i:02d}.png")
    config = {k: v for k, v in tiny_config.to_dict().items() if not k.startswith("format")}
    trainer: dict[str, Any] = {"accelerator": "cpu", "max_steps": 2, "logger": False}
    trainer |= {"enable_progress_bar": False, "default_root_dir": str(tmp_path / "run")}
    values = {
        "seed_everything": 0,
        "trainer": trainer,
        "checkpoint": {"every": 1},
        "model": {
            "config": config,
            "out": str(tmp_path / "tokenizer"),
            "selection": {"stop_sampling_step": 1},
            "codebook": {"start_step": 1, "kmeans_samples": 64},
            "log_images_every": 0,
        },
        "data": {"data": str(tmp_path / "images"), "image_size": 32, "batch_size": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_fit_then_resume_then_encode(
    recipe: Path, photos: list[Path], tmp_path: Path, run: Any
) -> None:
    fit = ["fit", "-c", recipe]
    run(*fit)
    first = (tmp_path / "tokenizer/model.safetensors").read_bytes()
    run(*fit, "--ckpt_path", "last", "--trainer.max_steps", 4)
    assert (tmp_path / "tokenizer/model.safetensors").read_bytes() != first
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["max_steps"] == 4
    assert any(path.name.endswith("step=4.ckpt") for path in (tmp_path / "run").iterdir())
    last = tmp_path / "run/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    fit += ["--trainer.max_steps", 5, "--ckpt_path"]
    message = run(*fit, "last", code=2).err
    assert message.count("\n") == 1 and "step=4.ckpt, from which --ckpt_path last-good" in message
    run(*fit, "last-good")
    assert any(path.name.endswith("step=5.ckpt") for path in (tmp_path / "run").iterdir())
    shown = run("encode", photos[0], "--tokenizer", tmp_path / "tokenizer").out
    assert json_lines(shown)[1]["length"] >= 1


def test_fit_decoder_then_reconstruct(
    recipe: Path, weights: Path, photos: list[Path], tmp_path: Path, run: Any
) -> None:
    values = yaml.safe_load(recipe.read_text())
    unet = json.loads((weights / "decoder/unet/config.json").read_text())
    shape = "block_out_channels layers_per_block down_block_types up_block_types norm_num_groups"
    names = (*shape.split(), "sample_size", "attention_head_dim")
    values["model"] = {
        "tokenizer": str(weights / "tokenizer"),
        "vae": str(weights / "decoder/vae"),
        "unet": {"config": {name: unet[name] for name in names}},
        "condition": {"cross_dims": [16]},
        "out": str(tmp_path / "decoder"),
        "samples": {"every": 0},
    }
    recipe.write_text(yaml.safe_dump(values))
    run("fit-decoder", "-c", recipe)
    run("reconstruct", photos[0], "--decoder", tmp_path / "decoder", "--out", tmp_path / "out")
    assert (tmp_path / "out/sheet.png").is_file()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("-c missing.yaml", "missing.yaml"),
        ("-c RECIPE --model.rhoo 1", "--model.rhoo"),
        ("-c RECIPE --model.selection.rho 3.0", "rho: expected a ratio between 0 and 1, got 3.0"),
        (
            "-c RECIPE --trainer.check_val_every_n_epoch null --trainer.val_check_interval 0.5",
            "trainer: `val_check_interval` should be an integer",
        ),
    ],
)
def test_bad_recipes(line: str, reason: str, recipe: Path, run: Any) -> None:
    message = run("fit", *line.replace("RECIPE", str(recipe)).split(), code=2).err
    (error,) = [x for x in message.splitlines() if x.startswith("lavit-tok: error: ")]
    assert reason in error


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "required: COMMAND"),
        ("paint", "invalid choice: 'paint'"),
        ("encode", "required: IMAGE"),
        ("encode a.png --budget 0", "fraction in (0, 1], got 0"),
        ("encode a.png --budget 1.5", "fraction in (0, 1], got 1.5"),
        ("encode a.png --seed -1", "expected at least 0"),
        ("encode a.png --batch-size 0", "expected at least 1"),
        ("encode a.png --quality 1.5", "a cosine between 0 and 1, or decibels such as 20dB"),
        ("encode a.png --quality 0dB", "expected more than 0 dB"),
        ("encode a.png --quality high", "invalid quality value"),
        ("encode a.png --rate 0", "expected a number above 0"),
        ("encode a.png --rate nan", "expected a number above 0"),
        ("decode a.parquet", "required: --out"),
        ("shards a --shard-size 0 --out b", "at least 1"),
        ("shards a --num-workers -1 --out b", "at least 0"),
        ("shards a", "--out"),
    ],
)
def test_bad_words(line: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    message = capsys.readouterr().err
    assert caught.value.code == 2 and reason in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "encode PHOTO --tokenizer no/such/folder",
            "folder: expected 'default', 'selected', an exi",
        ),
        ("encode PHOTO --out codes.txt", "codes.txt: expected a name that ends in .parquet or"),
        ("encode PHOTO --device toaster", "device 'toaster' cannot be used here"),
        ("encode PHOTO --device meta", "device 'meta' cannot be used here"),
        ("encode PHOTO --max-pixels 99", "more than 99 pixels"),
        ("encode PHOTO --max-bytes 99", "at most 99"),
        ("encode FOLDER", "no images found"),
        ("decode missing.parquet --out FOLDER", "missing.parquet"),
        ("decode codes.csv --out FOLDER", "codes.csv: expected a name that ends in"),
    ],
)
def test_bad_input(line: str, reason: str, photos: list[Path], tmp_path: Path, run: Any) -> None:
    names = {"PHOTO": photos[0], "FOLDER": tmp_path}
    captured = run(*(names.get(word, word) for word in line.split()), code=2)
    assert captured.out == "" and captured.err.startswith("lavit-tok: error: ")
    assert reason in captured.err and captured.err.count("\n") == 1


def test_help_is_quick_and_every_command_exists() -> None:
    assert all(callable(resolve_name(command.run)) for command in COMMANDS.values())
    heavy = {"torch", "numpy", "PIL", "transformers", "pyarrow"}
    code = "import sys; from lavit_tok.cli import main\ntry: main(['--help'])\n"
    code += f"finally: assert not {heavy} & {{*sys.modules}}"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("listed", [False, True])
def test_names_that_are_not_utf8(
    photos: list[Path], tmp_path: Path, suffix: str, listed: bool, run: Any, monkeypatch: Any
) -> None:
    """As arguments or on stdin: in code files, rejects, messages, folders, and keys of decode."""
    folder = tmp_path / os.fsdecode(b"\xfe")
    folder.mkdir()
    good, bad = folder / NOT_UTF8, folder / os.fsdecode(b"bad\xff.png")
    good.write_bytes(photos[0].read_bytes())
    bad.write_bytes(b"\x89PNG but not really")
    out, names = folder / f"codes{suffix}", [good, bad]
    if listed:
        text = b"\n".join(map(os.fsencode, names)) + b"\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        names = [Path("-")]
    assert "bad\\udcff.png: not an image" in run("encode", *names, "--out", out).err
    _, records = read_codes(out)
    assert [os.fsencode(record.key) for record in records] == [os.fsencode(good)]
    (reject,) = json_lines(Path(f"{out}.rejects.jsonl").read_text(encoding="utf-8"))
    assert os.fsencode(reject["key"]) == os.fsencode(bad)
    run("decode", out, "--out", folder / "out")
    assert [p.name for p in (folder / "out").iterdir()] == ["000000-a_.png"]


def test_sheets_of_a_name_that_is_not_utf8(photos: list[Path], tmp_path: Path, run: Any) -> None:
    name = tmp_path / NOT_UTF8
    name.write_bytes(photos[0].read_bytes())
    assert "a\\udcff" in run("reconstruct", name, "--out", tmp_path / "out").out


@pytest.mark.parametrize("key", ["a\\b", "\\udcff", "\\\udcff", "\ud800", "x\\\\udcff\udcffy"])
def test_keys_round_trip(key: str, tmp_path: Path) -> None:
    for suffix in (".parquet", ".jsonl"):
        path = code_file(tmp_path / f"codes{suffix}", {key: [1]})
        assert list(read_codes(path)[1]) == [CodeRecord(key, [1])]


def test_hostile_lines_are_rejected_and_the_others_decoded(tmp_path: Path, run: Any) -> None:
    path, out = code_file(tmp_path / "codes.jsonl", {"first": [1]}), tmp_path / "out"
    record = b'{"key": "k", "codes": %s}'
    hostile = [b"[" * 100_000, record % (b"[" * 100_000), b'{"key": "\xff", "codes": [1]}']
    hostile += [record % b"[Infinity]", record % b"[1e400]", record % (b"9" * 5000), b"\xff\xfe\0"]
    with open(path, "ab") as file:
        file.write(b"\n".join([*hostile, record % b"[2]"]) + b"\n")
    assert "decoded 2 of 9 records" in run("decode", path, "--out", out).err
    reasons = [line["reason"] for line in json_lines((out / "rejects.jsonl").read_text())]
    assert reasons[:2] == ["nested too deeply"] * 2 and "not UTF-8" in reasons[2]


@pytest.mark.parametrize("suffix", ["png", "parquet"])
def test_decoding_is_resumed(suffix: str, tmp_path: Path, run: Any) -> None:
    """Two code files, number 1 of the second corrupt; other options and records are made again."""
    (codes := tmp_path / "codes").mkdir()
    code_file(codes / "a.jsonl", {"a0": [0], "a1": [1], "a2": [2]})
    code_file(codes / "b.jsonl", {"b0": [0], "b1": [99], "b2": [2]})
    out = tmp_path / "out"
    command = ["decode", codes, "--out", out, "--format", suffix]
    command += ["--shard-size", 2, "--batch-size", 2]

    def decoded(*more: Any) -> tuple[str, dict[str, bytes]]:
        message = run(*command, *more).err.splitlines()[-1]
        return message, {path.name: path.read_bytes() for path in out.glob(f"*.{suffix}")}

    message, whole = decoded()
    assert message.startswith("decoded 5 of 6")
    assert "1 skipped" in message and "earlier" not in message
    (reject,) = json_lines((out / "rejects.jsonl").read_text())
    assert reject["key"] == "b1"
    if suffix == "parquet":
        names = [f"0000{part}-0000{block}.parquet" for part in (0, 1) for block in (0, 1)]
        assert sorted(whole) == names
        tables = [pq.read_table(out / name) for name in sorted(whole)]
        keys = [key for table in tables for key in table["key"].to_pylist()]
        assert keys == ["a0", "a1", "a2", "b0", "b2"]
        for image in tables[0]["image"].to_pylist():
            assert Image.open(io.BytesIO(image["bytes"])).size == (16, 16)
    else:
        names = [f"00000-00000{i}-a{i}.png" for i in range(3)]
        assert sorted(whole) == [*names, "00001-000000-b0.png", "00001-000002-b2.png"]
    first, *others = sorted(out.glob(f"*.{suffix}"))
    first.unlink()
    times = [path.stat().st_mtime_ns for path in others]
    message, found = decoded()
    assert found == whole and [path.stat().st_mtime_ns for path in others] == times
    assert f"{3 if suffix == 'parquet' else 4} of them by earlier runs; 1 skipped" in message
    message, found = decoded("--seed", 1)
    assert "earlier" not in message and all(found[name] != whole[name] for name in whole)
    code_file(codes / "c.jsonl", {"c": [1]}, CodeFileHeader("t", 16, 16, "another"))
    assert "c.jsonl: expected the fingerprint None of a.jsonl" in run(*command, code=2).err


def test_decode_batch(weights: Path) -> None:
    """The table that engines map: other columns stay, bad records have a reason."""
    codes = [[1, 2], [16], None]
    table = pa.table({"key": ["a", "b", "c"], "codes": codes, "length": [2, 1, None]})
    stage = pickle.loads(pickle.dumps(DecodeBatch(str(weights / "decoder"), num_inference_steps=1)))
    found = stage(table)
    assert found.column_names == ["key", "image", "reason"] and found["key"] == table["key"]
    image, bad, absent = found["image"].to_pylist()
    assert Image.open(io.BytesIO(image)).size == (16, 16) and bad is absent is None
    assert found["reason"].is_null().to_pylist() == [True, False, True]
    alone = stage(table.slice(0, 1).append_column("index", pa.array([0])))
    assert alone["image"][0].as_py() == image
    other = stage(table.slice(0, 1).append_column("index", pa.array([1])))
    assert other["image"][0].as_py() != image


def test_lines_of_a_gigabyte_are_rejected(tmp_path: Path, run: Any) -> None:
    """Sparse files: the memory is that of MAX_LINE, and no line before or after is lost."""
    path, out = code_file(tmp_path / "codes.jsonl", {"first": [1]}), tmp_path / "out"
    with open(path, "rb+") as file:
        file.seek(1 << 30, os.SEEK_END)
        file.write(b'\n{"key": "last", "codes": [2]}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "decoded 2 of 3 records" in run("decode", path, "--out", out).err
    (reject,) = json_lines((out / "rejects.jsonl").read_text())
    assert reject["key"] == "line 3" and "longer than" in reject["reason"]
    path.write_bytes(b"")
    os.truncate(path, 1 << 30)
    run("decode", path, "--out", out, code=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


@pytest.mark.parametrize("size", ["Infinity", "NaN", "-1", "1e400", "true", '"3"', "[" * 100_000])
def test_hostile_headers(size: str, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "codes.jsonl"
    header = '{"format": "lavit_tok.codes", "version": 1, "tokenizer": "t", "patches": 16'
    path.write_text(f'{header}, "codebook_size": {size}}}\n')
    message = run("decode", path, "--out", tmp_path / "out", code=2).err
    assert str(path) in message and message.count("\n") == 1 and len(message) < 500


def test_damaged_parquet_is_never_read_with_other_values(tmp_path: Path) -> None:
    path = tmp_path / "codes.parquet"
    records = [CodeRecord(f"image {i}", [i % 16, (7 * i) % 16], [0, i % 16]) for i in range(40)]
    with code_writer(path, header := CodeFileHeader("t", 16, 16)) as writer:
        writer.add(records)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    messages: list[str] = []
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(len(whole), size=int(rng.integers(1, 4))):
            damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read_header, read = read_codes(path)
            read = list(read)
        except CodeFileError as error:
            messages.append(str(error))
            continue
        assert (read_header, read) == (header, records)
    assert len(messages) > 200
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("name", [b'"checksum"', b"lavit_tok.codes.sha256"])
def test_damage_to_the_name_of_the_checksum(name: bytes, tmp_path: Path) -> None:
    """Without a checksum, keys would not be unescaped, and any values accepted."""
    path = code_file(tmp_path / "codes.parquet", {"a\udcff": [1]})
    whole = path.read_bytes()
    assert name in whole
    path.write_bytes(whole.replace(name, name.replace(b"s", b"r")))
    try:
        read = list(read_codes(path)[1])
    except CodeFileError:
        return
    assert read == [CodeRecord("a\udcff", [1])]


def test_altered_values_with_a_right_page_checksum(tmp_path: Path) -> None:
    path = code_file(tmp_path / "codes.parquet", {"a": [1]})
    parquet = pq.ParquetFile(path)
    altered = parquet.read().to_pylist()
    altered[0]["codes"] = [2]
    with pq.ParquetWriter(path, parquet.schema_arrow) as file:
        file.write_table(pa.Table.from_pylist(altered, schema=parquet.schema_arrow))
        file.add_key_value_metadata(parquet.metadata.metadata)
    with pytest.raises(CodeFileError, match="SHA-256"):
        read_codes(path)


def test_existing_codes_are_replaced_only_on_request(
    photos: list[Path], tmp_path: Path, run: Any
) -> None:
    out, new = tmp_path / "codes.jsonl", tmp_path / "new.jsonl"
    command = ["encode", *photos[:2], "--out"]
    run(*command, out)
    out.write_text("mine")
    assert f"{out}: exists: --overwrite" in run(*command, out, code=2).err
    assert out.read_text() == "mine"
    run(*command, out, "--overwrite")
    assert len(list(read_codes(out)[1])) == 2
    rejects = Path(f"{new}.rejects.jsonl")
    rejects.write_text("a list of somebody\n")
    assert str(rejects) in run(*command, new, code=2).err
    assert rejects.exists() and not new.exists()
    rejects.write_text('{"key": "k", "reason": "an earlier run"}\n')
    run(*command, new)
    assert not rejects.exists()


def test_sheets_are_replaced_but_not_files_of_others(
    photos: list[Path], tmp_path: Path, run: Any
) -> None:
    """As in the quick start, whose command can be repeated."""
    sheet = tmp_path / "out" / "sheet.png"
    command = ["reconstruct", photos[0], "--out", tmp_path / "out"]
    run(*command)
    run(*command)
    sheet.write_bytes(photos[1].read_bytes())
    assert f"{sheet}: not written by lavit-tok" in run(*command, code=2).err
    assert sheet.read_bytes() == photos[1].read_bytes()
    run(*command, "--overwrite")


def test_partial_files_of_killed_jobs_are_removed(
    photos: list[Path], tmp_path: Path, run: Any
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    out = tmp_path / "codes.jsonl"
    stale = [tmp_path / f".{out.name}{extra}.{ended.pid}.part" for extra in ("", ".rejects.jsonl")]
    others = [tmp_path / f".{out.name}.{os.getppid()}.part", tmp_path / f".b.{ended.pid}.part"]
    for path in (*stale, *others):
        path.touch()
    run("encode", photos[0], "--out", out)
    assert [path.exists() for path in (*stale, *others)] == [False, False, True, True]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_one_line(
    number: signal.Signals, code: int, photos: list[Path], tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "codes.jsonl"
    out.write_text("old")
    before = signal.getsignal(signal.SIGTERM)
    # Of a background process SIGINT is ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        add = "lavit_tok.data.code_files._JsonWriter.add"
        patch.setattr(add, lambda *_: signal.raise_signal(number))
        message = run("encode", *photos, "--out", out, "--overwrite", code=code).err
    signal.signal(signal.SIGINT, interrupt)
    assert message.count("\n") == 1 and number.name in message
    assert out.read_text() == "old" and not list(tmp_path.glob(".*.part"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space.*codes\.jsonl"),
        code_writer(tmp_path / "codes.jsonl", CodeFileHeader("t", 16, 16)),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_image_warnings_are_collected(
    photos: list[Path], tmp_path: Path, run: Any, recwarn: Any
) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\0\0\xf0\xff\0\0"
    path = tmp_path / "damaged.jpg"
    with Image.open(photos[0]) as image:
        image.convert("RGB").save(path, exif=exif)
    assert f"1 read with warnings, the first: {path}: " in run("encode", path, photos[1]).err
    assert not recwarn.list
