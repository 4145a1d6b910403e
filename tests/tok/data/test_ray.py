"""`shards --engine ray`: the local engine's bytes, whatever dies; and every error of a cluster.

Skipped where Ray is not installed; CONTRIBUTING.md has the commands of an environment with it.
"""

from __future__ import annotations

import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from robustness.small import files, image, small_disk

from lavit_tok import TokenizeBatch, VisualTokenizer
from lavit_tok.cli import main

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}  # Ray's default is 15
ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'lavit-tok[ray]')")
pytestmark = pytest.mark.filterwarnings("ignore")
SHARDS = 12
EXAMPLE = Path(__file__).parents[3] / "examples/scale/ray_data.py"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    options = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
    context = ray.init("local", log_to_driver=False, **options)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def work(
    shared_tokenizer: VisualTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A folder with images, number 5 corrupt, some of them in two tars, a tokenizer, and shards/
    and streamed/ of the local engine; and arguments of a job, whose codes depend on the batches."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "images").mkdir()
    for i in range(4 * SHARDS):
        image(i).save(folder / f"images/{i:03d}.png")
    (folder / "images/005.png").write_bytes(b"no image")
    (folder / "tars").mkdir()
    for half in range(2):
        with tarfile.open(folder / f"tars/{half}.tar", "w") as tar:
            for i in range(half * 9, half * 9 + 9):
                tar.add(folder / f"images/{i:03d}.png", f"{i:03d}.png")
    shared_tokenizer.save_pretrained(folder / "tokenizer")
    job = ["shards", "--tokenizer", str(folder / "tokenizer"), "--split", "train", "--flip"]
    job += ["--shard-size", "4", "--batch-size", "3", "--budget", "0.4"]
    assert main([*job, str(folder / "images"), "--out", str(folder / "shards")]) == 0
    tars = [str(folder / "tars"), "--streaming", "--out", str(folder / "streamed")]
    assert main([*job, *tars]) == 0
    return folder, job


def on_ray(work: tuple[Path, list[str]], out: Path) -> list[str]:
    """A job on the images by two workers of Ray."""
    folder, job = work
    return [*job, str(folder / "images"), "--out", str(out), "--engine", "ray", "--workers", "2"]


def test_the_same_files_and_resuming_by_any_engine(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path, capsys: Any
) -> None:
    folder, job = work
    whole, out = files(folder / "shards"), tmp_path / "out"
    assert len([name for name in whole if name.endswith(".parquet")]) == SHARDS
    job = [*job, str(folder / "images"), "--out", str(out)]
    on_ray = [*job, "--engine", "ray", "--workers", "2"]
    assert main(on_ray) == 0
    assert files(out) == whole
    assert "94 records of 48 images" in capsys.readouterr().err  # 47 images and their flips
    for i, command in enumerate((job, on_ray)):
        kept = {}
        for number in range(SHARDS):
            path = out / f"train-{number:05d}.parquet"
            if number % 3 == i:
                path.unlink()
            else:
                kept[path] = path.stat().st_mtime_ns
        assert main(command) == 0
        assert f"{len(kept)} of them from earlier runs" in capsys.readouterr().err
        assert files(out) == whole
        assert {path: path.stat().st_mtime_ns for path in kept} == kept

    image(99).save(folder / "images/007.png")  # a source that has changed; shard 1 is missing
    messages = []
    try:
        (out / "train-00000.parquet").unlink()
        for command in (job, on_ray):
            assert main(command) == 2
            messages.append(capsys.readouterr().err.strip().splitlines()[-1])
    finally:
        image(7).save(folder / "images/007.png")
    assert "train-00001.parquet: its images have other keys" in messages[0]
    assert messages[1] == messages[0]


def test_streams(cluster: str, work: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, job = work
    job = [*job, str(folder / "tars"), "--streaming", "--out", str(tmp_path / "out")]
    assert main([*job, "--engine", "ray", "--workers", "2"]) == 0
    whole = files(folder / "streamed")
    assert files(tmp_path / "out") == whole and len(whole) == 8  # 2 x 3 shards
    job[-4:] = [f"file://{folder}/tars/*.tar", "--streaming", "--out", str(tmp_path / "url")]
    assert main([*job, "--engine", "ray", "--workers", "2"]) == 0
    found = files(tmp_path / "url")
    assert {name for name in whole if found[name] != whole[name]} == {"manifest.json"}


def test_decoding(
    cluster: str, work: tuple[Path, list[str]], tiny_decoder: Any, tmp_path: Path
) -> None:
    folder, _ = work
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    job = ["decode", str(folder / "streamed"), "--decoder", str(tmp_path / "decoder")]
    job += ["--steps", "1", "--format", "parquet", "--shard-size", "4", "--batch-size", "3"]
    assert main([*job, "--out", str(tmp_path / "local")]) == 0
    assert main([*job, "--out", str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"]) == 0
    whole = files(tmp_path / "local")
    assert files(tmp_path / "ray") == whole and len(whole) >= 6


def test_a_full_disk(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path, capsys: Any
) -> None:
    """The kernel's ENOSPC while two workers encode: complete shards stay as they are."""
    whole, out = files(work[0] / "shards"), tmp_path / "disk"
    job = on_ray(work, out)
    with small_disk(out, "40k") as enlarge:
        for _ in range(2):  # the second time nothing can be added
            assert main(job) == 2
            message = capsys.readouterr().err.strip().splitlines()[-1]
            assert "cannot be written: No space left on device. " in message
            kept = files(out)
            assert f"{len(kept)} shards are complete; the same command resumes" in message
            assert 1 < len(kept) < SHARDS and kept.items() <= whole.items()
        enlarge("1m")
        assert main(job) == 0
        assert f"{len(kept)} of them from earlier runs" in capsys.readouterr().err
        assert files(out) == whole


def _kill_encoders(stop: threading.Event, killed: list[int], seed: int) -> None:
    """SIGKILL to a random process that encodes, now and then; at most three."""
    draw = random.Random(seed)
    while not stop.is_set() and len(killed) < 3:
        found = [p for p in psutil.Process().children(True) if "_Worker" in _title(p)]
        if found and draw.random() < 0.3:
            process = draw.choice(found)
            process.kill()
            killed.append(process.pid)
        time.sleep(0.1)


def _title(process: Any) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def test_killed_actors_and_drivers(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path, capsys: Any
) -> None:
    whole, out = files(work[0] / "shards"), tmp_path / "out"
    job = on_ray(work, out)
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=_kill_encoders, args=(stop, killed, 0))
    killer.start()
    try:
        assert main(job) == 0
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 3
    assert files(out) == whole
    for number in range(SHARDS):
        (out / f"train-{number:05d}.parquet").unlink()
    program = "import sys; from lavit_tok.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", program, *job, "--address", cluster]) as driver:
        while not (found := [*out.glob("*.parquet")]) and driver.poll() is None:
            time.sleep(0.02)
        capsys.readouterr()
        assert main(job) == 2  # two drivers: the second is refused
        assert "another job is writing to it" in capsys.readouterr().err
        driver.send_signal(signal.SIGKILL)
    assert found and driver.returncode == -signal.SIGKILL
    assert main(job) == 0
    assert files(out) == whole


def test_clusters_that_would_make_other_codes(
    cluster: str,
    work: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """The driver's expectations are changed, so that its workers are the ones that differ."""
    from lavit_tok.data import ray_engine, shard_writer

    folder, job = work
    job = [*job, str(folder / "images"), "--out", str(tmp_path / "out"), "--engine", "ray"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "weights_digest", lambda tokenizer: "0" * 16)
        assert main(job) == 2
        message = capsys.readouterr().err
        assert re.search(r"error: on \S+ the tokenizer '.+' has weights [0-9a-f]{16}, ", message)
        assert "the driver's has 0000000000000000: results of both would be mixed" in message
    with monkeypatch.context() as patch:
        own = ray_engine.versions()
        patch.setattr(ray_engine, "versions", lambda: own | {"torch": "0.4"})
        assert main(job) == 2
        message = capsys.readouterr().err
        assert re.search(rf"error: a worker on \S+ has torch {re.escape(own['torch'])}, ", message)
        assert "the driver torch 0.4: results of both would be mixed" in message
    assert main([*job, "--workers", "3"]) == 2
    assert (
        "3 workers need 2.5 CPUs and 0 GPUs, the Ray cluster has 2 and 0" in capsys.readouterr().err
    )
    assert main([*job, "--gpus-per-worker", "1.5"]) == 2
    assert "expected 0..1 or a whole number, got 1.5" in capsys.readouterr().err
    assert main([*job[:-2], "--workers", "2"]) == 2
    assert "options of --engine ray" in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*.parquet")]


def test_workers_without_the_package(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Workers in which the import of lavit_tok fails, as where it is not installed."""
    program = """
import sys
import ray
from lavit_tok.cli import main

def hide():
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "lavit_tok":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())

hook = {"worker_process_setup_hook": hide}
ray.init(sys.argv[1], log_to_driver=False, runtime_env=hook)
sys.exit(main(sys.argv[2:]))
"""
    args = [sys.executable, "-c", program, cluster, *on_ray(work, tmp_path / "out")]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "a worker of the cluster lacks a package (No module named 'lavit_tok'" in last
    assert "install 'lavit-tok[train,ray]' on all machines" in last
    assert not [*(tmp_path / "out").glob("*.parquet")]


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:9", "[Errno 111] Connection refused"), ("here", "expected HOST:PORT or auto")],
)
def test_an_address_without_a_cluster(
    address: str, reason: str, work: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, job = work
    job = [*job, str(folder / "images"), "--out", str(tmp_path / "out")]
    program = "import sys; from lavit_tok.cli import main; sys.exit(main(sys.argv[1:]))"
    args = [sys.executable, "-c", program, *job, "--engine", "ray", "--address", address]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"lavit-tok: error: --address {address}: no Ray cluster: {reason}"


def test_the_example(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """examples/scale/ray_data.py, on the images before the corrupt one and on it."""
    folder, _ = work
    (tmp_path / "images").mkdir()
    paths = [tmp_path / f"images/{i:03d}.png" for i in range(6)]
    for path in paths:
        path.write_bytes((folder / "images" / path.name).read_bytes())
    monkeypatch.setattr(sys, "argv", ["ray_data.py", str(tmp_path / "images"), str(tmp_path / "o")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    table = pa.table({"key": list(map(str, paths)), "image": [p.read_bytes() for p in paths]})
    expected = {row["key"]: row for row in TokenizeBatch("default")(table).to_pylist()}
    found = pq.read_table(tmp_path / "o").to_pylist()
    assert {row["key"]: row for row in found} == expected and len(found) == 6
    assert expected[str(paths[5])]["codes"] is None
