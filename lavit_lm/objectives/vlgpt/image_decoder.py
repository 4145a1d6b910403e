"""VL-GPT's tokenizer and detokenizer as a directory, and what is made of one.

config.json                 sizes, the visual tokenizer and its codebook's fingerprint, the diffusion model
tokenizer.safetensors       read before a language model is trained
detokenizer.safetensors     read to draw what it says
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavit_lm.objectives.vlgpt.condition_kinds import load_conditions
from lavit_lm.objectives.vlgpt.detokenizer import (
    ContinuousTokenizer,
    Detokenizer,
    VLGPTTokenizerConfig,
)
from lavit_lm.vision.resampler import CausalResampler
from lavit_tok import VisualTokenizer, WeightsError

FORMAT, VERSION = "lavit_lm.vlgpt_tokenizer", 1


def save_tokenizer(
    out: str | os.PathLike[str],
    model: ContinuousTokenizer,
    visual_tokenizer: str,
    conditions: dict[str, Any],
    learnt: Sequence[str] = ("image", "text"),
) -> None:
    """Write the directory.

    Args:
        visual_tokenizer: where the visual tokenizer is, whose features the model reads.
        conditions: settings of the diffusion model's, see load_conditions.
        learnt: which of them were learnt; nothing is drawn from the others.

    Raises:
        WeightsError: the directory holds something else.
    """
    out = Path(out)
    check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "detokenizer"):
        state = {
            key: t.detach().cpu().contiguous()
            for key, t in getattr(model, name).state_dict().items()
        }
        save_file(state, out / f"{name}.safetensors")
    image, text = model.conditions
    values = {"format": FORMAT, "version": VERSION, "visual_tokenizer": visual_tokenizer}
    values |= {
        "fingerprint": model.fingerprint,
        "shape": asdict(model.shape),
        "image": image,
        "text": text,
    }
    values |= {"conditions": conditions, "learnt": list(learnt)}
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def check_free(out: str | os.PathLike[str]) -> None:
    """Raise WeightsError for a directory that holds anything but an older tokenizer."""
    out = Path(out)
    if out.exists() and not (
        out.is_dir() and ((out / "detokenizer.safetensors").exists() or not any(out.iterdir()))
    ):
        raise WeightsError(
            f"{out}: expected a new or empty directory, or an older tokenizer of VL-GPT to replace"
        )


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a directory says of itself. Raises WeightsError for one that stage 1 did not write."""
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected the directory of a VL-GPT tokenizer, as lavit-lm fit-tokenizer writes it: {error}"
        ) from None
    wanted = {"visual_tokenizer", "fingerprint", "shape", "image", "text", "conditions", "learnt"}
    missing = wanted - set(values) if isinstance(values, dict) else wanted
    if missing or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise WeightsError(
            f"{path}: expected {FORMAT} version {VERSION}, with {sorted(wanted)}; missing {sorted(missing)}"
        )
    try:
        values["shape"] = VLGPTTokenizerConfig(**values["shape"])
    except TypeError as error:
        raise WeightsError(f"{path}: shape: {error}") from None
    return values


def load_tokenizer(directory: str | os.PathLike[str], visual: VisualTokenizer) -> CausalResampler:
    """The tokenizer of a directory.

    Raises:
        WeightsError: files or tensors that are missing, unexpected or mis-shaped, or another visual tokenizer.
    """
    values = read_config(directory)
    if values["fingerprint"] != visual.fingerprint():
        raise WeightsError(
            f"{directory}: trained on features of the visual tokenizer {values['visual_tokenizer']!r} "
            f"({values['fingerprint']}), got another ({visual.fingerprint()}): it would see noise"
        )
    return _filled(values["shape"].resampler(visual), Path(directory) / "tokenizer.safetensors")


class DetokenizingDecoder:
    """Vectors -> pictures: the detokenizer, then the diffusion model whose conditions it learnt.

    Args:
        detokenizer: frozen.
        conditions: of that diffusion model.
        learnt: which of them the detokenizer has learnt; the model's null stands for another.
    """

    def __init__(
        self, detokenizer: Detokenizer, conditions: Any, learnt: Sequence[str] = ("image", "text")
    ) -> None:
        self.detokenizer, self.conditions = detokenizer.eval().requires_grad_(False), conditions
        self.learnt = learnt

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> DetokenizingDecoder:
        """A directory of stage 1, and the diffusion model that it names. Raises WeightsError."""
        values = read_config(directory)
        shapes = [
            None if values[name] is None else tuple(values[name]) for name in ("image", "text")
        ]
        empty = Detokenizer(values["shape"], *shapes)
        detokenizer = _filled(empty, Path(directory) / "detokenizer.safetensors").to(device)
        return cls(
            detokenizer, load_conditions(values["conditions"], None).to(device), values["learnt"]
        )

    @torch.no_grad()
    def __call__(
        self,
        vectors: Float[Tensor, "b k width"],
        null: Float[Tensor, "1 k width"] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | int = 3.0,
        generator: Any = None,
        leave_out: str | None = None,
    ) -> Any:
        """Draw a picture for each.

        Args:
            null: not asked: guidance subtracts the diffusion model's own nulls, which it was trained with.
            leave_out: "image" or "text": a condition in whose place the model's null stands.

        Returns: an object with `.images`.

        Raises:
            ValueError: another name to leave out, or nothing left to draw from.
        """
        from diffusers import ImagePipelineOutput

        if leave_out not in (None, "image", "text"):
            raise ValueError(f"leave_out: expected 'image', 'text' or None, got {leave_out!r}")
        condition = self.detokenizer(vectors.to(self.detokenizer.read.weight))
        for name in ("image", "text"):
            if name == leave_out or name not in self.learnt:
                condition = condition._replace(**{name: None})
        return ImagePipelineOutput(
            images=self.conditions.draw(condition, num_inference_steps, guidance_scale, generator)
        )


def _filled(module: Any, file: Path) -> Any:
    """The module with a file's weights, all of them and no others. Raises WeightsError."""
    try:
        state = load_file(file)
        module.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{file}: {error}") from None
    broken = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise WeightsError(f"{file}: these tensors hold NaN or infinity: {broken}")
    return module
