"""What captioning.py and vqa.py share: a language model says something of every picture of a set.

    items of a batch  -open->  pictures, rejects  -prompts->  first lines  ->  {"said"} or {"reject"} for each item

A batch is always of the same items, since other neighbours change the last bits of a sum; parts.py keeps those that are
finished.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
from parts import Parts, digest, progress, seeded

import lavit_lm
import lavit_tok
from lavit_lm import MultimodalLM

Line = dict[str, Any]
"""{"said": text}, or {"reject": {key, reason}} of a picture that cannot be read."""


def load(a: Namespace) -> MultimodalLM:
    return MultimodalLM.from_pretrained(
        a.model, visual_tokenizer=a.visual_tokenizer, decoder=None, device=a.device
    )


def settings_of(lm: MultimodalLM, a: Namespace, *scripts: str) -> dict[str, Any]:
    """What all that is said depends on, whatever is asked."""
    where = common.provenance("talking", *scripts, packages=(lavit_tok, lavit_lm))
    return {
        "weights": digest(lm.model, lm.visual_tokenizer),
        "batch size": a.batch_size,
        "device": a.device,
        "where": where,
    }


def lines_of(
    found: Any, parts: Parts, batch_size: int, say: Callable[[list[Any], list[int]], list[str]]
) -> list[Line]:
    """A line for each item of a set.

    Args:
        found: a CaptionSet or a QuestionSet.
        say: pictures and the numbers of their items -> a text for each.

    Raises:
        ValueError: not one picture can be read.
    """

    def batch(items: list[int]) -> list[Line]:
        opened = {i: found.open(i) for i in items}
        good = [i for i in items if opened[i][0] is not None]
        texts = dict(
            zip(good, say([opened[i][0] for i in good], good) if good else [], strict=True)
        )
        return [{"said": texts[i]} if i in texts else {"reject": opened[i][1]} for i in items]

    batches = [
        list(range(start, min(start + batch_size, len(found))))
        for start in range(0, len(found), batch_size)
    ]
    bar = progress(batches, "batches", len(batches))
    lines = [
        line for items in bar for line in parts.values(f"said-{items[0]:06}", partial(batch, items))
    ]
    if not any("said" in line for line in lines):
        raise ValueError(
            f"{found.name}: not one usable picture of {len(found)}, the first: {lines[0]['reject']}"
        )
    return lines


def said(lm: MultimodalLM, prompts: Sequence[Any], items: Sequence[int], a: Namespace) -> list[str]:
    """The first line that comes after each prompt, in single spaces; a generator depends on its item's number alone."""
    how: dict[str, Any] = {"min_tokens": a.min_tokens}
    if a.beams is not None:
        how["beams"] = a.beams
    else:
        generators = [seeded(a.seed, item) for item in items]
        how |= {"generator": generators, "temperature": a.temperature, "top_p": a.top_p}
    found = lm.generate_text_batch(prompts, a.max_tokens, **how)
    return [
        " ".join(text.strip().splitlines()[0].split()) if text.strip() else "" for text in found
    ]


def decoding(a: Namespace) -> str:
    """In words. Raises ValueError for beams that are to be sampled."""
    if a.beams is not None:
        if a.temperature != 0 or a.top_p is not None:
            raise ValueError(
                "--beams: nothing is sampled there, got --temperature or --top-p as well"
            )
        how = f"{a.beams} beams"
    else:
        how = (
            "greedy"
            if a.temperature == 0
            else f"sampled, temperature {a.temperature:g}, top-p {a.top_p}"
        )
    return f"{how}, {a.min_tokens} to {a.max_tokens} tokens"


def add_model(found: Any) -> None:
    """The arguments of scripts that make a language model talk."""
    found.add_argument("--model", default="default", help="'default', a directory or a Hub id")
    found.add_argument("--visual-tokenizer", help="if not the one that the model names")
    found.add_argument("--limit", type=common.positive, help="at most this many, evenly spaced")
    found.add_argument(
        "--beams", type=common.positive, help="beam search (DaVinci: 2, 5 to 20 tokens), not greedy"
    )
    found.add_argument("--min-tokens", type=common.positive, default=1, help="of what is said")
    found.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    found.add_argument("--top-p", type=float)
    found.add_argument("--seed", type=int, default=0, help="of the examples, and of sampling")
    found.add_argument(
        "--shots", type=int, default=0, help="examples before each picture, by plain concatenation"
    )
    found.add_argument("--shots-split", default="train", help="split of the examples")
    found.add_argument("--shots-annotations", type=Path, help="annotation file of the examples")
    found.add_argument("--shots-images", type=Path, help="their pictures, if not in --images")
