"""The language model before training: read or made new, with rows for image tokens, with adapters, sharded."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lavit_lm.models.encoder_decoder import PrefixSeq2Seq
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.vocabulary.embeddings import extend_embeddings
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary, VocabularyError


def load_lm(
    source: str | dict[str, Any],
    processor: MultimodalProcessor,
    own: int,
    new_embeddings: bool,
    seed: int,
) -> Any:
    """A causal LM, or an encoder-decoder, with rows for the image tokens, float32.

    Args:
        source: directory or Hub id, or the JSON of a `transformers` config for a new one.
        lexicon: its text tokenizer, extended.
        own: ids of the text tokenizer before that.
        new_embeddings: whether the image tokens' rows are to be drawn; False where they were trained already.
        seed: draws them, and the weights of a new LM.

    Raises:
        ValueError: a directory or config that is no causal LM of `transformers`.
        VocabularyError: an LM that has no rows for image tokens that its tokenizer has.
    """
    try:
        if isinstance(source, str):
            kind = lm_class(AutoConfig.from_pretrained(source))
            lm = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        else:
            special = {
                f"{n}_token_id": getattr(processor.text_tokenizer, f"{n}_token_id")
                for n in ("bos", "eos", "pad")
            }
            config = AutoConfig.for_model(**{**source, "vocab_size": own, **special})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                lm = lm_class(config).from_config(config)
    except (ValueError, KeyError, TypeError, OSError) as error:
        named = (
            source
            if isinstance(source, str)
            else source.get("model_type", "a config without model_type")
        )
        reason = shorten(str(error), 160)  # transformers lists all it knows
        raise ValueError(
            f"lm: expected a causal LM of transformers, got {named!r}: {reason}"
        ) from None
    vocabulary = processor.vocabulary
    if new_embeddings or not isinstance(source, str):
        extend_embeddings(
            lm, vocabulary.begin, vocabulary.stop, torch.Generator().manual_seed(seed)
        )
    elif lm.get_input_embeddings().num_embeddings < vocabulary.stop:
        rows = lm.get_input_embeddings().num_embeddings
        raise VocabularyError(
            f"the text tokenizer has ids up to {vocabulary.stop - 1}, the LM {source} only {rows} rows: name the "
            "tokenizer it had before it got image tokens, or an LM that was trained with them"
        )
    return lm


def lm_class(config: Any) -> Any:
    """The class of `transformers` that reads an LM of this config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def sequence_model(
    lm: Any, bridge: nn.Module | None = None, regressor: nn.Module | None = None
) -> SequenceModel:
    """The LM over packed rows; an encoder-decoder is split where each row's prefix ends."""
    return (PrefixSeq2Seq if lm.config.is_encoder_decoder else SequenceModel)(lm, bridge, regressor)


def with_lora(lm: Any, vocabulary: VisualVocabulary, settings: dict[str, Any]) -> Any:
    """The LM frozen, with peft's adapters; the image tokens' rows are trained beside them.

    Raises:
        ValueError: an encoder-decoder, whose one matrix of rows several layers read, of which peft would train one.
    """
    from peft import LoraConfig, get_peft_model

    if lm.config.is_encoder_decoder:
        raise ValueError(
            f"lora: adapters are for causal LMs, {lm.config.model_type} is trained whole"
        )
    new = list(range(vocabulary.begin, vocabulary.stop))
    names = {id(module): name for name, module in lm.named_modules()}
    tables = [lm.get_input_embeddings()]
    if lm.get_output_embeddings().weight is not tables[0].weight:
        tables.append(lm.get_output_embeddings())
    rows = {names[id(table)].rsplit(".", 1)[-1]: new for table in tables}
    return get_peft_model(
        lm, LoraConfig(**{"task_type": "CAUSAL_LM", "trainable_token_indices": rows, **settings})
    )


def shard(model: SequenceModel, mesh: Any) -> None:
    """FSDP2: each block of the LM its own unit, all the rest (embeddings, norm, head, bridge) one more."""
    from torch.distributed.fsdp import fully_shard

    stacks = [m for m in model.causal.base_model.modules() if isinstance(m, nn.ModuleList)]
    for block in max(stacks, key=len):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
