"""Four objectives on the same data, with the same language model and as many places: which one learns what, how fast?

    recipes/lm/<objective>.yaml -> objective, rates     LM of --width and --layers, --steps of --batch blocks
    VL-GPT                      -> its tokenizer first  --first steps
    Emu                         -> its decoder after    --after steps, on vectors that the trained model says

Every model starts from random weights and is trained whole (VL-GPT without LoRA, which needs a trained LM to stand
on); settings beside that are the recipes'. Measured on held-out pictures: nats a token of the true caption after the
picture, in the objective's own wording; whether a picture painted for a caption finds that caption among all
(caption_space.py); seconds of a training step. DaVinci reads and paints a place for every patch, so that a block holds
fewer of its pairs: pairs seen are told. Goes on where it was stopped; writes objectives.md, .json and .png, and models
into --runs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import picture_sets
import torch
import yaml
from caption_space import Scorer, embed, ranks, top
from lm_quality import SHOWN, choose, contact_sheet
from PIL import Image as Picture
from pytorch_lightning import Callback, Trainer, seed_everything

from lavit_lm import MultimodalLM
from lavit_lm.objectives import by_name
from lavit_lm.training.data_module import LanguageDataModule
from lavit_lm.training.emu_decoder import EmuDecoderTraining
from lavit_lm.training.module import LanguageModeling
from lavit_lm.training.vlgpt_tokenizer import VLGPTTokenizerTraining
from lavit_tok import ImageDataModule, VisualImageProcessor

RECIPES = Path(__file__).parents[1] / "recipes" / "lm"
NAMES = ("lavit", "emu", "vlgpt", "davinci")
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "gradient_clip_val": 1.0,
    "max_epochs": -1,
}


class Steps(Callback):
    """Seconds of each step with its data, and how many documents it held."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.documents = 0
        self.at = time.perf_counter()

    def on_train_start(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.at)
        self.at = now
        self.documents += sum(
            map(len, getattr(batch, "keys", ()) if not isinstance(batch, dict) else ())
        )
        if trainer.global_step % 25 == 0:
            loss = float(trainer.callback_metrics["train/loss"])
            print(
                f"step {trainer.global_step}: {loss:.3f}, {statistics.median(self.seconds):.2f} s",
                flush=True,
            )


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def fit(module: Any, data: Any, steps: int, a: Namespace) -> Steps:
    seen = Steps()
    Trainer(max_steps=steps, precision=a.precision, callbacks=[seen], **QUIET).fit(module, data)
    return seen


# Training


def train(name: str, seed: int, folder: Path, a: Namespace) -> dict[str, Any]:
    """The language model, with what comes before and after it."""
    seed_everything(seed, verbose=False)
    own = recipe(name)
    settings = dict(own["model"]["objective"].get("init_args", {}))
    extra: dict[str, Any] = {}
    if name == "vlgpt":
        settings["tokenizer"], extra["tokenizer_seconds"] = vlgpt_tokenizer(seed, folder, a)
    if name == "emu":
        settings["train_encoder"] = False  # as the other three
    lm = {
        "model_type": "llama",
        "hidden_size": a.width,
        "intermediate_size": 8 * a.width // 3,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.width // 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    kept = ("lr", "visual_lr", "encoder_lr", "weight_decay", "betas", "min_lr_ratio")
    rates = {key: value for key, value in own["model"].items() if key in kept} | {
        "warmup_steps": a.steps // 10
    }
    rates = {
        key: tuple(value) if isinstance(value, list) else value for key, value in rates.items()
    }
    objective = by_name(name)(**settings)
    out = {"out": str(folder / "model"), "seed": seed}
    module = LanguageModeling(lm, a.text_tokenizer, a.tokenizer, objective, **out, **rates)
    shards = a.grid_shards if name == "davinci" else a.shards
    pictures = a.data if objective.needs_pixels else None
    data = LanguageDataModule(shards, a.block, a.batch, seed=seed, pictures=pictures)
    seen = fit(module, data, a.steps, a)
    values = {
        "seconds_per_step": statistics.median(seen.seconds),
        "pairs": seen.documents,
        "settings": settings,
    }
    values["parameters"] = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    if name == "emu":
        extra["decoder_seconds"] = emu_decoder(seed, folder, a)
    return values | extra


def vlgpt_tokenizer(seed: int, folder: Path, a: Namespace) -> tuple[str, float]:
    own = {k: v for k, v in recipe("vlgpt-tokenizer")["model"].items() if k not in ("width", "out")}
    own |= {
        "visual_tokenizer": a.tokenizer,
        "out": str(folder / "tokenizer"),
        "warmup_steps": a.first // 10,
    }
    stage = VLGPTTokenizerTraining(a.width, seed=seed, **own)
    seen = fit(stage, pictures_of(seed, a), a.first, a)
    return str(folder / "tokenizer"), sum(seen.seconds)


def emu_decoder(seed: int, folder: Path, a: Namespace) -> float:
    own = {k: v for k, v in recipe("emu-decoder")["model"].items() if not k.startswith("sample")}
    own |= {
        "model": str(folder / "model"),
        "out": str(folder / "decoder"),
        "warmup_steps": a.after // 10,
        "seed": seed,
    }
    own |= {"betas": tuple(own["betas"])} if "betas" in own else {}
    return sum(fit(EmuDecoderTraining(**own), pictures_of(seed, a), a.after, a).seconds)


def pictures_of(seed: int, a: Namespace) -> ImageDataModule:
    return ImageDataModule(
        a.data, a.size, 32, seed=seed, caption_column="caption", flip=0.5, cache=True
    )


# Measures


def measure(name: str, seed: int, folder: Path, a: Namespace) -> dict[str, Any]:
    decoder = {"emu": str(folder / "decoder"), "vlgpt": str(folder / "tokenizer")}.get(
        name, a.decoder
    )
    lm = MultimodalLM.from_pretrained(folder / "model", decoder=decoder)
    crop = lm.visual_tokenizer.image_processor.resize_mode == "center_crop"
    pictures = picture_sets.load_pictures(a.data, a.size, a.split, None, crop)
    said = [i for i, caption in enumerate(pictures.captions) if caption.strip()]
    nats, tokens = 0.0, 0
    for i in said[:: max(1, len(said) // a.images)][: a.images]:
        context = [Picture.fromarray(pictures.pixels[i].permute(1, 2, 0).numpy())]
        if lm.objective.prompt_templates.caption:
            context.append(lm.objective.prompt_templates.caption)
        caption = pictures.captions[i]
        nats -= float(lm.rank(context, [caption])[0])
        tokens += len(lm.processor.text(caption)) + 1
    places = choose(pictures.captions, a.captions, 0)
    captions = [pictures.captions[i] for i in places]
    drawn = paint(lm, captions, seed, a)
    pixels = VisualImageProcessor(a.size).to_uint8(drawn)
    found = top(ranks(Scorer(a.scorer).describe(pixels), embed(captions)))
    contact_sheet(pictures.pixels[places][:SHOWN], pixels[:SHOWN], captions[:SHOWN]).save(
        folder / "painted.png"
    )
    return {"caption_nats": nats / tokens, "caption_tokens": tokens, **found}


def paint(lm: MultimodalLM, captions: list[str], seed: int, a: Namespace) -> list[Picture.Image]:
    """A picture for each caption, each from a generator of its own."""
    drawn: list[Picture.Image] = []
    for start in range(0, len(captions), a.batch_size):
        part = captions[start : start + a.batch_size]

        def generators(first: int = start, count: int = len(part)) -> list[torch.Generator]:
            return [
                torch.Generator().manual_seed(seed * len(captions) + first + i)
                for i in range(count)
            ]

        if lm.objective.image_output == "codes":
            said: tuple[Any, ...] = (lm.generate_codes_batch(part, generator=generators()),)
        else:
            said = lm.generate_vectors_batch(part), lm.generate_vectors_batch([""])
        drawn += lm.decoder(*said, num_inference_steps=a.denoising, generator=generators()).images
    return drawn


def one(name: str, seed: int, a: Namespace) -> dict[str, Any]:
    """Trained and measured, or read where both is done."""
    folder = a.runs / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        k: getattr(a, k)
        for k in ("steps", "first", "after", "width", "layers", "block", "batch", "captions")
    }
    asked |= {"pictures": a.images, "denoising": a.denoising, "precision": a.precision}
    values: dict[str, Any] = {}
    for part, make in (("trained", train), ("measured", measure)):
        done = folder / f"{part}.json"
        if done.exists():
            found = json.loads(done.read_text())
            if found["asked"] != asked:
                raise ValueError(
                    f"{done}: made with {found['asked']}, asked for {asked}: give another --runs"
                )
        else:
            print(f"{name}, seed {seed}: {part}", flush=True)
            found = {"asked": asked, **make(name, seed, folder, a)}
            done.write_text(json.dumps(found, indent=1))
        values |= found
    return values


# The script


def main(a: Namespace) -> dict[str, Any]:
    embed(["what is missing is said now, not after a long run"])
    a.size = common.load_tokenizer(a).config.image_size
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(a.seeds):
        for name in a.objectives:
            runs.setdefault(name, []).append(one(name, seed, a))
            write(runs, a)
    return runs


def write(runs: dict[str, list[dict[str, Any]]], a: Namespace) -> None:
    keys = ("caption_nats", "top1", "top5", "seconds_per_step")
    spread = {
        name: {k: common.spread([run[k] for run in own]) for k in keys}
        for name, own in runs.items()
    }
    rows = [
        (name, len(runs[name]), *(common.plus_minus(own[k]) for k in keys), runs[name][0]["pairs"])
        for name, own in spread.items()
    ]
    head = (
        "objective",
        "seeds",
        "caption, nats a token",
        "top-1",
        "top-5",
        "seconds a step",
        "documents seen",
    )
    body = f"{a.steps} steps of {a.batch} blocks of {a.block} places; llama of {a.layers} layers, {a.width} wide, from "
    body += f"random weights. {a.pictures} held-out captions; pictures of {a.captions} captions. VL-GPT: {a.first} steps "
    body += f"for its tokenizer before. Emu: {a.after} for its decoder after.\n\n" + common.table(
        head, rows
    )
    body += f"\n\nChance: top-1 {1 / a.captions:.3g}, top-5 {5 / a.captions:.3g}.\n\n![](objectives.png)"
    common.write("objectives", a.out, "Four objectives", body, {"runs": runs, "spread": spread})
    plot(runs, a)


def plot(runs: dict[str, list[dict[str, Any]]], a: Namespace) -> None:
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = {
        "caption_nats": "caption, nats a token",
        "top5": "top-5 of painted pictures",
        "seconds_per_step": "s a step",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, (_, own) in enumerate(runs.items()):
            axis.plot([place] * len(own), [run[key] for run in own], "o")
        axis.set_xticks(range(len(runs)), list(runs))
        axis.set_title(title)
    axes[1].axhline(5 / a.captions, color="grey", linestyle=":")
    figure.savefig(a.out / "objectives.png", dpi=120)
    plt.close(figure)


def arguments() -> Any:
    found = common.parser(__doc__, limit=None)
    found.add_argument(
        "--shards", required=True, help="of the data set, by lavit-tok shards --flip"
    )
    found.add_argument(
        "--grid-shards", required=True, help="of the same, with --budget of all patches: DaVinci's"
    )
    found.add_argument(
        "--text-tokenizer", required=True, help="recipes/lm/text_tokenizer.py's folder"
    )
    found.add_argument(
        "--scorer",
        default="runs/default/teacher",
        help="folder that recipes/default/teacher.py wrote",
    )
    found.add_argument("--decoder", default="default", help="pixel decoder of codes")
    found.add_argument("--objectives", nargs="+", choices=NAMES, default=list(NAMES))
    found.add_argument("--seeds", type=common.positive, default=3)
    found.add_argument("--steps", type=common.positive, default=400, help="of the language model")
    found.add_argument("--first", type=common.positive, default=300, help="of VL-GPT's tokenizer")
    found.add_argument("--after", type=common.positive, default=300, help="of Emu's decoder")
    found.add_argument(
        "--width", type=common.positive, default=192, help="of the LM; a multiple of 64"
    )
    found.add_argument("--layers", type=common.positive, default=4)
    found.add_argument("--block", type=common.positive, default=256, help="places")
    found.add_argument("--batch", type=common.positive, default=16, help="blocks of a step")
    found.add_argument(
        "--pictures",
        type=common.positive,
        default=400,
        help="held-out captions whose loss is taken",
    )
    found.add_argument(
        "--captions", type=common.positive, default=100, help="that pictures are painted for"
    )
    found.add_argument(
        "--denoising", type=common.positive, default=20, help="steps of the pixel decoders"
    )
    found.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    found.add_argument(
        "--runs", type=Path, default=Path("runs/objectives"), help="folder of the trained models"
    )
    return found


if __name__ == "__main__":
    sys.exit(common.run(main, arguments().parse_args()))
