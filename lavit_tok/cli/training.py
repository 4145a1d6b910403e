"""TrainingCLI: LightningCLI with the defaults that all training recipes share, and short help."""

from __future__ import annotations

import argparse
import re
import warnings
from pkgutil import resolve_name
from typing import Any

from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins import CheckpointIO

from lavit_tok.training.checkpoints import AtomicCheckpointIO, find_checkpoint
from lavit_tok.training.logging import PrintMetrics

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # max_steps ends a run
    "check_val_every_n_epoch": None,  # val_check_interval counts steps
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_progress_bar": False,  # PrintMetrics, which suits log files, is in its place
}
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
    """

    checkpoint: str | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SaveCheckpoints, "checkpoint")
        parser.add_lightning_class_args(PrintMetrics, "print")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")
        parser.epilog = (
            "Further options of Lightning's Trainer: --trainer.NAME, as in its documentation."
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        if config.get("enable_checkpointing") is False:  # Lightning refuses checkpoint callbacks
            callbacks = [c for c in callbacks if not isinstance(c, SaveCheckpoints)]
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
    # LightningCLI warns when it does not read sys.argv itself.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    parser: dict[str, Any] = {"exit_on_error": False, "prog": program}
    # A subcommand takes its formatter from the parser above it.
    parser["formatter_class"] = type("Help", (ShortHelp,), {"command": f"{program} {command}"})
    # The fields of config records are documented by the string below each.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        TrainingCLI(
            resolve_name(model),
            resolve_name(data),
            args=[action, *args],
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},  # a resumed run writes to the same folder
            parser_kwargs={**parser, action: parser},
        )
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (see {program} {command} --help)") from None
    return 0
