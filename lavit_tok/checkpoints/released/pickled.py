"""Files of pickled tensors (`.bin`), as in older releases: read tensor by tensor, running nothing.

`torch.load(weights_only=True)` builds tensors and plain containers; any other pickle is refused.
Files are memory-mapped, so that only the tensors used are read. Mapped pages count as memory of the
process until the mapping is dropped, so files are mapped anew after MAPPED bytes or a fraction of
them.
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

from lavit_tok.checkpoints.weights import MAPPED, MAPPED_PARTS, WeightsError, compare, is_finite

Shape = tuple[int, ...]


class PickledTensors:
    """Named tensors of one file, or of the shards of one model.

    Args:
        paths: files written by torch.save; those from before torch 1.6 cannot be mapped.
        label: their name in messages.
        rename: name in a file -> name to use. A file of one unnamed tensor names it "tensor".

    Raises:
        WeightsError: absent or damaged files, or anything but named dense tensors.
    """

    def __init__(
        self, paths: Sequence[Path], label: str, rename: Callable[[str], str] = str
    ) -> None:
        self.paths, self.label, self.rename = list(paths), label, rename
        self._mapped = all(zipfile.is_zipfile(path) for path in paths)
        self._tensors = self._open()
        self._taken = 0
        self._most = max(MAPPED, sum(path.stat().st_size for path in paths) // MAPPED_PARTS)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor."""
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def take(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype.

        To be copied at once: a reference keeps the whole mapping alive.

        Raises:
            WeightsError: a tensor that is not of floats.
        """
        dtype = self._tensors[name].dtype
        if not dtype.is_floating_point:
            raise WeightsError(f"{self.label}: {name}: expected floats, got {dtype}")
        size = self._tensors[name].nbytes
        if self._mapped and self._taken and self._taken + size > self._most:
            self._tensors, self._taken = {}, 0  # drop the old mapping before making the new one
            self._tensors = self._open()
        self._taken += size
        return self._tensors[name]

    def close(self) -> None:
        """Drop the tensors, and with them the mapping."""
        self._tensors = {}

    def _open(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in self.paths:
            loaded = load_pickled(path, self.label, self._mapped)
            values = {"tensor": loaded} if isinstance(loaded, Tensor) else loaded
            if not isinstance(values, dict):
                got = type(loaded).__name__
                raise WeightsError(f"{self.label}: expected a dict of named tensors, got {got}")
            bad = [
                f"{str(name)[:80]!r}: {flaw}"
                for name, v in values.items()
                if (flaw := _flaw(name, v))
            ]
            named = {} if bad else {self.rename(name): value for name, value in values.items()}
            bad += [f"{name!r}: stored twice" for name in named if name in tensors]
            if bad or len(named) < len(values):
                expected = "expected named dense tensors"
                raise WeightsError(f"{self.label}: {expected}: " + "; ".join(bad[:20]))
            tensors.update(named)
        return tensors


def load_pickled(path: Path, label: str, mapped: bool) -> Any:
    """torch.load for tensors and containers only. Raises WeightsError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # Only the reason: torch's message also recommends weights_only=False, which would run code.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().split("\n")[0][:200]
        raise WeightsError(
            f"{label}: refused, no code was run: it contains more than tensors, or is damaged "
            f"({reason or 'no pickled tensors'})"
        ) from None
    except Exception as error:
        raise WeightsError(f"{label}: not a complete file of tensors: {str(error)[:200]}") from None


def _flaw(name: Any, value: Any) -> str:
    """Why this is no named dense tensor with all the bytes of its shape; "" if it is one."""
    if not isinstance(name, str):
        return "not the name of a tensor"
    if not isinstance(value, Tensor):
        return f"got {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized:
        return "sparse or quantized"
    if value.nbytes > value.untyped_storage().nbytes():  # with stride 0
        return f"{value.nbytes} bytes by its shape, {value.untyped_storage().nbytes()} stored"
    return ""


@dataclass(frozen=True)
class TensorRecipe:
    """How one of our tensors is built from a file's tensors.

    Written   "a"        the tensor a
              "a[k]"     its k-th third (query, key, value of a fused projection)
              "a[None]"  stored with a leading dimension of 1, which is removed
              "a 0 b"    a, as many zeros, and b, concatenated
    """

    names: tuple[str, ...]
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> TensorRecipe:
        """Parse the notation of the class docstring."""
        match = re.fullmatch(r"(.*?)(?:\[(\w+)\])?", text)
        assert match is not None  # every text matches
        return cls(tuple(match[1].split(" ")), match[2] or "")

    def shape_in_file(self, shape: Shape) -> Shape:
        """The shape of each named tensor if ours has this shape."""
        if self.part == "None":
            return (1, *shape)
        length = 3 * shape[0] if self.part else shape[0] // len(self.names)
        return (length, *shape[1:])

    def read(self, file: PickledTensors, target: Tensor) -> None:
        """Fill the target, converting to its dtype."""
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
    """Expand a table of names: `#` to each of `depth` blocks, `.*` to weight and bias.

    `ours` and `theirs` are prefixes of the names.
    """
    recipes: dict[str, TensorRecipe] = {}
    for our_pattern, their_pattern in table.items():
        for number in range(depth if "#" in our_pattern else 1):
            for leaf in (".weight", ".bias") if our_pattern.endswith(".*") else ("",):
                our, their = (
                    p.replace("#", str(number)).replace(".*", leaf)
                    for p in (our_pattern, their_pattern)
                )
                recipe = TensorRecipe.parse(their)
                names = tuple(name if name == "0" else theirs + name for name in recipe.names)
                recipes[ours + our] = TensorRecipe(names, recipe.part)
    return recipes


@dataclass
class FileMapping:
    """A file, and the tensors of ours that it fills.

    Args:
        file: the file.
        recipes: our name -> how it is built.
        dropped: patterns (fnmatch) of tensors that may be in the file and are not used.
    """

    file: PickledTensors
    recipes: dict[str, TensorRecipe]
    dropped: tuple[str, ...] = ()

    def problems(self, ours: Mapping[str, Tensor]) -> list[str]:
        """Missing, unexpected and mis-shaped tensors, one per line; `ours` may be on meta."""
        expected: dict[str, Shape] = {}
        for name, recipe in self.recipes.items():
            shape = recipe.shape_in_file(tuple(ours[name].shape))
            expected.update({theirs: shape for theirs in recipe.names if theirs != "0"})
        got = {
            k: v
            for k, v in self.file.shapes.items()
            if not any(fnmatch.fnmatchcase(k, d) for d in self.dropped)
        }
        return [f"{self.file.label}: {line}" for line in compare(expected, got)]

    def read(self, ours: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """Read our tensors, in the dtypes of `ours`, and close the file.

        Raises:
            WeightsError: NaN or infinity.
        """
        filled: dict[str, Tensor] = {}
        for name, recipe in self.recipes.items():
            filled[name] = torch.empty(ours[name].shape, dtype=ours[name].dtype, device=device)
            recipe.read(self.file, filled[name])
            if not is_finite(filled[name]):
                dtype = str(filled[name].dtype).removeprefix("torch.")
                label = f"{self.file.label}: {' '.join(recipe.names)}"
                raise WeightsError(f"{label} holds NaN or infinity as {dtype}")
        self.file.close()
        return filled
