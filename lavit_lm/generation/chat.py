"""Prompts of several turns: messages of a chat, and examples before a question.

    user       [image] "what color is it?"     [image] "Question: what color is it? Answer:"
    assistant  "red"                       ->  "red"
    user       "and where?"                    "Question: and where? Answer:"

    examples   (image, "what is it?", "a bag") ...      one turn each, then the question

Turns are concatenated, as the documents that models are trained on. A question is written as in
training, by the objective's template of answers; a request for an image by its template of images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from lavit_lm.generation.prompts import Templated, apply_template, as_list, path_or_image
from lavit_lm.objectives.records import PromptTemplates
from lavit_lm.sequences.documents import clip, read_clip

ROLES = ("system", "user", "assistant")
PARTS = ("text", "image", "video")
Reply = Literal["text", "image", "any"]
"""What the assistant's next message is: a text, an image, or both in turn as the model chooses."""


def as_question(parts: Sequence[Any], template: str) -> list[Any]:
    """Texts and images with the last text in place of {} in a template."""
    parts = list(parts)
    last = next((i for i in reversed(range(len(parts))) if isinstance(parts[i], str)), None)
    if last is not None:
        parts[last] = template.replace("{}", parts[last])
    return parts


def few_shot(examples: Sequence[Any], template: str) -> list[Any]:
    """The turns of answered questions.

    Args:
        examples: (image, question, answer); the image as VisualTokenizer.encode accepts it.
        template: of questions, {} for the question.

    Raises:
        ValueError: an example of another form, by its number.
    """
    prompt: list[Any] = []
    for number, example in enumerate(examples):
        fits = isinstance(example, list | tuple) and len(example) == 3
        if not fits or not all(isinstance(text, str) for text in example[1:]):
            raise ValueError(
                f"example {number}: expected (image, question, answer), got {example!r:.80}"
            )
        image, question, answer = example
        prompt += [path_or_image(image), *as_question([question], template), answer]
    return prompt


def chat_prompt(
    messages: Sequence[dict[str, Any]], templates: PromptTemplates, reply: Reply
) -> Templated:
    """The prompt that the assistant's next message continues.

    Args:
        messages: {"role": "system", "user" or "assistant", "content": a text, or a list of texts,
            images and dicts}; the last one is the user's. Dicts are those of chats in
            `transformers`, {"type": "text", "text": ...}, {"type": "image", "image": ...}, or
            {"type": "video", "video": frames or the path of an animated file}, of which at most 8
            frames are used.
        templates: of the objective.
        reply: see Reply.

    Raises:
        ValueError: no messages, an unknown role or content, or a last message that is not the
            user's.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f"expected a list of one or more messages, got {messages!r:.60}: a message is "
            '{"role": "user", "content": [image, "what is it?"]}'
        )
    turns = [(_role(message, i), _content(message, i)) for i, message in enumerate(messages)]
    if turns[-1][0] != "user":
        raise ValueError(
            f"expected the user's message at the end, got one of the {turns[-1][0]}: there is "
            "nothing to reply to"
        )
    prompt = Templated()
    for i, (role, parts) in enumerate(turns):
        if role == "user":
            follows: Any = reply
            if i + 1 < len(turns):
                answer = turns[i + 1][1]
                follows = "text" if answer and isinstance(answer[0], str) else "image"
            if follows == "text":
                parts = as_question(parts, templates.answer)
            elif follows == "image":
                parts = apply_template(parts, templates.image)
        prompt += parts
    return prompt


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict) or "content" not in message:
        raise ValueError(
            f'message {number}: expected {{"role": ..., "content": ...}}, got {message!r:.80}'
        )
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(
            f"message {number}: expected the role {', '.join(ROLES)}, got {role!r:.40}"
        )
    return str(role)


def _content(message: dict[str, Any], number: int) -> list[Any]:
    content = message["content"]
    parts: list[Any] = []
    for part in as_list(content):
        if not isinstance(part, dict):
            parts.append(part)
            continue
        kind = part.get("type")
        if kind not in PARTS or not {kind, "path"} & part.keys():
            raise ValueError(
                f"message {number}: expected a part of type {', '.join(PARTS)} with its value, "
                f"got {part!r:.80}"
            )
        value: Any = part.get(str(kind), part.get("path"))
        if kind == "video":
            is_file = isinstance(value, str | os.PathLike)
            parts += (
                read_clip(value) if is_file else [path_or_image(one) for one in clip(list(value))]
            )
        else:
            parts.append(value if kind == "text" else path_or_image(value))
    return parts
