"""The language model inside the package: what it draws and says hangs together, and plain transformers can run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavit_lm import MultimodalLM, VisualVocabulary
from lavit_lm.checkpoints.native import DEFAULT
from lavit_tok.data.jobs import photographs

ASKED = ["a photo of a bag", "a photo of an ankle boot", "photograph: mountain lake"]


@pytest.fixture(scope="module")
def lm() -> MultimodalLM:
    return MultimodalLM.from_pretrained("default")


def drawn(lm: MultimodalLM, prompts: list[str], seed: int = 0):
    return lm.generate_codes_batch(
        prompts, generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    )


def test_it_is_small():
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) < 30e6


def test_codes_follow_the_prompt(lm: MultimodalLM):
    """Of pictures drawn for three captions, each one's own caption is the likeliest before it."""
    codes = drawn(lm, ASKED * 3)
    right = 0
    for i in range(len(codes)):
        one = codes.take([i])
        scores = torch.stack([lm.rank(caption, [one])[0] for caption in ASKED])
        right += int(scores.argmax()) == i % len(ASKED)
    assert right >= 8, f"{right} of 9"


def test_captions_follow_the_picture(lm: MultimodalLM):
    """What it says of its own drawings is what was asked for, word for word, in most cases."""
    codes = drawn(lm, ASKED[:2] * 4)
    said = lm.caption([codes.take([i]) for i in range(len(codes))])
    assert sum(text == ASKED[i % 2] for i, text in enumerate(said)) >= 5, said


def test_pictures_and_words_of_photographs(lm: MultimodalLM):
    photos = photographs()
    said = lm.caption(list(photos))
    assert all(said) and len(set(said)) > 2
    (image,) = lm.generate_images(
        "a photo of a bag", generator=torch.Generator().manual_seed(0), num_inference_steps=2
    )
    assert image.size == (64, 64)
    assert lm.complete([photos[0], " is"], max_tokens=5, max_images=0)


def test_plain_transformers_says_the_same(lm: MultimodalLM, tmp_path: Path):
    """Without this package: the exported directory's greedy codes are this package's, id by id."""
    lm.export(tmp_path / "plain")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        AutoTokenizer.from_pretrained(tmp_path / "plain"),
    )
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    inputs = tokenizer("a photo of a bag<|img|>", return_tensors="pt")
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=65, eos_token_id=vocabulary.end
    )[0]
    ids = found[inputs["input_ids"].shape[1] :]
    mine = lm.generate_codes("a photo of a bag", 1, guidance_scale=1.0, temperature=0.0)
    assert (
        int(ids[-1]) == vocabulary.end
        and vocabulary.to_codes(ids[:-1]).tolist() == mine[0].tolist()
    )
