"""`shards --engine ray`: the local engine's bytes, whatever dies; and every error of a cluster."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from robustness.small import files, image

from lavit_tok import VisualTokenizer
from lavit_tok.cli import main

os.environ["RAY_AUTH_MODE"] = "disabled"
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SHARDS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs, whose processes import from where this one does."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"num_cpus": 2, "object_store_memory": 100_000_000, "runtime_env": {"env_vars": path}}
    for attempt in range(3):
        try:
            context = ray.init(**options, include_dashboard=False, log_to_driver=False)
            break
        except Exception:  # Ray waits 30 seconds for its processes, too few on a busy machine
            ray.shutdown()
            if attempt == 2:
                raise
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def work(
    shared_tokenizer: VisualTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A folder with images, number 5 corrupt, a tokenizer and shards/ of the local engine; and the
    arguments of a job, without --out."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "images").mkdir()
    for i in range(4 * SHARDS):
        image(i).save(folder / f"images/{i:03d}.png")
    (folder / "images/005.png").write_bytes(b"no image")
    shared_tokenizer.save_pretrained(folder / "tokenizer")
    job = ["shards", str(folder / "images"), "--tokenizer", str(folder / "tokenizer")]
    job += ["--caption-column", "", "--shard-size", "4", "--batch-size", "3", "--flip"]
    assert main([*job, "--out", str(folder / "shards")]) == 0
    return folder, job


def test_ray_writes_the_same_files_and_resumes_any_engine(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path, capsys: Any
) -> None:
    folder, job = work
    whole, out = files(folder / "shards"), tmp_path / "out"
    job = [*job, "--out", str(out)]
    assert main([*job, "--engine", "ray", "--workers", "2"]) == 0
    assert files(out) == whole
    assert "95 records" not in capsys.readouterr().err  # 47 images and their flips
    for i, engine in enumerate(("local", "ray")):
        for number in range(i, SHARDS, 3):
            (out / f"train-{number:05d}.parquet").unlink()
        assert main([*job, "--engine", engine]) == 0
        assert f"{SHARDS - SHARDS // 3} of them from earlier runs" in capsys.readouterr().err
        assert files(out) == whole


def _kill_encoders(stop: threading.Event, killed: list[int], seed: int) -> None:
    """SIGKILL to a random process that encodes, now and then; at most three."""
    draw = random.Random(seed)
    while not stop.is_set() and len(killed) < 3:
        found = [p for p in psutil.process_iter(["name", "cmdline"]) if "_Encoder" in _title(p)]
        if found and draw.random() < 0.3:
            process = draw.choice(found)
            process.kill()
            killed.append(process.pid)
        time.sleep(0.1)


def _title(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


def test_killed_actors_and_drivers(
    cluster: str, work: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, job = work
    whole, out = files(folder / "shards"), tmp_path / "out"
    job = [*job, "--out", str(out), "--engine", "ray", "--workers", "2"]
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=_kill_encoders, args=(stop, killed, 0))
    killer.start()
    try:
        assert main(job) == 0
    finally:
        stop.set()
        killer.join()
    assert files(out) == whole
    for number in range(SHARDS):
        (out / f"train-{number:05d}.parquet").unlink()
    program = "import sys; from lavit_tok.cli import main; sys.exit(main(sys.argv[1:]))"
    args = [sys.executable, "-c", program, *job, "--address", cluster]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(args, env=env) as driver:
        while not (found := [*out.glob("*.parquet")]) and driver.poll() is None:
            time.sleep(0.02)
        assert main(job) == 2  # two drivers: the second is refused
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

    _, job = work
    job = [*job, "--out", str(tmp_path / "out"), "--engine", "ray"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "weights_digest", lambda tokenizer: "0" * 16)
        assert main(job) == 2
        message = capsys.readouterr().err
        assert "a worker's tokenizer" in message and "the driver's 0000000000000000" in message
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "versions", lambda: {"torch": "0.4"})
        assert main(job) == 2
        assert (
            "the driver {'torch': '0.4'}: shards of both would be mixed" in capsys.readouterr().err
        )
    assert not [*(tmp_path / "out").glob("*.parquet")]


def test_tokenize_batch_in_ray_data(cluster: str, work: tuple[Path, list[str]]) -> None:
    """As examples/scale/ray_data.py uses it."""
    from lavit_tok import TokenizeBatch

    folder, _ = work
    paths = sorted((folder / "images").glob("*.png"))[:7]
    table = pa.table({"key": [p.name for p in paths], "image": [p.read_bytes() for p in paths]})
    tokenize = TokenizeBatch(str(folder / "tokenizer"))
    expected = tokenize(table).to_pylist()
    assert expected[5]["codes"] is None and "not an image" in expected[5]["reason"]
    mapped = ray.data.from_arrow(table).map_batches(
        TokenizeBatch,
        fn_constructor_args=(str(folder / "tokenizer"),),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    assert mapped.take_all() == expected
