"""Captions of a whole set, in the official results format, scored by the field's scorers.

    pictures  -greedily or by beams, after k examples or none->  captions  ->  NAME.results.json  [{image_id, caption}]
    captions, true captions  -caption_scores.py->  BLEU, ROUGE-L, CIDEr, METEOR, SPICE, x 100

The protocol of the published figures is Karpathy's test split of COCO (5,000 pictures, five captions each) under the
official tokenization; whatever departs from it stands in the figures' label. Zero-shot, or --shots examples by plain
concatenation before every picture. A run that was killed goes on where it was, with the same result. Writes
captioning.md, .json, .results.json, and captioning.png: scores, and pictures with what was said of them.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caption_scores
import caption_sets
import common
import talking
from figures import SHOWN, figure
from parts import Parts, digest, write_whole
from PIL import Image

from lavit_lm import MultimodalLM

PUBLISHED = (
    ("LaVIT (7B)", "134.0", "zero-shot"),
    ("LaVIT-v2 (7B)", "133.3", "zero-shot"),
    ("Emu", "112.4", "zero-shot"),
    ("VL-GPT", "116.4", "zero-shot"),
    ("VL-GPT", "133.7", "after instruction tuning"),
)
"""CIDEr on COCO, Karpathy's test split, as their authors give it."""


class Captioner:
    """Says what pictures show.

    Args:
        lm: the model.
        shots: pictures and captions that stand before each picture.
        a: prompt, max_tokens, temperature, top_p, seed.
    """

    def __init__(
        self, lm: MultimodalLM, shots: Sequence[tuple[Image.Image, str]], a: Namespace
    ) -> None:
        self.lm, self.a = lm, a
        self.prompt_templates = (
            lm.objective.prompt_templates.caption if a.prompt is None else a.prompt
        )
        self.before: list[Any] = []
        for picture, caption in shots:
            self.before += [picture, f"{self.wording} {caption}".strip()]

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[int]) -> list[str]:
        """One caption for each; its generator depends on the item's number alone."""
        asked = [self.prompt_templates] if self.prompt_templates else []
        prompts = [[*self.before, picture, *asked] for picture in pictures]
        return talking.said(self.lm, prompts, items, self.a)


def main(a: Namespace) -> dict[str, Any]:
    how = talking.decoding(a)
    found = caption_sets.limited(caption_sets.captions_of(a), a.limit)
    shots = examples(a)
    lm = talking.load(a)
    captioner = Captioner(lm, shots, a)
    settings = talking.settings_of(lm, a, "captioning") | {
        "pictures": digest(found.ids, found.name),
        "examples": digest([text for _, text in shots], [p.tobytes().hex() for p, _ in shots]),
        "prompt": captioner.prompt_templates,
        "decoding": [how, a.seed],
    }
    parts = Parts(a.out, a.name, settings)
    lines = talking.lines_of(found, parts, a.batch_size, captioner)
    good = [i for i, line in enumerate(lines) if "said" in line]
    values: dict[str, Any] = {
        "set": found.describe(),
        "model": Path(a.model).name,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "prompt": captioner.prompt_templates,
        "shots": a.shots,
        "examples": [text for _, text in shots],
        "decoding": how,
        "captions": len(good),
        "rejects": [line["reject"] for line in lines if "reject" in line],
    }
    results = [{"image_id": found.ids[i], "caption": lines[i]["said"]} for i in good]
    write_whole(a.out / f"{a.name}.results.json", json.dumps(results).encode())
    scored = [i for i in good if found.captions[i]]
    values |= scores(found, scored, [lines[i]["said"] for i in scored], a)
    show(found, good, lines, values, a)
    common.write(a.name, a.out, "Captions", text(values, a), values)
    parts.done()
    return values


def examples(a: Namespace) -> list[tuple[Image.Image, str]]:
    """Pictures and captions that stand before each picture, of other pictures than those that are captioned.

    Raises:
        ValueError: asked for without a set to take them from.
    """
    if not a.shots:
        return []
    if a.data is not None:
        source = caption_sets.caption_rows(a.data, a.shots_split)
        own = caption_sets.captions_of(a)
        if source.name == own.name:
            raise ValueError(
                f"--shots-split {a.shots_split}: the examples would be of the split that is captioned"
            )
    elif a.shots_annotations is not None:
        images = a.shots_images or a.images
        same = a.shots_annotations.resolve() == a.annotations.resolve()
        source = caption_sets.read_captions(
            a.shots_annotations, images, a.shots_split if same else None
        )
        if same and source.name == caption_sets.captions_of(a).name:
            raise ValueError(
                f"--shots-split {a.shots_split}: the examples would be of the split that is captioned"
            )
    else:
        raise ValueError(
            "--shots: expected --shots-annotations, and --shots-images if the pictures lie elsewhere"
        )
    chosen = caption_sets.examples(source, a.shots, a.seed)
    return [
        (picture, source.captions[place][0] if source.captions[place] else "")
        for place, picture in chosen
    ]


def scores(
    found: caption_sets.CaptionSet, places: list[int], captions: list[str], a: Namespace
) -> dict[str, Any]:
    """The scores, and what keeps them from standing beside published ones."""
    if not places:
        return {
            "scores": None,
            "label": f"no scores: {found.name} holds no captions; the results file can be sent in",
        }
    result = caption_scores.score(
        [found.captions[i] for i in places], captions, a.scorers, a.tokenization
    )
    departures = [] if found.standard else ["not the whole Karpathy test split of COCO"]
    if len(places) < len(found):
        departures.append(
            f"{len(found) - len(places)} of {len(found)} pictures left out, unreadable or without captions"
        )
    if not result.official:
        departures.append(result.tokenization)
    known = caption_sets.training_captions(a.data) if a.data else frozenset()
    unseen = [
        k
        for k, i in enumerate(places)
        if known.isdisjoint(map(caption_sets.spelling, found.captions[i]))
    ]
    rest = [result.cider[k] for k in unseen] if result.cider else []
    least = min(len(found.captions[i]) for i in places)
    if least < 5:
        departures.append(f"{least} true caption{'s' * (least > 1)} a picture at least, not five")
    label = f"{result.by}, {result.tokenization}, over {len(places)} pictures of {found.standard or found.name}"
    return {
        "label": label,
        "departures": departures,
        "comparable": not departures,
        "scores": result.scores,
        "absent": result.absent,
        "cider_of_each": result.cider,
        "cider_frequencies_over": len(places),
        "seen_in_training": len(places) - len(unseen) if known else None,
        "cider_of_unseen": sum(rest) / len(rest) if known and rest else None,
    }


# What comes out


def show(
    found: caption_sets.CaptionSet,
    good: Sequence[int],
    lines: Any,
    values: dict[str, Any],
    a: Namespace,
) -> None:
    chosen = [good[i] for i in common.evenly(SHOWN, len(good))]
    pictures = [picture for picture, _ in map(found.open, chosen) if picture is not None]
    texts = []
    for i in chosen:
        true = found.captions[i][0] if found.captions[i] else "-"
        texts.append(f"said: {lines[i]['said']}\ntrue: {true}")
    figure(a.out / f"{a.name}.png", values["scores"] or {}, "score x 100", pictures, texts)
    values["shown"] = [{"id": found.ids[i], "text": t} for i, t in zip(chosen, texts, strict=True)]


def text(v: dict[str, Any], a: Namespace) -> str:
    body = (
        f"{v['set']}. Model {v['model']}, {v['parameters'] / 1e6:.1f} M weights; {v['decoding']}; "
    )
    body += (
        f"{v['shots']} examples before each picture; prompt {v['prompt']!r}.\n\n{v['label']}.\n\n"
    )
    if v["scores"] is not None:
        rows: list[tuple[Any, Any]] = [
            (name, f"{value:.2f}") for name, value in v["scores"].items()
        ]
        if v["cider_of_unseen"] is not None:
            rows.append(("CIDEr of captions not in train", f"{v['cider_of_unseen']:.2f}"))
        rows += [(name, f"not measured: {why}") for name, why in v["absent"].items()]
        body += common.table(("score", "x 100"), rows)
        body += f"\n\nCIDEr is CIDEr-D, its document frequencies are those of these {v['cider_frequencies_over']} pictures."
        if v["seen_in_training"] is not None:
            body += f" The true captions of {v['seen_in_training']} of them stand in the train split too."
        body += "\n\n## Published\n\nCIDEr on COCO by the authors' own account. "
        if v["departures"]:
            body += "Not comparable with the figures above: " + "; ".join(v["departures"]) + ".\n\n"
        else:
            body += "The same set and scorer.\n\n"
        body += common.table(("model", "CIDEr", ""), PUBLISHED)
    body += common.rejected(v["rejects"])
    return (
        body
        + f"\n\nResults for the official server: `{a.name}.results.json`.\n\n![captions]({a.name}.png)"
    )


def arguments() -> Any:
    found = common.parser(__doc__, data=False, tokenizer=False, batch_size=32)
    caption_sets.add_captions(found)
    talking.add_model(found)
    found.add_argument(
        "--prompt", help="said after the picture; by default as the model's objective says it"
    )
    found.add_argument("--max-tokens", type=common.positive, default=48, help="of a caption")
    found.add_argument(
        "--scorers", nargs="+", choices=caption_scores.SCORERS, default=list(caption_scores.SCORERS)
    )
    found.add_argument(
        "--tokenization",
        choices=["auto", "ptb", "words"],
        default="auto",
        help="see caption_scores.py",
    )
    found.add_argument("--name", default="captioning", help="of the result files")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))
