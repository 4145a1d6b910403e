"""A run that was killed goes on where it was: finished parts lie beside the results until the result is written.

    out/.NAME-KEY/settings.json            what this run is: command line, tokenizer, pictures, versions, code
    out/.NAME-KEY/features-00003.safetensors    one finished part: tensors, and values as JSON in the file's metadata
    out/NAME.json                          the result; the folder is then removed
    out/NAME-KEY/                          what is worth keeping lies in the open, and stays

KEY is a hash of the settings. Another tokenizer, other pictures, other code: another folder, so that no two runs are
ever mixed. A part is written under another name and then renamed, so that a half-written one is never read. What a
part computes must depend on its name and the settings alone, never on the parts before it: a resumed run then gives the
very numbers of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

T = TypeVar("T")


def pixels_digest(pixels: Tensor) -> str:
    """12 hexadecimal digits of uint8 pictures."""
    return hashlib.sha256(pixels.contiguous().numpy()).hexdigest()[:12]


class Parts:
    """The finished parts of one run.

    Args:
        out: folder of the results.
        name: of the result file.
        settings: everything that the numbers depend on, as JSON can hold it.
        kept: what lies in the folder is part of the result, so it is not hidden.
    """

    def __init__(self, out: Path, name: str, settings: dict[str, Any], kept: bool = False) -> None:
        text = json.dumps(settings, sort_keys=True, indent=2, default=str)
        self.folder = (
            Path(out)
            / f"{'' if kept else '.'}{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        there = len(list(self.folder.glob("*.safetensors")))
        if there:
            print(f"{name}: went on from {there} finished parts", flush=True)
        (self.folder / "settings.json").write_text(text + "\n")
        self.reused = 0

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """compute()'s tensors, from the finished part of that name if there is one."""
        return self._part(name, lambda: (compute(), None))[0]

    def values(self, name: str, compute: Callable[[], Any]) -> Any:
        """compute()'s values, which JSON can hold, likewise."""
        return self._part(name, lambda: ({"none": torch.zeros(1)}, compute()))[1]

    def _part(
        self, name: str, compute: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            self.reused += 1
        else:
            tensors, values = compute()
            held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            unfinished = path.with_suffix(".unfinished")
            save_file(held, unfinished, {"values": json.dumps(values)})
            os.replace(unfinished, path)
        # Read back even when just computed, so that a resumed run and this one go through the same numbers.
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}, json.loads(
                file.metadata()["values"]
            )

    def done(self) -> None:
        """The result is written: the parts have served."""
        shutil.rmtree(self.folder)


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several parts, one after another."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on stderr if somebody is looking at it."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False, dynamic_ncols=True)


def write_whole(file: Path, content: bytes) -> None:
    """The file is there as a whole, or not at all."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_bytes(content)
    os.replace(draft, file)


def digest(*things: Any) -> str:
    """Of modules by their weights, of pipelines and other objects by their modules, of plain values by their JSON."""
    total = hashlib.blake2b(digest_size=8)
    for thing in things:
        if isinstance(thing, nn.Module):
            for name, tensor in sorted(thing.state_dict().items()):
                total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                total.update(
                    tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
        elif thing is None or isinstance(thing, (str, int, float, list, tuple, dict)):
            total.update(json.dumps(thing, sort_keys=True).encode())
        else:
            held = getattr(thing, "components", None) or vars(thing)
            modules = {k: v for k, v in held.items() if isinstance(v, nn.Module)}
            total.update(
                digest(type(thing).__name__, *(modules[k] for k in sorted(modules))).encode()
            )
    return total.hexdigest()


def seeded(*what: Any) -> torch.Generator:
    """A generator of its own for each (seed, item, sample), whatever is drawn before or beside it."""
    number = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest()) >> 1
    return torch.Generator().manual_seed(number)
