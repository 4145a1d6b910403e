"""`lavit-tok shards` and its reader: the drawing, resuming after any kill, and every error."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import lavit_tok
from lavit_tok import ShardError, Shards, VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.data.code_files import CodeFileHeader, CodeRecord, read_codes
from lavit_tok.data.shard_manifest import Manifest, sha256
from lavit_tok.encode.image_processor import open_image

README = (Path(__file__).parents[3] / "README.md").read_text()
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
    noise = (
        np.random.default_rng(0).bytes(20_000).hex()
    )  # which does not compress to less than its 20 kB
    for split, count in (("train", 10), ("validation", 2)):
        (folder / split).mkdir()
        lines = []
        for i in range(count):
            left = 20 * i if split == "train" else 100
            image = images[i % 4].crop((left, 0, left + 200, 160)).resize((40, 32))
            image.save(folder / split / f"{i:02d}.png")
            lines.append(
                {
                    "file_name": f"{i:02d}.png",
                    "caption": noise if i == 5 else f"{split} {i}" if i else None,
                }
            )
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
        args = [
            "shards",
            data,
            "--out",
            tmp_path / out,
            "--tokenizer",
            weights,
            "--shard-size",
            4,
            "--batch-size",
            3,
        ]
        args += ["--split", split] if split else []
        assert main([str(word) for word in [*args, *more]]) == code
        return tmp_path / out

    return run


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
    assert (
        "train: 9 records of 10 images" in message
        and f"1 skipped, listed in {out}/train.rejects.jsonl" in message
    )
    names = [f"train-{i:05d}.parquet" for i in range(3)]
    assert sorted(files(out)) == ["manifest.json", *names, "train.rejects.jsonl"]
    assert [keys(out / name) for name in names] == [
        ["00", "01", "03"],
        ["04", "05", "06", "07"],
        ["08", "09"],
    ]

    tokenizer = VisualTokenizer.from_pretrained(weights)
    records = [record for name in names for record in pq.ParquetFile(out / name).read().to_pylist()]
    codes = tokenizer.encode([album / record["key"] for record in records])
    assert codes.keep is not None
    assert [record["codes"] for record in records] == codes.to_list()
    assert [record["length"] for record in records] == codes.lengths.tolist()
    assert [record["keep"] for record in records] == [
        mask.nonzero().flatten().tolist() for mask in codes.keep
    ]
    assert [record["caption"] for record in records if len(record["caption"]) < 99] == [
        "",
        *(f"train {i}" for i in (1, 3, 4, 6, 7, 8, 9)),
    ]
    schema = {
        "key": "string",
        "caption": "string",
        "codes": "list<element: int32>",
        "length": "int32",
    }
    found = pq.ParquetFile(out / names[0]).schema_arrow
    assert {f.name: str(f.type) for f in found} == schema | {"keep": "list<element: int32>"}

    both = shards("both", "--flip")
    assert [keys(both / name) for name in names] == [
        ["00", "00", "01", "01", "03", "03"],
        [f"0{i // 2}" for i in range(8, 16)],
        ["08", "08", "09", "09"],
    ]
    flipped = [
        record for name in names for record in pq.ParquetFile(both / name).read().to_pylist()
    ]
    assert [record.pop("flipped") for record in flipped] == [False, True] * 9
    assert flipped[::2] == records
    arrays = [np.asarray(open_image(album / record["key"]))[:, ::-1].copy() for record in records]
    assert (
        [record["codes"] for record in flipped[1::2]]
        == tokenizer.encode(arrays).to_list()
        != codes.to_list()
    )


def test_manifest_and_rejects(shards: Callable[..., Path], weights: Path, album: Path) -> None:
    out = shards()
    values = json.loads((out / "manifest.json").read_text())
    (split,) = values["splits"].values()
    listed = split.pop("shards")
    tokenizer = VisualTokenizer.from_pretrained(weights)
    assert (values["format"], values["version"]) == ("lavit_tok.shards", 3)
    assert (values["tokenizer"], values["fingerprint"]) == (str(weights), tokenizer.fingerprint())
    assert (values["codebook_size"], values["patches"], values["budget"], values["flip"]) == (
        16,
        16,
        None,
        False,
    )
    assert (split["data"], split["images"], split["caption_column"]) == (str(album), 10, "caption")
    for shard in listed:
        table = pq.ParquetFile(out / shard["file"]).read()
        assert (shard["records"], shard["codes"]) == (len(table), sum(table["length"].to_pylist()))
        assert shard["sha256"] == sha256(out / shard["file"])
    assert [shard["rejects"] for shard in listed] == [1, 0, 0]
    (line,) = (out / "train.rejects.jsonl").read_text().splitlines()
    reason = "not an image in a format that Pillow supports"
    assert json.loads(line) == {"key": "train/02.png", "reason": reason, "index": CORRUPT}


def test_neither_processes_nor_the_place_of_the_data_matter(
    shards: Callable[..., Path], album: Path, tmp_path: Path
) -> None:
    alone = files(shards("alone", "--flip", "--budget", 0.25))
    assert files(shards("together", "--flip", "--budget", 0.25, "--num-workers", 2)) == alone
    import shutil

    moved = shards(
        "moved", "--flip", "--budget", 0.25, data=shutil.copytree(album, tmp_path / "moved album")
    )
    there = files(moved)
    assert {name: there[name] for name in there if name != "manifest.json"} == {
        name: alone[name] for name in alone if name != "manifest.json"
    }
    before = files(shards("alone", "--flip", "--budget", 0.25, data=tmp_path / "moved album"))
    assert before == alone  # the same data set elsewhere: nothing to do


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
    lengths = [
        pq.ParquetFile(p).read(["length"])["length"].to_pylist()
        for p in sorted(shards("5", "--budget", 5).glob("*.parquet"))
    ]
    assert lengths == [[5] * 3, [5] * 4, [5] * 2]
    assert Shards.open(shards("half", "--budget", 0.5)).codes == 8 * 9


def test_splits_share_a_manifest(shards: Callable[..., Path]) -> None:
    apart = shards("apart", split="validation")
    shards("apart", split="train")
    together = shards("together", split=None)
    first, second = (Manifest.read(out) for out in (apart, together))
    assert (first.config, first.splits) == (second.config, second.splits)
    assert list(first.splits) == ["validation", "train"]
    assert (
        Shards.open(together, "train").records,
        Shards.open(together, "validation").records,
    ) == (9, 2)
    assert not (together / "validation.rejects.jsonl").exists()


def parquet(
    path: Path, album: Path, corrupt: tuple[int, ...] = (CORRUPT,), **columns: list[Any]
) -> Path:
    """Ten images of the album as bytes, with the given columns of text or numbers."""
    images = [
        {"bytes": (album / f"train/{i:02d}.png").read_bytes(), "path": f"{i}.png"}
        for i in range(10)
    ]
    images = [p | {"bytes": p["bytes"][:40]} if i in corrupt else p for i, p in enumerate(images)]
    records = datasets.Dataset.from_dict({"photo": images, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    records.cast_column("photo", datasets.Image(decode=False)).to_parquet(path)
    return path


def test_parquet_and_its_columns(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
) -> None:
    numbers = list(range(100, 110))
    texts = [f"text {i}" for i in range(10)]
    path = parquet(
        tmp_path / "data/a.parquet",
        album,
        text=texts,
        number=numbers,
        id=[f"id {i}" for i in range(10)],
    )
    good = [i for i in range(10) if i != CORRUPT]

    def records(out: Path) -> list[tuple[str, str]]:
        return [
            (record["key"], record["caption"])
            for record in Shards.open(out).dataset(tmp_path / "copies")
        ]

    assert records(shards("found", data=path)) == [(f"id {i}", f"text {i}") for i in good]
    named = shards(
        "named",
        "--caption-column",
        "id",
        "--key-column",
        "number",
        "--image-column",
        "photo",
        data=path,
    )
    assert records(named) == [(str(100 + i), f"id {i}") for i in good]
    assert json.loads((named / "train.rejects.jsonl").read_text())["key"] == "102"
    assert records(shards("silent", "--caption-column", "", data=path)) == [
        (f"id {i}", "") for i in good
    ]
    capsys.readouterr()
    for args, reason in (
        (
            ["--caption-column", "title"],
            "expected a caption column 'title' of text, got columns photo, text, number, id",
        ),
        (["--caption-column", "number"], "expected a caption column 'number' of text"),
        (
            ["--key-column", "name"],
            "expected a key column 'name', got columns photo, text, number, id",
        ),
        (["--split", "test"], "expected a split 'test', got train"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
    ):
        shards("refused", *args, data=path, code=2)
        message = capsys.readouterr().err
        assert reason in message and message.count("\n") == 1
    assert not (tmp_path / "refused").exists() or not files(tmp_path / "refused")


KILLS = """
import os, signal, sys, time
from pathlib import Path
from lavit_tok import Shards
# The reader alone imports nothing heavy
assert not {"datasets", "pytorch_lightning", "diffusers"} & {*sys.modules}
from lavit_tok import VisualTokenizer
from lavit_tok.cli import main
from lavit_tok.data.image_sources import load_splits

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
    options = ["--shard-size", "2"]
    whole, out = shards("whole", *options), tmp_path / "killed"
    args = [
        "shards",
        album,
        "--out",
        out,
        "--tokenizer",
        weights,
        "--batch-size",
        3,
        "--split",
        "train",
        *options,
    ]
    shown = subprocess.run(
        [sys.executable, "-c", KILLS, *map(str, [out, album, weights, *args])],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines, shown.stderr
    assert lines[0][:2] == ["killed", "-9"] and int(lines[0][2]) < 5  # really in the middle
    assert lines[-1][:2] == ["ended", "0"], shown.stderr
    assert len(lines) >= 5 and all(line[:2] == ["killed", "-9"] for line in lines[:-1])
    assert any(
        int(line[3]) for line in lines[1:-1]
    )  # half-written files were left behind, and then removed
    assert files(out) == files(whole)


def test_damage_is_mended(shards: Callable[..., Path], capsys: Any) -> None:
    out = shards()
    whole = files(out)

    def again(expected: str) -> None:
        capsys.readouterr()
        shards()
        assert files(out) == whole
        assert expected in capsys.readouterr().err

    stamps = {name: (out / name).stat().st_mtime_ns for name in whole}
    again("3 of them from earlier runs")
    assert {
        name: (out / name).stat().st_mtime_ns for name in whole
    } == stamps  # nothing is written twice
    (out / "train-00001.parquet").unlink()
    again("2 of them from earlier runs")
    (out / "train-00000.parquet").write_bytes(whole["train-00000.parquet"][:-9])
    again("2 of them from earlier runs")
    (out / "train-00000.parquet").write_bytes(whole["train-00001.parquet"][:300] + b"\0" * 3000)
    again("2 of them from earlier runs")
    damaged = bytearray(whole["train-00000.parquet"])
    damaged[200] ^= 1
    (out / "train-00000.parquet").write_bytes(damaged)
    again("2 of them from earlier runs")
    (out / "train.rejects.jsonl").unlink()
    again("3 of them from earlier runs")
    (out / "train.rejects.jsonl").write_text('{"key": "train/02.png", "rea')
    again("3 of them from earlier runs")
    (out / ".train-00002.parquet.1.part").write_text("half")
    again("3 of them from earlier runs")
    edit(out, lambda values: values["splits"]["train"]["shards"].pop())
    again("3 of them from earlier runs")
    (out / "manifest.json").unlink()  # killed before the manifest was moved
    again("3 of them from earlier runs")


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
    import pickle

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
    import tarfile

    import fsspec

    folder = tmp_path / "tars"
    folder.mkdir()
    for part, numbers in enumerate((range(5), range(5, 10))):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for i in numbers:
                (tmp_path / "text").write_text(f"text {i}")
                tar.add(album / f"train/{i:02d}.png", f"{i:02d}.png")
                tar.add(tmp_path / "text", f"{i:02d}.txt")
    out = shards("tars", "--streaming", data=folder)
    records = Shards.open(out).dataset(tmp_path / "copies")
    good = [i for i in range(10) if i != CORRUPT]
    assert records["key"][:] == [f"{i:02d}" for i in good]
    assert records["caption"][:] == [f"text {i}" for i in good]
    assert json.loads((out / "train.rejects.jsonl").read_text())["key"] == f"{CORRUPT:02d}"
    path = parquet(tmp_path / "a.parquet", album, text=[f"text {i}" for i in range(10)])
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/bucket/a.parquet")
    capsys.readouterr()
    out = shards("url", "--streaming", data="memory://bucket/a.parquet")
    assert "9 records of 10 images" in capsys.readouterr().err
    records = Shards.open(out).dataset(tmp_path / "copies")
    assert records["caption"][:] == [f"text {i}" for i in good]


def test_keys_that_occur_twice_and_addresses_without_data(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
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
        shards("absent", "--streaming", data=url, code=2)
        message = capsys.readouterr().err
        assert message.startswith(f"lavit-tok: error: {url}: expected an image folder")
        assert message.count("\n") == 1 and f"Unable to find '{url}'" in message


def test_streams_without_examples_and_damaged_ones(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
) -> None:
    """A tar without members has one empty shard; one that cannot be read ends the job."""
    import tarfile

    folder = tmp_path / "tars"
    folder.mkdir()
    for part, numbers in enumerate((range(5), range(0))):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for i in numbers:
                tar.add(album / f"train/{i:02d}.png", f"{i:02d}.png")
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


def test_a_changed_data_set_is_refused(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
) -> None:
    texts = [f"text {i}" for i in range(10)]
    out = shards(data=parquet(tmp_path / "data.parquet", album, text=texts))
    whole = files(out)
    for count in (8, 4):  # whole shards less
        path = tmp_path / f"{count}.parquet"
        pq.write_table(pq.read_table(tmp_path / "data.parquet")[:count], path)
        shards(data=path, code=2)
        assert f"images than the {count} of {path}" in capsys.readouterr().err
    texts[9] = "changed"
    changed = parquet(tmp_path / "changed.parquet", album, text=texts)
    shards(data=changed, code=2)
    message = capsys.readouterr().err
    assert "train-00002.parquet: its images have other keys, captions or file sizes" in message
    assert files(out) == whole


def test_streams_give_the_same_records(
    shards: Callable[..., Path], album: Path, tmp_path: Path, capsys: Any
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
    rejects = (out / "train.rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in rejects] == [2, 12, 22]
    assert files(shards("workers", "--streaming", "--num-workers", 2, data=folder)) == whole
    for lost in names[:8]:
        (out / lost).unlink()
    for lost in ([0], [1], [2], [0, 5], [3, 4, 7], [6]):
        for i in lost:
            (out / names[i]).unlink(missing_ok=True)
        assert files(shards("stream", "--streaming", data=folder)) == whole
    (out / names[2]).unlink()
    path = folder / "train-0.parquet"
    pq.write_table(pq.read_table(path)[1:], path)
    shards("stream", "--streaming", data=folder, code=2)
    assert f"{names[0]}: its images have other keys" in capsys.readouterr().err


def test_rejects_are_never_lost(shards: Callable[..., Path], album: Path, tmp_path: Path) -> None:
    """Corrupt images in every shard: if any is made again, the list stays complete and sorted."""
    path = parquet(tmp_path / "data.parquet", album, (0, 2, 7, 9), caption=["a"] * 10)
    out = shards(data=path)
    whole = files(out)
    lines = [json.loads(line) for line in (out / "train.rejects.jsonl").read_text().splitlines()]
    assert [(line["index"], line["key"]) for line in lines] == [
        (i, f"{i}.png") for i in (0, 2, 7, 9)
    ]
    for lost in range(3):
        (out / f"train-{lost:05d}.parquet").unlink()
        assert files(shards(data=path)) == whole
        edit(out, lambda values, lost=lost: values["splits"]["train"]["shards"].pop(lost))
        assert files(shards(data=path)) == whole


def test_other_arguments_are_refused(
    shards: Callable[..., Path],
    tiny_tokenizer: VisualTokenizer,
    album: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    out = shards("out", "--budget", 1)
    whole = files(out)
    tiny_tokenizer.selector.shift(0.5)
    tiny_tokenizer.save_pretrained(tmp_path / "other selector")
    tiny_tokenizer.quantizer.codebook.embeddings.neg_()
    tiny_tokenizer.save_pretrained(tmp_path / "other codebook")
    other = parquet(tmp_path / "other.parquet", album, caption=[f"caption {i}" for i in range(10)])
    for args, names in (
        (["--budget", 2], ["budget 1, now 2"]),
        (["--budget", "1.0"], ["budget 1, now 1.0", "batch_size None, now 3"]),
        (
            ["--budget", 1, "--flip", "--shard-size", 5],
            ["flip False, now True", "shard_size 4, now 5"],
        ),
        (["--budget", 1, "--caption-column", ""], ["caption_column 'caption', now None"]),
        (["--budget", 1, "--tokenizer", tmp_path / "other selector"], ["tokenizer '", "weights '"]),
        (
            ["--budget", 1, "--tokenizer", tmp_path / "other codebook"],
            ["tokenizer '", "fingerprint '"],
        ),
    ):
        capsys.readouterr()
        shards("out", *args, code=2)
        message = capsys.readouterr().err
        assert (
            message.startswith(f"lavit-tok: error: {out}: has shards with other values of ")
            and message.count("\n") == 1
        )
        assert all(name in message for name in names)
    shards("out", "--budget", 1, data=other, code=2)
    message = capsys.readouterr().err
    assert "image_column 'image', now 'photo'" in message
    assert files(out) == whole
    assert keys(
        shards("out", "--budget", 1, "--batch-size", 2) / "train-00000.parquet"
    )  # that one is free


def test_a_full_disk_keeps_what_is_complete(
    shards: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """At most 8 kB can be written to a file; the second shard with its long caption needs more."""
    whole = files(shards("whole"))
    assert len(whole["train-00001.parquet"]) > 9000 > 8192 > len(whole["train-00000.parquet"])
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        out = shards("full", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert message.startswith(
        f"lavit-tok: error: {out / 'train-00001.parquet'} cannot be written: "
    )
    assert "1 shards are complete" in message and message.count("\n") == 1
    assert sorted(files(out)) == ["train-00000.parquet"]
    with pytest.raises(ShardError, match="are not complete; the same `lavit-tok shards` command"):
        Shards.open(out)
    assert files(shards("full")) == whole
    assert "1 of them from earlier runs" in capsys.readouterr().err


def test_two_jobs_in_one_folder(shards: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    args = [sys.executable, "-c", code, str(tmp_path / "out/.lock")]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        shards(code=2)
        assert "another job is writing to it" in capsys.readouterr().err
        other.kill()
    assert Shards.open(shards()).records == 9


def test_images_that_cannot_be_used(
    shards: Callable[..., Path], album: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = tmp_path / "bad/train"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no image")
    out = shards("bad out", "--caption-column", "", data=folder.parent, code=1)
    message = capsys.readouterr().err
    assert (
        "none of 3 images of split 'train' could be used; the first is train/0.png: not an image"
        in message
    )
    assert len((out / "train.rejects.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ShardError, match="is empty: none of its images could be read"):
        Shards.open(out)
    shards(data=tmp_path / "nowhere", code=2)
    assert f"{tmp_path / 'nowhere'}: expected an image folder" in capsys.readouterr().err
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / os.fsdecode(b"\xff.png")).write_bytes(
        (album / "train/00.png").read_bytes()
    )
    shards(data=tmp_path / "names", code=2)
    assert r"names/\udcff.png: expected a name in UTF-8" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    shards("file", code=2)
    assert str(tmp_path / "file") in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lavit_tok.data.shard_writer", None)
    shards(code=2)
    assert "pip install 'lavit-tok[train]'" in capsys.readouterr().err


def test_words_that_are_refused(capsys: Any) -> None:
    for args, reason in (
        ("a --shard-size 0", "at least 1"),
        ("a --num-workers -1", "at least 0"),
        ("a", "--out"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["shards", *args.split()])
        assert caught.value.code == 2 and reason in capsys.readouterr().err


def test_reading_for_training(
    shards: Callable[..., Path], weights: Path, album: Path, tmp_path: Path
) -> None:
    out = shards(
        "a [1] *", "--flip", "--shard-size", 1
    )  # number 2 has a shard of its own, which is empty
    opened = Shards.open(str(out), "train")
    tokenizer = VisualTokenizer.from_pretrained(weights)
    opened.require(fingerprint=tokenizer.fingerprint(), codebook_size=16)
    assert (opened.split, opened.tokenizer, opened.data) == ("train", str(weights), str(album))
    assert (opened.records, opened.rejects, len(opened.files)) == (18, 1, 9)
    assert (opened.codebook_size, opened.patches, opened.budget, opened.flip) == (
        16,
        16,
        None,
        True,
    )
    records = opened.dataset(tmp_path / "copies")
    assert isinstance(records, datasets.Dataset) and len(records) == 18
    assert records.column_names == ["key", "caption", "codes", "length", "keep", "flipped"]
    assert (
        records[5]["key"] == "train/03.png"
        and records[5]["flipped"]
        and records[5]["caption"] == "train 3"
    )
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

    def refused(reason: str, verify: bool = True) -> None:
        with pytest.raises(ShardError) as caught:
            Shards.open(out, verify=verify)
        assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)

    def restored() -> None:
        for name, content in whole.items():
            (out / name).write_bytes(content)

    path.unlink()
    refused("missing, though manifest.json lists it")
    for content in (
        whole[path.name][:-20],
        b"",
        whole[path.name][:300] + b"\0" + whole[path.name][301:],
    ):
        path.write_bytes(content)
        refused("truncated or altered: its sha256 is")
    path.write_bytes(whole[path.name][:-20])
    refused("truncated or altered", verify=False)
    path.write_bytes(whole["train-00000.parquet"])
    refused("has 3 records, 4 are listed in manifest.json", verify=False)
    restored()

    table = pq.ParquetFile(path).read()
    numbers = pa.list_(pa.int32())

    def forged(reason: str, **columns: Any) -> None:
        """A shard with the sha256 and records of the manifest, but with invalid content."""
        new = table
        for name, values in columns.items():
            new = new.set_column(new.schema.get_field_index(name), name, values)
        pq.write_table(new, path)
        edit(out, lambda values: values["splits"]["train"]["shards"][1].update(sha256=sha256(path)))
        refused(reason)
        restored()

    def lists(first: list[int | None]) -> Any:
        return pa.array([first, [1], [2], [3]], numbers)

    ones = pa.array([1, 1, 1, 1], pa.int32())
    forged(
        "a record without codes",
        codes=lists([]),
        keep=lists([]),
        length=pa.array([0, 1, 1, 1], pa.int32()),
    )
    forged("a record without codes", length=pa.array([None, 1, 1, 1], pa.int32()))
    forged("codes: expected 0..15, got 1..16", codes=lists([16]), keep=lists([0]), length=ones)
    forged("codes: expected 0..15, got -1..3", codes=lists([None]), keep=lists([0]), length=ones)
    forged("keep: expected 0..15, got 1..99", codes=lists([0]), keep=lists([99]), length=ones)
    forged(
        "codes: their number differs from the record's length",
        codes=lists([0, 1]),
        keep=lists([0]),
        length=ones,
    )
    forged(
        "keep: their number differs from the record's length",
        codes=lists([0]),
        keep=lists([0, 1]),
        length=ones,
    )
    forged("expected columns", length=pa.array([1, 1, 1, 1], pa.int64()))
    assert Shards.open(out).records == 9


def test_manifests_that_cannot_be_read(
    shards: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(ShardError, match="not a folder of shards: No such file"):
        Shards.open(tmp_path / "nowhere")
    out = shards()
    with pytest.raises(ShardError, match="expected a split 'test', got train"):
        Shards.open(out, "test")
    text = (out / "manifest.json").read_text()
    for change, reason in (
        (
            lambda v: v.update(version=1),
            "version 3: it is lavit_tok.shards version 1; make the shards again",
        ),
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
        with pytest.raises(ShardError) as caught:
            Shards.open(out)
        assert str(caught.value).startswith(
            f"{out / 'manifest.json'}: expected a manifest"
        ) and reason in str(caught.value)
        (out / "manifest.json").write_text(text)
    (out / "manifest.json").write_text(text[:100])
    with pytest.raises(ShardError, match="expected a manifest"):
        Shards.open(out)
    capsys.readouterr()
    shards(code=2)  # nor does a job write over what it does not understand
    assert "expected a manifest" in capsys.readouterr().err
    (out / "manifest.json").write_text(text)
    edit(out, lambda v: v["splits"]["train"]["shards"][0].update(file="../elsewhere.parquet"))
    with pytest.raises(ShardError, match="has shards of 10 of 10 images in manifest"):
        Shards.open(out)


def test_the_readme_lists_the_command() -> None:
    assert "| `lavit-tok shards DATASET --out DIR` |" in README
    assert {"Shards", "ShardError"} <= {*lavit_tok.__all__}
    assert issubclass(ShardError, ValueError)
