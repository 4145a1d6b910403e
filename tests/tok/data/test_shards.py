"""`lavit-tok shards` and its reader: the drawing, resuming after any kill, and every error."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.files import limited
from robustness.small import small_disk

import lavit_tok
from lavit_tok import ShardError, Shards, VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.data.code_files import CodeFileHeader, CodeRecord, read_codes
from lavit_tok.data.shard_manifest import Manifest, sha256
from lavit_tok.data.shard_source import SplitImages
from lavit_tok.encode.image_files import open_image

CORRUPT = 2  # of the ten training images


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder where `datasets` keeps its copies, shared by this file's jobs."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def album(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with captions: ten training images, number 2 corrupt, number 5 with a long
    caption; two validation images; 40 x 32 pixels."""
    folder = tmp_path_factory.mktemp("album")
    images = [open_image(photo) for photo in photos]
    noise = np.random.default_rng(0).bytes(20_000).hex()  # does not compress below its 20 kB
    for split, count in (("train", 10), ("validation", 2)):
        (folder / split).mkdir()
        lines = []
        for i in range(count):
            left = 20 * i if split == "train" else 100
            image = images[i % 4].crop((left, 0, left + 200, 160)).resize((40, 32))
            image.save(folder / split / f"{i:02d}.png")
            caption = noise if i == 5 else f"{split} {i}" if i else None
            lines.append({"file_name": f"{i:02d}.png", "caption": caption})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / f"train/{CORRUPT:02d}.png").write_bytes(b"\x89PNG but not really")
    return folder


@pytest.fixture
def weights(tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def shards(album: Path, weights: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command in this process on the album, four images per shard; returns the folder."""

    def run(
        out: str = "out", *more: Any, data: Path = album, split: str | None = "train", code: int = 0
    ) -> Path:
        args = ["shards", data, "--out", tmp_path / out, "--tokenizer", weights]
        args += ["--shard-size", 4, "--batch-size", 3, *(["--split", split] if split else [])]
        assert main([str(word) for word in [*args, *more]]) == code
        return tmp_path / out

    return run


@pytest.fixture
def refused(shards: Callable[..., Path], capsys: Any) -> Callable[..., str]:
    """Runs a command that must fail with one line that has all of the reasons; returns it."""

    def run(reasons: str | list[str], *args: Any, **options: Any) -> str:
        capsys.readouterr()
        shards(*args, **options, code=2)
        *progress, message = capsys.readouterr().err.splitlines()  # of `datasets`
        assert not [line for line in progress if line.strip() and "Generating" not in line]
        assert message.startswith("lavit-tok: error: ")
        assert all(x in message for x in ([reasons] if isinstance(reasons, str) else reasons))
        return message

    return run


def rejects(out: Path) -> list[Any]:
    return [json.loads(line) for line in (out / "train.rejects.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def keys(path: Path) -> list[str]:
    return [Path(key).stem for key in pq.ParquetFile(path).read(["key"])["key"].to_pylist()]


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def test_the_drawing(shards: Callable[..., Path], album: Path, weights: Path, capsys: Any) -> None:
    """That of shard_manifest.py, and every record holds the tokenizer's output for its image."""
    out = shards()
    message = capsys.readouterr().err
    assert "train: 9 records of 10 images" in message
    assert f"1 skipped, listed in {out}/train.rejects.jsonl" in message
    names = [f"train-{i:05d}.parquet" for i in range(3)]
    assert sorted(files(out)) == ["manifest.json", *names, "train.rejects.jsonl"]
    stems = [["00", "01", "03"], ["04", "05", "06", "07"], ["08", "09"]]
    assert [keys(out / name) for name in names] == stems

    def read(folder: Path) -> list[Any]:
        tables = [pq.ParquetFile(folder / name).read() for name in names]
        return [record for table in tables for record in table.to_pylist()]

    tokenizer, records = VisualTokenizer.from_pretrained(weights), read(out)
    codes = tokenizer.encode([album / record["key"] for record in records])
    assert codes.keep is not None
    assert [record["codes"] for record in records] == codes.to_list()
    assert [record["length"] for record in records] == codes.lengths.tolist()
    kept = [mask.nonzero().flatten().tolist() for mask in codes.keep]
    assert [record["keep"] for record in records] == kept
    captions = [record["caption"] for record in records if len(record["caption"]) < 99]
    assert captions == ["", *(f"train {i}" for i in (1, 3, 4, 6, 7, 8, 9))]
    lists, found = "list<element: int32>", pq.ParquetFile(out / names[0]).schema_arrow
    schema = {"key": "string", "caption": "string", "codes": lists, "length": "int32"}
    assert {f.name: str(f.type) for f in found} == schema | {"keep": lists}

    both = shards("both", "--flip")
    twice = [[stem for stem in part for _ in range(2)] for part in stems]
    assert [keys(both / name) for name in names] == twice
    flipped = read(both)
    assert [record.pop("flipped") for record in flipped] == [False, True] * 9
    assert flipped[::2] == records
    arrays = [np.asarray(open_image(album / record["key"]))[:, ::-1].copy() for record in records]
    mirrored = [record["codes"] for record in flipped[1::2]]
    assert mirrored == tokenizer.encode(arrays).to_list() != codes.to_list()


def test_manifest_and_rejects(shards: Callable[..., Path], weights: Path, album: Path) -> None:
    out = shards()
    values = json.loads((out / "manifest.json").read_text())
    (split,) = values["splits"].values()
    listed = split.pop("shards")
    expected = {"format": "lavit_tok.shards", "version": 3, "tokenizer": str(weights)}
    expected |= {"fingerprint": VisualTokenizer.from_pretrained(weights).fingerprint()}
    expected |= {"codebook_size": 16, "patches": 16, "budget": None, "flip": False}
    assert values.items() >= expected.items()
    assert split.items() >= {"data": str(album), "images": 10, "caption_column": "caption"}.items()
    for shard in listed:
        table = pq.ParquetFile(out / shard["file"]).read()
        assert (shard["records"], shard["codes"]) == (len(table), sum(table["length"].to_pylist()))
        assert shard["sha256"] == sha256(out / shard["file"])
    assert [shard["rejects"] for shard in listed] == [1, 0, 0]
    reason = "not an image in a format that Pillow supports"
    assert rejects(out) == [{"key": "train/02.png", "reason": reason, "index": CORRUPT}]


def test_neither_processes_nor_the_place_of_the_data_matter(
    shards: Callable[..., Path], album: Path, tmp_path: Path
) -> None:
    options = "--flip", "--budget", 0.25
    alone = files(shards("alone", *options))
    assert files(shards("together", *options, "--num-workers", 2)) == alone
    elsewhere = Path(shutil.copytree(album, tmp_path / "moved album"))
    moved = files(shards("moved", *options, data=elsewhere))
    assert {n for n in moved if moved[n] != alone[n]} == {"manifest.json"} and len(moved) == 5
    assert files(shards("alone", *options, data=elsewhere)) == alone, "nothing is left to do"


def test_threads_do_not_matter(shards: Callable[..., Path]) -> None:
    """Batches encoded at the same time, with flips and a budget across each; and the next job."""
    options = ["--flip", "--budget", 0.25, "--batch-size", 1]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = files(shards("alone", *options))
        torch.set_num_threads(3)
        assert files(shards("together", *options)) == alone
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_budgets(shards: Callable[..., Path]) -> None:
    paths = sorted(shards("5", "--budget", 5).glob("*.parquet"))
    lengths = [pq.ParquetFile(path).read(["length"])["length"].to_pylist() for path in paths]
    assert lengths == [[5] * 3, [5] * 4, [5] * 2]
    assert Shards.open(shards("half", "--budget", 0.5)).codes == 8 * 9


def test_splits_share_a_manifest(shards: Callable[..., Path]) -> None:
    apart = shards("apart", split="validation")
    shards("apart", split="train")
    together = shards("together", split=None)
    first, second = (Manifest.read(out) for out in (apart, together))
    assert (first.config, first.splits) == (second.config, second.splits)
    assert list(first.splits) == ["validation", "train"]
    opened = [Shards.open(together, split) for split in ("train", "validation")]
    assert [one.records for one in opened] == [9, 2]
    assert not (together / "validation.rejects.jsonl").exists()


def parquet(
    path: Path, album: Path, corrupt: tuple[int, ...] = (CORRUPT,), **columns: list[Any]
) -> Path:
    """Ten images of the album as bytes, with the given columns of text or numbers."""
    contents = [(album / f"train/{i:02d}.png").read_bytes() for i in range(10)]
    contents = [data[:40] if i in corrupt else data for i, data in enumerate(contents)]
    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(contents)]
    records = datasets.Dataset.from_dict({"photo": images, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    records.cast_column("photo", datasets.Image(decode=False)).to_parquet(path)
    return path


def tar(path: Path, album: Path, numbers: range, texts: Path | None = None) -> None:
    """Images of the album; with captions, for which `texts` is a file to write to."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for i in numbers:
            file.add(album / f"train/{i:02d}.png", f"{i:02d}.png")
            if texts:
                texts.write_text(f"text {i}")
                file.add(texts, f"{i:02d}.txt")


def test_parquet_and_its_columns(
    shards: Callable[..., Path], refused: Any, album: Path, tmp_path: Path
) -> None:
    columns = {"text": [f"text {i}" for i in range(10)], "number": [*range(100, 110)]}
    columns["id"] = [f"id {i}" for i in range(10)]
    path = parquet(tmp_path / "data/a.parquet", album, **columns)
    good = [i for i in range(10) if i != CORRUPT]

    def records(out: str, *args: Any) -> list[tuple[str, str]]:
        found = Shards.open(shards(out, *args, data=path)).dataset(tmp_path / "copies")
        return list(zip(found["key"], found["caption"], strict=True))

    assert records("found") == [(f"id {i}", f"text {i}") for i in good]
    named = ["--caption-column", "id", "--key-column", "number", "--image-column", "photo"]
    assert records("named", *named) == [(str(100 + i), f"id {i}") for i in good]
    assert rejects(tmp_path / "named")[0]["key"] == "102"
    assert records("silent", "--caption-column", "") == [(f"id {i}", "") for i in good]
    got = "got columns photo, text, number, id"
    for args, reason in (
        ("--caption-column title", f"expected a caption column 'title' of text, {got}"),
        ("--caption-column number", "expected a caption column 'number' of text"),
        ("--key-column name", f"expected a key column 'name', {got}"),
        ("--split test", "expected a split 'test', got train"),
        ("--device toaster", "device 'toaster' cannot be used here"),
    ):
        refused(reason, "refused", *args.split(), data=path)
    assert not (tmp_path / "refused").exists() or not files(tmp_path / "refused")


KILLS = """
import os, signal, sys, time
from pathlib import Path
from lavit_tok import Shards
# The reader alone imports nothing heavy
assert not {"datasets", "pytorch_lightning", "diffusers"} & {*sys.modules}
from lavit_tok import VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.data.splits import load_splits

out, data, weights, replace = Path(sys.argv[1]), sys.argv[2], sys.argv[3], os.replace
options = sys.argv[4:]
# Their imports are done once, for all child processes
VisualTokenizer.from_pretrained(weights), load_splits(data)

def child(at, pause=0):
    'Kills itself just before the file number `at` is moved to its final name.'
    pid = os.fork()
    if pid:
        return pid
    done = 0
    def counted(*names):
        nonlocal done
        done += 1
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        replace(*names)
    os.replace = counted
    os._exit(main(options))

def end(pid):
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

pid = child(None, pause=0.1)  # killed from outside, wherever it is after its first shard
while not (out / "train-00000.parquet").exists():
    time.sleep(0.005)
    assert os.waitpid(pid, os.WNOHANG)[0] == 0
os.kill(pid, signal.SIGKILL)
print("killed", end(pid), len([*out.glob("*.parquet")]))
for turn in range(50):
    code = end(child(1 + turn % 4))
    counts = len([*out.glob("*.parquet")]), len([*out.glob(".*.part")])
    print("killed" if code == -9 else "ended", code, *counts)
    if code != -9:
        break
"""


def test_killed_at_any_moment_it_gives_the_same_bytes(
    shards: Callable[..., Path], album: Path, weights: Path, cache: Path, tmp_path: Path
) -> None:
    """kill -9 from outside, then before each kind of file appears, until a run completes."""
    whole, out = shards("whole", "--shard-size", "2"), tmp_path / "killed"
    args = ["shards", album, "--out", out, "--tokenizer", weights]
    args += ["--batch-size", 3, "--split", "train", "--shard-size", 2]
    command = [sys.executable, "-c", KILLS, *map(str, [out, album, weights, *args])]
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines, shown.stderr
    assert lines[0][:2] == ["killed", "-9"] and int(lines[0][2]) < 5  # really in the middle
    assert lines[-1][:2] == ["ended", "0"], shown.stderr
    assert len(lines) >= 5 and all(line[:2] == ["killed", "-9"] for line in lines[:-1])
    assert any(int(line[3]) for line in lines[1:-1]), "partial files were left, and then removed"
    assert files(out) == files(whole)


def test_damage_is_mended(shards: Callable[..., Path], capsys: Any) -> None:
    out = shards()
    whole = files(out)

    def again(kept: int) -> None:
        capsys.readouterr()
        shards()
        assert files(out) == whole
        assert f"{kept} of them from earlier runs" in capsys.readouterr().err

    stamps = {name: (out / name).stat().st_mtime_ns for name in whole}
    again(3)
    after = {name: (out / name).stat().st_mtime_ns for name in whole}
    assert after == stamps, "nothing is written twice"
    (out / "train-00001.parquet").unlink()
    again(2)
    first = whole["train-00000.parquet"]
    flipped = first[:200] + bytes([first[200] ^ 1]) + first[201:]
    for damaged in (first[:-9], whole["train-00001.parquet"][:300] + b"\0" * 3000, flipped):
        (out / "train-00000.parquet").write_bytes(damaged)
        again(2)
    (out / "train.rejects.jsonl").unlink()
    again(3)
    (out / "train.rejects.jsonl").write_text('{"key": "train/02.png", "rea')
    again(3)
    (out / ".train-00002.parquet.1.part").write_text("half")
    again(3)
    edit(out, lambda values: values["splits"]["train"]["shards"].pop())
    again(3)
    (out / "manifest.json").unlink()  # killed before the manifest was moved
    again(3)


def test_verify(shards: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """The manifest and the list of rejects are made again from the footers; damage is named."""
    out = shards(split=None)
    whole = files(out)

    def verify(code: int = 0) -> str:
        capsys.readouterr()
        assert main(["shards", "verify", str(out)]) == code
        return capsys.readouterr().err

    assert "train: 3 shards, 9 records; manifest.json and rejects agree\n" in verify()
    (out / "train.rejects.jsonl").unlink()
    assert "train: 3 shards, 9 records; manifest.json and rejects made again" in verify()
    assert files(out) == whole
    (out / "manifest.json").unlink()
    verify()
    before, made = json.loads(whole["manifest.json"]), json.loads(files(out)["manifest.json"])
    assert made["splits"]["train"]["data"] == ""  # a footer does not contain the path
    for name in ("train", "validation"):
        assert made["splits"][name]["shards"] == before["splits"][name]["shards"]
    (out / "train-00001.parquet").write_bytes(whole["train-00001.parquet"][:-9])
    assert f"{out}/train-00001.parquet: truncated" in verify(2)
    (out / "train-00001.parquet").unlink()
    assert "shards of split 'train' are missing or damaged" in verify(2)
    (out / "train-00001.parquet").write_bytes(whole["train-00001.parquet"])
    (out / "train-00002.parquet").unlink()  # the last one
    assert "shards of split 'train' are missing or damaged" in verify(2)
    out = tmp_path / "nowhere"
    assert "not a folder of shards" in verify(2)


def test_tokenize_batch(tiny_tokenizer: VisualTokenizer, album: Path, tmp_path: Path) -> None:
    """The drawing of tokenize_batch.py; sizes 0 and 1; pickled, it loads the tokenizer again."""
    contents = [(album / f"train/{i:02d}.png").read_bytes() for i in (1, CORRUPT, 3)]
    table = pa.table({"key": ["a", "b", "c"], "number": [7, 8, 9], "image": contents})
    result = lavit_tok.tokenize_batch(table, tiny_tokenizer, flip=True)
    assert result["flipped"].to_pylist() == [False, True, False, False, True]
    assert result["number"].to_pylist() == [7, 7, 8, 9, 9]
    reasons = result["reason"].to_pylist()
    assert [reason is None for reason in reasons] == [True, True, False, True, True]
    images = [open_image(content) for content in (contents[0], contents[2])]
    codes = tiny_tokenizer.encode(images).to_list()
    found = result["codes"].to_pylist()
    assert (found[0], found[2], found[3]) == (codes[0], None, codes[1])
    assert [len(x or []) for x in found] == [n or 0 for n in result["length"].to_pylist()]
    assert [len(x or []) for x in found] == [len(x or []) for x in result["keep"].to_pylist()]
    assert len(lavit_tok.tokenize_batch(table[:0], tiny_tokenizer)) == 0
    corrupt = lavit_tok.tokenize_batch(table[1:2], tiny_tokenizer).to_pylist()
    assert corrupt[0]["codes"] is None and "not an image" in corrupt[0]["reason"]
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenize = lavit_tok.TokenizeBatch(str(tmp_path / "tokenizer"), budget=3)
    assert tokenize(table)["length"].to_pylist() == [3, None, 3]
    assert b"codebook" not in pickle.dumps(tokenize)
    assert pickle.loads(pickle.dumps(tokenize))(table) == tokenize(table)


def test_streams_of_tars_and_urls(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
) -> None:
    """A truncated image in a tar is one reject; what fsspec opens is read without a copy."""
    folder = tmp_path / "tars"
    for part, numbers in enumerate((range(5), range(5, 10))):
        tar(folder / f"{part}.tar", album, numbers, tmp_path / "text")
    out = shards("tars", "--streaming", data=folder)
    records = Shards.open(out).dataset(tmp_path / "copies")
    good = [i for i in range(10) if i != CORRUPT]
    assert records["key"][:] == [f"{i:02d}" for i in good]
    assert records["caption"][:] == [f"text {i}" for i in good]
    assert rejects(out)[0]["key"] == f"{CORRUPT:02d}"
    path = parquet(tmp_path / "a.parquet", album, text=[f"text {i}" for i in range(10)])
    fsspec.filesystem("memory").put(str(path), "/bucket/a.parquet")
    capsys.readouterr()
    out = shards("url", "--streaming", data="memory://bucket/a.parquet")
    assert "9 records of 10 images" in capsys.readouterr().err
    records = Shards.open(out).dataset(tmp_path / "copies")
    assert records["caption"][:] == [f"text {i}" for i in good]


def test_keys_that_occur_twice_and_addresses_without_data(
    shards: Callable[..., Path], refused: Any, album: Path, tmp_path: Path, capsys: Any
) -> None:
    """No record is lost; `verify` counts the keys, and an address is one line."""
    content = {"bytes": (album / "train/00.png").read_bytes(), "path": None}
    path = tmp_path / "keys.parquet"
    keys = ["a", "a", "b", "c", "d", "a"]  # two in one shard, one in another
    pq.write_table(pa.table({"key": keys, "image": [content] * 6}), path)
    out = shards("out", "--flip", data=path)
    assert main(["shards", "verify", str(out)]) == 0
    assert "2 shards, 12 records; " in (message := capsys.readouterr().err)
    assert message.endswith("; 2 images have the key of another one\n")
    for url in (f"file://{tmp_path}/absent.tar", "http://127.0.0.1:9/a.parquet"):
        reasons = [f"error: {url}: expected an image folder", f"Unable to find '{url}'"]
        refused(reasons, "absent", "--streaming", data=url)


def test_streams_without_examples_and_damaged_ones(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
) -> None:
    """A tar without members has one empty shard; one that cannot be read ends the job."""
    folder = tmp_path / "tars"
    for part, numbers in enumerate((range(5), range(0))):
        tar(folder / f"{part}.tar", album, numbers)
    args = ["--streaming", "--caption-column", ""]
    out = shards("stream", *args, data=folder)
    assert pq.read_table(out / "train-00001-00000.parquet").num_rows == 0
    assert "4 records of 5 images" in capsys.readouterr().err
    assert Shards.open(out).records == 4
    whole = (folder / "0.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[:2000] + b"no header" * 500)
    for more in ([], ["--num-workers", 2]):
        shards("damaged", *args, *more, data=folder, code=2)
        message = capsys.readouterr().err
        assert "input file 2 of 2 cannot be read" in message and "Traceback" not in message
    with tarfile.open(folder / "0.tar") as whole_tar:
        start = whole_tar.getmembers()[3].offset
    (folder / "1.tar").write_bytes(whole[:start] + b"\xff" * 512 + whole[start + 512 :])
    for more in (args, args[1:]):  # tarfile would end there, three images before the last
        shards("header", *more, data=folder, code=2)
        assert f"damaged header at byte {start}" in capsys.readouterr().err


def test_a_changed_data_set_is_refused(
    shards: Callable[..., Path], refused: Any, album: Path, tmp_path: Path
) -> None:
    texts = [f"text {i}" for i in range(10)]
    out = shards(data=parquet(tmp_path / "data.parquet", album, text=texts))
    whole = files(out)
    for count in (8, 4):  # whole shards less
        path = tmp_path / f"{count}.parquet"
        pq.write_table(pq.read_table(tmp_path / "data.parquet")[:count], path)
        refused(f"images than the {count} of {path}", data=path)
    changed = parquet(tmp_path / "changed.parquet", album, text=[*texts[:9], "changed"])
    refused("00002.parquet: its images have other keys, captions or file sizes", data=changed)
    assert files(out) == whole


def test_streams_give_the_same_records(
    shards: Callable[..., Path], refused: Any, album: Path, tmp_path: Path, capsys: Any
) -> None:
    """Three files of 10, 10 and 8 images with shards of 4; any number of processes, any restart."""
    folder = tmp_path / "parquet"
    for part, count in enumerate((10, 10, 8)):
        texts = [f"text {part} {i}" for i in range(10)]
        path = parquet(folder / f"train-{part}.parquet", album, text=texts)
        pq.write_table(pq.read_table(path)[:count], path)
    plain = Shards.open(shards("plain", data=folder)).dataset(tmp_path / "copies")[:]
    out = shards("stream", "--streaming", data=folder)
    assert "25 records of 28 images" in capsys.readouterr().err
    whole = files(out)
    names = [f"train-{part:05d}-{i:05d}.parquet" for part in range(3) for i in range(3)]
    assert sorted(whole) == ["manifest.json", *names[:8], "train.rejects.jsonl"]
    assert Shards.open(out).dataset(tmp_path / "copies")[:] == plain
    assert [line["index"] for line in rejects(out)] == [2, 12, 22]
    assert files(shards("workers", "--streaming", "--num-workers", 2, data=folder)) == whole
    for lost in (range(8), [0], [2], [0, 5], [3, 4, 7]):
        for i in lost:
            (out / names[i]).unlink()
        assert files(shards("stream", "--streaming", data=folder)) == whole
    (out / names[2]).unlink()
    path = folder / "train-0.parquet"
    pq.write_table(pq.read_table(path)[1:], path)
    refused(f"{names[0]}: its images have other keys", "stream", "--streaming", data=folder)


def test_images_that_only_this_machine_has(
    shards: Callable[..., Path], refused: Any, album: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The folder has another name while a batch is read, as on a machine that does not have it."""
    images = tmp_path / "images"
    shutil.copytree(album, images)
    batches = SplitImages.batches

    def elsewhere(*args: Any, **options: Any) -> Any:
        images.rename(tmp_path / "away")
        tables = list(batches(*args, **options))
        (tmp_path / "away").rename(images)
        yield from tables

    with monkeypatch.context() as patch:
        patch.setattr(SplitImages, "batches", elsewhere)
        refused("train/00.png: not found by the process that was to open it, but it", data=images)
    assert not [*(tmp_path / "out").glob("*.parquet")]
    assert files(shards(data=images)) == files(shards("other", data=images))


def test_rejects_are_never_lost(shards: Callable[..., Path], album: Path, tmp_path: Path) -> None:
    """Corrupt images in every shard: if any is made again, the list stays complete and sorted."""
    path = parquet(tmp_path / "data.parquet", album, (0, 2, 7, 9), caption=["a"] * 10)
    out = shards(data=path)
    whole = files(out)
    found = [(line["index"], line["key"]) for line in rejects(out)]
    assert found == [(i, f"{i}.png") for i in (0, 2, 7, 9)]
    for lost in range(3):
        (out / f"train-{lost:05d}.parquet").unlink()
        assert files(shards(data=path)) == whole
        edit(out, lambda values, lost=lost: values["splits"]["train"]["shards"].pop(lost))
        assert files(shards(data=path)) == whole


def test_other_arguments_are_refused(
    shards: Callable[..., Path],
    refused: Any,
    tiny_tokenizer: VisualTokenizer,
    album: Path,
    tmp_path: Path,
) -> None:
    out = shards("out", "--budget", 1)
    whole = files(out)
    tiny_tokenizer.selector.shift(0.5)
    tiny_tokenizer.save_pretrained(tmp_path / "selector")
    tiny_tokenizer.quantizer.codebook.embeddings.neg_()
    tiny_tokenizer.save_pretrained(tmp_path / "codebook")
    captions = [f"caption {i}" for i in range(10)]
    for line, names in {
        "--budget 2": ["budget 1, now 2"],
        "--budget 1.0": ["budget 1, now 1.0", "batch_size None, now 3"],
        "--budget 1 --flip --shard-size 5": ["flip False, now True", "shard_size 4, now 5"],
        "--budget 1 --caption-column=": ["caption_column 'caption', now None"],
        f"--budget 1 --tokenizer {tmp_path}/selector": ["tokenizer '", "weights '"],
        f"--budget 1 --tokenizer {tmp_path}/codebook": ["tokenizer '", "fingerprint '"],
    }.items():
        message = f"error: {out}: has shards with other values of "
        refused([message, *names], "out", *line.split())
    other = parquet(tmp_path / "other.parquet", album, caption=captions)
    refused("image_column 'image', now 'photo'", "out", "--budget", 1, data=other)
    assert files(out) == whole
    shards("out", "--budget", 1, "--batch-size", 2)  # of a count, it changes nothing
    assert keys(out / "train-00000.parquet")


def test_a_full_disk_keeps_what_is_complete(
    shards: Callable[..., Path], refused: Any, tmp_path: Path, capsys: Any
) -> None:
    """At most 8 kB can be written to a file; the second shard with its long caption needs more."""
    whole, out = files(shards("whole")), tmp_path / "full"
    assert len(whole["train-00001.parquet"]) > 9000 > 8192 > len(whole["train-00000.parquet"])
    reason = f"error: {out / 'train-00001.parquet'} cannot be written: "
    with limited(resource.RLIMIT_FSIZE, 8192):
        refused([reason, "1 shards are complete"], "full")
    assert sorted(files(out)) == ["train-00000.parquet"]
    with pytest.raises(ShardError, match="are not complete; the same `lavit-tok shards` command"):
        Shards.open(out)
    assert files(shards("full")) == whole
    assert "1 of them from earlier runs" in capsys.readouterr().err


def test_a_full_file_system(shards: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """The kernel's ENOSPC, beside two loading processes: first of a shard, then of the manifest."""
    whole = files(shards("whole", "--shard-size", 2, "--num-workers", 2))
    pages = [-(-len(content) // 4096) for name, content in whole.items() if name[-4:] != "json"]
    with small_disk(tmp_path / "disk", "24k") as enlarge:
        for size in (f"{4 * sum(pages)}k", "1m"):
            out = shards("disk", "--shard-size", 2, "--num-workers", 2, code=2)
            message = capsys.readouterr().err
            assert "No space left on device" in message and "Traceback" not in message
            kept = files(out)
            assert 1 < len(kept) < len(whole) and kept.items() <= whole.items()
            enlarge(size)
        assert files(shards("disk", "--shard-size", 2, "--num-workers", 2)) == whole


def test_two_jobs_in_one_folder(shards: Callable[..., Path], refused: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    args = [sys.executable, "-c", code, str(tmp_path / "out/.lock")]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        refused("another job is writing to it")
        other.kill()
    assert Shards.open(shards()).records == 9


def test_images_that_cannot_be_used(
    shards: Callable[..., Path],
    refused: Any,
    album: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    folder = tmp_path / "bad/train"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no image")
    out = shards("bad out", "--caption-column", "", data=folder.parent, code=1)
    reason = "none of 3 images of split 'train' could be used; the first is train/0.png: not an im"
    assert reason in capsys.readouterr().err and len(rejects(out)) == 3
    with pytest.raises(ShardError, match="is empty: none of its images could be read"):
        Shards.open(out)
    refused(f"{tmp_path / 'nowhere'}: expected an image folder", data=tmp_path / "nowhere")
    (tmp_path / "names").mkdir()
    content = (album / "train/00.png").read_bytes()
    (tmp_path / "names" / os.fsdecode(b"\xff.png")).write_bytes(content)
    refused(r"names/\udcff.png: expected a name in UTF-8", data=tmp_path / "names")
    (tmp_path / "file").write_text("")
    refused(str(tmp_path / "file"), "file")
    monkeypatch.setitem(sys.modules, "lavit_tok.data.shard_writer", None)
    refused("pip install 'lavit-tok[train]'")


def test_reading_for_training(
    shards: Callable[..., Path], weights: Path, album: Path, tmp_path: Path
) -> None:
    out = shards("a [1] *", "--flip", "--shard-size", 1)  # the shard of number 2 is empty
    opened = Shards.open(str(out), "train")
    tokenizer = VisualTokenizer.from_pretrained(weights)
    opened.require(fingerprint=tokenizer.fingerprint(), codebook_size=16)
    assert (opened.split, opened.tokenizer, opened.data) == ("train", str(weights), str(album))
    assert (opened.records, opened.rejects, len(opened.files)) == (18, 1, 9)
    assert (opened.codebook_size, opened.patches, opened.budget, opened.flip) == (16, 16, None, 1)
    records = opened.dataset(tmp_path / "copies")
    assert isinstance(records, datasets.Dataset) and len(records) == 18
    assert records.column_names == ["key", "caption", "codes", "length", "keep", "flipped"]
    found = {name: records[5][name] for name in ("key", "caption", "flipped")}
    assert found == {"key": "train/03.png", "caption": "train 3", "flipped": True}
    assert sum(map(len, records["codes"])) == opened.codes == sum(records["length"])
    assert Shards.open(out, "train", verify=False) == opened
    header, codes = read_codes(out / "train-00000.parquet")  # so `lavit-tok decode` draws it
    assert header == CodeFileHeader(str(weights), 16, 16, opened.fingerprint)
    assert list(codes)[1] == CodeRecord(records[1]["key"], records[1]["codes"], records[1]["keep"])


def test_shards_of_another_tokenizer(shards: Callable[..., Path], weights: Path) -> None:
    out = shards()
    opened = Shards.open(out)
    with pytest.raises(ShardError) as caught:
        opened.require(fingerprint="0123456789abcdef")
    message = str(caught.value)
    assert message == (
        f"{out}: expected codebook fingerprint 0123456789abcdef, got {opened.fingerprint} of "
        f"tokenizer '{weights}': the codes index another codebook, so the language model "
        "would learn unrelated images"
    )
    with pytest.raises(ShardError, match="expected codebook size 1024, got 16"):
        opened.require(fingerprint=opened.fingerprint, codebook_size=1024)


def test_files_that_are_not_what_the_manifest_says(shards: Callable[..., Path]) -> None:
    out = shards()
    path, whole = out / "train-00001.parquet", files(out)
    table, int32 = pq.ParquetFile(path).read(), pa.int32()
    own = whole[path.name]

    def refused(reason: str, verify: bool = True) -> None:
        with pytest.raises(ShardError) as caught:
            Shards.open(out, verify=verify)
        assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)

    path.unlink()
    refused("missing, though manifest.json lists it")
    for content in (own[:-20], b"", own[:300] + b"\0" + own[301:]):
        path.write_bytes(content)
        refused("truncated or altered: its sha256 is")
    path.write_bytes(own[:-20])
    refused("truncated or altered", verify=False)
    path.write_bytes(whole["train-00000.parquet"])
    refused("has 3 records, 4 are listed in manifest.json", verify=False)

    def forged(reason: str, length: Any = (1, 1, 1, 1), kind: Any = int32, **lists: Any) -> None:
        """A shard with the sha256 and records of the manifest, but with invalid content."""
        new = {"length": pa.array(length, kind)}
        for name, first in lists.items():
            new[name] = pa.array([first, [1], [2], [3]], pa.list_(int32))
        columns = {name: new.get(name, table[name]) for name in table.column_names}
        pq.write_table(pa.table(columns).replace_schema_metadata(table.schema.metadata), path)
        edit(out, lambda values: values["splits"]["train"]["shards"][1].update(sha256=sha256(path)))
        refused(reason)
        for name, content in whole.items():
            (out / name).write_bytes(content)

    for name, content in whole.items():
        (out / name).write_bytes(content)
    forged("a record without codes", [0, 1, 1, 1], codes=[], keep=[])
    forged("a record without codes", [None, 1, 1, 1])
    forged("codes: expected 0..15, got 1..16", codes=[16], keep=[0])
    forged("codes: expected 0..15, got -1..3", codes=[None], keep=[0])
    forged("keep: expected 0..15, got 1..99", codes=[0], keep=[99])
    forged("codes: their number differs from the record's length", codes=[0, 1], keep=[0])
    forged("keep: their number differs from the record's length", codes=[0], keep=[0, 1])
    forged("expected columns", kind=pa.int64())
    assert Shards.open(out).records == 9


def test_manifests_that_cannot_be_read(
    shards: Callable[..., Path], refused: Any, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match="not a folder of shards: No such file"):
        Shards.open(tmp_path / "nowhere")
    out = shards()
    with pytest.raises(ShardError, match="expected a split 'test', got train"):
        Shards.open(out, "test")
    text = (out / "manifest.json").read_text()
    old = "version 3: it is lavit_tok.shards version 1; make the shards again"
    for change, reason in (
        (lambda v: v.update(version=1), old),
        (lambda v: v.pop("format"), "KeyError: 'format'"),
        (lambda v: v.update(codebook_size="16"), "codebook_size should be int, got '16'"),
        (lambda v: v.update(flip=0), "flip should be bool, got 0"),
        (lambda v: v.update(budget="all"), "budget should be int | float | None, got 'all'"),
        (lambda v: v.update(shard_size=0), "shard_size should be at least 1"),
        (lambda v: v["splits"]["train"].pop("images"), "images should be int, got None"),
        (lambda v: v["splits"]["train"].update(shards=[7]), "AttributeError"),
        (lambda v: v["splits"].update(train=[]), "AttributeError"),
    ):
        edit(out, change)
        with pytest.raises(ShardError, match=re.escape(reason)) as caught:
            Shards.open(out)
        assert str(caught.value).startswith(f"{out / 'manifest.json'}: expected a manifest")
        (out / "manifest.json").write_text(text)
    (out / "manifest.json").write_text(text[:100])
    with pytest.raises(ShardError, match="expected a manifest"):
        Shards.open(out)
    refused("expected a manifest")  # nor does a job write over what it does not understand
    (out / "manifest.json").write_text(text)
    edit(out, lambda v: v["splits"]["train"]["shards"][0].update(file="../elsewhere.parquet"))
    with pytest.raises(ShardError, match="has shards of 10 of 10 images in manifest"):
        Shards.open(out)
