"""A trained model as a directory for AutoModelForMultimodalLM and AutoProcessor.

config.json, generation_config.json, model.safetensors     LavitForConditionalGeneration
processor_config.json, tokenizer.json, chat_template.jinja  LavitProcessor

processor_config.json names the visual tokenizer and the pixel decoder, and what MultimodalLM needs
to load the directory again. A model that reads images as vectors or as codes reads codes there.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from lavit_lm.auto.configuration_lavit import LavitConfig
from lavit_lm.auto.modeling_lavit import LavitForConditionalGeneration
from lavit_lm.auto.processing_lavit import CHAT, LavitProcessor
from lavit_lm.checkpoints.export import (
    SPECIAL_IDS,
    ExportError,
    check_new,
    new_directory,
    plain_model,
    serving_tokenizer,
)
from lavit_lm.generation.sampling import GenerationConstraint
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer


def save_multimodal(
    out: str | os.PathLike[str],
    model: SequenceModel,
    processor: MultimodalProcessor,
    objective: Objective,
    visual_tokenizer: VisualTokenizer,
    pixel_decoder: str = "default",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an LM and its processor; neither is changed.

    Args:
        out: a directory that does not exist or is empty; it appears once it is complete.
        model: the LM; adapters of peft are merged into a copy.
        processor: its text tokenizer and visual vocabulary.
        objective: the objective of its training.
        visual_tokenizer: its visual tokenizer, which the directory names by its name_or_path.
        pixel_decoder: "default", a directory or a Hub id.
        dtype: of the floats in the files; None for the LM's own.

    Returns: the directory.

    Raises:
        ExportError: a directory that is not empty; a model that does not read and generate codes by
            a causal LM alone; a visual tokenizer that was not loaded from a name; see plain_model.
    """
    check_new(out)
    beside = [part for part in (model.bridge, model.regressor) if part is not None]
    if isinstance(objective, LaVIT) and objective.vector_ratio < 1:  # it has learned to read codes
        objective, beside = replace(objective, nested_vectors=None, vector_ratio=1.0), []
    if beside or objective.image_output.kind != "codes" or model.causal.config.is_encoder_decoder:
        raise ExportError(
            f"{objective.name}: expected a causal LM that reads and generates codes, got one with "
            "vectors, or an encoder-decoder: MultimodalLM.save_pretrained writes it"
        )
    if not visual_tokenizer.name_or_path:
        raise ExportError(
            "expected a visual tokenizer that was loaded with from_pretrained: the directory names "
            "it, and this one has no name"
        )
    plain = plain_model(model.lm, dtype)
    v, patches = processor.vocabulary, visual_tokenizer.config.num_patches
    least, most = map(processor.count, objective.image_output.limits(patches))
    tokenizer = serving_tokenizer(processor.text_tokenizer, v, special=True, chat=CHAT)
    special = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    text_config = copy.deepcopy(plain.config)
    for name, value in special.items():
        setattr(text_config, name, value)
    text_config._name_or_path = ""  # a path on this machine
    text_config.use_cache = True  # training sets it to False
    config = LavitConfig(
        text_config=text_config,
        boi_token_id=v.begin,
        eoi_token_id=v.end,
        first_code_id=v.first,
        codebook_size=v.codebook_size,
        stages=v.stages,
        min_codes=least,
        max_codes=most,
        dtype=plain.dtype,
    )
    with torch.device("meta"):
        native = LavitForConditionalGeneration(config)
    native.language_model = plain
    size = plain.get_output_embeddings().weight.shape[0]
    (text,) = GenerationConstraint("text").content_masks(processor, size, torch.device("cpu"))
    allowed = text | v.is_visual(torch.arange(size))
    allowed[processor.stop] = True
    suppressed = (~allowed).nonzero().flatten().tolist()
    native.generation_config = GenerationConfig(
        **special, min_new_tokens=1, suppress_tokens=suppressed or None
    )
    saved = LavitProcessor(
        visual_tokenizer.image_processor,
        tokenizer,
        CHAT,
        visual_tokenizer.name_or_path,
        visual_tokenizer.fingerprint(),
        pixel_decoder,
        {"name": objective.name, **objective.to_dict()},
    )
    with new_directory(out) as partial:
        native.save_pretrained(partial)
        saved.save_pretrained(partial)
    return Path(out)
