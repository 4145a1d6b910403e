"""MultimodalLM: a language model, its visual tokenizer and an image decoder in one class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit_lm.checkpoints.native import is_model, load_model, save_model
from lavit_lm.generation.beam_search import beam_search
from lavit_lm.generation.chat import Reply, as_question, chat_prompt, few_shot
from lavit_lm.generation.interleaved import generate_interleaved
from lavit_lm.generation.prompts import (
    Prompt,
    Prompts,
    as_list,
    batch_of,
    is_batch,
    path_or_image,
    prompt_batch,
    require_text,
)
from lavit_lm.generation.sampling import (
    GUIDANCE_RANGE,
    GUIDANCE_SCALE,
    TOP_K,
    GenerationConstraint,
    Generators,
    Sampling,
    as_codes,
    generate_ids,
)
from lavit_lm.models.kv_state import ContextError
from lavit_lm.models.scoring import log_likelihoods
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.records import CodesDecoder, ImageDecoder, ImageVectors
from lavit_lm.sequences.segments import Segment
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.checkpoints.weights import SHIPPED
from lavit_tok.nn.ranges import require_number

MAX_IMAGES = 10_000  # of one call, which generates them in one batch
MAX_CANDIDATES = 256  # of one call, which also decodes and reads them in one: 2.4 GB


class MultimodalLM:
    """A language model that reads and generates text and images.

    Prompts are a text, or a list of texts and images; see generation/prompts.py.

    Args:
        model: the LM, with its bridge and regression head, if there are any.
        processor: its text tokenizer and visual vocabulary.
        visual_tokenizer: the tokenizer of its codes; None for a model that is used for text only.
        decoder: codes, or vectors, -> images; a name is loaded when it is first needed, None
            generates no images.
        objective: the objective of its training, which builds the prompts; LaVIT by default.
    """

    def __init__(
        self,
        model: SequenceModel,
        processor: MultimodalProcessor,
        visual_tokenizer: VisualTokenizer | None,
        decoder: Any = None,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.visual_tokenizer: Any = visual_tokenizer
        self.objective = objective or LaVIT()
        self.prompts = Prompts(processor, visual_tokenizer, self.objective)
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
        """Load the shipped model ("default"), a directory, or a Hub id.

        Args:
            name: of the model.
            visual_tokenizer: see load_model.
            decoder: "default" for the shipped decoder of the model's visual tokenizer, a directory,
                a Hub id, or None.
            dtype: of the weights in memory.
            device: of the model.
            objective: see load_model.

        Raises:
            WeightsError: see load_model.
        """
        loaded = load_model(name, visual_tokenizer, dtype, device, objective)
        model, processor, visual, objective = loaded
        return cls(model, processor, visual, shipped_decoder(decoder, visual), objective)

    @property
    def device(self) -> torch.device:
        """Device of the LM."""
        return self.model.causal.get_input_embeddings().weight.device

    @property
    def decoder(self) -> ImageDecoder:
        """The image decoder. Raises ValueError if there is none, or its codebook is another."""
        if self._decoder is None:
            raise ValueError(
                "this model has no image decoder: it generates codes (generate_codes), not images"
            )
        if isinstance(self._decoder, str):
            self._decoder = self._load_decoder(self._decoder)
            size = getattr(self._decoder, "codebook_size", None)
            expected = self.processor.vocabulary.codebook_size
            if size not in (None, expected):
                raise ValueError(
                    f"the image decoder has a codebook of {size} entries, the model of {expected}"
                )
            found = getattr(self._decoder, "fingerprint", None)
            if found not in (None, own := self.visual_tokenizer.fingerprint()):
                raise ValueError(
                    f"the image decoder has the codebook {found}, the visual tokenizer {own}: "
                    "codes would decode to unrelated images"
                )
        elif not isinstance(self._decoder, ImageDecoder):
            self._decoder = CodesDecoder(self._decoder)  # a PixelDecoder
        return self._decoder

    def _load_decoder(self, name: str) -> ImageDecoder:
        """Load a decoder of what this model generates; of vectors, also one by codes."""
        if self.objective.image_output.kind == "vectors" and is_model(name):
            from lavit_lm.generation.codes_decoder import VectorCodesDecoder  # late: diffusers

            return VectorCodesDecoder.from_pretrained(name, device=self.device)
        return self.objective.image_output.load_decoder(name, self.device)

    # Images

    def generate_images(
        self,
        prompt: Prompt,
        n: int = 1,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: torch.Generator | None = None,
        *,
        candidates: int = 1,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        decoder_mode: str | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Generate n images for a prompt.

        Args:
            prompt: texts and images; [] for an unconditional image.
            n: number of images.
            candidates: generate n * candidates images, and return those n that `rerank`
                finds, the most probable one first.
            guidance_scale: of the language model; models that generate vectors have none.
            generator: of the sampling, and of the image decoder's noise.
            num_inference_steps: of the image decoder; None for its default.
            decoder_guidance_scale: guidance scale of the image decoder; None for its default.
            decoder_mode: "mean" or "sample", of decoders of codes; by default "sample", if it can.
            sampling: other arguments of generate_codes_batch.

        Raises:
            ValueError: see generate_codes; or candidates for a prompt that is not a text.
        """
        require_number("n", n, 1, MAX_IMAGES, integer=True)
        require_candidates(n, candidates)
        if candidates > 1 and not isinstance(prompt, str):
            raise ValueError("candidates: expected a prompt that is a text, which is compared")
        total = n * candidates
        outputs = self.generate_outputs(prompt, total, guidance_scale, generator, **sampling)
        options = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": decoder_guidance_scale,
            "mode": decoder_mode,
        }
        chosen = {name: value for name, value in options.items() if value is not None}
        images = self.decode_images(outputs, generator, **chosen)
        if candidates == 1:
            return images
        return [images[i] for i in self.rerank(images, str(prompt), n)]

    def generate_outputs(
        self,
        prompt: Prompt,
        n: int = 1,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Any:
        """Generate what `generate_images` decodes: codes, or vectors [n N d].

        Raises:
            ValueError: see generate_codes.
        """
        if self.objective.image_output.kind == "codes":
            return self.generate_codes(prompt, n, guidance_scale, generator, **sampling)
        vectors = self.generate_vectors_batch([require_text(prompt)], **sampling)
        return vectors.expand(n, -1, -1)  # equal: images differ by the noise of the image decoder

    def rerank(self, images: Any, text: str, n: int = 1) -> list[int]:
        """Indices of the n images given which a text is most probable, the most probable first.

        Of generated images and their prompt it is the self-reranking of CogView (Ding et al., 2021,
        section 3.2).

        Args:
            images: whatever VisualTokenizer.encode accepts.
            text: a caption or prompt.
            n: number of indices, at most as many as images.
        """
        images, template = batch_of(images), self.objective.prompt_templates.caption
        context = [template] if template else []
        nats = self.score([[image, *context] for image in images], [text] * len(images))
        return nats.topk(min(n, len(images))).indices.tolist()

    def generate_codes(
        self,
        prompt: Prompt,
        n: int = 1,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> VisualCodes:
        """Generate the codes of n images for one prompt; see generate_codes_batch.

        Raises:
            ValueError: as there, and for a blank string.
        """
        require_number("n", n, 1, MAX_IMAGES, integer=True)
        prompts = [require_text(prompt)] * n
        return self.generate_codes_batch(prompts, guidance_scale, generator, **sampling)

    def generate_codes_batch(
        self,
        prompts: Sequence[Prompt],
        guidance_scale: float = GUIDANCE_SCALE,
        generator: Generators = None,
        *,
        min_codes: int | None = None,
        max_codes: int | None = None,
        use_cache: bool = True,
        **sampling: Any,
    ) -> VisualCodes:
        """Generate the codes of an image for each prompt.

        Args:
            prompts: texts and images of any number and length.
            guidance_scale: classifier-free guidance against an image without a prompt; 1 for none.
            generator: one for all prompts, or one for each, which makes them independent of the
                batch.
            min_codes: smallest number of codes per image; by default the objective's.
            max_codes: largest number of codes per image; by default the objective's.
            use_cache: see generate_ids.
            sampling: arguments of Sampling; by default temperature 1 and top_k 50.

        Raises:
            ValueError: no prompts, one that leaves too few positions in the context, impossible
                limits, or a model that generates vectors.
        """
        if self.objective.image_output.kind != "codes":
            raise ValueError(
                f"{self.objective.name} generates vectors for images, no codes: use generate_images"
            )
        patches = self.processor.count(self._patches)
        least, most = self.objective.image_output.limits(patches)
        for name, limit in (("min_codes", min_codes), ("max_codes", max_codes)):
            if limit is not None and type(limit) is not int:
                raise ValueError(f"{name}: expected an integer in 1..{patches}, got {limit!r:.60}")
        least = least if min_codes is None else min_codes
        most = most if max_codes is None else max_codes
        if not 1 <= least <= most <= patches:
            raise ValueError(
                f"expected 1 <= min_codes <= max_codes <= {patches}, got {least} and {most}"
            )
        # One sequence for the n images of a prompt, whose images are then encoded once, too.
        prompts = prompt_batch(prompts)
        distinct = {id(prompt): prompt for prompt in prompts}
        sequences = {key: self.prompts.for_image(one) for key, one in distinct.items()}
        repeated = [sequences[id(prompt)] for prompt in prompts]
        constraint = GenerationConstraint("image", least, most)
        chosen = Sampling(**{"top_k": TOP_K, "guidance_scale": guidance_scale, **sampling})
        free = [self.prompts.sequence([], "image")] * len(repeated)
        shared = self.model, self.processor
        generated = generate_ids(*shared, repeated, constraint, chosen, free, generator, use_cache)
        return as_codes(generated, self.processor.vocabulary)

    def generate_vectors_batch(
        self, prompts: Sequence[Prompt], use_cache: bool = True
    ) -> Float[Tensor, "b n d"]:
        """Generate the vectors of an image for each prompt, deterministically.

        Raises:
            ValueError: no prompts, one that leaves too few positions in the context, or a model
                that generates codes.
        """
        if self.objective.image_output.kind != "vectors":
            raise ValueError(
                f"{self.objective.name} generates codes for images, no vectors: use generate_codes"
            )
        sequences = [self.prompts.for_image(prompt) for prompt in prompt_batch(prompts)]
        shared = self.model, self.processor
        outputs = generate_interleaved(
            *shared, sequences, self._num_vectors, starts_with_image=True, use_cache=use_cache
        )
        return torch.stack([vectors for (vectors,) in outputs if isinstance(vectors, Tensor)])

    def decode_images(
        self,
        outputs: VisualCodes | Float[Tensor, "b n d"],
        generator: Generators = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Decode the codes, or the vectors, of images.

        Args:
            outputs: from generate_codes or generate_vectors_batch.
            generator: of the noise; one for each image makes them independent of the batch.
            options: of the image decoder, such as num_inference_steps and guidance_scale.
        """
        images: Any = outputs
        if isinstance(outputs, Tensor):  # guidance is relative to the vectors of an empty prompt
            images = ImageVectors(outputs, self.generate_vectors_batch([""]))
        return self.decoder.decode(images, generator, **options)

    # Text

    def generate_text_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        generator: Generators = None,
        *,
        min_new_tokens: int = 1,
        num_beams: int | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Generate a text after each prompt, greedily by default.

        Args:
            prompts: texts and images; no template is applied, unlike in caption and answer.
            max_new_tokens: largest number of tokens of each text.
            generator: one for all prompts, or one for each, which makes them independent of the
                batch.
            min_new_tokens: smallest number of tokens of each text.
            num_beams: use beam search instead of sampling.
            sampling: arguments of Sampling.

        Raises:
            ValueError: no prompts, one that leaves too few positions in the context, or beam
                search with arguments of sampling.
        """
        sequences = [self.prompts.sequence(prompt, "text") for prompt in prompt_batch(prompts)]
        constraint = GenerationConstraint("text", min_new_tokens, max_new_tokens)
        shared = self.model, self.processor, sequences, constraint
        if num_beams is None:
            generated = generate_ids(*shared, _text_sampling(sampling), None, generator)
        elif sampling or generator is not None:
            raise ValueError(
                f"num_beams: beam search does not sample, got {sorted(sampling) or 'a generator'}"
            )
        else:
            generated = beam_search(*shared, num_beams)
        return [self.processor.decode(ids).strip() for ids in generated]

    def caption(self, images: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Caption one image, or each image of a batch, greedily by default.

        Args:
            images: whatever VisualTokenizer.encode accepts.
            max_new_tokens: of each caption.
            options: other arguments of generate_text_batch.

        Returns:
            A caption of at least one token, or a list of captions.
        """
        template = self.objective.prompt_templates.caption
        return self._texts(images, [template] if template else [], max_new_tokens, options)

    def answer(
        self,
        image: Any,
        question: str,
        template: str | None = None,
        max_new_tokens: int = 64,
        *,
        examples: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        """Answer a question about one image, or about each image of a batch.

        Args:
            image: whatever VisualTokenizer.encode accepts.
            question: any text.
            template: the text after the image, {} for the question; by default the objective's.
            max_new_tokens: of the answer.
            examples: (image, question, answer) of other images, which precede it in the prompt.
            options: other arguments of generate_text_batch.

        Returns:
            An answer of at least one token, or a list of answers.

        Raises:
            ValueError: an example of another form, or more than the model's context has space for.
        """
        template = self.objective.prompt_templates.answer if template is None else template
        for name, text in (("question", question), ("template", template)):
            if not isinstance(text, str):
                raise ValueError(f"{name}: expected a text, got {type(text).__name__}")
        before, asked = few_shot(examples, template), as_question([question], template)
        try:
            return self._texts(image, asked, max_new_tokens, options, before)
        except ContextError as error:
            if not before:
                raise
            raise ContextError(f"{len(examples)} examples before the question: {error}") from None

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        reply: Reply = "text",
        max_new_tokens: int = 64,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Reply to the last message of a chat.

            messages = [{"role": "user", "content": [image, "what color is it?"]}]
            messages.append(lm.chat(messages))  # {"role": "assistant", "content": ["red"]}
            messages.append({"role": "user", "content": "a blue one"})
            messages.append(lm.chat(messages, reply="image"))

        Args:
            messages: see generation/chat.py; a reply can be appended to them.
            reply: "text"; "image"; or "any" for texts and images in turn, as the model chooses.
            max_new_tokens: of each text of the reply.
            generator: of the sampling, and of the image decoder's noise.
            options: other arguments of generate_text_batch, generate_images or complete.

        Returns:
            The message: its content is a list of texts and images.

        Raises:
            ValueError: messages of another form, an unknown role, a last message that is not the
                user's, another `reply`, or a chat that leaves too few positions in the context.
        """
        if reply not in ("text", "image", "any"):
            raise ValueError(f"reply: expected 'text', 'image' or 'any', got {reply!r:.40}")
        prompt = chat_prompt(messages, self.objective.prompt_templates, reply)
        if reply == "text":
            content: list[Any] = self.generate_text_batch(
                [prompt], max_new_tokens, generator, **options
            )
        elif reply == "image":
            content = list(self.generate_images(prompt, generator=generator, **options))
        else:
            content = self.complete(prompt, max_new_tokens, generator=generator, **options)
        return {"role": "assistant", "content": content}

    def _texts(
        self,
        images: Any,
        text: list[str],
        limit: int,
        options: dict[str, Any],
        before: Sequence[Any] = (),
    ) -> Any:
        """The text generated after each image and `text`; a list if the images are a batch."""
        prompts = [[*before, path_or_image(image), *text] for image in batch_of(images)]
        texts = self.generate_text_batch(prompts, limit, **options)
        return texts if is_batch(images) else texts[0]

    def complete(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        max_images: int = 1,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: torch.Generator | None = None,
        decode: bool = True,
        **sampling: Any,
    ) -> list[Any]:
        """Continue a prompt with texts and images until the model ends.

        Args:
            prompt: texts and images.
            max_new_tokens: of each text.
            max_images: largest number of images; 0 for text only.
            guidance_scale: for images, if the model generates codes.
            generator: of the sampling, and of the image decoder's noise.
            decode: decode the images; False returns VisualCodes, or vectors float [n d].
            sampling: arguments of Sampling, for texts.

        Returns:
            Strings, and images, VisualCodes or vectors, in order.

        Raises:
            ValueError: max_images above 0 for a model that never begins an image itself, or a
                prompt that leaves too few positions in the context.
        """
        require_number("max_images", max_images, 0, MAX_IMAGES, integer=True)
        require_number("guidance_scale", guidance_scale, *GUIDANCE_RANGE)
        if max_images and not self.objective.image_output.emits_start:
            raise ValueError(
                f"{self.objective.name} is not trained to generate the token that begins an image: "
                "use generate_images, or max_images=0 for text"
            )
        text_sampling, v = _text_sampling(sampling), self.processor.vocabulary
        shared = self.model, self.processor
        outputs: list[Any] = []
        if self.objective.image_output.kind == "vectors":
            (generated,) = generate_interleaved(
                *shared,
                [self.prompts.sequence(prompt, "text")],
                self._num_vectors,
                max_new_tokens=max_new_tokens,
                max_images=max_images,
                sampling=text_sampling,
                generator=generator,
            )
            outputs = [
                self.processor.decode(part) if isinstance(part, list) else part
                for part in generated
            ]
        else:
            parts = as_list(prompt)
            for number in range(max_images + 1):
                kind: Literal["mixed", "text"] = "mixed" if number < max_images else "text"
                sequences = [self.prompts.sequence(parts + outputs, "text")]
                constraint = GenerationConstraint(kind, 0, max_new_tokens)
                (ids,) = generate_ids(
                    *shared, sequences, constraint, text_sampling, None, generator
                )
                text = self.processor.decode(ids)
                outputs += [text] if text else []
                if not ids or ids[-1] != v.begin:
                    break
                codes = self.generate_codes(parts + outputs, 1, guidance_scale, generator)
                outputs.append(codes)
        if not decode:
            return outputs
        return [
            part
            if isinstance(part, str)
            else self.decode_images(part[None] if isinstance(part, Tensor) else part, generator)[0]
            for part in outputs
        ]

    # Likelihood

    @torch.no_grad()
    def rank(
        self, context: Prompt, candidates: Sequence[Any], per_token: bool = False
    ) -> Float[Tensor, " n"]:
        """Return log p(candidate | context) in nats for each text or image.

        The context is computed once, whatever the number of candidates.

        Args:
            context: texts and images.
            candidates: texts or images, as in prompts.
            per_token: divide by the number of tokens of the candidate.

        Raises:
            ValueError: no candidates, or images that the objective defines no likelihood of.
        """
        if isinstance(candidates, str | VisualCodes):
            raise ValueError(
                f"expected a list of candidates, got {type(candidates).__name__}: its items would "
                "be candidates of their own; [candidate] is a list of one"
            )
        candidates = batch_of(candidates)
        if not candidates:
            raise ValueError("expected at least one candidate, got none")
        is_text = all(isinstance(candidate, str) for candidate in candidates)
        segments = self.prompts.segments(context, before_text=is_text)
        return self._nats([(segments, candidate) for candidate in candidates], per_token)

    def score(
        self, contexts: Sequence[Prompt], candidates: Sequence[Any], per_token: bool = False
    ) -> Float[Tensor, " n"]:
        """Return log p(candidate | context) in nats of each pair of a context and a candidate.

        Args:
            contexts: n of them, see rank.
            candidates: n texts or images.
            per_token: see rank.

        Raises:
            ValueError: no pairs, or two numbers; as rank.
        """
        if not contexts or len(contexts) != len(candidates):
            raise ValueError(
                "expected one or more contexts and as many candidates, got "
                f"{len(contexts)} and {len(candidates)}"
            )
        pairs = [
            (self.prompts.segments(context, before_text=isinstance(candidate, str)), candidate)
            for context, candidate in zip(contexts, candidates, strict=True)
        ]
        return self._nats(pairs, per_token)

    def _nats(self, pairs: Sequence[tuple[list[Segment], Any]], per_token: bool) -> Tensor:
        """The log-likelihood of each candidate, given the segments before it."""
        sequences = [
            self.objective.scoring_sequence(segments, self.prompts.segment(one), self.processor)
            for segments, one in pairs
        ]
        nats = log_likelihoods(self.model, sequences, self.processor.pad)
        counts = torch.tensor([int(s.predict.sum()) for s in sequences], device=nats.device)
        return nats / counts if per_token else nats

    # Files

    def save_pretrained(
        self, out: str | Path, visual_tokenizer: str = "default", dtype: torch.dtype | None = None
    ) -> None:
        """Write a directory for from_pretrained.

        Args:
            out: the directory; an older model there is replaced.
            visual_tokenizer: its visual tokenizer: "default", a directory or a Hub id.
            dtype: of the weights in the files; None for the model's own.

        Raises:
            WeightsError: the directory contains something else.
        """
        fingerprint, shared = self.visual_tokenizer.fingerprint(), (self.model, self.processor)
        save_model(out, *shared, self.objective, visual_tokenizer, fingerprint, dtype)

    def export(
        self,
        out: str | Path,
        dtype: torch.dtype | None = None,
        format: Literal["plain", "multimodal"] = "plain",
    ) -> None:
        """Write a directory for `transformers`.

        Args:
            out: a directory that does not exist or is empty.
            dtype: of the floats in the files; None for the model's own.
            format: "plain" for AutoModelForCausalLM and servers (checkpoints/export.py);
                "multimodal" for AutoModelForMultimodalLM and AutoProcessor (auto/conversion.py).

        Raises:
            ExportError: see there.
            ValueError: another format.
        """
        if format == "plain":
            from lavit_lm.checkpoints.export import export

            export(self.model.lm, self.processor.text_tokenizer, out, dtype)
        elif format == "multimodal":
            from lavit_lm.auto.conversion import save_multimodal

            parts = self.model, self.processor, self.objective, self.visual_tokenizer
            name = self._decoder if isinstance(self._decoder, str) else "default"
            name = shipped_decoder(name, self.visual_tokenizer)
            save_multimodal(out, *parts, name, dtype)
        else:
            raise ValueError(f"format: expected 'plain' or 'multimodal', got {format!r}")

    @property
    def _num_vectors(self) -> int:
        return self.objective.image_output.limits(self._patches)[1]

    @property
    def _patches(self) -> int:
        if self.visual_tokenizer is None:
            raise ValueError("this model generates text only: it has no visual tokenizer")
        return int(self.visual_tokenizer.config.num_patches)


def shipped_decoder(decoder: Any, visual_tokenizer: VisualTokenizer) -> Any:
    """The decoder as given; of "default" the one that is shipped with the visual tokenizer."""
    name = visual_tokenizer.name_or_path
    return name if decoder == "default" and name in SHIPPED else decoder


def _text_sampling(arguments: dict[str, Any]) -> Sampling:
    """Greedy, unless a temperature is given."""
    return Sampling(**{"temperature": 0.0, **arguments})


def require_candidates(n: int, candidates: int) -> None:
    """Raise ValueError for fewer than one candidate for each of n images, or too many at once."""
    require_number("candidates", candidates, 1, max(1, MAX_CANDIDATES // n), integer=True)
