"""A trained model as a directory, whose LM and text tokenizer `transformers` alone can load.

config.json, model.safetensors, tokenizer.json, ...     the LM and its text tokenizer
lavit_lm.json                                           objective, visual tokenizer, fingerprint
objective_modules.safetensors                           bridge and regression head, if there are any
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import PROCESSOR_NAME

from lavit_lm.checkpoints.export import export
from lavit_lm.models.loading import FILES, open_lm, open_text_tokenizer, sequence_model
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives import by_name
from lavit_lm.objectives.base import Objective
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VocabularyError
from lavit_tok import VisualTokenizer, WeightsError
from lavit_tok.checkpoints.weights import (
    check_layers,
    check_replaceable,
    codebook_remedy,
    empty,
    find_directory,
    load_weights,
    read_header,
    require_fitting,
    save_weights,
)

FORMAT, VERSION = "lavit_lm", 1
CONFIG, MODULES = "lavit_lm.json", "objective_modules.safetensors"
KEYS = ("visual_tokenizer", "fingerprint", "codebook_size", "objective")
DEFAULT = Path(__file__).parents[1] / "default"


def save_model(
    out: str | os.PathLike[str],
    model: SequenceModel,
    processor: MultimodalProcessor,
    objective: Objective,
    visual_tokenizer: str,
    fingerprint: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's directory, replacing an older model; LoRA weights are merged into the LM's.

    Args:
        out: the directory.
        model: the LM, with its bridge and regression head.
        processor: its text tokenizer and visual vocabulary.
        objective: the objective of its training.
        visual_tokenizer: "default", a directory or a Hub id, from which it is loaded again.
        fingerprint: of the visual tokenizer's codebook, checked on loading.
        dtype: of the floats in the files; None for the model's own.

    Raises:
        WeightsError: the directory contains something else.
        ExportError: see export.
    """
    target = Path(out)
    check_replaceable(target, CONFIG)
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    export(model.lm, processor.text_tokenizer, new, dtype)
    modules = _objective_modules(model)
    if modules.state_dict():
        save_weights(modules, new, dtype, single=MODULES)
    values = {
        "format": FORMAT,
        "version": VERSION,
        "visual_tokenizer": visual_tokenizer,
        "fingerprint": fingerprint,
        "codebook_size": processor.vocabulary.codebook_size,
        "objective": {"name": objective.name, **objective.to_dict()},
    }
    (new / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def load_model(
    name: str | os.PathLike[str],
    visual_tokenizer: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    objective: Objective | None = None,
) -> tuple[SequenceModel, MultimodalProcessor, VisualTokenizer, Objective]:
    """Load a model's directory.

    Args:
        name: "default", a directory, or a Hub id.
        visual_tokenizer: replaces the one that lavit_lm.json names; its codebook must be the same.
        dtype: of the weights in memory.
        device: of the model and the visual tokenizer.
        objective: the objective of the training, if it is not one of this library's.

    Raises:
        WeightsError: files or tensors that are missing, unexpected or of another shape, or a visual
            tokenizer with another codebook.
    """
    directory = find_directory(name, DEFAULT, FILES)
    file = directory / CONFIG
    if not file.exists() and (directory / PROCESSOR_NAME).exists():  # written by auto/
        file = directory / PROCESSOR_NAME
    values = read_header(file, FORMAT, VERSION, KEYS)
    source = visual_tokenizer or values["visual_tokenizer"]
    if not isinstance(source, str | os.PathLike):
        raise WeightsError(
            f"{directory / CONFIG}: visual_tokenizer: expected 'default', a directory or a Hub id, "
            f"got {source!r}"
        )
    visual = VisualTokenizer.from_pretrained(source, dtype=dtype, device=device)
    if visual.fingerprint() != values["fingerprint"]:
        raise WeightsError(
            f"{directory}: trained on codes of the codebook {values['fingerprint']}, the visual "
            f"tokenizer {source!r} has {visual.fingerprint()}: codes would be of unrelated images"
            f"{codebook_remedy(values['fingerprint'])}"
        )
    objective = objective or _objective(directory, values["objective"])
    processor = _processor(directory, values["codebook_size"], visual)
    parts = objective.connectors
    has_modules = bool(parts.bridge or parts.regressor or (directory / MODULES).exists())
    if has_modules:
        check_layers(values["objective"], directory, MODULES, CONFIG)
    lm, report = open_lm(directory, dtype)
    require_fitting(report, str(directory))
    lm = lm.language_model if lm.config.model_type == "lavit" else lm
    embeddings = lm.get_input_embeddings().weight.shape[0]
    if embeddings < processor.vocabulary.stop:
        raise WeightsError(
            f"{directory}: expected embeddings of all {processor.vocabulary.stop} ids of "
            f"tokenizer.json, got {embeddings}: the last codes could not be read"
        )
    width = lm.config.get_text_config().hidden_size
    if has_modules:

        def build() -> nn.ModuleDict:
            return _modules(*objective.connectors.build(visual, width))

        empty(build, dtype, directory, MODULES)  # the shapes, before memory is allocated
    restricted = processor.vocabulary if objective.restricted_softmax else None
    model = sequence_model(lm, *objective.connectors.build(visual, width), restricted)
    modules = _objective_modules(model)
    if has_modules:
        load_weights(modules, directory, MODULES)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return model, processor, visual, objective


def is_model(name: str | os.PathLike[str]) -> bool:
    """Whether a directory or Hub id holds a model that save_model wrote. Raises WeightsError."""
    return str(name) != "default" and (find_directory(name, None, FILES) / CONFIG).is_file()


def load_connectors(
    directory: Path, objective: Objective, bridge: nn.Module | None, regressor: nn.Module | None
) -> None:
    """Load the bridge and regression head of a trained model, to go on training it.

    They are left as they are if the directory has none, or those of another objective.

    Raises:
        WeightsError: tensors that are missing, unexpected or of another shape.
    """
    if not (directory / MODULES).exists():
        return
    values = read_header(directory / CONFIG, FORMAT, VERSION, KEYS)
    if values["objective"].get("name") == objective.name:
        load_weights(_modules(bridge, regressor), directory, MODULES)


def _processor(directory: Path, stated: Any, visual: VisualTokenizer) -> MultimodalProcessor:
    """The processor of the directory's text tokenizer, if all three have the same codebook."""
    processor = MultimodalProcessor.from_tokenizer(open_text_tokenizer(directory))
    codebook_size = visual.config.codebook_size
    sizes = {
        f"codebook_size of {CONFIG}": stated,
        "the number of codes in tokenizer.json": processor.vocabulary.codebook_size,
    }
    for name, size in sizes.items():
        if type(size) is not int or size != codebook_size:
            raise WeightsError(
                f"{directory}: {name}: expected {codebook_size}, as the visual tokenizer has, got "
                f"{size!r}: ids would be of other codes, or codes without ids"
            )
    try:
        processor.vocabulary.require_stages(visual.stages)
    except VocabularyError as error:
        raise WeightsError(f"{directory}: tokenizer.json: {error}") from None
    return processor


def _objective_modules(model: SequenceModel) -> nn.ModuleDict:
    """The modules of the model beside its LM."""
    return _modules(model.bridge, model.regressor)


def _modules(bridge: nn.Module | None, regressor: nn.Module | None) -> nn.ModuleDict:
    modules = {"bridge": bridge, "regressor": regressor}
    return nn.ModuleDict({name: m for name, m in modules.items() if m is not None})


def _objective(directory: Path, values: Any) -> Objective:
    """The objective with the arguments in lavit_lm.json."""
    try:
        arguments = {name: value for name, value in values.items() if name != "name"}
        return by_name(values["name"])(**arguments)
    except KeyError:
        raise WeightsError(
            f"{directory / CONFIG}: the objective {values.get('name')!r} is not one of this "
            "library's: pass it as objective="
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{directory / CONFIG}: objective {values}: {error}") from None
