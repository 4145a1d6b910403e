"""The scorers of captions: BLEU, ROUGE-L, CIDEr, METEOR and SPICE as the COCO evaluation computes them.

    captions -tokenization-> words in lower case, punctuation gone -pycocoevalcap-> scores x 100, as papers print them

"ptb" is the official tokenization (Stanford's PTBTokenizer) and needs Java, as METEOR and SPICE do. "words" is ours
and needs nothing: figures under it are labelled, since they are no official ones. The CIDEr of the COCO evaluation is
CIDEr-D (arXiv:1411.5726); its document frequencies are those of the very captions that are scored against, so that a
part of a set gives another figure. Without pycocoevalcap there is only torchmetrics' BLEU. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCORERS = ("BLEU", "ROUGE-L", "CIDEr", "METEOR", "SPICE")
PACKAGE = "pycocoevalcap"
INSTALL = f"needs {PACKAGE} (pip install --no-deps {PACKAGE}, 104 MB)"
WORDS = "words in lower case, our own tokenization: not the official PTB one, so these are no official figures"
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True)
class Scored:
    """What captions scored."""

    scores: dict[str, float]
    """Times 100."""
    absent: dict[str, str]
    """Scorers that could not run, and why."""
    tokenization: str
    by: str
    """Package and version."""
    official: bool
    """The official tokenization and scorers."""
    cider: list[float] | None
    """Of each picture, times 100."""


def score(
    references: Sequence[Sequence[str]],
    said: Sequence[str],
    scorers: Sequence[str] = SCORERS,
    tokenization: str = "auto",
) -> Scored:
    """Score one caption a picture against the picture's true ones.

    Args:
        references: at least one for each picture.
        said: as many as pictures; an empty one scores 0.
        tokenization: "ptb", "words", or "auto": ptb where it can run.

    Raises:
        ValueError: no pictures, one without true captions, or ptb where it cannot run.
    """
    if not said or len(said) != len(references) or not all(references):
        raise ValueError(
            "expected one caption for each of some pictures, which all have true captions"
        )
    unfit = (
        INSTALL if find_spec(PACKAGE) is None else None if shutil.which("java") else "needs Java"
    )
    if tokenization == "ptb" and unfit:
        raise ValueError(f"--tokenization ptb: {unfit}")
    ptb = unfit is None and tokenization != "words"
    split = _ptb if ptb else _words
    true, made = split(references), split([[caption] for caption in said])
    how = "the official PTB tokenization" if ptb else WORDS
    if find_spec(PACKAGE) is None:
        by = f"torchmetrics {importlib.metadata.version('torchmetrics')}"
        absent = {name: INSTALL for name in scorers if name != "BLEU"}
        return Scored(
            _torchmetrics_bleu(true, made) if "BLEU" in scorers else {},
            absent,
            how,
            by,
            False,
            None,
        )
    values: dict[str, float] = {}
    absent = {}
    each: list[float] | None = None
    for name in scorers:
        if name in ("METEOR", "SPICE") and (reason := _missing(name)):
            absent[name] = reason
            continue
        try:
            found, single = _run(name, dict(enumerate(true)), dict(enumerate(made)))
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            absent[name] = f"failed: {error}"
            continue
        values |= found
        each = [100 * float(value) for value in single] if name == "CIDEr" else each
    by = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    return Scored(values, absent, how, by, ptb, each)


def _run(
    name: str, true: dict[int, list[str]], made: dict[int, list[str]]
) -> tuple[dict[str, float], Any]:
    scorer = _scorer(name)
    with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints lengths
        total, each = scorer.compute_score(true, made)
    if name == "BLEU":
        return {f"BLEU-{n}": 100 * float(value) for n, value in enumerate(total, 1)}, each
    return {name: 100 * float(total)}, each


def _scorer(name: str) -> Any:
    """Imported when asked for: METEOR and SPICE start Java."""
    if name == "BLEU":
        from pycocoevalcap.bleu.bleu import Bleu

        return Bleu(4)
    if name == "ROUGE-L":
        from pycocoevalcap.rouge.rouge import Rouge

        return Rouge()
    if name == "CIDEr":
        from pycocoevalcap.cider.cider import Cider

        return Cider()
    if name == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()
    from pycocoevalcap.spice.spice import Spice

    return Spice()


def _missing(name: str) -> str | None:
    """Why a scorer that is a Java program cannot run here."""
    if shutil.which("java") is None:
        return "needs Java"
    if name == "SPICE":
        spec = find_spec(PACKAGE)
        assert spec is not None and spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations))) / "spice" / "lib"
        if not all((folder / jar).is_file() for jar in SPICE_JARS):
            return f"needs Stanford CoreNLP 3.6.0 ({' and '.join(SPICE_JARS)}) in {PACKAGE}/spice/lib; not fetched here"
    return None


def _ptb(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # it reads one caption a line: any other kind of line break would shift all that come after it
    lines = {i: [{"caption": " ".join(c.split())} for c in row] for i, row in enumerate(captions)}
    found = PTBTokenizer().tokenize(lines)
    if [len(found.get(i, ())) for i in lines] != [len(row) for row in captions]:
        raise ValueError(
            "the PTB tokenizer gave another number of captions than it got: are they plain text?"
        )
    return [found[i] for i in lines]


def _words(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    return [
        [" ".join(re.findall(r"[\w']+", caption.lower())) for caption in row] for row in captions
    ]


def _torchmetrics_bleu(
    true: Sequence[Sequence[str]], made: Sequence[Sequence[str]]
) -> dict[str, float]:
    from torchmetrics.functional.text import bleu_score

    said = [row[0] for row in made]
    return {
        f"BLEU-{n}": 100 * float(bleu_score(said, [list(row) for row in true], n_gram=n))
        for n in range(1, 5)
    }
