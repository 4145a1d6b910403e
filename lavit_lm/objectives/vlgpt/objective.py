"""VL-GPT (Zhu et al., 2023): text and vectors in turn; the model predicts where images begin.

An image is exactly N vectors of a frozen tokenizer that was trained before
(training/vlgpt_tokenizer.py); with two of them:

    ["a cat", image]
                          position     0     1     2     3      4    5    6       7
                          id           <s>   a     cat   <img>  .    .    </img>  </s>
                          role         TEXT  TEXT  TEXT  BEGIN  VIS  VIS  END     TEXT
                          is_embedding .     .     .     .      x1   x2   .       .
                          predict      .     x     x     x      .    .    .       x
                          regress      .     .     .     .      x    x    .       .

- Everything is predicted except </img>, and the target decides which head reads the hidden state.
  <img> is predicted as any text token is, so the state at `cat` is read by the LM's head; the next
  N states are read by the regression head, and </img> is forced.
- The tokenizer is frozen, so the target vectors are constant. Trained are LoRA's adapters on all
  linear layers, the new embedding rows, and the regression head.
- A pair comes in both orders, each with probability 1/2; a document of more segments keeps its
  order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavit_lm.models.losses import LossSum, ModelOutput, cross_entropy, regression
from lavit_lm.objectives.base import PairOrder
from lavit_lm.objectives.records import Connectors, ImageOutput, PromptTemplates
from lavit_lm.objectives.vector_objective import VectorObjective
from lavit_lm.objectives.vlgpt.tokenizer import VLGPTTokenizerConfig
from lavit_lm.objectives.vlgpt.tokenizer_files import load_tokenizer, read_config
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.token_sequence import Flags
from lavit_tok.nn.ranges import require_number


@dataclass(frozen=True)
class VLGPT(VectorObjective):
    """Cross-entropy where a text token is next, regression where a vector is.

    Args:
        tokenizer: directory written by `lavit-lm fit-tokenizer`.
        tokenizer_sizes: the tokenizer's sizes, see VLGPTTokenizerConfig. A saved model contains
            them and the weights, so that it needs the directory for decoding images only; leave
            them out when training.
        order: of pairs: "both" draws one of the two for each sequence, "image_first", "text_first",
            or "given".
        regression_weight: of the mean squared error against the mean cross-entropy; the published
            value is unknown.
        vector_noise: of the vectors that the LM reads in training after a text; the largest
            standard deviation, in standard deviations of the vectors. 0 as published.
        caption_prompt, image_prompt, answer_prompt: prompts of the trained model, {} for the user's
            text. Pairs are trained on without any prompt. A large LM follows the paper's prompts
            all the same; for a small one set them to what it was trained on: "" for nothing but the
            image, "{}" for nothing but the user's text.

    Raises:
        ValueError: neither a directory nor sizes, or a weight or noise below 0.
    """

    name: ClassVar[str] = "vlgpt"
    title: ClassVar[str] = "VL-GPT"
    tokenizer: str | None = None
    tokenizer_sizes: dict[str, Any] | None = None
    order: PairOrder = "both"
    regression_weight: float = 1.0
    vector_noise: float = 0.0
    caption_prompt: str = " Please describe this image in detail in one sentence. It shows"
    image_prompt: str = "An image of {}."
    answer_prompt: str = " Based on the image, {} Short answer:"

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.tokenizer_sizes is None:
            raise ValueError(
                "tokenizer: VL-GPT embeds and predicts vectors; give the directory of lavit-lm "
                "fit-tokenizer"
            )
        require_number("regression_weight", self.regression_weight, 0, 1e6)
        require_number("vector_noise", self.vector_noise, 0, 100)

    @cached_property
    def sizes(self) -> VLGPTTokenizerConfig:
        """The tokenizer's. Raises WeightsError if `tokenizer` is not a directory of stage 1."""
        if self.tokenizer_sizes is not None:
            return VLGPTTokenizerConfig(**self.tokenizer_sizes)
        assert self.tokenizer is not None
        return read_config(self.tokenizer)["sizes"]

    @property
    def vectors(self) -> int:
        return self.sizes.queries

    @property
    def prompt_templates(self) -> PromptTemplates:
        return PromptTemplates(self.caption_prompt, self.image_prompt, self.answer_prompt)

    @property
    def connectors(self) -> Connectors:
        """The frozen tokenizer, and Linear(d, d)."""
        return Connectors(self._resampler, _regressor, codes="none")

    @property
    def image_output(self) -> ImageOutput:
        """Exactly N vectors; decoded by default by the detokenizer in the tokenizer's directory."""
        return ImageOutput("vectors", self.vectors, self.vectors, True, self._load_decoder)

    def image_flags(self, is_target: bool) -> tuple[Flags, Flags, Flags]:
        return Flags(predict=is_target), Flags(regress=is_target), Flags()

    def losses(self, output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
        """Sums of "text" and "image" (<img>) in nats; "vectors" and "spread" of `regression`."""
        return {**cross_entropy(output, batch), **regression(output, batch)}

    def total(self, losses: dict[str, LossSum]) -> Tensor:
        """Two means, of all ids and of all vectors: their balance is independent of the batch."""
        text, begin = losses["text"], losses["image"]
        ids = LossSum(text.total + begin.total, text.count + begin.count)
        return ids.mean + self.regression_weight * losses["vectors"].mean

    def to_dict(self) -> dict[str, Any]:
        """With the tokenizer's sizes, so that a saved model loads without its directory."""
        return {**asdict(self), "tokenizer_sizes": asdict(self.sizes)}

    def _resampler(self, visual: Any, hidden_size: int) -> nn.Module:
        if self.sizes.width != hidden_size:
            raise ValueError(
                f"the tokenizer makes vectors of width {self.sizes.width}, the LM's hidden size "
                f"is {hidden_size}"
            )
        if self.tokenizer_sizes is None:
            assert self.tokenizer is not None
            return load_tokenizer(self.tokenizer, visual).requires_grad_(False)
        bridge = self.sizes.resampler(visual)
        for parameter in bridge.parameters():
            # A saved model's weights replace them; NaN shows when a run was started without a
            # tokenizer directory.
            nn.init.constant_(parameter, torch.nan)
        return bridge.requires_grad_(False)

    def _load_decoder(self, name: str, device: torch.device) -> Any:
        from lavit_lm.objectives.vlgpt.image_decoder import DetokenizingDecoder

        directory = self.tokenizer if name == "default" and self.tokenizer is not None else name
        return DetokenizingDecoder.from_pretrained(directory, device)


def _regressor(hidden_size: int) -> nn.Module:
    return nn.Linear(hidden_size, hidden_size)
