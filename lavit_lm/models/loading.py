"""The language model before training: new or loaded, with image tokens, adapters, sharding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from lavit_lm.models.encoder_decoder import PrefixSeq2Seq
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.vocabulary.embeddings import CodeMap, embed_codebook, extend_embeddings
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary, VocabularyError
from lavit_tok import WeightsError
from lavit_tok.checkpoints.weights import (
    check_layers,
    find_directory,
    read_json,
    require_finite,
    require_floating_point,
    tensor_elements,
)

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # text tokenizers have the last two
MAX_BUFFERS = 1 << 28  # elements of masks and tables of positions, which no file limits


def load_lm(
    source: str | dict[str, Any],
    processor: MultimodalProcessor,
    text_ids: int,
    new_embeddings: bool,
    seed: int,
    codebook: Tensor | None = None,
) -> Any:
    """A causal LM, or an encoder-decoder, with embeddings of the image tokens, float32.

    Args:
        source: directory or Hub id, or the JSON of a `transformers` config for a new one.
        processor: its text tokenizer, extended by image tokens.
        text_ids: number of ids of the text tokenizer before that.
        new_embeddings: whether to initialize the image tokens' embeddings; False if they were
            trained already.
        seed: for them, and for the weights of a new LM.
        codebook: float [tables K c], the entries of the codes, if new embeddings of codes are to be
            made from them; see embed_codebook.

    Raises:
        ValueError: a directory or config that is not an LM of `transformers`.
        VocabularyError: an LM without embeddings of the image tokens of its tokenizer.
    """
    try:
        if isinstance(source, str):
            lm, report = open_lm(find_directory(source, None, FILES), torch.float32)
            if missing := sorted(map(str, report["missing_keys"])):
                absent = shorten(", ".join(missing), 160)
                text = f"lm: {source}: begins at random, as it has no {absent}"
                warnings.warn(text, stacklevel=2)
        else:
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            special = {name: getattr(processor.text_tokenizer, name) for name in names}
            config = AutoConfig.for_model(**{**source, "vocab_size": text_ids, **special})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                lm = lm_class(config).from_config(config, trust_remote_code=False)
    except WeightsError as error:
        raise ValueError(
            f"lm: expected a causal LM of transformers, got {source!r}: {error}"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        name = source
        if not isinstance(source, str):
            name = source.get("model_type", "a config without model_type")
        reason = shorten(str(error), 160)  # transformers lists every model type
        raise ValueError(
            f"lm: expected a causal LM of transformers, got {name!r}: {reason}"
        ) from None
    vocabulary = processor.vocabulary
    if new_embeddings or not isinstance(source, str):
        generator = torch.Generator().manual_seed(seed)
        extend_embeddings(lm, vocabulary.begin, vocabulary.stop, generator)
        if codebook is not None:
            embed_codebook(lm, vocabulary.begin, vocabulary.first, codebook, generator)
    elif lm.get_input_embeddings().num_embeddings < vocabulary.stop:
        rows = lm.get_input_embeddings().num_embeddings
        raise VocabularyError(
            f"the text tokenizer has ids up to {vocabulary.stop - 1}, the LM {source} only "
            f"{rows} embedding rows: give "
            "the tokenizer without image tokens, or an LM that was trained with them"
        )
    return lm


def open_lm(directory: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Load the LM of a directory that `find_directory` has checked; runs no code of it.

    Returns:
        The LM, and transformers' report: names of missing, unexpected and mis-shaped tensors.

    Raises:
        WeightsError: a config or weights that transformers cannot read; a config of a larger model
            than the weights', before it is built; mis-shaped tensors, all listed; NaN or infinity.
    """
    check_layers(read_json(directory / "config.json"), directory)
    stored = tensor_elements(directory)  # a damaged file is reported here
    try:
        with _quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            kind = lm_class(config)
            empty_lm = kind.from_config(copy.deepcopy(config), trust_remote_code=False)
        needed = sum(p.numel() for p in empty_lm.parameters())
        buffers = sum(b.numel() for b in empty_lm.buffers())
    except Exception as error:  # constructors of transformers raise nearly any exception
        raise _unreadable(directory / "config.json", "the config of a causal LM", error) from error
    if getattr(config, "quantization_config", None) is None:
        require_floating_point(directory, dict(empty_lm.named_parameters()))
    # A file may lack some tensors, such as a new head: the report lists these.
    if needed > 2 * stored or buffers > max(2 * stored, MAX_BUFFERS):
        raise WeightsError(
            f"{directory}: config.json: expected a model of the {stored} numbers in the weights, "
            f"got one of {needed} (and {buffers} in buffers): the others would be random"
        )
    try:
        with _quiet():
            lm, report = kind.from_pretrained(
                directory,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed below; transformers only prints them
                trust_remote_code=False,
            )
    except Exception as error:
        raise _unreadable(directory, "the weights of its config", error) from error
    if mismatched := report["mismatched_keys"]:
        shapes = [f"{name}: expected {list(b)}, got {list(a)}" for name, a, b in mismatched]
        listed = "; ".join(sorted(shapes))
        raise WeightsError(f"{directory}: these tensors do not fit the config: {listed}")
    require_finite(lm, str(directory))
    return lm, report


def open_text_tokenizer(directory: Path) -> Any:
    """Load the text tokenizer of a directory that `find_directory` has checked.

    Raises:
        WeightsError: files that transformers cannot read.
    """
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except BaseException as error:  # tokenizers panics by an exception that is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        expected = "a config and a text tokenizer of transformers"
        raise _unreadable(directory, expected, error) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers: an error is one line on stderr."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _unreadable(path: Path, expected: str, error: BaseException) -> WeightsError:
    reason = shorten(f"{type(error).__name__}: {error}", 400)
    return WeightsError(f"{path}: expected {expected}, which transformers cannot read: {reason}")


def lm_class(config: Any) -> Any:
    """The class of `transformers` for an LM of this config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def sequence_model(
    lm: Any,
    bridge: nn.Module | None = None,
    regressor: nn.Module | None = None,
    restricted: VisualVocabulary | None = None,
    code_map: CodeMap | None = None,
    vector_noise: float = 0.0,
) -> SequenceModel:
    """The LM over packed sequences; an encoder-decoder splits each at the end of its prefix.

    Raises:
        ValueError: see SequenceModel; `restricted`, `code_map` or `vector_noise` with an
            encoder-decoder.
    """
    if lm.config.is_encoder_decoder:
        causal_only = {
            "vector_noise": bool(vector_noise),
            "mapped embeddings of codes": code_map is not None,
            "restricted_softmax": restricted is not None,
        }
        given = [name for name, is_given in causal_only.items() if is_given]
        if given:
            raise ValueError(f"{given[0]}: expected a causal LM")
        return PrefixSeq2Seq(lm, bridge, regressor)
    return SequenceModel(lm, bridge, regressor, restricted, code_map, vector_noise)


def with_lora(lm: Any, vocabulary: VisualVocabulary, lora: dict[str, Any]) -> Any:
    """The LM frozen, with peft's adapters; the embedding rows of image tokens are trained as well.

    Raises:
        ValueError: an encoder-decoder, whose embedding matrix is shared by several layers, of which
            peft trains one.
    """
    from peft import LoraConfig, get_peft_model

    if lm.config.is_encoder_decoder:
        raise ValueError(
            f"lora: expected a causal LM, got {lm.config.model_type}: train all of its weights"
        )
    image_ids = list(range(vocabulary.begin, vocabulary.stop))
    names = {id(module): name for name, module in lm.named_modules()}
    tables = [lm.get_input_embeddings()]
    if lm.get_output_embeddings().weight is not tables[0].weight:
        tables.append(lm.get_output_embeddings())
    rows = {names[id(table)].rsplit(".", 1)[-1]: image_ids for table in tables}
    return get_peft_model(
        lm, LoraConfig(**{"task_type": "CAUSAL_LM", "trainable_token_indices": rows, **lora})
    )


def shard(model: SequenceModel, mesh: Any) -> None:
    """FSDP2: each block of the LM is a unit, all other parameters are one more."""
    from torch.distributed.fsdp import fully_shard

    stacks = [m for m in model.causal.base_model.modules() if isinstance(m, nn.ModuleList)]
    for block in max(stacks, key=len):
        fully_shard(block, mesh=mesh)
    # The root's parameters stay whole from its forward to the end of the backward pass: an
    # objective's losses call the head after the model's forward.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
