"""Imports of other packages that conftest.py needs before those of the two packages.

While a module of the two packages is imported, jaxtyping's option looks for bytecode under names of
its own, so that whatever that module imports would be compiled again: 6 s of torch's compiler and
of `transformers` in each process.
"""

from __future__ import annotations

import os
from importlib import import_module

NAMES = ["transformers.modeling_utils", "transformers.processing_utils"]
if "PYTEST_XDIST_WORKER" in os.environ:  # which imports these anyway
    NAMES += ["pytorch_lightning.cli", "diffusers.pipelines.pipeline_utils"]
    NAMES += ["diffusers.models.resnet", "diffusers.training_utils"]
for name in NAMES:
    import_module(name)
