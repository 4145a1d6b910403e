"""A frozen tokenizer inside a LightningModule: images are encoded in the training step.

    python examples/lightning_gpt.py my_images --max-steps 500

The tokenizer has no gradient, no optimizer state, and is not in the checkpoints. Images are read,
cropped and flipped by ImageDataModule, so that each epoch has other codes; a data set that is never
augmented is better encoded once (small_gpt.py, or `lavit-tok shards`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from shapes import write_shapes
from small_gpt import GPT
from torch import Tensor

from lavit_tok import ImageDataModule, VisualTokenizer


class CodeGPT(LightningModule):
    """Next-code prediction; see small_gpt.GPT."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        # In a list: an attribute would be a submodule, and be trained and saved.
        self.frozen = [tokenizer.requires_grad_(False)]
        self.model = GPT(tokenizer.config.codebook_size, tokenizer.config.num_patches)

    def loss(self, images: Tensor) -> Tensor:
        """Of images uint8 [b 3 h w]."""
        loss: Tensor = self.model.loss(self.frozen[0].encode(images).to_list())
        return loss

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        loss = self.loss(batch["images"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        images = batch["images"]
        self.log("val/loss", self.loss(images), batch_size=len(images), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


def main(argv: Sequence[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", nargs="?", help="an image folder; by default shapes are drawn")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default="out/lightning")
    arguments = parser.parse_args(argv)
    seed_everything(0, verbose=False)
    data = ImageDataModule(
        arguments.data or str(write_shapes("out/shapes", 300)),
        image_size=128,
        batch_size=arguments.batch_size,
        flip=0.5,
        crop_scale=(0.8, 1.0),
        cache=True,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arguments.max_steps,
        max_epochs=-1,
        default_root_dir=arguments.out,
        logger=False,
    )
    trainer.fit(CodeGPT(VisualTokenizer.from_pretrained("default")), data)
    return trainer


if __name__ == "__main__":
    main()
