"""Command lines of the benchmarks: shared arguments, a script's own options, errors as one line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DATA: dict[str, tuple[Any, ...]] = {
    "split": (str, "split of --data; test, else validation, else the first by default"),
    "limit": (int, "at most this many images, evenly spaced"),
}
SHARED: dict[str, tuple[Any, ...]] = {
    "out": (Path("results"), "folder of the result files"),
    "batch_size": (64, "items per batch"),
    "device": ("cpu", "torch device"),
    "threads": (int, "CPU threads of torch; its own choice by default"),
}


def parser(doc: str | None, data: bool = True, **options: Any) -> argparse.ArgumentParser:
    """The parser of one script.

    Args:
        doc: the script's docstring; its first line is shown.
        data: whether it takes --data, --split and --limit.
        options: name -> (default, help) or (default, help, choices). False is a flag, a list takes
            several values, a type is an option of that type without a default.
    """
    kind: Any = argparse.ArgumentDefaultsHelpFormatter
    result = argparse.ArgumentParser(description=(doc or "").split("\n")[0], formatter_class=kind)
    if data:
        text = "image folder, parquet or arrow path, or Hub name"
        result.add_argument("--data", required=True, help=text)
    for name, (default, text, *choices) in {**(DATA if data else {}), **SHARED, **options}.items():
        flag = "--" + name.replace("_", "-")
        if default is False:
            result.add_argument(flag, action="store_true", help=text)
            continue
        several = isinstance(default, list)
        value = default[0] if several else default
        known = not isinstance(value, type)
        keywords: dict[str, Any] = {"nargs": "*"} if several else {}
        keywords |= {"type": type(value) if known else value, "default": default if known else None}
        keywords["type"] = positive if keywords["type"] is int and value != 0 else keywords["type"]
        result.add_argument(flag, help=text, choices=choices[0] if choices else None, **keywords)
    return result


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def run(main: Callable[[Any], Any], arguments: argparse.ArgumentParser, argv: Any = None) -> int:
    """Run main on the command line. Errors that a user can correct are one line and exit code 2."""
    args = arguments.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        main(args)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
