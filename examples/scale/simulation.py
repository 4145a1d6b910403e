"""Images a second against the number of machines that tokenize for one writing process, on paper.

Workers take blocks from one queue; a worker that fails loses its block and starts again; some
blocks take longer; one driver receives and writes all blocks in turn. The knee is the largest
number of workers with at least 0.8 of their rates' sum.
"""

import argparse
import heapq
import random
from typing import Any


def simulate(workers: int, args: Any) -> tuple[float, int]:
    """(images a second, failures) of a job of `args.blocks` blocks per worker."""
    draw = random.Random(0)
    left, failures, written = workers * args.blocks, 0, 0.0
    events = [(draw.random(), worker) for worker in range(workers)]  # when a worker is free
    heapq.heapify(events)
    done = []
    while left:
        now, worker = heapq.heappop(events)
        seconds = args.images / args.rate
        if draw.random() < args.stragglers:
            seconds *= 1 + draw.expovariate(1 / args.slowdown)
        failure = draw.expovariate(1 / (3600 * args.mtbf))
        if failure < seconds:
            failures += 1
            heapq.heappush(events, (now + failure + args.restart, worker))
            continue
        left -= 1
        done.append(now + seconds)
        heapq.heappush(events, (now + seconds, worker))
    for arrival in sorted(done):
        written = max(written, arrival) + args.images * args.driver / 1e6
    return workers * args.blocks * args.images / written, failures


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, (default, text) in {
        "images": (4096, "images of a block"),
        "rate": (750.0, "images a second of one worker"),
        "driver": (35.0, "microseconds of the driver for an image"),
        "mtbf": (200.0, "hours between failures of a worker"),
        "restart": (120.0, "seconds until a worker has loaded the model again"),
        "stragglers": (0.01, "fraction of blocks that take longer"),
        "slowdown": (3.0, "times by which they do, on average"),
        "blocks": (200, "blocks of each worker"),
    }.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser


def main(args: Any) -> None:
    knee = 1
    print("| workers | images/s | of the sum | failures |\n|---|---|---|---|")
    for workers in (2**n for n in range(9)):
        rate, failures = simulate(workers, args)
        efficiency = rate / (workers * args.rate)
        knee = workers if efficiency >= 0.8 else knee
        print(f"| {workers} | {rate:,.0f} | {efficiency:.2f} | {failures} |")
    print(f"\nknee: {knee} workers")


if __name__ == "__main__":
    main(arguments().parse_args())
