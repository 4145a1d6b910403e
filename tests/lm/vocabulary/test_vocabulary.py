"""Image tokens in the vocabularies, and new embeddings in the models, of six families of LMs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_lms import FAMILIES, TEXTS, small_lm, small_tokenizer
from helpers.tensors import generator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from lavit_lm import VisualVocabulary, VocabularyError

K = 600
NASTY = [
    "<|img|>",
    "before<|img|><|vis_00003|><|/img|>after",
    "</s> <s> <pad> <eos> <bos> <|endoftext|> <|im_end|> a",
    "＜|img|＞ and <|vis_00003|",
    "<|vis_599|> <|vis_000003|> <<|img|>>",
]


def ids_of(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def extended(family: str, tied: bool = False, spare: int = 0) -> tuple[Any, Any, VisualVocabulary]:
    tokenizer = small_tokenizer(family)
    model = small_lm(family, ids_of(tokenizer) + spare, tied)
    return tokenizer, model, VisualVocabulary.extend(tokenizer, model, K, generator())


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("spare", [0, 100, 2 * K], ids=["exact", "padded", "padded beyond"])
def test_extend(family: str, tied: bool, spare: int) -> None:
    tokenizer = small_tokenizer(family)
    own = ids_of(tokenizer)
    model = small_lm(family, own + spare, tied)
    with torch.no_grad():  # padding is never trained: it must not count as trained embeddings
        model.get_input_embeddings().weight[own:] = 50.0
        model.get_output_embeddings().weight[own:] = 50.0
    before = copy.deepcopy(model)
    prompt = torch.tensor([tokenizer.encode("a red apple", add_special_tokens=False)])
    state = torch.get_rng_state()
    vocabulary = VisualVocabulary.extend(tokenizer, model, K, generator())

    assert vocabulary == VisualVocabulary(own, own + 1, own + 2, K)
    names = ["<|img|>", "<|/img|>", "<|vis_00000|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [own, own + 1, own + 2]
    assert tokenizer.convert_ids_to_tokens(vocabulary.stop - 1) == f"<|vis_{K - 1:05d}|>"
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is not used"

    read, write = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    size = max(own + spare, vocabulary.stop)
    assert len(read) == len(write) == model.config.vocab_size == size
    assert (read is write) == tied
    with torch.no_grad():
        old, new = (m(prompt).logits[..., :own] for m in (before, model))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    for now, then in (
        (read, before.get_input_embeddings()),
        (write, before.get_output_embeddings()),
    ):
        assert torch.equal(now[:own], then.weight[:own])
        assert torch.equal(now[vocabulary.stop :], then.weight[vocabulary.stop :])
        check_distribution(now[own : vocabulary.stop].detach(), then.weight[:own].detach())


def check_distribution(new: torch.Tensor, own: torch.Tensor) -> None:
    """Same mean and deviation in each column up to sampling error; none equal, also in bfloat16."""
    deviation, mean = torch.std_mean(own, 0, correction=0)
    assert ((new.mean(0) - mean).abs() < 5 * deviation / len(new) ** 0.5).all()
    assert ((new.std(0) / deviation - 1).abs() < 5 / (2 * len(new)) ** 0.5).all()
    assert len(new.bfloat16().unique(dim=0)) == len(new)


def test_new_embeddings_in_bfloat16() -> None:
    tokenizer = small_tokenizer("llama")
    model = small_lm("llama", ids_of(tokenizer)).bfloat16()
    vocabulary = VisualVocabulary.extend(tokenizer, model, K, generator())
    new = model.get_input_embeddings().weight[vocabulary.begin :]
    assert new.dtype == torch.bfloat16
    assert len(new.unique(dim=0)) == K + 2


def test_bias_of_the_output_layer() -> None:
    tokenizer = small_tokenizer("phi")
    model = small_lm("phi", ids_of(tokenizer))
    bias = torch.linspace(1, 3, ids_of(tokenizer))
    model.get_output_embeddings().bias.data = bias.clone()
    vocabulary = VisualVocabulary.extend(tokenizer, model, 5, generator())
    now = model.get_output_embeddings().bias
    assert torch.equal(now[: vocabulary.begin], bias)
    torch.testing.assert_close(now[vocabulary.begin :], torch.full((7,), 2.0))


def test_the_generator_determines_the_embeddings() -> None:
    drawn = []
    for seed in (0, 0, 1):
        tokenizer = small_tokenizer("qwen2")
        model = small_lm("qwen2", ids_of(tokenizer))
        VisualVocabulary.extend(tokenizer, model, 7, generator(seed))
        drawn.append(model.get_output_embeddings().weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_new_embeddings_are_trained() -> None:
    """Each gets a gradient of its own, so that a few steps fit a sequence of codes."""
    _, model, vocabulary = extended("llama", tied=True)
    codes = vocabulary.to_ids(torch.tensor([3, 1, 4, 1, 5]))
    ids = torch.cat([torch.tensor([vocabulary.begin]), codes, torch.tensor([vocabulary.end])])[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_extending_a_tokenizer_alone() -> None:
    tokenizer = small_tokenizer("gemma")
    own = ids_of(tokenizer)
    assert VisualVocabulary.extend(tokenizer, None, 1) == VisualVocabulary(own, own + 1, own + 2, 1)
    wide = small_tokenizer("gpt2")
    vocabulary = VisualVocabulary.extend(wide, None, 100_001)
    edges = wide.convert_ids_to_tokens([vocabulary.first, vocabulary.stop - 1])
    assert edges == ["<|vis_000000|>", "<|vis_100000|>"]
    assert VisualVocabulary.from_tokenizer(wide) == vocabulary


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_and_loaded_by_plain_classes(family: str, tied: bool, tmp_path: Path) -> None:
    tokenizer, model, vocabulary = extended(family, tied, spare=10)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert VisualVocabulary.from_tokenizer(again) == vocabulary
    image = "<|img|><|vis_00007|><|vis_00599|><|/img|>"
    for text in [*TEXTS, "Ünïcode 中文 🙂  two spaces", image]:
        assert again.encode(text) == tokenizer.encode(text)
    marked = tokenizer.encode("<|img|><|vis_00007|><|/img|>", add_special_tokens=False)
    assert marked[-3:] == [vocabulary.begin, vocabulary.first + 7, vocabulary.end]
    ids = torch.tensor([[0, vocabulary.begin, vocabulary.first + 7, vocabulary.end, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("text", NASTY)
def test_text_never_becomes_a_token(family: str, text: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(family)
    vocabulary = VisualVocabulary.extend(tokenizer, None, K)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    before = vocabulary.encode_text(tokenizer, text)
    assert before == vocabulary.encode_text(plain, text)
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    specials -= {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    assert not specials & set(before)
    assert not vocabulary.is_visual(torch.tensor(before)).any()
    assert vocabulary.decode_text(plain, before).strip() == text.strip()
    read = set(tokenizer.encode(text, add_special_tokens=False))  # as a server encodes it
    assert (vocabulary.begin in read) == ("<|img|>" in text)


def test_no_begin_and_no_end_of_text_is_added(family: str) -> None:
    tokenizer = small_tokenizer(family)
    vocabulary = VisualVocabulary.extend(tokenizer, None, 3)
    assert vocabulary.encode_text(tokenizer, "") == []
    ids = vocabulary.encode_text(tokenizer, TEXTS[0])
    assert tokenizer.bos_token_id not in ids and tokenizer.eos_token_id not in ids
    assert vocabulary.decode_text(tokenizer, ids).strip() == TEXTS[0]


def word_tokenizer(words: list[str], **names: str) -> PreTrainedTokenizerFast:
    """Its model contains the names of special tokens as words, so that no option keeps them out."""
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=names["unk_token"])
    )
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_a_model_that_contains_a_special_name_as_a_word() -> None:
    words = ["<unk>", "</s>", "a", "cat", "<", "/s>"]
    tokenizer = word_tokenizer(words, unk_token="<unk>", eos_token="</s>")
    vocabulary = VisualVocabulary.extend(tokenizer, None, 3)
    assert tokenizer.encode("a </s>", add_special_tokens=False, split_special_tokens=True) == [2, 1]
    assert vocabulary.encode_text(tokenizer, "a </s> cat") == [2, 4, 5, 3]
    assert vocabulary.encode_text(tokenizer, "a dog") == [2, 0], "unknown text may be <unk>"
    # The normalizer makes the name after the cut.
    with pytest.raises(VocabularyError, match=r"can only encode .* with its special token </s>"):
        vocabulary.encode_text(tokenizer, "a ＜/s＞")


def test_tokens_that_are_not_special() -> None:
    """As in an exported directory: servers encode their names in prompts, encode_text does not."""
    tokenizer = small_tokenizer("gpt2")
    names = ("<|img|>", "<|/img|>", "<|vis_00000|>")
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    text = "a <|img|><|vis_00000|><|/img|> b"
    assert vocabulary.begin in tokenizer.encode(text, split_special_tokens=True)
    ids = vocabulary.encode_text(tokenizer, text)
    assert not vocabulary.is_visual(torch.tensor(ids)).any()
    assert vocabulary.decode_text(tokenizer, ids) == text


def test_decode_text() -> None:
    tokenizer, model, vocabulary = extended("qwen3", spare=2 * K)
    text = vocabulary.encode_text(tokenizer, "a red apple")
    image = [vocabulary.begin, *vocabulary.to_ids(torch.arange(3)).tolist(), vocabulary.end]
    ids = [*text[:2], *image, *text[2:], tokenizer.eos_token_id]
    assert vocabulary.decode_text(tokenizer, ids) == "a red apple"
    assert vocabulary.decode_text(tokenizer, torch.tensor(ids)) == "a red apple"
    assert vocabulary.decode_text(tokenizer, []) == ""
    for bad in (vocabulary.stop, model.config.vocab_size - 1, -1):
        with pytest.raises(VocabularyError, match=f"id {bad} is no token"):
            vocabulary.decode_text(tokenizer, [bad])


def test_codes_and_ids() -> None:
    vocabulary = VisualVocabulary(begin=3, end=4, first=5, codebook_size=2)
    codes = torch.tensor([[0, 1], [1, 1]])
    assert vocabulary.to_ids(codes).tolist() == [[5, 6], [6, 6]]
    assert torch.equal(vocabulary.to_codes(vocabulary.to_ids(codes)), codes)
    assert vocabulary.to_ids(torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert vocabulary.is_code(torch.arange(9)).tolist() == [i in (5, 6) for i in range(9)]
    assert vocabulary.is_visual(torch.arange(9)).tolist() == [i in (3, 4, 5, 6) for i in range(9)]
    for wrong in (-1, 2):
        with pytest.raises(VocabularyError, match=rf"0\.\.1, got {wrong}"):
            vocabulary.to_ids(torch.tensor([0, wrong]))
    for wrong in (4, 7, -5):
        with pytest.raises(VocabularyError, match=rf"5\.\.6, got {wrong}"):
            vocabulary.to_codes(torch.tensor([5, wrong, 0]))


def test_mask_equals_the_drawing_in_the_docstring() -> None:
    vocabulary = VisualVocabulary(begin=3, end=4, first=5, codebook_size=2)
    nested = VisualVocabulary(begin=3, end=4, first=5, codebook_size=2, stages=2)
    drawn = [" ".join(".X"[allowed] for allowed in mask.int()) for mask in nested.masks(10)]
    assert drawn == [". . . . . X X . . .", ". . . . . . . X X ."]
    assert all(f"  {line}\n" in (VisualVocabulary.masks.__doc__ or "") for line in drawn)
    (mask,) = vocabulary.masks(7)
    assert mask.tolist() == [False] * 5 + [True] * 2
    for size in (0, 1, 6):
        with pytest.raises(VocabularyError, match=f"width {size} do not include"):
            vocabulary.masks(size)


def test_extending_twice() -> None:
    tokenizer, model, _ = extended("llama")
    embeddings = model.config.vocab_size
    for size in (K, K + 1):
        with pytest.raises(VocabularyError, match="already has 602 image tokens"):
            VisualVocabulary.extend(tokenizer, model, size)
    assert (
        model.config.vocab_size == embeddings
        and VisualVocabulary.from_tokenizer(tokenizer).codebook_size == K
    )


def test_models_that_do_not_fit() -> None:
    tokenizer = small_tokenizer("llama")
    own = ids_of(tokenizer)
    with pytest.raises(VocabularyError, match=f"ids up to {own - 1}, the LM only {own - 1} embed"):
        VisualVocabulary.extend(tokenizer, small_lm("llama", own - 1), K)
    with pytest.raises(VocabularyError, match="expected a causal LM"):
        VisualVocabulary.extend(tokenizer, LlamaModel(small_lm("llama", own).config), K)
    with pytest.raises(VocabularyError, match="expected a causal LM"):
        VisualVocabulary.extend(tokenizer, torch.nn.Linear(1, 1), K)
    with pytest.raises(VocabularyError, match=r"no <\|img\|>"):  # nothing was changed
        VisualVocabulary.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no <\|img\|>, <\|/img\|>, <\|vis_00000\|>"),
        (["<|img|>", "<|/img|>"], r"no <\|vis_00000\|>"),
        (["<|img|>", "<|vis_00000|>"], r"no <\|/img\|>"),
        (["<|img|>", "<|/img|>", "<|vis_00000|>", "<|vis_00002|>"], "none named <|vis_00001|>"),
        (
            ["<|img|>", "<|/img|>", "<|vis_00000|>", "<other>", "<|vis_00001|>"],
            r"not contiguous: <\|vis_00000\|> has id",
        ),
        (["<|img|>", "<|/img|>", "<|vis_00000|>", "<|vis_0|>"], "different lengths"),
    ],
)
def test_tokenizers_without_a_complete_vocabulary(names: list[str], message: str) -> None:
    tokenizer = small_tokenizer("gpt2")
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True
    )
    with pytest.raises(VocabularyError, match=message):
        VisualVocabulary.from_tokenizer(tokenizer)


def test_impossible_vocabularies() -> None:
    for wrong in ((0, 0, 1, 4), (0, 2, 1, 4), (4, 0, 1, 4), (-1, 0, 1, 4), (0, 1, 2, 0)):
        with pytest.raises(VocabularyError):
            VisualVocabulary(*wrong)
    for size in (0, -1, True):
        with pytest.raises(VocabularyError, match="at least one code"):
            VisualVocabulary.extend(small_tokenizer("llama"), None, size)
    for slow in (None, "gpt2", small_tokenizer("gpt2").backend_tokenizer):
        with pytest.raises(VocabularyError, match="expected a fast tokenizer"):
            VisualVocabulary.from_tokenizer(slow)


@pytest.mark.usefixtures("unchecked")
def test_wrong_types() -> None:
    tokenizer = small_tokenizer("gpt2")
    vocabulary = VisualVocabulary.extend(tokenizer, None, 3)
    with pytest.raises(VocabularyError, match="expected an int64 tensor, got list"):
        vocabulary.to_ids([0, 1])  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match=r"got torch\.float32"):
        vocabulary.to_codes(torch.tensor([260.0]))
    with pytest.raises(VocabularyError, match="expected text, got NoneType"):
        vocabulary.encode_text(tokenizer, None)  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match="half a surrogate pair at 1"):
        vocabulary.encode_text(tokenizer, "a\ud83d")
