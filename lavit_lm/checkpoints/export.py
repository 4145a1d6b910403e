"""A trained LM as a plain `transformers` directory, which engines that serve causal LMs can run.

    config.json, generation_config.json        the LM's own, with the tokenizer's special ids
    model.safetensors (or shards and index)    adapters of peft merged
    tokenizer.json, tokenizer_config.json      names of image tokens become ids
    chat_template.jinja, README.md             how images are written as tokens

The tokenizer adds begin-of-text to a prompt. Image tokens are *not* special here, unlike during
training: servers remove special tokens from answers, and with them the images. Remove the tokens'
names from a user's text before it becomes a prompt; VisualVocabulary.encode_text still encodes them
as text.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lavit_lm.models.loading import lm_class
from lavit_lm.vocabulary.visual_vocabulary import BEGIN, END, VisualVocabulary

CHAT = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}{{- part.text }}{%- endfor %}
    {%- endif %}
{%- endfor %}"""
"""Concatenates the messages: the LM was trained on documents, without roles."""

ADAPTERS = (".lora_", "modules_to_save", "trainable_tokens")
"""Parts of parameter names that only peft uses."""

NESTED = """the table of their stage (the number before
them: codes of ranks 0, 1, 2, 3, 4-7, 8-11, 12-15, 16-31, ... are of the stages 00, 01, 02, ...)"""
"""For the card: an image has its codes in this order, and can end after any of them."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CARD = Path(__file__).parent / "export_card.md"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference of a logit after reading back, in standard deviations of the logits; attention
kernels of the two models may round differently. 0.05 for other dtypes."""


class ExportError(ValueError):
    """An LM that cannot be exported, or that differs when it is read back."""


def export(
    model: Any, tokenizer: Any, out: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Path:
    """Write an extended LM and its tokenizer, read them back, and compare ids and logits.

    Neither the LM nor the tokenizer is changed.

    Args:
        model: a causal LM of `transformers`, or one wrapped by peft, whose adapters are merged into
            a copy.
        tokenizer: its tokenizer, extended by VisualVocabulary.extend.
        out: a directory that does not exist or is empty; it appears once it is complete.
        dtype: of the floats in the files; None for the LM's own.

    Returns:
        The directory.

    Raises:
        VocabularyError: a tokenizer without image tokens.
        ExportError: a directory that is not empty; an LM without embeddings of the image tokens;
            weights that are NaN or infinite (in `dtype`); adapters that cannot be merged; a full
            disk; ids or logits that differ after reading back. Nothing is left behind then.
    """
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ExportError("the tokenizer has no end-of-text token: a server would never stop")
    check_new(out)
    plain = plain_model(model, dtype)
    embeddings = plain.get_input_embeddings().weight.shape[0]
    if embeddings < vocabulary.stop:
        raise ExportError(
            f"the LM has {embeddings} embeddings, the tokenizer ids up to {vocabulary.stop - 1}: "
            "extend both together"
        )
    served = serving_tokenizer(tokenizer, vocabulary)
    with new_directory(out) as partial:
        _write(plain, served, vocabulary, partial)
        _compare(getattr(model, "_orig_mod", model), plain, served, vocabulary, partial)
    return Path(out)


def check_new(out: str | os.PathLike[str]) -> None:
    """Raise ExportError unless the directory does not exist or is empty."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} already exists: expected a new or an empty directory")


@contextmanager
def new_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to write to, which becomes `out` when everything in it is complete.

    Raises:
        ExportError: files that cannot be written. Nothing is left behind then.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            (partial := Path(folder) / "new").mkdir()
            yield partial
            partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{target}: not written, and nothing was left behind: {error}") from error


def serving_tokenizer(
    tokenizer: Any, vocabulary: VisualVocabulary, special: bool = False, chat: str = CHAT
) -> PreTrainedTokenizerFast:
    """A copy that encodes names of image tokens and adds begin-of-text.

    Args:
        tokenizer: of the LM.
        vocabulary: its image tokens.
        special: whether image tokens are special, and so left out of decoded text. Text between
            them is then encoded as in training, where each text of a sequence is one of its own.
        chat: chat template.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    visual = {vocabulary.begin, vocabulary.end, *range(vocabulary.first, vocabulary.stop)}
    for token in state["added_tokens"]:
        token["special"] = special if token["id"] in visual else token["special"]
    splitter = state["pre_tokenizer"] or {}
    for part in [splitter, *splitter.get("pretokenizers", [])] if special else []:
        if part.get("prepend_scheme") == "first":  # of Llama: a space before the first text only
            part["prepend_scheme"] = "always"
    backend = Tokenizer.from_str(json.dumps(state))
    bos = tokenizer.bos_token
    before = [] if bos is None else [bos]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A"],
        pair=[*before, "$A", "$B:1"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in before],
    )
    listed = tokenizer.special_tokens_map.items()
    names = {name: value for name, value in listed if isinstance(value, str)}
    names.setdefault("pad_token", names["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat if bos is not None else chat.removeprefix("{{- bos_token }}\n"),
        **names,
    )


def plain_model(model: Any, dtype: torch.dtype | None) -> Any:
    """The LM itself, or a copy with adapters merged and floats converted."""
    original = plain = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
    if hasattr(plain, "merge_and_unload"):
        plain = copy.deepcopy(plain).merge_and_unload(safe_merge=True)
    if dtype is not None and plain.dtype != dtype:
        plain = (copy.deepcopy(plain) if plain is original else plain).to(dtype)
    left = [name for name, _ in plain.named_parameters() if any(a in name for a in ADAPTERS)]
    if left:
        raise ExportError(f"adapters were not merged, such as {left[0]}: they would be lost")
    broken = [name for name, value in plain.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise ExportError(f"these weights hold NaN or infinity as {plain.dtype}: {broken}")
    return plain


def _write(model: Any, tokenizer: Any, vocabulary: VisualVocabulary, directory: Path) -> None:
    ids = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    config = copy.deepcopy(model.config)
    if config.is_encoder_decoder:  # the id that a suffix begins with, see DaVinci
        bos, eos = ids["bos_token_id"], ids["eos_token_id"]
        ids["decoder_start_token_id"] = eos if bos is None else bos
    for name, value in ids.items():
        setattr(config, name, value)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.use_cache = True  # training sets it to False
    model.save_pretrained(directory)
    config.save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 5 writes a new class name; older releases, and engines built on them, know this
    # one.
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    first, last = tokenizer.convert_ids_to_tokens([vocabulary.first, vocabulary.stop - 1])
    card = CARD.read_text()
    for name, value in {
        "size": vocabulary.codebook_size,
        "table": NESTED if vocabulary.stages else "the codebook",
        "image": f"{first} ... {last}",
        "bos": tokenizer.bos_token or "",
        "begin": vocabulary.begin,
        "end": vocabulary.end,
        "first": vocabulary.first,
        "last": vocabulary.stop - 1,
        "first name": first,
        "last name": last,
    }.items():
        card = card.replace(f"{{{name}}}", str(value))
    (directory / "README.md").write_text(card)


@torch.no_grad()
def _compare(
    exported: Any, plain: Any, tokenizer: Any, vocabulary: VisualVocabulary, directory: Path
) -> None:
    """Raise ExportError unless plain Auto classes load the same tokenizer and LM."""
    again = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    loaded_vocabulary = VisualVocabulary.from_tokenizer(again)
    if loaded_vocabulary != vocabulary:
        raise ExportError(f"read back, the tokenizer has {loaded_vocabulary}, not {vocabulary}")
    first, last = tokenizer.convert_ids_to_tokens([vocabulary.first, vocabulary.stop - 1])
    probe = f"{BEGIN}{first}{last}{END} An image,  of Ünïcode 中文"
    expected, probe_ids = tokenizer(probe).input_ids, again(probe).input_ids
    if probe_ids != expected:
        raise ExportError(f"read back, the ids of {probe!r} are {probe_ids}, not {expected}")
    context = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
    ids = torch.tensor([probe_ids[:context]], device=plain.device)
    kind = lm_class(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    loaded = kind.from_pretrained(directory, dtype=plain.dtype, trust_remote_code=False)
    loaded = loaded.to(plain.device)
    written = _logits(loaded, ids)
    # Compare with the given LM too, whose adapters are not merged, unless the floats were
    # converted.
    same_dtype = {value.dtype for value in exported.parameters()} == {plain.dtype}
    for lm in [exported, plain] if same_dtype else [plain]:
        logits = _logits(lm, ids)
        difference = float((written - logits).abs().max() / logits.std())
        if not difference <= TOLERANCE.get(plain.dtype, 0.05):
            raise ExportError(
                f"read back, logits differ by {difference:.1e} standard deviations: weights were "
                "lost"
            )


def _logits(model: Any, ids: Tensor) -> Tensor:
    training = model.training
    try:
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        mask = torch.ones_like(ids)
        return model.eval()(ids, attention_mask=mask, use_cache=False, **decoder).logits.float()
    finally:
        model.train(training)
