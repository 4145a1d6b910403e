"""A data set -> codes, by datasets.map; a small GPT on the codes, in plain PyTorch.

    python examples/small_gpt.py my_images --steps 500 --out out

    image folder -> Dataset: image, codes -> sequences <start> codes <end> -> GPT -> codes -> images

Any data set of `datasets` with a column "image" works. Without a folder, shapes are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from shapes import write_shapes
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer


def encode_dataset(dataset: Dataset, tokenizer: VisualTokenizer, batch_size: int = 64) -> Dataset:
    """The data set with a column "codes": a list of integers for each image."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {"codes": tokenizer.encode(batch["image"]).to_list()}

    # The name of the cached result: another tokenizer or data set is encoded anew.
    name = f"{dataset._fingerprint}-{tokenizer.fingerprint()}"
    return dataset.map(encode, batched=True, batch_size=batch_size, new_fingerprint=name)


class GPT(nn.Module):
    """A causal transformer over codes; K is the start, K + 1 the end and the padding.

    Args:
        codes: K, size of the codebook.
        length: largest number of codes of an image.
        width: hidden size.
        layers: number of layers.
        heads: attention heads.
    """

    def __init__(
        self, codes: int, length: int, width: int = 128, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.start, self.end, self.length = codes, codes + 1, length
        self.token = nn.Embedding(codes + 2, width)
        self.position = nn.Embedding(length + 2, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes + 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [batch n] -> logits of the next id [batch n K+2]."""
        n = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n)
        hidden = self.token(ids) + self.position.weight[:n]
        logits: Tensor = self.head(self.norm(self.layers(hidden, mask=mask, is_causal=True)))
        return logits

    def loss(self, codes: Sequence[Sequence[int]]) -> Tensor:
        """Mean cross-entropy of codes and ends, in nats."""
        batch = VisualCodes.from_list(codes)
        padded = F.pad(batch.padded(self.end), (1, 1), value=self.end)
        padded[:, 0] = self.start
        targets = padded[:, 1:].clone()
        positions = torch.arange(targets.shape[1])
        targets[positions > batch.lengths[:, None]] = -100  # behind the end
        return F.cross_entropy(self(padded[:, :-1]).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """Sample the codes of images; each has at least one."""
        ids = torch.full((count, 1), self.start)
        for step in range(self.length):
            logits = self(ids)[:, -1]
            logits[:, self.start] = -torch.inf
            if step == 0:
                logits[:, self.end] = -torch.inf
            ids = torch.cat([ids, logits.softmax(-1).multinomial(1, generator=generator)], 1)
        ends = [[*sequence, self.end].index(self.end) for sequence in ids.tolist()]
        return [sequence[1:end] for sequence, end in zip(ids.tolist(), ends, strict=True)]


def train(
    model: GPT, codes: Sequence[Sequence[int]], steps: int, batch_size: int = 32, seed: int = 0
) -> list[float]:
    """AdamW on random batches; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(codes), (batch_size,), generator=generator)
        loss = model.loss([codes[int(i)] for i in chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", nargs="?", help="an image folder; by default shapes are drawn")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--images", type=int, default=4, help="to generate")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args(argv)
    data = arguments.data or str(write_shapes(arguments.out / "shapes", 300))

    tokenizer = VisualTokenizer.from_pretrained("default")
    dataset = encode_dataset(load_dataset(data, split="train"), tokenizer)
    codes = list(dataset["codes"])
    torch.manual_seed(0)
    model = GPT(tokenizer.config.codebook_size, max(map(len, codes)))
    losses = train(model, codes, arguments.steps)
    print(f"{len(codes)} images, loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per code")

    generator = torch.Generator().manual_seed(0)
    generated = VisualCodes.from_list(
        model.eval().generate(arguments.images, generator), tokenizer.config.codebook_size
    )
    decoder = PixelDecoder.from_pretrained("default")
    images = decoder(generated).images
    for number, image in enumerate(images):
        image.save(arguments.out / f"{number}.png")
    print(f"{len(images)} generated images in {arguments.out}")
    return losses


if __name__ == "__main__":
    main()
