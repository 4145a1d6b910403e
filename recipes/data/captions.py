"""Captions of the images of each source, from file names and metadata of the packages."""

from __future__ import annotations

import re

FASHION_LABELS = (
    "a t-shirt or top", "trousers", "a pullover", "a dress", "a coat",
    "a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot",
)  # fmt: skip

# File names of clip arts end with the author's name, often truncated.
AUTHORS = (
    "aj ashton", "andrew fitzsimon", "ani ani", "anthony liekens", "architetto francesco rollandin",
    "barber or ha", "benji park", "bw ganson", "dan gerhards", "dan gerhrads", "dave pena",
    "enrique meza c", "frederic moser", "frouke", "fudriot omic ch", "ganson", "gerald g",
    "hash 0x89c79", "jacob leisler mo", "jarno vasamaa", "jean victor balin", "jon phillips",
    "jonadab", "jonathon s", "juliane krug", "kevin", "linda kim", "mateya", "matt todd",
    "matthew gates", "mauro olivo", "mimooh", "nathan eady", "nicu buculei", "patricia fidi",
    "peterm", "rollandin francesco", "roman bertle", "romus", "ruairi hann r", "sergio luiz araujo",
    "snuatautisticido", "stefan bazelkov", "susan park", "tess brady", "the structor", "uliphant",
    "victor balin", "william page", "yen cheng", "yves guillou", "zazou",
)  # fmt: skip
TRUNCATED_AT = 23  # longer file names (without their number) were truncated, perhaps in the author
SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
RANKS = {"1": "ace", "a": "ace", "j": "jack", "q": "queen", "k": "king"}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RANKS |= {str(number): word for number, word in enumerate(NUMBERS, 2)}
IGNORED_FOLDERS = {"unsorted", "duplicates", "special", "examples", "stock"}


def _drop_author(words: list[str], shortest: int) -> list[str]:
    """Remove an author's name, or the beginning of one, from the end of a file name's words."""
    for start in range(1, len(words)):
        tail = " ".join(words[start:])
        if len(tail) >= shortest and any(author.startswith(tail) for author in AUTHORS):
            return words[:start]
    return words


def _words(name: str) -> list[str]:
    """The lower-case words of a file or folder name, without numbers and single letters."""
    card = re.fullmatch(r".*_([cdhs])_(\d+|[ajqk])", name.lower())
    if card and card[2] in RANKS:
        return [RANKS[card[2]], "of", SUITS[card[1]]]
    name = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    shortest = 2 if len(re.sub(r"_?\d+$", "", name)) >= TRUNCATED_AT else 4
    words = [word for word in re.split(r"[\W_]+", name) if word and not word.isdigit()]
    words = [re.sub(r"(?<=[a-z])\d+$", "", word) for word in words]
    words = _drop_author(words, shortest)
    return [
        word for word in words if (len(word) > 1 and not re.match(r"\d|0x", word)) or word == "a"
    ]


def openclipart_caption(path: str) -> str:
    """A caption from a path such as ``animals/birds/blue_bird_01.png``: name, then folders."""
    *folders, name = path.rsplit(".", 1)[0].split("/")
    parts = [_words(name)]
    parts += [_words(folder) for folder in reversed(folders) if folder not in IGNORED_FOLDERS]
    phrases = dict.fromkeys(" ".join(part) for part in parts if part)
    return ", ".join(phrases) or "clip art"


def tuxpaint_caption(text: str) -> str:
    """The English caption of a stamp: the first line of its text file, if it is not empty."""
    first = text.lstrip("\ufeff").strip().split("\n", 1)[0].strip()
    return re.sub(r"\s+", " ", first) or "stamp"


def emoji_caption(name: str) -> str:
    """The name of an emoji in lower case."""
    return re.sub(r"\s+", " ", name).strip().lower()


def file_caption(name: str) -> str:
    """A file name such as ``greatPyramidOfGiza`` or ``fish12`` in lower case, without numbers."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", name)
    return re.sub(r"\d+", "", spaced).strip().lower() or "image"


PARTICLES = {"of", "with", "and", "in", "on", "for", "to", "the", "a", "an", "or", "by", "from"}
SHORT = {"ox", "tv", "up", "no", "go", "us", "uk"}
NOTHING = {"clip art", "image"}
DATE = re.compile(r"\b(?:\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|(?:19|20)\d\d)\b")


def _english(text: str, words: frozenset[str]) -> str:
    """The words of `text` that are English, without what an author's name leaves at the end."""
    kept = [word for word in text.split() if word in words]
    while kept and (kept[-1] in PARTICLES or (len(kept[-1]) < 3 and kept[-1] not in SHORT)):
        kept.pop()
    return " ".join(kept)


def clean(caption: str, source: str, key: str, words: frozenset[str], names: frozenset[str]) -> str:
    """A caption for a language model: in lower case, without dates, names and other languages.

    One of NOTHING if nothing is left.

    Args:
        caption: as this module made it.
        source: of the image, as in the data set.
        key: path of the image.
        words: English words in lower case.
        names: proper names in lower case, which are allowed in titles of monuments.
    """
    text = DATE.sub("", re.sub(r"\([^)]*\)", "", caption)).lower()
    if source == "openclipart":
        parts = dict.fromkeys(_english(part, words) for part in text.split(","))
        return ", ".join(filter(None, parts)) or "clip art"
    if source == "tuxpaint":
        text = re.split(
            r"(?<=[a-z])[.!?](?:\s|$)", re.sub('[\u201c\u201d"\u2013\u2014]', " ", text)
        )[0]
    if source == "gcompris":
        known = all(len(word) > 1 and (word in words or word in names) for word in text.split())
        if "/paintings/" in key:
            text = f"painting: {text}" if known else "a painting"
        elif not known:
            country = re.search(r"explore_monuments/resource/([^/]+)/", key)
            text = f"a monument in {country[1]}" if country else _english(text, words) or "image"
            text = text.removesuffix(" in wonders")
    return re.sub(r"\s+", " ", text).strip(" .!,") or "image"
