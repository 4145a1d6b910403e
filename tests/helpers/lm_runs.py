"""Training runs in processes of their own: to be killed, or several together. Started from a server that has imported
the packages once, so that each costs a fork and not fifteen seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
SMALL_BART: dict[str, Any] = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}
CAPTIONS = ["a red apple", "two dogs run", "the old town hall", "rain at sunset"]
TOGETHER: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "val_check_interval": 2,
}


class Losses(Callback):
    """Every batch's loss as it was logged, and its rows; stops the run, as a crash would, after some steps."""

    def __init__(
        self, stop: int | None = None, pause: float = 0.0, out: Path | None = None
    ) -> None:
        self.values: list[float] = []
        self.keys: list[Any] = []
        self.held_out: list[dict[str, float]] = []
        self.stop, self.pause, self.out = stop, pause, out

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))
        self.keys.append(batch.keys)
        if self.out is not None:
            with open(self.out, "a") as file:
                file.write(f"{trainer.global_step} {self.values[-1]!r}\n")
        time.sleep(self.pause)
        if self.stop is not None and trainer.global_step >= self.stop:
            raise RuntimeError("power cut")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.held_out.append(
            {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        )


def module(folder: Path, continuous: bool = False, **more: Any) -> Any:
    from lavit_lm.objectives.lavit import LaVIT
    from lavit_lm.training.module import LanguageModeling

    more = {"objective": LaVIT(continuous=True), **more} if continuous else more
    settings = {
        "lm": SMALL,
        "text_tokenizer": str(folder / "text"),
        "visual_tokenizer": str(folder / "visual"),
    }
    return LanguageModeling(**{**settings, "warmup_steps": 2, "lr": 3e-3, **more})


def data(folder: Path, **more: Any) -> Any:
    from lavit_lm.training.data_module import LanguageDataModule

    return LanguageDataModule(
        str(folder / "shards"), **{"block": 64, "batch_size": 2, "window": 10, **more}
    )


def trainer(folder: Path, steps: int, callbacks: list[Any], **more: Any) -> Any:
    from pytorch_lightning import Trainer

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        default_root_dir=folder,
        **{**quiet, **more},
    )


def saving(folder: Path) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder / "ckpt", every_n_train_steps=1, save_last=True, save_top_k=-1)


def train_until_killed(folder: Path, losses: Path, steps: int, pause: float) -> None:
    """Never gets to its end."""
    trainer(folder, steps, [Losses(pause=pause, out=losses), saving(folder)]).fit(
        module(folder), data(folder)
    )


def train_together(folder: Path, strategy: str, stop: int | None, settings: dict[str, Any]) -> Any:
    """One of several processes, of 4 steps, cut off or resumed. Returns (losses, held-out losses, rows)."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    from lavit_lm.training.log_samples import LogSamples

    world = int(os.environ["WORLD_SIZE"])
    seen = Losses(stop)
    kinds: dict[str, Any] = {
        "ddp": lambda: "ddp",
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
        "fsdp, one file": lambda: ModelParallelStrategy(
            world, 1, save_distributed_checkpoint=False
        ),
    }
    callbacks = [seen, saving(folder), LogSamples(every=2, images=2, decoder=None, max_new_tokens=4)]
    fitted = trainer(folder, 4, callbacks, devices=world, strategy=kinds[strategy](), **TOGETHER)
    images = str(folder / "pictures") if settings.get("continuous") else None
    ckpt = None if stop is not None else "last"
    try:
        fitted.fit(
            module(folder, **settings), data(folder, batch_size=1, images=images), ckpt_path=ckpt
        )
    except RuntimeError as error:
        if str(error) != "power cut":
            raise
    return seen.values, seen.held_out, seen.keys


def start(target: Callable[..., Any], *arguments: Any, **variables: str) -> Any:
    """A process, and the end of a pipe that gives its result or the exception that ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytorch_lightning",
            "lavit_lm.training.module",
            "lavit_lm.training.data_module",
            "torch.distributed.fsdp",
        ]
    )
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, arguments, variables, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def together(world: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each of `world` processes returns; they know of each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUP_RANK": "0",
    }
    shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(world)}
    started = [
        start(target, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world)
    ]
    results = []
    for process, pipe in started:
        answered = pipe.poll(180)
        result = pipe.recv() if answered else "no answer for three minutes"
        if isinstance(result, str):
            for other, _ in started:
                other.kill()
            raise AssertionError(result)
        results.append(result)
        process.join()
    return results


def _run(target: Callable[..., Any], arguments: Any, variables: dict[str, str], pipe: Any) -> None:
    import traceback

    import torch

    torch.set_num_threads(1)
    os.environ.update(variables)
    try:
        pipe.send(target(*arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
        raise
