"""The tab "Generate" of `lavit-tok demo`: a prompt -> images, an image -> a caption.

lavit_tok finds `tab` by the entry point group "lavit_tok.demo".
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lavit_lm.generation.prompts import require_text
from lavit_lm.multimodal import MultimodalLM
from lavit_tok.cli.demo import Tab, reporting, uploaded
from lavit_tok.cli.items import device

MAX_IMAGES = 8


def tab(arguments: argparse.Namespace) -> Tab | None:
    """The tab with the language model `arguments.model`; None for an empty name."""
    if not arguments.model:
        return None
    own = arguments.model != "default"  # the shipped model needs the shipped decoder
    lm = MultimodalLM.from_pretrained(
        arguments.model,
        decoder=(own and arguments.decoder) or "default",
        device=device(arguments.device),
    )
    return Tab("Generate", GenerateTab(lm).build)


@dataclass(frozen=True)
class GenerateTab:
    """The tab of one model."""

    lm: MultimodalLM

    def generate(
        self,
        prompt: str,
        count: int = 4,
        guidance: float = 3.0,
        decoder_guidance: float = 2.0,
        steps: int = 20,
        seed: int = 0,
    ) -> list[tuple[Image.Image, str]]:
        """Images for a prompt, each with the caption that the model gives it.

        Raises:
            ValueError: a blank prompt, or one that is too long.
        """
        images = self.lm.generate_images(
            require_text(prompt),
            count,
            guidance,
            torch.Generator().manual_seed(seed),
            num_inference_steps=steps,
            decoder_guidance_scale=decoder_guidance,
        )
        return list(zip(images, self.lm.caption(images), strict=True))

    def caption(self, image: Image.Image | None) -> str:
        """The caption of an image. Raises ValueError without one."""
        if image is None:
            raise ValueError("expected an image to caption, got none")
        return self.lm.caption(image)

    def build(self, gr: Any) -> None:
        """Add the components to the page."""
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox("a red bag", label="Prompt")
                inputs = [
                    prompt,
                    gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images"),
                    gr.Slider(1, 6, 3, step=0.5, label="Guidance (language model)"),
                    gr.Slider(1, 6, 2, step=0.5, label="Guidance (decoder)"),
                    gr.Slider(1, 50, 20, step=1, label="Denoising steps"),
                    gr.Number(0, label="Seed", precision=0, minimum=0),
                ]
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2):
                gallery = gr.Gallery(label="Images, with the model's captions", columns=4)
        gr.on([button.click, prompt.submit], reporting(gr, self.generate), inputs, gallery)
        with gr.Row():
            image = uploaded(gr)
            text = gr.Textbox(label="Caption")
        image.upload(reporting(gr, self.caption), image, text)
