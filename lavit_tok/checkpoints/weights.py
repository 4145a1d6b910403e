"""Weights on disk: safetensors and JSON, sharded when large, loaded strictly.

Nothing read here can run code or choose a class. Missing, unexpected and mis-shaped tensors are
errors that list them, because a partly random model still generates plausible images.
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

from lavit_tok.nn.precision import float32_default

DEFAULTS = Path(__file__).parents[1] / "default"
# A Hub id; a path that does not exist is not looked up on the network.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SINGLE = "model.safetensors"
# Bytes of a weights file mapped into memory at a time: at least MAPPED, and 1 / MAPPED_PARTS of a
# large file, since each mapping takes some milliseconds.
MAPPED, MAPPED_PARTS = 16 << 20, 64
Module = TypeVar("Module", bound=nn.Module)


class WeightsError(ValueError):
    """Weights that are not exactly what the model needs; the message lists every difference."""


def find_directory(
    name: str | os.PathLike[str],
    default: str | Path | None,
    patterns: Sequence[str] = ("*.json", "*.safetensors"),
    **hub: Any,
) -> Path:
    """Return a local directory for "default", a local directory or a Hub id.

    Args:
        name: "default", the path of a directory, or a Hub id "owner/name".
        default: what "default" means: a folder of lavit_tok/default, or an absolute path;
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
        directory: to be written.
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
        module: the module.
        directory: an existing directory.
        dtype: of the floating-point tensors in the file; None for the module's own.
        max_shard_size: of one file, in bytes or as in "5GB".
        single: name of the file.

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
    """Load a module's state, tensor by tensor, converted to the module's dtype and device.

    Args:
        module: the module; tensors on the meta device are replaced.
        directory: with the file `single`, or shards and an index.
        single: name of the weights file.

    Raises:
        WeightsError: missing or truncated files; missing, unexpected or mis-shaped tensors, all
            listed; NaN or infinity.
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
                label, expected = f"{file}: tensor {name}", target[name].dtype
                if value.is_complex() or value.is_floating_point() != expected.is_floating_point:
                    raise WeightsError(f"{label}: expected {expected}, got {value.dtype}")
                filled[name] = fill(target[name], value, label)
                del value  # a reference would keep the whole mapping alive
    if any(tensor.is_meta for tensor in target.values()):
        module.load_state_dict(filled, assign=True)


def empty(build: Callable[[], Module], dtype: torch.dtype) -> Module:
    """Build a module on the meta device, so that loading needs no more memory than the weights.

    No random numbers are drawn either. A module with tensors that are not saved (e.g. computed
    tables of positions) is built normally, since they would be lost.
    """
    with torch.device("meta"), float32_default():
        module = build()
    saved = module.state_dict().keys()
    computed = any(name not in saved for name, _ in module.named_buffers())
    attributes = (value for part in module.modules() for value in vars(part).values())
    computed |= any(isinstance(value, Tensor) for value in attributes)
    if computed:
        with float32_default():
            module = build()
    return nn.Module.to(module, dtype)


def fill(target: Tensor, value: Tensor, label: str, device: torch.device | str = "cpu") -> Tensor:
    """Copy `value` into the target, or into new memory on `device` if the target is on meta.

    Raises:
        WeightsError: NaN or infinity in the target's dtype; `label` names the tensor.
    """
    if target.is_meta:
        target = torch.empty(target.shape, dtype=target.dtype, device=device)
    target.copy_(value)
    if not is_finite(target):
        dtype = str(target.dtype).removeprefix("torch.")
        raise WeightsError(f"{label} holds NaN or infinity as {dtype}")
    return target


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity; without the temporary copies that isfinite makes."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _groups(files: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Names of the tensors of each file, in groups that may be mapped together.

    Pages read from a mapped file count as memory of the process until the file is closed.
    """
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        most = max(MAPPED, file.stat().st_size // MAPPED_PARTS)
        group: list[str] = []
        for name in shapes:
            if group and sum(4 * math.prod(shapes[n]) for n in [*group, name]) > most:
                yield file, group
                group = []
            group.append(name)
        yield file, group


def weight_files(directory: Path, single: str = SINGLE) -> list[Path]:
    """The safetensors files of a directory: one file, or the shards of an index.

    Raises:
        WeightsError: no such files, or an index of files that are not in the directory.
    """
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
        raise WeightsError(f"{index}: expected shards in the same directory, got {bad or 'none'}")
    return [directory / s for s in shards]


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors header. Raises WeightsError for a damaged file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a complete safetensors file: {error}") from None


def compare(expected: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]]) -> list[str]:
    """Every difference between two sets of named shapes, one per line."""
    lines = []
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            lines.append(f"missing     {name} {list(expected[name])}")
        elif name not in expected:
            lines.append(f"unexpected  {name} {list(got[name])}")
        elif expected[name] != got[name]:
            shapes = f"expected {list(expected[name])}, got {list(got[name])}"
            lines.append(f"mis-shaped  {name}: {shapes}")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises WeightsError naming the file."""
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
        path: the file.
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
