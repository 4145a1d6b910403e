"""Text <-> ids: what users write, read as nothing but text; and a small text tokenizer for LMs trained from scratch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BYTES = 256

_special_ids: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


class VocabularyError(ValueError):
    """Codes or ids out of range, or a tokenizer or LM that does not have, or cannot take, the image tokens."""


def train_text_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s>, </s> and <pad>: every text in every language comes back exactly, none is unknown.

    Args:
        texts: what it learns its merges from; the same texts in the same order give the same tokenizer.
        size: ids in all, at least 259: three special tokens, 256 bytes, then merges (fewer if the texts hold no more).

    Raises:
        VocabularyError: a size that cannot hold every byte.
    """
    specials = [BOS, EOS, PAD]
    if size < BYTES + len(specials):
        raise VocabularyError(
            f"expected at least {BYTES + len(specials)} ids, got {size}: some bytes would have none"
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
    # A caller who asks for special tokens, as servers do, gets what rows begin with.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, specials.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def encode_plain(tokenizer: Any, text: str, visual: Callable[[int], bool]) -> list[int]:
    """Ids of what a user wrote: no special id, and none that `visual` says is an image token; no bos, no eos.

    A few tokenizers read a token's name as that token even when told not to: names that their model holds as a piece,
    and image tokens of an exported directory, which are not special there. Such a name is cut after its first letter.

    Raises:
        VocabularyError: no text, or text that this tokenizer can only read as a special token.
    """
    special = _specials(tokenizer)
    ids = _encode(tokenizer, text)
    found = sorted({i for i in ids if i in special or visual(i)})
    if not found:
        return ids
    names = "|".join(re.escape(str(tokenizer.convert_ids_to_tokens(i))) for i in found)
    cuts = [0, *(match.start() + 1 for match in re.finditer(names, text)), len(text)]
    ids = [
        i
        for start, stop in pairwise(cuts)
        if start < stop
        for i in _encode(tokenizer, text[start:stop])
    ]
    left = [i for i in ids if i in special or visual(i)]
    if left:
        name = tokenizer.convert_ids_to_tokens(left[0])
        raise VocabularyError(
            f"this tokenizer reads {text[:60]!r} as its special token {name}, and in no other way"
        )
    return ids


def forget(tokenizer: Any) -> None:
    """Call after adding special tokens: which ids no text may have is worked out once for each tokenizer."""
    _special_ids.pop(tokenizer, None)


def _specials(tokenizer: Any) -> frozenset[int]:
    """Ids that no text may have: all special tokens, but not a plain "unknown", which is what unknown text becomes.

    Kept, since listing some ten thousand tokens, or merely counting them, takes many times as long as a caption.
    """
    keep = _special_ids.get(tokenizer)
    if keep is None:
        named = {
            name: value
            for name, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        unknown = named.pop("unk_token", None)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        if unknown is not None and unknown not in named.values():
            special.discard(tokenizer.convert_tokens_to_ids(unknown))
        keep = _special_ids[tokenizer] = frozenset(special)
    return keep


def _encode(tokenizer: Any, text: str) -> list[int]:
    if not isinstance(text, str):
        raise VocabularyError(f"expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VocabularyError(
            f"expected valid Unicode, got half a surrogate pair at {error.start}"
        ) from None
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [int(i) for i in ids]
