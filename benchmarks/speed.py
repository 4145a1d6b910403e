"""What do encoding, decoding, training and generating cost, beside the bare models in the same run?

    encode    image -> codes, beside the bare encoder's features, and beside other tokenizers
    decode    codes -> image, beside the bare U-Net called as often, and beside other decoders
    train     Lightning's step of stage 1, beside the same modules' forward, backward and AdamW
    generate  codes by the language model: guided or not, and by the loop of transformers, with
              --compiled also with its static cache and a compiled step

Calls are timed in turns; ratios are medians of the pairs' ratios; FLOPs are of one image. Other
sizes than `shipped` have random weights: speed depends on the ratio of patches kept, which is
fixed. Writes speed_CASE.md and .json. A stopped run continues where it was.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import copy
import itertools
import math
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shared import cli, report, timing, tokenizers
from benchmarks.shared.cache import Stages, progress
from benchmarks.shared.timing import Entry
from benchmarks.shared.tokenizers import RANDOM, count_weights
from lavit_tok import TokenizerConfig, VisualCodes, VisualTokenizer
from lavit_tok.encode.allocation import keep_by_budget
from lavit_tok.encode.selector import keep_scores

BATCHES = {"shipped": [1, 32], "base": [8], "lavit": [1, 4, 16]}
TRAIN_BATCH = {"shipped": 64, "base": 8, "lavit": 2}
STRETCHES = ("sampled", "quantized")
Records = list[dict[str, Any]]


def base_config() -> TokenizerConfig:
    """CLIP ViT-B/16 at 224 pixels with 4 merger blocks: the size of the base recipe."""
    encoder = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16}
    encoder |= {"hidden_size": 768, "intermediate_size": 3072}
    encoder |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    sizes = {"codebook_size": 8192, "code_dim": 32, "merger_depth": 4, "reconstructor_depth": 4}
    return TokenizerConfig(encoder=encoder, num_heads=12, **sizes)


SIZES = {"base": base_config, "lavit": TokenizerConfig.lavit}


def build(size: str, args: Namespace, dtype: str = "float32") -> VisualTokenizer:
    """The shipped (or named) tokenizer, or one of a size of SIZES with random weights."""
    kind = getattr(torch, dtype)
    if size == "shipped":
        return VisualTokenizer.from_pretrained(args.tokenizer, device=args.device).to(dtype=kind)
    torch.manual_seed(0)
    return VisualTokenizer(SIZES[size]()).to(args.device, kind)


def entry(name: str, make: Callable[[int], Any], batch: int, *about: Any, **more: Any) -> Entry:
    """The entry of make(batch) with the FLOPs of make(1).

    Args:
        about: weights, number of weights, codes per image, codebook size.
    """
    weights, parameters, count, codebook_size = about
    info = {"weights": weights, "codes_per_image": count, "million_weights": parameters / 1e6}
    info |= {"bits_per_image": None if count is None else count * math.log2(codebook_size)}
    return Entry(name, make(batch), batch, make(1), info=info, **more)


def random_codes(batch: int, count: int, codebook_size: int) -> VisualCodes:
    """The same number of uniform codes for each image."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, codebook_size, (batch, count), generator=generator)
    return VisualCodes.from_list(list(codes), codebook_size=codebook_size)


def noise(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(batch)]


@torch.no_grad()
def encode(args: Namespace, size: str, dtype: str, batch: int, others: list[str]) -> Records:
    """The bare encoder, ours (at LaVIT's size under both attention formulas), other tokenizers."""
    tokenizer, generator = build(size, args, dtype), torch.Generator().manual_seed(0)
    config, side = tokenizer.config, tokenizer.config.image_size
    images = torch.randint(256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    pixels = tokenizer.preprocess(images)

    def ours(formula: Any, count: int) -> VisualCodes:
        if tokenizer.merger is not None:  # nested codes have none
            tokenizer.merger.formula = formula
        return tokenizer.encode_pixels(pixels[:count], budget=args.keep)

    formulas = ["strict", "compat"] if size == "lavit" else [config.attention]
    weights = Path(args.tokenizer).name if size == "shipped" else RANDOM
    kept = float(ours(formulas[0], batch).lengths.double().mean())
    encoder = count_weights(tokenizer.encoder)
    whole = encoder + count_weights(tokenizer.selector, tokenizer.merger, tokenizer.quantizer)
    bare = f"{size} {dtype}: bare encoder"
    make: Any = lambda n: partial(tokenizer.features, pixels[:n])  # noqa: E731
    entries = [entry(bare, make, batch, weights, encoder, None, 1)]
    for formula in formulas:
        name, about = f"{size} {dtype}: lavit-tok, {formula}", (weights, whole, kept)
        make = partial(partial, ours, formula)
        entries.append(entry(name, make, batch, *about, config.codebook_size, baseline=bare))
    for name in others:
        other = tokenizers.load(name, args.device, side)
        if other.image_size != side:
            raise ValueError(f"--beside {name}: expected {side} pixels, got {other.image_size}")
        make = lambda n, other=other: partial(other.encode, images[:n])  # noqa: E731
        count = other.encode(images).lengths.double().mean()
        about = (other.weights, other.parameters["encode"], float(count))
        entries.append(entry(other.name, make, batch, *about, other.codebook_size))
    return timing.compare(entries, args.repeats, args.warm)


@torch.no_grad()
def bare_unet(decoder: Any, codes: VisualCodes, steps: int, guided: bool) -> Callable[[], Any]:
    """A function that calls the U-Net `steps` times; its inputs are computed here, once.

    Of a decoder without U-Net it calls the mean decoder.
    """
    if decoder.unet is None:
        return partial(decoder.mean_decoder, decoder.conditioner.features(codes))
    device, side = decoder.unet.device, decoder.unet.config.sample_size
    condition = decoder.conditioner(codes.to(device))
    if guided:
        condition = decoder.conditioner.unconditional(condition).cat(condition)
    shape = (len(condition.tokens), decoder.vae.config.latent_channels, side, side)
    times = torch.zeros(shape[0], 6, device=device)
    inputs = condition.inputs(torch.randn(shape, device=device), times)
    decoder.scheduler.set_timesteps(steps, device=device)

    @torch.no_grad()
    def loop() -> Any:
        for t in decoder.scheduler.timesteps:
            output = decoder.unet(timestep=t, **inputs, return_dict=False)[0]
        return output

    return loop


def decode(args: Namespace, steps: int, guidance: float, others: list[str]) -> Records:
    """The bare U-Net loop, the pipeline, and the other tokenizers' decoders of full grids."""
    ours: Any = tokenizers.load(args.tokenizer, args.device, 0, args.decoder, steps, guidance)
    decoder, batch, size = ours.decoder, args.decode_batch_size, ours.codebook_size
    for module in (decoder.conditioner, decoder.unet, decoder.vae, decoder.mean_decoder):
        if module is not None:
            module.requires_grad_(False)  # FlopCounterMode fails on views of weights with gradients
    count = max(1, round(ours.max_codes * args.keep))
    codes, label = random_codes(batch, count, size), f"{steps} steps, guidance {guidance:g}"
    network = decoder.mean_decoder if decoder.unet is None else decoder.unet
    bare = f"bare {'mean decoder' if decoder.unet is None else f'U-Net, {label}'}"
    loop = lambda n: bare_unet(decoder, codes.take(range(n)), steps, guidance != 1)  # noqa: E731
    call = lambda n: partial(ours.decode, codes.take(range(n)), noise(n))  # noqa: E731
    about = (args.decoder, ours.parameters["decode"], count, size)
    entries = [
        entry(bare, loop, batch, args.decoder, count_weights(network), None, 1),
        entry(f"lavit-tok, {label}", call, batch, *about, baseline=bare),
    ]
    for other in (tokenizers.load(name, args.device, ours.image_size) for name in others):
        if other.decodes:
            grid = random_codes(batch, other.max_codes, other.codebook_size)
            make = lambda n, o=other, g=grid: partial(o.decode, g.take(range(n)), noise(n))  # noqa: E731
            about = (other.weights, other.parameters["decode"], other.max_codes)
            entries.append(entry(other.name, make, batch, *about, other.codebook_size))
    return timing.compare(entries, args.repeats, args.warm)


class BareTraining:
    """The modules of a copy of the tokenizer, trained on one cosine loss with a fixed keep mask."""

    def __init__(self, tokenizer: VisualTokenizer, stretch: str, args: Namespace) -> None:
        self.tokenizer = copy.deepcopy(tokenizer).to(args.device).train()
        self.stretch, self.keep, frozen = stretch, args.keep, ("encoder.", "selector.")
        named = self.tokenizer.named_parameters()
        self.parameters = [p for name, p in named if not name.startswith(frozen)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Forward, backward, clipping, AdamW."""
        tokenizer = self.tokenizer
        with torch.no_grad():
            features = tokenizer.features(tokenizer.image_processor.normalize(batch["images"]))
            keep = keep_by_budget(keep_scores(tokenizer.score(features)), self.keep)
        if self.stretch == "sampled":  # every patch is computed, under a mask
            policy, index = keep.float(), keep.long().cumsum(1) - keep.long()
            vectors = tokenizer.quantizer.project(tokenizer.merger.dense(features, policy))
            reconstructed = tokenizer.reconstructor(vectors, index, policy)
        else:
            z = tokenizer.project(tokenizer.merge(features, keep))
            codes = tokenizer.quantize(z.detach(), keep.sum(1))
            straight_through = z + (tokenizer.lookup(codes) - z).detach()
            reconstructed = tokenizer.reconstructor.ragged(straight_through, codes.layout)
        loss = 1 - F.cosine_similarity(features, reconstructed, dim=-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def training_module(config: TokenizerConfig, stretch: str, args: Namespace) -> Any:
    """The training module from the first step of one stretch on, with a fixed keep ratio."""
    from lavit_tok.training import tokenizer_training as training

    step = 1_000_000 if stretch == "sampled" else 0
    options = {"hold_ratio": True, "random_budget_ratio": 0.0, "stop_sampling_step": step}
    selection = training.SelectionConfig(rho=args.keep, **options)
    codebook = training.CodebookConfig(start_step=step, kmeans_samples=4096, blend_steps=1)
    module = training.TokenizerTraining(
        config, selection=selection, codebook=codebook, log_images_every=0
    )
    if stretch == "quantized":
        module.stage.fill_(2)  # without k-means: the codebook is as random as everything else
    return module


def random_batches(size: int, batch: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of smooth noise, so that patches differ."""
    generator, side = torch.Generator().manual_seed(0), max(2, size // 8)
    coarse = torch.rand(count * batch, 3, side, side, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
    return [{"images": part} for part in images.to(torch.uint8).split(batch)]


def train(args: Namespace, size: str, stretch: str) -> Records:
    """Lightning's steps in one stretch of training, and the bare modules' steps between them."""
    from torch.utils.data import DataLoader

    from benchmarks.shared.training_steps import TimedSteps, fit

    config = build(size, args).config if size == "shipped" else SIZES[size]()
    torch.manual_seed(0)
    module = training_module(config, stretch, args)
    batch = args.train_batch_size or TRAIN_BATCH[size]
    batches = random_batches(config.image_size, batch, args.warm + args.steps)
    with torch.no_grad():  # scores shifted so that the ratio of kept patches is as stated
        first = batches[0]["images"].to(module.to(args.device).device)
        scores = keep_scores(module.tokenizer.score(module.features(first)))
        module.tokenizer.selector.shift(-float(scores.flatten().quantile(1 - args.keep)))
    bare, kept = BareTraining(module.tokenizer, stretch, args), []

    def step(batch: dict[str, Tensor]) -> None:
        kept.append(float(module.trainer.callback_metrics["train/keep_ratio"]))
        bare.step(batch)

    flops = timing.flops(partial(bare.step, {"images": first}))
    timed = TimedSteps(step)
    fit(module, DataLoader(batches, batch_size=None), len(batches), args.device, timed)
    names = ("lavit-tok", "bare")
    ours, theirs = (
        timing.measurement(name, found[args.warm :])
        for name, found in zip(names, timed.seconds, strict=True)
    )
    count = statistics.fmean(kept) * config.num_patches
    trained = [p for n, p in module.tokenizer.named_parameters() if not n.startswith("encoder.")]
    record = {
        "name": f"{size}, {stretch}: lavit-tok",
        "batch": batch,
        "codes_per_image": count,
        "bits_per_image": count * math.log2(config.codebook_size),
        "million_weights": sum(p.numel() for p in trained) / 1e6,
        "gflops_per_image": flops / batch / 1e9,
        "images_per_second": batch / ours.median,
        "bare_images_per_second": batch / theirs.median,
        "baseline": "bare modules",
        "time_ratio": timing.ratio(ours, theirs),
        "repeats": args.steps,
    }
    return [record]


def generate(args: Namespace, batch: int) -> Records:
    """Codes of `batch` images, each with exactly --codes codes, so that all take equal steps."""
    from lavit_lm import MultimodalLM

    words = "a red apple and two dogs on the old wooden table in the rain".split()  # noqa: SIM905
    prompts = [" ".join(words[: 2 + i % (len(words) - 1)]) for i in range(batch)]  # unequal lengths
    visual = None if args.tokenizer == "default" else args.tokenizer
    options = {"visual_tokenizer": visual, "decoder": None, "device": args.device}
    lm = MultimodalLM.from_pretrained(args.model, **options)
    limit = lm.visual_tokenizer.config.num_patches
    if args.codes > limit:
        raise ValueError(f"--codes: expected 1..{limit}, the patches of an image, got {args.codes}")

    def ours(guidance: float) -> None:
        sampling = {"min_codes": args.codes, "max_codes": args.codes, "top_k": args.top_k}
        lm.generate_codes_batch(prompts, guidance, noise(batch), **sampling)

    entries = []
    for name, scale in {"unguided": 1.0, "guided": args.lm_guidance}.items():
        baseline = None if name == "unguided" else "unguided"
        entries.append(Entry(name, partial(ours, scale), batch, baseline=baseline))
        for compiled in [False, True][: 1 + args.compiled]:
            plain = plain_generation(lm, prompts, scale, args, compiled)
            kind = ", transformers" + ", static and compiled" * compiled
            entries.append(Entry(name + kind, plain, batch, baseline=name))
    records = timing.compare(entries, args.repeats, warm=1)
    return [r | {"codes_per_second": args.codes * r["images_per_second"]} for r in records]


def plain_generation(
    lm: Any, prompts: list[str], guidance: float, args: Namespace, compiled: bool
) -> Any:
    """`transformers`' own sampling loop from the same prompts: any id, two forwards if guided."""
    from transformers import CompileConfig

    from lavit_lm.models.kv_state import left_padded
    from lavit_lm.sequences.packing import PADDING

    sequences, free = [lm.prompts.for_image(p) for p in prompts], lm.prompts.sequence([], "image")
    ids, _, _, documents = left_padded(sequences, lm.processor.pad)
    mask = (documents != PADDING).to(lm.device)
    inputs = {"input_ids": ids.to(lm.device), "attention_mask": mask}
    options: dict[str, Any] = {"min_new_tokens": args.codes, "max_new_tokens": args.codes}
    options |= {"do_sample": True, "top_k": args.top_k, "pad_token_id": lm.processor.pad}
    if compiled:
        config = CompileConfig(mode="default")
        config._compile_all_devices = True  # otherwise it compiles on accelerators only
        options |= {"cache_implementation": "static", "compile_config": config}
    if guidance != 1:
        negative = free.ids.expand(len(sequences), -1).to(lm.device)
        options |= {"guidance_scale": guidance, "negative_prompt_ids": negative}

    def call() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return lm.model.causal.generate(**inputs, **options)[:, ids.shape[1] :]

    return call


CASES = ["encode", "decode", "train", "generate"]


def calls(case: str, args: Namespace) -> dict[str, Callable[[], Records]]:
    """What a case measures: the stages' names and functions."""
    found: list[tuple[Any, ...]] = []
    if case == "encode":
        for dtype, size in itertools.product(args.dtypes, args.sizes):
            batches = args.batch_sizes or BATCHES[size]
            for batch in batches:  # other tokenizers only at the smallest batch, in float32
                beside = args.beside if batch == min(batches) and dtype == "float32" else []
                found.append((encode, size, dtype, batch, beside))
    elif case == "decode":
        pairs = list(itertools.product(args.denoising, args.guidance))
        found = [(decode, *pair, args.beside if pair == pairs[-1] else []) for pair in pairs]
    elif case == "train":
        found = [(train, *pair) for pair in itertools.product(args.sizes, STRETCHES)]
    else:
        found = [(generate, batch) for batch in args.batch_sizes or [1, 8, 32]]
    return {f"{case} {options}": partial(call, args, *options) for call, *options in found}


NOTES = {
    "encode": "Overhead: time ratio / FLOP ratio, aim at most 1.15; selector, merger and codebook "
    "are work that the bare encoder does not have. Other tokenizers have random weights.",
    "decode": "float32. The ratios are what conditioner, scheduler and VAE add to the bare U-Net. "
    "The other decoders run once per image, with random weights.",
    "train": "Whole steps, float32. Bare: the same modules on one cosine loss and AdamW, whose "
    "forward and backward the FLOPs are of.",
    "generate": "As many codes from the same prompts. Guided beside unguided: aim at most 1.15 at "
    "batch 1. Beside `transformers`, compiled: aim at least 1.43 unguided and 1.67 guided. "
    "`transformers` has no constraint and runs the model twice a step for guidance.",
}


def main(args: Namespace) -> dict[str, Any]:
    results = {}
    for case in args.cases:
        name = f"speed_{case}"
        stages = Stages(args, name)
        todo = progress(calls(case, args).items(), case)
        records = [record for stage, compute in todo for record in stages(stage, compute)]
        body = f"{timing.table(records)}\n\n{NOTES[case]} Medians of all rounds."
        results[case] = {"records": records}
        report.write(name, args, f"Speed: {case}", body, results[case])
        stages.done()
    return results


def arguments() -> ArgumentParser:
    return cli.parser(
        __doc__,
        data=False,
        cases=(["encode"], "what is measured", CASES),
        tokenizer=("default", "of `shipped`: 'default', a directory or a Hub id"),
        sizes=(["shipped"], "of encode and train", ["shipped", *SIZES]),
        dtypes=(["float32"], "of encode", ["float32", "bfloat16"]),
        batch_sizes=([int], f"of encode ({BATCHES} by default) and generate (1, 8 and 32)"),
        keep=(1 / 3, "ratio of the patches kept, spent across the batch"),
        beside=(["vqmodel"], "other tokenizers, or module:function"),
        decoder=("default", "of decode: 'default', a directory or a Hub id"),
        denoising=([10, 25], "numbers of decoding steps"),
        guidance=([1.0, 3.0], "guidance scales of the decoder"),
        decode_batch_size=(4, "of decode"),
        train_batch_size=(int, f"of train; {TRAIN_BATCH} by default"),
        steps=(8, "training steps"),
        model=("default", "of generate: 'default', a directory or a Hub id"),
        codes=(20, "codes per generated image"),
        lm_guidance=(3.0, "guidance scale of the language model"),
        compiled=(False, "of generate: also with the static cache and compiled step"),
        top_k=(50, "of sampling"),
        repeats=(5, "rounds"),
        warm=(2, "rounds, or training steps, before those that count"),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, arguments()))
