"""The engine "ray": batches are read by tasks on CPUs and mapped by actors that hold the model.

    work -tasks: read-> batches of pixels or codes -actors-> batches of codes or images -> driver

Only the driver writes, so a block is written once, whichever process fails: Ray repeats lost tasks,
and the user restarts a failed driver. To Ray a batch is one value (an Arrow stream), which it
neither splits nor joins with others.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from lavit_tok import __version__
from lavit_tok.data.shard_manifest import ShardConfig, ShardError

PACKAGES = ("torch", "transformers", "pillow")
BLOCK_BYTES = 4 << 20  # of pixels that go to an actor at once: ten batches of 64-pixel images
JOINING_S = 60
INIT_DEATHS = 20  # actors in turn that die before their first batch; by default Ray accepts none
Row = dict[str, bytes]


@dataclass(frozen=True)
class Work:
    """Examples for one process to read: of part `part`, numbers start..stop-1, or all."""

    part: int
    start: int = 0
    stop: int | None = None
    content: str | None = None
    """The examples themselves, if the driver has read them."""


@dataclass(frozen=True)
class RayOptions:
    """How `--engine ray` runs.

    Raises:
        ValueError: GPUs that Ray cannot reserve.
    """

    address: str | None = None
    """Of a cluster, or "auto"; None starts one on this machine."""
    workers: int = 1
    """Actors, each with a copy of the tokenizer."""
    gpus_per_worker: float = 0.0
    """Whole, or a fraction of one; 0 encodes on CPUs."""

    def __post_init__(self) -> None:
        gpus = self.gpus_per_worker
        if not (0 <= gpus < 1 or (gpus > 0 and float(gpus).is_integer())):
            raise ValueError(f"--gpus-per-worker: expected 0..1 or a whole number, got {gpus}")

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for an actor; without GPUs half a CPU, the rest is for reading."""
        if self.gpus_per_worker:
            return {"num_cpus": 0, "num_gpus": self.gpus_per_worker}
        return {"num_cpus": 0.5}


@contextmanager
def ray_cluster(options: RayOptions) -> Iterator[Callable[[], None]]:
    """A connection to a cluster, or a cluster of this machine, for as long as the block runs.

    It starts beside the block, most of it in other processes. The function that is yielded waits
    until it has, and raises ShardError if there is no cluster at the address, or one that is too
    small.

    Raises:
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home folder
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            f"--engine ray needs more packages: pip install 'lavit-tok[ray]' ({error})"
        ) from None
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # the others write to Ray's log files
            handler.setLevel(logging.CRITICAL)
    before = ray.is_initialized()
    with ThreadPoolExecutor(1, "ray") as pool:
        started = pool.submit(_start, options, before)
        try:
            yield started.result
        finally:
            started.exception()  # waits
            if not before:
                ray.shutdown()


def encode_on_ray(
    work: list[Work], read: Any, config: ShardConfig, tokenizer: str, options: RayOptions
) -> Iterator[pa.Table]:
    """`map_on_ray` by the tokenizer of a config."""
    from lavit_tok.data.tokenize_batch import TokenizeBatch  # not in processes that only read

    stage = TokenizeBatch(tokenizer, "cpu", config.budget, config.flip)
    return map_on_ray(work, read, stage, config.weights, options)


def map_on_ray(
    work: list[Work], read: Any, stage: Any, digest: str, options: RayOptions
) -> Iterator[pa.Table]:
    """Tables in the order in which they are made, in a `ray_cluster`.

    Args:
        work: what to read.
        read: gives batches of an item of work; pickled, so files are read by paths or URLs that all
            machines have in common.
        stage: maps tables by a model that it loads in every actor; a `TokenizeBatch` or
            `DecodeBatch`.
        digest: that of the stage here.
        options: of the cluster.

    Raises:
        ShardError: of `read`, or a worker with another model or packages, or without them. Of the
            machines that are in the cluster at the start it is raised before the first table.
    """
    import ray
    from ray.data.context import DataContext

    if not work:
        return
    expected = versions()
    _require_same_on_all_nodes(stage, digest, expected)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    with DataContext.current(context):
        rows = [asdict(item) for item in work]
        items = ray.data.from_items(rows, override_num_blocks=len(rows))
    reading = {"read": read, "expected": expected}
    mapped = items.flat_map(_read_work, fn_kwargs=reading).map(
        _Worker,
        fn_constructor_args=(stage, digest, expected),
        compute=ray.data.ActorPoolStrategy(size=min(options.workers, len(work))),
        **options.resources,
    )
    try:
        for row in mapped.iter_rows():
            yield _table(row)
    except ray.exceptions.RayError as error:
        raise _error(error) from None


def versions() -> dict[str, str]:
    """Of the packages on which codes depend, without the build (cpu, cu130)."""
    found = {name: version(name).partition("+")[0] for name in PACKAGES}
    return found | {"lavit-tok": __version__}


def _start(options: RayOptions, connected: bool) -> None:
    if not connected:
        _init(options.address)
    _require_resources(options)


def _init(address: str | None) -> None:
    """Connect to a cluster, or start one. In the main thread Ray would handle SIGTERM."""
    import ray

    try:
        if address not in (None, "auto", "local"):  # Ray tries for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError("expected HOST:PORT or auto")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # also a plain Exception, of a node that does not start in time
        if address is None:
            raise ShardError(f"--engine ray: no cluster of this machine: {error}") from None
        raise ShardError(f"--address {address}: no Ray cluster: {error}") from None


def _require_resources(options: RayOptions) -> None:
    """Raise ShardError if Ray would wait for more CPUs or GPUs than the cluster has.

    The machines of a cluster have a minute to join it.
    """
    import ray

    needed = options.resources
    cpus = options.workers * needed["num_cpus"] + 1  # for reading
    gpus = options.workers * needed.get("num_gpus", 0)
    end = time.monotonic() + (JOINING_S if options.address else 0)
    while True:
        found = ray.cluster_resources()
        has = {name: found.get(name, 0.0) for name in ("CPU", "GPU")}
        if cpus <= has["CPU"] and gpus <= has["GPU"]:
            return
        if time.monotonic() > end:
            raise ShardError(
                f"{options.workers} workers need {cpus:g} CPUs and {gpus:g} GPUs, the Ray cluster "
                f"has {has['CPU']:g} and {has['GPU']:g}: use fewer --workers or --gpus-per-worker"
            )
        time.sleep(1)


def _require_same_on_all_nodes(stage: Any, digest: str, expected: dict[str, str]) -> None:
    """Raise ShardError if a node has another model or packages, or lacks them.

    One node has one installation, so that its first batch shows the same.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [
        node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & {*node["Resources"]}
    ]
    if len(nodes) < 2:
        return
    check = ray.remote(num_cpus=0, max_calls=1)(_check)
    checks = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        result = check.options(scheduling_strategy=here).remote(stage, digest, expected)
        checks[result] = node["NodeManagerHostname"]
    for result, host in checks.items():
        try:
            ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise _error(error, f"the machine {host}") from None
        except ray.exceptions.RayError:  # the node has died: the others do its work
            continue


def _check(stage: Any, digest: str, expected: dict[str, str]) -> None:
    _ = _Worker(stage, digest, expected).stage


def _require_versions(expected: dict[str, str]) -> None:
    found, host = versions(), socket.gethostname()
    names = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if names:
        here, there = (
            ", ".join(f"{name} {packages.get(name)}" for name in names)
            for packages in (expected, found)
        )
        raise ShardError(
            f"a worker on {host} has {there}, the driver {here}: results of both would be mixed; "
            "install the same packages on all machines"
        )


def _read_work(row: dict[str, Any], read: Any, expected: dict[str, str]) -> Iterator[Row]:
    """The task."""
    _require_versions(expected)
    for table in read(Work(**row)):
        yield _row(table)


class _Worker:
    """The actor."""

    def __init__(self, stage: Any, digest: str, expected: dict[str, str]) -> None:
        self.unchecked, self.digest, self.expected = stage, digest, expected

    @cached_property
    def stage(self) -> Any:
        """Loaded with the first batch, as Ray starts an actor that cannot be made once more.

        Raises:
            ShardError: it would make other codes or images than the driver expects.
        """
        import ray

        _require_versions(self.expected)
        stage, host = self.unchecked, socket.gethostname()
        stage.device = "cuda" if ray.get_gpu_ids() else "cpu"
        try:
            digest = stage.digest()
        except (ValueError, OSError) as error:
            raise ShardError(f"a worker on {host} cannot load the {stage.model}: {error}") from None
        if digest != self.digest:
            raise ShardError(
                f"on {host} the {stage.model} {stage.name!r} has weights {digest}, the driver's "
                f"has {self.digest}: results of both would be mixed; copy one to all machines"
            )
        return stage

    def __call__(self, row: Row) -> Row:
        return _row(self.stage(_table(row)))


def _row(table: pa.Table) -> Row:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return {"batch": sink.getvalue().to_pybytes()}


def _table(row: Row) -> pa.Table:
    return pa.ipc.open_stream(row["batch"]).read_all()


def _error(error: Exception, where: str = "a worker of the cluster") -> ShardError:
    """What ended the job, on one line, without Ray's traceback and advice."""
    cause = getattr(error, "cause", error)
    text = f"{type(cause).__name__}: {cause}\n{error}"  # Ray knows some causes as text only
    found = dict(re.findall(r"^(?:\w+\.)*(\w+Error): (.+)", text, re.MULTILINE))
    if "ShardError" in found:
        return ShardError(found["ShardError"])
    for name in ("ModuleNotFoundError", "PackageNotFoundError", "ImportError"):
        if name in found:
            return ShardError(
                f"{where} lacks a package ({found[name]}): install 'lavit-tok[train,ray]' on all "
                "machines"
            )
    name, message = [*found.items(), (type(cause).__name__, str(cause).partition("\n")[0])][0]
    return ShardError(f"{where} failed: {name}: {message}")
