"""Engines of app.py: a model in this process, or another server of an exported one."""

from __future__ import annotations

import asyncio
import io
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fastapi import HTTPException

from lavit_lm import MultimodalLM
from lavit_lm.generation.prompts import Prompts
from lavit_lm.vocabulary.visual_vocabulary import CODE, END
from lavit_tok import VisualCodes

TOP_K = 50  # for images, as MultimodalLM samples them


@dataclass(frozen=True)
class Limits:
    """What one request may take, and how many of them are admitted."""

    requests: int = 128  # waiting or running; more get 429
    seconds: float = 120.0  # from the first byte to the answer; then 504
    body_bytes: int = 16 << 20
    characters: int = 4000  # of all text in a request
    images: int = 8  # of one request, in its messages or generated
    tokens: int = 256  # of a text
    batch: int = 16  # sequences that are computed together


def failure(status: int, message: str, code: str, param: str | None = None) -> HTTPException:
    """An error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message[:500], "type": kind, "param": param, "code": code}
    return HTTPException(status, body, {"Retry-After": "1"} if status == 429 else None)


class Options(NamedTuple):
    """Sampling of a job; jobs with equal options are computed together."""

    image: bool
    max_tokens: int
    temperature: float
    top_p: float | None


class Job(NamedTuple):
    """One text or image: prompt is a list of str and uint8 images [1 3 h w]."""

    options: Options
    prompt: list[Any]
    seed: int


class Batches:
    """Calls `compute(key, items)` in one thread, with items that arrived during the last call.

    Keys take turns. An item whose caller has gone is dropped; if a batch raises, its items are
    computed one by one, so that an error concerns only the item that caused it.
    """

    def __init__(self, compute: Callable[[Any, list[Any]], list[Any]], size: int) -> None:
        self.compute, self.size, self.thread = compute, size, ThreadPoolExecutor(1)
        self.waiting: dict[Hashable, deque[tuple[Any, asyncio.Future[Any]]]] = {}
        self.task: asyncio.Task[None] | None = None

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call another function in the same thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    async def submit(self, key: Hashable, item: Any) -> Any:
        """The result of one item."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(key, deque()).append((item, future))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self.waiting:
            key = next(iter(self.waiting))
            queue = self.waiting.pop(key)
            batch = [queue.popleft() for _ in range(min(len(queue), self.size))]
            if queue:
                self.waiting[key] = queue  # after the other keys
            await self._run(key, [entry for entry in batch if not entry[1].done()])

    async def _run(self, key: Hashable, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        if not batch:
            return
        try:
            results = await self.call(self.compute, key, [item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._run(key, [entry])
                return
            results = [error]
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class Engine(ABC):
    """Opens images of prompts, and decodes generated ones; subclasses generate."""

    def __init__(self, prompts: Prompts, decoder: Any, limits: Limits, steps: int) -> None:
        if prompts.objective.image_output.kind != "codes":
            raise ValueError(f"{prompts.objective.name} generates vectors; expected codes")
        sizes = prompts.visual_tokenizer.config.codebook_size, prompts.processor.vocabulary
        if sizes[0] != sizes[1].codebook_size:
            raise ValueError(f"the visual tokenizer has {sizes[0]} codes, expected {sizes[1]}")
        sizes[1].require_stages(prompts.visual_tokenizer.stages)
        self.prompts, self.decoder, self.limits, self.steps = prompts, decoder, limits, steps
        self.batches = Batches(self.compute, limits.batch)
        self.size = "{}x{}".format(*self._images([[0]], [torch.Generator()], 1)[0].size)

    @abstractmethod
    async def generate(self, job: Job) -> str | bytes:
        """Text, or a PNG file."""

    @abstractmethod
    def compute(self, key: Any, items: list[Any]) -> list[Any]:
        """What `Batches` computes."""

    async def open(self, encoded: bytes) -> Any:
        """An image file -> uint8 [1 3 h w]. Raises ImageError."""
        processor = self.prompts.visual_tokenizer.image_processor
        return await self.batches.call(processor.to_uint8, [encoded])

    def decode(self, codes: list[list[int]], generators: list[torch.Generator]) -> list[bytes]:
        """Codes of images -> PNG files."""
        files = [io.BytesIO() for _ in codes]
        for image, file in zip(self._images(codes, generators, self.steps), files, strict=True):
            image.save(file, "PNG")
        return [file.getvalue() for file in files]

    def _images(self, codes: list[list[int]], generators: Any, steps: int) -> list[Any]:
        batch = VisualCodes.from_list(codes, self.prompts.processor.vocabulary.codebook_size)
        images: list[Any] = self.decoder.decode(batch, generators, num_inference_steps=steps)
        return images


class InProcess(Engine):
    """A MultimodalLM in this process, with guidance and constraints."""

    def __init__(self, lm: MultimodalLM, limits: Limits, steps: int) -> None:
        super().__init__(lm.prompts, lm.decoder, limits, steps)
        self.lm = lm

    async def generate(self, job: Job) -> str | bytes:
        result: str | bytes = await self.batches.submit(job.options, job)
        return result

    def compute(self, key: Options, items: list[Job]) -> list[Any]:
        prompts = [job.prompt for job in items]
        generators = [torch.Generator().manual_seed(job.seed) for job in items]
        sampling: dict[str, Any] = {"generator": generators, "temperature": key.temperature}
        sampling["top_p"] = key.top_p
        if not key.image:
            return self.lm.generate_text_batch(prompts, key.max_tokens, **sampling)
        codes = self.lm.generate_codes_batch(prompts, **sampling)
        return self.decode(codes.to_list(), generators)


class Upstream(Engine):
    """A server of OpenAI's completions for an exported directory.

    Args:
        prompts: with the tokenizer of the exported directory.
        decoder: codes -> images.
        client: openai.AsyncOpenAI of the server.
        model: name of the model there.
        plain: the server takes prompts as text and has no constraints (`transformers serve`);
            otherwise it takes ids and vLLM's parameters.
    """

    def __init__(self, prompts: Prompts, decoder: Any, client: Any, model: str, plain: bool,
                 limits: Limits, steps: int) -> None:  # fmt: skip
        super().__init__(prompts, decoder, limits, steps)
        self.client, self.model, self.plain = client, model, plain

    async def generate(self, job: Job) -> str | bytes:
        import openai

        try:
            completion = await self.client.completions.create(
                **await self.batches.call(self.request, job)
            )
        except openai.APIError as error:
            status = getattr(error, "status_code", 502)
            if status in (400, 429):
                raise failure(status, error.message, "upstream") from None
            raise failure(502, "the server of the language model failed", "upstream") from error
        text = completion.choices[0].text
        if not job.options.image:
            ids = self.prompts.processor.text_tokenizer(text, add_special_tokens=False).input_ids
            return self.prompts.processor.decode(ids).strip()
        codes = [int(code) for code in CODE.findall(text.partition(END)[0])]
        if not codes:
            raise failure(502, "the language model generated no codes", "no_image")
        image: bytes = await self.batches.submit("decode", (codes, job.seed))
        return image

    def request(self, job: Job) -> dict[str, Any]:
        """Arguments of a completion."""
        processor, options = self.prompts.processor, job.options
        v = processor.vocabulary
        extra: dict[str, Any] = {"stop_token_ids": [v.begin]}
        most = options.max_tokens
        if options.image:
            ids = self.prompts.for_image(job.prompt).ids.tolist()
            patches = processor.count(self.prompts.visual_tokenizer.config.num_patches)
            least, codes = self.prompts.objective.image_output.limits(patches)
            extra = {"allowed_token_ids": [v.end, *range(v.first, v.stop)], "top_k": TOP_K}
            extra |= {"stop_token_ids": [v.end], "min_tokens": least}
            if v.stages:  # which codes are allowed depends on the rank
                extra["structured_outputs"] = {"regex": v.pattern(least, codes)}
            most = codes + 1
        else:
            ids = self.prompts.sequence(job.prompt, "text").ids.tolist()
        prompt: Any = ids
        if self.plain:
            prompt, extra = processor.text_tokenizer.decode(ids[len(processor.start) :]), {}
            if processor.text_tokenizer(prompt).input_ids != ids:  # it would contain other tokens
                raise failure(400, "this text contains names of tokens", "invalid_text")
        arguments = {"model": self.model, "prompt": prompt, "max_tokens": most, "seed": job.seed}
        arguments |= {"temperature": options.temperature, "top_p": options.top_p or 1.0}
        return arguments | {"extra_body": extra}

    def compute(self, key: Any, items: list[tuple[list[int], int]]) -> list[Any]:
        generators = [torch.Generator().manual_seed(seed) for _, seed in items]
        return self.decode([codes for codes, _ in items], generators)
