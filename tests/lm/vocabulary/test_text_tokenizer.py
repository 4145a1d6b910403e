"""text_tokenizer.py: a tokenizer trained here, saved, and loaded by plain AutoTokenizer."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
from helpers.small_lms import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from lavit_lm import VisualVocabulary, VocabularyError
from lavit_lm.vocabulary.text_tokenizer import BYTES, encode_plain, forget, train_text_tokenizer

CAPTIONS = [
    "a red apple on a table",
    "  two  spaces,\ta tab\nand a line  ",
    "Ein Bär läuft über die Straße.",
    "赤いりんごがテーブルの上にある",
    "قطة على الطاولة",
    "👩‍👩‍👧 🙂 and a ﬁ ligature",
    "e\u0301 is not é here",
    "\x00 control \x7f",
    "<s> </s> <pad> <|img|>",
    "",
]


def test_every_caption_comes_back(tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(TEXTS, 300)
    vocabulary = VisualVocabulary.extend(tokenizer, None, 4)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for caption in CAPTIONS:
        ids = vocabulary.encode_text(again, caption)
        assert ids == vocabulary.encode_text(tokenizer, caption)
        assert not {again.bos_token_id, again.eos_token_id, again.pad_token_id} & set(ids)
        assert vocabulary.decode_text(again, ids) == caption


def test_ids(tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    words = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert len(words) < len(TEXTS[0].encode())  # something was merged
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(TEXTS[0]) == [
        0,
        *words,
    ]  # rows begin with <s>


def test_the_same_texts_give_the_same_tokenizer() -> None:
    first, second = (
        train_text_tokenizer(iter(TEXTS), 290).backend_tokenizer.to_str() for _ in range(2)
    )
    assert json.loads(first) == json.loads(second)


def test_sizes() -> None:
    smallest = train_text_tokenizer(TEXTS, BYTES + 3)
    assert len(smallest) == BYTES + 3
    assert len(encode_plain(smallest, "abc", lambda _: False)) == 3
    assert len(train_text_tokenizer([], 300)) == BYTES + 3  # nothing to learn merges from
    with pytest.raises(VocabularyError, match="at least 259 ids, got 258"):
        train_text_tokenizer(TEXTS, BYTES + 2)


def test_text_is_read_as_quickly_beside_many_codes() -> None:
    """Checking a caption against the special tokens takes no longer where there are many; counting them would."""
    both = [
        (
            tokenizer := train_text_tokenizer(TEXTS, 300),
            VisualVocabulary.extend(tokenizer, None, 16),
        )
    ]
    both += [
        (
            tokenizer := train_text_tokenizer(TEXTS, 300),
            VisualVocabulary.extend(tokenizer, None, 16384),
        )
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(50):
        for times, (tokenizer, vocabulary) in zip(seconds, both, strict=True):
            start = time.process_time()
            vocabulary.encode_text(tokenizer, "a red apple on a wooden table")
            times.append(time.process_time() - start)
    assert statistics.median(seconds[1]) < 2.5 * statistics.median(seconds[0])


def test_special_tokens_of_an_extension_are_known() -> None:
    """Also where text was read before; a special token that the model holds as a piece is cut."""
    backend = Tokenizer(
        models.WordLevel({"<|img|>": 0, "a": 1, "<": 2, "|img|>": 3, "<unk>": 4}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert encode_plain(tokenizer, "a <|img|>", lambda _: False) == [1, 0]
    tokenizer.add_tokens([AddedToken("<|img|>", special=True)], special_tokens=True)
    forget(tokenizer)
    assert encode_plain(tokenizer, "a <|img|>", lambda _: False) == [1, 2, 3]
