"""Pictures of the captions of a set, and how far they are from the set's own pictures.

    30,000 captions by a seed, one of a picture  -LM->  codes  -decoder->  pictures, one after another into NAME-KEY/
    pictures, reference crops  ->  FID where Inception weights are given, else a Frechet distance that is not called so
    pictures, captions         ->  100 x cosine in CLIP's space or the teacher's, and own caption among 100

The protocol of the published figures: COCO val2014, 30,000 captions of as many pictures, reference pictures cut to the
same centre squares. Whatever departs from it stands in the label of each figure. Several seeds, mean and spread;
--best-of draws several pictures of a caption and keeps the one that a scorer likes best (DaVinci: 128). A run that was
killed goes on where it was, with the same pictures. Writes text_to_image.md, .json, and .png: figures, and true
pictures beside made ones.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caption_sets
import common
import numpy as np
import torch
from figures import figure
from nearness import scorers_of
from painting import Painter, add_painter, paint
from parts import Parts, digest
from picture_figures import Reference, described, made_figures, spaces_of
from PIL import Image
from protocol import FID_LEAST

import lavit_lm
import lavit_tok
from lavit_lm import MultimodalLM
from lavit_tok.encode.image_processor import VisualImageProcessor, open_image

PROTOCOL = 30_000
VAL2014 = ("captions_val2014.json", 40_504)
RETRIEVED = 100
PUBLISHED = (
    ("LaVIT (7B)", "7.4"),
    ("LaVIT-v2 (7B)", "7.1"),
    ("Emu", "11.66"),
    ("VL-GPT", "12.25"),
    ("VL-GPT, instruction-tuned", "11.53"),
)
"""FID on COCO, 30,000 captions, as their authors give it."""

# Captions


def choose(found: caption_sets.CaptionSet, count: int, seed: int) -> tuple[list[int], list[str]]:
    """Places of `count` pictures by chance, all if there are no more, and one caption of each."""
    if not any(found.captions):
        raise ValueError(f"{found.name}: it holds no captions to draw")
    rng = np.random.default_rng(seed)
    order = [
        i for i in rng.permutation(len(found)).tolist() if any(c.strip() for c in found.captions[i])
    ]
    places = order[:count]
    said = [[c for c in found.captions[i] if c.strip()] for i in places]
    return places, [" ".join(c[int(rng.integers(len(c)))].split()) for c in said]


# The script


def processor(a: Namespace) -> VisualImageProcessor:
    """Brings images of any size to the side and proportions that are measured."""
    return VisualImageProcessor(a.size, "square" if a.squeeze else "center_crop")


def main(a: Namespace) -> dict[str, Any]:
    found = caption_sets.captions_of(a)
    places, captions = choose(found, a.captions, a.seed)
    ids = [found.ids[i] for i in places]
    others = [i for i in range(len(found)) if i not in set(places)]
    caption_sets.require_files(found.take(places + (others if a.reference == "all" else [])))
    if a.inception and len(places) < FID_LEAST and not a.force:
        raise ValueError(
            f"FID over {len(places)} pictures means nothing: give at least {FID_LEAST}, or --force"
        )
    scorers = scorers_of(a)
    if a.best_of > 1 and not scorers:
        raise ValueError("--best-of: expected --clip or --scorer, which chooses the best")
    chooser = next(iter(scorers.values()), None)
    lm = MultimodalLM.from_pretrained(
        a.model, visual_tokenizer=a.visual_tokenizer, decoder=a.decoder, device=a.device
    )
    a.size = a.size or lm.visual_tokenizer.config.image_size
    spaces = spaces_of(lm, a)
    texts = {
        scorer.name: scorer.embed(captions) for scorer in scorers.values()
    }  # what is missing is said now
    by_name = {scorer.name: scorer for scorer in scorers.values()}
    settings = {
        "weights": digest(lm.model, lm.visual_tokenizer, lm.decoder),
        "captions": digest(captions, ids),
        "sampling": [a.guidance, a.top_k, a.top_p, a.temperature],
        "drawing": [a.steps, a.decoder_guidance],
        "best of": [a.best_of, digest(chooser.weights) if chooser and a.best_of > 1 else None],
        "batch size": a.batch_size,
        "device": a.device,
        "where": common.provenance("painting", packages=(lavit_tok, lavit_lm)),
    }
    parts = Parts(a.out, a.name, settings, kept=True)
    painter = Painter(lm, chooser, a)
    files = {seed: paint(painter, captions, ids, seed, parts.folder, a) for seed in range(a.seeds)}

    reference = Reference(found, places, spaces, by_name, a)
    good = reference.good
    against, extra = (
        dict(reference.features),
        others if a.reference == "all" else others[: len(good)],
    )
    enough = a.reference == "all" or len(others) >= len(good)
    rest = Reference(found, extra, spaces, {}, a) if extra and enough else None
    if a.reference == "all" and rest:
        against = {name: torch.cat([against[name], rest.features[name]]) for name in against}
    texts = {name: vectors[good] for name, vectors in texts.items()}
    spread = distinct([captions[i] for i in good], RETRIEVED)
    runs, native = [], (0, 0)
    for seed, drawn in files.items():
        native = open_image(drawn[0]).size
        pixels = (processor(a).to_uint8(drawn[i])[0] for i in good)
        made, near = described(
            pixels, len(good), spaces, by_name, f"figures of seed {seed}", a.batch_size
        )
        runs.append(made_figures(made, near, against, texts, spread))
    true = made_figures({}, reference.described, against, texts, spread)
    if rest and a.reference == "chosen":
        true |= made_figures(rest.features, {}, against, {}, [])
    rejects = reference.rejects + (rest.rejects if rest and a.reference == "all" else [])
    departures = departures_of(found, a, len(good), len(rejects))
    values: dict[str, Any] = {
        "set": found.name,
        "pictures_of_the_set": found.total,
        "captions": len(captions),
        "different_captions": len(set(captions)),
        "scored": len(good),
        "reference": len(next(iter(against.values()))),
        "reference_is": "all pictures of the set"
        if a.reference == "all"
        else "the pictures of the captions",
        "crop": f"{'squeezed' if a.squeeze else 'centre crop'} {a.size}x{a.size}, made at {native[0]}x{native[1]}",
        "model": Path(a.model).name,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "sampling": {
            k: getattr(a, k) for k in ("guidance", "top_k", "top_p", "temperature", "steps")
        }
        | {"decoder_guidance": a.decoder_guidance},
        "says": lm.objective.image_output,
        "best_of": {
            "samples": a.best_of,
            "by": chooser.name if chooser and a.best_of > 1 else None,
        },
        "codes_per_picture": codes_per_picture([f for drawn in files.values() for f in drawn]),
        "seed": a.seed,
        "per_seed": runs,
        "figures": {name: common.spread([run[name] for run in runs]) for name in runs[0]},
        "true_pictures": true,
        "departures": departures,
        "comparable": not departures,
        "rejects": rejects,
        "pictures": parts.folder.name,
    }
    show(reference, files[0], captions, values, a)
    common.write(a.name, a.out, "Pictures of captions", text(values, a), values)
    return values


def distinct(captions: Sequence[str], most: int) -> list[int]:
    """Places of the first pictures of the first different captions."""
    first: dict[str, int] = {}
    for place, caption in enumerate(captions):
        first.setdefault(caption, place)
    return list(first.values())[:most]


def codes_per_picture(files: Sequence[Path]) -> float | None:
    """The mean, as the pictures' own notes say; None of pictures that were not drawn from codes."""
    counts = []
    for file in files:
        with Image.open(file) as picture:
            said = picture.text.get("codes")  # type: ignore[attr-defined]
        if said is None:
            return None
        counts.append(int(said))
    return sum(counts) / len(counts)


def departures_of(found: caption_sets.CaptionSet, a: Namespace, count: int, bad: int) -> list[str]:
    """From the protocol, in words; empty if there are none."""
    words = []
    if (found.name, found.total) != VAL2014:
        words.append(f"not COCO val2014 ({VAL2014[0]}, {VAL2014[1]} pictures)")
    if count != PROTOCOL:
        words.append(f"{count} captions, not {PROTOCOL}")
    if bad:
        words.append(f"{bad} unreadable pictures left out")
    if a.squeeze:
        words.append("whole pictures squeezed to a square, no centre crop")
    if a.reference == "all":
        words.append("against all pictures of the set, not those of the captions")
    if not a.inception:
        words.append("another feature space than Inception's")
    if a.best_of > 1:
        words.append(f"best of {a.best_of} by a scorer")
    return words


# What comes out


def show(
    reference: Reference,
    files: Sequence[Path],
    captions: Sequence[str],
    v: dict[str, Any],
    a: Namespace,
) -> None:
    pictures, texts = [], []
    for number, true in reference.shown.items():
        made = Image.fromarray(processor(a).to_uint8(files[number])[0].permute(1, 2, 0).numpy())
        pair = Image.new("RGB", (2 * a.size + 2, a.size), "white")
        pair.paste(true, (0, 0))
        pair.paste(made, (a.size + 2, 0))
        pictures.append(pair)
        texts.append(f"{captions[number]}\ntrue | made")
    first = next(iter(v["figures"]))
    bars = {f"made, seed {i}": run[first] for i, run in enumerate(v["per_seed"])}
    if first in v["true_pictures"]:
        bars["other true pictures"] = v["true_pictures"][first]
    figure(a.out / f"{a.name}.png", bars, first, pictures, texts)


def text(v: dict[str, Any], a: Namespace) -> str:
    body = f"{v['captions']} captions ({v['different_captions']} different) of {v['set']} by seed {v['seed']}, one "
    body += f"picture each; reference: {v['reference_is']}, {v['reference']} of them, {v['crop']}. Model {v['model']}, "
    sampling = ", ".join(f"{k} {x}" for k, x in v["sampling"].items())
    body += f"{v['parameters'] / 1e6:.1f} M weights, says {v['says']}; {sampling}. "
    if v["codes_per_picture"] is not None:
        body += f"{v['codes_per_picture']:.1f} codes a picture. "
    if v["best_of"]["by"]:
        body += f"Best of {v['best_of']['samples']} by {v['best_of']['by']}, which flatters its own figures below. "
    marks = f" [{'; '.join(v['departures'])}]" if v["departures"] else ""
    body += "\n\n"
    rows = [
        (
            name + (marks if "Frechet" in name or "FID" in name else ""),
            common.plus_minus(value),
            v["true_pictures"].get(name),
        )
        for name, value in v["figures"].items()
    ]
    head = ("figure", f"made pictures, mean ± std of {a.seeds} seeds", "true pictures")
    body += common.table(head, rows)
    body += "\n\nOf true pictures, a distance is that of as many others of the set, where there are so many: "
    body += "what no model can be expected to undercut by much. Nearness is that of the captions' own pictures.\n\n"
    body += "## Published\n\nFID on COCO by the authors' own account. "
    body += (
        "Not comparable with the figures above: " + "; ".join(v["departures"])
        if v["departures"]
        else "The same set"
    )
    body += ".\n\n" + common.table(("model", "FID"), PUBLISHED)
    body += common.rejected(v["rejects"])
    return (
        body + f"\n\nAll pictures: `{v['pictures']}/`.\n\n![true and made pictures]({a.name}.png)"
    )


def arguments() -> Any:
    found = common.parser(__doc__, data=False, tokenizer=False, batch_size=32)
    caption_sets.add_captions(found)
    add_painter(found)
    found.add_argument(
        "--captions", type=common.positive, default=PROTOCOL, help="at most, one picture each"
    )
    found.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    found.add_argument("--seeds", type=common.positive, default=3, help="seeds of the pictures")
    found.add_argument(
        "--best-of",
        type=common.positive,
        default=1,
        help="samples of a caption, best by the scorer",
    )
    found.add_argument(
        "--reference",
        choices=["chosen", "all"],
        default="chosen",
        help="pictures of the captions, or all",
    )
    found.add_argument(
        "--size", type=common.positive, help="of the crops; the visual tokenizer's if not given"
    )
    found.add_argument(
        "--squeeze", action="store_true", help="whole pictures squeezed to a square, no centre crop"
    )
    found.add_argument(
        "--inception", type=Path, help="Inception-v3 weights of torch-fidelity, for FID"
    )
    found.add_argument(
        "--clip", type=Path, help="folder of a CLIP model; the first of --clip, --scorer chooses"
    )
    found.add_argument("--scorer", type=Path, help="folder that recipes/default/teacher.py wrote")
    found.add_argument("--force", action="store_true", help=f"FID even under {FID_LEAST} pictures")
    found.add_argument("--name", default="text_to_image", help="of the result files")
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))
