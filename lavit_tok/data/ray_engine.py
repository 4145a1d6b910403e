"""The engine "ray": images are read by tasks on CPUs and encoded by actors that hold the model.

    work -map_batches, tasks: read, decode-> pixels -map_batches, actors: encode-> codes -> driver

Only the driver writes, so a block is written once, whatever dies: Ray runs lost tasks again, and a
driver that dies is started again by the user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from lavit_tok import __version__
from lavit_tok.data.shard_manifest import ShardConfig, ShardError
from lavit_tok.data.shard_source import Work, weights_digest
from lavit_tok.data.shard_writer import RayOptions
from lavit_tok.data.tokenize_batch import tokenize_batch
from lavit_tok.tokenizer import VisualTokenizer

PACKAGES = ("torch", "transformers", "pillow")


def encode_on_ray(
    work: list[Work],
    read: Any,
    config: ShardConfig,
    tokenizer: str,
    options: RayOptions,
    batch_size: int,
) -> Iterator[pa.Table]:
    """Tables of codes in the order in which they are made.

    Args:
        work: what to read.
        read: gives decoded batches of an item of work; pickled, so files are read by paths or URLs
            that all machines have in common.
        config: what all shards have in common.
        tokenizer: "default", directory or Hub id, loaded by every actor.
        options: of the cluster.
        batch_size: images of a batch.

    Raises:
        ShardError: no cluster at the address, or a worker that would make other codes or no codes.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            f"--engine ray needs more packages: pip install 'lavit-tok[ray]' ({error})"
        ) from None
    if not work:
        return
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(options.address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ShardError(f"--address {options.address}: no Ray cluster: {error}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"part": item.part, "start": item.start, "stop": item.stop} for item in work]

    def decode(table: pa.Table) -> Iterator[pa.Table]:
        for values in table.to_pylist():
            yield from read(Work(**values))

    cpus = 0.5 if not options.gpus_per_worker else 0  # the rest is for reading
    try:
        images = ray.data.from_items(items, override_num_blocks=len(items))
        codes = images.map_batches(decode, batch_size=1, batch_format="pyarrow").map_batches(
            _Encoder,
            fn_constructor_args=(config, tokenizer, options.device, batch_size, versions()),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=options.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(size=options.workers),
        )
        yield from codes.iter_batches(batch_size=None, batch_format="pyarrow")
    except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as error:
        raise _cause(error) from None
    finally:
        if started:
            ray.shutdown()


def versions() -> dict[str, str]:
    """Of the packages on which codes depend."""
    return {name: version(name) for name in PACKAGES} | {"lavit-tok": __version__}


class _Encoder:
    """The actor.

    Raises:
        ShardError: it would make other codes than the driver expects.
    """

    def __init__(
        self,
        config: ShardConfig,
        tokenizer: str,
        device: str,
        batch_size: int,
        expected: dict[str, str],
    ) -> None:
        if (found := versions()) != expected:
            raise ShardError(
                f"a worker has {found}, the driver {expected}: shards of both would be mixed; "
                "install the same packages on all machines"
            )
        try:
            self.tokenizer = VisualTokenizer.from_pretrained(tokenizer, device=device)
        except (ValueError, OSError) as error:
            raise ShardError(f"a worker cannot load the tokenizer: {error}") from None
        digest = weights_digest(self.tokenizer)
        if digest != config.weights:
            raise ShardError(
                f"a worker's tokenizer {tokenizer!r} has weights {digest}, the driver's "
                f"{config.weights}: shards of both would be mixed"
            )
        self.config, self.batch_size = config, batch_size

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Codes, batch by batch as they were read: Ray may have joined several."""
        start = 0
        for stop in range(1, len(table) + 1):
            if stop == len(table) or self._batch(table, stop) != self._batch(table, start):
                batch = table.slice(start, stop - start)
                yield tokenize_batch(batch, self.tokenizer, self.config.budget, self.config.flip)
                start = stop

    def _batch(self, table: pa.Table, row: int) -> tuple[str, int]:
        """Shard and number in it of the batch of an example."""
        index = table["index"][row].as_py() % self.config.shard_size
        return table["file"][row].as_py(), index // self.batch_size


def _cause(error: BaseException) -> ShardError:
    """The error of these packages that Ray reports, or its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, message = line.partition(": ")
        if name.endswith("ShardError"):
            return ShardError(message)
        if name.endswith(("ModuleNotFoundError", "ImportError")):
            return ShardError(
                f"a worker of the cluster lacks a package ({message}): install "
                "lavit-tok[train,ray] on all machines"
            )
    return ShardError(f"Ray: {lines[-1]}")
