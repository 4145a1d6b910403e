"""Checkpoints are whole, and it is defined from which one a run resumes."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.files import limited
from pytorch_lightning.callbacks import ModelCheckpoint

from lavit_tok.cli.training import SaveCheckpoints
from lavit_tok.training.checkpoints import (
    AtomicCheckpointIO,
    CheckpointError,
    damage,
    find_checkpoint,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """step=1, step=2, last (as new as step=2), then last-v1, each a second after the one before."""
    for second, name in enumerate(("step=1", "step=2", "last", "last-v1")):
        path = tmp_path / f"{name}.ckpt"
        AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(1000.0), "name": name}, path)
        os.utime(path, (second, second))
    return tmp_path


def test_the_newest_last_checkpoint_is_resumed_from(folder: Path) -> None:
    assert find_checkpoint("last", folder) == str(folder / "last-v1.ckpt")
    os.utime(folder / "last.ckpt", (9, 9))
    assert find_checkpoint("last", folder) == str(folder / "last.ckpt")
    assert find_checkpoint("last-good", folder) == str(folder / "last.ckpt")
    assert find_checkpoint("last", folder / "new") == find_checkpoint("last-good", None) == "last"


@pytest.mark.parametrize("how", ["truncated", "a bit", "empty"])
def test_damaged_checkpoints(folder: Path, how: str) -> None:
    path = folder / "last-v1.ckpt"
    data = bytearray(path.read_bytes())
    if how == "a bit":
        at = data.index(torch.arange(1000.0).numpy().tobytes())
        data[at + 100] ^= 1
    path.write_bytes({"truncated": data[: len(data) // 2], "a bit": data, "empty": b""}[how])
    os.utime(path, (3, 3))
    with pytest.raises(CheckpointError, match=r"not a whole .*/last\.ckpt, from"):
        find_checkpoint("last", folder)
    with pytest.raises(CheckpointError, match=r"/last.ckpt, from which --ckpt_path last-good"):
        find_checkpoint(str(path), None)
    assert find_checkpoint("last-good", folder) == str(folder / "last.ckpt")
    for other in folder.glob("*.ckpt"):
        other.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other is whole"):
        find_checkpoint("last-good", folder)


def test_a_failed_save_leaves_the_checkpoint_before(folder: Path) -> None:
    class Unwritable:
        def __reduce__(self) -> str:
            raise OSError("full")

    path = folder / "last.ckpt"
    before = path.read_bytes()
    (folder / ".last.ckpt.999999999.part").write_bytes(b"of a killed run")
    with pytest.raises(OSError, match="full"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.ones(9), "b": Unwritable()}, path)
    assert path.read_bytes() == before and damage(path) is None
    assert not list(folder.glob(".*"))


def test_a_full_disk_is_one_error_that_names_the_file(folder: Path) -> None:
    before = (path := folder / "last.ckpt").read_bytes()
    message = r"last\.ckpt: not written \(is the disk full\?\)"
    with limited(resource.RLIMIT_FSIZE, 2000), pytest.raises(OSError, match=message):
        AtomicCheckpointIO().save_checkpoint({"a": torch.ones(9000)}, path)
    assert path.read_bytes() == before and not list(folder.glob("*.part"))


def test_a_distributed_checkpoint_is_whole_with_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that are written at the end; they are removed before it is written again."""
    path = tmp_path / "last.ckpt"
    path.mkdir()
    for name in (".metadata", "meta.pt"):
        assert damage(path) == f"it has no {name}"
        (path / name).touch()
    assert damage(path) is None
    trainer: Any = SimpleNamespace(is_global_zero=True)
    found = []
    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", lambda *_: found.append(damage(path)))
    SaveCheckpoints(str(tmp_path))._save_checkpoint(trainer, str(path))
    assert found == ["it has no .metadata"]
