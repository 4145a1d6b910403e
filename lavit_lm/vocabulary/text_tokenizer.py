"""Text -> ids that are never special, and a small text tokenizer for LMs trained from scratch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BYTES = 256
TEXT_IDS = 2048
"""Ids of a text tokenizer that is trained on captions."""

_special_ids: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


class VocabularyError(ValueError):
    """Codes or ids out of range, or a tokenizer or LM without, or unfit for, image tokens."""


def train_text_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with <s>, </s> and <pad>, which encodes any text losslessly.

    Args:
        texts: texts to learn merges from. The same texts in the same order give the same tokenizer.
        size: number of ids, at least 259: three special tokens, 256 bytes, then merges (fewer if
            the texts do not contain enough).

    Raises:
        VocabularyError: the size is too small for every byte.
    """
    specials = [BOS, EOS, PAD]
    if size < BYTES + len(specials):
        raise VocabularyError(
            f"expected at least {BYTES + len(specials)} ids, got {size}: bytes would lack ids"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # add_special_tokens=True, as servers call it, then gives what training sequences begin with.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, specials.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def saved_text_tokenizer(texts: Iterable[str], root: Path, size: int = TEXT_IDS) -> Path:
    """`train_text_tokenizer`, in a folder whose name depends on the texts and the size.

    It is trained once, and found again by a resumed run and by other processes.
    """
    texts = list(texts)
    digest = hashlib.sha256(json.dumps([size, texts]).encode()).hexdigest()[:12]
    folder = root / f"text-tokenizer-{digest}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            train_text_tokenizer(texts, size).save_pretrained(temporary)
            # Another process may have been first; its files are the same.
            with contextlib.suppress(OSError):
                Path(temporary).rename(folder)
                Path(temporary).mkdir()  # which is to be deleted
    return folder


def encode_plain(tokenizer: Any, text: str, is_visual: Callable[[int], bool]) -> list[int]:
    """Encode text as text: no special token, no image token, no begin-of-text, no end-of-text.

    Args:
        tokenizer: a fast tokenizer.
        text: any text; names of special tokens in it are encoded as ordinary text.
        is_visual: whether an id is an image token.

    Raises:
        VocabularyError: not valid text, or text that this tokenizer cannot encode in another way.
    """
    special = _specials(tokenizer)
    ids = _encode(tokenizer, text)
    forbidden = sorted({i for i in ids if i in special or is_visual(i)})
    if not forbidden:
        return ids
    # split_special_tokens does not help where the model itself contains the name as a piece, nor
    # for image tokens of an exported directory, which are not special. Cut such names.
    names = "|".join(re.escape(str(tokenizer.convert_ids_to_tokens(i))) for i in forbidden)
    cuts = [0, *(match.start() + 1 for match in re.finditer(names, text)), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(cuts) if start < stop]
    ids = [i for piece in pieces for i in _encode(tokenizer, piece)]
    left = [i for i in ids if i in special or is_visual(i)]
    if left:
        name = tokenizer.convert_ids_to_tokens(left[0])
        raise VocabularyError(
            f"this tokenizer can only encode {text[:60]!r} with its special token {name}"
        )
    return ids


def clear_special_ids(tokenizer: Any) -> None:
    """Forget the cached special ids of a tokenizer; call it after adding special tokens."""
    _special_ids.pop(tokenizer, None)


def _specials(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens except an "unknown" token that has no other function.

    Cached: listing or counting 16,000 added tokens takes many times as long as encoding a caption.
    """
    cached = _special_ids.get(tokenizer)
    if cached is None:
        names = tokenizer.special_tokens_map.items()
        named = {name: value for name, value in names if isinstance(value, str)}
        unknown = named.pop("unk_token", None)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        if unknown is not None and unknown not in named.values():
            special.discard(tokenizer.convert_tokens_to_ids(unknown))
        cached = _special_ids[tokenizer] = frozenset(special)
    return cached


def _encode(tokenizer: Any, text: str) -> list[int]:
    if not isinstance(text, str):
        raise VocabularyError(f"expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VocabularyError(
            f"expected valid Unicode, got half a surrogate pair at {error.start}"
        ) from None
    # As tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), which takes
    # three times as long; it sets these options itself when it is next called.
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend.encode(text, add_special_tokens=False).ids
