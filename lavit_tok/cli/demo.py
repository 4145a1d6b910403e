"""`lavit-tok demo`: a page that encodes and decodes images, in a browser on this machine.

    Reconstruct       an image -> codes, kept patches, reconstruction, thumbnail of equal bits
    (entry points)    tabs of other packages, such as lavit_lm's: a prompt -> images
    Compare           an image -> the same by two checkpoints, or with two numbers of codes

A package adds a tab by an entry point of the group "lavit_tok.demo": a function that gets the
arguments of the command, loads what it needs, and returns a Tab, or None.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavit_tok.cli.commands import PANEL
from lavit_tok.cli.items import decoder_name, device
from lavit_tok.decode.pipeline import PixelDecoder
from lavit_tok.encode.image_files import open_image
from lavit_tok.tokenizer import VisualTokenizer
from lavit_tok.visualize import kept_overlay, thumbnail

GROUP = "lavit_tok.demo"
AUTOMATIC, BUDGET, QUALITY = "automatic", "budget", "quality"


@dataclass(frozen=True)
class Tab:
    """A tab of the page."""

    title: str
    """Short, such as Compare."""
    build: Callable[[Any], None]
    """Adds components; called with the module gradio, inside the tab."""


@dataclass(frozen=True)
class Reconstruction:
    """What is shown of one image."""

    kept: Image.Image | None
    """The image with its dropped patches dimmed; None for nested codes, which drop none."""
    decoded: Image.Image
    """Decoded from the codes alone."""
    thumbnail: Image.Image
    """The image in as many bits as its codes have."""
    codes: list[int]
    summary: str
    """Numbers of codes and bits, and PSNR."""


@dataclass(frozen=True)
class Checkpoint:
    """A tokenizer and the pixel decoder of its codes."""

    name: str
    tokenizer: VisualTokenizer
    decoder: PixelDecoder

    @classmethod
    def load(cls, tokenizer: str, decoder: str, device: torch.device | str = "cpu") -> Checkpoint:
        """Load both, each by "default", a directory or a Hub id. Raises WeightsError."""
        loaded = VisualTokenizer.from_pretrained(tokenizer, device=device)
        pixels = PixelDecoder.from_pretrained(decoder, device=device)
        pixels.set_progress_bar_config(disable=True)
        return cls(tokenizer, loaded, pixels)

    @property
    def modes(self) -> list[str]:
        """How the number of codes can be given."""
        predicts = [QUALITY] if self.tokenizer.config.error_hidden else []
        return [AUTOMATIC, BUDGET, *predicts]

    def reconstruct(
        self,
        image: Any,
        mode: str = AUTOMATIC,
        budget: int = 32,
        quality: float = 0.8,
        guidance: float | int = 3.0,
        steps: int = 20,
        seed: int = 0,
    ) -> Reconstruction:
        """Encode and decode an image.

        Args:
            image: PIL image, path or bytes.
            mode: "automatic", "budget" or "quality": what the number of codes follows.
            budget: number of codes.
            quality: centered cosine that they are predicted to reach.
            guidance: guidance scale of the pixel decoder.
            steps: its denoising steps.
            seed: of its noise.

        Raises:
            ValueError: no image, or one that cannot be used; a mode that the tokenizer lacks.
        """
        if image is None:
            raise ValueError("expected an image, got none")
        if mode not in self.modes:
            raise ValueError(f"mode: expected one of {self.modes}, got {mode!r}")
        config, processor = self.tokenizer.config, self.tokenizer.image_processor
        chosen: dict[str, Any] = {BUDGET: {"budget": budget}, QUALITY: {"quality": quality}}
        opened = processor.open(image)
        codes = self.tokenizer.encode(opened, **chosen.get(mode, {})).to("cpu")
        assert codes.keep is not None  # codes of images always have a keep mask
        generator = torch.Generator().manual_seed(seed)
        output: Any = self.decoder(codes, steps, guidance, generator)
        (decoded,) = output.images
        side, grid = max(PANEL, config.image_size), config.image_size // config.patch_size
        original = open_image(processor.resize(opened, side))
        small = open_image(processor.resize(opened, config.image_size))
        bits = len(codes.values) * math.log2(config.codebook_size)
        tiny = thumbnail(small, bits)
        summary = (
            f"{len(codes.values)} of {config.num_patches} codes, {bits:.0f} bits. PSNR at "
            f"{config.image_size} x {config.image_size} pixels: decoded {psnr(decoded, small):.1f} "
            f"dB, thumbnail {psnr(tiny, small):.1f} dB."
        )
        enlarged = [x.resize((side, side), Image.Resampling.BICUBIC) for x in (decoded, tiny)]
        overlay = None
        if not self.tokenizer.nested:
            overlay = kept_overlay(original, codes.keep[0], (grid, grid))
        return Reconstruction(overlay, enlarged[0], enlarged[1], codes.values.tolist(), summary)


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, at the reference's size; infinite for equal images."""
    resized = image.convert("RGB").resize(reference.size, Image.Resampling.BICUBIC)
    error = np.square(np.asarray(resized, float) - np.asarray(reference, float)).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def page(checkpoints: Sequence[Checkpoint], tabs: Sequence[Tab] = ()) -> Any:
    """The page, as gradio.Blocks; the first checkpoint is that of the first tab.

    Raises:
        ImportError: without gradio.
    """
    gr = import_gradio()
    with gr.Blocks(title="lavit-tok", analytics_enabled=False) as blocks:
        gr.Markdown("# lavit-tok\nImages to a dynamic number of discrete codes, and back.")
        every = [
            Tab("Reconstruct", lambda gr: _reconstruct_tab(gr, checkpoints[0])),
            *tabs,
            Tab("Compare", lambda gr: _compare_tab(gr, checkpoints)),
        ]
        for tab in every:
            with gr.Tab(tab.title):
                tab.build(gr)
    return blocks


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    import_gradio()  # fail before anything is loaded
    decoder = decoder_name(arguments.decoder, arguments.tokenizer)
    names = [(arguments.tokenizer, decoder), *(arguments.compare or ())]
    where = device(arguments.device)
    checkpoints = [Checkpoint.load(tokenizer, decoder, where) for tokenizer, decoder in names]
    loaded = [found.load()(arguments) for found in entry_points(group=GROUP)]
    tabs = [tab for tab in loaded if tab is not None]
    page(checkpoints, tabs).launch(
        server_name=arguments.host, server_port=arguments.port, share=False, footer_links=[]
    )
    return 0


def import_gradio() -> Any:
    """The module gradio, without its reports to its authors. Raises ImportError without it."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the demo needs gradio: pip install 'lavit-tok[demo]' ({error})"
        ) from None
    return gradio


def reporting(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with bad input reported on the page."""

    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return wrapped


def uploaded(gr: Any) -> Any:
    """A component for an image of the user's."""
    return gr.Image(type="pil", label="Image", height=256, sources=["upload", "clipboard"])


def _number_of_codes(gr: Any, checkpoint: Checkpoint) -> list[Any]:
    """Components of mode, budget and quality; only those that apply are visible."""
    patches = checkpoint.tokenizer.config.num_patches
    mode = gr.Radio(checkpoint.modes, value=AUTOMATIC, label="Number of codes")
    budget = gr.Slider(1, patches, patches // 4, step=1, label="Budget (codes)", visible=False)
    quality = gr.Slider(0.3, 0.98, 0.8, step=0.01, label="Quality (cosine)", visible=False)
    for name, slider in ((BUDGET, budget), (QUALITY, quality)):
        mode.change(lambda x, name=name: gr.update(visible=x == name), mode, slider)
    return [mode, budget, quality]


def _decoding(gr: Any, checkpoints: Sequence[Checkpoint]) -> list[Any]:
    """Components of the diffusion model's options; invisible where there is none."""
    visible = any(one.decoder.unet is not None for one in checkpoints)
    return [
        gr.Slider(1, 6, 3, step=0.5, label="Guidance (decoder)", visible=visible),
        gr.Slider(1, 50, 20, step=1, label="Denoising steps", visible=visible),
        gr.Number(0, label="Seed", precision=0, minimum=0, visible=visible),
    ]


def _panels(gr: Any, height: int, kept: bool) -> list[Any]:
    options = {"format": "png", "height": height, "interactive": False, "buttons": ["fullscreen"]}
    visible = {"Kept patches": kept, "Decoded": True, "Thumbnail, equal bits": True}
    return [gr.Image(label=x, alt_text=x, visible=v, **options) for x, v in visible.items()]


def _shown(gr: Any, result: Reconstruction) -> tuple[Any, ...]:
    codes = " ".join(map(str, result.codes))
    kept = gr.update(value=result.kept, visible=result.kept is not None)
    return kept, result.decoded, result.thumbnail, result.summary, codes


def _reconstruct_tab(gr: Any, checkpoint: Checkpoint) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            image = uploaded(gr)
            inputs = [*_number_of_codes(gr, checkpoint), *_decoding(gr, [checkpoint])]
            button = gr.Button("Encode and decode", variant="primary")
        with gr.Column(scale=2):
            with gr.Row():
                outputs = _panels(gr, 256, kept=not checkpoint.tokenizer.nested)
            outputs += [gr.Markdown(), gr.Textbox(label="Codes", lines=3)]

    def update(image: Any, *values: Any) -> tuple[Any, ...]:
        if image is None:
            return (None,) * len(outputs)
        return _shown(gr, checkpoint.reconstruct(image, *values))

    changes = [button.click, image.change, *(x.release for x in inputs if hasattr(x, "release"))]
    gr.on([*changes, inputs[0].change], reporting(gr, update), [image, *inputs], outputs)


def _compare_tab(gr: Any, checkpoints: Sequence[Checkpoint]) -> None:
    by_name = {f"{number + 1}: {one.name}": one for number, one in enumerate(checkpoints)}
    names = list(by_name)
    with gr.Row():
        image = uploaded(gr)
        with gr.Column():
            decoding = _decoding(gr, checkpoints)
            button = gr.Button("Compare", variant="primary")
    choices: list[Any] = []
    outputs: list[Any] = []
    with gr.Row():
        for default in (names[0], names[-1]):
            kept = not by_name[default].tokenizer.nested
            with gr.Column():
                choices += [
                    gr.Dropdown(names, value=default, label="Checkpoint"),
                    gr.Number(0, label="Codes; 0: automatic", precision=0, minimum=0),
                ]
                with gr.Row():
                    outputs += _panels(gr, 192, kept)
                outputs += [gr.Markdown(), gr.Textbox(label="Codes", lines=2)]

    def compare(image: Any, *values: Any) -> tuple[Any, ...]:
        sides, (guidance, steps, seed) = values[:4], values[4:]
        shown: tuple[Any, ...] = ()
        for name, budget in (sides[:2], sides[2:]):
            mode = BUDGET if budget else AUTOMATIC
            options = {"guidance": guidance, "steps": steps, "seed": seed}
            shown += _shown(gr, by_name[name].reconstruct(image, mode, budget, **options))
        return shown

    gr.on(button.click, reporting(gr, compare), [image, *choices, *decoding], outputs)
