"""What the commands of cli.py do. A bad picture or row is skipped, counted, listed, and told in the job's summary."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavit_tok.cli.parser import SCHEDULERS
from lavit_tok.codes import CodeError, VisualCodes
from lavit_tok.data.code_files import (
    CodeFileError,
    CodeRecord,
    Header,
    code_writer,
    read_codes,
    require_suffix,
)
from lavit_tok.data.jobs import (
    Rejects,
    chunks,
    device,
    list_images,
    opened,
    photographs,
    png_name,
    progress,
    save_png,
)
from lavit_tok.encode.image_processor import open_image
from lavit_tok.tokenizer import VisualTokenizer

PANEL = 256  # pixels of a panel's side, unless the model's pictures are larger
SHEET_ROWS = 64  # pictures on the common sheet


def encode(arguments: argparse.Namespace) -> int:
    """Pictures -> a file of codes."""
    if arguments.out is not None:
        require_suffix(arguments.out)
    paths = list_images(arguments.images)
    tokenizer = VisualTokenizer.from_pretrained(
        arguments.tokenizer, device=device(arguments.device)
    )
    config = tokenizer.config
    header = Header(str(arguments.tokenizer), config.codebook_size, config.num_patches)
    rejects = Rejects(
        arguments.out and Path(f"{arguments.out}.rejects.jsonl"), only=len(paths) == 1
    )
    generator = torch.Generator(tokenizer.device).manual_seed(arguments.seed)
    total = count = 0
    with rejects, code_writer(arguments.out, header) as writer:
        for chunk in chunks(enumerate(progress(paths, "encode")), arguments.batch_size):
            images = opened(chunk, rejects, tokenizer.image_processor)
            if not images:
                continue
            pixels = torch.stack(
                [tokenizer.image_processor.resize(image) for _, _, image in images]
            )
            codes = tokenizer.encode(pixels, arguments.budget, arguments.sample, generator).to(
                "cpu"
            )
            kept = [mask.nonzero().flatten().tolist() for mask in _keep(codes)]
            keys = [str(path) for _, path, _ in images]
            writer.add([CodeRecord(*row) for row in zip(keys, codes.to_list(), kept, strict=True)])
            count, total = count + len(codes), total + len(codes.values)
        rejects.require(count)
    mean = f"{total / count:.1f} codes each ({config.num_patches} patches)"
    print(f"encoded {count} of {len(paths)} pictures, {mean}{rejects.summary()}", file=sys.stderr)
    return 0


def decode(arguments: argparse.Namespace) -> int:
    """A file of codes -> PNG files, named by row and key."""
    header, rows = read_codes(arguments.codes)
    decoder = _decoder(arguments)
    size, patches = decoder.conditioner.config.codebook_size, decoder.conditioner.config.patches
    if header.codebook_size != size:
        raise CodeError(
            f"{arguments.codes}: its codes index a codebook of {header.codebook_size} rows, the decoder's has {size}: "
            "they would decode to unrelated pictures"
        )
    rejects, count = Rejects(arguments.out / "rejects.jsonl"), 0
    with rejects:
        for chunk in chunks(enumerate(progress(rows, "decode")), arguments.batch_size):
            good: list[tuple[int, CodeRecord]] = []
            for number, row in chunk:
                try:
                    good.append((number, _checked(row, size, patches)))
                except ValueError as error:
                    rejects.add(row.key, error)
            if not good:
                continue
            codes = VisualCodes.from_list([row.codes for _, row in good], size)
            images = _draw(decoder, codes, [number for number, _ in good], arguments)
            for (number, row), image in zip(good, images, strict=True):
                save_png(image, arguments.out / png_name(number, row.key))
            count += len(good)
        rejects.require(count)
    print(
        f"decoded {count} of {count + len(rejects.rows)} rows into {arguments.out}{rejects.summary()}",
        file=sys.stderr,
    )
    return 0


def reconstruct(arguments: argparse.Namespace) -> int:
    """Pictures -> sheets of original, kept patches (dropped ones dimmed) and reconstruction."""
    from lavit_tok.visualize import kept_overlay, sheet

    paths = list_images(arguments.images) if arguments.images else photographs()
    tokenizer = VisualTokenizer.from_pretrained(
        arguments.tokenizer, device=device(arguments.device)
    )
    decoder, config = _decoder(arguments), tokenizer.config
    side, grid = max(PANEL, config.image_size), config.image_size // config.patch_size
    titles = ("original", "kept patches", "reconstruction")
    rejects = Rejects(arguments.out / "rejects.jsonl", only=len(paths) == 1)
    lengths: list[int] = []
    rows: list[list[Image.Image]] = []
    labels: list[list[str]] = []
    with rejects:
        for chunk in chunks(enumerate(progress(paths, "reconstruct")), arguments.batch_size):
            images = opened(chunk, rejects, tokenizer.image_processor)
            if not images:
                continue
            pixels = torch.stack(
                [tokenizer.image_processor.resize(image) for _, _, image in images]
            )
            codes = tokenizer.encode(pixels, arguments.budget).to("cpu")
            drawn = _draw(decoder, codes, [number for number, _, _ in images], arguments)
            for (number, path, image), length, keep, decoded in zip(
                images, codes.lengths.tolist(), _keep(codes), drawn, strict=True
            ):
                original = open_image(tokenizer.image_processor.resize(image, side))
                kept = kept_overlay(original, keep, (grid, grid))
                panels = [original, kept, decoded.resize((side, side), Image.Resampling.BICUBIC)]
                texts = [
                    path.name,
                    f"{length} of {config.num_patches} patches",
                    f"from {length} codes",
                ]
                save_png(
                    sheet([panels], titles, [texts]), arguments.out / png_name(number, str(path))
                )
                print(f"{length:7d} of {config.num_patches} tokens  {path}")
                lengths.append(length)
                if len(rows) < SHEET_ROWS:
                    rows.append(panels)
                    labels.append(texts)
        rejects.require(len(lengths))
    whole = arguments.out / "sheet.png"
    save_png(sheet(rows, titles, labels), whole)
    print(
        f"{sum(lengths) / len(lengths):7.1f} tokens an image on average, {len(lengths)} images{rejects.summary()}"
    )
    print(f"sheet: {whole}")
    return 0


def shards(arguments: argparse.Namespace) -> int:
    """A captioned data set -> parquet files of codes."""
    try:
        from lavit_tok.data.shard_writer import run
    except ImportError as error:
        raise ImportError(
            f"reading data sets needs more packages: pip install 'lavit-tok[train]' ({error})"
        ) from None
    return run(arguments)


def fit(words: list[str]) -> int:
    """Train a tokenizer; the words are LightningCLI's."""
    return _train("fit", "lavit_tok.training.tokenizer_training:TokenizerTraining", words)


def fit_decoder(words: list[str]) -> int:
    """Train a pixel decoder; the words are LightningCLI's."""
    return _train("fit-decoder", "lavit_tok.training.decoder_training:PixelDecoderTraining", words)


def _train(command: str, model: str, words: list[str]) -> int:
    return lightning_command(
        "lavit-tok", command, "fit", model, "lavit_tok.training.data_module:ImageDataModule", words
    )


def lightning_command(
    program: str, command: str, action: str, model: str, data: str, words: list[str]
) -> int:
    """Run LightningCLI's `action` on a model and a data module, each named module:class.

    Raises:
        ImportError: the packages for training are not installed.
        ValueError: words or a recipe that do not fit.
    """
    try:
        from pytorch_lightning.cli import LightningCLI

        model_class, data_class = resolve_name(model), resolve_name(data)
    except ImportError as error:
        raise ImportError(
            f"training needs more packages: pip install 'lavit-tok[train]' ({error})"
        ) from None
    warnings.filterwarnings(
        "ignore", "LightningCLI's args parameter"
    )  # it would rather read sys.argv itself
    parser: dict[str, Any] = {"exit_on_error": False, "prog": program}
    try:
        LightningCLI(
            model_class,
            data_class,
            args=[action, *words],
            auto_configure_optimizers=False,
            save_config_kwargs={
                "overwrite": True
            },  # a resumed run writes its config where the first one did
            parser_kwargs={**parser, action: parser},
        )
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (see {program} {command} --help)") from None
    return 0


def _keep(codes: VisualCodes) -> torch.Tensor:
    assert codes.keep is not None  # codes of pictures always know their patches
    return codes.keep


def _checked(row: Any, size: int, patches: int) -> CodeRecord:
    """The row, if a decoder of this codebook size and number of patches can draw it. Raises ValueError."""
    if not isinstance(row, CodeRecord):
        raise CodeFileError(row.reason)
    VisualCodes.from_list([row.codes], size)
    if not 1 <= len(row.codes) <= patches:
        raise CodeError(f"expected 1..{patches} codes, got {len(row.codes)}")
    return row


def _draw(
    decoder: Any, codes: VisualCodes, numbers: list[int], arguments: argparse.Namespace
) -> list[Image.Image]:
    """Pictures whose noise depends on the seed and their row alone, so that the batch size does not matter."""
    seeds = [
        np.random.SeedSequence((arguments.seed, number)).generate_state(1, np.uint64)[0]
        for number in numbers
    ]
    generators = [torch.Generator().manual_seed(int(seed >> np.uint64(1))) for seed in seeds]
    return decoder(codes, arguments.steps, arguments.guidance, generators).images


def _decoder(arguments: argparse.Namespace) -> Any:
    import diffusers

    from lavit_tok.decode.pipeline import PixelDecoder

    decoder = PixelDecoder.from_pretrained(arguments.decoder, device=device(arguments.device))
    decoder.set_progress_bar_config(disable=True)
    if arguments.scheduler is not None:
        scheduler = getattr(diffusers, SCHEDULERS[arguments.scheduler])
        decoder.scheduler = scheduler.from_config(decoder.scheduler.config)
    return decoder
