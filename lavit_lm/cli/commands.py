"""The commands of `lavit-lm`. Images that cannot be read are skipped and named on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

import torch

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


def caption(arguments: argparse.Namespace) -> int:
    """Print a line for each image: path, tab, caption or answer."""
    paths = list_images(arguments.images)
    lm = _model(arguments, None)
    limit_images(lm.visual_tokenizer.image_processor, arguments)
    rejects, count = Rejects(None, only=len(paths) == 1), 0
    with rejects:
        for chunk in chunks(enumerate(paths), arguments.batch_size):
            images = open_images(chunk, rejects, lm.visual_tokenizer.image_processor)
            if not images:
                continue
            batch, limit = [image for _, _, (image,) in images], arguments.max_new_tokens
            if arguments.question is None:
                texts = lm.caption(batch, limit)
            else:
                question = arguments.question
                texts = [lm.answer(image, question, max_new_tokens=limit) for image in batch]
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
