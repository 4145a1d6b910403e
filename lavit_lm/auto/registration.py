"""Registers the classes of this folder with the Auto classes of `transformers`.

`import lavit_lm` imports neither torch nor `transformers`. A module of this folder registers its
class when it is imported, which happens as soon as the module of the Auto class has been imported,
or at once if it has been already. Nothing is read from a model's files for this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AUTO, HERE = "transformers.models.auto.", "lavit_lm.auto."
IMPORTS = {
    f"{AUTO}configuration_auto": f"{HERE}configuration_lavit",
    f"{AUTO}modeling_auto": f"{HERE}modeling_lavit",
    f"{AUTO}image_processing_auto": f"{HERE}image_processing_lavit",
    f"{AUTO}processing_auto": f"{HERE}processing_lavit",
}


class AfterImport(MetaPathFinder):
    """Lets modules be imported as usual, then imports another after each.

    Args:
        imports: the name of a module -> that of the one to import after it.
    """

    def __init__(self, imports: dict[str, str]) -> None:
        self.imports = dict(imports)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of other finders, whose loader then imports the other module, or None."""
        name = self.imports.pop(fullname, None)
        spec = None if name is None else find_spec(fullname)
        if name is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now what can be, and the rest when `transformers` is imported."""
    sys.meta_path.insert(0, AfterImport({k: v for k, v in IMPORTS.items() if k not in sys.modules}))
    for name, ours in IMPORTS.items():
        if name in sys.modules:
            import_module(ours)
