"""What does a training step of stage 1 cost beside the bare modules' forward and backward?

    lavit-tok   Trainer.fit of TokenizerTraining: loader, decisions, EMA codebook, usage, logging, clipping, AdamW
    bare        the same encoder, merger, projection, codebook look-up, reconstructor: one cosine loss, backward, AdamW

Two stretches of training: `sampled`, where every row is computed under a sampled mask (stretch A), and `quantised`,
where only kept rows are (stretch B). Bare and Lightning's step take turns in one run, on the same batch; what lies
between two bare steps is Lightning's. Made-up pictures, random weights, scores shifted so that a third of the patches
is kept. Writes train_speed.md, .json and .png. Finished settings are kept if the run is killed.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import tempfile
import warnings
from argparse import Namespace
from functools import partial
from typing import Any

import adapters
import common
import pytorch_lightning as pl
import timing
import torch
from encode_speed import base_config
from parts import Parts, progress
from speeds import in_own_process, peak_gib
from timing import clock
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.encode.allocation import keep_by_budget
from lavit_tok.encode.selector import keep_scores
from lavit_tok.training.tokenizer_training import TokenizerTraining

RHO = 1 / 3
STRETCHES = ("sampled", "quantised")


def config_of(case: str, a: Namespace) -> TokenizerConfig:
    if case == "shipped":
        return VisualTokenizer.from_pretrained(a.tokenizer).config
    return {"small": TokenizerConfig, "base": base_config, "lavit": TokenizerConfig.lavit}[case]()


def module_for(config: TokenizerConfig, stretch: str) -> TokenizerTraining:
    """The training module in one stretch from its first step on, keeping a third of the patches."""
    never = 1_000_000
    plan = (
        {"stop_sampling_step": never, "quantize_at": never}
        if stretch == "sampled"
        else {"stop_sampling_step": 0, "quantize_at": 0}
    )
    # Recent vectors are kept for k-means only: a short memory, since there is none here.
    return TokenizerTraining(
        config,
        rho=RHO,
        hold_ratio=True,
        random_budget_ratio=0.0,
        kmeans_samples=4096,
        blend_steps=1,
        log_images_every=0,
        **plan,
    )


def pictures(size: int, batch: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of made-up pictures: noise, smoothed to different degrees, so that patches differ."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        coarse = torch.rand(batch, 3, max(2, size // 8), max(2, size // 8), generator=generator)
        images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
        found.append({"images": images.to(torch.uint8)})
    return found


class Bare:
    """The modules of a copy of the tokenizer, trained on one cosine loss with a fixed rule for the mask."""

    def __init__(self, tokenizer: VisualTokenizer, stretch: str, device: str, clip: float) -> None:
        self.tokenizer, self.stretch, self.clip = (
            copy.deepcopy(tokenizer).to(device).train(),
            stretch,
            clip,
        )
        self.parameters = [
            p
            for n, p in self.tokenizer.named_parameters()
            if not n.startswith(("encoder.", "selector."))
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, images: Tensor) -> float:
        tokenizer = self.tokenizer
        with torch.no_grad():
            features = tokenizer.features(tokenizer.image_processor.normalize(images))
            keep = keep_by_budget(keep_scores(tokenizer.score(features)), RHO)
        if self.stretch == "sampled":
            policy = keep.float()
            vectors = tokenizer.quantizer.project(tokenizer.merger.dense(features, policy))
            index = keep.long().cumsum(1) - keep.long()
            rebuilt = tokenizer.reconstructor(vectors, index, policy)
        else:
            z = tokenizer.project(tokenizer.merge(features, keep))
            codes = tokenizer.quantize(z.detach(), keep.sum(1))
            rebuilt = tokenizer.reconstructor.ragged(
                z + (tokenizer.lookup(codes) - z).detach(), codes.layout
            )
        loss = 1 - F.cosine_similarity(features, rebuilt, dim=-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class InTurns(pl.Callback):
    """After each of Lightning's steps the bare one, on the same batch; and the stretch, set before the first."""

    def __init__(self, bare: Bare | None, stretch: str, device: str) -> None:
        self.bare, self.stretch, self.device, self.since = bare, stretch, device, 0.0
        self.seconds: dict[str, list[float]] = {"lavit-tok": [], "bare": []}
        self.kept: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.stretch == "quantised":
            module.stage.fill_(2)  # without k-means: the rows are as random as everything else
        self.since = clock(self.device)[0]

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.seconds["lavit-tok"].append(clock(self.device)[0] - self.since)
        self.kept.append(float(trainer.callback_metrics["train/keep_ratio"]))
        if self.bare is not None:
            start = clock(self.device)[0]
            self.bare.step(batch["images"])
            self.seconds["bare"].append(clock(self.device)[0] - start)
        self.since = clock(self.device)[0]


def fit(
    config: TokenizerConfig, stretch: str, batch: int, steps: int, a: Namespace, beside: bool = True
) -> dict[str, Any]:
    """Lightning's steps of one stretch, and the bare ones between them."""
    torch.manual_seed(0)
    module = module_for(config, stretch)
    batches = pictures(config.image_size, batch, steps)
    with torch.no_grad():
        module.to(a.device)
        scores = keep_scores(
            module.tokenizer.score(module.features(batches[0]["images"].to(a.device)))
        )
        module.tokenizer.selector.shift(-float(scores.flatten().quantile(1 - RHO)))
    bare = Bare(module.tokenizer, stretch, a.device, a.clip) if beside else None
    counted = timing.flops(lambda: bare.step(batches[0]["images"].to(a.device))) if bare else 0
    turns = InTurns(bare, stretch, a.device)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    cuda = a.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers and few batches
        trainer = pl.Trainer(
            accelerator="gpu" if cuda else "cpu",
            devices=[torch.device(a.device).index or 0] if cuda else 1,
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=a.clip,
            logger=False,
            callbacks=[turns],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
    trained = sum(
        p.numel() for n, p in module.tokenizer.named_parameters() if not n.startswith("encoder.")
    )
    return {
        "seconds": turns.seconds,
        "kept_share": statistics.fmean(turns.kept),
        "bare_gflops_per_image": counted / batch / 1e9,
        "parameters": {"trained": trained, "frozen": adapters.count(module.tokenizer.encoder)},
    }


def training_memory(case: str, stretch: str, batch: int, a: Namespace) -> dict[str, float]:
    """Peak memory of a process that takes two of Lightning's steps: resident on a CPU, allocated on CUDA."""
    cuda = a.device.startswith("cuda")
    found = {"imports_gib": 0.0 if cuda else peak_gib()}
    fit(config_of(case, a), stretch, batch, 2, a, beside=False)
    return found | {"run_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_gib()}


def measure(case: str, stretch: str, a: Namespace) -> dict[str, Any]:
    """One row: what Lightning's step and the bare one take."""
    config = config_of(case, a)
    batch = a.batch_size or {"shipped": 64, "small": 64, "base": 8, "lavit": 2}[case]
    found = fit(config, stretch, batch, a.warm + a.steps, a)
    seconds = {name: times[a.warm :] for name, times in found.pop("seconds").items()}
    codes = found["kept_share"] * config.num_patches
    row = {
        "case": case,
        "stretch": stretch,
        "batch": batch,
        "image_size": config.image_size,
        "tokens_per_image": codes,
        "bits_per_image": codes * math.log2(config.codebook_size),
        **found,
        "steps": a.steps,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "images_per_second": {
            name: batch / statistics.median(times) for name, times in seconds.items()
        },
        "time_ratio": timing.ratio(seconds["lavit-tok"], seconds["bare"]),
    }
    if a.memory:
        row["peak_memory"] = in_own_process(training_memory, case, stretch, batch, a)
    print(f"{case} {stretch}: {row['time_ratio']:.3f} times the bare step", flush=True)
    return row


def main(arguments: Namespace) -> dict[str, Any]:
    a = arguments
    settings = common.given(a)
    parts = Parts(
        a.out,
        "train_speed",
        {"script": "train_speed", **settings, "where": common.provenance("train_speed")},
    )
    todo = [(case, stretch) for case in a.cases for stretch in STRETCHES]
    rows = [
        parts.values(f"{case}-{stretch}", partial(measure, case, stretch, a))
        for case, stretch in progress(todo, "settings", len(todo))
    ]
    values = {"rows": rows}
    a.out.mkdir(parents=True, exist_ok=True)
    plot(rows, a.out / "train_speed.png")
    common.write("train_speed", a.out, "Training speed, stage 1", text(values), values)
    parts.done()
    return values


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for offset, name in ((-0.2, "bare"), (0.2, "lavit-tok")):
        values = [r["images_per_second"][name] for r in rows]
        bars = axis.bar([i + offset for i in range(len(rows))], values, 0.38, label=name)
        axis.bar_label(bars, [f"{v:.3g}" for v in values], fontsize=8)
    axis.set_xticks(range(len(rows)), [f"{r['case']}\n{r['stretch']}" for r in rows])
    axis.set(ylabel="images/s", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def text(values: dict[str, Any]) -> str:
    lines = [
        (
            f"{r['case']}, {r['stretch']}",
            r["image_size"],
            r["batch"],
            r["tokens_per_image"],
            f"{r['parameters']['trained'] / 1e6:.4g} + {r['parameters']['frozen'] / 1e6:.4g}",
            r["bare_gflops_per_image"],
            *(r["images_per_second"][name] for name in ("bare", "lavit-tok")),
            r["time_ratio"],
            r.get("peak_memory", {}).get("run_gib"),
        )
        for r in values["rows"]
    ]
    head = (
        "size and stretch",
        "pixels",
        "batch",
        "codes an image",
        "weights, M, trained + frozen",
        "bare GFLOPs an image",
    )
    body = common.table(
        (*head, "images/s bare", "lavit-tok", "time ratio", "peak memory, GiB"), lines
    )
    body += "\n\nWhole steps, float32. Bare: the same modules on one cosine loss and AdamW, in turns with Lightning's "
    return (
        body
        + "steps; its FLOPs are those of its forward and backward.\n\n![images/s](train_speed.png)"
    )


def arguments() -> Any:
    found = common.parser(__doc__, data=False, batch_size=None)
    found.add_argument(
        "--cases",
        nargs="+",
        choices=["shipped", "small", "base", "lavit"],
        default=["shipped", "base"],
    )
    found.add_argument("--warm", type=int, default=2, help="steps before those that count")
    found.add_argument("--steps", type=common.positive, default=8)
    found.add_argument("--clip", type=float, default=1.0)
    found.add_argument(
        "--memory",
        action="store_true",
        help="also the peak memory of training, in a process of its own",
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))
