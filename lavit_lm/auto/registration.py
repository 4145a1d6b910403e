"""Registers LavitConfig and LavitProcessor with AutoConfig and AutoProcessor.

`import lavit_lm` must not import `transformers`, so a class is registered as soon as the module of
its Auto class is imported, or at once if it is already:

    transformers.models.auto.configuration_auto  ->  lavit_lm.auto.configuration_lavit
    transformers.models.auto.processing_auto     ->  lavit_lm.auto.processing_lavit

Other Auto classes read a config first: the first LavitConfig registers the model. Nothing is read
from a model's files for this.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

IMPORTS = {
    "transformers.models.auto.configuration_auto": "lavit_lm.auto.configuration_lavit",
    "transformers.models.auto.processing_auto": "lavit_lm.auto.processing_lavit",
}


class AfterImport(MetaPathFinder):
    """Lets modules be imported as usual, then imports another after each.

    Args:
        imports: the name of a module -> that of the one to import after it. When all are imported,
            the finder leaves sys.meta_path.
    """

    def __init__(self, imports: dict[str, str]) -> None:
        self.imports = dict(imports)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The spec of other finders, whose loader then imports the other module, or None."""
        name = self.imports.pop(fullname, None)
        if name is None:
            return None
        if not self.imports:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now what can be, and the rest when `transformers` is imported."""
    later = {module: name for module, name in IMPORTS.items() if module not in sys.modules}
    if later:
        sys.meta_path.insert(0, AfterImport(later))
    for module in IMPORTS.keys() - later.keys():
        import_module(IMPORTS[module])
