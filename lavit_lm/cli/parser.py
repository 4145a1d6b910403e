"""The command line `lavit-lm`: train a language model on text and images, and use it.

    fit, validate, test -c RECIPE     training and held-out losses, by LightningCLI
    fit-tokenizer -c RECIPE           training of VL-GPT's tokenizer and detokenizer
    fit-decoder -c RECIPE             training of a decoder of the vectors that a model says
    generate PROMPT --out DIR         pictures of a prompt
    caption IMAGES...                 a line of text for each picture
    export MODEL OUT                  a plain `transformers` directory that other programs serve

Bad input is one line on stderr and exit code 2. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lavit_tok.cli.parser import Command, positive, run_command, seed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 bad input."""
    return run_command("lavit-lm", "Text and pictures in one language model.", COMMANDS, argv)


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model", default="default", metavar="M", help="'default', a directory or a Hub id"
    )
    sub.add_argument("--visual-tokenizer", metavar="T", help="if not the one the model names")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    sub.add_argument("--seed", type=seed, default=0, help="of whatever is drawn at random")


def _generate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("prompt", metavar="PROMPT", help="what to draw")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for PNG files and their codes",
    )
    sub.add_argument("-n", type=positive, default=4, help="pictures")
    sub.add_argument(
        "--guidance", type=float, default=3.0, help="of the language model; 1 for none"
    )
    sub.add_argument("--top-k", type=positive, default=50, help="codes to draw from at each step")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest code")
    sub.add_argument(
        "--decoder", default="default", metavar="D", help="'default', a directory or a Hub id"
    )
    sub.add_argument("--steps", type=positive, default=20, help="denoising steps")
    sub.add_argument(
        "--decoder-guidance", type=float, default=2.0, help="of the pixel decoder; 1 for none"
    )
    _model_arguments(sub)


def _caption_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, or - for a list of files on stdin",
    )
    sub.add_argument("--question", help="answer it instead")
    sub.add_argument("--max-tokens", type=positive, default=64, help="of a caption")
    sub.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="pictures at a time"
    )
    _model_arguments(sub)


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="'default', a directory or a Hub id")
    sub.add_argument("out", type=Path, metavar="OUT_DIR", help="new folder")
    sub.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights",
    )


COMMANDS: dict[str, Command] = {
    "fit": Command("train: fit -c recipe.yaml", "lavit_lm.cli.commands:fit"),
    "validate": Command(
        "held-out losses: validate -c recipe.yaml --ckpt_path last",
        "lavit_lm.cli.commands:validate",
    ),
    "test": Command(
        "losses on the test split: test -c recipe.yaml --ckpt_path last",
        "lavit_lm.cli.commands:test",
    ),
    "fit-tokenizer": Command(
        "train VL-GPT's tokenizer: fit-tokenizer -c recipe.yaml",
        "lavit_lm.cli.commands:fit_tokenizer",
    ),
    "fit-decoder": Command(
        "train a decoder of vectors that a model says: fit-decoder -c recipe.yaml",
        "lavit_lm.cli.commands:fit_decoder",
    ),
    "generate": Command(
        "pictures of a prompt", "lavit_lm.cli.commands:generate", _generate_arguments
    ),
    "caption": Command(
        "a line of text for each picture", "lavit_lm.cli.commands:caption", _caption_arguments
    ),
    "export": Command(
        "a plain transformers directory", "lavit_lm.cli.commands:export", _export_arguments
    ),
}

if __name__ == "__main__":
    sys.exit(main())
