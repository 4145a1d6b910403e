"""OpenAI's /v1/images/generations and /v1/chat/completions for a model of text and images.

    messages, data: URLs -> prompt -> language model -> text
                                                     -> codes -> pixel decoder -> PNG -> b64_json

    python examples/serve/app.py default                      # the language model in this process
    python examples/serve/app.py DIR --upstream URL           # an exported DIR that vLLM serves
    python examples/serve/app.py DIR --upstream URL --plain   # ... or `transformers serve`

Needs `pip install ".[serve]"`; docs/serving.md describes requests, limits and errors.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import secrets
import time
from typing import Annotated, Any, Literal

import torch
from engines import Engine, InProcess, Job, Limits, Options, Upstream, failure
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from lavit_lm import MultimodalLM
from lavit_lm.generation.prompts import Prompts
from lavit_lm.multimodal import shipped_decoder
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer

MODEL = "lavit"
# Requests. A parameter that is not listed is refused, since its effect would be missing.


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    user: str | None = None


class ImageRequest(Body):
    prompt: str
    n: int | None = Field(1, ge=1)
    size: str | None = "auto"
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png"] | None = "png"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # images have one size here


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]  # the model knows documents only
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class ChatRequest(Body):
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "image"]] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Literal[1] | None = 1
    stream: Literal[False] | None = False


# The application


class Admission:
    """ASGI middleware: how many requests at a time, how long, and how large they may be."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits, self.active = app, limits, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return None
        if self.active >= self.limits.requests:
            error = failure(429, f"{self.active} requests are waiting; try later", "queue_full")
            return await respond(error)(scope, receive, send)
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limits.body_bytes:
                limit = f"expected at most {self.limits.body_bytes} bytes"
                raise failure(413, limit, "request_too_large")
            return message

        self.active += 1
        try:
            async with asyncio.timeout(self.limits.seconds):
                await self.app(scope, counted, send)
        except TimeoutError:
            error = failure(504, f"not finished in {self.limits.seconds} s", "timeout")
            await respond(error)(scope, receive, send)
        finally:
            self.active -= 1


def respond(error: Any) -> JSONResponse:
    """The response of an error."""
    detail = error.detail
    if not isinstance(detail, dict):  # of FastAPI: unknown paths and methods
        detail = failure(error.status_code, str(detail), "invalid_request").detail
    return JSONResponse({"error": detail}, error.status_code, error.headers)


def create_app(engine: Engine, limits: Limits) -> FastAPI:
    """The application."""
    app = FastAPI(title="Images and text", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Admission, limits=limits)

    @app.exception_handler(StarletteHTTPException)
    async def on_error(request: Request, error: Any) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))
        return respond(failure(400, f"{param}: {first['msg']}", "invalid_value", param))

    @app.exception_handler(ValueError)  # images that cannot be read, prompts that are too long
    async def on_value(request: Request, error: Any) -> JSONResponse:
        return respond(failure(400, str(error), "invalid_value"))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Any) -> JSONResponse:
        return respond(failure(500, "internal error", "internal_error"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [entry]}

    def check(body: Body, texts: list[str], images: int, param: str) -> None:
        if body.model not in (None, MODEL):
            message = f"expected {MODEL!r}, got {body.model[:80]!r}"
            raise failure(404, message, "model_not_found", "model")
        if images > limits.images:
            message = f"expected at most {limits.images} images, got {images}"
            raise failure(400, message, "too_many_images", param)
        if (length := sum(map(len, texts))) > limits.characters:
            message = f"expected at most {limits.characters} characters, got {length}"
            raise failure(400, message, "too_long", param)

    @app.post("/v1/images/generations")
    async def generate_images(body: ImageRequest) -> dict[str, Any]:
        n = body.n or 1
        check(body, [body.prompt], n, "n" if n > limits.images else "prompt")
        if body.size not in (None, "auto", engine.size):
            message = f"expected 'auto' or {engine.size!r}, got {body.size[:80]!r}"
            raise failure(400, message, "invalid_value", "size")
        if not body.prompt.strip():
            raise failure(400, "expected some text", "invalid_value", "prompt")
        seed = secrets.randbits(62) if body.seed is None else body.seed
        options = Options(True, 0, 1.0, None)
        jobs = [Job(options, [body.prompt], (seed + i) % 2**63) for i in range(n)]
        results = await asyncio.gather(*map(engine.generate, jobs))
        data = [{"b64_json": base64.b64encode(png).decode()} for png in results]
        return {"created": int(time.time()), "data": data, "output_format": "png"}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> dict[str, Any]:
        contents = [m.content for m in body.messages]
        parts = [TextPart(type="text", text=c) if isinstance(c, str) else c for c in contents]
        flat = [p for part in parts for p in (part if isinstance(part, list) else [part])]
        texts = [part.text for part in flat if isinstance(part, TextPart)]
        check(body, texts, len(flat) - len(texts), "messages")
        prompt = [
            part.text if isinstance(part, TextPart) else await engine.open(data_url(part))
            for part in flat
        ]
        image = "image" in (body.modalities or [])
        most = body.max_completion_tokens or body.max_tokens or min(64, limits.tokens)
        if most > limits.tokens:
            wrong = f"expected at most {limits.tokens}, got {most}"
            raise failure(400, wrong, "invalid_value", "max_tokens")
        temperature = float(image) if body.temperature is None else body.temperature
        options = Options(image, most, temperature, body.top_p)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        result = await engine.generate(Job(options, prompt, seed))
        message: dict[str, Any] = {"role": "assistant", "content": result}
        if isinstance(result, bytes):
            url = f"data:image/png;base64,{base64.b64encode(result).decode()}"
            images = [{"type": "image_url", "image_url": {"url": url}}]
            message |= {"content": None, "images": images}
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }

    return app


def data_url(part: ImagePart) -> bytes:
    """The bytes of a data: URL.

    Others are refused: a server that fetches addresses for strangers can be sent to hosts that only
    it can reach, and to answers that never end.
    """
    head, _, body = part.image_url.url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        message = "expected data:image/...;base64,...; this server fetches no URLs"
        raise failure(400, message, "invalid_image_url", "messages")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise failure(400, "not valid base64", "invalid_image_url", "messages") from None


def main() -> None:
    """Load the models and serve them."""
    import uvicorn

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="directory, Hub id or 'default'; exported with --upstream")
    parser.add_argument("--upstream", help="address of the server of the exported model, .../v1")
    parser.add_argument("--upstream-model", help="its name there; by default `model`")
    parser.add_argument("--plain", action="store_true", help="upstream is no vLLM")
    parser.add_argument("--visual-tokenizer", default="default", help="with --upstream")
    parser.add_argument("--decoder", default="default")
    parser.add_argument("--steps", type=int, default=20, help="of the pixel decoder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    for name, value in vars(Limits()).items():
        parser.add_argument(f"--max-{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    limits = Limits(**{name: getattr(args, f"max_{name}") for name in vars(Limits())})
    engine: Engine
    if args.upstream is None:
        lm = MultimodalLM.from_pretrained(args.model, decoder=args.decoder)
        engine = InProcess(lm, limits, args.steps)
    else:
        from openai import AsyncOpenAI
        from transformers import AutoTokenizer

        processor = MultimodalProcessor.from_tokenizer(AutoTokenizer.from_pretrained(args.model))
        visual = VisualTokenizer.from_pretrained(args.visual_tokenizer)
        prompts = Prompts(processor, visual, LaVIT())
        source = shipped_decoder(args.decoder, visual)
        decoder = LaVIT().image_output.load_decoder(source, torch.device("cpu"))
        client = AsyncOpenAI(base_url=args.upstream, api_key="none")
        name = args.upstream_model or args.model
        engine = Upstream(prompts, decoder, client, name, args.plain, limits, args.steps)
    uvicorn.run(create_app(engine, limits), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
