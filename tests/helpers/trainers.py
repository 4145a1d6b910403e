"""Trainers from flat arguments, and arguments that run a recipe for two steps on one CPU."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

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


def fit_tokenizer(folder: Path, config: Any, options: dict[str, Any]) -> Any:
    """Six steps through all stages: (images of each step, codes of each step, state)."""
    from pytorch_lightning import Callback, Trainer

    from lavit_tok import ImageDataModule
    from lavit_tok.training.tokenizer_training import TokenizerTraining

    images, codes = [], []

    class Record(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, out: Any, batch: Any, i: int
        ) -> None:
            images.append(batch["index"].tolist())
            mean = trainer.callback_metrics["train/codes_per_image"]
            codes.append(round(float(mean) * len(batch["index"])))

    arguments = {"stop_sampling_step": 2, "start_step": 3, "blend_steps": 1, "kmeans_samples": 64}
    arguments |= {"decay": 0.5, "dead_ratio": 0.0, "warmup_steps": 1, "lr": 3e-3}
    module = trainer_of(TokenizerTraining, config=config, log_images_every=0, **arguments)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    options = {"max_steps": 6, "accelerator": "cpu", "num_sanity_val_steps": 0, **options, **quiet}
    trainer = Trainer(callbacks=[Record()], default_root_dir=folder, **options)
    trainer.fit(module, ImageDataModule(str(folder / "images"), image_size=32, batch_size=4))
    # Not as tensors: those are shared with the sending process, which ends.
    return images, codes, {name: value.numpy() for name, value in module.state_dict().items()}


def fit_decoder(folder: Path, unet: Any, options: dict[str, Any]) -> Any:
    """Three steps with the tokenizer and VAE of a folder: (images of each step, state)."""
    from pytorch_lightning import Callback, Trainer

    from lavit_tok import ImageDataModule
    from lavit_tok.training.decoder_training import PixelDecoderTraining

    images = []

    class Record(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, out: Any, batch: Any, i: int
        ) -> None:
            images.append(batch["index"].tolist())

    parts = {name: str(folder / name) for name in ("tokenizer", "vae")}
    arguments = {"config": unet, "cross_dims": (16,), "every": 0, "warmup_steps": 1, "lr": 1e-2}
    module = trainer_of(PixelDecoderTraining, **parts, **arguments, ema_decay=0.6)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    options = {"max_steps": 3, "accelerator": "cpu", "num_sanity_val_steps": 0, **options, **quiet}
    trainer = Trainer(callbacks=[Record()], default_root_dir=folder, **options)
    trainer.fit(module, ImageDataModule(str(folder / "images"), image_size=32, batch_size=4))
    return images, {name: value.numpy() for name, value in module.state_dict().items()}
