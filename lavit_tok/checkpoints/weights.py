"""Weights on disk: safetensors and JSON, sharded when large, loaded strictly.

Nothing read here can run code or choose a class: `find_directory` checks every directory of both
packages before any other library reads it. Missing, unexpected and mis-shaped tensors are errors
that list them, because a partly random model still generates plausible images.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, save_torch_state_dict, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lavit_tok.checkpoints.files import PARTIAL, named_errors
from lavit_tok.nn.precision import float32_default

PACKAGE = Path(__file__).parents[1]
SHIPPED = {"default": "d7d50eab4640d28e", "selected": "91fa3ade00efa85e"}
"""Models in the package, and the fingerprints of their codebooks (VisualTokenizer.fingerprint)."""
HUB_PART = re.compile(r"\w[\w.-]*")
LOCAL_SUFFIXES = {".safetensors", ".json", ".parquet", ".tar", ".arrow", ".jsonl", ".csv"}
# A Hub id; a path that does not exist is not looked up on the network.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SINGLE = "model.safetensors"
# Bytes of a weights file mapped into memory at a time: at least MAPPED, and 1 / MAPPED_PARTS of a
# large file, since each mapping takes some milliseconds.
MAPPED, MAPPED_PARTS = 16 << 20, 64
# Entries of config files with which transformers or diffusers would import code, from the directory
# or from the Hub. Kernels of quantizers are fetched from the Hub, too.
CODE_ENTRIES = frozenset({"auto_map", "custom_generate", "custom_pipelines", "quantization_config"})
ATTENTIONS = frozenset({None, "eager", "sdpa", "flash_attention_2", "flash_attention_3"})
ATTENTIONS |= {"flex_attention"}
# Files and folders with which transformers would load another model, or run code.
CODE_FILES = ("custom_generate", "adapter_config.json")
# Numbers of config files that no shape of a tensor limits: name, and the range that is accepted.
RANGES: list[tuple[re.Pattern[str], float, float]] = [
    (re.compile(r"(.*_)?eps(ilon)?"), 1e-30, 1.0),
    (re.compile(r"(.*_)?dropout(_prob)?"), 0.0, 1.0),
    (re.compile(r"scaling_factor"), 1e-6, 1e6),
    (re.compile(r"beta_(start|end)"), 1e-9, 1.0),
    (re.compile(r"num_train_timesteps"), 1, 100_000),
    (re.compile(r"(.*_)?experts(_per_tok)?"), -1, 4096),
    (re.compile(r"rope_theta"), 1.0, 1e12),
    (re.compile(r"initializer_range|initializer_factor"), 0.0, 1000.0),
    (re.compile(r"final_logit_softcapping|attn_logit_softcapping"), 1e-6, 1e6),
    (re.compile(r"(.*_)?(size|channels|positions|position_embeddings|dim|width|heads)"), -1, 2**31),
]
UNLIMITED = {"lambda_min_clipped"}  # -inf is diffusers' default
LAYERS = re.compile(r"(.*_)?(depths?|layers?|layers_per_block|num_blocks)")
# Bytes of a config file; of tokenizer.json or an index, which need many times as much memory.
MAX_CONFIG, MAX_FILE = 16 << 20, 1 << 26
Module = TypeVar("Module", bound=nn.Module)


class WeightsError(ValueError):
    """Weights that are not exactly what the model needs; the message lists every difference."""


def find_directory(
    name: str | os.PathLike[str],
    default: str | Path | None,
    patterns: Sequence[str] = ("*.json", "*.safetensors"),
    **hub: Any,
) -> Path:
    """Return a local directory for a shipped model, a local directory or a Hub id.

    Args:
        name: of a shipped model ("default", "selected"), the path of a directory, or a Hub id
            "owner/name".
        default: what "default" means: a folder of lavit_tok/default (and of lavit_tok/selected), or
            an absolute path; None if no model of this kind is shipped.
        patterns: files to download from the Hub; no other file is ever read.
        hub: passed to huggingface_hub.snapshot_download (revision, token, cache_dir, ...).

    Raises:
        WeightsError: neither a directory nor a Hub repository that can be read; or one that
            `check_foreign` refuses.
    """
    if not isinstance(name, str | os.PathLike):
        raise WeightsError(f"expected the name of a directory or a Hub id, got {name!r}")
    shipped = {} if default is None else {"default": PACKAGE / "default" / default}
    if default is not None and not Path(default).is_absolute():
        shipped = {model: PACKAGE / model / default for model in SHIPPED}
    if str(name) in shipped:
        return shipped[str(name)]
    path = Path(name)
    if path.is_dir():
        return check_foreign(path)
    owner = Path(str(name).split("/")[0])
    if path.exists() or owner.exists() or not HUB_ID.fullmatch(str(name)):
        choices = "".join(f"{model!r}, " for model in shipped)
        raise WeightsError(
            f"{name}: expected {choices}an existing directory or a Hub id owner/name"
        )
    try:
        path = Path(snapshot_download(str(name), allow_patterns=list(patterns), **hub))
    except Exception as error:
        raise WeightsError(f"{name}: no such directory, and the Hub gave none: {error}") from error
    return check_foreign(path)


def shipped_with(fingerprint: str | None) -> str | None:
    """The name of the shipped model whose codebook has this fingerprint, if there is one."""
    return next((name for name, own in SHIPPED.items() if own == fingerprint), None)


def update_digest(sha: Any, module: nn.Module) -> None:
    """Add the names and values of a module's tensors to a hash."""
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def codebook_remedy(fingerprint: str | None) -> str:
    """What a message about another codebook than this one adds; "" if no shipped model has it."""
    shipped = shipped_with(fingerprint)
    return f"; visual_tokenizer={shipped!r} has that codebook" if shipped else ""


def check_foreign(directory: Path) -> Path:
    """Check a directory from anywhere before any library opens its files.

    Refused are config files that name code to import (auto_map, custom_generate, kernels of the
    Hub), that hold NaN, infinity or numbers out of RANGES, and files that are not regular, since
    reading a pipe or a device would never end.

    Returns:
        The directory.

    Raises:
        WeightsError: naming the file and the entry.
    """
    for name in CODE_FILES:
        if (directory / name).exists():
            raise WeightsError(
                f"{directory / name}: expected weights and configs only: because of this file "
                "transformers would run code or load another model"
            )
    folders = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    # Partial folders of a running or killed process are not read.
    for folder in (directory, *(f for f in folders if not PARTIAL.fullmatch(f.name))):
        for path in sorted(folder.iterdir()):
            if path.suffix not in (".json", ".safetensors", ".model", ".jinja"):
                continue
            require_regular(path)
            # Not only *config.json: transformers also reads config.5.0.json and the like.
            if path.suffix == ".json" and "config" in path.name:
                read_json(path)
    return directory


def require_regular(path: Path, limit: int = MAX_FILE) -> None:
    """Raise WeightsError unless this is a regular file, and a text file not above `limit` bytes."""
    if not path.is_file():
        raise WeightsError(
            f"{path}: expected a regular file, got none or a folder, link, pipe or device, which "
            "cannot be read to an end"
        )
    size = path.stat().st_size
    if path.suffix != ".safetensors" and size > limit:
        raise WeightsError(
            f"{path}: expected at most {limit} bytes, got {size}: no such file is so large"
        )


def require_on_hub(name: str, kind: str = "model") -> None:
    """Check that a name, which is no local path, is that of a repository on the Hub.

    Loaders of other packages retry for half a minute before they report a misspelled path.

    Args:
        name: name, owner/name, or for a model owner/name/subfolder.
        kind: "model" or "dataset".

    Raises:
        WeightsError: a path that does not exist, or a repository that the Hub does not
            have and that is not in the local cache.
    """
    parts = name.split("/")
    owner = parts[0]
    local = owner in ("", ".", "..", "~") or Path(owner).exists()
    local = local or Path(name).suffix in LOCAL_SUFFIXES
    most = 2 if kind == "dataset" else 3
    if local or len(parts) > most or not all(HUB_PART.fullmatch(part) for part in parts):
        raise WeightsError(f"{name}: no such file or directory")
    repository = "/".join(parts[:2])
    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=10)
    except Exception as error:  # of the network, in many kinds
        folder = repo_folder_name(repo_id=repository, repo_type=kind)
        if not (Path(HF_HUB_CACHE) / folder).is_dir():
            reason = str(error).strip().splitlines()[0]
            raise WeightsError(
                f"{name}: no such file or directory, and the Hub gave none: {reason}"
            ) from error


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
        OSError: naming the directory.
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
    with named_errors(Path(directory)):
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
    files = _require_shapes(module, Path(directory), single)
    target = module.state_dict()
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


def empty(
    build: Callable[[], Module],
    dtype: torch.dtype,
    directory: Path | None = None,
    single: str = SINGLE,
) -> Module:
    """Build a module on the meta device, so that loading needs no more memory than the weights.

    No random numbers are drawn either. A module with tensors that are not saved (e.g. computed
    tables of positions) is built normally, since they would be lost.

    Args:
        build: the constructor.
        dtype: of the floating-point tensors.
        directory: of the weights, whose shapes are compared before any memory is allocated.
        single: name of the weights file.

    Raises:
        WeightsError: weights in `directory` that do not fit the module.
    """
    with torch.device("meta"), float32_default():
        module = build()
    if directory is not None:
        _require_shapes(module, directory, single)
    saved = module.state_dict().keys()
    computed = any(name not in saved for name, _ in module.named_buffers())
    attributes = (value for part in module.modules() for value in vars(part).values())
    computed |= any(isinstance(value, Tensor) for value in attributes)
    if computed:
        with float32_default():
            module = build()
    return nn.Module.to(module, dtype)


def _require_shapes(module: nn.Module, directory: Path, single: str) -> list[Path]:
    """The weights files, if their tensors have exactly the names and shapes of the module's."""
    files = weight_files(directory, single)
    sources: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for file in files:
        shapes = tensor_shapes(file)
        problems += [
            f"twice       {name}, again in {file.name}"
            for name in sorted(shapes.keys() & sources.keys())
        ]
        sources.update(shapes)
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    problems += compare(expected, sources)
    if problems:
        raise WeightsError(
            f"{directory}: these weights do not fit the model:\n" + "\n".join(problems)
        )
    return files


def check_layers(values: Any, directory: Path, single: str = SINGLE, label: str = "config") -> None:
    """Compare the numbers of layers of a config with the weights, before a model is built.

    Every layer has at least one tensor, so a config with more layers than the safetensors header
    has tensors is wrong, and building it could take hours and all memory.

    Args:
        values: a config, with any nesting.
        directory: of the weights.
        single: name of the weights file.
        label: of the config in messages.

    Raises:
        WeightsError: naming the entry; or weights that cannot be read.
    """
    count = sum(len(tensor_shapes(file)) for file in weight_files(directory, single))
    require_layers(values, count, f"{directory}: {label}")


def require_layers(values: Any, count: int, label: str) -> None:
    """Raise WeightsError for more layers in a config than the `count` of tensors in the weights."""
    for name, value in _entries(values):
        if LAYERS.fullmatch(name.rpartition(".")[2]) and isinstance(value, int) and value > count:
            raise WeightsError(
                f"{label}: {name}: expected at most {count}, the number of tensors in "
                f"the weights, got {value}: these layers would have no weights"
            )


def tensor_elements(directory: Path, single: str = SINGLE) -> int:
    """The number of elements of all tensors of a directory. Raises WeightsError."""
    files = weight_files(directory, single)
    return sum(math.prod(shape) for file in files for shape in tensor_shapes(file).values())


def require_finite(module: nn.Module, label: str) -> None:
    """Raise WeightsError naming the tensors of a module that hold NaN or infinity."""
    broken = [name for name, value in module.state_dict().items() if not is_finite(value)]
    if broken:
        raise WeightsError(
            f"{label}: expected finite weights, got NaN or infinity in {len(broken)} tensors "
            f"({', '.join(broken[:3])}): every output would be arbitrary"
        )


def require_fitting(report: dict[str, Any], label: str) -> None:
    """Raise WeightsError for tensors that the loading report of `transformers` lists.

    transformers only warns of missing tensors, and fills them at random.
    """
    wrong = {what: sorted(map(str, names)) for what, names in report.items() if names}
    if wrong:
        raise WeightsError(f"{label}: these tensors do not fit the config: {wrong}")


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


def require_floating_point(directory: Path, names: Container[str]) -> None:
    """Raise WeightsError if a tensor of these names is stored as integers, which are rounded."""
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                dtype = opened.get_slice(name).get_dtype()
                if name in names and "F" not in dtype:
                    expected = f"expected floating-point numbers, got {dtype}"
                    raise WeightsError(f"{file}: tensor {name}: {expected}")


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
    """Read a JSON object of a weights directory.

    Raises:
        WeightsError: naming the file; and the entry, if it is one that `check_entries` refuses.
    """
    if path.exists() or path.is_symlink():
        require_regular(path, MAX_CONFIG if "config" in path.name else MAX_FILE)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(values).__name__}")
    check_entries(values, str(path))
    return values


def check_entries(values: Any, label: str) -> None:
    """Check the entries of a config, at any depth.

    Raises:
        WeightsError: an entry that makes a library import code, NaN or infinity, or a number out of
            RANGES; named, with what was expected.
    """
    for name, value in _entries(values):
        path, key = f"{label}: {name}", name.rpartition(".")[2]
        shown = repr(value)[:60]
        if key in CODE_ENTRIES and value:
            raise WeightsError(
                f"{path}: expected no such entry, got {shown}: code of this directory or of the "
                "Hub would be run, and these packages run none"
            )
        parts = name.split(".")
        if any("attn_implementation" in part for part in parts) and (
            not isinstance(value, dict) and (isinstance(value, list) or value not in ATTENTIONS)
        ):
            choices = sorted(str(a) for a in ATTENTIONS)
            raise WeightsError(
                f"{path}: expected one of {choices}, got {shown}: a kernel of the Hub is code"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        unlimited = key in UNLIMITED and value == -math.inf
        if not (unlimited or math.isfinite(value)):
            raise WeightsError(
                f"{path}: expected a finite number, got {value}: every output would be arbitrary"
            )
        for pattern, low, high in RANGES:
            if pattern.fullmatch(key) and not low <= value <= high:
                raise WeightsError(f"{path}: expected a number in {low:g}..{high:g}, got {shown}")


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every entry at any depth; dots join names, items of lists share a name."""
    stack: list[tuple[str, Any]] = [("", values)]
    while stack:
        name, value = stack.pop()
        if name:
            yield name, value
        if isinstance(value, dict):
            stack += [(f"{name}.{k}" if name else str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            stack += [(name, v) for v in value]


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
