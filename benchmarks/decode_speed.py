"""What does drawing cost, beside the bare U-Net and beside other tokenizers' decoders?

    PixelDecoder(codes)   condition, `steps` guided steps of the scheduler, VAE decoder
    bare U-Net loop       the same U-Net called `steps` times on inputs that lie ready, doubled batch where guided

The two share a run, in turns, at every number of steps and guidance; their ratio is what all else costs. Guidance 1 is
the conditional prediction alone, at half the batch. The others decode a full grid of codes once. Random codes: speed
does not depend on what they are, only on how many there are. Writes decode_speed.md, .json and .png. Finished settings
are kept if the run is killed.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import adapters
import common
import torch
from parts import Parts, progress
from speeds import Entry, add_memory, plot, side_by_side, table

from lavit_tok import PixelDecoder, VisualCodes


def random_codes(decoder: PixelDecoder, batch: int, keep: float) -> VisualCodes:
    config = decoder.conditioner.config
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(config.patches * keep))
    rows = torch.randint(0, config.codebook_size, (batch, count), generator=generator)
    return VisualCodes.from_list(list(rows), codebook_size=config.codebook_size)


@torch.no_grad()
def bare_loop(
    decoder: PixelDecoder, codes: VisualCodes, steps: int, guided: bool
) -> Callable[[], Any]:
    """A function that calls the U-Net `steps` times; what it reads is computed here, once."""
    device = decoder.unet.device
    condition = decoder.conditioner(codes.to(device))
    if guided:
        condition = decoder.conditioner.unconditional(condition).cat(condition)
    side = decoder.unet.config.sample_size
    batch = len(condition.tokens)
    latents = torch.randn(batch, decoder.vae.config.latent_channels, side, side, device=device)
    inputs = condition.inputs(latents, torch.zeros(batch, 6, device=device))
    decoder.scheduler.set_timesteps(steps, device=device)
    times = list(decoder.scheduler.timesteps)

    @torch.no_grad()
    def loop() -> Any:
        for t in times:
            out = decoder.unet(timestep=t, **inputs, return_dict=False)[0]
        return out

    return loop


def drawing(
    decoder: PixelDecoder, codes: VisualCodes, steps: int, guidance: float
) -> Callable[[], Any]:
    def draw() -> Any:
        noise = [torch.Generator().manual_seed(i) for i in range(len(codes))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        return decoder(codes.to(decoder.unet.device), generator=noise, **options).images

    return draw


def ours(a: Namespace, steps: int, guidance: float) -> list[dict[str, Any]]:
    """The bare loop and the pipeline at one setting."""
    decoder = PixelDecoder.from_pretrained(a.decoder, device=a.device)
    decoder.set_progress_bar_config(disable=True)
    for part in (decoder.conditioner, decoder.unet, decoder.vae):
        part.requires_grad_(
            False
        )  # torch's FLOP counter fails on views of weights that would be trained
    codes, guided = random_codes(decoder, a.batch_size, a.keep), guidance != 1
    one = codes.take([0])
    count = len(codes.values) / len(codes)
    bits = count * math.log2(decoder.conditioner.config.codebook_size)
    label = f"{steps} steps, guidance {guidance:g}"
    unet = adapters.count(decoder.unet)
    load = {
        "name": a.tokenizer,
        "device": a.device,
        "decoder": a.decoder,
        "steps": steps,
        "guidance": guidance,
    }
    whole = unet + adapters.count(decoder.conditioner, decoder.vae.decoder)
    loops = [bare_loop(decoder, some, steps, guided) for some in (codes, one)]
    calls = [drawing(decoder, some, steps, guidance) for some in (codes, one)]
    entries = [
        Entry(f"bare U-Net loop, {label}", a.decoder, a.batch_size, *loops, unet),
        Entry(
            f"lavit-tok, {label}",
            a.decoder,
            a.batch_size,
            *calls,
            whole,
            count,
            bits,
            beside=0,
            load=load,
        ),
    ]
    return measured(entries, a)


@torch.no_grad()
def others(a: Namespace, size: int) -> list[dict[str, Any]]:
    """The other tokenizers' decoders at the same resolution, in turns."""
    entries = []
    for name in a.beside:
        other = adapters.load(name, a.device, size)
        if not other.decodes:
            print(f"{name}: no decoder, left out", flush=True)
            continue
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(
            0, other.codebook_size, (a.batch_size, other.most_codes), generator=generator
        )
        codes = VisualCodes.from_list(list(rows), codebook_size=other.codebook_size)
        noise = [torch.Generator().manual_seed(i) for i in range(a.batch_size)]
        calls = [
            partial(other.decode, some, noise[: len(some)]) for some in (codes, codes.take([0]))
        ]
        bits = other.most_codes * math.log2(other.codebook_size)
        count = float(other.most_codes)
        load = {"name": name, "device": a.device, "image_size": size}
        weights = other.parameters["decode"]
        entries.append(
            Entry(other.name, other.weights, a.batch_size, *calls, weights, count, bits, load=load)
        )
    return measured(entries, a) if entries else []


def measured(entries: list[Entry], a: Namespace) -> list[dict[str, Any]]:
    """One row for each entry, with its peak memory if that is asked for."""
    rows = side_by_side(entries, a.repeats, a.device)
    if a.memory:
        add_memory("decode", rows)
    return [{key: value for key, value in row.items() if key != "load"} for row in rows]


def main(arguments: Namespace) -> dict[str, Any]:
    a = arguments
    settings = common.given(a)
    parts = Parts(
        a.out,
        "decode_speed",
        {"script": "decode_speed", **settings, "where": common.provenance("decode_speed")},
    )
    decoder = PixelDecoder.from_pretrained(a.decoder)
    size = decoder.unet.config.sample_size * decoder.vae_scale_factor
    del decoder
    rows: list[dict[str, Any]] = []
    todo = [(steps, guidance) for steps in a.steps for guidance in a.guidance]
    for steps, guidance in progress(todo, "settings", len(todo)):
        found = parts.values(f"ours-{steps}-{guidance:g}", partial(ours, a, steps, guidance))
        rows += [{"steps": steps, "guidance": guidance, **row} for row in found]
    rows += parts.values("others", partial(others, a, size))
    values = {"image_size": size, "rows": rows}
    a.out.mkdir(parents=True, exist_ok=True)
    plot(rows, a.out / "decode_speed.png", f"decoding, {size} pixels")
    common.write("decode_speed", a.out, "Decoding speed", text(values), values)
    parts.done()
    return values


def text(values: dict[str, Any]) -> str:
    size = values["image_size"]
    body = f"Codes in, pixels out, {size} pixels, float32. 'Beside' the bare U-Net loop: FLOP ratio and time ratio say "
    body += "what conditions, scheduler and VAE add to it.\n\n" + table(values["rows"])
    body += "\n\nWeights of the others are random: their speed and FLOPs are their own. Weights, M: those that decoding "
    body += "uses. `transformers` carries no decoder of Chameleon. Ours is a diffusion model and the others are not: "
    return body + "it runs its U-Net at every step, they run once.\n\n![images/s](decode_speed.png)"


def arguments() -> Any:
    found = common.parser(__doc__, data=False, batch_size=4)
    found.add_argument("--decoder", default="default", help="'default', a directory or a Hub id")
    found.add_argument("--steps", type=common.positive, nargs="+", default=[10, 25])
    found.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    found.add_argument(
        "--keep", type=float, default=1 / 3, help="codes a picture, as a share of its patches"
    )
    found.add_argument("--repeats", type=common.positive, default=3)
    found.add_argument(
        "--memory", action="store_true", help="also each one's peak memory, in a process of its own"
    )
    found.add_argument(
        "--beside", nargs="*", default=["emu3", "janus", "vqmodel"], help="other tokenizers"
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))
