"""Small models, data sets and recipes, made by the library's own commands."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from pytorch_lightning import Callback

from robustness.process import Done, command, fork

RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 5
SHARDS = "--batch-size", "3", "--shard-size", "4"
ENCODER = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32}
ENCODER |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CONFIG: dict[str, Any] = {"encoder": ENCODER, "num_heads": 2, "codebook_size": 16, "code_dim": 4}
CONFIG |= {"merger_depth": 1, "reconstructor_depth": 1}
LM = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
LM |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
UNET = {"block_out_channels": [8, 8], "attention_head_dim": 4, "norm_num_groups": 4}


class LossLog(Callback):
    """Appends a line of step and loss for each batch to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        with open(self.path, "a") as file:
            loss = float(trainer.callback_metrics["train/loss"])
            file.write(f"{trainer.global_step} {loss!r}\n")


def image(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Rectangles on a gradient, with noise."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(*rng.integers(256, size=(2, 3)), width)[None].repeat(height, 0)
    for _ in range(4):
        top, left = rng.integers(height), rng.integers(width)
        pixels[top : top + 12, left : left + 12] = rng.integers(256, size=3)
    return Image.fromarray((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))


def damaged(data: bytes, rng: np.random.Generator, header: int = 64, other: bytes = b"") -> bytes:
    """A few bits, numbers or stretches changed; half of the damage is in the header."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(len(changed), header) if rng.integers(2) else len(changed)))
        size = int(rng.choice([1, 2, 4, 8, 64]))
        match int(rng.integers(8)):
            case 0 | 1:
                changed[at] ^= 1 << int(rng.integers(8))
            case 2:
                value = int(rng.choice([0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
                changed[at : at + 4] = value.to_bytes(4, "big" if rng.integers(2) else "little")
            case 3:
                changed[at : at + size] = rng.bytes(size)
            case 4:
                del changed[at : at + size]
            case 5:
                changed[at:at] = changed[at : at + size] * int(rng.integers(1, 50))
            case 6:
                del changed[max(at, 8) :]
            case _:
                changed[at:] = (other or data[::-1])[at:]
        changed = changed or bytearray(data)
    return bytes(changed)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of `size` (64k) at a new folder; the function given makes it larger.

    Skips the test where this user may not mount one.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")

    def enlarge(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield enlarge
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def files(folder: Path) -> dict[str, bytes]:
    """Relative names and bytes of all files below a folder; locks left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def cleared(folder: Path) -> Path:
    """The folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    return folder


class Workshop:
    """A folder with everything; a part is made when its attribute is first read.

    images/{train,validation}/, tokenizer/, codes.jsonl, table.parquet, shards/, text/, vae/,
    decoder/, decoded/, lm/
    """

    command = staticmethod(command)

    def __init__(self, folder: Path) -> None:
        self.folder, datasets.config.HF_DATASETS_CACHE = folder, str(folder / "cache")
        folder.chmod(0o755)
        for split, count in (("train", 14), ("validation", 2)):
            (at := folder / "images" / split).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image(100 * len(split) + i).save(at / f"{i:02}.png")
            lines = [{"file_name": f"{i:02}.png", "caption": f"image {i}"} for i in range(count)]
            (at / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "images/train/05.png").write_bytes(b"\x89PNG, but no image")

    def __getattr__(self, name: str) -> Path:
        if name not in (*JOBS, "text", "vae", "images"):
            raise AttributeError(name)
        path = self.folder / file_name(name)
        if not path.exists():
            done = self.run(name, path) if name in JOBS else fork(lambda: _save_parts(self.folder))
            assert done.code == 0 and path.exists(), f"{name}: {done.err}"
        return path

    def run(self, job: str, out: Path, **how: Any) -> Done:
        """A job, which writes `out`."""
        return command(*JOBS[job](self, out), **how)

    def recipe(self, name: str, out: Path, changes: dict[str, Any]) -> list[object]:
        """fit's arguments: a recipe at the smallest size, resumed from its last checkpoint."""
        run = out.with_name(f"{out.name}.run")
        log = {"class_path": f"{LossLog.__module__}.LossLog"}
        log["init_args"] = {"path": str(run.with_suffix(".losses"))}
        trainer = {"max_steps": STEPS, "callbacks": [log], "logger": False, "val_check_interval": 3}
        trainer |= {"precision": "32-true", "limit_val_batches": 1, "default_root_dir": str(run)}
        common = {"trainer": {**trainer, "enable_model_summary": False}, "checkpoint": {"every": 1}}
        common |= {"model": {"schedule": {"warmup_steps": 1}, "out": str(out)}}
        common |= {"data": {"batch_size": 4}}
        values = yaml.safe_load((RECIPES / name).read_text())
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(merged(merged(values, common), changes)))
        return ["-c", path, "--ckpt_path", "last"]


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with changes, dicts in dicts likewise."""
    both = {key: merged(values[key], changes[key]) for key in values.keys() & changes.keys()
            if isinstance(values[key], dict) and isinstance(changes[key], dict)}  # fmt: skip
    return {**values, **changes, **both}


def file_name(job: str) -> str:
    names = {"codes": "codes.jsonl", "table": "table.parquet", "workers": "shards"}
    return names.get(job, job)


def _save_parts(folder: Path) -> None:
    import torch
    from helpers.small_diffusion import small_vae
    from helpers.small_lms import small_tokenizer

    torch.manual_seed(0)
    small_vae(32).save_pretrained(folder / "vae")
    small_tokenizer("llama").save_pretrained(folder / "text")


def _fit(work: Workshop, out: Path) -> tuple[str, list[object]]:
    model = {"encoder": None, "config": CONFIG, "log_images_every": 0}
    model |= {"codebook": {"start_step": 2, "blend_steps": 1, "kmeans_samples": 32}}
    model |= {"selection": {"stop_sampling_step": 2}}
    changes = {"data": {"data": str(work.images), "image_size": 32}, "model": model}
    return "lavit-tok", ["fit", *work.recipe("selected/tokenizer.yaml", out, changes)]


def _fit_decoder(work: Workshop, out: Path) -> tuple[str, list[object]]:
    model = {"tokenizer": str(work.tokenizer), "vae": str(work.vae), "unet": {"config": UNET}}
    model |= {"condition": {"cross_dims": [16], "null_length": 16}, "samples": {"every": 0}}
    model |= {"out_dtype": "float32"}
    changes = {"data": {"data": str(work.images), "image_size": 32}, "model": model}
    return "lavit-tok", ["fit-decoder", *work.recipe("selected/decoder.yaml", out, changes)]


def _fit_lm(work: Workshop, out: Path) -> tuple[str, list[object]]:
    model = {"lm": LM, "text_tokenizer": str(work.text), "visual_tokenizer": str(work.tokenizer)}
    model |= {"objective": {"init_args": {"nested_vectors": 4}}}
    data = {"shards": str(work.shards), "images": str(work.images), "block": 64, "batch_size": 2}
    return "lavit-lm", ["fit", *work.recipe("lm/lavit.yaml", out, {"data": data, "model": model})]


def _tok(name: str, source: str, *args: str) -> Callable[..., Any]:
    def build(work: Workshop, out: Path) -> tuple[str, list[object]]:
        model = "decoder" if name == "decode" else "tokenizer"
        paths = [getattr(work, source), "--out", out, f"--{model}", getattr(work, model)]
        return "lavit-tok", [name, *paths, *args]

    return build


JOBS: dict[str, Callable[[Workshop, Path], tuple[str, list[Any]]]] = {
    "codes": _tok("encode", "images", "--batch-size", "3"),
    "table": _tok("encode", "images", "--batch-size", "3"),
    "shards": _tok("shards", "images", *SHARDS),
    "workers": _tok("shards", "images", *SHARDS, "--num-workers", "2"),
    "decoded": _tok("decode", "codes", "--batch-size", "4", "--steps", "1"),
    "tokenizer": _fit,
    "decoder": _fit_decoder,
    "lm": _fit_lm,
}
"""Program and command line of each job, named after what it writes."""
