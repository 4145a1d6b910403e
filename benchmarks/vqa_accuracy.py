"""The accuracy of visual question answering, by the published description (visualqa.org/evaluation, VQA v2).

    "The two dogs."  -normalize->  "2 dogs"

An answer's accuracy is min(people who gave it / 3, 1), averaged over all ways to leave one of the ten people out. Both
sides are normalised alike: lower case; periods gone, but for decimals; number words as digits; articles gone; missing
apostrophes put back; other punctuation a space, but apostrophes and colons, and a comma between digits nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(i) for i, word in enumerate(WORDS.split())} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
SPACED = str.maketrans({mark: " " for mark in string.punctuation if mark not in "':."})
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could i might must should they we who would you",
    "'re": "they you",
    "'ll": "it that there they what who you",
    "'d": "he how it that there they who you",
    "'s": "he how she that there what when where who why",
    "'m": "i",
}
"""Without an apostrophe these are no other English words; "its", "well" or "shell" would be."""
CONTRACTIONS = {
    word + ending.replace("'", ""): word + ending
    for ending, words in ENDINGS.items()
    for word in words.split()
} | {"oclock": "o'clock", "maam": "ma'am", "yall": "y'all"}


def normalize(answer: str) -> str:
    """The form in which answers are compared."""
    text = " ".join(answer.lower().replace("’", "'").split())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text).translate(SPACED)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, humans: Sequence[str]) -> float:
    """Accuracy in 0..1 of one answer.

    Args:
        answer: what the model said.
        humans: what people said, ten as a rule; a single answer counts as if all had given it.

    Raises:
        ValueError: no human answer.
    """
    if not humans:
        raise ValueError("expected the answers of people, got none")
    said = normalize(answer)
    same = [normalize(human) == said for human in humans]
    if len(same) == 1:
        return float(same[0])
    return sum(min((sum(same) - left_out) / 3, 1.0) for left_out in same) / len(same)
