"""An image decoder of vectors that first generates codes, and then decodes these.

    vectors [b n d] -LM of objectives/vector_codes.py, guided-> codes -PixelDecoder-> pixels

The vectors of a caption are the same at every call; its images differ by the sampling of the codes
and by the pixel decoder's noise.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from lavit_lm.checkpoints.native import CONFIG, load_model
from lavit_lm.generation.sampling import (
    GUIDANCE_SCALE,
    TOP_K,
    GenerationConstraint,
    Generators,
    Sampling,
    as_codes,
    generate_ids,
    sequence_generators,
)
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.records import CodesDecoder, ImageVectors
from lavit_lm.objectives.vector_codes import VectorCodes
from lavit_lm.sequences.segments import ImageSegment
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import WeightsError


class VectorCodesDecoder:
    """ImageDecoder of the vectors of one language model.

    Args:
        model: generates codes after vectors.
        processor: its text tokenizer and visual vocabulary.
        objective: of its training.
        pixels: decodes its codes.
        patches: of an image of its visual tokenizer.
    """

    def __init__(
        self,
        model: SequenceModel,
        processor: MultimodalProcessor,
        objective: VectorCodes,
        pixels: CodesDecoder,
        patches: int,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.objective, self.pixels = objective, pixels
        self.constraint = GenerationConstraint("image", 1, processor.count(patches))

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VectorCodesDecoder:
        """Load a directory that `lavit-lm fit-codes-decoder` wrote, or a Hub id.

        Raises:
            WeightsError: see load_model; a model with another objective, or a pixel decoder of
                another codebook.
        """
        model, processor, visual, objective = load_model(name, None, dtype, device)
        if not isinstance(objective, VectorCodes):
            raise WeightsError(
                f"{name}: expected a decoder of vectors, got a language model "
                f"({objective.name}): give it as the model"
            )
        source = objective.pixel_decoder
        if source == "default":
            source = str(visual.name_or_path)
        pixels = CodesDecoder.from_pretrained(source, device)
        if pixels.fingerprint != (own := visual.fingerprint()):
            raise WeightsError(
                f"{name}: {CONFIG}: pixel_decoder {source!r} has the codebook "
                f"{pixels.fingerprint}, the visual tokenizer {own}: codes would decode to "
                "unrelated images"
            )
        return cls(model, processor, objective, pixels, visual.config.num_patches)

    @torch.no_grad()
    def decode(
        self,
        outputs: ImageVectors,
        generator: Generators = None,
        guidance_scale: float = GUIDANCE_SCALE,
        top_k: int | None = TOP_K,
        temperature: float = 1.0,
        **options: Any,
    ) -> Any:
        """See ImageDecoder.

        Args:
            outputs: vectors, and those of an empty prompt.
            generator: source of the codes and then of the pixel decoder's noise.
            guidance_scale: of the codes, against those after the vectors of the empty prompt; 1 for
                no guidance.
            top_k: of sampling codes.
            temperature: of sampling codes; 0 for the most likely ones.
            options: of the pixel decoder: num_inference_steps, mode, output_type, ...

        Raises:
            ValueError: vectors of another model, or a value out of range.
        """
        given = [self._prompt(vectors) for vectors in outputs.vectors]
        free = [self._prompt(outputs.unconditional[0])] * len(given)
        generators: Any = None
        if generator is not None:
            generators = sequence_generators(generator, len(given))
        sampling = Sampling(temperature, top_k, guidance_scale=guidance_scale)
        shared = self.model, self.processor, given, self.constraint, sampling, free
        codes = as_codes(generate_ids(*shared, generators), self.processor.vocabulary)
        return self.pixels.decode(codes, generators, **options)

    def _prompt(self, vectors: torch.Tensor) -> Any:
        """The sequence after which an image's codes are generated, for its vectors [n d]."""
        segments = [ImageSegment(image=vectors.float())]
        return self.objective.prompt(segments, self.processor, "image")
