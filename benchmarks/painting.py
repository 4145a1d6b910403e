"""Pictures of captions, one after another into a folder: a run that was killed goes on with the same pictures.

    caption x best_of  -codes by their own generators->  -decoder, noise by its own generator->  -scorer->  the best one
    NAME-KEY/seed0/000000.png   each says its caption, id, number of codes and sample

A picture's two generators depend on the seed, the picture's id and the sample alone, and batches are always of the same
captions.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from parts import seeded, write_whole
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from lavit_lm import MultimodalLM
from lavit_tok.encode.image_processor import ImageError, open_image

Noted = tuple[Image.Image, dict[str, str]]
"""A picture, and what is to be known of it."""


class Painter:
    """Makes pictures of captions; each depends on (seed, picture's id, sample) alone."""

    def __init__(self, lm: MultimodalLM, scorer: Any, a: Namespace) -> None:
        self.lm, self.scorer, self.a = lm, scorer, a

    def __call__(self, captions: Sequence[str], ids: Sequence[Any], seed: int) -> list[Noted]:
        """One picture of each caption, the best of some by the scorer, and what is to be known of it."""
        count = self.a.best_of
        asked = [
            (caption, one, k)
            for caption, one in zip(captions, ids, strict=True)
            for k in range(count)
        ]
        made: list[Noted] = []
        for start in range(0, len(asked), self.a.batch_size):
            made += self.samples(asked[start : start + self.a.batch_size], seed)
        if count == 1:
            return made
        best = []
        for number, caption in enumerate(captions):
            own = made[number * count : (number + 1) * count]
            pixels = torch.stack([uint8(picture) for picture, _ in own])
            near = (self.scorer.describe(pixels) @ self.scorer.embed([caption]).T)[:, 0]
            picture, notes = own[int(near.argmax())]
            best.append((picture, notes | {"score": f"{float(near.max()):.6f}"}))
        return best

    def samples(self, asked: Sequence[tuple[str, Any, int]], seed: int) -> list[Noted]:
        a, lm = self.a, self.lm
        notes = [
            {"caption": caption, "id": str(one), "sample": str(k)} for caption, one, k in asked
        ]
        words = [seeded("codes", seed, one, k) for _, one, k in asked]
        noise = [seeded("noise", seed, one, k) for _, one, k in asked]
        drawing = {"num_inference_steps": a.steps}
        if (
            lm.objective.image_output == "vectors"
        ):  # nothing of a batch: one call takes one generator
            pictures = [
                lm.generate_images(
                    caption, generator=g, decoder_guidance_scale=a.decoder_guidance, **drawing
                )[0]
                for (caption, _, _), g in zip(asked, noise, strict=True)
            ]
            return list(zip(pictures, notes, strict=True))
        sampling = {"top_k": a.top_k, "top_p": a.top_p, "temperature": a.temperature}
        codes = lm.generate_codes_batch(
            [caption for caption, _, _ in asked], a.guidance, words, **sampling
        )
        for note, length in zip(notes, codes.lengths.tolist(), strict=True):
            note["codes"] = str(length)
        shown = lm.decoder(
            codes.to(a.device), generator=noise, guidance_scale=a.decoder_guidance, **drawing
        ).images
        return list(zip(shown, notes, strict=True))


def uint8(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def paint(
    painter: Painter, captions: list[str], ids: list[Any], seed: int, folder: Path, a: Namespace
) -> list[Path]:
    """Files of all pictures of one seed; those that are there already are not made again.

    A batch is always of the same captions: of one that is not whole all pictures are made, and those missing written.
    """
    folder = folder / f"seed{seed}"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i:06d}.png" for i in range(len(captions))]
    size = max(1, a.batch_size // a.best_of)
    with tqdm(total=len(files), desc=f"seed {seed}", unit=" pictures") as bar:
        for start in range(0, len(files), size):
            items = range(start, min(start + size, len(files)))
            missing = {i for i in items if not readable(files[i])}
            bar.update(len(items) - len(missing))
            if not missing:
                continue
            made = painter([captions[i] for i in items], [ids[i] for i in items], seed)
            for i, (picture, notes) in zip(items, made, strict=True):
                if i in missing:
                    save(picture, notes, files[i])
                    bar.update(1)
    return files


def save(picture: Image.Image, notes: dict[str, str], file: Path) -> None:
    """A PNG that says what it is of, there as a whole or not at all."""
    said, content = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, value in notes.items():
        said.add_itxt(name, value)
    picture.convert("RGB").save(content, "PNG", pnginfo=said)
    write_whole(file, content.getvalue())


def readable(file: Path) -> bool:
    """Whether an earlier run left the picture; a damaged one is made again."""
    try:
        return file.exists() and open_image(file) is not None
    except ImageError:
        return False


def add_painter(found: Any) -> None:
    """The arguments of scripts that make a language model paint."""
    found.add_argument("--model", default="default", help="'default', a directory or a Hub id")
    found.add_argument("--visual-tokenizer", help="if not the one that the model names")
    found.add_argument("--decoder", default="default", help="'default', a directory or a Hub id")
    found.add_argument(
        "--guidance", type=float, default=3.0, help="of the language model, where it says codes"
    )
    found.add_argument("--top-k", type=common.positive, default=50)
    found.add_argument("--top-p", type=float)
    found.add_argument("--temperature", type=float, default=1.0)
    found.add_argument("--steps", type=common.positive, default=20, help="of the decoder")
    found.add_argument("--decoder-guidance", type=float, default=2.0)
