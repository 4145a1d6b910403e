"""Captions of a data set of your own, with the usual scores.

    images                  -> MultimodalLM.caption -> captions, NAME.results.json
    captions, true captions -> pycocoevalcap        -> BLEU, ROUGE-L, CIDEr-D, METEOR, x 100

The official "ptb" tokenization and METEOR need Java; scores with "words" are labeled as not
official. Document frequencies of CIDEr-D (arXiv:1411.5726) are those of the true captions that are
scored against. Writes captioning.md, .json and .results.json. A stopped run continues where it was.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import contextlib
import importlib
import importlib.metadata
import io
import json
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torchmetrics.functional.text import bleu_score

from benchmarks.lm_quality import MODEL, choose, load
from benchmarks.shared import cli, datasets, report
from benchmarks.shared.cache import Stages
from benchmarks.shared.provenance import recipe

CLASSES = {"BLEU": "Bleu", "ROUGE-L": "Rouge", "CIDEr": "Cider", "METEOR": "Meteor"}
PACKAGE = "pycocoevalcap"
INSTALL = f"needs {PACKAGE} (pip install --no-deps {PACKAGE}, 104 MB)"
PTB = "the official PTB tokenization"
WORDS = "words in lower case, not the official PTB tokenization, so these are no official scores"


def score(
    references: Sequence[Sequence[str]],
    captions: Sequence[str],
    scorers: Sequence[str] = tuple(CLASSES),
    tokenization: str = "auto",
) -> dict[str, Any]:
    """Scores x 100 of one caption per image against the image's true ones.

    Args:
        references: at least one for each image.
        captions: one for each image; an empty one scores 0.
        tokenization: "ptb", "words", or "auto": ptb where it can run.

    Returns:
        "scores", "absent" (with reasons), "tokenization", "by" (package), "cider_of_each" image.

    Raises:
        ValueError: no images, one without true captions, or ptb where it cannot run.
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError("expected one caption per image, and true captions for every image")
    installed, java = find_spec(PACKAGE) is not None, shutil.which("java") is not None
    if tokenization == "ptb" and not (installed and java):
        raise ValueError(f"--tokenization ptb: {'needs Java' if installed else INSTALL}")
    ptb = installed and java and tokenization != "words"
    split = _ptb if ptb else _words
    true, generated = split(references), split([[caption] for caption in captions])
    by = PACKAGE if installed else "torchmetrics"
    result: dict[str, Any] = {"scores": {}, "absent": {}, "tokenization": PTB if ptb else WORDS}
    result["by"] = f"{by} {importlib.metadata.version(by)}"
    for name in scorers:
        if not installed and name == "BLEU":
            texts = [text for (text,) in generated]
            bleu = {n: float(bleu_score(texts, true, n_gram=n)) for n in range(1, 5)}
            result["scores"] = {f"BLEU-{n}": 100 * value for n, value in bleu.items()}
            continue
        try:
            total, each = _pycocoevalcap(name, true, generated)
        except (OSError, ValueError, ImportError) as error:
            result["absent"][name] = str(error) if installed else INSTALL
            continue
        keys = [f"BLEU-{n}" for n in range(1, 5)] if name == "BLEU" else [name]
        values = total if name == "BLEU" else [total]
        result["scores"] |= {k: 100 * float(v) for k, v in zip(keys, values, strict=True)}
        if name == "CIDEr":
            result["cider_of_each"] = [100 * float(value) for value in each]
    return result


def _pycocoevalcap(name: str, true: list[list[str]], generated: list[list[str]]) -> Any:
    if name == "METEOR" and shutil.which("java") is None:
        raise OSError("needs Java")
    module = CLASSES[name].lower()
    scorer = getattr(importlib.import_module(f"{PACKAGE}.{module}.{module}"), CLASSES[name])()
    with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints lengths
        return scorer.compute_score(dict(enumerate(true)), dict(enumerate(generated)))


def _ptb(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It reads one caption per line: any other line break would shift all that follow it.
    lines = [[{"caption": " ".join(c.split())} for c in texts] for texts in captions]
    tokens = PTBTokenizer().tokenize(dict(enumerate(lines)))
    if [len(tokens.get(i, ())) for i in range(len(lines))] != list(map(len, lines)):
        raise ValueError("the PTB tokenizer returned another number of captions than it was given")
    return [tokens[i] for i in range(len(lines))]


def _words(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[" ".join(re.findall(r"[\w']+", c.lower())) for c in texts] for texts in captions]


def main(args: Namespace) -> dict[str, Any]:
    lm, data, about = load(args, decoder=None)
    stages = Stages(args, args.name, lm.model, lm.visual_tokenizer, data.pixels)

    def caption(batch: list[int]) -> list[str]:
        options = {"min_new_tokens": args.min_tokens, "num_beams": args.beams}
        texts = lm.caption(list(data.pixels[batch]), args.max_tokens, **options)
        return [datasets.first_line(text) for text in texts]

    parts = stages.batches("captions", range(len(data)), args.batch_size, caption)
    captions = [text for part in parts for text in part]
    chosen, known = data.with_caption(), datasets.training_captions(args.data)
    references = [[data.captions[i]] for i in chosen]
    found = score(references, [captions[i] for i in chosen], args.scorers, args.tokenization)
    each = found.pop("cider_of_each", [])
    unseen = [k for k, i in enumerate(chosen) if datasets.normalized(data.captions[i]) not in known]
    if each and known and unseen:
        mean = sum(each[k] for k in unseen) / len(unseen)
        found["scores"]["CIDEr of captions not in train"] = mean
    how = "greedy" if args.beams is None else f"{args.beams} beams"
    values: dict[str, Any] = {
        **about,
        "decoding": f"{how}, {args.min_tokens} to {args.max_tokens} tokens",
        "scored": len(chosen),
        "seen_in_training": len(chosen) - len(unseen) if known else None,
        **found,
    }
    if args.scorer:
        values["identified"] = identified(data, captions, args)
    shown = datasets.evenly_spaced(12, len(data))
    values["examples"] = [[data.keys[i], captions[i], data.captions[i]] for i in shown]
    results = [{"image_id": k, "caption": c} for k, c in zip(data.keys, captions, strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.results.json").write_text(json.dumps(results))
    report.write(args.name, args, "Captions", text(values), values)
    stages.done()
    return values


def identified(data: datasets.ImageSet, texts: list[str], args: Namespace) -> dict[str, Any]:
    """What captions identify among images whose true captions differ, in the scorer's space."""
    indices = choose(data.captions, args.among, args.seed)
    scorer = recipe("default/scorer.py").load_scorer(args.scorer, args.device)
    generated, true = ([source[i] for i in indices] for source in (texts, data.captions))
    vectors, true_vectors = scorer.embed(generated), scorer.embed(true)
    described = scorer.describe(data.pixels[indices])
    equal = [
        datasets.normalized(a) == datasets.normalized(b)
        for a, b in zip(generated, true, strict=True)
    ]
    return {
        "the image": scorer.identified(vectors, described),
        "the true caption": scorer.identified(vectors, true_vectors),
        "ceiling: the image by its true caption": scorer.identified(true_vectors, described),
        "chance": {"top1": 1 / len(indices), "top5": 5 / len(indices)},
        "exact": sum(equal) / len(equal),
    }


def text(v: dict[str, Any]) -> str:
    body = f"{v['set']}. Model {v['model']}, {v['parameters'] / 1e6:.1f} M weights; "
    body += f"{v['decoding']}. {v['by']}, {v['tokenization']}.\n\n"
    rows = [*v["scores"].items(), *((n, f"not measured: {why}") for n, why in v["absent"].items())]
    body += report.table(("score", "x 100"), rows)
    body += f"\n\nCIDEr is CIDEr-D; document frequencies are those of these {v['scored']} images."
    if v["seen_in_training"] is not None:
        body += f" The captions of {v['seen_in_training']} of them are in the train split, too."
    if "identified" in v:
        rows = [(k, *x.values()) for k, x in v["identified"].items() if isinstance(x, dict)]
        body += "\n\n" + report.table(("identified by the caption", "top-1", "top-5"), rows)
        body += f"\n\nExactly the true caption: {100 * v['identified']['exact']:.1f} %."
    body += "\n\n" + report.table(("image", "generated caption", "true caption"), v["examples"])
    return body + report.rejected(v["rejects"])


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        **MODEL,
        beams=(int, "beam search with so many beams, not greedy decoding"),
        min_tokens=(1, "of a caption"),
        max_tokens=(48, "of a caption"),
        scorers=(list(CLASSES), "scores", list(CLASSES)),
        tokenization=("auto", "auto: ptb where it can run", ["auto", "ptb", "words"]),
        among=(100, "images among which captions identify theirs"),
        seed=(0, "of the choice of these images"),
        name=("captioning", "of the result files"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))
