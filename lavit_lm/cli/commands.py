"""What the commands of cli.py do. A bad picture is skipped, counted, and told on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

import torch

from lavit_tok.cli.commands import lightning_command
from lavit_tok.data.jobs import Rejects, chunks, device, list_images, opened, png_name, save_png

if TYPE_CHECKING:
    from lavit_lm.multimodal import MultimodalLM


def fit(words: list[str]) -> int:
    """Train; the words are LightningCLI's."""
    return _lightning("fit", words)


def validate(words: list[str]) -> int:
    """Held-out losses on the validation split; the words are LightningCLI's."""
    return _lightning("validate", words)


def test(words: list[str]) -> int:
    """Losses on the test split; the words are LightningCLI's."""
    return _lightning("test", words)


def fit_tokenizer(words: list[str]) -> int:
    """Train VL-GPT's tokenizer and detokenizer; the words are LightningCLI's."""
    names = "lavit_lm.training.vlgpt_tokenizer:VLGPTTokenizerTraining", "lavit_tok:ImageDataModule"
    return lightning_command("lavit-lm", "fit-tokenizer", "fit", *names, words)


def fit_decoder(words: list[str]) -> int:
    """Train a decoder of the vectors that a language model says; the words are LightningCLI's."""
    names = "lavit_lm.training.emu_decoder:EmuDecoderTraining", "lavit_tok:ImageDataModule"
    return lightning_command("lavit-lm", "fit-decoder", "fit", *names, words)


def _lightning(command: str, words: list[str]) -> int:
    names = (
        "lavit_lm.training.module:LanguageModeling",
        "lavit_lm.training.data_module:LanguageDataModule",
    )
    return lightning_command("lavit-lm", command, command, *names, words)


def generate(arguments: argparse.Namespace) -> int:
    """Pictures of a prompt -> PNG files, and codes.jsonl beside them, if the model says codes."""
    from lavit_lm.generation.prompts import require_words
    from lavit_lm.objectives.records import ImageVectors

    lm = _model(arguments, arguments.decoder)
    generator = torch.Generator().manual_seed(arguments.seed)
    if lm.objective.image_output.kind == "vectors":
        vectors = lm.generate_vectors_batch([require_words(arguments.prompt)]).expand(
            arguments.n, -1, -1
        )
        null = lm.generate_vectors_batch([[]])
        drawn = lm.decoder.decode(
            ImageVectors(vectors, null),
            generator,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.decoder_guidance,
        )
        for number, image in enumerate(drawn):
            path = arguments.out / png_name(number, arguments.prompt)
            save_png(image, path)
            print(f"{vectors.shape[1]:7d} vectors  {path}")
        return 0
    codes = lm.generate_codes(
        arguments.prompt,
        arguments.n,
        arguments.guidance,
        generator,
        top_k=arguments.top_k,
        temperature=arguments.temperature,
    )
    options = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.decoder_guidance,
    }
    images = lm.decoder.decode(codes, generator, **options)
    for number, image in enumerate(images):
        path = arguments.out / png_name(number, arguments.prompt)
        save_png(image, path)
        print(f"{len(codes[number]):7d} codes  {path}")
    lines = [json.dumps({"prompt": arguments.prompt, "codes": row}) for row in codes.to_list()]
    (arguments.out / "codes.jsonl").write_text("\n".join(lines) + "\n")
    return 0


def caption(arguments: argparse.Namespace) -> int:
    """A line of text for each picture on stdout: path, tab, text."""
    paths = list_images(arguments.images)
    lm = _model(arguments, None)
    rejects, count = Rejects(None, only=len(paths) == 1), 0
    with rejects:
        for chunk in chunks(enumerate(paths), arguments.batch_size):
            opened_images = opened(chunk, rejects, lm.visual.image_processor)
            if not opened_images:
                continue
            images = [image for _, _, image in opened_images]
            if arguments.question is None:
                texts = lm.caption(images, arguments.max_tokens)
            else:
                texts = [
                    lm.answer(image, arguments.question, max_tokens=arguments.max_tokens)
                    for image in images
                ]
            for (_, path, _), text in zip(opened_images, texts, strict=True):
                print(f"{path}\t{text}")
            count += len(opened_images)
        rejects.require(count)
    print(f"{count} of {len(paths)} opened_images{rejects.summary()}", file=sys.stderr)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """A model -> a plain `transformers` directory."""
    from lavit_lm.multimodal import MultimodalLM

    lm = MultimodalLM.from_pretrained(arguments.model, decoder=None)
    lm.export(arguments.out, getattr(torch, arguments.dtype))
    print(f"exported to {arguments.out}", file=sys.stderr)
    return 0


def _model(arguments: argparse.Namespace, decoder: str | None) -> MultimodalLM:
    from lavit_lm.multimodal import MultimodalLM

    return MultimodalLM.from_pretrained(
        arguments.model,
        visual_tokenizer=arguments.visual_tokenizer,
        decoder=decoder,
        device=device(arguments.device),
    )
