"""What docs/results.md records of `lavit-tok shards` on one machine.

    python examples/scale/measure.py kills --count 50 [--first 14]
    python examples/scale/measure.py speed --count 2000
    python examples/scale/measure.py engines --count 20000
    python examples/scale/measure.py memory --count 2000 20000
    python examples/scale/measure.py shards --count 10 100 1000 10000

kills: SIGKILL to actors, reading tasks and drivers of jobs on Ray, at random moments; a driver is
started again until the job ends; then every file equals that of an undisturbed job. Moments are
drawn by the number of the job; --first continues with that number.
engines: with Ray, which starts a cluster for each turn.
shards: processor time of the writing process for shards of 64 images with 21 codes each.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.data.open_batch import open_batch
from lavit_tok.data.shard_writer import write_shards

ENCODER = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32}
ENCODER |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VICTIMS = {"actor": "_Worker", "task": "_read_work"}
PROGRAM = "import sys; from lavit_tok.cli import main; sys.exit(main(sys.argv[1:]))"


def write_images(folder: Path, count: int, side: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side)).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def write_tokenizer(folder: Path) -> Path:
    torch.manual_seed(0)
    config = TokenizerConfig(encoder=ENCODER, codebook_size=16, code_dim=4, num_heads=2)
    VisualTokenizer(config).save_pretrained(folder)
    return folder


def start(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, "shards", *map(str, args), "--split", "train"]
    return subprocess.Popen(command, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def kill(draw: random.Random, kind: str, driver: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to a process of a kind that this job has started, if there is one."""
    if kind == "driver":
        driver.kill()
        driver.wait()
        return True
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if VICTIMS[kind] in " ".join(process.cmdline()):
                found.append(process)
    if found:
        draw.choice(found).kill()
    return bool(found)


def kills(counts: list[int], first: int = 0) -> None:
    (count,) = counts
    import ray

    with tempfile.TemporaryDirectory(prefix="kills") as name:
        folder, log = Path(name), (Path(name) / "log").open("wb")
        images = write_images(folder / "images", 100, 40)
        job = [images, "--tokenizer", write_tokenizer(folder / "t"), "--shard-size", 4]
        job += ["--batch-size", 3, "--budget", 0.4, "--flip"]
        assert start(*job, "--out", folder / "whole", stderr=log).wait() == 0
        whole = files(folder / "whole")
        context = ray.init("local", log_to_driver=False, include_dashboard=False)
        for number in range(first, count):
            draw, out, done, starts = random.Random(number), folder / f"out{number}", [], 1
            own = number % 4 == 3  # every fourth job has a cluster of its own, which dies with it
            options = ["--engine", "ray", "--workers", 2, "--out", out]
            options += [] if own else ["--address", context.address_info["address"]]
            driver = start(*job, *options, stderr=log)
            for at in sorted(draw.randrange(len(whole)) for _ in range(5)):
                kind = draw.choice([*VICTIMS, "driver"])
                while driver.poll() is None and len([*out.glob("*.parquet")]) < at:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.3))
                if driver.poll() is None and kill(draw, kind, driver):
                    done.append(kind)
                if driver.poll() is not None and driver.returncode != 0:
                    driver = start(*job, *options, stderr=log)
                    starts += 1
            assert driver.wait() == 0, (folder / "log").read_text()[-3000:]
            assert files(out) == whole, f"job {number} has other files"
            print(f"job {number}: {starts} starts, equal; killed {done}", flush=True)
        ray.shutdown()


def speed(counts: list[int]) -> None:
    """Encoding and decoding alone in turns with the local engine; then both engines once.

    Encoding alone is that of preloaded pixels, by torch's threads for one batch or by a batch for
    each of them, whichever is faster; decoding alone has as many threads. A turn's ratio is the
    time of both alone / the engine's, start included.
    """
    (count,) = counts
    tokenizer, threads = VisualTokenizer.from_pretrained("selected"), torch.get_num_threads()

    def at_once(function: Any, batches: list[Any]) -> None:
        with ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,)) as pool:
            [*pool.map(function, batches)]
        torch.set_num_threads(threads)

    with tempfile.TemporaryDirectory(prefix="speed") as name:
        images = write_images(Path(name) / "images", count, 96)
        paths = [{"path": str(path)} for path in sorted(images.iterdir())]
        table = pa.table({"image": paths})
        tables = [table[at : at + 32] for at in range(0, count, 32)]
        decode = partial(open_batch, reader=tokenizer.image_processor.reader)
        pixels = b"".join(decode(table)["pixels"].to_pylist())
        batches: Any = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        batches = batches.reshape(count, 3, *[tokenizer.image_processor.size] * 2).split(32)
        few = batches[: max(1, len(batches) // 8)]
        few_images = sum(map(len, few))

        def engine(turn: int) -> None:
            out, cache = Path(name) / f"out{turn}", Path(name) / f"cache{turn}"
            datasets.config.HF_DATASETS_CACHE = str(cache)  # nothing is left of the turn before
            write_shards(str(images), out, "selected", tokenizer, "train", shard_size=1024)

        sides: dict[str, tuple[Callable[[int], Any], int]] = {
            "encode, one batch": (lambda turn: [*map(tokenizer.encode, few)], few_images),
            "encode, batches at once": (lambda turn: at_once(tokenizer.encode, batches), count),
            "decode": (lambda turn: at_once(decode, tables), count),
            "local": (engine, count),
        }
        ratios = []
        for turn in range(5):
            seconds = {}
            for side, (function, number) in sides.items():
                processor, begin = time.process_time(), time.perf_counter()
                function(turn)
                seconds[side] = (time.perf_counter() - begin) / number
                processor = 1000 * (time.process_time() - processor) / number
                print(f"{side}: {1 / seconds[side]:.0f} images/s, {processor:.2f} ms of processors")
            one, many, alone, local = seconds.values()
            ratios.append((min(one, many) / local, (min(one, many) + alone) / local))
            print(
                "local / encode, / encode and decode: {:.2f}, {:.2f}".format(*ratios[-1]),
                flush=True,
            )
        print("medians: {:.2f}, {:.2f}".format(*np.median(ratios, 0)))


def engines(counts: list[int]) -> None:
    """Images a second of both engines, in turns; their files are equal."""
    (count,) = counts
    from lavit_tok.data.ray_engine import RayOptions

    tokenizer = VisualTokenizer.from_pretrained("selected")
    with tempfile.TemporaryDirectory(prefix="engines") as name:
        images = write_images(Path(name) / "images", count, 96)
        os.environ |= {"RAY_worker_niceness": "0"}  # else they wait for every other process
        for turn in range(3):
            seconds = {}
            for engine, options in (("local", None), ("ray", RayOptions(workers=2))):
                out = Path(name) / f"{engine}{turn}"
                begin = time.perf_counter()
                write_shards(
                    str(images), out, "selected", tokenizer, "train", shard_size=256, ray=options
                )
                seconds[engine] = time.perf_counter() - begin
                times = sorted(path.stat().st_mtime for path in out.glob("*.parquet"))
                after = (count - 256) / (times[-1] - times[0])
                rate = count / seconds[engine]
                print(f"{engine}: {rate:.0f} images/s, {after:.0f} after the first shard")
            print(f"ray / local: {seconds['local'] / seconds['ray']:.2f}", flush=True)
            assert files(Path(name) / f"local{turn}") == files(Path(name) / f"ray{turn}")


def memory(counts: list[int]) -> None:
    """Peak memory of the local engine with a tiny tokenizer."""
    with tempfile.TemporaryDirectory(prefix="memory") as name:
        tokenizer = write_tokenizer(Path(name) / "t")
        for count in counts:
            images = write_images(Path(name) / str(count), count, 40)
            out, begin = Path(name) / f"out{count}", time.perf_counter()
            process = start(images, "--tokenizer", tokenizer, "--shard-size", 256, "--out", out)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0
            seconds = time.perf_counter() - begin
            print(f"{count} images: {usage.ru_maxrss / 1024:.0f} MB, {seconds:.0f} s", flush=True)


def shards(counts: list[int]) -> None:
    """Milliseconds for each shard: written, and read by a job that resumes."""
    from lavit_tok.data.shard_manifest import ShardConfig, shard_name
    from lavit_tok.data.shard_source import BLOCK_END, PART_END, SplitImages
    from lavit_tok.data.shard_writer import ShardJob
    from lavit_tok.encode.image_files import ImageReader

    config = ShardConfig("selected", "", "", 2048, 64, None, None, False, 64)
    numbers = pa.array([[*range(21)]] * 64, pa.list_(pa.int32()))
    features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})

    def block(number: int, last: bool) -> pa.Table:
        index = range(64 * number, 64 * number + 64)
        table = {"file": [shard_name("train", number)] * 64, "index": index, "size": [1] * 64}
        table |= {"end": [0] * 63 + [PART_END if last else BLOCK_END], "caption": [""] * 64}
        table |= {"key": [str(i) for i in index], "codes": numbers, "keep": numbers}
        return pa.table(table | {"length": [21] * 64, "reason": pa.nulls(64, pa.string())})

    for count in counts:
        values = {"image": [{"bytes": b"0", "path": None}] * (64 * count)}
        split = datasets.Dataset.from_dict(
            values | {"key": [str(i) for i in range(64 * count)]}, features
        )
        source = SplitImages(split, "data", ImageReader(64))
        blocks = [block(number, number == count - 1) for number in range(count)]
        with tempfile.TemporaryDirectory(prefix="shards") as name:
            times = []
            for engine in (
                lambda work, read, config, blocks=blocks: iter(blocks),
                lambda work, read, config: (table for item in work for table in read(item)),
            ):
                begin = time.process_time()
                ShardJob(Path(name), "train", source, config, "data").run(engine, 64, 64)
                times.append(1000 * (time.process_time() - begin) / count)
        print(f"{count} shards: {times[0]:.2f} ms each, resumed {times[1]:.2f} ms", flush=True)


if __name__ == "__main__":
    text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    modes: Any = {
        "kills": kills,
        "speed": speed,
        "engines": engines,
        "memory": memory,
        "shards": shards,
    }
    parser.add_argument("what", choices=modes)
    parser.add_argument("--count", type=int, nargs="+", default=[50], help="kills, images, shards")
    parser.add_argument("--first", type=int, default=0, help="number of the first job, of kills")
    values = parser.parse_args()
    options = {"first": values.first} if values.what == "kills" else {}
    modes[values.what](values.count, **options)
