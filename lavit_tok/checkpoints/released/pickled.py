"""Files of pickled tensors (`.bin`), as older releases ship them: read without running anything, a tensor at a time.

`torch.load(weights_only=True)` builds tensors and plain containers; a pickle that asks for anything else is refused.
Files are mapped, not read: only tensors that are taken come from disk. Mapped pages count as memory of the process
until the mapping goes, so the files are mapped anew whenever MAPPED bytes, or a small share of them, have been taken.
"""

from __future__ import annotations

import fnmatch
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavit_tok.checkpoints.weights import MAPPED, MAPPED_SHARE, WeightsError, compare, is_finite

Shape = tuple[int, ...]


class PickledTensors:
    """Named tensors of one file, or of the shards of one model.

    Args:
        paths: files that torch.save wrote; those from before torch 1.6 cannot be mapped and are read whole.
        label: how messages call them.
        rename: name in a file -> name to use for it. A file of one tensor without a name gives it the name "tensor".

    Raises:
        WeightsError: absent, damaged, wanting to run code, or holding something else than named dense tensors.
    """

    def __init__(
        self, paths: Sequence[Path], label: str, rename: Callable[[str], str] = str
    ) -> None:
        self.paths, self.label, self.rename = list(paths), label, rename
        self._mapped = all(zipfile.is_zipfile(path) for path in paths)
        self._tensors = self._open()
        self._taken = 0
        self._most = max(MAPPED, sum(path.stat().st_size for path in paths) // MAPPED_SHARE)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def take(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype. Copy it at once: holding it keeps the whole mapping alive."""
        if not self._tensors[name].is_floating_point():
            raise WeightsError(
                f"{self.label}: {name}: expected floats, got {self._tensors[name].dtype}"
            )
        size = self._tensors[name].nbytes
        if self._mapped and self._taken and self._taken + size > self._most:
            self._tensors, self._taken = {}, 0  # the old mapping goes before the new one comes
            self._tensors = self._open()
        self._taken += size
        return self._tensors[name]

    def close(self) -> None:
        """Forget the tensors, and with them the mapping."""
        self._tensors = {}

    def _open(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in self.paths:
            loaded = load_pickled(path, self.label, self._mapped)
            values = {"tensor": loaded} if isinstance(loaded, Tensor) else loaded
            if not isinstance(values, dict):
                raise WeightsError(
                    f"{self.label}: expected a dict of named tensors, got {type(loaded).__name__}"
                )
            bad = [
                f"{str(name)[:80]!r}: {_flaw(name, v)}"
                for name, v in values.items()
                if _flaw(name, v)
            ]
            named = {} if bad else {self.rename(name): value for name, value in values.items()}
            bad += [f"{name!r}: stored twice" for name in named if name in tensors]
            if bad or len(named) < len(values):
                raise WeightsError(
                    f"{self.label}: expected named dense tensors: " + "; ".join(bad[:20])
                )
            tensors.update(named)
        return tensors


def load_pickled(path: Path, label: str, mapped: bool) -> Any:
    """torch.load that can only build tensors and containers. Raises WeightsError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # Only the reason: torch's own message goes on to advise weights_only=False, which would run the file.
        reason = (
            str(error).partition("WeightsUnpickler error:")[2].strip().split("\n")[0][:200]
            or "no pickled tensors"
        )
        raise WeightsError(
            f"{label}: refused, nothing of it was run: it asks for more than tensors, or is damaged ({reason})"
        ) from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise WeightsError(f"{label}: not a whole file of tensors: {str(error)[:200]}") from None


def _flaw(name: Any, value: Any) -> str:
    """Why this is not a named dense tensor with all the bytes that its shape promises; "" if it is."""
    if not isinstance(name, str):
        return "no name of a tensor"
    if not isinstance(value, Tensor):
        return f"got {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized:
        return "sparse or quantised"
    if value.nbytes > value.untyped_storage().nbytes():  # a stride of 0 can promise terabytes
        return f"{value.nbytes} bytes by its shape, {value.untyped_storage().nbytes()} stored"
    return ""


@dataclass(frozen=True)
class TensorRecipe:
    """How one of our tensors is made of a file's tensors.

    Written   "a"        the tensor a
              "a[k]"     the k-th third of its rows (query, key, value of a fused projection)
              "a[None]"  stored with a leading dimension of one, which goes
              "a 0 b"    a, as many zeros, b, one after another
    """

    names: tuple[str, ...]
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> TensorRecipe:
        match = re.fullmatch(r"(.*?)(?:\[(\w+)\])?", text)
        assert match is not None  # every text matches
        return cls(tuple(match[1].split(" ")), match[2] or "")

    def shape_in_file(self, shape: Shape) -> Shape:
        """The shape that each named tensor must have for one of ours to have this shape."""
        if self.part == "None":
            return (1, *shape)
        return (
            (3 * shape[0], *shape[1:]) if self.part else (shape[0] // len(self.names), *shape[1:])
        )

    def read(self, file: PickledTensors, target: Tensor) -> None:
        """Fill a tensor, converting to its dtype."""
        if len(self.names) > 1:
            for slot, name in zip(target.chunk(len(self.names)), self.names, strict=True):
                slot.zero_() if name == "0" else slot.copy_(file.take(name))
        elif self.part == "None":
            target.copy_(file.take(self.names[0])[0])
        elif self.part:
            target.copy_(file.take(self.names[0]).chunk(3)[int(self.part)])
        else:
            target.copy_(file.take(self.names[0]))


def expand(
    table: Mapping[str, str], depth: int, ours: str = "", theirs: str = ""
) -> dict[str, TensorRecipe]:
    """A table of names, written out: `#` for each of `depth` blocks, `.*` for weight and bias, prefixes before both."""
    sources: dict[str, TensorRecipe] = {}
    for our_pattern, their_pattern in table.items():
        for number in range(depth if "#" in our_pattern else 1):
            for leaf in (".weight", ".bias") if our_pattern.endswith(".*") else ("",):
                our, their = (
                    p.replace("#", str(number)).replace(".*", leaf)
                    for p in (our_pattern, their_pattern)
                )
                source = TensorRecipe.parse(their)
                names = tuple(name if name == "0" else theirs + name for name in source.names)
                sources[ours + our] = TensorRecipe(names, source.part)
    return sources


@dataclass
class FileMapping:
    """A file, and which of our tensors it fills.

    Args:
        sources: our name -> how it is made.
        dropped: patterns (fnmatch) of tensors that may be in the file and are not used.
    """

    file: PickledTensors
    sources: dict[str, TensorRecipe]
    dropped: tuple[str, ...] = ()

    def problems(self, ours: Mapping[str, Tensor]) -> list[str]:
        """Tensors of the file that are missing, unexpected or of another shape, a line each; `ours` may be on meta."""
        expected: dict[str, Shape] = {}
        for name, source in self.sources.items():
            shape = source.shape_in_file(tuple(ours[name].shape))
            expected.update({theirs: shape for theirs in source.names if theirs != "0"})
        got = {
            k: v
            for k, v in self.file.shapes.items()
            if not any(fnmatch.fnmatchcase(k, d) for d in self.dropped)
        }
        return [f"{self.file.label}: {line}" for line in compare(expected, got)]

    def read(self, ours: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """Our tensors, in the dtypes of `ours`, on `device`; the file is closed after. WeightsError for NaN."""
        filled: dict[str, Tensor] = {}
        for name, source in self.sources.items():
            filled[name] = torch.empty(ours[name].shape, dtype=ours[name].dtype, device=device)
            source.read(self.file, filled[name])
            if not is_finite(filled[name]):
                as_what = str(filled[name].dtype).removeprefix("torch.")
                theirs = " ".join(source.names)
                raise WeightsError(
                    f"{self.file.label}: {theirs} holds NaN or infinity as {as_what}"
                )
        self.file.close()
        return filled
