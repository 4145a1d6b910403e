"""generate_ids against a slow loop: cached or not, batched or not, guided and constrained."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.lm_parts import image, processor_and_model
from helpers.small_lms import FAMILIES, small_lm
from peft import LoraConfig, get_peft_model

from lavit_lm.generation.sampling import (
    GenerationConstraint,
    Sampling,
    generate_ids,
    sequence_generators,
)
from lavit_lm.models.fused_decoder import FusedDecodingState, fits, fused_decoder
from lavit_lm.models.kv_state import cache_argument
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.token_sequence import Role, SequenceBuilder, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

LENGTHS = [1, 4, 7]
GUIDED = Sampling(2.0, top_p=0.9, guidance_scale=2.5)


def prompts(processor: MultimodalProcessor, in_image: bool = True) -> list[TokenSequence]:
    """Of unequal lengths; the last contains an image."""
    text = processor.text("a red apple on a wooden table")
    v, codes = processor.vocabulary, processor.codes(image(1, 3).codes)
    built = []
    for number, length in enumerate(LENGTHS):
        builder = SequenceBuilder().add([*processor.start, *text[:length]], Role.TEXT)
        if number == len(LENGTHS) - 1:
            builder.add([v.begin, *codes, v.end], Role.TEXT)
        if in_image:
            builder.add([v.begin], Role.BEGIN)
        built.append(builder.build())
    return built


def unconditional(processor: MultimodalProcessor) -> TokenSequence:
    return SequenceBuilder().add([*processor.start, processor.vocabulary.begin], Role.BEGIN).build()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@torch.no_grad()
def slow(
    processor: MultimodalProcessor,
    model: SequenceModel,
    prompt: TokenSequence,
    constraint: GenerationConstraint,
    sampling: Sampling,
    generator: torch.Generator,
) -> list[int]:
    """One prompt, all positions computed at every step by the LM's own forward."""
    generated: list[int] = []
    v, least, most = processor.vocabulary, constraint.min_new_tokens, constraint.max_new_tokens
    special, stops = processor.text_tokenizer.all_special_ids, constraint.stop_ids(processor)
    is_image = constraint.kind == "image"

    def logits_after(sequence: TokenSequence) -> torch.Tensor:
        ids = torch.cat([sequence.ids, torch.tensor(generated, dtype=torch.int64)])
        return model.causal(ids[None]).logits[0, -1].float()

    while not generated or (generated[-1] not in stops and len(generated) < most + is_image):
        logits = logits_after(prompt)
        first, stop = sampling.guidance_interval or (0, most + 1)
        if sampling.guidance_scale != 1 and first <= len(generated) < stop:
            u = logits_after(unconditional(processor))
            logits = u + sampling.guidance_scale * (logits - u)
        for i in range(len(logits)):
            if is_image and len(generated) < most:
                stage = v.rank_stages[len(generated)] if v.stages else 0
                allowed = i in v.stage_ids(int(stage))
            elif is_image:
                allowed = False
            else:
                allowed = i < v.begin and i not in special
            if not (allowed or (i in stops and len(generated) >= least)):
                logits[i] = -torch.inf
        generated.append(int(sampling.draw(logits[None], [generator])[0]))
    return generated


INTERVALS = [replace(GUIDED, guidance_interval=interval) for interval in ((0, 3), (1, 4), (0, 0))]


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(top_k=5), GUIDED, *INTERVALS])
@pytest.mark.parametrize("family", [*FAMILIES, "phi", "nested qwen3"])
def test_images_equal_the_slow_loop(family: str, sampling: Sampling):
    """Some images end before others; nested codes have other ids at every rank."""
    *nested, family = family.split()
    processor, model = processor_and_model(family, stages=5 if nested else 0)
    given, constraint = prompts(processor), GenerationConstraint("image", 2, 6)
    fused = isinstance(model.start_decoding(given, processor.pad, 6), FusedDecodingState)
    assert fused == (family in ("llama", "qwen2", "qwen3", "mistral"))
    free = unconditional(processor)
    expected = [
        slow(processor, model, prompt, constraint, sampling, g)
        for prompt, g in zip(given, generators(3), strict=True)
    ]
    shared = model, processor
    for use_cache in (True, False):
        options = constraint, sampling, [free] * 3, generators(3), use_cache
        assert generate_ids(*shared, given, *options) == expected, f"use_cache={use_cache}"
    alone = [
        generate_ids(*shared, [given[i]], constraint, sampling, [free], [generators(3)[i]])[0]
        for i in range(3)
    ]
    assert alone == expected, "the rest of the batch, and its padding, change nothing"


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_texts_equal_the_slow_loop(kind: Any):
    processor, model = processor_and_model("llama")
    given, sampling = prompts(processor, in_image=False), Sampling(1.5)
    constraint = GenerationConstraint(kind, 0, 12)
    expected = [
        slow(processor, model, prompt, constraint, sampling, g)
        for prompt, g in zip(given, generators(3), strict=True)
    ]
    found = generate_ids(model, processor, given, constraint, sampling, None, generators(3))
    assert found == expected


def hidden_states(model: SequenceModel, sequences: list[TokenSequence], fused: bool) -> Any:
    """After the prompts, after an id, and after other two sequences have got one more."""
    state = model.start_decoding(sequences, 0, 4, use_cache=fused)
    assert isinstance(state, FusedDecodingState) == fused
    found = [state.prefill(), state.append_ids(torch.arange(len(sequences)) + 3)]
    state.reorder(torch.tensor([2, 2, 0]))
    found.append(state.append_embeddings(found[-1][[2, 2, 0]]))
    return found, state.logits(found[-1], torch.tensor([0, 4, 7, 20]))


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}, {"attention_bias": True}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_hidden_states_are_those_of_the_lm(family: str, more: dict[str, Any]):
    """Also with prefixes, biases, and as many heads of keys as of queries."""
    processor, _ = processor_and_model(family)
    if family in ("qwen2", "mistral"):  # their biases are fixed
        more = {name: value for name, value in more.items() if name != "attention_bias"}
    lm = small_lm(family, processor.vocabulary.stop, **more)
    for name, parameter in lm.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    model, given = SequenceModel(lm).eval(), prompts(processor)
    prefixes = [replace(one, prefix=torch.arange(len(one)) < 2) for one in given]
    for sequences in (given, prefixes, [given[1]] * 3):
        fast, slow_ones = (hidden_states(model, sequences, fused) for fused in (True, False))
        for a, b in zip(fast[0], slow_ones[0], strict=True):
            assert torch.allclose(a, b, atol=2e-5)
        assert torch.allclose(fast[1], slow_ones[1], atol=2e-5)


@torch.no_grad()
def test_copies_of_weights_are_made_anew_when_these_change():
    processor, model = processor_and_model("llama")
    given, lm = prompts(processor), model.causal
    before = model.start_decoding(given, 0, 1).prefill()
    assert fused_decoder(lm, 20) is fused_decoder(lm, 20)
    lm.base_model.layers[0].mlp.up_proj.weight[0] += 1
    lm.get_output_embeddings().weight[3] += 1
    state = model.start_decoding(given, 0, 1)
    after = state.prefill()
    assert not torch.allclose(before, after, atol=1e-3)
    ids = torch.tensor([2, 3])
    assert torch.allclose(state.logits(after, ids), model.head(after)[:, ids], atol=1e-5)


def test_models_that_are_not_fused():
    _, model = processor_and_model("llama")
    lm = model.causal
    assert fits(lm, 128)
    assert not fits(lm.train(), 128)
    assert not fits(lm.eval().double(), 128)
    hook = lm.float().base_model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not fits(lm, 128), "a hook may change what a layer computes"
    hook.remove()
    assert fits(lm, 128)
    assert not fits(small_lm("mistral", 300, sliding_window=8), 9)
    assert fits(small_lm("mistral", 300, sliding_window=8), 8)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not fits(small_lm("llama", 300, rope_parameters=rope), 8)
    adapted = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    assert not fits(adapted.get_base_model(), 128)


def test_only_allowed_ids_are_generated():
    processor, model = processor_and_model("llama")
    v = processor.vocabulary

    def generate(*constraint: Any, temperature: float = 5.0) -> list[list[int]]:
        given = prompts(processor, constraint[0] == "image") * 10
        rule, sampling = GenerationConstraint(*constraint), Sampling(temperature)
        return generate_ids(model, processor, given, rule, sampling, None, generators(30))

    for least, most in ((1, 1), (3, 3), (2, 9)):
        images = generate("image", least, most, temperature=3.0)
        for ids in images:
            assert ids[-1] == v.end and least <= len(ids) - 1 <= most
            v.to_codes(torch.tensor(ids[:-1]))
    assert len({len(ids) for ids in images}) > 1, "the model chooses the lengths"
    texts = generate("text", 0, 20)
    assert not v.is_visual(torch.tensor([i for ids in texts for i in ids])).any()
    mixed = generate("mixed", 0, 60)
    assert any(ids[-1] == v.begin for ids in mixed), "an image may begin"
    assert not any(v.is_visual(torch.tensor(ids[:-1])).any() for ids in mixed if len(ids) > 1)


def test_guidance_of_one_is_the_conditional_sequence():
    processor, model = processor_and_model("llama")
    free, constraint = [unconditional(processor)] * 3, GenerationConstraint("image", 1, 8)

    def generate(given: list[TokenSequence], scale: float) -> list[list[int]]:
        sampling = Sampling(guidance_scale=scale)
        return generate_ids(model, processor, given, constraint, sampling, free, generators(3))

    plain = generate(prompts(processor), 1.0)
    no_guidance = generate_ids(
        model, processor, prompts(processor), constraint, Sampling(), None, generators(3)
    )
    assert no_guidance == plain != generate(prompts(processor), 9.0)
    assert generate(free, 9.0) == generate(free, 1.0), "of two equal sequences the scale is nothing"


def test_one_generator_seeds_every_sequence():
    processor, model = processor_and_model("llama")
    given, constraint = [unconditional(processor)] * 6, GenerationConstraint("image", 1, 8)
    found = [
        generate_ids(model, processor, given, constraint, Sampling(), None, g)
        for g in (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]
    assert len({tuple(ids) for ids in found[0]}) > 1, "equal prompts in one batch differ"


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    for sampling, want in (
        (Sampling(), logits[0].softmax(0)),
        (Sampling(2.0), (logits[0] / 2).softmax(0)),
        (Sampling(top_k=2), torch.cat([logits[0, :2].softmax(0), torch.zeros(2)])),
        # The first id has probability 0.64, which is less than 0.7.
        (Sampling(top_p=0.7), torch.cat([logits[0, :2].softmax(0), torch.zeros(2)])),
        (Sampling(top_p=0.5), torch.tensor([1.0, 0, 0, 0])),
    ):
        drawn = sampling.draw(logits.expand(4000, 4), [generator] * 4000)
        found = drawn.bincount(minlength=4) / 4000
        assert (found - want).abs().max() < 0.025, sampling
        assert not found[want == 0].any()
    assert Sampling(0.0).draw(logits, [None]).tolist() == [0]
    forbidden = logits.masked_fill(torch.tensor([[True, False, True, True]]), -torch.inf)
    ids = Sampling(top_k=3).draw(forbidden.expand(50, 4), [generator] * 50)
    assert ids.unique().tolist() == [1]


def test_equal_prompts_share_a_prefill_and_finished_sequences_leave(monkeypatch: Any):
    """The ids are those of copies of the prompt, and of each sequence alone."""
    processor, model = processor_and_model()
    first, *_, last = prompts(processor)
    free = prompts(processor)[0]
    rows: list[int] = []
    start = model.start_decoding
    monkeypatch.setattr(
        model,
        "start_decoding",
        lambda sequences, *rest: rows.append(len(sequences)) or start(sequences, *rest),
    )

    def generate(sequences: list[TokenSequence], seeds: range, unconditional: Any) -> Any:
        constraint = GenerationConstraint("image", 1, 30)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shared = model, processor, sequences, constraint, GUIDED
        return generate_ids(*shared, unconditional, generators)

    shared = generate([first, first, last, first, last], range(5), [free] * 5)
    copies = [replace(one) for one in (first, first, last, first, last)]
    apart = generate(copies, range(5), [replace(free) for _ in copies])
    alone = [generate([copies[i]], range(i, i + 1), [free])[0] for i in range(len(copies))]
    assert shared == apart == alone and rows[:2] == [3, 10]
    lengths = sorted(map(len, shared))
    assert lengths[0] < lengths[-1], "one ends before the others"


def test_what_ids_are_drawn_from(unchecked: None):
    for generator, got in ((4, "4"), ([generators(1), 4], "2"), ("ab", "2")):
        with pytest.raises(ValueError, match=f"one for each of 2 sequences, got {got}"):
            sequence_generators(generator, 2)


def test_impossible_requests(unchecked: None):
    processor, model = processor_and_model("llama")
    given, text = prompts(processor), GenerationConstraint("text")
    guided, empty = Sampling(guidance_scale=2.0), [SequenceBuilder().build()]
    for message, *arguments in (
        ("at least one prompt", [], text),
        ("an unconditional sequence for each prompt", given, GenerationConstraint("image"), guided),
        ("exceed the model's context of 128", given, GenerationConstraint("text", 0, 500)),
        ("prompt", empty, text),
        ("one for each of 3 sequences, got 2", given, text, Sampling(), None, generators(2)),
    ):
        with pytest.raises(ValueError, match=message):
            generate_ids(model, processor, *arguments)
    for interval in ((2, 1), (0,), (0.5, 1), 3):
        with pytest.raises(ValueError, match="guidance_interval: expected two integers"):
            Sampling(guidance_interval=interval)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 <= min_new_tokens <= max_new_tokens .* got 3 and 2"):
        GenerationConstraint("image", 3, 2)


def test_the_cache_has_the_name_that_a_model_gives_it() -> None:
    class Newer(torch.nn.Module):
        """As the models of transformers 5.24."""

        def forward(self, cache: Any = None) -> None: ...

    _, model = processor_and_model()
    name = next(iter(cache_argument(model.causal.base_model, None)))
    assert name in inspect.signature(model.causal.base_model.forward).parameters
    assert cache_argument(Newer(), 1) == {"cache": 1}
