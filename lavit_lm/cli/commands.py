"""The commands of `lavit-lm`. Images that cannot be read are skipped and named on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lavit_tok import VisualCodes
from lavit_tok.checkpoints.files import atomic
from lavit_tok.cli.commands import ray_options
from lavit_tok.cli.items import (
    chunks,
    device,
    limit_images,
    list_images,
    open_images,
    save_png,
)
from lavit_tok.data.decode_files import existing, png_name
from lavit_tok.data.rejects import Rejects, has_keys
from lavit_tok.data.shard_manifest import MANIFEST

if TYPE_CHECKING:
    from lavit_lm.multimodal import MultimodalLM

GENERATED = {"prompt", "codes"}  # keys of codes.jsonl


def generate(arguments: argparse.Namespace) -> int:
    """Generate images as PNG files, and codes.jsonl if the model generates codes."""
    from lavit_lm.generation.prompts import require_text
    from lavit_lm.multimodal import require_candidates

    if (arguments.prompt is None) == (arguments.prompts is None):
        raise ValueError("expected either a prompt or --prompts")
    if arguments.prompts is not None:
        if arguments.candidates > 1:
            raise ValueError("--candidates: expected a prompt, not --prompts")
        return _generate_for_all(arguments)
    if ray_options(arguments) is not None:
        raise ValueError("--engine ray: expected --prompts, a prompt is generated in this process")
    require_candidates(arguments.n, arguments.candidates)
    codes_file = arguments.out / "codes.jsonl"
    existing(arguments.out, "png", arguments.overwrite)
    if codes_file.exists() and not (arguments.overwrite or has_keys(codes_file, GENERATED)):
        raise ValueError(
            f"{codes_file}: not written by lavit-lm generate, and results would replace it: use "
            "another --out, or --overwrite"
        )
    lm = _model(arguments, arguments.decoder)
    prompt, n, total = arguments.prompt, arguments.n, arguments.n * arguments.candidates
    require_text(prompt)
    generator = torch.Generator().manual_seed(arguments.seed)
    kind = lm.objective.image_output.kind
    _require_mode_of_codes(arguments, kind)  # before anything is generated
    sampling = {"top_k": arguments.top_k, "temperature": arguments.temperature}
    own = sampling if kind == "codes" else {}
    outputs = lm.generate_outputs(prompt, total, arguments.guidance, generator, **own)
    images = lm.decode_images(outputs, generator, **_decoding(arguments))
    if total > n:
        kept = lm.rerank(images, prompt, n)
        images = [images[i] for i in kept]
        outputs = outputs.take(kept) if kind == "codes" else outputs[kept]
    for number, image in enumerate(images):
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


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the image decoder."""
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.decoder_guidance}
    return options if arguments.mode is None else {**options, "mode": arguments.mode}


def _require_mode_of_codes(arguments: argparse.Namespace, kind: str) -> None:
    """Raise ValueError for a mode of an image decoder that has none."""
    if arguments.mode is not None and kind != "codes":
        raise ValueError(f"--mode: expected a model that generates codes, this one makes {kind}")


def _generate_for_all(arguments: argparse.Namespace) -> int:
    """Generate for every prompt of a file; see batches.py."""
    from lavit_lm.cli.batches import BatchJob, compute_here, read_prompts
    from lavit_lm.cli.generate_batch import GenerateBatch, generate_on_ray
    from lavit_lm.generation.sampling import Sampling
    from lavit_tok.data.code_files import CodeFileHeader
    from lavit_tok.data.ray_engine import ray_cluster

    n, only_codes, ray = arguments.n, arguments.codes_only, ray_options(arguments)
    sampling = {"top_k": arguments.top_k, "temperature": arguments.temperature}
    decoding = _decoding(arguments)
    stage = GenerateBatch(
        arguments.model,
        arguments.visual_tokenizer,
        None if only_codes else arguments.decoder,
        str(device(arguments.device)),
        n,
        arguments.seed,
        arguments.guidance,
        sampling,
        decoding,
        arguments.block_size,
    )
    lm = stage.lm
    _require_mode_of_codes(arguments, lm.objective.image_output.kind)
    # Errors that concern all prompts are raised before any is used.
    Sampling(guidance_scale=arguments.guidance, **sampling)
    if only_codes and not stage.makes_codes:
        raise ValueError(
            f"--codes-only: {lm.objective.name} generates vectors for images, no codes"
        )
    if not only_codes:
        _ = lm.decoder
    options: dict[str, Any] = {"model": arguments.model, "seed": arguments.seed, "n": n}
    options |= {"guidance": arguments.guidance, **sampling}
    options |= {} if only_codes else {"decoder": arguments.decoder, **decoding}
    header: dict[str, Any] = {"format": "lavit_lm.generated", "version": 1}
    if stage.makes_codes:  # the files are code files, too
        config, tokenizer = lm.visual_tokenizer.config, lm.visual_tokenizer
        sizes = config.codebook_size, config.num_patches
        name = str(tokenizer.name_or_path or arguments.model)
        header = json.loads(CodeFileHeader(name, *sizes, tokenizer.fingerprint()).to_json())
    header |= {"options": options}
    batch_size = max(1, arguments.batch_size // n)
    with nullcontext() if ray is None else ray_cluster(ray) as started:
        engine = compute_here(stage.compute, batch_size)
        if ray is not None and started is not None:
            started()
            engine = generate_on_ray(stage, batch_size, ray)
        job = BatchJob(arguments.out, header, engine, arguments.block_size, arguments.overwrite)
        count, rejects = job.run(read_prompts(arguments.prompts, arguments.split), "generate")
    print(f"generated {count} images in {arguments.out}{rejects.summary()}", file=sys.stderr)
    return 0


def _caption_all(arguments: argparse.Namespace) -> int:
    """Caption images, or the codes of shards, into files; see batches.py."""
    from lavit_lm.cli.batches import BatchJob, Computed, Item, compute_here, read_shards

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

    def compute(items: Sequence[Item]) -> list[Computed]:
        inputs: list[Any] = [
            VisualCodes.from_list([item.content], tokenizer.config.codebook_size)
            if isinstance(item.content, list)
            else processor.resize(processor.open(item.content))
            for item in items
        ]
        texts = _texts(lm, inputs, arguments)
        return [
            Computed(item.number, ({"key": item.key, "text": text},))
            for item, text in zip(items, texts, strict=True)
        ]

    names = ("model", "question", "max_new_tokens")
    header = {
        "format": "lavit_lm.texts",
        "version": 1,
        "options": {name: getattr(arguments, name) for name in names},
    }
    engine = compute_here(compute, arguments.batch_size)
    job = BatchJob(arguments.out, header, engine, arguments.block_size, arguments.overwrite)
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
