"""VL-GPT (Zhu et al., 2023): words and vectors in turn; the model itself says that a picture comes now.

A picture is exactly N vectors of a frozen tokenizer, trained before (pixels/tokenizer_training.py); with two of them:

    ["a cat", picture]    place        0     1     2     3      4    5    6      7
                          id           <s>   a     cat   <|img| .    .    |img>  </s>
                          role         TEXT  TEXT  TEXT  BEGIN  VIS  VIS  END    TEXT
                          is_embedding .     .     .     .      x1   x2   .      .
                          predict      .     x     x     x      .    .    .      x       cross-entropy, by the LM's head
                          regress      .     .     .     .      x    x    .      .       squared error of Linear(state)

- Everything is predicted but |img>: what is to come decides which head reads the state. <|img| is a word among others,
  so its state in `cat` is read by the LM's head; N states are then read by the regression head, and |img> is put there.
- The tokenizer is frozen, so the vectors stand still while they are learnt. Trained are LoRA's adapters on all linear
  layers, the new rows of the embedding, and the regression head.
- A pair comes in both orders, each as often as the other; a document of more segments keeps its order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavit_lm.models.losses import ModelOutput, Sum, cross_entropy, regression
from lavit_lm.objectives.base import ObjectiveModules, Order, PromptTemplates
from lavit_lm.objectives.embedding_objective import VectorObjective
from lavit_lm.objectives.vlgpt.detokenizer import VLGPTTokenizerConfig
from lavit_lm.objectives.vlgpt.image_decoder import DetokenizingDecoder, load_tokenizer, read_config
from lavit_lm.sequences.packing import Packed
from lavit_lm.sequences.segments import Flags


@dataclass(frozen=True)
class VLGPT(VectorObjective):
    """Cross-entropy where a word comes next, regression where a vector does.

    Args:
        tokenizer: directory that `lavit-lm fit-tokenizer` wrote.
        shape: the tokenizer's sizes, see VLGPTTokenizerConfig. A saved model has them and the weights beside them, so that it
            needs the directory for drawing only; give none when training.
        order: of pairs: "both" draws one of the two for each row, "image_first", "text_first", or "given".
        regression_weight: of the mean squared error against the mean cross-entropy; the published value is unknown.
        caption_prompt, image_prompt, answer_prompt: how the trained model is asked, {} for the user's words. Pairs are
            trained on without any words around them. A large language model follows the paper's all the same; a small
            one knows what it was trained on and no more: give "" for nothing but the picture, or the user's words.

    Raises:
        ValueError: neither a directory nor sizes, or a weight below 0.
    """

    name: ClassVar[str] = "vlgpt"
    title: ClassVar[str] = "VL-GPT"
    tokenizer: str | None = None
    shape: dict[str, int] | None = None
    order: Order = "both"
    regression_weight: float = 1.0
    caption_prompt: str = " Please describe this image in detail in one sentence. It shows"
    image_prompt: str = "An image of {}."
    answer_prompt: str = " Based on the image, {} Short answer:"

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.shape is None:
            raise ValueError(
                "tokenizer: VL-GPT reads and says vectors: name the directory of lavit-lm fit-tokenizer"
            )
        if self.regression_weight < 0:
            raise ValueError(f"regression_weight: expected 0 or more, got {self.regression_weight}")

    @property
    def prompt_templates(self) -> PromptTemplates:  # type: ignore[override]
        return PromptTemplates(self.caption_prompt, self.image_prompt, self.answer_prompt)

    @property
    def vectors(self) -> int:
        return self.sizes.queries

    def flags(self, is_target: bool) -> tuple[Flags, Flags, Flags]:
        return Flags(predict=is_target), Flags(regress=is_target), Flags()

    @cached_property
    def sizes(self) -> VLGPTTokenizerConfig:
        """The tokenizer's. Raises WeightsError for a directory that is none."""
        if self.shape is not None:
            return VLGPTTokenizerConfig(**self.shape)
        assert self.tokenizer is not None
        return read_config(self.tokenizer)["shape"]

    def settings(self) -> dict[str, Any]:
        """With the tokenizer's sizes, so that a saved model can be read where the directory is not."""
        return {**asdict(self), "shape": asdict(self.sizes)}

    def parts(self, visual: Any, width: int) -> ObjectiveModules:
        """The frozen tokenizer, and Linear(width, width). Raises ValueError for an LM of another width."""
        if self.sizes.width != width:
            raise ValueError(
                f"the tokenizer makes vectors of width {self.sizes.width}, the LM reads {width}"
            )
        if self.shape is None:
            assert self.tokenizer is not None
            bridge = load_tokenizer(self.tokenizer, visual)
        else:
            bridge = self.sizes.resampler(visual)
            for parameter in (
                bridge.parameters()
            ):  # a saved model brings them; NaN tells of a training without any
                nn.init.constant_(parameter, torch.nan)
        return ObjectiveModules(bridge.requires_grad_(False), nn.Linear(width, width))

    def decoder(self, name: str, device: torch.device) -> DetokenizingDecoder:
        """The detokenizer of a directory of stage 1, by "default" of this model's, and its diffusion model.

        Raises:
            WeightsError: no such directory.
        """
        directory = self.tokenizer if name == "default" and self.tokenizer is not None else name
        return DetokenizingDecoder.from_pretrained(directory, device)

    def losses(self, seen: ModelOutput, batch: Packed) -> dict[str, Sum]:
        """{"text": nats of words, "image": nats of <|img|, "vectors", "spread": see losses.regression}."""
        return {**cross_entropy(seen, batch), **regression(seen, batch)}

    def total(self, losses: dict[str, Sum]) -> Tensor:
        """Two means, of all ids and of all vectors, so that their balance does not drift with the share of pictures."""
        text, opening = losses["text"], losses["image"]
        ids = Sum(text.total + opening.total, text.count + opening.count)
        return ids.mean + self.regression_weight * losses["vectors"].mean
