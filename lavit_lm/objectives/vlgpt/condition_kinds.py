"""ConditionedDiffusion by the name that a detokenizer's files give."""

from __future__ import annotations

from typing import Any

from lavit_lm.objectives.vlgpt.conditions import ConditionedDiffusion, PixelDecoderConditions
from lavit_lm.objectives.vlgpt.stable_diffusion import StableDiffusionConditions
from lavit_tok import VisualTokenizer


def load_conditions(
    settings: dict[str, Any], visual: VisualTokenizer | None
) -> ConditionedDiffusion:
    """ConditionedDiffusion by their "kind", one of these two, never a class of a file's choosing.

    Args:
        settings: {"kind": "pixel_decoder", "decoder": ...} or {"kind": "stable_diffusion", "model": ..., ...}.
        visual: the visual tokenizer; None to draw only.

    Raises:
        ValueError: another kind, or settings that it does not have.
        WeightsError: weights that cannot be read.
    """
    kinds: dict[str, Any] = {
        kind.kind: kind for kind in (PixelDecoderConditions, StableDiffusionConditions)
    }
    rest = {name: value for name, value in settings.items() if name != "kind"}
    try:
        return kinds[settings["kind"]].load(visual, **rest)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"conditions: expected one of {sorted(kinds)} and its settings, got {settings}: {error}"
        ) from None
