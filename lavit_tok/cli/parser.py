"""The command line `lavit-tok`: its commands and arguments, and how bad input is reported.

    encode IMAGES...          images -> codes (.parquet, .jsonl, or JSON lines on stdout)
    decode CODES --out DIR    codes -> PNG or parquet files
    reconstruct [IMAGES...]   originals beside what their codes decode to
    shards DATASET --out DIR  a captioned data set -> parquet shards of codes, to train LMs on
    shards verify DIR         their check; makes the manifest again
    fit, fit-decoder,
    fit-mean-decoder,
    fit-sample-decoder        training, by LightningCLI
    recipes ACTION [NAME]     list, show or copy the training recipes
    demo                      a page in the browser: encode, decode, generate, compare
    convert RELEASE OUT       LaVIT's released files -> safetensors and JSON

Bad input is one line on stderr and exit code 2; a job whose items are all skipped has exit code 1,
one ended by SIGINT or SIGTERM 130 or 143. Files appear under their names when they are whole. Heavy
packages are imported by the command that needs them, so `lavit-tok --help` needs no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from lavit_tok import __version__
from lavit_tok.cli.recipes import with_files

BAD_INPUT = 2
LONGEST_MESSAGE = 2000  # characters; a list of tensors can be longer than a terminal


class Argument:
    """One argument of a command, as argparse's `add_argument` takes it."""

    def __init__(self, *names: str, **options: Any) -> None:
        self.names, self.options = names, options

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add it, with its default in the help."""
        options = dict(self.options)
        if options.get("default") is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument(*self.names, **options)


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    """One line."""
    run: str
    """module:function that runs it and returns the exit code; imported when the command runs."""
    arguments: Sequence[Argument] | None = None
    """Its arguments, whose namespace `run` gets. None: `run` gets the list of strings itself."""
    before: tuple[str, ...] = ()
    """What `run` gets before them."""


class Parser(argparse.ArgumentParser):
    """Reports errors on one line, with the names of similar options."""

    def error(self, message: str) -> NoReturn:
        parsers: list[Any] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        options = [name for parser in parsers for a in parser._actions for name in a.option_strings]
        message += similar(message, options)
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, 0 if it is done (perhaps with items skipped)."""
    return run_command("lavit-tok", "Images <-> a dynamic number of codes.", COMMANDS, argv)


def run_command(
    program: str, description: str, commands: dict[str, Command], argv: Sequence[str] | None = None
) -> int:
    """Parse the arguments and run the command that they name, for any program."""
    args = list(sys.argv[1:] if argv is None else argv)
    if (joined := "-".join(args[:2])) in commands:  # as "shards verify"
        args[:2] = [joined]
    command = commands.get(args[0]) if args else None
    if command is not None and command.arguments is None:
        return _run(program, command, args[1:])
    namespace = _parser(program, description, commands).parse_args(args)
    return _run(program, commands[namespace.command], namespace)


class _Terminated(BaseException):
    """SIGTERM: like KeyboardInterrupt, so that partial files are removed on the way out."""


def _run(program: str, command: Command, arguments: Any) -> int:
    """Run a command; report an error of these packages on one line. Others are bugs, and raised."""
    for stream in (sys.stdout, sys.stderr):  # names of files that are not UTF-8 can be printed
        with suppress(AttributeError):  # replaced by an object that is no text file
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _signals():
            return _reported(program, command, arguments)
    except KeyboardInterrupt:
        return _ended(program, signal.SIGINT)
    except _Terminated:
        return _ended(program, signal.SIGTERM)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into exit code 1
            return _ended(program, signal.SIGINT)
        raise


def _ended(program: str, number: signal.Signals) -> int:
    """The exit code that shells use for a signal, after one line on stderr."""
    print(f"{program}: ended by {number.name}; files already written are whole", file=sys.stderr)
    return 128 + number


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM raises _Terminated in this process, as SIGINT raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # signals are not its own
        yield
        return
    process = os.getpid()

    def terminate(number: int, frame: Any) -> None:
        if os.getpid() == process:
            raise _Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked worker, which inherits this handler
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reported(program: str, command: Command, arguments: Any) -> int:
    try:
        if command.arguments is None:
            arguments = with_files(arguments)
        return resolve_name(command.run)(*command.before, arguments)
    except BrokenPipeError:  # `lavit-tok encode ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError, OSError) as error:
        source = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = Path(__file__).parents[1], Path(__file__).parents[2] / "lavit_lm"
        if not isinstance(error, OSError) and not any(folder in source.parents for folder in ours):
            raise
        text = " ".join(str(error).split())
        if len(text) > LONGEST_MESSAGE:
            text = text[:LONGEST_MESSAGE] + " ..."
        print(f"{program}: error: {text}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_INPUT)


def similar(message: str, known: Sequence[str]) -> str:
    """What to append to an error message that quotes a misspelled name: a question, or nothing.

    Args:
        message: an error of unknown names; of another kind it gives "".
        known: options, or keys with dots.
    """
    if not re.search("unrecognized|not expected|not accept|no action for", message.lower()):
        return ""
    words = [word for word in re.findall(r"[\w.-]{3,}", message) if word not in known]
    bare = {name.lstrip("-"): name for name in known}
    found = (get_close_matches(word.lstrip("-").rstrip("."), bare, 1, 0.75) for word in words)
    names = dict.fromkeys(f"--{match[0]}" for match in found if match)
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def _parser(program: str, description: str, commands: dict[str, Command]) -> Parser:
    parser = Parser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        for argument in command.arguments or ():
            argument.add_to(subparser)
    return parser


def budget(text: str) -> int | float:
    """Type of --budget: "32" is 32 codes per image, "0.25" a quarter of the batch's patches."""
    value: int | float
    try:
        value = int(text)
    except ValueError:
        value = float(text)  # argparse reports its ValueError
    if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"expected a number of codes or a fraction in (0, 1], got {text}"
        )
    return value


def quality(text: str) -> float | tuple[str, float]:
    """Type of --quality: "0.85" is a centered cosine, "20dB" a PSNR of the patches' colors."""
    decibels = text.lower().removesuffix("db")
    value = float(decibels)
    if decibels != text.lower():
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected more than 0 dB, got {text}")
        return ("psnr", value)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a cosine between 0 and 1, or decibels such as 20dB, got {text}"
        )
    return value


def rate(text: str) -> float:
    """Type of --rate: a positive finite number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def integer(smallest: int, limit: int | None = None) -> Callable[[str], int]:
    """Type of integers of at least `smallest`, and below `limit`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < smallest or (limit is not None and value >= limit):
            below = "" if limit is None else f" and below {limit}"
            raise argparse.ArgumentTypeError(f"expected at least {smallest}{below}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse names it in "invalid integer value"
    return parse


positive, count, seed = integer(1), integer(0), integer(0, 2**63)

LOCATION = "'default', 'selected', a directory or a Hub id"
DTYPE = Argument(
    "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights"
)
DEVICE = Argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
SEED = Argument("--seed", type=seed, default=0, help="seed of all random numbers")


def images_argument(nargs: str) -> Argument:
    """The images of a command: "+" one or more, "*" any number."""
    text = "files, folders, or - for a list of files on stdin"
    return Argument("images", nargs=nargs, metavar="IMAGE", help=text)


def out_argument(text: str) -> Argument:
    """The output folder."""
    return Argument("--out", type=Path, required=True, metavar="DIR", help=text)


def batch_argument(text: str = "", size: int = 32) -> Argument:
    """The batch size."""
    return Argument(
        "--batch-size", type=positive, default=size, metavar="N", help=f"images at a time{text}"
    )


ENCODING = (
    Argument("--tokenizer", default="default", metavar="T", help=LOCATION),
    Argument(
        "--budget",
        type=budget,
        metavar="B",
        help="codes per image, or fraction of a batch's patches to keep; by default the number of "
        "codes depends on the image",
    ),
)
QUALITY = (
    Argument(
        "--quality",
        type=quality,
        metavar="Q",
        help="fewest codes that reach it: centered cosine of the features, or dB of the colors, "
        "such as 20dB",
    ),
    Argument(
        "--rate",
        type=rate,
        metavar="R",
        help="add a code while it reduces the error (of colors, or 1 - centered cosine, as the "
        "tokenizer's config names it) by more than this",
    ),
    Argument(
        "--verify",
        action="store_true",
        help="reach --quality by measurement, with an error for an image that cannot",
    ),
)
LIMITS = (
    Argument(
        "--max-bytes",
        type=positive,
        default=256 << 20,
        metavar="N",
        help="larger image files are skipped",
    ),
    Argument(
        "--max-pixels",
        type=positive,
        default=89_478_485,
        metavar="N",
        help="images of more pixels are skipped",
    ),
)
BATCH = batch_argument(
    "; codes do not depend on it unless --budget is a fraction or --sample is set"
)
OVERWRITE_FOLDER = Argument(
    "--overwrite",
    action="store_true",
    help="replace any files; without it only those that this program has written, so that the same "
    "command can be repeated",
)
DECODER = Argument(
    "--decoder",
    metavar="D",
    help=f"{LOCATION}; by default that of a shipped tokenizer, else 'default'",
)
MODES = ("sample", "mean")
MODE_HELP = "a plausible image, sharp, or the expected image, closer and blurred; by default sample"
DECODING = (
    DECODER,
    Argument(
        "--mode", choices=MODES, help=f"{MODE_HELP} if the decoder has a diffusion model, else mean"
    ),
    Argument("--steps", type=positive, default=20, help="denoising steps"),
    Argument("--guidance", type=float, default=3.0, help="guidance scale; 1: none, half the cost"),
    Argument(
        "--scheduler",
        choices=("ddim", "dpm", "euler", "unipc"),
        help="denoising scheduler; the decoder's own by default",
    ),
)

ENGINE = (
    Argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on a cluster, by pip install 'lavit-tok[ray]'; the same files",
    ),
    Argument("--address", metavar="A", help="of the Ray cluster, or auto; else a new one"),
    Argument("--workers", type=positive, default=1, metavar="N", help="of Ray, each with a model"),
    Argument(
        "--gpus-per-worker",
        type=float,
        default=0.0,
        metavar="G",
        help="of Ray, may be a fraction; 0 uses CPUs",
    ),
)

IMAGES = "lavit_tok.training.data_module:ImageDataModule"


def training(help: str, *before: str) -> Command:
    """A command of LightningCLI; `before` is what lavit_tok.cli.commands.train gets first."""
    return Command(help, "lavit_tok.cli.commands:train", None, before)


COMMANDS: dict[str, Command] = {
    "encode": Command(
        "images -> codes",
        "lavit_tok.cli.commands:encode",
        (
            images_argument("+"),
            *ENCODING,
            *QUALITY,
            Argument("--sample", action="store_true", help="sample keep decisions, as in training"),
            Argument(
                "--out",
                type=Path,
                metavar="FILE",
                help=".parquet or .jsonl; JSON lines to stdout by default",
            ),
            Argument(
                "--overwrite",
                action="store_true",
                help="replace an existing --out file; without it that is an error",
            ),
            *LIMITS,
            BATCH,
            DEVICE,
            SEED,
        ),
    ),
    "decode": Command(
        "codes -> images",
        "lavit_tok.cli.commands:decode",
        (
            Argument(
                "codes",
                type=Path,
                metavar="CODES",
                help=".parquet or .jsonl from encode, or a folder of such files or shards",
            ),
            out_argument("folder for the images; those of an interrupted job are not made again"),
            OVERWRITE_FOLDER,
            Argument(
                "--format",
                choices=("png", "parquet"),
                default="png",
                help="a PNG per record, or parquet files of them",
            ),
            Argument(
                "--shard-size",
                type=positive,
                default=1024,
                metavar="N",
                help="records per parquet file",
            ),
            *ENGINE,
            *DECODING,
            batch_argument("; the noise of an image depends only on --seed and its record number"),
            DEVICE,
            SEED,
        ),
    ),
    "reconstruct": Command(
        "originals beside what their codes decode to, and thumbnails of equal bits",
        "lavit_tok.cli.commands:reconstruct",
        (
            images_argument("*"),
            *ENCODING,
            *QUALITY,
            out_argument("folder for the sheets"),
            OVERWRITE_FOLDER,
            *LIMITS,
            *DECODING,
            BATCH,
            DEVICE,
            SEED,
        ),
    ),
    "shards": Command(
        "a captioned data set -> shards of codes to train language models on",
        "lavit_tok.cli.commands:shards",
        (
            Argument(
                "data",
                metavar="DATASET",
                help="image folder, parquet file, webdataset tars, arrow folder, or a Hub name; "
                "of the first three, URLs (s3://...) too",
            ),
            Argument(
                "--out",
                required=True,
                metavar="DIR",
                help="folder or URL (s3://...) for the shards; an interrupted job is resumed",
            ),
            Argument(
                "--streaming",
                action="store_true",
                help="read the data set's files (tar, parquet) in order, without a copy",
            ),
            *ENGINE,
            Argument("--split", metavar="NAME", help="one split; by default all splits"),
            Argument(
                "--image-column",
                default="image",
                metavar="C",
                help="if it does not exist, the column of images",
            ),
            Argument(
                "--caption-column",
                metavar="C",
                help="by default caption, text or txt if it exists; '' for images without captions",
            ),
            Argument(
                "--key-column",
                metavar="C",
                help="names each image; by default a column of keys, or the path",
            ),
            *ENCODING,
            Argument(
                "--flip", action="store_true", help="also tokenize each image's horizontal flip"
            ),
            Argument(
                "--shard-size", type=positive, default=4096, metavar="N", help="images per shard"
            ),
            Argument(
                "--num-workers",
                type=count,
                default=0,
                metavar="N",
                help="processes that open and resize images",
            ),
            *LIMITS,
            BATCH,
            DEVICE,
        ),
    ),
    "shards-verify": Command(
        "check shards, and make their manifest again from their footers",
        "lavit_tok.cli.commands:verify_shards",
        (Argument("folder", metavar="DIR", help="what shards --out wrote"),),
    ),
    "fit": Command("train a tokenizer: fit -c recipe.yaml", "lavit_tok.cli.commands:fit"),
    "fit-decoder": training(
        "train a pixel decoder: fit-decoder -c recipe.yaml",
        *("lavit-tok", "fit-decoder", "fit"),
        "lavit_tok.training.decoder_training:PixelDecoderTraining",
        IMAGES,
    ),
    "recipes": Command(
        "training recipes, which -c finds by name: list, show or copy them",
        "lavit_tok.cli.recipes:run",
        (
            Argument("action", choices=("list", "show", "copy"), help="what to do"),
            Argument("name", nargs="?", metavar="NAME", help="recipe, or to copy also a folder"),
            Argument("out", nargs="?", metavar="OUT", help="where to copy to; here by default"),
        ),
    ),
    "demo": Command(
        "a page in the browser: encode and decode images, generate, compare checkpoints",
        "lavit_tok.cli.demo:run",
        (
            Argument("--tokenizer", default="default", metavar="T", help=LOCATION),
            DECODER,
            Argument(
                "--compare",
                nargs=2,
                action="append",
                metavar=("T", "D"),
                help="tokenizer and decoder of another checkpoint of the tab Compare; repeatable",
            ),
            Argument(
                "--model",
                default="default",
                metavar="M",
                help="language model of the tab Generate; '' for none",
            ),
            Argument("--host", default="127.0.0.1", help="address to listen on"),
            Argument("--port", type=integer(1, 2**16), help="by default the first free from 7860"),
            DEVICE,
        ),
    ),
    "fit-mean-decoder": training(
        "train the mean decoder of nested codes: fit-mean-decoder -c recipe.yaml",
        *("lavit-tok", "fit-mean-decoder", "fit"),
        "lavit_tok.training.mean_decoder_training:MeanDecoderTraining",
        IMAGES,
    ),
    "fit-sample-decoder": training(
        "train the sample decoder of nested codes: fit-sample-decoder -c recipe.yaml",
        *("lavit-tok", "fit-sample-decoder", "fit"),
        "lavit_tok.training.sample_decoder_training:SampleDecoderTraining",
        IMAGES,
    ),
    "convert": Command(
        "LaVIT's released files -> the format of this package",
        "lavit_tok.cli.convert:convert",
        (
            Argument("release", type=Path, metavar="RELEASE_DIR", help="the released .bin files"),
            Argument("out", type=Path, metavar="OUT_DIR", help="new folder"),
            Argument(
                "--decoder",
                choices=("auto", "highres", "lowres", "none"),
                default="auto",
                help="auto: the high-resolution decoder if it exists, else the other, else none",
            ),
            DTYPE,
            Argument(
                "--attention",
                choices=("compat", "strict"),
                default="compat",
                help="compat: the formula of the released weights' training",
            ),
            Argument(
                "--num-heads",
                type=positive,
                metavar="N",
                help="attention heads; by default from the width",
            ),
        ),
    ),
}

if __name__ == "__main__":
    sys.exit(main())
