"""Images that a language model generates of captions, the best of several, as documents.

    caption -> N candidates -> the one given whose image the caption is most probable

The model reads an image better than it draws one (docs/results.md): trained on the best candidates,
it draws at once what it would have chosen ("best-of-N distillation", ReST, Gulcehre et al., 2023).
Captions are those of the training split, so that combinations that are held out stay so.

    python recipes/lm/best_of.py --model default --data data/composed --captions 4000 \\
        --out data/best/train.jsonl
    lavit-lm fit -c recipes/lm/best-of.yaml

A line is {"key": ..., "segments": [{"text": caption, "target": false}, {"codes": [...], ...}]}. A
stopped run continues where it was; --part 0 2 and --part 1 2 are two halves, for two processes.

Hardware: one CPU core, 0.3 s a caption. Expected: docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavit_lm import MultimodalLM
from lavit_lm.cli.batches import item_generator
from lavit_tok.data.splits import load_splits

CAPTIONS = 16
"""In a batch."""


def chosen(data: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """(key or number, caption) of training images. Raises ValueError for fewer captions."""
    train = load_splits(str(data))["train"].remove_columns("image")
    rows = enumerate(train)
    pairs = [(row.get("key", str(i)), row["caption"]) for i, row in rows if row["caption"].strip()]
    if not 1 <= count <= len(pairs):
        raise ValueError(f"--captions: expected 1 to {len(pairs)}, got {count}")
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:count]]


def written(file: Path) -> set[str]:
    """Keys of the documents in a file, from which a line that a stopped run began is removed."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return {json.loads(line)["key"] for line in whole.splitlines()}


@torch.no_grad()
def best(
    lm: MultimodalLM,
    pairs: Sequence[tuple[str, str]],
    candidates: int,
    seed: int,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """The documents of captions, each independent of the others."""
    draws = [item_generator(seed, key, i) for key, _ in pairs for i in range(candidates)]
    captions = [caption for _, caption in pairs for _ in range(candidates)]
    codes = lm.generate_codes_batch(captions, generator=draws, **sampling)
    # Not those of the codes, of which a longer image in the batch may have drawn more
    noise = [item_generator(seed, f"{key} noise", i) for key, _ in pairs for i in range(candidates)]
    images = lm.decode_images(codes, noise)
    fingerprint, documents = lm.visual_tokenizer.fingerprint(), []
    for number, (key, caption) in enumerate(pairs):
        first = number * candidates
        at = first + lm.rerank(images[first : first + candidates], caption)[0]
        image = {"codes": codes[at].tolist(), "fingerprint": fingerprint}
        segments = [{"text": caption, "target": False}, image]
        documents.append({"key": f"best/{key}", "segments": segments})
    return documents


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="'default', a directory or a Hub id")
    parser.add_argument("--decoder", default="default", help="of its images, likewise")
    parser.add_argument("--data", type=Path, required=True, help="of recipes/data/composed.py")
    parser.add_argument("--captions", type=int, default=4000, help="of the training split")
    parser.add_argument("--candidates", type=int, default=8, help="images of a caption")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the codes")
    parser.add_argument("--top-k", type=int, default=100, help="of the codes")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the codes")
    parser.add_argument("--seed", type=int, default=0, help="of captions, codes and noise")
    parser.add_argument(
        "--part",
        type=int,
        nargs=2,
        default=(0, 1),
        metavar=("K", "N"),
        help="caption K of every N, and those that follow it at this distance",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    arguments = parser.parse_args(argv)
    part, parts = arguments.part
    if not 0 <= part < parts:
        parser.error(f"--part: expected K and N with 0 <= K < N, got {part} and {parts}")
    if arguments.candidates < 1:
        parser.error(f"--candidates: expected at least 1, got {arguments.candidates}")
    pairs = chosen(arguments.data, arguments.captions, arguments.seed)[part::parts]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = written(arguments.out)
    left = [pair for pair in pairs if f"best/{pair[0]}" not in done]
    lm = MultimodalLM.from_pretrained(arguments.model, decoder=arguments.decoder)
    options = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    options["guidance_scale"] = arguments.guidance
    for start in range(0, len(left), CAPTIONS):
        batch = left[start : start + CAPTIONS]
        documents = best(lm, batch, arguments.candidates, arguments.seed, **options)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in documents)
        print(f"{len(done) + start + len(batch)} of {len(pairs)} captions", flush=True)


if __name__ == "__main__":
    main()
