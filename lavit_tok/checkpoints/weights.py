"""Weights on disk: safetensors and JSON, written in shards when large, read strictly.

Nothing read here can run code or choose a class. Tensors that are missing, unexpected or of another shape are refused
with a list, because a model that is silently half random still gives plausible pictures.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

DEFAULTS = Path(__file__).parents[1] / "default"
HUB_ID = re.compile(
    r"\w[\w.-]*/\w[\w.-]*"
)  # so that a path that is not there is never asked for over the network
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPPED = 16 << 20  # at least this many bytes of a weights file are mapped into memory at a time,
MAPPED_SHARE = 64  # or this part of a large file, since each mapping costs some milliseconds
Module = TypeVar("Module", bound=nn.Module)


class WeightsError(ValueError):
    """A weights directory that does not hold exactly what the model needs; the message lists every difference."""


def find_directory(
    name: str | os.PathLike[str],
    default: str | Path | None,
    patterns: Sequence[str] = ("*.json", "*.safetensors"),
    **hub: Any,
) -> Path:
    """Return a local directory for "default", a local directory or a Hub id.

    Args:
        name: "default", the path of a directory, or a Hub id "owner/name".
        default: what "default" stands for: a folder of lavit_tok/default, or an absolute path;
            None if no model of this kind is shipped.
        patterns: files to download from the Hub; no other file is ever read.
        hub: passed to huggingface_hub.snapshot_download (revision, token, cache_dir, ...).

    Raises:
        WeightsError: neither a directory nor a Hub repository that can be read.
    """
    if str(name) == "default" and default is not None:
        return DEFAULTS / default
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(str(name)):
        choices = "" if default is None else "'default', "
        raise WeightsError(
            f"{name}: expected {choices}an existing directory or a Hub id owner/name"
        )
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), **hub))
    except Exception as error:
        raise WeightsError(f"{name}: no such directory, and the Hub gave none: {error}") from error


def check_replaceable(directory: str | os.PathLike[str], marker: str) -> None:
    """Check that a model can be written to `directory` without deleting other files.

    Args:
        marker: name of a file that every directory of this kind of model contains.

    Raises:
        WeightsError: the directory is not empty and does not contain `marker`, or is a file.
    """
    path = Path(directory)
    if path.exists() and not (
        path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))
    ):
        raise WeightsError(
            f"{path}: expected a new or empty directory, or one with {marker} to replace"
        )


def save_weights(
    module: nn.Module,
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    single: str = SINGLE,
) -> None:
    """Write a module's state as the file `single` (or as shards and an index).

    Args:
        dtype: dtype of the floating-point tensors in the file; None for the module's own.

    Raises:
        WeightsError: a tensor that is, or in `dtype` would become, NaN or infinite.
    """
    state = {
        k: v.to(dtype) if dtype and v.is_floating_point() else v
        for k, v in module.state_dict().items()
    }
    broken = [k for k, v in state.items() if not bool(v.isfinite().all())]
    if broken:
        as_what = dtype or "they are"
        raise WeightsError(
            f"{directory}: not saved, these tensors hold NaN or infinity as {as_what}: {broken}"
        )
    cpu = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    pattern = single.replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(
        cpu, str(directory), filename_pattern=pattern, max_shard_size=max_shard_size
    )


def load_weights(
    module: nn.Module, directory: str | os.PathLike[str], single: str = SINGLE
) -> None:
    """Fill a module from a directory, tensor by tensor, converting to the module's dtype and device.

    Raises:
        WeightsError: missing files; missing, unexpected or mis-shaped tensors (all listed); truncated files.
    """
    files = weight_files(Path(directory), single)
    target = module.state_dict()
    sources: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for file in files:
        shapes = tensor_shapes(file)
        problems += [
            f"twice       {name}, again in {file.name}"
            for name in sorted(shapes.keys() & sources.keys())
        ]
        sources.update(shapes)
    problems += compare({k: tuple(v.shape) for k, v in target.items()}, sources)
    if problems:
        raise WeightsError(
            f"{directory}: these weights do not fit the model:\n" + "\n".join(problems)
        )
    filled: dict[str, Tensor] = {}
    for file, names in _groups(files):
        with safe_open(file, framework="pt") as opened, torch.no_grad():
            for name in names:
                value: Tensor = opened.get_tensor(name)
                if (
                    value.is_floating_point() != target[name].is_floating_point()
                    or value.is_complex()
                ):
                    raise WeightsError(
                        f"{file}: tensor {name}: expected {target[name].dtype}, got {value.dtype}"
                    )
                filled[name] = fill(target[name], value, f"{file}: tensor {name}")
                del value  # or the mapping of this group would outlive it
    if any(tensor.is_meta for tensor in target.values()):
        module.load_state_dict(filled, assign=True)


def empty(build: Callable[[], Module], dtype: torch.dtype) -> Module:
    """A module without memory for its weights (on the meta device), to be filled tensor by tensor as they are read.

    Loading then needs the weights' own size, not twice or three times it, and draws no random numbers. A module that
    computes tensors which its files do not hold (tables of positions, say) is built as usual, since those would be
    lost.
    """
    with torch.device("meta"):
        module = build()
    saved = module.state_dict().keys()
    computed = any(name not in saved for name, _ in module.named_buffers())
    computed |= any(
        isinstance(value, Tensor) for part in module.modules() for value in vars(part).values()
    )
    return nn.Module.to(build() if computed else module, dtype)


def fill(target: Tensor, value: Tensor, label: str, device: torch.device | str = "cpu") -> Tensor:
    """`value` in the target's dtype: copied into it, or, if it is on the meta device, into new memory on `device`.

    Raises WeightsError for NaN or infinity, naming the tensor by `label`.
    """
    if target.is_meta:
        target = torch.empty(target.shape, dtype=target.dtype, device=device)
    target.copy_(value)
    if not is_finite(target):
        raise WeightsError(
            f"{label} holds NaN or infinity as {str(target.dtype).removeprefix('torch.')}"
        )
    return target


def is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; without the temporary copies that isfinite makes, which show in the peak of loading."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _groups(files: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Tensor names of each file, so many at a time as may be mapped together.

    An open file is mapped into memory and what was read of it counts as the process's until it is closed.
    """
    for file in files:
        with safe_open(file, framework="pt") as opened:
            sizes = {
                name: 4 * math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()
            }  # noqa: SIM118
        most = max(MAPPED, file.stat().st_size // MAPPED_SHARE)
        group: list[str] = []
        for name, size in sizes.items():
            if group and sum(sizes[n] for n in group) + size > most:
                yield file, group
                group = []
            group.append(name)
        yield file, group


def weight_files(directory: Path, single: str = SINGLE) -> list[Path]:
    """The safetensors files of a directory: one file, or the shards its index names."""
    index = directory / f"{single}.index.json"
    if (directory / single).is_file():
        return [directory / single]
    if not index.is_file():
        raise WeightsError(f"{directory}: expected {single} or {index.name}, found neither")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index}: expected a weight_map of tensor names to file names")
    shards = sorted(set(names.values()))
    bad = [s for s in shards if Path(s).name != s or not (directory / s).is_file()]
    if bad or not shards:
        raise WeightsError(f"{index}: names shards that are not beside it: {bad or 'none at all'}")
    return [directory / s for s in shards]


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a safetensors header. Raises WeightsError for a damaged or truncated file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a whole safetensors file: {error}") from None


def compare(expected: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]]) -> list[str]:
    """Every difference between two sets of named shapes, a line each; empty when they agree."""
    lines: Iterable[tuple[str, str]] = [
        *((k, f"missing     {k} {list(expected[k])}") for k in expected.keys() - got.keys()),
        *((k, f"unexpected  {k} {list(got[k])}") for k in got.keys() - expected.keys()),
        *(
            (k, f"mis-shaped  {k}: expected {list(expected[k])}, got {list(got[k])}")
            for k in expected.keys() & got.keys()
            if expected[k] != got[k]
        ),
    ]
    return [line for _, line in sorted(lines)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsError naming the file."""
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_header(path: Path, kind: str, version: int, required: Iterable[str]) -> dict[str, Any]:
    """Read a JSON object that names its format.

    Args:
        kind: the expected value of "format".
        version: the expected value of "version".
        required: other keys that must be present.

    Raises:
        WeightsError: no such file, another format or version, or missing keys.
    """
    values = read_json(path)
    missing = sorted(set(required) - values.keys())
    if missing or (values.get("format"), values.get("version")) != (kind, version):
        raise WeightsError(
            f"{path}: expected {kind} version {version}, got {values.get('format')} "
            f"{values.get('version')}, missing keys {missing}"
        )
    return values
