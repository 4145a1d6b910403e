"""A trained model as a directory, and back. Plain `transformers` can load it; two more files say what the codes are.

config.json, model.safetensors, tokenizer.json, ...     the LM and its text tokenizer
lavit_lm.json                                           the objective, the visual tokenizer, its codebook's fingerprint
parts.safetensors                                       bridge and regression head, where the objective has them
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from lavit_lm.models.loading import lm_class, sequence_model
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives import by_name
from lavit_lm.objectives.base import Objective
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer, WeightsError

FORMAT, VERSION = "lavit_lm", 1
DEFAULT = Path(__file__).parents[1] / "default"


def save_model(
    out: str | Path,
    model: SequenceModel,
    processor: MultimodalProcessor,
    objective: Objective,
    visual_tokenizer: str,
    fingerprint: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the directory, in the place of an older model if there is one; LoRA weights are merged into the LM's own.

    Raises:
        WeightsError: the directory holds something else.
    """
    from lavit_lm.checkpoints.export import export

    target = Path(out)
    check_free(target)
    out = target.with_name(f".{target.name}.new")
    shutil.rmtree(out, ignore_errors=True)
    export(model.lm, processor.text_tokenizer, out, dtype)
    if tensors := {
        name: t.detach().cpu().to(dtype or t.dtype)
        for name, t in _parts(model).state_dict().items()
    }:
        save_file(tensors, out / "parts.safetensors")
    values = {
        "format": FORMAT,
        "version": VERSION,
        "visual_tokenizer": visual_tokenizer,
        "fingerprint": fingerprint,
        "codebook_size": processor.vocabulary.codebook_size,
        "objective": {"name": objective.name, **objective.settings()},
    }
    (out / "lavit_lm.json").write_text(json.dumps(values, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    out.rename(target)


def check_free(out: str | Path) -> None:
    """Raise WeightsError for a directory that holds anything but an older model: it would be lost."""
    out = Path(out)
    if out.exists() and not (
        out.is_dir() and ((out / "lavit_lm.json").exists() or not any(out.iterdir()))
    ):
        raise WeightsError(
            f"{out}: expected a new or empty directory, or an older model to replace"
        )


def load_model(
    name: str | os.PathLike[str],
    visual_tokenizer: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    objective: Objective | None = None,
) -> tuple[SequenceModel, MultimodalProcessor, VisualTokenizer, Objective]:
    """Read the directory.

    Args:
        name: "default", a directory, or a Hub id.
        visual_tokenizer: where its visual tokenizer is, if not where lavit_lm.json says.
        objective: what it was trained with, if that is none of this library's.

    Raises:
        WeightsError: files or tensors that are missing, unexpected or mis-shaped, or another tokenizer's codebook.
    """
    directory = _directory(name)
    values = _read(directory / "lavit_lm.json")
    visual = VisualTokenizer.from_pretrained(
        visual_tokenizer or values["visual_tokenizer"], dtype=dtype, device=device
    )
    if visual.fingerprint() != values["fingerprint"]:
        raise WeightsError(
            f"{directory}: trained on codes of the codebook {values['fingerprint']}, the visual tokenizer "
            f"{visual_tokenizer or values['visual_tokenizer']!r} has {visual.fingerprint()}: its pictures "
            "would be read and drawn as unrelated ones"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    kind = lm_class(AutoConfig.from_pretrained(directory))
    lm, report = kind.from_pretrained(
        directory, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise WeightsError(
            f"{directory}: tensors do not fit the config, and would be left out or made up: {wrong}"
        )
    objective = objective or _objective(directory, values["objective"])
    model = sequence_model(lm, *objective.parts(visual, lm.config.get_text_config().hidden_size))
    parts, file = _parts(model), directory / "parts.safetensors"
    try:
        parts.load_state_dict(load_file(file) if file.exists() else {})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{file}: {error}") from None
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return model, MultimodalProcessor.from_tokenizer(tokenizer), visual, objective


def _parts(model: SequenceModel) -> nn.ModuleDict:
    """What the model has beside its LM."""
    parts = {"bridge": model.bridge, "regressor": model.regressor}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def _objective(directory: Path, values: Any) -> Objective:
    """The objective and its settings as lavit_lm.json says."""
    settings = {name: value for name, value in values.items() if name != "name"}
    try:
        return by_name(values["name"])(**settings)
    except KeyError:
        raise WeightsError(
            f"{directory}: trained with the objective {values.get('name')!r}, which this library does not have: give "
            "it as objective="
        ) from None
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{directory}/lavit_lm.json: objective {values}: {error}") from None


def _directory(name: str | os.PathLike[str]) -> Path:
    if str(name) == "default":
        return DEFAULT
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
            )
        )
    except Exception as error:  # the hub's errors are of many kinds
        raise WeightsError(
            f"{name}: neither a directory nor a Hub id that can be fetched: {error}"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from None
    wanted = {"visual_tokenizer", "fingerprint", "codebook_size", "objective"}
    missing = wanted - set(values) if isinstance(values, dict) else wanted
    if missing or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise WeightsError(
            f"{path}: expected {FORMAT} version {VERSION}, with {sorted(wanted)}; missing {sorted(missing)}"
        )
    return values
