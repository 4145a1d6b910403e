"""The exported directory, loaded and run without this package."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import limited
from helpers.small_lms import FAMILIES, TEXTS, small_lm, small_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavit_lm import VisualVocabulary, VocabularyError
from lavit_lm.checkpoints.export import ExportError, export
from lavit_lm.vocabulary.text_tokenizer import train_text_tokenizer

IMAGE = "<|img|><|vis_00003|><|vis_00000|><|vis_00007|><|/img|>"
PROMPTS = [IMAGE, "a red apple<|img|>"]
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for prompt in json.loads(sys.argv[1]):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        text = tokenizer.decode(out, skip_special_tokens=True)
        answers.append({"ids": out.tolist(), "text": text})
    assert not [name for name in sys.modules if name.startswith("lavit")]
    print(json.dumps(answers))
"""


def pair(
    family: str = "llama", tied: bool = False, spare: int = 0
) -> tuple[Any, Any, VisualVocabulary]:
    """An extended random LM and tokenizer; "own" is a Llama with a text tokenizer trained here."""
    tokenizer = train_text_tokenizer(TEXTS, 290) if family == "own" else small_tokenizer(family)
    size = max(tokenizer.get_vocab().values()) + 1 + spare
    model = small_lm("llama" if family == "own" else family, size, tied)
    vocabulary = VisualVocabulary.extend(tokenizer, model, 8, torch.Generator().manual_seed(0))
    return model, tokenizer, vocabulary


def with_lora(model: Any, **options: Any) -> Any:
    """Adapters with an effect: peft initializes them to zero."""
    options = options or {"target_modules": ["q_proj", "v_proj"]}
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return wrapped


@torch.no_grad()
def assert_same_logits(folder: Path, model: Any, vocabulary: VisualVocabulary) -> Any:
    """The LM in a directory against the one that was exported; returns the former."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[0, vocabulary.begin, vocabulary.first, vocabulary.end, 9]])
    expected = model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)
    return loaded


@torch.no_grad()
def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    """Generation without a cache, one argmax per step."""
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [*FAMILIES, "own"])
def test_the_directory_loads_as_the_same_model(family: str, tied: bool, tmp_path: Path) -> None:
    model, tokenizer, vocabulary = pair(family, tied, spare=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = export(model.train(), tokenizer, tmp_path / "out")
    assert model.training and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    assert not [path for path in tmp_path.iterdir() if path != folder]

    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(model.get_input_embeddings().weight)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((folder / name).read_text())
        assert written["eos_token_id"] == tokenizer.eos_token_id
        assert written.get("bos_token_id") == tokenizer.bos_token_id
        assert written["pad_token_id"] in (tokenizer.pad_token_id, tokenizer.eos_token_id)
    again = AutoTokenizer.from_pretrained(folder)
    begins = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    image = [vocabulary.begin, *vocabulary.to_ids(torch.tensor([3, 0, 7])).tolist(), vocabulary.end]
    assert again(IMAGE).input_ids == [*begins, *image]
    assert again.decode(image, skip_special_tokens=True) == IMAGE
    text = vocabulary.encode_text(tokenizer, "a red apple")
    assert again("a red apple<|img|>").input_ids == [*begins, *text, vocabulary.begin]
    assert not vocabulary.is_visual(torch.tensor(vocabulary.encode_text(again, IMAGE))).any()
    assert_same_logits(folder, model, vocabulary)


def test_generates_the_same_without_this_package(tmp_path: Path) -> None:
    pairs = {case: pair("own" if case == "lora" else case) for case in ("own", "gpt2", "lora")}
    plain, tokenizer, vocabulary = pairs["lora"]
    pairs["lora"] = with_lora(copy.deepcopy(plain)), tokenizer, vocabulary
    folders = [
        str(export(model, tokenizer, tmp_path / case))
        for case, (model, tokenizer, _) in pairs.items()
    ]
    command = [sys.executable, "-c", ALONE, json.dumps(PROMPTS), *folders]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = shown.splitlines()[-len(pairs) :]
    for line, (case, (model, tokenizer, vocabulary)) in zip(lines, pairs.items(), strict=True):
        answers = json.loads(line)
        codes = vocabulary.to_ids(torch.tensor([3, 0, 7])).tolist()
        text = vocabulary.encode_text(tokenizer, "a red apple")
        starts = [
            [tokenizer.bos_token_id, vocabulary.begin, *codes, vocabulary.end],
            [tokenizer.bos_token_id, *text, vocabulary.begin],
        ]
        ids = [answer["ids"] for answer in answers]
        assert ids == [greedy(model.eval(), start, 8) for start in starts], case
        assert answers[0]["text"].startswith(IMAGE), case
        if case == "lora":
            assert ids != [greedy(plain, start, 8) for start in starts], "the adapters matter"


def test_adapters_are_merged_into_a_copy(tmp_path: Path) -> None:
    model, tokenizer, vocabulary = pair("own")
    wrapped = with_lora(model)
    folder = export(wrapped, tokenizer, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base" in name]
    assert any("lora_A" in name for name, _ in wrapped.named_parameters())
    assert_same_logits(folder, wrapped, vocabulary)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_that_peft_trains_are_merged_too(tied: bool, tmp_path: Path) -> None:
    """LoRA with trained embeddings of the image tokens: the usual way to train a large LM."""
    model, tokenizer, vocabulary = pair("llama", tied)
    indices = {"embed_tokens": list(range(vocabulary.begin, vocabulary.stop))}
    if not tied:
        indices["lm_head"] = indices["embed_tokens"]
    own = model.get_input_embeddings().weight.detach().clone()
    wrapped = with_lora(model, trainable_token_indices=indices)
    folder = export(wrapped, tokenizer, tmp_path / "out")
    now = assert_same_logits(folder, wrapped, vocabulary).get_input_embeddings().weight
    assert torch.equal(now[: vocabulary.begin], own[: vocabulary.begin])
    assert (now[vocabulary.begin :] != own[vocabulary.begin :]).all()


def test_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    model, tokenizer, _ = pair("own")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))  # not wrapped by peft
    with pytest.raises(ExportError, match=r"adapters were not merged, such as .*lora_"):
        export(model, tokenizer, tmp_path / "out")


def test_a_context_shorter_than_the_comparison(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("gpt2")
    model = small_lm("gpt2", len(tokenizer), n_positions=12)
    VisualVocabulary.extend(tokenizer, model, 8, torch.Generator().manual_seed(0))
    assert (export(model, tokenizer, tmp_path / "out") / "config.json").exists()


def test_dtype(tmp_path: Path) -> None:
    model, tokenizer, _ = pair("own")
    folder = export(model, tokenizer, tmp_path / "out", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_chat_and_card(tmp_path: Path) -> None:
    model, tokenizer, vocabulary = pair("own")
    folder = export(model, tokenizer, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "a red apple"}, {"role": "user", "content": "<|img|>"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a red apple<|img|>"}]}]
    expected = again("a red apple<|img|>").input_ids
    for chat in (messages, parts):
        assert (
            again.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
            == expected
        )
    card = (folder / "README.md").read_text()
    assert f"{vocabulary.first} ... {vocabulary.stop - 1}" in card and "<|vis_00007|>" in card
    assert "{" not in card


def test_impossible_exports(tmp_path: Path) -> None:
    model, tokenizer, vocabulary = pair("own")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thing").write_text("mine")
    with pytest.raises(ExportError, match="already exists"):
        export(model, tokenizer, full)
    with pytest.raises(ExportError, match="already exists"):
        export(model, tokenizer, full / "thing")
    assert (full / "thing").read_text() == "mine"
    out = tmp_path / "out"
    with pytest.raises(VocabularyError, match=r"VisualVocabulary\.extend"):
        export(model, train_text_tokenizer(TEXTS, 290), out)
    with pytest.raises(ExportError, match="extend both together"):
        export(small_lm("llama", vocabulary.begin), tokenizer, out)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ExportError, match="no end-of-text"):
        export(model, endless, out)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, 0] = 1e30
    with pytest.raises(
        ExportError, match=r"NaN or infinity as torch.float16: \['model.embed_tokens.weight'\]"
    ):
        export(model, tokenizer, out, dtype=torch.float16)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("limit", [64, 20_000], ids=["at the config", "at the weights"])
def test_a_full_disk(limit: int, tmp_path: Path) -> None:
    """The kernel limits the size of a file, with the same error as on a full disk."""
    model, tokenizer, _ = pair("own")
    left = "not written, and nothing was left behind"
    with limited(resource.RLIMIT_FSIZE, limit), pytest.raises(ExportError, match=left):
        export(model, tokenizer, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    export(model, tokenizer, tmp_path / "out")


def test_a_model_that_differs_after_loading(tmp_path: Path) -> None:
    """What saving loses, here a hook, is found on reading back; nothing is left behind."""
    model, tokenizer, _ = pair("own")
    model.model.norm.register_forward_hook(
        lambda _module, _inputs, output: output * torch.arange(16)
    )
    with pytest.raises(ExportError, match="logits differ by"):
        export(model, tokenizer, tmp_path / "out")
    assert not any(tmp_path.iterdir())
