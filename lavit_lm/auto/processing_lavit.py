"""LavitProcessor: text and images -> ids, and ids -> text or images.

    "<image> is"  [image]     ->  <s> <img> 7 3 9 </img> is
    ... a cat <img> 7 3 9 </img>  ->  image

An image has as many ids as it has codes, so that it must be encoded before its text: unlike most
processors this one contains a model, the visual tokenizer. It is loaded with the first image, the
pixel decoder with the first codes to decode.

Other modules of this package are imported late: this one is imported while `transformers` is, which
may be in the middle of their import (registration.py).
"""

from __future__ import annotations

import inspect
import os
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs
from transformers.utils import PROCESSOR_NAME

from lavit_lm.auto.configuration_lavit import LavitConfig
from lavit_tok import VisualCodes, VisualImageProcessor, VisualTokenizer, WeightsError
from lavit_tok.checkpoints.weights import codebook_remedy, find_directory, read_header

if TYPE_CHECKING:
    from lavit_lm.objectives.records import CodesDecoder

IMAGE = "<image>"
TEXT_KWARGS = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
# Not by `class`, whose annotations would be strings here: `transformers` reads types from them.
CODES_KWARGS = {
    name: kind | None
    for name, kind in get_type_hints(VisualTokenizer.encode).items()
    if name not in ("images", "sample", "generator", "return")
}
CodesKwargs: Any = TypedDict(
    "CodesKwargs",
    {**ImagesKwargs.__annotations__, **CODES_KWARGS},  # type: ignore[misc]
    total=False,
)
LavitProcessorKwargs: Any = TypedDict(
    "LavitProcessorKwargs",
    {**ProcessingKwargs.__annotations__, "images_kwargs": CodesKwargs},  # type: ignore[misc]
    total=False,
)
CHAT = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("expected the role system, user or assistant, got " ~ message.role) }}
    {%- endif %}
    {%- set content = message.content %}
    {%- if content is string %}
        {%- set content = [{"type": "text", "text": content}] %}
    {%- endif %}
    {%- set parts = namespace(text="") %}
    {%- for part in content %}
        {%- if part.type == "text" %}
            {%- set parts.text = parts.text ~ part.text %}
        {%- elif part.type == "image" %}
            {%- set parts.text = parts.text ~ "<image>" %}
        {%- else %}
            {{- raise_exception("expected text or image in a message, got " ~ part.type) }}
        {%- endif %}
    {%- endfor %}
    {%- if message.role == "assistant" %}
        {%- generation %}{{- parts.text ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- parts.text }}
    {%- endif %}
{%- endfor %}"""
"""Concatenates the messages, as in documents of the training; an assistant's ends the text."""


class LavitProcessor(ProcessorMixin):
    """Text tokenizer, image processor, visual tokenizer and pixel decoder in one object.

    Args:
        image_processor: the preprocessing of images.
        tokenizer: the text tokenizer, with image tokens.
        chat_template: Jinja template of apply_chat_template.
        visual_tokenizer: "default", a directory or a Hub id.
        fingerprint: of its codebook, checked when it is loaded; None for no check.
        pixel_decoder: "default", a directory or a Hub id.
        objective: name and arguments of the training's objective, for MultimodalLM.

    Raises:
        VocabularyError: a tokenizer without image tokens.
    """

    image_token = IMAGE
    valid_processor_kwargs = LavitProcessorKwargs

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        visual_tokenizer: str = "default",
        fingerprint: str | None = None,
        pixel_decoder: str = "default",
        objective: dict[str, Any] | None = None,
    ) -> None:
        from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
        self.sources = {"visual_tokenizer": visual_tokenizer, "pixel_decoder": pixel_decoder}
        self.fingerprint, self.objective = fingerprint, objective or {"name": "lavit"}

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that `transformers` saves and loads."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> LavitProcessor:
        """Load a directory or a Hub id.

        Args:
            pretrained_model_name_or_path: the directory or Hub id.
            kwargs: arguments of the constructor that replace the saved ones; revision, token,
                cache_dir, force_download and local_files_only, of the Hub.

        Raises:
            WeightsError, ConfigError: files that are missing or not a LavitProcessor's.
        """
        from lavit_lm.checkpoints.native import FORMAT, KEYS, VERSION
        from lavit_lm.models.loading import open_text_tokenizer

        names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        patterns = ("*.json", "*.jinja", "*.model", "*.txt")
        directory = find_directory(pretrained_model_name_or_path, None, patterns, **hub)
        values = read_header(directory / PROCESSOR_NAME, FORMAT, VERSION, KEYS) | kwargs
        known = inspect.signature(cls).parameters.keys() - {"image_processor", "tokenizer"}
        tokenizer = open_text_tokenizer(directory)
        values = {"chat_template": tokenizer.chat_template, **values}
        chosen = {name: value for name, value in values.items() if name in known}
        return cls(VisualImageProcessor.from_pretrained(directory), tokenizer, **chosen)

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json contains."""
        from lavit_lm.checkpoints.native import FORMAT, VERSION

        return {
            "format": FORMAT,
            "version": VERSION,
            "processor_class": type(self).__name__,
            "codebook_size": self.vocabulary.codebook_size,
            "fingerprint": self.fingerprint,
            "objective": self.objective,
            "image_processor": self.image_processor.to_dict(),
            **self.sources,
        }

    @cached_property
    def visual_tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer, on the CPU. Raises WeightsError for one with another codebook."""
        from lavit_tok import VisualTokenizer

        source = self.sources["visual_tokenizer"]
        visual = VisualTokenizer.from_pretrained(source)
        if self.fingerprint not in (None, visual.fingerprint()):
            raise WeightsError(
                f"expected the codebook {self.fingerprint}, the visual tokenizer {source!r} has "
                f"{visual.fingerprint()}: codes would be of unrelated images"
                f"{codebook_remedy(self.fingerprint)}"
            )
        self.vocabulary.require_stages(visual.stages)
        return visual

    @cached_property
    def pixel_decoder(self) -> CodesDecoder:
        """The pixel decoder, on the CPU. Raises ValueError for one with another codebook."""
        from lavit_lm.objectives.records import CodesDecoder

        source = self.sources["pixel_decoder"]
        decoder = CodesDecoder.from_pretrained(source)
        size = self.vocabulary.codebook_size
        if decoder.codebook_size != size:
            raise ValueError(
                f"the pixel decoder has a codebook of {decoder.codebook_size} entries, the "
                f"language model of {size}"
            )
        if self.fingerprint not in (None, decoder.fingerprint):
            raise ValueError(
                f"expected the codebook {self.fingerprint}, the pixel decoder {source!r} has "
                f"{decoder.fingerprint}: codes would decode to unrelated images; pixel_decoder= of "
                "from_pretrained names another"
            )
        return decoder

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Ids of texts in which each <image> is replaced by the next of the images.

        Args:
            images: whatever `transformers` takes: PIL images, arrays, paths or URLs, one or a list.
            text: a text or a list of texts; None for each image alone, to caption it.
            kwargs: as in `transformers`. images_kwargs={"budget": 16}, or just budget=16, and
                quality, rate, verify, exact, min_codes and max_codes, set the number of codes of
                the images, as in VisualTokenizer.encode.

        Returns:
            input_ids and attention_mask, int64 [b l], left-padded. Names of special and image
            tokens in a text become these tokens: remove them from text that you do not trust.

        Raises:
            ValueError: other numbers of images and of <image> in the texts; an option of images
                that is none of those above; an impossible number of codes.
        """
        if text is None and images is not None:
            images = make_flat_list_of_images(self.image_processor.fetch_images(images))
            text = [IMAGE] * len(images)
        kwargs = {**TEXT_KWARGS, **kwargs.pop("text_kwargs", {}), **kwargs}
        return super().__call__(images=images, text=text, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        """No inputs of their own; the image tokens of each image."""
        from lavit_lm.objectives.records import ImageOutput

        given = {name: value for name, value in kwargs.items() if value is not None}
        given.pop("return_tensors", None)
        if unknown := given.keys() - CODES_KWARGS.keys():
            raise ValueError(
                f"images_kwargs: expected {', '.join(CODES_KWARGS)}; got {', '.join(unknown)}: "
                "image_processor has the options of the preprocessing"
            )
        visual, batch = self.visual_tokenizer, make_flat_list_of_images(images)
        if not given:
            output = ImageOutput(prompt_codes=self.objective.get("prompt_codes"))
            given = {"budget": output.encode_budget(visual.config.num_patches)}
        codes = visual.encode(self.image_processor.to_uint8(batch), **given)
        v = self.vocabulary
        ids = [[v.begin, *v.list_ids(one[: v.max_codes].cpu()), v.end] for one in codes]
        names = [self.tokenizer.convert_ids_to_tokens(one) for one in ids]
        return {}, ["".join(one) for one in names]

    def image_codes(self, ids: Int64[Tensor, "b l"]) -> VisualCodes:
        """The codes after the last id that begins an image, for each sequence.

        Raises:
            ValueError: a sequence without such codes.
        """
        v, codes = self.vocabulary, []
        for i, row in enumerate(ids.cpu()):
            begins = (row == v.begin).nonzero()
            last = row[int(begins[-1]) :] if len(begins) else row[:0]
            codes.append(v.to_codes(last[v.is_code(last)]).tolist())
            if not codes[-1]:
                raise ValueError(
                    f"sequence {i} has no codes of an image: expected the output of "
                    "generate(generation_mode='image')"
                )
        return VisualCodes.from_list(codes, v.codebook_size, v.stages > 0)

    def decode_image_tokens(self, ids: Int64[Tensor, "b l"], **options: Any) -> Any:
        """Decode the last image of each sequence.

        Args:
            ids: output of generate(generation_mode="image").
            options: of PixelDecoder, such as generator, num_inference_steps, guidance_scale.

        Returns: PIL images, or what output_type names.

        Raises:
            ValueError: see image_codes.
        """
        return self.pixel_decoder.decode(self.image_codes(ids), **options)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Texts, or PIL images, of generated ids; pipelines call it.

        Raises:
            ValueError: an unknown generation mode.
        """
        if generation_mode == "image":
            return self.decode_image_tokens(torch.as_tensor(generated_outputs))
        if generation_mode not in (None, "text"):
            raise ValueError(
                f"generation_mode: expected 'text' or 'image', got {generation_mode!r}"
            )
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens, generation_mode, **kwargs
        )


BACKENDS: Any = {"pil": VisualImageProcessor, "torchvision": VisualImageProcessor}
with suppress(ImportError):  # some versions of transformers require torchvision for this class
    AutoImageProcessor.register(LavitConfig, image_processor_classes=BACKENDS, exist_ok=True)
AutoProcessor.register(LavitConfig, LavitProcessor, exist_ok=True)
