"""Does a server that does not know this package caption an image, and generate one, as ids?

    lm.export(DIR) -> `transformers serve DIR` -> openai client -> text  ==  plain greedy decoding

    python examples/serve/check.py DIR          needs `pip install ".[serve]"`, see docs/serving.md

It requests a caption of codes, and the codes of a caption, over HTTP. Prints a line
for each request; exit code 1 if an answer differs from plain greedy decoding of the same directory.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavit_lm import VisualVocabulary
from lavit_lm.vocabulary.visual_vocabulary import BEGIN, END


def prompts(directory: Path, caption: str, codes: list[int]) -> dict[str, str]:
    """An image to caption, and a caption to generate codes for, as text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = VisualVocabulary.from_tokenizer(tokenizer).to_ids(torch.tensor(codes)).tolist()
    image = "".join(tokenizer.convert_ids_to_tokens(ids))
    return {"caption": f"{BEGIN}{image}{END}", "image codes": f"{caption}{BEGIN}"}


def greedy(directory: Path, prompt: str, max_tokens: int) -> str:
    """What plain greedy decoding answers, by Auto classes alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
    answer = output[inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@contextmanager
def server(command: list[str], directory: Path, seconds: float = 900.0) -> Iterator[str]:
    """Run `command DIRECTORY --host H --port P` until the block ends; yields the address.

    Raises:
        RuntimeError: a server that ends or does not answer, with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    whole = [*command, str(directory), "--host", "127.0.0.1", "--port", str(port)]
    address, start = f"http://127.0.0.1:{port}", time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(whole, stdout=log, stderr=log) as process,
    ):
        try:
            while not answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() - start > seconds:
                    log.seek(0)
                    raise RuntimeError(
                        f"{shlex.join(command)} gave no answer:\n{log.read()[-3000:]}"
                    )
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # vLLM waits for an engine that does not start
                process.kill()


def answers(url: str) -> bool:
    """Whether something answers at the address."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def compare(address: str, directory: Path, caption: str, codes: list[int], most: int) -> int:
    """Print a line for each request; returns the number of answers that differ."""
    from openai import OpenAI

    wrong = 0
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)
    for name, prompt in prompts(directory, caption, codes).items():
        expected = greedy(directory, prompt, most)
        reply = client.completions.create(
            model=str(directory), prompt=prompt, max_tokens=most, temperature=0.0
        )
        answer = reply.choices[0].text
        print(f"{name}: {'equal' if answer == expected else 'DIFFERENT'}: {answer!r}")
        wrong += answer != expected
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Compare the server's answers with greedy decoding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="what MultimodalLM.export wrote")
    parser.add_argument("--caption", default="a red apple")
    parser.add_argument("--codes", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--command", default="transformers serve")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args(arguments)
    with server(shlex.split(args.command), args.directory) as address:
        wrong = compare(address, args.directory, args.caption, args.codes, args.max_tokens)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
