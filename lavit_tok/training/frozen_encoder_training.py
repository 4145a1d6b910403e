"""FrozenEncoderTraining: what the trainers of both kinds of tokenizers have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from lavit_tok.checkpoints.weights import SHIPPED
from lavit_tok.config import TokenizerConfig
from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.encode.vision_encoder import VisionEncoder
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.training.base import TrainingModule


class FrozenEncoderTraining(TrainingModule):
    """A trainer of a tokenizer; a subclass calls `build_tokenizer` in its `__init__`."""

    tokenizer: VisualTokenizer
    kind = "tokenizer"
    start_from: str | None = None

    def build_tokenizer(
        self,
        config: TokenizerConfig | None,
        encoder: str | None,
        image_processor: dict[str, Any] | None,
        start_from: str | None = None,
    ) -> None:
        """Create the tokenizer around its frozen encoder.

        Args:
            config: sizes of the tokenizer; its `encoder` is replaced by the config of `encoder`.
            encoder: "default" or "selected" (that of the shipped tokenizer, with its image
                processor), directory or Hub id of the frozen encoder; None for random weights.
            image_processor: arguments of VisualImageProcessor besides its size.
            start_from: name, directory or Hub id of a tokenizer to train on, codebook
                included, in place of the three above.

        Raises:
            ValueError: a config without a reconstructor; `start_from` with codes of another kind
                than those of `config`.
        """
        config = config or TokenizerConfig()
        vision = processor = None
        self.start_from = start_from
        if start_from is not None:
            tokenizer = VisualTokenizer.from_pretrained(start_from)
            if tokenizer.config.sequence != config.sequence:
                raise ValueError(
                    f"start_from: expected a tokenizer of {config.sequence} codes, {start_from!r} "
                    f"is one of {tokenizer.config.sequence} codes: use a recipe for those"
                )
            config = tokenizer.config
        elif encoder is not None:
            norm = config.encoder_norm
            if encoder in SHIPPED:
                shipped = VisualTokenizer.from_pretrained(encoder)
                vision, norm = shipped.encoder, shipped.config.encoder_norm
                processor = shipped.image_processor if image_processor is None else None
            else:
                vision = VisionEncoder.from_pretrained(encoder, norm=norm)
            values = {"encoder": vision.json_config(), "encoder_norm": norm}
            config = TokenizerConfig.from_dict({**config.to_dict(), **values})
        if not config.reconstructor_depth:
            raise ValueError(
                "reconstructor_depth: expected at least 1: the loss compares reconstructed features"
            )
        if start_from is None:
            options = image_processor or {}
            processor = processor or VisualImageProcessor(config.image_size, **options)
            tokenizer = VisualTokenizer(config, vision, processor)
        self.tokenizer = tokenizer
        self.tokenizer.encoder.requires_grad_(False)

    def frozen_names(self) -> list[str]:
        """The encoder's weights."""
        return [name for name in self.state_dict() if name.startswith("tokenizer.encoder.")]

    def next_command(self) -> str:
        """A pixel decoder is trained next, or shards are made."""
        data = getattr(self.trainer.datamodule, "data", "DATASET")
        recipe = "fit-decoder -c selected/decoder"
        if self.tokenizer.nested:
            recipe = "fit-mean-decoder -c default/decoder"
        return f"lavit-tok {recipe} --model.tokenizer={self.out} --data.data={data}"

    def features(
        self, images: UInt8[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        """The frozen encoder's features."""
        pixels = self.tokenizer.image_processor.normalize(images)
        return self.tokenizer.features(pixels.to(self.tokenizer.dtype)).float()

    def export(self, directory: str | Path) -> None:
        """Save the tokenizer, for VisualTokenizer.from_pretrained."""
        self.tokenizer.save_pretrained(directory)
