"""Training checkpoints: written whole or not at all, and checked before a run resumes from one."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lavit_tok.checkpoints.files import atomic, remove_partials

WRITTEN_LAST = ".metadata", "meta.pt"
"""In a checkpoint that is a directory of parts, the files that are written at the end."""


class CheckpointError(ValueError):
    """A checkpoint that is not whole."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to disk beside its final name, then renames it.

    Lightning moves it from the system's temporary folder: a copy, if that is another file system,
    of which a kill leaves a part under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save; a URL is left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remove_partials(Path(path).parent)
        with atomic(Path(path)) as partial:
            try:
                torch.save(checkpoint, partial)
            except RuntimeError as error:  # so torch reports a write that failed
                if "inline_container" not in str(error):
                    raise
                reason = str(error).splitlines()[0]
                raise OSError(f"{path}: not written (is the disk full?): {reason}") from error
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())


def find_checkpoint(name: str, folder: str | Path | None) -> str:
    """The checkpoint that `--ckpt_path` names, checked.

    Args:
        name: "last" is the most recently written of last.ckpt, last-v1.ckpt, ... (of which the
            latter are of runs that did not resume); "last-good" the most recently written whole
            checkpoint of any name; or a path.
        folder: of the checkpoints; None if only Lightning knows it.

    Returns:
        A path; "last", if there is no checkpoint yet.

    Raises:
        CheckpointError: a checkpoint that is not whole, naming the newest one that is.
    """
    if name not in ("last", "last-good"):
        path = Path(name)
        if path.exists():
            _require_whole(path)
        return name
    pattern = "last*.ckpt" if name == "last" else "*.ckpt"
    found = _newest_first(Path(folder), pattern) if folder else []
    if not found:
        return "last"
    whole = (path for path in found if not damage(path))
    path = found[0] if name == "last" else next(whole, found[0])
    _require_whole(path)
    if len(found) > 1:
        others = ", ".join(other.name for other in found if other != path)
        rank_zero_info(f"--ckpt_path {name}: {path}, not {others}")
    return str(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole: a zip archive with right checksums."""
    if path.is_dir():  # of a strategy that saves in parts
        missing = [name for name in WRITTEN_LAST if not (path / name).is_file()]
        return f"it has no {missing[0]}" if missing else None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return str(error)
    return part and f"the checksum of {part} differs"


def _require_whole(path: Path) -> None:
    if reason := damage(path):
        others = _newest_first(path.parent, "*.ckpt")
        whole = next((other for other in others if not damage(other)), None)
        advice = (
            f"the newest whole one is {whole}, from which --ckpt_path last-good resumes"
            if whole
            else "and no other is whole; without --ckpt_path the training starts anew"
        )
        raise CheckpointError(f"{path}: not a whole checkpoint ({reason}): {advice}")


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    def written(path: Path) -> tuple[int, int]:
        version = re.search(r"-v(\d+)$", path.stem)
        return path.stat().st_mtime_ns, int(version[1]) if version else 0

    return sorted(folder.glob(pattern), key=written, reverse=True)
