"""TrainingCLI: LightningCLI with the defaults that all training recipes share, and short help."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytorch_lightning as pl
from docstring_parser import DocstringStyle
from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lavit_tok.cli.parser import similar
from lavit_tok.training.checkpoints import (
    WRITTEN_LAST,
    AtomicCheckpointIO,
    find_checkpoint,
)
from lavit_tok.training.logging import PrintMetrics, progress_bar

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # max_steps ends a run
    "check_val_every_n_epoch": None,  # val_check_interval counts steps
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_progress_bar": None,  # in a terminal; elsewhere PrintMetrics, which suits log files
}
QUIET = (
    # Lightning's notes on what these runs do on purpose, or that concern its own code: frozen parts
    # are in eval mode, few steps, workers and epochs, resuming with other callbacks.
    r"Found \d+ module\(s\) in eval mode",
    "The number of training batches",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed from",
    "Be aware that when using .ckpt_path., callbacks",
    "You defined a .validation_step. but have no .val_dataloader.",
    "You have overridden .(transfer_batch_to_device|on_after_batch_transfer).",
    "Precision bf16-mixed is not supported by the model summary",
    "The .* does not have many workers",
    ".isinstance.treespec, LeafSpec.. is deprecated",
    "Converting a tensor with requires_grad=True to a scalar",
    ".is_gradient_checkpointing. is deprecated",
    "LightningCLI's args parameter",  # it warns when it does not read sys.argv itself
)
SHOWN_TRAINER_OPTIONS = {
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "callbacks"),
    *("val_check_interval", "limit_val_batches", "accumulate_grad_batches", "default_root_dir"),
    *TRAINER_DEFAULTS,
}


class SaveCheckpoints(ModelCheckpoint):
    """Saves the latest checkpoint, as last.ckpt too, from which `--ckpt_path last` resumes.

    Args:
        dirpath: folder of the checkpoints.
        every: training steps between two checkpoints.
    """

    def __init__(self, dirpath: str | None = None, every: int = 500) -> None:
        super().__init__(dirpath, every_n_train_steps=every, save_last=True)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Save; of a directory that is overwritten in part, the rest is not taken for whole."""
        if trainer.is_global_zero and Path(filepath).is_dir():
            for name in WRITTEN_LAST:
                (Path(filepath) / name).unlink(missing_ok=True)
        super()._save_checkpoint(trainer, filepath)


class ShortHelp(DefaultHelpFormatter):
    """Help with a one-line usage, and with the first sentence and the default of each option."""

    command: str

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        usage = f"{self.command} -c RECIPE [--GROUP.OPTION VALUE ...]"
        super().add_usage(usage, actions, groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        group, _, option = action.dest.partition(".")
        rare = group == "trainer" and option not in SHOWN_TRAINER_OPTIONS
        if not (rare or action.dest.endswith(".help") or action.metavar == "CONFIG"):
            super().add_argument(action)

    def _expand_help(self, action: argparse.Action) -> str:
        text, _, types = super()._expand_help(action).partition(" (type: ")
        # not behind "e.g."
        sentence = re.split(r"(?<=[^g][.;])\s", text.strip(), maxsplit=1)[0].rstrip(".:;")
        default = re.search(r"default: (.*?)(?:, known subclasses|\)$)", types)
        return sentence + (f" (default: {default[1]})" if default else "")


class TrainingCLI(LightningCLI):
    """LightningCLI with checkpoints (`--checkpoint.every`) and printed metrics (`--print.every`).

    `--ckpt_path last` resumes from the last checkpoint, or starts anew without one;
    `--ckpt_path last-good` from the last one that is whole (see find_checkpoint).

    Args:
        action: "fit", "validate", "test" or "predict".
        kwargs: see LightningCLI.
    """

    checkpoint: str | None = None

    def __init__(self, action: str, **kwargs: Any) -> None:
        self.action = action
        super().__init__(**kwargs)

    def subcommands(self) -> dict[str, set[str]]:
        """Only the action of this call: a parser for each of Lightning's four takes seconds."""
        return {self.action: LightningCLI.subcommands()[self.action]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SaveCheckpoints, "checkpoint")
        parser.add_lightning_class_args(PrintMetrics, "print")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")
        parser.epilog = (
            "Further options of Lightning's Trainer: --trainer.NAME, as in its documentation."
        )

    def before_instantiate_classes(self) -> None:
        """Fill in arguments of the model that follow from those of the data."""
        complete = getattr(self._model_class, "complete_arguments", None)
        if complete is not None:
            config = self.config[self.subcommand]
            complete(config.model, config.data, Path(config.trainer.default_root_dir or "."))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        if config.get("enable_checkpointing") is False:  # Lightning refuses checkpoint callbacks
            callbacks = [c for c in callbacks if not isinstance(c, SaveCheckpoints)]
        bar = config.get("enable_progress_bar")
        config["enable_progress_bar"] = bar = sys.stdout.isatty() if bar is None else bar
        if bar:
            callbacks = [c for c in callbacks if not isinstance(c, PrintMetrics)] + [progress_bar()]
        if config.get("enable_model_summary") is not False:
            name = "RichModelSummary" if find_spec("rich") else "ModelSummary"
            callbacks = [*callbacks, getattr(pl.callbacks, name)(max_depth=2)]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        values = self.config[self.config.subcommand]
        if values.ckpt_path:
            self.checkpoint = find_checkpoint(values.ckpt_path, values.checkpoint.dirpath)
        super()._parse_ckpt_path()  # which loads a checkpoint that is named by its path

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "ckpt_path": self.checkpoint}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an error of an unknown key has the names of similar ones."""
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            known = [a.dest for p in self._subcommand_parsers.values() for a in p._actions]
            raise argparse.ArgumentError(None, f"{error}{similar(str(error), known)}") from None


def run_training(
    program: str, command: str, action: str, model: str, data: str, args: list[str]
) -> int:
    """Run an action of TrainingCLI ("fit", "validate", "test").

    Args:
        program: name of the program, for help and messages.
        command: name of its subcommand.
        action: the method of the Trainer.
        model: "module:class" of the LightningModule.
        data: "module:class" of the data module.
        args: the arguments behind the command.

    Raises:
        ValueError: arguments or a recipe that do not fit.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    for name in ("pytorch_lightning", "lightning_fabric"):  # devices, seeds, advertisements
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
        logging.getLogger(f"{name}.utilities.seed").setLevel(logging.WARNING)
    parser: dict[str, Any] = {"exit_on_error": False, "prog": program}
    # A subcommand takes its formatter from the parser above it.
    parser["formatter_class"] = type("Help", (ShortHelp,), {"command": f"{program} {command}"})
    # The fields of config records are documented by the string below each.
    set_parsing_settings(
        docstring_parse_style=DocstringStyle.GOOGLE, docstring_parse_attribute_docstrings=True
    )
    try:
        cli = TrainingCLI(
            action,
            model_class=resolve_name(model),
            datamodule_class=resolve_name(data),
            args=[action, *args],
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},  # a resumed run writes to the same folder
            parser_kwargs={**parser, action: parser},
        )
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (see {program} {command} --help)") from None
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from None
    if action == "fit" and cli.trainer.is_global_zero:
        print(cli.model.outcome(), file=sys.stderr)
    return 0
