"""A trained LM as a plain `transformers` directory: any engine that serves causal LMs can run it without this package.

    config.json, generation_config.json        the LM's own, with the tokenizer's begin, end and padding ids
    model.safetensors (or shards and index)    adapters of peft merged
    tokenizer.json, tokenizer_config.json      image tokens written as text become ids; begin-of-text is put in front
    chat_template.jinja, README.md             how pictures are written as tokens

In here image tokens are *not* special, unlike while training, because servers leave special tokens out of what they
answer and no picture would come back. Whoever puts users' words into prompts has to take the tokens' names out of them
first; VisualVocabulary.encode_text still reads them as text.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
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
"""Messages one after another, since the LM learnt documents and no roles."""

ADAPTERS = (".lora_", "modules_to_save", "trainable_tokens")
"""Parts of parameters' names that only peft gives."""

CARD = Path(__file__).parent / "export_card.md"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference of a logit after reading back, over the logits' deviation; other attention kernels round."""


class ExportError(ValueError):
    """An LM that cannot be written as a plain directory, or that is another one when it is read back."""


def export(
    model: Any, tokenizer: Any, out: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Path:
    """Write an extended LM and its tokenizer, read them back, and compare ids and logits. Neither is changed.

    Args:
        model: a causal LM of `transformers`, or one wrapped by peft, whose adapters are merged into a copy.
        tokenizer: its tokenizer, extended by VisualVocabulary.extend.
        out: a directory that does not exist yet, or is empty; it appears when everything is in it.
        dtype: what to store floats as; None for the LM's own.

    Returns:
        The directory.

    Raises:
        VocabularyError: a tokenizer without image tokens.
        ExportError: a directory with something in it; an LM without rows for the image tokens; weights that are NaN or
            infinite (in `dtype`); adapters that cannot be merged; a full disk; ids or logits that differ after reading
            back. Nothing is left behind then.
    """
    target = Path(out)
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ExportError("the tokenizer has no end-of-text token: a server would never stop")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there already: expected a new or an empty directory")
    plain = _plain_model(model, dtype)
    if (rows := plain.get_input_embeddings().weight.shape[0]) < vocabulary.stop:
        raise ExportError(
            f"the LM has {rows} rows, the tokenizer ids up to {vocabulary.stop - 1}: extend both together"
        )
    served = serving_tokenizer(tokenizer, vocabulary)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(plain, served, vocabulary, partial)
        _compare(getattr(model, "_orig_mod", model), plain, served, vocabulary, partial)
        partial.chmod(0o755)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{target}: not written, and nothing was left behind: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def serving_tokenizer(tokenizer: Any, vocabulary: VisualVocabulary) -> PreTrainedTokenizerFast:
    """A copy that reads image tokens written as text, gives them back as text, and puts begin-of-text in front."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    visual = {vocabulary.begin, vocabulary.end, *range(vocabulary.first, vocabulary.stop)}
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["id"] not in visual
    backend = Tokenizer.from_str(json.dumps(state))
    bos = tokenizer.bos_token
    before = [] if bos is None else [bos]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A"],
        pair=[*before, "$A", "$B:1"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in before],
    )
    names = {
        name: value
        for name, value in tokenizer.special_tokens_map.items()
        if isinstance(value, str)
    }
    names.setdefault("pad_token", names["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT if bos is not None else CHAT.removeprefix("{{- bos_token }}\n"),
        **names,
    )


def _plain_model(model: Any, dtype: torch.dtype | None) -> Any:
    """The LM itself where it can be written as it is, else a copy with adapters merged and floats converted."""
    own = plain = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if hasattr(plain, "merge_and_unload"):
        plain = copy.deepcopy(plain).merge_and_unload(safe_merge=True)
    if dtype is not None and plain.dtype != dtype:
        plain = (copy.deepcopy(plain) if plain is own else plain).to(dtype)
    left = [name for name, _ in plain.named_parameters() if any(part in name for part in ADAPTERS)]
    if left:
        raise ExportError(
            f"adapters that are not merged, such as {left[0]}: no other engine would apply them"
        )
    broken = [name for name, value in plain.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise ExportError(f"these weights hold NaN or infinity as {plain.dtype}: {broken}")
    return plain


def _write(model: Any, tokenizer: Any, vocabulary: VisualVocabulary, directory: Path) -> None:
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = copy.deepcopy(model.config)
    if config.is_encoder_decoder:  # what a suffix begins with, see DaVinci
        ids["decoder_start_token_id"] = (
            ids["eos_token_id"] if ids["bos_token_id"] is None else ids["bos_token_id"]
        )
    for name, value in ids.items():
        setattr(config, name, value)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.use_cache = True  # switched off while training
    model.save_pretrained(directory)
    config.save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # The name that older releases of transformers, and engines built on them, know too.
    settings = directory / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n")
    values = {
        "begin": vocabulary.begin,
        "end": vocabulary.end,
        "first": vocabulary.first,
        "last": vocabulary.stop - 1,
    }
    first, last = (tokenizer.convert_ids_to_tokens(values[name]) for name in ("first", "last"))
    card = (
        CARD.read_text()
        .replace("{size}", str(vocabulary.codebook_size))
        .replace("{bos}", tokenizer.bos_token or "")
    )
    for name, value in values.items():
        card = card.replace(f"{{{name}}}", str(value))
    (directory / "README.md").write_text(
        card.replace("{first name}", first).replace("{last name}", last)
    )


@torch.no_grad()
def _compare(
    given: Any, plain: Any, tokenizer: Any, vocabulary: VisualVocabulary, directory: Path
) -> None:
    """Raise ExportError unless what was written reads back, by plain Auto classes, as what was given."""
    again = AutoTokenizer.from_pretrained(directory)
    if VisualVocabulary.from_tokenizer(again) != vocabulary:
        raise ExportError(
            f"the tokenizer read back has {VisualVocabulary.from_tokenizer(again)}, expected {vocabulary}"
        )
    first, last = tokenizer.convert_ids_to_tokens([vocabulary.first, vocabulary.stop - 1])
    probe = f"{BEGIN}{first}{last}{END} A picture,  of Ünïcode 中文"
    if again(probe).input_ids != tokenizer(probe).input_ids:
        raise ExportError(
            f"{probe!r} is read as {again(probe).input_ids}, expected {tokenizer(probe).input_ids}"
        )
    context = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
    ids = torch.tensor([again(probe).input_ids[:context]], device=plain.device)
    kind = lm_class(AutoConfig.from_pretrained(directory))
    loaded = kind.from_pretrained(directory, dtype=plain.dtype).to(plain.device)
    written = _logits(loaded, ids)
    # Against what was given, adapters unmerged, where its floats are the same; rounded ones only against themselves.
    dtypes = {value.dtype for value in given.parameters()}
    for expected in [
        _logits(lm, ids) for lm in ([given, plain] if dtypes == {plain.dtype} else [plain])
    ]:
        difference = float((written - expected).abs().max() / expected.std())
        if not difference <= TOLERANCE.get(plain.dtype, 0.05):
            raise ExportError(
                f"logits differ by {difference:.1e} of their deviation after reading back: weights were lost"
            )


def _logits(model: Any, ids: Tensor) -> Tensor:
    training = model.training
    try:
        said = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model.eval()(
            ids, attention_mask=torch.ones_like(ids), use_cache=False, **said
        ).logits.float()
    finally:
        model.train(training)
