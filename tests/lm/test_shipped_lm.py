"""The shipped language model: its codes and texts fit each other, and `transformers` can run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavit_lm import MultimodalLM, VisualVocabulary
from lavit_lm.checkpoints.native import DEFAULT
from lavit_tok import VisualCodes
from lavit_tok.cli.items import photographs

CAPTIONS = ["a red bag", "a yellow star on a black background", "a green t-shirt"]


@pytest.fixture(scope="module")
def lm() -> MultimodalLM:
    return MultimodalLM.from_pretrained("default")


def generated(lm: MultimodalLM, prompts: list[str]) -> VisualCodes:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return lm.generate_codes_batch(prompts, generator=generators)


def test_it_is_small():
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) < 30.05e6
    assert sum(path.stat().st_size for path in DEFAULT.glob("*.safetensors")) < 26e6


def test_codes_follow_the_prompt(lm: MultimodalLM):
    """Of three captions, the prompt of an image gives it the highest likelihood."""
    codes = generated(lm, CAPTIONS * 3)
    right = 0
    for i in range(len(codes)):
        scores = torch.stack([lm.rank(caption, [codes.take([i])])[0] for caption in CAPTIONS])
        right += int(scores.argmax()) == i % len(CAPTIONS)
    assert right >= 8, f"{right} of 9"


def test_captions_follow_the_image(lm: MultimodalLM):
    """The captions of generated images name the colors of their prompts in most cases."""
    codes = generated(lm, CAPTIONS[:2] * 4)
    texts = lm.caption([codes.take([i]) for i in range(len(codes))])
    colors = [["a red "], ["a yellow ", " on a black background"]]
    named = [all(c in text for c in colors[i % 2]) for i, text in enumerate(texts)]
    assert sum(named) >= 6, texts


def test_answers_follow_the_image(lm: MultimodalLM):
    """Squares of three colors in one place or another, which no training image has."""
    right = 0
    for fill in ("red", "blue", "green"):
        for x, place in ((12, "left"), (76, "right")):
            image = Image.new("RGB", (128, 128), "white")
            image.paste(Image.new("RGB", (40, 40), fill), (x, 12))
            color = lm.answer(image, "what color is the book?", max_new_tokens=8)
            right += color == fill
            right += place in lm.answer(image, "where is the book?", max_new_tokens=8)
    assert right >= 10, f"{right} of 12"


def test_images_and_texts(lm: MultimodalLM):
    photos = photographs()
    captions = lm.caption(list(photos))
    assert all(captions) and len(set(captions)) > 2
    generator = torch.Generator().manual_seed(0)
    (image,) = lm.generate_images(CAPTIONS[0], generator=generator, num_inference_steps=2)
    assert image.size == (128, 128)
    assert lm.complete([photos[0], " is"], max_new_tokens=5, max_images=0)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's
def test_the_page_about_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its snippets run in order, and caption and generate as MultimodalLM does."""
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/transformers.md, snippet {number}", "exec"), names)
    lm = names["tuned"].__class__.from_pretrained("my_model")
    photos, prompts = names["photos"], ["a red bag", "a yellow star on a black background"]
    assert [caption.strip() for caption in names["captions"]] == lm.caption(photos[:2])
    assert names["caption"].strip() == names["captions"][0].strip()
    expected = lm.generate_codes_batch(prompts, generator=torch.Generator().manual_seed(0))
    assert names["codes"].to_list() == expected.to_list()
    assert [image.size for image in [*names["images"], names["bag"]]] == [(128, 128)] * 3


def test_transformers_generates_the_same_codes(lm: MultimodalLM, tmp_path: Path):
    """The greedy codes of the exported directory, without this package, equal ours id by id."""
    lm.export(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    end = VisualVocabulary.from_tokenizer(tokenizer).end
    inputs = tokenizer(f"{CAPTIONS[0]}<|img|>", return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=33, eos_token_id=end)[0]
    ids = ids[inputs["input_ids"].shape[1] :]
    ours = lm.generate_codes(CAPTIONS[0], guidance_scale=1.0, temperature=0.0)
    codes = VisualVocabulary.from_tokenizer(tokenizer).to_codes(ids[:-1])
    assert int(ids[-1]) == end and codes.tolist() == ours[0].tolist()
