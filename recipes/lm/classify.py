"""Classify images with a trained language model, beside a vision transformer from random weights.

    image -> prefix of a caption -> hidden states at the image -> their mean -> linear layer

    frozen       only the linear layer is trained, by regularized logistic regression
    fine-tuned   the LM and its connector, too
    scratch      a ViT of the LM's width and depth from random weights, trained alike

DaVinci (section 4) measures its image understanding so, on frozen features and fine-tuned. Here the
classes are the ten captions of Fashion-MNIST in data/captioned, whose captions the LM was trained
on; the test split was not. Any model of lavit_lm can be classified with.

    python recipes/lm/classify.py --model runs/lm/davinci --data data/captioned [--labels 1 0.1]

Hardware: one CPU core; frozen features take 3 minutes, 150 steps of the others 4 to 8 minutes each.
Expected: 0.74 frozen, 0.64 with a tenth of the labels (docs/results.md).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from lavit_lm import MultimodalLM
from lavit_lm.sequences.packing import pad
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_tok import VisualImageProcessor
from lavit_tok.data.splits import load_splits

METHODS = ("frozen", "fine-tuned", "scratch")
SPLITS, BATCH = ("train", "validation", "test"), 64
DECAYS = (1e-4, 1e-3, 1e-2)
"""Weight decays of the logistic regression; the validation split chooses."""


class Labeled(NamedTuple):
    """Images, what a network reads of them, or features of them; and their classes."""

    items: Any
    labels: Int64[Tensor, " n"]

    def take(self, fraction: float) -> Labeled:
        """The first of every class, this fraction of all; items become a list."""
        most = round(fraction * len(self.labels) / (int(self.labels.max()) + 1))
        counts = F.one_hot(self.labels).cumsum(0).gather(1, self.labels[:, None])[:, 0]
        chosen = (counts <= most).nonzero().flatten()
        return Labeled([self.items[i] for i in chosen.tolist()], self.labels[chosen])


def labeled(data: Any, source: str, size: int, classes: list[str]) -> Labeled:
    """The images of one source, whose captions are the classes."""
    pairs = enumerate(zip(data["source"], data["caption"], strict=True))
    rows = data.select([i for i, (s, caption) in pairs if s == source and caption in classes])
    images = VisualImageProcessor(size).to_uint8(rows["image"])
    return Labeled(images, torch.tensor([classes.index(c) for c in rows["caption"]]))


class LMFeatures(nn.Module):
    """The mean over an image of an LM's hidden states, before an empty caption.

    Sequences are built once for each image: codes are encoded there.
    """

    def __init__(self, lm: MultimodalLM) -> None:
        super().__init__()
        self.model, self.prompts, self.pad = lm.model, lm.prompts, lm.processor.pad
        self.width = lm.model.causal.config.get_text_config().hidden_size
        self.norm = nn.LayerNorm(self.width, elementwise_affine=False)

    def prepare(self, images: UInt8[Tensor, "n 3 s s"]) -> list[TokenSequence]:
        return [self.prompts.sequence([image], "text") for image in images]

    def forward(self, sequences: list[TokenSequence]) -> Float[Tensor, "n width"]:
        batch = pad(sequences, self.pad)
        at = (batch.roles == Role.VISUAL)[..., None].float()
        return self.norm((self.model(batch).hidden_states * at).sum(1) / at.sum(1))


class ViTFeatures(nn.Module):
    """A ViT of the LM's width and depth, with random weights: its class token."""

    def __init__(self, lm: MultimodalLM, size: int, patch: int) -> None:
        super().__init__()
        c = lm.model.causal.config.get_text_config()
        self.width = c.hidden_size
        config = ViTConfig(
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            intermediate_size=4 * c.hidden_size,
            image_size=size,
            patch_size=patch,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)

    def prepare(self, images: UInt8[Tensor, "n 3 s s"]) -> list[Tensor]:
        return list(images.float() / 127.5 - 1)

    def forward(self, images: list[Tensor]) -> Float[Tensor, "n width"]:
        return self.vit(torch.stack(images)).last_hidden_state[:, 0]


@torch.no_grad()
def features_of(network: Any, prepared: list[Any]) -> Float[Tensor, "n width"]:
    """Without gradient, in batches."""
    network.eval()
    return torch.cat([network(prepared[i : i + BATCH]) for i in range(0, len(prepared), BATCH)])


def accuracy(scores: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    return float((scores.argmax(1) == labels).double().mean())


def regression(train: Labeled, validation: Labeled, classes: int) -> nn.Linear:
    """Logistic regression of features; the decay that is best on the validation split."""
    found, features = [], torch.stack(train.items)
    for decay in DECAYS:
        layer = nn.Linear(features.shape[1], classes)
        nn.init.zeros_(layer.weight)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def closure(layer: nn.Linear = layer, decay: float = decay) -> Tensor:
            layer.zero_grad()
            loss = F.cross_entropy(layer(features), train.labels)
            loss = loss + decay * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            found.append((accuracy(layer(validation.items), validation.labels), layer))
    return max(found, key=lambda pair: pair[0])[1]


def fit(
    network: Any, train: Labeled, classes: int, args: argparse.Namespace, lr: float
) -> nn.Module:
    """Train the network and a linear layer, by AdamW with a warm-up and a cosine."""
    torch.manual_seed(args.seed)
    head = nn.Linear(network.width, classes)
    trained = [p for p in [*network.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05)
    rate = lambda s: min(s / 20, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    network.train()
    for step in range(args.steps):
        chosen = torch.randint(len(train.items), (BATCH,))
        scores = head(network([train.items[i] for i in chosen.tolist()]))
        loss = F.cross_entropy(scores, train.labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {args.steps}: {loss.item():.3f}", flush=True)
    return head


def load(args: argparse.Namespace) -> MultimodalLM:
    return MultimodalLM.from_pretrained(args.model, decoder=None)


def measure(method: str, splits: dict[str, Labeled], classes: int, args: Any) -> dict[str, float]:
    """Number of labels -> accuracy on the test split."""
    lm, size = load(args), splits["test"].items.shape[-1]
    torch.manual_seed(args.seed)
    network: Any = ViTFeatures(lm, size, size // 8) if method == "scratch" else LMFeatures(lm)
    own = {name: Labeled(network.prepare(s.items), s.labels) for name, s in splits.items()}
    if method == "frozen":
        own = {name: Labeled(features_of(network, s.items), s.labels) for name, s in own.items()}
    start = {name: value.clone() for name, value in network.state_dict().items()}
    found = {}
    for fraction in args.labels:
        train, test = own["train"].take(fraction), own["test"]
        if method == "frozen":
            head: nn.Module = regression(train, own["validation"], classes)
            features = test.items
        else:
            network.load_state_dict(start)
            network.requires_grad_(True)
            head = fit(network, train, classes, args, args.lr[method == "scratch"])
            features = features_of(network, test.items)
        with torch.no_grad():
            number = found[str(len(train.labels))] = accuracy(head(features), test.labels)
        print(f"{method}, {len(train.labels)} labels: {number:.3f}", flush=True)
    return found


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--data", required=True, help="folder that build.py wrote")
    parser.add_argument("--source", default="fashion-mnist", help="whose captions are classes")
    parser.add_argument("--labels", type=float, nargs="+", default=[1.0, 0.1], help="fractions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=300, help="of 64 images; not for frozen")
    parser.add_argument(
        "--lr", type=float, nargs=2, default=[3e-4, 1e-3], help="fine-tuned, scratch"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    args = parser.parse_args(argv)
    data, size = load_splits(args.data), load(args).visual_tokenizer.config.image_size
    pairs = zip(data["train"]["source"], data["train"]["caption"], strict=True)
    classes = sorted({caption for source, caption in pairs if source == args.source})
    splits = {name: labeled(data[name], args.source, size, classes) for name in SPLITS}
    found = {method: measure(method, splits, len(classes), args) for method in args.methods}
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
