"""Load test of app.py on loopback: many clients, none of whose requests may be lost.

    python examples/serve/load.py --clients 64 --requests 1000
    python examples/serve/load.py --model MODEL_DIR --decoder DECODER_DIR

Starts the application, sends images and captions in turn, and prints the latency percentiles. Exit
code 1 if an answer is missing or is not what was requested.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import sys
import time
from pathlib import Path
from typing import Any

import check
import numpy as np
from openai import AsyncOpenAI
from PIL import Image

RED = Image.new("RGB", (64, 64), "red")


async def one(client: Any, number: int, url: str) -> tuple[str, float]:
    """Send a request and check its answer: (kind, seconds)."""
    kind, start = ("image", "caption")[number % 2], time.monotonic()
    if kind == "image":
        reply = await client.images.generate(
            prompt=f"a red bag {number}", extra_body={"seed": number}
        )
        Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json))).load()
    else:
        part = {"type": "image_url", "image_url": {"url": url}}
        reply = await client.chat.completions.create(
            model="lavit", messages=[{"role": "user", "content": [part]}], max_tokens=16
        )
        assert isinstance(reply.choices[0].message.content, str)
    return kind, time.monotonic() - start


async def load(address: str, clients: int, requests: int) -> int:
    """Print a table of latencies; returns the number of requests without a correct answer."""
    file = io.BytesIO()
    RED.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    client = AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0
    )  # a retry would hide a lost request
    numbers, results = iter(range(requests)), list[tuple[str, float]]()
    errors: list[str] = []

    async def work() -> None:
        for number in numbers:
            try:
                results.append(await one(client, number, url))
            except Exception as error:
                errors.append(f"request {number}: {type(error).__name__}: {error}"[:200])

    start = time.monotonic()
    await asyncio.gather(*(work() for _ in range(clients)))
    seconds = time.monotonic() - start
    print(f"{clients} clients, {requests} requests: {len(results)} answered, {len(errors)} lost")
    print(f"{seconds:.1f} s, {len(results) / seconds:.1f} requests per second")
    for kind in ("image", "caption"):
        taken = [value for name, value in results if name == kind]
        if taken:
            p50, p90, p99 = np.percentile(taken, [50, 90, 99])
            print(f"{kind}: p50 {p50:.2f} s, p90 {p90:.2f} s, p99 {p99:.2f} s, "
                  f"max {max(taken):.2f} s, n = {len(taken)}")  # fmt: skip
    print("\n".join(errors[:5]), end="\n" if errors else "")
    return requests - len(results)


def main(arguments: list[str] | None = None) -> int:
    """Start the application and load it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--decoder", default="default")
    parser.add_argument("--steps", type=int, default=20, help="of the pixel decoder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args(arguments)
    command = [sys.executable, str(Path(__file__).with_name("app.py"))]
    options = ["--decoder", args.decoder, "--steps", str(args.steps), "--max-seconds", "600"]
    with check.server([*command, *options], Path(args.model), 600) as address:
        return 1 if asyncio.run(load(address, args.clients, args.requests)) else 0


if __name__ == "__main__":
    sys.exit(main())
