"""Classify images, texts, or pairs of both with a trained language model, beside random weights.

    prompt -> hidden states at its image, or at its text if there is one -> mean -> linear layer

    frozen       only the linear layer is trained, by regularized logistic regression
    fine-tuned   the LM and its connector, too
    scratch      images: a ViT of the LM's width and depth from random weights, trained alike;
                 texts and pairs: the same LM and connector from random weights. The encoder of its
                 visual tokenizer is frozen everywhere.

| --task | prompt | classes |
|---|---|---|
| images | an image of --source | the captions, such as the ten of Fashion-MNIST |
| texts | the name of an emoji | its Unicode group, such as animals and nature; needs --raw |
| pairs | an image of --source and a caption | whether it is its own or that of another image |

DaVinci (section 4) measures its understanding so, on frozen features and fine-tuned. The LM was
trained on the captions of the train split, and the names of emoji are among them; not on any group
of emoji. Any model of lavit_lm can be measured.

    python recipes/lm/classify.py --model runs/lm/davinci --data data/captioned [--labels 1 0.1]
    python recipes/lm/classify.py --model runs/lm/davinci --task texts --raw data/raw
    python recipes/lm/classify.py --model runs/lm/davinci --data data/composed --task pairs
        --source composed-color

Hardware: one CPU core; frozen features take 3 minutes, 150 steps of the others 4 to 8 minutes each.
Expected: images 0.82 frozen, 0.76 with a tenth of the labels; pairs 0.73, 0.67 (docs/results.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel

from lavit_lm import MultimodalLM
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.packing import PADDING, pad
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_tok import VisualImageProcessor
from lavit_tok.data.splits import load_splits

sys.path.append(str(Path(__file__).parents[1] / "data"))
from build import split_of
from sources import emoji_caption, emoji_entries

TASKS = ("images", "texts", "pairs")
METHODS = ("frozen", "fine-tuned", "scratch")
SPLITS, BATCH = ("train", "validation", "test"), 64
DECAYS = (1e-4, 1e-3, 1e-2)
"""Weight decays of the logistic regression; the validation split chooses."""


class Labeled(NamedTuple):
    """Prompts, what a network reads of them, or features of them; and their classes."""

    items: list[Any]
    labels: Int64[Tensor, " n"]

    def take(self, fraction: float) -> Labeled:
        """The first of every class, this fraction of all."""
        most = round(fraction * len(self.labels) / (int(self.labels.max()) + 1))
        counts = F.one_hot(self.labels).cumsum(0).gather(1, self.labels[:, None])[:, 0]
        chosen = (counts <= most).nonzero().flatten()
        return Labeled([self.items[i] for i in chosen.tolist()], self.labels[chosen])


Splits = dict[str, Labeled]


def images(data: Any, source: str, size: int) -> Splits:
    """The images of one source, whose captions are the classes."""
    rows = {split: of_source(data[split], source) for split in SPLITS}
    classes, found = sorted(set(rows["train"]["caption"])), {}
    for split, own in rows.items():
        own = own.select([i for i, caption in enumerate(own["caption"]) if caption in classes])
        labels = torch.tensor([classes.index(caption) for caption in own["caption"]])
        found[split] = Labeled([[image] for image in opened(own, size)], labels)
    return found


def texts(raw: Path) -> Splits:
    """The names of emoji, whose groups are the classes; split by the sha256 of the name."""
    groups = {
        emoji_caption(entry["name"] or entry["short_name"]): entry["category"]
        for entry in emoji_entries(raw)
    }
    classes = sorted(set(groups.values()))
    found: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for name, group in groups.items():
        split = split_of(hashlib.sha256(name.encode()).digest())
        found[split].append((name, classes.index(group)))
    return {
        split: Labeled([[name] for name, _ in own], torch.tensor([label for _, label in own]))
        for split, own in found.items()
    }


def pairs(data: Any, source: str, size: int, most: int, seed: int) -> Splits:
    """Images with their own caption (1), and every second one with another image's (0)."""
    found = {}
    for split in SPLITS:
        rows, draw = of_source(data[split], source), random.Random(f"{seed} {split}")
        rows = rows.select(draw.sample(range(len(rows)), min(most, len(rows))))
        captions, prompts, labels = list(rows["caption"]), [], []
        for i, image in enumerate(opened(rows, size)):
            caption = captions[i]
            if i % 2 == 0:
                caption = draw.choice([other for other in captions if other != caption])
            prompts.append([image, caption])
            labels.append(i % 2)
        found[split] = Labeled(prompts, torch.tensor(labels))
    return found


def of_source(rows: Any, source: str) -> Any:
    """The examples of one source. Raises ValueError if there are none."""
    found = [i for i, name in enumerate(rows["source"]) if name == source]
    if not found:
        names = ", ".join(sorted(set(rows["source"])))
        raise ValueError(f"--source: expected one of {names}, got {source!r}")
    return rows.select(found)


def opened(rows: Any, size: int) -> UInt8[Tensor, "n 3 s s"]:
    return VisualImageProcessor(size).to_uint8(rows["image"])


class LMFeatures(nn.Module):
    """The mean of an LM's hidden states at the positions of one role, text or image.

    Sequences are built once for each prompt: codes are encoded there.
    """

    def __init__(self, lm: MultimodalLM, role: Role) -> None:
        super().__init__()
        self.role = role
        self.model, self.prompts, self.pad = lm.model, lm.prompts, lm.processor.pad
        self.width = lm.model.causal.config.get_text_config().hidden_size
        self.norm = nn.LayerNorm(self.width, elementwise_affine=False)

    def prepare(self, prompts: list[list[Any]]) -> list[TokenSequence]:
        return [self.prompts.sequence(prompt, "text") for prompt in prompts]

    def forward(self, sequences: list[TokenSequence]) -> Float[Tensor, "n width"]:
        batch = pad(sequences, self.pad)
        at = ((batch.roles == self.role) & (batch.documents != PADDING))[..., None].float()
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

    def prepare(self, prompts: list[list[Any]]) -> list[Tensor]:
        return [image.float() / 127.5 - 1 for (image,) in prompts]

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
            scores = layer(torch.stack(validation.items))
            found.append((accuracy(scores, validation.labels), layer))
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


def untrained(lm: MultimodalLM) -> MultimodalLM:
    """The same LM and connector with new random weights."""
    causal = AutoModelForCausalLM.from_config(lm.model.causal.config)
    width = causal.config.get_text_config().hidden_size
    connectors = lm.objective.connectors.build(lm.visual_tokenizer, width)
    model = SequenceModel(causal, *connectors)
    return MultimodalLM(model, lm.processor, lm.visual_tokenizer, objective=lm.objective)


def measure(method: str, splits: Splits, args: argparse.Namespace) -> dict[str, float]:
    """Number of labels -> accuracy on the test split."""
    lm, classes = load(args), int(splits["train"].labels.max()) + 1
    torch.manual_seed(args.seed)
    if method == "scratch" and args.task == "images":
        size = lm.visual_tokenizer.config.image_size
        network: Any = ViTFeatures(lm, size, size // 8)
    else:
        role = Role.VISUAL if args.task == "images" else Role.TEXT
        network = LMFeatures(untrained(lm) if method == "scratch" else lm, role)
    own = {name: Labeled(network.prepare(s.items), s.labels) for name, s in splits.items()}
    if method == "frozen":
        own = {n: Labeled(list(features_of(network, s.items)), s.labels) for n, s in own.items()}
    start = {name: value.clone() for name, value in network.state_dict().items()}
    found = {}
    for fraction in args.labels:
        train, test = own["train"].take(fraction), own["test"]
        if method == "frozen":
            head: nn.Module = regression(train, own["validation"], classes)
            features = torch.stack(test.items)
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
    parser.add_argument("--data", help="folder that build.py or composed.py wrote; not for texts")
    parser.add_argument("--task", choices=TASKS, default="images")
    parser.add_argument("--source", default="fashion-mnist", help="of the images")
    parser.add_argument("--raw", type=Path, help="folder that fetch.py wrote; for texts")
    parser.add_argument("--most", type=int, default=4000, help="pairs of each split")
    parser.add_argument("--labels", type=float, nargs="+", default=[1.0, 0.1], help="fractions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=300, help="of 64 images; not for frozen")
    parser.add_argument(
        "--lr", type=float, nargs=2, default=[3e-4, 1e-3], help="fine-tuned, scratch"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    args = parser.parse_args(argv)
    needed = "raw" if args.task == "texts" else "data"
    if getattr(args, needed) is None:
        parser.error(f"--task {args.task}: expected --{needed}")
    if args.task == "texts":
        splits = texts(args.raw)
    else:
        data, size = load_splits(args.data), load(args).visual_tokenizer.config.image_size
        if args.task == "pairs":
            splits = pairs(data, args.source, size, args.most, args.seed)
        else:
            splits = images(data, args.source, size)
    counts = torch.bincount(splits["test"].labels)
    print(f"most frequent class of the test split: {int(counts.max()) / int(counts.sum()):.3f}")
    found = {method: measure(method, splits, args) for method in args.methods}
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
