"""Files that tests change, and limits of this process under which they are written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a safetensors file; other libraries read the format."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """Under a limit of `resource`; RLIMIT_FSIZE fails as a full disk does."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
