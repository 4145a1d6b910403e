"""`shards` from and to object stores: the same files as from and to folders, by both engines.

memory:// and file:// are always tested; s3:// by moto's server, where it, s3fs and Ray are
installed (CONTRIBUTING.md has the commands).
"""

from __future__ import annotations

import json
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from robustness.small import files, image

from lavit_tok import VisualTokenizer
from lavit_tok.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
CORRUPT = 2
Job = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of their own for the copies of `datasets`."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # refuses copies from any URL
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket on this machine."""
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("upath", reason="universal-pathlib is not installed")
    with pytest.MonkeyPatch.context() as patch:
        running = server.ThreadedMotoServer(port=0)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        running.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new folder in a store."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory://bucket"
    return f"{root}/{uuid.uuid4()}"


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ with captions in train/ and validation/, number 2 corrupt; texts/ with a text file
    beside some images; tars/; parquet/ of images, and one of paths."""
    folder = tmp_path_factory.mktemp("album")
    for name, count in (("images/train", 10), ("images/validation", 3), ("texts", 6)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image(i).save(folder / name / f"{i}[{i}] *.png")  # no patterns
    lines = [{"file_name": f"{i}[{i}] *.png", "caption": f"text {i}"} for i in range(10)]
    for split, count in (("train", 10), ("validation", 3)):
        path = folder / "images" / split / "metadata.jsonl"
        path.write_text("\n".join(map(json.dumps, lines[:count])))
    (folder / f"images/train/{CORRUPT}[{CORRUPT}] *.png").write_bytes(b"no image")
    (folder / "texts/1[1] *.txt").write_text("a text\n")
    (folder / "tars").mkdir()
    for part in range(2):
        with tarfile.open(folder / f"tars/{part}.tar", "w") as tar:
            for i in range(part * 5, part * 5 + 5):
                tar.add(folder / f"images/train/{i}[{i}] *.png", f"{i:02d}.png")
    (folder / "parquet").mkdir()
    contents = [path.read_bytes() for path in sorted((folder / "images/train").glob("*.png"))]
    for part in range(2):
        part_contents = [{"bytes": content, "path": None} for content in contents[5 * part :][:5]]
        table = pa.table({"key": [f"{part}{i}" for i in range(5)], "image": part_contents})
        pq.write_table(table, folder / f"parquet/{part}.parquet")
    return folder


@pytest.fixture
def job(shared_tokenizer: VisualTokenizer, tmp_path: Path, capsys: Any) -> Job:
    """Runs `shards` with four images per shard; returns what it printed."""
    shared_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(data: Any, out: Any, *more: Any, code: int = 0) -> str:
        args = ["shards", data, "--out", out, "--tokenizer", tmp_path / "tokenizer"]
        args += ["--shard-size", 4, "--batch-size", 3, *more]
        capsys.readouterr()
        assert main(list(map(str, args))) == code
        return capsys.readouterr().err

    return run


def upload(folder: Path, url: str) -> str:
    fs, root = fsspec.url_to_fs(url)
    for name, content in files(folder).items():
        fs.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)
    return url


def stored(url: str) -> dict[str, bytes]:
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(root)[1:]: fs.cat_file(name) for name in fs.find(root)}


def without_data(content: dict[str, bytes]) -> dict[str, Any]:
    """Files, of the manifest all but the names of the data set."""
    manifest = json.loads(content["manifest.json"])
    for split in manifest["splits"].values():
        del split["data"]
    return {**content, "manifest.json": manifest}


SOURCES = {
    "images": [],
    "texts": [],
    "images as a stream": ["--streaming"],
    "tars": ["--streaming"],
    "parquet": ["--streaming"],
    "parquet, copied": ["--split", "train"],
}


def check_source(name: str, store: str, album: Path, job: Job, tmp_path: Path, *more: Any) -> None:
    folder = name.partition(",")[0].partition(" ")[0]
    options = SOURCES[name]
    url = upload(album / folder, f"{store}/{folder}")
    job(album / folder, tmp_path / "whole", *options)
    assert " skipped" in (text := job(url, tmp_path / "out", *options, *more)) or name == "texts"
    assert "Traceback" not in text
    whole, out = files(tmp_path / "whole"), files(tmp_path / "out")
    assert without_data(out) == without_data(whole) and len(whole) >= 3
    job(url, tmp_path / "out", *options, *more)  # nothing to do, and the source is compared
    assert files(tmp_path / "out") == out


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name: str, store: str, album: Path, job: Job, tmp_path: Path) -> None:
    check_source(name, store, album, job, tmp_path)


def test_a_source_that_changes_or_is_not_there(
    store: str, album: Path, job: Job, tmp_path: Path
) -> None:
    url = upload(album / "texts", f"{store}/texts")
    job(url, tmp_path / "out", "--split", "train")
    whole = files(tmp_path / "out")
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/1[1] *.png", b"another image")
    message = job(url, tmp_path / "out", "--split", "train", code=2)
    assert "train-00000.parquet: its images have other keys, captions or file sizes" in message
    assert files(tmp_path / "out") == whole
    for absent in (f"{store}/absent", f"{store}/absent.parquet"):
        message = job(absent, tmp_path / "absent", code=2)
        assert message.startswith(f"lavit-tok: error: {absent}: expected an image folder")
        assert message.count("\n") == 1


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_output(
    kind: str, album: Path, job: Job, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("upath", reason="universal-pathlib is not installed")
    root = request.getfixturevalue("s3") if kind == "s3" else "memory://bucket"
    out = f"{root}/{uuid.uuid4()}"
    job(album / "images", tmp_path / "whole", "--budget", 0.4)
    whole = files(tmp_path / "whole")
    assert job(album / "images", out, "--budget", 0.4).endswith(f"wrote shards to {out}\n")
    assert stored(out) == whole and len(whole) == 6
    fs, path = fsspec.url_to_fs(out)
    fs.rm_file(f"{path}/train-00001.parquet")
    fs.rm_file(f"{path}/train.rejects.jsonl")
    fs.pipe_file(f"{path}/train-00002.parquet", whole["train-00002.parquet"][:-40])
    assert main(["shards", "verify", out]) == 2
    assert "1 of them from earlier runs" in job(album / "images", out, "--budget", 0.4)
    assert stored(out) == whole
    fs.rm_file(f"{path}/manifest.json")
    assert main(["shards", "verify", out]) == 0
    assert stored(out).keys() == whole.keys()
    message = job(album / "images", out, code=2)
    assert f"{out}: has shards with other values of budget 0.4, now None" in message


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_two_jobs_write_to_one_place(
    kind: str,
    album: Path,
    job: Job,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another job has put after this one has looked is kept if equal, and an error if not."""
    pytest.importorskip("upath", reason="universal-pathlib is not installed")
    from lavit_tok.data import shard_writer

    root = request.getfixturevalue("s3") if kind == "s3" else "memory://bucket"
    job(album / "images", tmp_path / "whole", "--split", "train")
    job(album / "images", tmp_path / "other", "--split", "train", "--budget", 2)
    whole, other = files(tmp_path / "whole"), files(tmp_path / "other")
    name = "train-00001.parquet"

    def look(first: dict[str, bytes]) -> Callable[..., dict[str, Any]]:
        def existing(folder: Any, split: str) -> dict[str, Any]:
            (folder / name).write_bytes(first[name])
            return {}

        return existing

    for first, code in ((whole, 0), (other, 2)):
        out = f"{root}/{uuid.uuid4()}"
        monkeypatch.setattr(shard_writer, "existing_shards", look(first))
        message = job(album / "images", out, "--split", "train", code=code)
        if code == 0:
            assert stored(out) == whole
        else:
            assert f"{out}/{name}: another job has written it meanwhile" in message
            assert stored(out)[name] == other[name] and "manifest.json" not in stored(out)


def test_stores_that_cannot_be_opened(album: Path, job: Job, monkeypatch: Any) -> None:
    message = job(album / "images", "absent://a/b", code=2)
    assert "absent" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", ["images", "tars", "parquet"])
def test_ray(name: str, s3: str, album: Path, job: Job, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    store = f"{s3}/{uuid.uuid4()}"
    check_source(name, store, album, job, tmp_path, "--engine", "ray")
    if name == "images":
        job(f"{store}/images", f"{store}/out", "--engine", "ray")
        assert stored(f"{store}/out") == files(tmp_path / "out")
