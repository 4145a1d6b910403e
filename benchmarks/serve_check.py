"""Does a server that knows nothing of this package caption a picture and draw one, as ids?

    export() -> directory -> `transformers serve` -> openai client -> text -> ids  ==  greedy decoding in this process

Without --model a Llama of 0.1 M weights is made first: it learns eight captions and their codes by heart, so that every
right answer is known beforehand, and exported. Then the server is started on a free port and asked, over HTTP,

    caption        <|img|><|vis_00017|> ... <|/img|>      -> the caption
    image codes    a red apple<|img|>                     -> codes and <|/img|>
    both once more as a chat, and the codes as a stream

Every answer is compared with plain greedy decoding of the same directory in this process. Prints a line for each
request and a JSON summary; exit code 1 if one differs. Needs the extra `serve` (docs/serving.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lavit_lm import VisualVocabulary
from lavit_lm.checkpoints.export import export
from lavit_lm.vocabulary.text_tokenizer import train_text_tokenizer
from lavit_lm.vocabulary.visual_vocabulary import BEGIN, CODE, END

CAPTIONS = (
    "a red apple",
    "two dogs on the beach",
    "the old town in the rain",
    "a wooden table",
    "ein grüner Berg",
    "赤いりんご",
    "a boat at sunset",
    "snow on a roof",
)
PACKAGES = ("torch", "transformers", "tokenizers", "openai", "fastapi", "uvicorn")


@dataclass(frozen=True)
class Request:
    """One question to the server, and what plain greedy decoding answers to it.

    `ask` is "completion", "chat" or "stream"; `expected` are ids.
    """

    name: str
    ask: str
    prompt: str
    expected: list[int]


def learnt_by_heart(
    out: Path, codebook_size: int, steps: int, seed: int
) -> tuple[list[str], list[list[int]]]:
    """Export a small Llama that has learnt eight pairs in both orders. Returns the captions and their codes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_text_tokenizer(CAPTIONS, 320)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=256, **shape
    )
    model = LlamaForCausalLM(config)
    vocabulary = VisualVocabulary.extend(tokenizer, model, codebook_size, generator)
    lengths = torch.randint(4, 17, (len(CAPTIONS),), generator=generator).tolist()
    codes = [torch.randint(codebook_size, (n,), generator=generator) for n in lengths]
    rows = []
    for caption, picture in zip(CAPTIONS, codes, strict=True):
        text = vocabulary.encode_text(tokenizer, caption)
        image = [vocabulary.begin, *vocabulary.to_ids(picture).tolist(), vocabulary.end]
        rows += [
            [tokenizer.bos_token_id, *a, *b, tokenizer.eos_token_id]
            for a, b in ((text, image), (image, text))
        ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(
        torch.arange(width) >= torch.tensor([[len(row)] for row in rows]), -100
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"learning by heart: step {step}, loss {float(loss.detach()):.3f}", flush=True)
    export(model.eval(), tokenizer, out)
    return list(CAPTIONS), [picture.tolist() for picture in codes]


def requests(directory: Path, caption: str, codes: list[int], most: int) -> list[Request]:
    """Both kinds of question with the answers of plain greedy decoding, by Auto classes alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    names = tokenizer.convert_ids_to_tokens(vocabulary.to_ids(torch.tensor(codes)).tolist())
    questions = {"caption": f"{BEGIN}{''.join(names)}{END}", "image codes": f"{caption}{BEGIN}"}
    found = []
    for name, prompt in questions.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=most, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        found += [Request(name, ask, prompt, answer.tolist()) for ask in ("completion", "chat")]
    return [*found, Request("image codes", "stream", found[-1].prompt, found[-1].expected)]


@contextmanager
def server(command: list[str], directory: Path, log: Path, seconds: float) -> Iterator[str]:
    """Run `command DIRECTORY --port FREE` until the block ends; gives the address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    whole = [*command, str(directory), "--host", "127.0.0.1", "--port", str(port)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(whole, stdout=output, stderr=output, env=offline) as process,
    ):
        try:
            address, start = f"http://127.0.0.1:{port}", time.monotonic()
            while not _answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() - start > seconds:
                    raise RuntimeError(
                        f"{shlex.join(command)} gave no answer:\n{log.read_text()[-3000:]}"
                    )
                time.sleep(0.5)
            print(
                f"server ready after {time.monotonic() - start:.1f} s: {shlex.join(command)}",
                flush=True,
            )
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def asker(address: str, model: str, most: int) -> Callable[[Request], tuple[str, int | None]]:
    """(text, tokens that the server counted) of a request, through the openai client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)
    greedy: dict[str, Any] = {"model": model, "max_tokens": most, "temperature": 0.0}

    def ask(request: Request) -> tuple[str, int | None]:
        if request.ask == "chat":
            messages: Any = [{"role": "user", "content": request.prompt}]
            reply = client.chat.completions.create(messages=messages, **greedy)
            return reply.choices[0].message.content or "", getattr(
                reply.usage, "completion_tokens", None
            )
        if request.ask == "stream":
            chunks = client.completions.create(prompt=request.prompt, stream=True, **greedy)
            return "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices), None
        reply = client.completions.create(prompt=request.prompt, **greedy)
        return reply.choices[0].text, getattr(reply.usage, "completion_tokens", None)

    return ask


def judge(
    request: Request, text: str, counted: int | None, seconds: float, tokenizer: Any
) -> dict[str, Any]:
    """Compare an answer with greedy decoding, as text and as ids; an image's must be codes up to its end."""
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    result: dict[str, Any] = {
        "request": request.name,
        "as": request.ask,
        "text": text,
        "seconds": round(seconds, 3),
    }
    result["text_equal"] = text == tokenizer.decode(request.expected, skip_special_tokens=True)
    if counted is not None:
        result["count_equal"] = counted == len(request.expected)
    if request.name == "image codes":
        shown = [i for i in request.expected if bool(vocabulary.is_visual(torch.tensor(i)))]
        got = tokenizer(text, add_special_tokens=False).input_ids
        result["ids_equal"] = [
            i for i in got if bool(vocabulary.is_visual(torch.tensor(i)))
        ] == shown
        codes = [int(number) for number in CODE.findall(text.split(END)[0])]
        result["codes"] = codes
        result["only_codes"] = not CODE.sub("", text.split(END)[0]) and len(codes) > 0
        result["ended"] = END in text
    return result


def main(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    command = (
        shlex.split(arguments.command) if arguments.command else [_beside("transformers"), "serve"]
    )
    with tempfile.TemporaryDirectory() as scratch:
        directory, most, known = (
            arguments.model or Path(scratch, "exported"),
            arguments.max_tokens,
            None,
        )
        caption, codes = arguments.caption, arguments.codes
        if arguments.model is None:
            captions, pictures = learnt_by_heart(
                directory, arguments.codebook_size, arguments.steps, arguments.seed
            )
            caption, codes = captions[0], pictures[0]
            known = {"caption": caption, "codes": codes}
        asked = requests(directory, caption, codes, most)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        results = []
        with server(command, directory, Path(scratch, "server.log"), arguments.wait) as address:
            ask = asker(address, str(directory), most)
            for request in asked:
                start = time.perf_counter()
                text, counted = ask(request)
                results.append(
                    judge(request, text, counted, time.perf_counter() - start, tokenizer)
                )
                print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    checks = ("text_equal", "count_equal", "ids_equal", "only_codes", "ended")
    wrong = [
        f"{r['request']} as {r['as']}: {name}"
        for r in results
        for name in checks
        if not r.get(name, True)
    ]
    if known:
        wrong += [
            f"{r['request']} as {r['as']}: not what was learnt"
            for r in results
            if not _learnt(r, known)
        ]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    summary = {
        "requests": len(results),
        "wrong": wrong,
        "python": platform.python_version(),
        "versions": versions,
    }
    print(json.dumps(summary, ensure_ascii=False))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = json.dumps({**summary, "results": results}, ensure_ascii=False, indent=1)
        (arguments.out / "serve_check.json").write_text(report + "\n")
    return 1 if wrong else 0


def _learnt(result: dict[str, Any], known: dict[str, Any]) -> bool:
    if result["request"] == "caption":
        return bool(result["text"] == known["caption"])
    return bool(result["codes"] == known["codes"])


def _beside(name: str) -> str:
    """A command installed in the environment of this interpreter."""
    return str(Path(sys.executable).parent / name)


def arguments() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument(
        "--model",
        type=Path,
        help="a directory written by lavit_lm.checkpoints.export; a small one is made if not given",
    )
    found.add_argument("--caption", default="a red apple", help="what to draw, with --model")
    found.add_argument(
        "--codes", type=int, nargs="+", default=[0, 1, 2, 3], help="what to caption, with --model"
    )
    found.add_argument(
        "--command",
        help="starts the server, as `COMMAND DIRECTORY --host H --port P`; transformers serve",
    )
    found.add_argument("--max-tokens", type=int, default=40, help="of an answer")
    found.add_argument("--codebook-size", type=int, default=64, help="of the small model")
    found.add_argument("--steps", type=int, default=150, help="that the small model learns")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--wait", type=float, default=180.0, help="seconds for the server to start")
    found.add_argument(
        "--threads",
        type=int,
        help="CPU threads of torch in this process; its own choice if not given",
    )
    found.add_argument("--out", type=Path, help="folder for serve_check.json")
    return found


if __name__ == "__main__":
    raise SystemExit(main(arguments().parse_args()))
