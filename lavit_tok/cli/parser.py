"""The command line `lavit-tok`: what can be asked, and how bad input is answered.

    encode IMAGES...          pictures -> codes (.parquet, .jsonl, or JSON lines on stdout)
    decode CODES --out DIR    codes -> PNG files
    reconstruct [IMAGES...]   original, kept patches and reconstruction side by side
    shards DATASET --out DIR  a captioned data set -> parquet shards of codes, to train language models from
    fit, fit-decoder          training, by Lightning
    convert RELEASE OUT       LaVIT's released files -> safetensors and JSON

Bad input is one line on stderr and exit code 2. Everything heavy is imported by the command that needs it, so that
`lavit-tok --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

BAD_INPUT = 2
SHOWN = 2000  # characters of an error message; a list of differing tensors can be longer than a terminal


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    """One line."""
    run: str
    """module:function that does it and returns the exit code; the module is imported when the command runs."""
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    """Adds the arguments to a parser, whose namespace `run` gets. None: `run` parses the list of words itself."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. 0: done, perhaps with rows skipped, as the summary says; 2: bad input."""
    return run_command(
        "lavit-tok", "Pictures <-> a dynamic number of discrete codes.", COMMANDS, argv
    )


def run_command(
    program: str, description: str, commands: dict[str, Command], argv: Sequence[str] | None = None
) -> int:
    """Parse the words and run what they name, for any program of such commands."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = commands.get(words[0]) if words else None
    if command is not None and command.arguments is None:
        return guarded(program, command, words[1:])
    arguments = parser(program, description, commands).parse_args(words)
    return guarded(program, commands[arguments.command], arguments)


def guarded(program: str, command: Command, arguments: Any) -> int:
    """Bad input as one line and exit code 2. An error that these packages did not raise is a bug, and shown in full."""
    try:
        return resolve_name(command.run)(arguments)
    except BrokenPipeError:  # `lavit-tok encode ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError, OSError) as error:
        source = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = Path(__file__).parents[1], Path(__file__).parents[2] / "lavit_lm"
        if not isinstance(error, OSError) and not any(folder in source.parents for folder in ours):
            raise
        text = " ".join(str(error).split())
        print(f"{program}: error: {text[:SHOWN]}{' ...' * (len(text) > SHOWN)}", file=sys.stderr)
        return BAD_INPUT


def parser(program: str, description: str, commands: dict[str, Command]) -> argparse.ArgumentParser:
    top = Parser(prog=program, description=description)
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in commands.items():
        sub = subs.add_parser(name, help=command.help, description=command.help)
        if command.arguments is not None:
            command.arguments(sub)
    return top


def budget(text: str) -> int | float:
    """The text "32" is 32 codes an image, "0.25" a quarter of the batch's patches."""
    value: int | float
    try:
        value = int(text)
    except ValueError:
        value = float(text)  # argparse turns the ValueError into its own message
    if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"expected a number of codes or a fraction in (0, 1], got {text}"
        )
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 or more, below 2^63, got {text}")
    return value


def _tokenizer_arguments(sub: argparse.ArgumentParser, images: str) -> None:
    sub.add_argument(
        "images",
        nargs=images,
        metavar="IMAGE",
        help="files, folders, or - for a list of files on stdin",
    )
    _encoding_arguments(sub)
    _common_arguments(
        sub,
        "codes an image do not depend on it, unless --budget is a fraction or --sample is given",
    )


def _encoding_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--tokenizer", default="default", metavar="T", help="'default', a directory or a Hub id"
    )
    sub.add_argument(
        "--budget",
        type=budget,
        metavar="B",
        help="codes an image, or the fraction of a batch's patches to keep; by default every image has its own number",
    )


def _common_arguments(sub: argparse.ArgumentParser, batch: str) -> None:
    _batch_arguments(sub, batch)
    sub.add_argument("--seed", type=seed, default=0, help="of whatever is drawn at random")


def _batch_arguments(sub: argparse.ArgumentParser, batch: str) -> None:
    sub.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help=f"pictures at a time; {batch}"
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")


def _decoder_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--decoder", default="default", metavar="D", help="'default', a directory or a Hub id"
    )
    sub.add_argument("--steps", type=positive, default=20, help="denoising steps")
    sub.add_argument(
        "--guidance", type=float, default=3.0, help="guidance scale; 1 for none, at half the cost"
    )
    sub.add_argument(
        "--scheduler", choices=SCHEDULERS, help="of the denoising; the decoder's own by default"
    )


def _encode_arguments(sub: argparse.ArgumentParser) -> None:
    _tokenizer_arguments(sub, "+")
    sub.add_argument(
        "--sample", action="store_true", help="draw the keep decisions at random, as in training"
    )
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".parquet or .jsonl; JSON lines to stdout by default",
    )


def _decode_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "codes", type=Path, metavar="CODES", help="a .parquet or .jsonl file that encode wrote"
    )
    sub.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for one PNG a row"
    )
    _decoder_arguments(sub)
    _common_arguments(sub, "each picture's noise depends on --seed and its row alone")


def _reconstruct_arguments(sub: argparse.ArgumentParser) -> None:
    _tokenizer_arguments(sub, "*")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the sheets")
    _decoder_arguments(sub)


def _shards_arguments(sub: argparse.ArgumentParser) -> None:
    data = "image folder, parquet file, webdataset tars, arrow folder, or a Hub name"
    sub.add_argument("data", metavar="DATASET", help=data)
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the shards; resumed if stopped",
    )
    sub.add_argument(
        "--split", metavar="NAME", help="one split; by default every split of the data set"
    )
    sub.add_argument(
        "--image-column",
        default="image",
        metavar="C",
        help="if absent, the column of pictures is found",
    )
    sub.add_argument(
        "--caption-column",
        metavar="C",
        help="caption, text or txt by default; '' for pictures alone",
    )
    sub.add_argument(
        "--key-column",
        metavar="C",
        help="what to call a picture; a column of keys or its path by default",
    )
    _encoding_arguments(sub)
    sub.add_argument(
        "--flip", action="store_true", help="tokenize each picture's mirror image, too"
    )
    sub.add_argument(
        "--shard-size", type=positive, default=4096, metavar="N", help="pictures a shard"
    )
    sub.add_argument(
        "--num-workers", type=count, default=0, metavar="N", help="processes that open and resize"
    )
    _batch_arguments(sub, "codes do not depend on it, unless --budget is a fraction")


def _convert_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "release",
        type=Path,
        metavar="RELEASE_DIR",
        help="LaVIT's released files, .bin, as downloaded",
    )
    sub.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="new folder for tokenizer/ and decoder/"
    )
    sub.add_argument(
        "--decoder",
        choices=("auto", "highres", "lowres", "none"),
        default="auto",
        help="auto: the high-res decoder if it is there, else the low-res one, else none",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights",
    )
    sub.add_argument(
        "--attention",
        choices=("compat", "strict"),
        default="compat",
        help="compat: the formula they were trained with",
    )
    sub.add_argument(
        "--num-heads", type=positive, metavar="N", help="attention heads; by default from the width"
    )


SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Names on the command line -> diffusers' classes; each takes over the training schedule of the decoder's own."""

COMMANDS: dict[str, Command] = {
    "encode": Command("pictures -> codes", "lavit_tok.cli.commands:encode", _encode_arguments),
    "decode": Command("codes -> pictures", "lavit_tok.cli.commands:decode", _decode_arguments),
    "reconstruct": Command(
        "original, kept patches and reconstruction side by side",
        "lavit_tok.cli.commands:reconstruct",
        _reconstruct_arguments,
    ),
    "shards": Command(
        "a captioned data set -> shards of codes to train language models from",
        "lavit_tok.cli.commands:shards",
        _shards_arguments,
    ),
    "fit": Command("train a tokenizer: fit -c recipe.yaml", "lavit_tok.cli.commands:fit"),
    "fit-decoder": Command(
        "train a pixel decoder: fit-decoder -c recipe.yaml", "lavit_tok.cli.commands:fit_decoder"
    ),
    "convert": Command(
        "LaVIT's released files -> this package's",
        "lavit_tok.cli.convert:convert",
        _convert_arguments,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
