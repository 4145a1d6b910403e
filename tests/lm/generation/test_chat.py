"""Chats and few-shot prompts: what the model is given, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.lm_parts import processor_and_model
from helpers.tensors import generator
from PIL import Image

from lavit_lm import MultimodalLM
from lavit_lm.generation.chat import chat_prompt, few_shot
from lavit_lm.objectives.records import PromptTemplates
from lavit_lm.sequences.documents import clip
from lavit_tok import VisualTokenizer

TEMPLATES = PromptTemplates("", "An image of {}.", "Question: {} Answer:")


@pytest.fixture
def lm(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any) -> MultimodalLM:
    processor, model = processor_and_model("llama")
    tiny_decoder.set_progress_bar_config(disable=True)
    return MultimodalLM(model, processor, tiny_tokenizer, tiny_decoder)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def test_the_drawing():
    image = Image.new("RGB", (8, 8))
    said = {"role": "assistant", "content": ["red"]}
    messages = [user(image, "what color is it?"), said, user("and where?")]
    assert chat_prompt(messages, TEMPLATES, "text") == [
        image,
        "Question: what color is it? Answer:",
        "red",
        "Question: and where? Answer:",
    ]
    wanted = [{"role": "system", "content": "Be brief."}, *messages[:2], user("a blue bag")]
    assert chat_prompt(wanted, TEMPLATES, "image")[-2:] == ["red", "An image of a blue bag."]
    assert chat_prompt(wanted, TEMPLATES, "any")[-1] == "a blue bag", "the model chooses"
    shown = [user("a bag"), {"role": "assistant", "content": [image]}, user("which color?")]
    assert chat_prompt(shown, TEMPLATES, "text") == [
        "An image of a bag.",
        image,
        "Question: which color? Answer:",
    ]


def test_parts_of_messages_as_transformers_writes_them(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(20)]
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image", "path": "a.png"},
        {"type": "video", "video": frames},
        {"type": "image", "image": frames[3]},
        {"type": "text", "text": "what is it?"},
    ]
    found = chat_prompt([user(*parts)], TEMPLATES, "text")
    assert found[:2] == ["look", Path("a.png")]
    assert found[2:-1] == [*clip(frames), frames[3]]
    assert found[-1] == "Question: what is it? Answer:"
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    video = {"type": "video", "path": str(tmp_path / "clip.webp")}
    read = chat_prompt([user(video)], TEMPLATES, "text")
    assert [image.getpixel((0, 0)) for image in read] == [i.getpixel((0, 0)) for i in clip(frames)]


def test_a_chat_of_one_message_is_an_answer(lm: MultimodalLM, photos: list[Path]):
    message = user(photos[0], "what is it?")
    reply = lm.chat([message], max_new_tokens=6)
    assert reply == {"role": "assistant", "content": [lm.answer(photos[0], "what is it?", None, 6)]}
    more = lm.chat([message, reply, user("and where?")], max_new_tokens=6)
    assert more["content"][0], "a reply is a message of the next chat"
    given = lm.prompts.sequence(chat_prompt([message, reply, user("?")], TEMPLATES, "text"), "text")
    first = lm.prompts.sequence([photos[0], "Question: what is it? Answer:"], "text")
    assert given.ids[: len(first)].tolist() == first.ids.tolist()


def test_replies_with_images(lm: MultimodalLM, photos: list[Path]):
    steps = {"num_inference_steps": 1, "max_codes": 3}
    reply = lm.chat([user("a red apple")], "image", generator=generator(), **steps)
    (image,) = reply["content"]
    expected = lm.generate_images("a red apple", generator=generator(), **steps)[0]
    assert image.tobytes() == expected.tobytes()
    options = {"max_images": 1, "temperature": 3.0, "decode": False}
    both = lm.chat([user("a red apple"), reply, user("more")], "any", 9, generator(), **options)
    assert both["content"] == lm.complete(
        ["a red apple", image, "more"], 9, generator=generator(), **options
    )


def test_examples_precede_the_question(lm: MultimodalLM, photos: list[Path]):
    examples = [(photos[1], "it?", "a cat"), (str(photos[2]), "it?", "red")]
    prompt = [photos[1], "Is it?", "a cat", photos[2], "Is it?", "red"]
    assert few_shot(examples, "Is {}") == prompt
    asked = [*prompt, photos[0], "Is it?"]
    expected = lm.generate_text_batch([asked], 3)[0]
    assert lm.answer(photos[0], "it?", "Is {}", 3, examples=examples) == expected
    assert lm.answer(photos[:2], "it?", "Is {}", 3, examples=examples)[0] == expected


def test_what_is_refused(unchecked: None, lm: MultimodalLM, photos: list[Path]):
    for messages, message in (
        ([], "expected a list of one or more messages"),
        ("hello", "expected a list of one or more messages"),
        ([{"role": "robot", "content": "hello"}], "message 0: expected the role system, user, a"),
        ([user("a"), {"role": "assistant", "content": "b"}], "expected the user's message at the"),
        ([{"role": "user"}], "message 0: expected"),
        ([user({"type": "audio", "audio": 1})], "a part of type text, image, video"),
        ([user({"type": "image"})], "a part of type text, image, video"),
        ([user({"type": "video", "video": []}, "what?")], "a clip of at least one frame"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.chat(messages)
    with pytest.raises(ValueError, match="reply: expected 'text', 'image' or 'any', got 'video'"):
        lm.chat([user("hello")], reply="video")
    with pytest.raises(ValueError, match=r"example 1: expected \(image, question, answer\)"):
        lm.answer(photos[0], "?", examples=[(photos[0], "?", "a"), (photos[0], "?")])
    many = [(photos[0], "what is it?", "a cat")] * 9
    with pytest.raises(ValueError, match=r"9 examples before the question: .* context of 128"):
        lm.answer(photos[0], "what is it?", examples=many)


def test_a_model_of_text_only(photos: list[Path]):
    processor, model = processor_and_model("llama")
    lm = MultimodalLM(model, processor, None)
    reply = lm.chat([user("hello")], max_new_tokens=3)
    assert isinstance(reply["content"][0], str)
    with pytest.raises(ValueError, match="reads text only, it has no visual tokenizer: got Posix"):
        lm.chat([user(photos[0], "what is it?")])
    with pytest.raises(ValueError, match="reads text only"):
        lm.caption(photos[0])
    with pytest.raises(ValueError, match="generates text only"):
        lm.chat([user("a red apple")], reply="image")
