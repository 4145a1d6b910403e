"""Training in a few steps on one CPU: trainers from flat arguments, images, and recipes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning import Callback, Trainer

TWO_STEPS = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.max_steps": 2,
    "trainer.callbacks": "[]",
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.logger": "false",
    "trainer.enable_checkpointing": "false",
    "data.num_workers": 0,
}


def recipes_of(command: str) -> list[Path]:
    """The recipes below recipes/lm whose header has this command, such as "lavit-lm fit"."""
    paths = (Path(__file__).parents[2] / "recipes" / "lm").glob("*.yaml")
    return sorted(p for p in paths if f"{command} -c recipes/lm/{p.name}" in p.read_text())


def two_steps(recipe: Path, overrides: dict[str, Any]) -> list[str]:
    """The recipe's arguments with TWO_STEPS and `overrides`; its header must be complete."""
    lines = recipe.read_text().splitlines(True)
    header = "".join(line for line in lines if line.startswith("#"))
    assert all(item in header for item in ("command:", "hardware:", "time:", "expected:"))
    values = {**TWO_STEPS, **overrides}
    return ["-c", str(recipe), *(f"--{name}={value}" for name, value in values.items())]


def trainer_of(kind: Any, **arguments: Any) -> Any:
    """An instance of a trainer class; the fields of its config records may be given by name.

    Where two records have a field of one name, the last record of the signature takes it.
    """
    parameters = inspect.signature(kind).parameters
    for name, parameter in reversed(parameters.items()):
        if dataclasses.is_dataclass(parameter.default) and name not in arguments:
            default: Any = parameter.default
            names = {field.name for field in dataclasses.fields(default)} - parameters.keys()
            values = {key: arguments.pop(key) for key in names & arguments.keys()}
            arguments[name] = dataclasses.replace(default, **values)
    return kind(**arguments)


def rectangles(root: Path, **splits: int) -> Path:
    """Folders of so many images, 00.png, ...: a rectangle on a ground of another color."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        (root / split).mkdir()
        for i in range(count):
            image = np.full((32, 32, 3), rng.integers(256, size=3), np.uint8)
            top, left = rng.integers(0, 20, size=2)
            image[top : top + 12, left : left + 9] = rng.integers(256, size=3)
            Image.fromarray(image).save(root / split / f"{i:02}.png")
    return root


def quiet_trainer(root: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    """Lightning's Trainer without progress bar, logger and checkpoints of its own."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    fixed = {"accelerator": "cpu", "num_sanity_val_steps": 0, "default_root_dir": root}
    options = {**dict.fromkeys(quiet, False), **fixed, **options}
    return Trainer(max_steps=steps, callbacks=[*callbacks], **options)


def fit_images(
    module: Any, folder: Path, root: Path, steps: int, ckpt: str | None = None
) -> Trainer:
    """Train on the images of 32 pixels in `folder`/images, in batches of 8; resumes from `ckpt`."""
    from lavit_tok import ImageDataModule

    trainer = quiet_trainer(root, steps)
    data = ImageDataModule(str(folder / "images"), image_size=32, batch_size=8, cache=True)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return trainer


class EachStep(Callback):
    """The value of a function of trainer, module and batch after every step."""

    def __init__(self, function: Callable[[Any, Any, Any], Any]) -> None:
        self.function = function
        self.values: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        self.values.append(self.function(trainer, module, batch))


def training_metrics(trainer: Any, module: Any, batch: Any) -> dict[str, float]:
    """Of EachStep: what is logged as "train/..."."""
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name.startswith("train/")}


def fit_tokenizer(folder: Path, config: Any, options: dict[str, Any]) -> Any:
    """Six steps through all stages: (images of each step, codes of each step, state)."""
    from lavit_tok.training.tokenizer_training import TokenizerTraining

    arguments = {"stop_sampling_step": 2, "start_step": 3, "blend_steps": 1, "kmeans_samples": 64}
    arguments |= {"decay": 0.5, "dead_ratio": 0.0, "warmup_steps": 1, "lr": 3e-3}
    module = trainer_of(TokenizerTraining, config=config, log_images_every=0, **arguments)
    values, state = _fit(folder, module, 6, options)
    codes = [round(metrics["train/codes_per_image"] * len(index)) for index, metrics in values]
    return [index for index, _ in values], codes, state


def fit_decoder(folder: Path, unet: Any, options: dict[str, Any]) -> Any:
    """Three steps with the tokenizer and VAE of a folder: (images of each step, state)."""
    from lavit_tok.training.decoder_training import PixelDecoderTraining

    parts = {name: str(folder / name) for name in ("tokenizer", "vae")}
    arguments = {"config": unet, "cross_dims": (16,), "every": 0, "warmup_steps": 1, "lr": 1e-2}
    module = trainer_of(PixelDecoderTraining, **parts, **arguments, ema_decay=0.6)
    values, state = _fit(folder, module, 3, options)
    return [index for index, _ in values], state


def _fit(folder: Path, module: Any, steps: int, options: dict[str, Any]) -> Any:
    """(indices of the images and metrics of each step, state)."""
    from lavit_tok import ImageDataModule

    record = EachStep(lambda *args: (args[2]["index"].tolist(), training_metrics(*args)))
    data = ImageDataModule(str(folder / "images"), image_size=32, batch_size=4)
    quiet_trainer(folder, steps, record, **options).fit(module, data)
    # Not as tensors: those are shared with the sending process, which ends.
    return record.values, {name: value.numpy() for name, value in module.state_dict().items()}
