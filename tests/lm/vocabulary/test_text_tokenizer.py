"""A text tokenizer trained here, saved, and loaded by AutoTokenizer; text that is never special."""

from __future__ import annotations

import json
import time
import timeit
from pathlib import Path

import pytest
from helpers.small_lms import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from lavit_lm import VisualVocabulary, VocabularyError
from lavit_lm.vocabulary.text_tokenizer import (
    BYTES,
    clear_special_ids,
    encode_plain,
    train_text_tokenizer,
)

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


def test_every_caption_round_trips(tmp_path: Path) -> None:
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
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert len(ids) < len(TEXTS[0].encode()), "something was merged"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(TEXTS[0]) == [0, *ids], "begins with <s>"


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


def test_encoding_is_as_fast_with_many_codes() -> None:
    """Checking a caption against the special tokens must not count all of them each time."""
    seconds: list[float] = []
    for size in (16, 16384):
        tokenizer = train_text_tokenizer(TEXTS, 300)
        vocabulary = VisualVocabulary.extend(tokenizer, None, size)
        times = timeit.repeat(
            lambda v=vocabulary, t=tokenizer: v.encode_text(t, "a red apple on a wooden table"),
            timer=time.process_time,
            number=10,
            repeat=15,
        )
        seconds.append(min(times))
    assert seconds[1] < 2.5 * seconds[0]


def test_special_tokens_added_later_are_known() -> None:
    """Also after text was encoded; a special name that is a piece of the model is cut."""
    backend = Tokenizer(
        models.WordLevel({"<|img|>": 0, "a": 1, "<": 2, "|img|>": 3, "<unk>": 4}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert encode_plain(tokenizer, "a <|img|>", lambda _: False) == [1, 0]
    tokenizer.add_tokens([AddedToken("<|img|>", special=True)], special_tokens=True)
    clear_special_ids(tokenizer)
    assert encode_plain(tokenizer, "a <|img|>", lambda _: False) == [1, 2, 3]
