"""text_tokenizer.py: a tokenizer trained here, saved, and loaded by plain AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_lms import TEXTS
from transformers import AutoTokenizer

from lavit_lm import VisualVocabulary, VocabularyError
from lavit_lm.text_tokenizer import BYTES, encode_plain, train_text_tokenizer

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
    assert AutoTokenizer.from_pretrained(tmp_path).encode(TEXTS[0]) == [0, *words]  # rows begin with <s>


def test_the_same_texts_give_the_same_tokenizer() -> None:
    first, second = (train_text_tokenizer(iter(TEXTS), 290).backend_tokenizer.to_str() for _ in range(2))
    assert json.loads(first) == json.loads(second)


def test_sizes() -> None:
    smallest = train_text_tokenizer(TEXTS, BYTES + 3)
    assert len(smallest) == BYTES + 3
    assert len(encode_plain(smallest, "abc", lambda _: False)) == 3
    assert len(train_text_tokenizer([], 300)) == BYTES + 3  # nothing to learn merges from
    with pytest.raises(VocabularyError, match="at least 259 ids, got 258"):
        train_text_tokenizer(TEXTS, BYTES + 2)
