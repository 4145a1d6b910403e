"""The command line `lavit-lm`: train language models on text and images, and use them.

    fit, validate, test -c RECIPE     train, or compute losses on held-out data, by LightningCLI
    fit-tokenizer -c RECIPE           train VL-GPT's tokenizer and detokenizer
    fit-decoder -c RECIPE             train an image decoder for a model that generates vectors
    generate PROMPT --out DIR         generate images for a prompt
    caption IMAGES...                 caption images, or answer a question about them
    export MODEL OUT_DIR              write a plain `transformers` directory that engines can serve

Bad input is one line on stderr and exit code 2. Each command imports the packages it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lavit_tok.cli.parser import Command, positive, run_command, seed

MODEL = "'default', a directory or a Hub id"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 bad input."""
    return run_command("lavit-lm", "Language models of text and images.", COMMANDS, argv)


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="default", metavar="M", help=MODEL)
    sub.add_argument(
        "--visual-tokenizer", metavar="T", help="replaces the visual tokenizer of the model"
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")


def _generate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("prompt", metavar="PROMPT", help="description of the image")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for PNG files and codes"
    )
    sub.add_argument("-n", type=positive, default=4, help="number of images")
    sub.add_argument("--seed", type=seed, default=0, help="seed of the random generator")
    sub.add_argument(
        "--guidance", type=float, default=3.0, help="guidance scale of the language model; 1: none"
    )
    sub.add_argument("--top-k", type=positive, default=50, help="sample from the k likeliest codes")
    sub.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding"
    )
    sub.add_argument("--decoder", default="default", metavar="D", help=MODEL)
    sub.add_argument("--steps", type=positive, default=20, help="denoising steps")
    sub.add_argument(
        "--decoder-guidance",
        type=float,
        default=2.0,
        help="guidance scale of the pixel decoder; 1: none",
    )
    _model_arguments(sub)


def _caption_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, or - for a list of files on stdin",
    )
    sub.add_argument("--question", help="answer this question about each image instead")
    sub.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="longest caption or answer"
    )
    sub.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="images at a time"
    )
    _model_arguments(sub)


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    sub.add_argument("out", type=Path, metavar="OUT_DIR", help="new folder")
    sub.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype of the weights",
    )


RUN = "lavit_lm.cli.commands"
COMMANDS: dict[str, Command] = {
    "fit": Command("train: fit -c recipe.yaml", f"{RUN}:fit"),
    "validate": Command(
        "losses on the validation split: validate -c recipe.yaml --ckpt_path last",
        f"{RUN}:validate",
    ),
    "test": Command(
        "losses on the test split: test -c recipe.yaml --ckpt_path last", f"{RUN}:test"
    ),
    "fit-tokenizer": Command(
        "train VL-GPT's tokenizer: fit-tokenizer -c recipe.yaml", f"{RUN}:fit_tokenizer"
    ),
    "fit-decoder": Command(
        "train an image decoder for a model that generates vectors: fit-decoder -c recipe.yaml",
        f"{RUN}:fit_decoder",
    ),
    "generate": Command("images for a prompt", f"{RUN}:generate", _generate_arguments),
    "caption": Command("a caption for each image", f"{RUN}:caption", _caption_arguments),
    "export": Command("a plain transformers directory", f"{RUN}:export", _export_arguments),
}

if __name__ == "__main__":
    sys.exit(main())
