"""Segments, packing and masks of lavit_lm: the drawings, and that packing changes nothing and leaks
nothing.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.lm_parts import CODES, image, pairs, plain_sequence, processor_and_model
from helpers.lm_parts import losses as losses_of
from helpers.small_lms import FAMILIES
from helpers.tensors import generator

import lavit_lm.sequences.masks
import lavit_lm.sequences.packing
import lavit_lm.sequences.segments
from lavit_lm.models.losses import log_likelihood, shift_targets
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.masks import attention_mask, model_mask
from lavit_lm.sequences.packing import PADDING, PackedBatch, pack, pad, plan_blocks
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.training.sampler import segment_length
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VocabularyError

# Segments and LaVIT's layout


def test_the_drawing_of_a_sequence():
    processor, _ = processor_and_model("llama")
    v, words = processor.vocabulary, processor.text("a cat")
    sample = [TextSegment("a cat"), ImageSegment(torch.tensor([7, 3, 9]))]
    sequence = LaVIT(order="given").layout(sample, processor, generator())
    codes = [v.first + c for c in (7, 3, 9)]
    bos, eos = processor.text_tokenizer.bos_token_id, processor.text_tokenizer.eos_token_id
    assert sequence.ids.tolist() == [bos, *words, v.begin, *codes, v.end, eos]
    names = [Role(int(r)).name for r in sequence.roles]
    assert names == ["TEXT"] * (1 + len(words)) + ["BEGIN", *["VISUAL"] * 3, "END", "TEXT"]
    assert sequence.predict.tolist() == [False] + [True] * (len(sequence) - 1)
    for flags in (sequence.regress, sequence.prefix, sequence.is_embedding, sequence.images):
        assert not flags.any()


def test_both_orders_and_dropped_prompts():
    processor, _ = processor_and_model("llama")
    sample, text = [image(1), TextSegment("rain")], processor.text("rain")
    counts = {"image_first": 0, "text_first": 0, "dropped": 0}
    for seed in range(400):
        sequence = LaVIT(prompt_drop=0.25).layout(sample, processor, generator(seed))
        kind = "image_first" if text[0] in sequence.ids.tolist() else "dropped"
        kind = "text_first" if int(sequence.roles[1]) == Role.TEXT else kind
        counts[kind] += 1
        assert len(sequence) == 4 + len(sample[0].codes) + (0 if kind == "dropped" else len(text))
        end = bool(sequence.predict[-1])
        assert end == (kind != "dropped"), "the absence of a caption is no target"
    assert abs(counts["image_first"] - 200) < 40 and abs(counts["dropped"] - 50) < 25, counts
    image_first, text_first = LaVIT(order="image_first"), LaVIT("text_first", prompt_drop=0.0)
    assert image_first.layout(sample[::-1], processor, generator()).roles[1] == Role.BEGIN
    assert text_first.layout(sample, processor, generator()).roles[1] == Role.TEXT
    interleaved = [TextSegment("a"), image(1), TextSegment("dog"), image(2)]
    roles = LaVIT().layout(interleaved, processor, generator()).roles.tolist()
    assert [role for role, _ in itertools.groupby(roles)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_questions_are_no_targets():
    processor, _ = processor_and_model("llama")
    asked = [image(1, 3, is_target=False), TextSegment("a dog?", is_target=False)]
    sample = [*asked, TextSegment("two dogs")]
    sequence = LaVIT(order="given").layout(sample, processor, generator())
    targets = sequence.ids[sequence.predict].tolist()
    assert targets == [*processor.text("two dogs"), processor.stop]


def test_images_are_embedded_only_before_text():
    processor, _ = processor_and_model("llama")
    keep, layout = torch.tensor([True, False, True, False]), LaVIT("given", continuous=True).layout
    shown = ImageSegment(torch.tensor([3, 4]), torch.zeros(3, 8, 8, dtype=torch.uint8), keep)
    before = layout([shown, TextSegment("rain")], processor, generator())
    after = layout([TextSegment("rain"), shown], processor, generator())
    assert before.images.shape == (1, 3, 8, 8) and torch.equal(before.keep[0], keep)
    assert before.roles[before.is_embedding].tolist() == [int(Role.VISUAL)] * 2
    assert not after.is_embedding.any() and len(after.images) == 0
    ids = before.ids[before.is_embedding]
    assert torch.equal(ids, processor.vocabulary.to_ids(shown.codes)), "targets are still codes"


def test_nested_images_are_read_as_vectors():
    """Of which nothing is predicted; the drawing is in the objective's docstring."""
    processor, _ = processor_and_model("llama", stages=5)
    objective = LaVIT("given", nested_vectors=4)
    shown = replace(
        image(1, 3), image=torch.zeros(3, 8, 8, dtype=torch.uint8), keep=torch.arange(8) < 3
    )
    pair = [shown, TextSegment("a cat")]
    sequence, v = objective.layout(pair, processor, generator()), processor.vocabulary
    names = {v.begin: "<img>", v.end: "</img>", processor.stop: "</s>", processor.start[0]: "<s>"}
    words = dict(zip(processor.text("a cat"), ("a", "cat"), strict=False))
    drawn = [
        "v" if vector else (names | words).get(token, "")
        for token, vector in zip(sequence.ids.tolist(), sequence.is_embedding, strict=True)
    ]
    page = (sys.modules[LaVIT.__module__].__doc__ or "").splitlines()
    at = next(i for i, line in enumerate(page) if line.split()[:1] == ["nested_vectors"])
    assert page[at].split()[1:10] == " ".join(drawn).split()[:9]
    marks = ["x" if predicted else "." for predicted in sequence.predict[:10].tolist()]
    assert page[at + 1].split()[1:] == marks
    assert torch.equal(sequence.keep, torch.ones(1, 4) > 0) and len(sequence.images) == 1
    after = objective.layout(pair[::-1], processor, generator())
    assert (
        not after.is_embedding.any()
        and v.to_codes(after.ids[-5:-2]).tolist() == shown.codes.tolist()
    )
    without = objective.layout([replace(shown, image=None), *pair[1:]], processor, generator())
    assert v.is_code(without.ids).sum() == 3, "no pixels: read as codes"
    prompts = [objective.prompt([shown], processor, kind) for kind in ("text", "image")]
    assert [int(p.is_embedding.sum()) for p in prompts] == [4, 0]


def test_lengths_of_sequences_with_vectors():
    """Half of the sequences have vectors in place of codes, wherever a text follows the image."""
    processor, _ = processor_and_model("llama", stages=5)
    objective = LaVIT(nested_vectors=4, vector_ratio=0.5, prompt_drop=0.3)
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    one, two = (
        replace(image(i, 2 * i), image=pixels, keep=torch.arange(8) < 2 * i) for i in (1, 3)
    )
    text, counts = TextSegment("rain"), Counter()
    for sample in ([one, text], [text, one], [one, text, two], [two, one, text, text], [two]):
        lengths = [segment_length(segment, processor) for segment in sample]
        for seed in range(40):
            sequence = objective.layout(sample, processor, generator(seed))
            length = objective.sequence_length(lengths, processor, generator(seed))
            assert length == len(sequence), (sample, seed)
            counts[len(sample), int(sequence.is_embedding.sum())] += 1
    assert set(counts) == {(2, 0), (2, 4), (3, 0), (3, 4), (4, 0), (4, 8), (1, 0)}
    assert 10 < counts[4, 8] < 30


def test_examples_that_are_refused():
    processor, _ = processor_and_model("llama")
    with pytest.raises(ValueError, match="'k' has no segments"):
        LaVIT().layout([], processor, generator(), "k")
    with pytest.raises(ValueError, match="at least one code"):
        ImageSegment(torch.zeros(0, dtype=torch.int64))
    codes, pixels = torch.tensor([1, 2]), torch.zeros(3, 8, 8, dtype=torch.uint8)
    expected = "an image with 2 codes need a mask that keeps as many patches, got 1"
    with pytest.raises(ValueError, match=expected):
        ImageSegment(codes, pixels, torch.tensor([True, False]))
    with pytest.raises(VocabularyError, match=rf"0\.\.{CODES - 1}, got {CODES}"):
        LaVIT().layout([ImageSegment(torch.tensor([CODES]))], processor, generator())
    with pytest.raises(ValueError, match="prompt_drop: expected a probability"):
        LaVIT(prompt_drop=1.5)
    with pytest.raises(ValueError, match="vector_ratio: expected a probability"):
        LaVIT(vector_ratio=-0.5)
    with pytest.raises(ValueError, match="nested_vectors: expected an integer in 1"):
        LaVIT(nested_vectors=0)
    with pytest.raises(ValueError, match="got both: an image would have two kinds of vectors"):
        LaVIT(continuous=True, nested_vectors=4)
    with pytest.raises(ValueError, match="image_weight: expected a number in 0"):
        LaVIT(image_weight=-1.0)


# Packing


def test_the_drawing_of_blocks():
    a, c = plain_sequence([1, 1, 1], key="a"), plain_sequence([2, 2], key="c")
    b = plain_sequence([3, 3, 3, 3], key="b")
    assert plan_blocks([3, 2, 4], 8) == [[2, 0], [1]]
    batch = pack([[b, a], [c]], 8, 0)
    lines = [line.split() for line in (lavit_lm.sequences.packing.__doc__ or "").splitlines()]
    for name, values in (("documents", batch.documents), ("positions", batch.positions)):
        drawn = next(line[1:] for line in lines if line[:1] == [name])
        assert [int(word) for word in drawn] == values.flatten().tolist(), name
    assert batch.ids.tolist() == [[3, 3, 3, 3, 1, 1, 1, 0], [2, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.keys == (("b", "a"), ("c",)) and batch.fill == 9 / 16
    assert batch.predict.tolist()[0] == [False, True, True, True, False, True, True, False]


@pytest.mark.parametrize("block", [64, 100, 513])
def test_plans_against_the_slow_version(block: int):
    draw = random.Random(block)
    lengths = [draw.randrange(1, block + 1) for _ in range(300)]
    left, slow = list(range(300)), []
    while left:
        sequences: list[int] = []
        while True:
            free = block - sum(lengths[i] for i in sequences)
            pairs = [(i, j) for i in left for j in left if i != j and lengths[i] >= lengths[j]]
            closing = [(i,) for i in left if lengths[i] == free]
            closing = closing or [(i, j) for i, j in pairs if lengths[i] + lengths[j] == free]
            fitting = closing or [(i,) for i in left if lengths[i] <= free]
            if not fitting:
                break
            chosen = min(fitting, key=lambda indices: (-lengths[indices[0]], indices))
            sequences += chosen
            left = [i for i in left if i not in chosen]
        slow.append(sequences)
    made = plan_blocks(lengths, block)
    assert made == slow and sorted(i for b in made for i in b) == list(range(300))


def test_short_sequences_fill_blocks():
    draw = random.Random(0)
    lengths = [draw.randrange(10, 80) for _ in range(2000)]
    blocks = plan_blocks(lengths, 512)
    assert sum(lengths) / (512 * len(blocks)) >= 0.98


@pytest.mark.parametrize("count", [0, 1])
def test_the_smallest_plans(count: int):
    assert plan_blocks([5] * count, 5) == [[0]][:count]


def test_sequences_that_do_not_fit():
    with pytest.raises(ValueError, match="sequence 1: expected 1 to 4 tokens, the length of a blo"):
        plan_blocks([2, 5], 4)
    with pytest.raises(ValueError, match="got 0"):
        plan_blocks([0], 4)
    three = plain_sequence([1, 1, 1])
    with pytest.raises(ValueError, match=r"of \[3, 3\] tokens do not fit into a block of 4"):
        pack([[three, three]], 4, 0)
    with pytest.raises(ValueError, match="at least one block"):
        pack([], 4, 0)


# Masks


def test_the_drawing_of_the_mask():
    sequences = [plain_sequence([1, 2, 3, 4], prefix=2), plain_sequence([5, 6], prefix=1)]
    batch = pack([sequences], 6, 0)
    mask = attention_mask(batch.documents, batch.prefix)[0]
    lines = [line.split() for line in (lavit_lm.sequences.masks.__doc__ or "").splitlines()]
    heads = [[document, kind] for document in "01" for kind in "P."]
    drawn = [line[2:8] for line in lines if line[:2] in heads]
    assert len(drawn) == 6
    assert [["x" if flag else "." for flag in line] for line in mask.tolist()] == drawn


@pytest.mark.parametrize("length", [0, 1])
def test_the_smallest_masks(length: int):
    mask = attention_mask(torch.zeros(1, length, dtype=torch.int64))
    assert mask.shape == (1, length, length) and mask.all()


def mask_of(model: Any, batch: PackedBatch) -> torch.Tensor | None:
    return model_mask(model.causal, batch.documents, batch.prefix, torch.float32)


def test_masks_of_kernels():
    _, model = processor_and_model("llama")
    config = model.causal.config
    batch = pack([[plain_sequence([1, 2]), plain_sequence([3])]], 4, 0)
    prefixed = pack([[plain_sequence([1, 2, 3], prefix=2)]], 4, 0)
    as_bool, both_ways = mask_of(model, batch), mask_of(model, prefixed)
    assert as_bool is not None and as_bool.dtype == torch.bool
    assert batch.documents[0, 3] == PADDING and as_bool[0, 0, 3].tolist() == [False] * 3 + [True]
    assert both_ways is not None and both_ways[0, 0, 0].tolist() == [True, True, False, False]
    model.causal.set_attn_implementation("eager")
    added = mask_of(model, batch)
    assert added is not None and torch.equal(added == 0, as_bool)
    config._attn_implementation = "flash_attention_2"
    assert mask_of(model, batch) is None
    with pytest.raises(ValueError, match="causal only"):
        mask_of(model, prefixed)
    config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="expected 'sdpa', 'eager' or a flash kernel"):
        mask_of(model, batch)


def test_a_sliding_window_is_not_switched_off_silently():
    _, model = processor_and_model("mistral")
    batch = pack([[plain_sequence([1, 2, 3, 4, 5])]], 8, 0)
    model.causal.config.sliding_window = 4
    with pytest.raises(ValueError, match="sliding window of 4"):
        mask_of(model, batch)
    model.causal.config.sliding_window = 8
    assert mask_of(model, batch) is not None, "a window as long as the block hides nothing"


# PackedBatch equals unpacked, in every family


def laid_out(processor: MultimodalProcessor, count: int) -> list[TokenSequence]:
    samples = enumerate(pairs(count))
    return [LaVIT().layout(s, processor, generator(i), str(i)) for i, s in samples]


def sums_of(model: Any, batch: PackedBatch) -> dict[str, tuple[float, int]]:
    with torch.no_grad():
        found = losses_of(model, LaVIT(), batch)
    return {name: (float(s.total), int(s.count)) for name, s in found.items()}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_equals_unpacked(family: str, kernel: str):
    processor, model = processor_and_model(family, kernel)
    sequences = laid_out(processor, 12)
    blocks = plan_blocks([len(one) for one in sequences], 64)
    assert len(blocks) < len(sequences) / 2
    packed = sums_of(model, pack([[sequences[i] for i in b] for b in blocks], 64, processor.pad))
    alone = [sums_of(model, pad([sequence], processor.pad)) for sequence in sequences]
    for name, (total, count) in packed.items():
        assert count == sum(one[name][1] for one in alone) > 0
        assert abs(total - sum(one[name][0] for one in alone)) / count < 1e-5, name
    # what the library predicts of one sequence, without any mask or position of ours
    sequence = sequences[0]
    with torch.no_grad():
        logits = model.causal(sequence.ids[None]).logits[0, :-1].float()
    want = torch.nn.functional.cross_entropy(logits, sequence.ids[1:], reduction="sum")
    assert abs(float(want) - sum(total for total, _ in alone[0].values())) < 1e-3


def test_without_the_mask_documents_leak(monkeypatch: pytest.MonkeyPatch):
    """The test above can fail: a causal mask over the whole block gives another loss."""
    processor, model = processor_and_model("llama")
    sequences = laid_out(processor, 4)
    batch = pack([sequences], sum(map(len, sequences)), processor.pad)
    right = sums_of(model, batch)
    whole = lambda documents, prefix=None: attention_mask(torch.zeros_like(documents))  # noqa: E731
    monkeypatch.setattr("lavit_lm.sequences.masks.attention_mask", whole)
    wrong = sums_of(model, batch)
    assert abs(right["text"][0] - wrong["text"][0]) / right["text"][1] > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_gradient_from_later_positions_or_other_documents(family: str):
    processor, model = processor_and_model(family)
    sequences = laid_out(processor, 3)
    batch = pack([sequences], sum(map(len, sequences)) + 2, processor.pad)
    inputs: list[torch.Tensor] = []
    model.causal.get_input_embeddings().register_forward_hook(
        lambda module, args, out: inputs.append(out.detach().requires_grad_()) or inputs[-1]  # type: ignore[func-returns-value]
    )
    states = model(batch).hidden_states
    before, at = shift_targets(batch, batch.predict)
    direction = torch.randn(states.shape[2], generator=generator())  # a LayerNorm's sum is constant
    for source, target in zip(before.tolist(), at.tolist(), strict=True):
        (slope,) = torch.autograd.grad(states[0, source] @ direction, inputs[0], retain_graph=True)
        reached = slope[0].abs().sum(1) > 0
        document = batch.documents[0] == batch.documents[0, target]
        assert not reached[target:].any(), "the target, or what follows it, reaches its prediction"
        assert not (reached & ~document).any() and reached[source]


def test_a_first_position_is_never_a_target():
    batch = pack([[plain_sequence([1, 2]), plain_sequence([3, 4])]], 4, 0)
    assert shift_targets(batch, batch.predict)[1].tolist() == [1, 3]
    wrong = batch.predict.clone()
    wrong[0, 2] = True
    with pytest.raises(ValueError, match="first position of a document is marked"):
        shift_targets(batch, wrong)


def test_log_likelihood_of_each_sequence():
    processor, model = processor_and_model("llama")
    sequences = laid_out(processor, 3)
    with torch.no_grad():
        together = pad(sequences, processor.pad)
        found = log_likelihood(model(together), together)
        for sequence, value in zip(sequences, found.tolist(), strict=True):
            log_p = model.causal(sequence.ids[None]).logits[0].float().log_softmax(-1)
            want = sum(float(log_p[i - 1, sequence.ids[i]]) for i in range(1, len(sequence)))
            assert abs(value - want) < 1e-3


def test_weights_of_modalities():
    processor, model = processor_and_model("llama")
    losses = losses_of(model, LaVIT(), pad(laid_out(processor, 3), processor.pad))
    text, image_sum = losses["text"], losses["image"]
    every = LaVIT().total(losses)
    assert torch.isclose(every, (text.total + image_sum.total) / (text.count + image_sum.count))
    assert torch.isclose(LaVIT(image_weight=0.0).total(losses), text.mean)
    assert (every - LaVIT(image_weight=3.0).total(losses)).abs() > 1e-4
