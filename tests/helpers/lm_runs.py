"""Training runs of small language models, in this process or in others, which can be killed.

Processes are forked from a server that has imported the packages once; each starts in a second.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

SMALL: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
SMALL_BART: dict[str, Any] = {"model_type": "bart", "d_model": 32, "dropout": 0.0}
for _part in ("encoder", "decoder"):
    SMALL_BART |= {f"{_part}_layers": 2, f"{_part}_attention_heads": 2, f"{_part}_ffn_dim": 64}
SMALL_BART |= {"max_position_embeddings": 128}
CAPTIONS = ["a red apple", "two dogs run", "the old town hall", "rain at sunset"]
TOGETHER = {"gradient_clip_val": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 2}


class Losses(Callback):
    """Records each batch's logged loss and keys, and held-out losses; fails at step `stop`.

    `kill` ends the process at once instead, as the system does when memory is short.
    """

    def __init__(
        self,
        stop: int | None = None,
        pause: float = 0.0,
        out: Path | None = None,
        kill: bool = False,
    ) -> None:
        self.values: list[float] = []
        self.keys: list[Any] = []
        self.held_out: list[dict[str, float]] = []
        self.stop, self.pause, self.out, self.kill = stop, pause, out, kill

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
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("power cut")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.held_out.append(
            {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        )


def module(folder: Path, continuous: bool = False, **more: Any) -> Any:
    from helpers.trainers import trainer_of
    from lavit_lm.objectives.lavit import LaVIT
    from lavit_lm.training.module import LanguageModeling

    more = {"objective": LaVIT(continuous=True), **more} if continuous else more
    settings = {
        "lm": SMALL,
        "text_tokenizer": str(folder / "text"),
        "visual_tokenizer": str(folder / "visual"),
    }
    return trainer_of(LanguageModeling, **{**settings, "warmup_steps": 2, "lr": 3e-3, **more})


def data(folder: Path, **more: Any) -> Any:
    from lavit_lm.training.data_module import LanguageDataModule

    settings = {"shards": str(folder / "shards"), "block": 64, "batch_size": 2, "window": 10}
    return LanguageDataModule(**{**settings, **more})


def trainer(folder: Path, steps: int, callbacks: list[Any], **more: Any) -> Any:
    from pytorch_lightning import Trainer

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", **quiet, **more}
    return Trainer(callbacks=callbacks, default_root_dir=folder, **options)


def saving(folder: Path) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder / "ckpt", every_n_train_steps=1, save_last=True, save_top_k=-1)


def train_until_killed(folder: Path, losses: Path, steps: int, pause: float) -> None:
    """Slow enough not to finish."""
    trainer(folder, steps, [Losses(pause=pause, out=losses), saving(folder)]).fit(
        module(folder), data(folder)
    )


def train_together(
    folder: Path, strategy: str, batch: int, stop: int | None, settings: dict[str, Any]
) -> Any:
    """4 steps in one of several processes, resumed if possible: (losses, held-out losses, keys).

    At step `stop` the second process is killed.
    """
    from pytorch_lightning.strategies import ModelParallelStrategy

    from lavit_lm.training.log_samples import LogSamples
    from lavit_tok.training.checkpoints import AtomicCheckpointIO, find_checkpoint

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    out = folder / f"losses-{world}-{rank}"
    losses = Losses(stop if rank == 1 else None, out=out, kill=True)
    parallel = functools.partial(ModelParallelStrategy, world, 1)
    kinds: dict[str, Any] = {
        "ddp": lambda: "ddp",
        "fsdp": parallel,
        "fsdp, one file": lambda: parallel(save_distributed_checkpoint=False),
    }
    samples = LogSamples(every=2, images=2, decoder=None, max_new_tokens=4)
    options = {"strategy": kinds[strategy](), "plugins": [AtomicCheckpointIO()], **TOGETHER}
    fitted = trainer(folder, 4, [losses, saving(folder), samples], devices=world, **options)
    images = str(folder / "pictures") if settings.get("continuous") else None
    last = find_checkpoint("last-good", folder / "ckpt")
    rows = data(folder, batch_size=batch, images=images)
    fitted.fit(module(folder, **settings), rows, ckpt_path=last)
    return losses.values, losses.held_out, losses.keys


def start(target: Callable[..., Any], *arguments: Any, **variables: str) -> Any:
    """A process, and the end of a pipe that receives its result or its traceback."""
    context = multiprocessing.get_context("forkserver")
    modules = ("lavit_lm.training.module", "lavit_lm.training.data_module")
    context.set_forkserver_preload(["pytorch_lightning", "torch.distributed.fsdp", *modules])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, arguments, variables, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def together(world: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `world` processes with the environment that torchrun sets.

    When one is killed, the others are, as torchrun does, and there are no results.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    started = [
        start(target, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world)
    ]
    results: dict[Any, Any] = {}
    try:
        while len(results) < world:
            waiting = [pipe for _, pipe in started if pipe not in results]
            ready = multiprocessing.connection.wait(waiting, 180)
            assert ready, "no result in three minutes"
            for pipe in ready:
                try:
                    results[pipe] = pipe.recv()
                except EOFError:
                    return []
                if isinstance(results[pipe], str):
                    # Others lose their connection to a process that is killed, maybe first.
                    for process, _ in started:
                        process.join(5)
                    if any((process.exitcode or 0) < 0 for process, _ in started):
                        return []
                    raise AssertionError(results[pipe])
    finally:
        for process, pipe in started:
            if pipe not in results or len(results) < world:
                process.kill()
            process.join()
    return [results[pipe] for _, pipe in started]


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


def shards_of_all_patches(folder: Path, visual: Path) -> None:
    """Replace the shards of a folder by those of `visual` with 16 codes an image."""
    from lavit_tok.cli import main

    (folder / "shards").rename(folder / "dynamic")
    command = ["shards", folder / "pictures", "--tokenizer", visual]
    command += ["--budget", 16, "--out", folder / "shards"]
    assert main([str(word) for word in command]) == 0


def small_run(folder: Path, sources: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Overrides of a recipe: a small LM, and what is in a folder and the sources."""
    return {
        "model.lm": json.dumps(SMALL),
        "model.text_tokenizer": folder / "text",
        "model.visual_tokenizer": folder / "visual",
        "model.out": folder / "made",
        "model.schedule.warmup_steps": 1,
        "trainer.default_root_dir": folder / "run",
        "data.sources": json.dumps(sources),
        "data.batch_size": 2,
        **more,
    }
