"""The commands of `lavit-tok`. Bad images and records are skipped, counted and listed."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lavit_tok.checkpoints.files import folder_or_url, is_remote, printable, remove_partials
from lavit_tok.checkpoints.weights import shipped_with
from lavit_tok.cli.items import (
    REJECTS,
    SHEET,
    chunks,
    decoder_name,
    device,
    limit_images,
    list_images,
    open_images,
    photographs,
    progress,
    save_png,
)
from lavit_tok.cli.parser import IMAGES
from lavit_tok.codes import CodeError, VisualCodes
from lavit_tok.data.code_files import (
    CodeFileError,
    CodeFileHeader,
    CodeRecord,
    code_writer,
    require_suffix,
)
from lavit_tok.data.decode_batch import DecodeBatch, generators
from lavit_tok.data.decode_files import CodeSource, code_files, decode_files, existing, png_name
from lavit_tok.data.ray_engine import RayOptions, map_on_ray, ray_cluster
from lavit_tok.data.rejects import Rejects
from lavit_tok.encode.image_files import open_image
from lavit_tok.tokenizer import VisualTokenizer

PANEL = 256  # side of a panel in pixels, unless the model's images are larger
SHEET_IMAGES = 64  # images on the common sheet
DECODED = (64,)  # numbers of nested codes that a sheet shows beside the default and all


def encode(arguments: argparse.Namespace) -> int:
    """Images -> a code file."""
    if arguments.out is not None:
        require_suffix(arguments.out)
        remove_partials(arguments.out.parent, arguments.out.name)
        if arguments.out.exists() and not arguments.overwrite:
            raise CodeFileError(
                f"{arguments.out}: exists: --overwrite replaces it, which would lose its codes"
            )
    paths = list_images(arguments.images)
    tokenizer = _tokenizer(arguments)
    config = tokenizer.config
    sizes = config.codebook_size, config.num_patches
    header = CodeFileHeader(str(arguments.tokenizer), *sizes, tokenizer.fingerprint())
    rejects_path = arguments.out and Path(f"{arguments.out}.rejects.jsonl")
    rejects = Rejects(rejects_path, only=len(paths) == 1)
    limit_images(tokenizer.image_processor, arguments)
    generator = torch.Generator(tokenizer.device).manual_seed(arguments.seed)
    total = count = 0
    # Rejects are written before the output appears: of an existing output no job goes on.
    with code_writer(arguments.out, header) as writer, rejects:
        for chunk in chunks(enumerate(progress(paths, "encode")), arguments.batch_size):
            images = open_images(chunk, rejects, tokenizer.image_processor)
            if not images:
                continue
            pixels = torch.stack([image for _, _, (image,) in images])
            codes = tokenizer.encode(
                pixels,
                arguments.budget,
                arguments.sample,
                generator,
                **_allocation(arguments),
            ).to("cpu")
            keep = [mask.nonzero().flatten().tolist() for mask in _keep(codes)]
            keys = [str(path) for _, path, _ in images]
            writer.add(list(map(CodeRecord, keys, codes.to_list(), keep)))
            count, total = count + len(codes), total + len(codes.values)
        rejects.require(count)
    mean = f"{total / count:.1f} codes per image ({config.num_patches} patches)"
    print(f"encoded {count} of {len(paths)} images, {mean}{rejects.summary()}", file=sys.stderr)
    return 0


def decode(arguments: argparse.Namespace) -> int:
    """Code files -> PNG files, named by number and key, or parquet files of them."""
    paths, header = code_files(arguments.codes)
    ray = ray_options(arguments)
    done = existing(arguments.out, arguments.format, arguments.overwrite)
    stage = _decode_batch(arguments, header.tokenizer)
    conditioner = stage.decoder.conditioner
    size, patches = conditioner.config.codebook_size, conditioner.config.patches
    if header.fingerprint not in (None, own := conditioner.fingerprint()):
        shipped = shipped_with(header.fingerprint)
        remedy = (
            f"--decoder {shipped} decodes them"
            if shipped
            else "use the decoder of that tokenizer, or encode the images again"
        )
        raise CodeError(
            f"{arguments.codes}: expected codes of the codebook {own}, as the decoder has, got "
            f"those of {header.fingerprint} (tokenizer {shipped or header.tokenizer!r}): they "
            f"would decode to unrelated images; {remedy}"
        )
    if header.codebook_size != size:
        raise CodeError(
            f"{arguments.codes}: expected codes of a codebook of {size} entries, as the decoder "
            f"has, got {header.codebook_size}: they would decode to unrelated images"
        )
    block = arguments.shard_size if arguments.format == "parquet" else None
    digest = stage.digest()
    source = CodeSource(paths, arguments.batch_size, block, digest, size, patches, done)
    rejects = Rejects(arguments.out / REJECTS, overwrite=arguments.overwrite)
    with rejects, nullcontext() if ray is None else ray_cluster(ray) as started:
        tables: Iterator[Any] = (
            stage(table) for item in source.work() for table in source.batches(item)
        )
        if ray is not None and started is not None:
            started()
            tables = map_on_ray(source.work(), source.batches, stage, digest, ray)
        count, earlier = decode_files(tables, arguments.out, rejects)
    remove_partials(arguments.out)
    total = count + len(rejects.items)
    before = f", {earlier} of them by earlier runs" if earlier else ""
    summary = f"decoded {count} of {total} records into {arguments.out}{before}{rejects.summary()}"
    print(summary, file=sys.stderr)
    return 0


def reconstruct(arguments: argparse.Namespace) -> int:
    """Images -> sheets of the original, what its codes decode to, and a thumbnail of equal bits.

    Of selected codes also the kept patches (the others dimmed). Of nested codes, unless a number
    is requested, what the default number, DECODED and all codes decode to; unless a mode is,
    the decoder's other mode, too, beside the thumbnail of as many bits.
    """
    from lavit_tok.visualize import sheet

    paths = list_images(arguments.images) if arguments.images else photographs()
    existing(arguments.out, "png", arguments.overwrite)
    tokenizer, decoder = (
        _tokenizer(arguments),
        _decode_batch(arguments, arguments.tokenizer).decoder,
    )
    limit_images(tokenizer.image_processor, arguments)
    config, processor = tokenizer.config, tokenizer.image_processor
    side = max(PANEL, config.image_size)
    titles: list[str] = []
    rejects = Rejects(arguments.out / REJECTS, overwrite=arguments.overwrite, only=len(paths) == 1)
    lengths: list[int] = []
    panels: list[list[Image.Image]] = []
    labels: list[list[str]] = []
    with rejects:
        for chunk in chunks(enumerate(progress(paths, "reconstruct")), arguments.batch_size):
            images = open_images(chunk, rejects, processor, (None, side))
            if not images:
                continue
            pixels = torch.stack([image for _, _, (image, _) in images])
            shown = _encodings(tokenizer, pixels, arguments)
            compared = [*shown][len(shown) // 2]
            numbers = [number for number, _, _ in images]
            decoded = {}
            for title, codes in shown.items():
                decoded[title] = codes, _decode(decoder, codes, numbers, arguments)
                others = decoder.modes[1:] if title == compared and arguments.mode is None else []
                for mode in others:
                    made = _decode(decoder, codes, numbers, arguments, mode)
                    decoded[f"{title}, {mode}"] = codes, made
            for i, (number, path, (small, panel)) in enumerate(images):
                of_image = {t: (c.take([i]), made[i]) for t, (c, made) in decoded.items()}
                original = open_image(panel)
                found = [("original", printable(path.name), original)]
                found += _panels(tokenizer, original, open_image(small), of_image, compared)
                titles, texts, line = map(list, zip(*found, strict=True))
                line = [x.resize((side, side), Image.Resampling.BICUBIC) for x in line]
                file = arguments.out / png_name(number, str(path))
                save_png(sheet([line], titles, [texts]), file)
                length = int(next(iter(shown.values())).lengths[i])
                print(f"{length:7d} of {config.num_patches} codes  {printable(str(path))}")
                lengths.append(length)
                if len(panels) < SHEET_IMAGES:
                    panels.append(line)
                    labels.append(texts)
        rejects.require(len(lengths))
    sheet_file = arguments.out / SHEET
    save_png(sheet(panels, titles, labels), sheet_file)
    remove_partials(arguments.out)
    mean = sum(lengths) / len(lengths)
    print(f"{mean:7.1f} codes per image on average, {len(lengths)} images{rejects.summary()}")
    print(f"sheet: {sheet_file}")
    return 0


def _encodings(
    tokenizer: VisualTokenizer, pixels: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, VisualCodes]:
    """The codes that a sheet shows, by title; first those whose number is printed."""
    request = {"budget": arguments.budget, **_allocation(arguments)}
    codes = tokenizer.encode(pixels, **request).to("cpu")
    if not tokenizer.nested or any(request.values()):
        return {"decoded": codes}
    patches = tokenizer.config.num_patches
    whole = tokenizer.encode(pixels, patches).to("cpu")
    fewer = {f"{n} codes": whole.truncate(n) for n in DECODED if n < patches}
    return {"default length": codes, **fewer, f"all {patches} codes": whole}


def _panels(
    tokenizer: VisualTokenizer,
    original: Image.Image,
    small: Image.Image,
    decoded: dict[str, tuple[VisualCodes, Image.Image]],
    compared: str,
) -> list[tuple[str, str, Image.Image]]:
    """Title, label and image of each panel of an image's line, after the original.

    Args:
        tokenizer: of the codes.
        original: at the size of a panel.
        small: at the tokenizer's size.
        decoded: by title codes and what they decode to.
        compared: title beside which a thumbnail of as many bits is.
    """
    from lavit_tok.visualize import kept_overlay, thumbnail

    config = tokenizer.config
    grid = config.image_size // config.patch_size
    panels = []
    for title, (codes, image) in decoded.items():
        if not tokenizer.nested:
            label = f"{len(codes.values)} of {config.num_patches} patches"
            overlay = kept_overlay(original, _keep(codes)[0], (grid, grid))
            panels.append(("kept patches", label, overlay))
        bits = len(codes.values) * math.log2(config.codebook_size)
        panels.append((title, f"{len(codes.values)} codes, {bits:.0f} bits", image))
        if title == compared:
            label = f"{bits:.0f} bits"
            panels.append(("thumbnail of equal bits", label, thumbnail(small, bits)))
    return panels


def shards(arguments: argparse.Namespace) -> int:
    """A captioned data set -> parquet shards of codes."""
    try:
        from lavit_tok.data.shard_writer import write_shards
    except ImportError as error:
        raise ImportError(
            f"reading data sets needs more packages: pip install 'lavit-tok[train]' ({error})"
        ) from None
    names = ("split", "budget", "flip", "shard_size", "batch_size", "num_workers", "streaming")
    ray = ray_options(arguments)
    columns = (arguments.image_column, arguments.caption_column, arguments.key_column)
    tokenizer = _tokenizer(arguments)
    limit_images(tokenizer.image_processor, arguments)
    out = folder_or_url(arguments.out)
    for summary in write_shards(
        arguments.data,
        out,
        str(arguments.tokenizer),
        tokenizer,
        columns=columns,
        ray=ray,
        **{name: getattr(arguments, name) for name in names},
    ):
        print(summary, file=sys.stderr)
    following = (
        f"; next: lavit-lm fit -c lm/lavit --data.shards={out} --data.images={arguments.data}"
    )
    print(f"wrote shards to {out}{'' if is_remote(out) else following}", file=sys.stderr)
    return 0


def verify_shards(arguments: argparse.Namespace) -> int:
    """Check shards, and make their manifest again if it is missing or wrong."""
    from lavit_tok.data.shard_footers import verify

    for summary in verify(folder_or_url(arguments.folder)):
        print(summary, file=sys.stderr)
    return 0


def fit(args: list[str]) -> int:
    """Train a tokenizer; the arguments are LightningCLI's."""
    module = "tokenizer_training:TokenizerTraining"
    if _trains_nested(args):
        module = "nested_training:NestedTokenizerTraining"
    return train("lavit-tok", "fit", "fit", f"lavit_tok.training.{module}", IMAGES, args)


def _trains_nested(args: list[str]) -> bool:
    """Whether the last recipe or argument that sets `model.config.sequence` sets "nested"."""
    import yaml

    sequence = "selected"
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        value = value if equals else following
        if name == "--model.config.sequence":
            sequence = value
        elif name in ("-c", "--config") and Path(value).is_file():
            try:
                recipe = yaml.safe_load(Path(value).read_text())
                sequence = recipe["model"]["config"].get("sequence", sequence)
            except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
                continue  # LightningCLI reports what is wrong with it
    return sequence == "nested"


def train(program: str, command: str, action: str, model: str, data: str, args: list[str]) -> int:
    """See lavit_tok.cli.training.run_training. Raises ImportError without the training packages."""
    try:
        from lavit_tok.cli.training import run_training
    except ImportError as error:
        raise ImportError(
            f"training needs more packages: pip install 'lavit-tok[train]' ({error})"
        ) from None
    return run_training(program, command, action, model, data, args)


def _allocation(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("quality", "rate", "verify")}


def _keep(codes: VisualCodes) -> torch.Tensor:
    assert codes.keep is not None  # codes of images always have a keep mask
    return codes.keep


def ray_options(arguments: argparse.Namespace) -> RayOptions | None:
    """How to run on Ray. Raises ValueError for its options without it."""
    options = (arguments.address, arguments.workers, arguments.gpus_per_worker)
    if arguments.engine == "ray":
        return RayOptions(*options)
    if options != (None, 1, 0):
        raise ValueError("--address, --workers and --gpus-per-worker are options of --engine ray")
    return None


def _decode(
    decoder: Any,
    codes: VisualCodes,
    numbers: list[int],
    arguments: argparse.Namespace,
    mode: str | None = None,
) -> list[Image.Image]:
    """Images whose noise depends on the seed and their number only, not on the batch size."""
    options = {"generator": generators(arguments.seed, numbers), "mode": mode or arguments.mode}
    return decoder(codes, arguments.steps, arguments.guidance, **options).images


def _tokenizer(arguments: argparse.Namespace) -> VisualTokenizer:
    return VisualTokenizer.from_pretrained(arguments.tokenizer, device=device(arguments.device))


def _decode_batch(arguments: argparse.Namespace, tokenizer: str) -> DecodeBatch:
    """With the decoder that is named, else the shipped one for this tokenizer."""
    return DecodeBatch(
        decoder_name(arguments.decoder, tokenizer),
        str(device(arguments.device)),
        arguments.scheduler,
        arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        mode=arguments.mode,
    )
