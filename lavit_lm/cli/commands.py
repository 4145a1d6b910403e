"""The commands of `lavit-lm`. Images that cannot be read are skipped and named on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lavit_tok import VisualCodes
from lavit_tok.checkpoints.files import atomic
from lavit_tok.cli.commands import train
from lavit_tok.cli.items import (
    chunks,
    device,
    limit_images,
    list_images,
    open_images,
    png_name,
    require_own,
    save_png,
)
from lavit_tok.data.rejects import Rejects, has_keys
from lavit_tok.data.shard_manifest import MANIFEST

if TYPE_CHECKING:
    from lavit_lm.multimodal import MultimodalLM

TRAINING = (
    "lavit_lm.training.module:LanguageModeling",
    "lavit_lm.training.data_module:LanguageDataModule",
)

GENERATED = {"prompt", "codes"}  # keys of codes.jsonl


def fit(args: list[str]) -> int:
    """Train a language model; the arguments are LightningCLI's."""
    return train("lavit-lm", "fit", "fit", *TRAINING, args)


def validate(args: list[str]) -> int:
    """Compute losses on the validation split; the arguments are LightningCLI's."""
    return train("lavit-lm", "validate", "validate", *TRAINING, args)


def test(args: list[str]) -> int:
    """Compute losses on the test split; the arguments are LightningCLI's."""
    return train("lavit-lm", "test", "test", *TRAINING, args)


def fit_tokenizer(args: list[str]) -> int:
    """Train VL-GPT's tokenizer and detokenizer; the arguments are LightningCLI's."""
    names = "lavit_lm.training.vlgpt_tokenizer:VLGPTTokenizerTraining", "lavit_tok:ImageDataModule"
    return train("lavit-lm", "fit-tokenizer", "fit", *names, args)


def fit_decoder(args: list[str]) -> int:
    """Train an image decoder for generated vectors; the arguments are LightningCLI's."""
    names = "lavit_lm.training.emu_decoder:EmuDecoderTraining", "lavit_tok:ImageDataModule"
    return train("lavit-lm", "fit-decoder", "fit", *names, args)


def generate(arguments: argparse.Namespace) -> int:
    """Generate images as PNG files, and codes.jsonl if the model generates codes."""
    from lavit_lm.generation.prompts import require_text

    if (arguments.prompt is None) == (arguments.prompts is None):
        raise ValueError("expected either a prompt or --prompts")
    if arguments.prompts is not None:
        return _generate_for_all(arguments)
    codes_file = arguments.out / "codes.jsonl"
    require_own(arguments.out, arguments.overwrite)
    if codes_file.exists() and not (arguments.overwrite or has_keys(codes_file, GENERATED)):
        raise ValueError(
            f"{codes_file}: not written by lavit-lm generate, and results would replace it: use "
            "another --out, or --overwrite"
        )
    lm = _model(arguments, arguments.decoder)
    prompt, n = arguments.prompt, arguments.n
    require_text(prompt)
    generator = torch.Generator().manual_seed(arguments.seed)
    kind = lm.objective.image_output.kind
    if kind == "codes":
        sampling = {"top_k": arguments.top_k, "temperature": arguments.temperature}
        outputs: Any = lm.generate_codes(prompt, n, arguments.guidance, generator, **sampling)
    else:
        outputs = lm.generate_vectors_batch([prompt]).expand(n, -1, -1)
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.decoder_guidance}
    for number, image in enumerate(lm.decode_images(outputs, generator, **options)):
        path = arguments.out / png_name(number, prompt)
        save_png(image, path)
        print(f"{len(outputs[number]):7d} {kind}  {path}")
    if kind == "codes":
        lines = [json.dumps({"prompt": prompt, "codes": codes}) for codes in outputs.to_list()]
        with atomic(codes_file) as partial:
            partial.write_text("\n".join(lines) + "\n")
    following = f"lavit-lm caption {arguments.out} --model {arguments.model}"
    print(f"wrote {n} images to {arguments.out}; next: {following}", file=sys.stderr)
    return 0


def _generate_for_all(arguments: argparse.Namespace) -> int:
    """Generate for every prompt of a file; see batches.py."""
    from lavit_lm.cli.batches import BatchJob, Item, item_generator, read_prompts
    from lavit_lm.generation.sampling import Sampling
    from lavit_tok.data.code_files import CodeFileHeader

    n, out, only_codes = arguments.n, arguments.out, arguments.codes_only
    lm = _model(arguments, None if only_codes else arguments.decoder)
    makes_codes = lm.objective.image_output.kind == "codes"
    sampling = {"top_k": arguments.top_k, "temperature": arguments.temperature}
    decoding = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.decoder_guidance,
    }
    # Errors that concern all prompts are raised before any is used.
    Sampling(guidance_scale=arguments.guidance, **sampling)
    if only_codes and not makes_codes:
        raise ValueError(
            f"--codes-only: {lm.objective.name} generates vectors for images, no codes"
        )
    if not only_codes:
        _ = lm.decoder

    def compute(items: Sequence[Item]) -> list[dict[str, Any]]:
        images = [(item, i) for item in items for i in range(n)]
        generators = [item_generator(arguments.seed, item.key, i) for item, i in images]
        if makes_codes:
            prompts = [item.content for item, _ in images]
            outputs: Any = lm.generate_codes_batch(
                prompts, arguments.guidance, generators, **sampling
            )
        else:
            vectors = lm.generate_vectors_batch([item.content for item in items])
            outputs = vectors.repeat_interleave(n, 0)
        results = [
            {"key": item.key if n == 1 else f"{item.key}-{i}", "prompt": item.content}
            for item, i in images
        ]
        if makes_codes:
            for result, codes in zip(results, outputs.to_list(), strict=True):
                result |= {"codes": codes, "length": len(codes)}
        if not only_codes:
            decoded = lm.decode_images(outputs, generators, **decoding)
            for (item, i), result, image in zip(images, results, decoded, strict=True):
                name = png_name(item.number * n + i, item.key)
                path = out / f"{item.number // arguments.block_size:06d}" / name
                save_png(image, path)
                result["image"] = str(path.relative_to(out))
        return results

    options: dict[str, Any] = {"model": arguments.model, "seed": arguments.seed, "n": n}
    options |= {"guidance": arguments.guidance, **sampling}
    options |= {} if only_codes else {"decoder": arguments.decoder, **decoding}
    header: dict[str, Any] = {"format": "lavit_lm.generated", "version": 1}
    if makes_codes:  # the files are code files, too
        config, tokenizer = lm.visual_tokenizer.config, lm.visual_tokenizer
        sizes = config.codebook_size, config.num_patches
        name = str(tokenizer.name_or_path or arguments.model)
        header = json.loads(CodeFileHeader(name, *sizes, tokenizer.fingerprint()).to_json())
    header |= {"options": options}
    sizes = max(1, arguments.batch_size // n), arguments.block_size
    job = BatchJob(out, header, compute, *sizes, arguments.overwrite)
    count, rejects = job.run(read_prompts(arguments.prompts, arguments.split), "generate")
    print(f"generated {count} images in {out}{rejects.summary()}", file=sys.stderr)
    return 0


def _caption_all(arguments: argparse.Namespace) -> int:
    """Caption images, or the codes of shards, into files; see batches.py."""
    from lavit_lm.cli.batches import BatchJob, Item, read_shards

    lm = _model(arguments, None)
    processor, tokenizer = lm.visual_tokenizer.image_processor, lm.visual_tokenizer
    limit_images(processor, arguments)
    folder = Path(arguments.images[0])
    if len(arguments.images) == 1 and (folder / MANIFEST).is_file():
        if lm.objective.connectors.needs_pixels:
            raise ValueError(
                f"{folder}: has codes of images, and {lm.objective.name} needs their pixels: give "
                "the images"
            )
        items: Any = read_shards(folder, arguments.split, tokenizer.fingerprint())
    else:
        paths = enumerate(list_images(arguments.images))
        items = (Item(number, str(path), path) for number, path in paths)

    def compute(items: Sequence[Item]) -> list[dict[str, Any]]:
        inputs: list[Any] = [
            VisualCodes.from_list([item.content], tokenizer.config.codebook_size)
            if isinstance(item.content, list)
            else processor.resize(processor.open(item.content))
            for item in items
        ]
        texts = _texts(lm, inputs, arguments)
        return [{"key": item.key, "text": text} for item, text in zip(items, texts, strict=True)]

    names = ("model", "question", "max_new_tokens")
    header = {
        "format": "lavit_lm.texts",
        "version": 1,
        "options": {name: getattr(arguments, name) for name in names},
    }
    sizes = arguments.batch_size, arguments.block_size
    job = BatchJob(arguments.out, header, compute, *sizes, arguments.overwrite)
    count, rejects = job.run(items, "caption")
    print(f"captioned {count} images in {arguments.out}{rejects.summary()}", file=sys.stderr)
    return 0


def _texts(lm: MultimodalLM, images: list[Any], arguments: argparse.Namespace) -> list[str]:
    """A caption, or an answer to --question, for each image."""
    limit = arguments.max_new_tokens
    if arguments.question is None:
        return lm.caption(images, limit)
    return lm.answer(images, arguments.question, max_new_tokens=limit)


def caption(arguments: argparse.Namespace) -> int:
    """Print a line for each image: path, tab, caption or answer."""
    if arguments.out is not None:
        return _caption_all(arguments)
    paths = list_images(arguments.images)
    lm = _model(arguments, None)
    limit_images(lm.visual_tokenizer.image_processor, arguments)
    rejects, count = Rejects(None, only=len(paths) == 1), 0
    with rejects:
        for chunk in chunks(enumerate(paths), arguments.batch_size):
            images = open_images(chunk, rejects, lm.visual_tokenizer.image_processor)
            if not images:
                continue
            texts = _texts(lm, [image for _, _, (image,) in images], arguments)
            for (_, path, _), text in zip(images, texts, strict=True):
                print(f"{path}\t{text}")
            count += len(images)
        rejects.require(count)
    following = f"next: lavit-lm export {arguments.model} OUT_DIR"
    print(
        f"captioned {count} of {len(paths)} images{rejects.summary()}; {following}", file=sys.stderr
    )
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a directory for `transformers`."""
    from lavit_lm.multimodal import MultimodalLM

    lm = MultimodalLM.from_pretrained(arguments.model, decoder=arguments.decoder)
    lm.export(arguments.out, getattr(torch, arguments.dtype), arguments.format)
    plain = arguments.format == "plain"
    load = f"AutoModelFor{'Causal' if plain else 'Multimodal'}LM.from_pretrained"
    following = f"{load}({str(arguments.out)!r}){', or a server' if plain else ''}"
    print(f"exported to {arguments.out}; next: {following}", file=sys.stderr)
    return 0


def _model(arguments: argparse.Namespace, decoder: str | None) -> MultimodalLM:
    from lavit_lm.multimodal import MultimodalLM

    return MultimodalLM.from_pretrained(
        arguments.model,
        visual_tokenizer=arguments.visual_tokenizer,
        decoder=decoder,
        device=device(arguments.device),
    )
