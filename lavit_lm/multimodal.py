"""MultimodalLM: a language model, its visual tokenizer and a pixel decoder, as a user wants them. No maths here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit_lm.checkpoints.native import load_model, save_model
from lavit_lm.generation.beam_search import beam_search
from lavit_lm.generation.interleaved import generate_interleaved
from lavit_lm.generation.prompts import Prompt, Prompts, parts, path_or_image, require_words
from lavit_lm.generation.sampling import GenerationConstraint, Generators, Sampling, generate_ids
from lavit_lm.models.losses import log_likelihood
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.records import CodesDecoder, ImageDecoder, ImageVectors
from lavit_lm.sequences.packing import pad
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualCodes, VisualTokenizer

PICTURE_SAMPLING = Sampling(top_k=50, guidance_scale=3.0)
TEXT_SAMPLING = Sampling(temperature=0.0)


class MultimodalLM:
    """Text and pictures in, text and pictures out.

    Args:
        model: the LM, and its bridge if it reads pictures as vectors.
        lexicon: its text tokenizer and visual vocabulary.
        visual: the tokenizer whose codes it speaks.
        decoder: codes, or vectors, -> pixels; a name is loaded when first needed, None gives no pictures.
        objective: what it was trained with, which knows how prompts are laid out; LaVIT's by default.
    """

    def __init__(
        self,
        model: SequenceModel,
        processor: MultimodalProcessor,
        visual: VisualTokenizer,
        decoder: Any = None,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.processor, self.visual = model.eval(), processor, visual
        self.objective = objective or LaVIT()
        self.prompts = Prompts(processor, visual, self.objective)
        self._decoder = decoder

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "default",
        *,
        visual_tokenizer: str | None = None,
        decoder: str | None = "default",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        objective: Objective | None = None,
    ) -> MultimodalLM:
        """The shipped model, a directory, or a Hub id. Raises WeightsError, see files.load_model."""
        model, processor, visual, objective = load_model(
            name, visual_tokenizer, dtype, device, objective
        )
        return cls(model, processor, visual, decoder, objective)

    @property
    def device(self) -> torch.device:
        return self.model.causal.get_input_embeddings().weight.device

    @property
    def decoder(self) -> Any:
        """The pixel decoder. Raises ValueError where there is none, or one of another codebook size."""
        if self._decoder is None:
            raise ValueError(
                "this model has no pixel decoder: it gives codes (generate_codes), not pictures"
            )
        if isinstance(self._decoder, str):
            self._decoder = self.objective.image_output.load_decoder(self._decoder, self.device)
            size = getattr(self._decoder, "codebook_size", None)
            own = self.processor.vocabulary.codebook_size
            if size not in (None, own):
                raise ValueError(
                    f"the pixel decoder draws codes of a codebook of {size} rows, the model says {own}"
                )
        elif not isinstance(self._decoder, ImageDecoder):
            self._decoder = CodesDecoder(self._decoder)  # a PixelDecoder
        return self._decoder

    # Pictures

    def generate_images(
        self,
        prompt: Prompt,
        n: int = 1,
        guidance_scale: float = PICTURE_SAMPLING.guidance_scale,
        generator: torch.Generator | None = None,
        **decoding: Any,
    ) -> list[Image.Image]:
        """n pictures of a prompt, which may mix texts and pictures.

        Args:
            guidance_scale: of the language model, where it says codes; the pixel decoder's is `decoding`'s
                "decoder_guidance".
            decoding: generate_codes' other arguments, and for the decoder "num_inference_steps", "decoder_guidance".

        Raises:
            ValueError: as generate_codes.
        """
        drawing = {
            name: decoding.pop(name) for name in ("num_inference_steps",) if name in decoding
        }
        if "decoder_guidance" in decoding:
            drawing["guidance_scale"] = decoding.pop("decoder_guidance")
        if self.objective.image_output.kind == "vectors":
            vectors = self.generate_vectors_batch([require_words(prompt)] * n, **decoding)
            return self._draw(vectors, generator, drawing)
        codes = self.generate_codes(prompt, n, guidance_scale, generator, **decoding)
        return self._draw(codes, generator, drawing)

    def generate_codes(
        self,
        prompt: Prompt,
        n: int = 1,
        guidance_scale: float = PICTURE_SAMPLING.guidance_scale,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> VisualCodes:
        """Codes of n pictures of one prompt, [] for pictures of anything; see generate_codes_batch.

        Raises:
            ValueError: as there, and for a string without any word.
        """
        return self.generate_codes_batch(
            [require_words(prompt)] * n, guidance_scale, generator, **sampling
        )

    def generate_codes_batch(
        self,
        prompts: Sequence[Prompt],
        guidance_scale: float = PICTURE_SAMPLING.guidance_scale,
        generator: Generators = None,
        *,
        min_codes: int | None = None,
        max_codes: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = PICTURE_SAMPLING.top_k,
        top_p: float | None = None,
        use_cache: bool = True,
    ) -> VisualCodes:
        """A picture's codes for each prompt, whatever their lengths.

        Args:
            prompts: see Prompt; pictures in them are read as codes.
            guidance_scale: 1 for none; the unconditional stream is an image without a prompt.
            generator: one for all, or one for each prompt, so that it gives the same in any batch.
            min_codes, max_codes: of a picture; by default what the objective allows, at most as many as the visual
                tokenizer has patches.

        Raises:
            ValueError: no prompt, one without room for a picture, or a model that says vectors.
        """
        if self.objective.image_output.kind != "codes":
            raise ValueError(
                f"{self.objective.name} says vectors for a picture, no codes: ask for pictures"
            )
        patches = self.visual.config.num_patches
        allowed = self.objective.image_output.limits(patches)
        least, most = (
            a if given is None else given
            for a, given in zip(allowed, (min_codes, max_codes), strict=True)
        )
        if not 1 <= least <= most <= patches:
            raise ValueError(
                f"expected 1 <= min_codes <= max_codes <= {patches}, got {least} and {most}"
            )
        opened = [self.prompts.for_image(prompt) for prompt in prompts]
        free = self.prompts.row([], "image")
        said = generate_ids(
            self.model,
            self.processor,
            opened,
            GenerationConstraint("image", least, most),
            Sampling(temperature, top_k, top_p, guidance_scale),
            [free] * len(opened),
            generator,
            use_cache,
        )
        vocabulary = self.processor.vocabulary
        codes = [
            vocabulary.to_codes(torch.tensor([i for i in ids if i != vocabulary.end]))
            for ids in said
        ]
        return VisualCodes.from_list([c.tolist() for c in codes], vocabulary.codebook_size)

    def generate_vectors_batch(
        self, prompts: Sequence[Prompt], use_cache: bool = True
    ) -> Float[Tensor, "b n d"]:
        """A picture's vectors for each prompt, for a model that says vectors. Nothing is drawn by chance.

        Raises:
            ValueError: no prompt, one without room for a picture, or a model that says codes.
        """
        if self.objective.image_output.kind != "vectors":
            raise ValueError(
                f"{self.objective.name} says codes for a picture, no vectors: ask for codes"
            )
        rows = [self.prompts.for_image(prompt) for prompt in prompts]
        said = generate_interleaved(
            self.model,
            self.processor,
            rows,
            self._vectors,
            starts_with_image=True,
            use_cache=use_cache,
        )
        return torch.stack([vectors for (vectors,) in said if isinstance(vectors, Tensor)])

    # Text

    def generate_text_batch(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int = 64,
        generator: Generators = None,
        *,
        min_tokens: int = 1,
        beams: int | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Words after each prompt, until the model ends the text. Greedy, unless Sampling's arguments are given.

        Args:
            prompts: see Prompt; nothing is added to them, unlike caption and answer.
            generator: one for all, or one for each prompt, so that it gives the same in any batch.
            min_tokens, max_tokens: of each text.
            beams: say the likeliest of so many continuations kept side by side (beam.py), without sampling.

        Raises:
            ValueError: no prompt, one without room for text, or beams that are to be sampled.
        """
        rows, rule = (
            [self.prompts.row(prompt, "text") for prompt in prompts],
            GenerationConstraint("text", min_tokens, max_tokens),
        )
        if beams is not None:
            if sampling or generator is not None:
                raise ValueError(
                    f"beams: nothing is sampled there, got {sorted(sampling) or 'a generator'} as well"
                )
            said = beam_search(self.model, self.processor, rows, rule, beams)
        else:
            chosen = Sampling(**{"temperature": TEXT_SAMPLING.temperature, **sampling})
            said = generate_ids(self.model, self.processor, rows, rule, chosen, None, generator)
        return [
            self.processor.vocabulary.decode_text(self.processor.text_tokenizer, ids).strip()
            for ids in said
        ]

    def caption(
        self,
        images: Any,
        max_tokens: int = 64,
        min_tokens: int = 1,
        beams: int | None = None,
        **sampling: Any,
    ) -> Any:
        """A caption of at least one token; for a list of pictures a list of them.

        Greedy, unless Sampling's arguments are given.

        Args:
            beams: say the likeliest of so many continuations kept side by side (beam.py), without sampling.
        """
        several = isinstance(images, list)
        said = self.objective.prompt_templates.caption
        prompts = [
            [path_or_image(image), *([said] if said else [])]
            for image in (images if several else [images])
        ]
        captions = self.generate_text_batch(
            prompts, max_tokens, min_tokens=min_tokens, beams=beams, **sampling
        )
        return captions if several else captions[0]

    def answer(
        self,
        image: Any,
        question: str,
        template: str | None = None,
        max_tokens: int = 64,
        **sampling: Any,
    ) -> str:
        """An answer to a question about one picture.

        Args:
            template: how the model's training data puts questions, {} for the question; by default as its objective's
                paper does.
        """
        asked = (self.objective.prompt_templates.answer if template is None else template).replace(
            "{}", question
        )
        return self.generate_text_batch([[path_or_image(image), asked]], max_tokens, **sampling)[0]

    def complete(
        self,
        prompt: Prompt,
        max_tokens: int = 64,
        max_images: int = 1,
        guidance_scale: float = PICTURE_SAMPLING.guidance_scale,
        generator: torch.Generator | None = None,
        images: bool = True,
        **sampling: Any,
    ) -> list[Any]:
        """Go on with texts and pictures in turn until the model ends.

        Args:
            max_tokens: of each stretch of text.
            max_images: pictures at most; at 0 only text.
            pictures: draw them; False gives VisualCodes, or vectors float [n d].

        Returns: what was said: strings, and pictures or VisualCodes or vectors.

        Raises:
            ValueError: pictures asked for of a model that never opens one by itself, or no room.
        """
        if max_images and not self.objective.image_output.emits_start:
            raise ValueError(
                f"{self.objective.name} never says by itself that a picture comes: give max_images=0 for text, or ask "
                "for a picture with generate_images"
            )
        if self.objective.image_output.kind == "vectors":
            return self._complete_with_vectors(
                prompt, max_tokens, max_images, generator, images, sampling
            )
        given = parts(prompt)
        said: list[Any] = []
        for number in range(max_images + 1):
            kind: Literal["mixed", "text"] = "mixed" if number < max_images else "text"
            chosen = Sampling(**{"temperature": 0.0, **sampling})
            row = self.prompts.row(given + said, "text")
            ids = generate_ids(
                self.model,
                self.processor,
                [row],
                GenerationConstraint(kind, 0, max_tokens),
                chosen,
                None,
                generator,
            )[0]
            text = self.processor.vocabulary.decode_text(self.processor.text_tokenizer, ids)
            said += [text] if text else []
            if not ids or ids[-1] != self.processor.vocabulary.begin:
                break
            said.append(self.generate_codes(given + said, 1, guidance_scale, generator))
        if images:
            said = [
                self._draw(s, generator, {})[0] if isinstance(s, VisualCodes) else s for s in said
            ]
        return said

    def _complete_with_vectors(
        self,
        prompt: Prompt,
        max_tokens: int,
        max_images: int,
        generator: Any,
        images: bool,
        sampling: dict[str, Any],
    ) -> list[Any]:
        chosen = Sampling(**{"temperature": 0.0, **sampling})
        options: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "max_images": max_images,
            "sampling": chosen,
        }
        (said,) = generate_interleaved(
            self.model,
            self.processor,
            [self.prompts.row(prompt, "text")],
            self._vectors,
            generator=generator,
            **options,
        )
        decode = self.processor.vocabulary.decode_text
        return [
            decode(self.processor.text_tokenizer, part)
            if isinstance(part, list)
            else (self._draw(part[None], generator, {})[0] if images else part)
            for part in said
        ]

    @property
    def _vectors(self) -> int:
        """How many vectors a picture has."""
        return self.objective.image_output.limits(self.visual.config.num_patches)[1]

    def _draw(
        self, said: Any, generator: torch.Generator | None, drawing: dict[str, Any]
    ) -> list[Image.Image]:
        """Pictures of codes, or of vectors float [b n d], whose unconditional stream is what is said of no prompt."""
        if isinstance(said, Tensor):
            said = ImageVectors(said, self.generate_vectors_batch([""]))
        return self.decoder.decode(said, generator, **drawing)

    # Likelihood

    @torch.no_grad()
    def rank(
        self, context: Prompt, candidates: Sequence[Any], per_token: bool = False
    ) -> Float[Tensor, " n"]:
        """log p(candidate | context) in nats: texts or pictures (as Prompt takes them); greater is likelier.

        Args:
            per_token: divide by the candidate's tokens, so that long ones do not lose for being long.
        """
        if not candidates:
            raise ValueError("expected at least one candidate, got none")
        given = self.prompts.segments(context)
        rows = [
            self.objective.scoring_sequence(given, self.prompts.segment(c), self.processor)
            for c in candidates
        ]
        batch = pad(rows, self.processor.pad).to(self.device)
        nats = log_likelihood(self.model(batch), batch)
        return nats / batch.predict.sum(1) if per_token else nats

    def save_pretrained(
        self, out: str | Path, visual_tokenizer: str = "default", dtype: torch.dtype | None = None
    ) -> None:
        """A directory for from_pretrained.

        Args:
            visual_tokenizer: where its visual tokenizer is: "default", a directory or a Hub id.
            dtype: of the weights; half precision makes the directory half as large.

        Raises:
            WeightsError: the directory holds something else.
        """
        fingerprint = self.visual.fingerprint()
        save_model(
            out, self.model, self.processor, self.objective, visual_tokenizer, fingerprint, dtype
        )

    def export(self, out: str | Path, dtype: torch.dtype | None = None) -> None:
        """A plain `transformers` directory that other programs serve; see export.py."""
        from lavit_lm.checkpoints.export import export

        export(self.model.lm, self.processor.text_tokenizer, out, dtype)
