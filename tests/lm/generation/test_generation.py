"""The one loop of lavit_lm: against a slow loop, cached or not, alone or together, guided, and what it may not say."""

from __future__ import annotations

import pytest
import torch
from helpers.lm_parts import CODES, image, processor_and_model
from helpers.small_lms import FAMILIES

from lavit_lm.generation.sampling import GenerationConstraint, Sampling, generate_ids
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.sequences.segments import Role, SequenceBuilder, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

LENGTHS = [1, 4, 7]


def prompts(processor: MultimodalProcessor, opened: bool = True) -> list[TokenSequence]:
    """Of unequal lengths; the last one has an image in it."""
    words = processor.text("a red apple on a wooden table")
    found = []
    for number, length in enumerate(LENGTHS):
        builder = SequenceBuilder().add([*processor.start, *words[:length]], Role.TEXT)
        if number == len(LENGTHS) - 1:
            builder.add(
                [
                    processor.vocabulary.begin,
                    *processor.codes(image(1, 3).codes),
                    processor.vocabulary.end,
                ],
                Role.TEXT,
            )
        if opened:
            builder.add([processor.vocabulary.begin], Role.BEGIN)
        found.append(builder.row())
    return found


def free(processor: MultimodalProcessor) -> TokenSequence:
    return SequenceBuilder().add([*processor.start, processor.vocabulary.begin], Role.BEGIN).row()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@torch.no_grad()
def slow(
    processor: MultimodalProcessor,
    model: SequenceModel,
    prompt: TokenSequence,
    rule: GenerationConstraint,
    sampling: Sampling,
    generator: torch.Generator,
) -> list[int]:
    """One prompt, everything computed anew for each id, by the library's own forward."""
    said: list[int] = []
    while not said or (
        said[-1] not in rule.stops(processor) and len(said) < rule.most + (rule.kind == "image")
    ):

        def logits_after(row: TokenSequence) -> torch.Tensor:
            return (
                model.causal(torch.cat([row.ids, torch.tensor(said, dtype=torch.int64)])[None])
                .logits[0, -1]
                .float()
            )

        logits = logits_after(prompt)
        if sampling.guidance_scale != 1:
            u = logits_after(free(processor))
            logits = u + sampling.guidance_scale * (logits - u)
        v = processor.vocabulary
        for i in range(len(logits)):
            code, stop = v.first <= i < v.first + CODES, i in rule.stops(processor)
            if rule.kind == "image":
                fine = (code and len(said) < rule.most) or (stop and len(said) >= rule.least)
            else:
                word = i < v.begin and i not in processor.text_tokenizer.all_special_ids
                fine = word or (stop and len(said) >= rule.least)
            if not fine:
                logits[i] = -torch.inf
        said.append(int(sampling.draw(logits[None], [generator])[0]))
    return said


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(top_k=5), Sampling(2.0, top_p=0.9, guidance_scale=2.5)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_equal_the_slow_loop(family: str, sampling: Sampling):
    processor, model = processor_and_model(family)
    rows, rule = prompts(processor), GenerationConstraint("image", 2, 6)
    want = [
        slow(processor, model, row, rule, sampling, g)
        for row, g in zip(rows, generators(3), strict=True)
    ]
    for cached in (True, False):
        found = generate_ids(
            model, processor, rows, rule, sampling, [free(processor)] * 3, generators(3), cached
        )
        assert found == want, f"cached={cached}"
    alone = [
        generate_ids(
            model, processor, [rows[i]], rule, sampling, [free(processor)], [generators(3)[i]]
        )[0]
        for i in range(3)
    ]
    assert alone == want, "neighbours in the batch, and the padding that they bring, change nothing"


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_texts_equal_the_slow_loop(kind: str):
    processor, model = processor_and_model("llama")
    rows, rule, sampling = (
        prompts(processor, opened=False),
        GenerationConstraint(kind, 0, 12),
        Sampling(1.5),
    )  # type: ignore[arg-type]
    want = [
        slow(processor, model, row, rule, sampling, g)
        for row, g in zip(rows, generators(3), strict=True)
    ]
    assert generate_ids(model, processor, rows, rule, sampling, None, generators(3)) == want


def test_images_hold_codes_and_end():
    processor, model = processor_and_model("llama")
    v = processor.vocabulary
    for least, most in ((1, 1), (3, 3), (2, 9)):
        said = generate_ids(
            model,
            processor,
            prompts(processor) * 10,
            GenerationConstraint("image", least, most),
            Sampling(3.0),
            None,
            generators(30),
        )
        for ids in said:
            assert ids[-1] == v.end and least <= len(ids) - 1 <= most
            v.to_codes(torch.tensor(ids[:-1]))
    assert len({len(ids) for ids in said}) > 1, "lengths are the model's own"


def test_text_never_becomes_an_image():
    processor, model = processor_and_model("llama")
    v = processor.vocabulary
    said = generate_ids(
        model,
        processor,
        prompts(processor, False) * 10,
        GenerationConstraint("text", 0, 20),
        Sampling(5.0),
        None,
        generators(30),
    )
    assert not v.is_visual(torch.tensor([i for ids in said for i in ids])).any()
    mixed = generate_ids(
        model,
        processor,
        prompts(processor, False) * 10,
        GenerationConstraint("mixed", 0, 60),
        Sampling(5.0),
        None,
        generators(30),
    )
    assert any(ids[-1] == v.begin for ids in mixed), "an image may begin"
    assert not any(v.is_visual(torch.tensor(ids[:-1])).any() for ids in mixed if len(ids) > 1)


def test_guidance_of_one_is_the_conditional_stream():
    processor, model = processor_and_model("llama")
    rows, rule = prompts(processor), GenerationConstraint("image", 1, 8)
    plain = generate_ids(model, processor, rows, rule, Sampling(), None, generators(3))
    assert (
        generate_ids(
            model,
            processor,
            rows,
            rule,
            Sampling(guidance_scale=1.0),
            [free(processor)] * 3,
            generators(3),
        )
        == plain
    )
    strong = generate_ids(
        model,
        processor,
        rows,
        rule,
        Sampling(guidance_scale=9.0),
        [free(processor)] * 3,
        generators(3),
    )
    assert strong != plain
    same = [
        free(processor)
    ] * 3  # a prompt that is the unconditional stream itself: the scale makes no difference
    assert generate_ids(
        model, processor, same, rule, Sampling(guidance_scale=9.0), same, generators(3)
    ) == generate_ids(model, processor, same, rule, Sampling(), None, generators(3))


def test_one_generator_seeds_every_row():
    processor, model = processor_and_model("llama")
    rows, rule = [free(processor)] * 6, GenerationConstraint("image", 1, 8)
    made = [
        generate_ids(
            model, processor, rows, rule, Sampling(), None, torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]
    assert len({tuple(ids) for ids in made[0]}) > 1, (
        "equal prompts in one batch get draws of their own"
    )


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    for sampling, want in (
        (Sampling(), logits[0].softmax(0)),
        (Sampling(2.0), (logits[0] / 2).softmax(0)),
        (Sampling(top_k=2), torch.cat([logits[0, :2].softmax(0), torch.zeros(2)])),
        (
            Sampling(top_p=0.7),
            torch.cat([logits[0, :2].softmax(0), torch.zeros(2)]),
        ),  # 0.64 is not enough
        (Sampling(top_p=0.5), torch.tensor([1.0, 0, 0, 0])),
    ):
        drawn = sampling.draw(logits.expand(4000, 4), [generator] * 4000)
        found = drawn.bincount(minlength=4) / 4000
        assert (found - want).abs().max() < 0.025, sampling
        assert not found[want == 0].any()
    assert Sampling(0.0).draw(logits, [None]).tolist() == [0]
    forbidden = logits.masked_fill(torch.tensor([[True, False, True, True]]), -torch.inf)
    assert Sampling(top_k=3).draw(forbidden.expand(50, 4), [generator] * 50).unique().tolist() == [
        1
    ]


def test_impossible_requests():
    processor, model = processor_and_model("llama")
    rows = prompts(processor)
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_ids(model, processor, [], GenerationConstraint("text"))
    with pytest.raises(ValueError, match="unconditional row for each prompt"):
        generate_ids(
            model, processor, rows, GenerationConstraint("image"), Sampling(guidance_scale=2.0)
        )
    with pytest.raises(ValueError, match=r"up to 500 exceed the model's context of 128"):
        generate_ids(model, processor, rows, GenerationConstraint("text", 0, 500))
    with pytest.raises(ValueError, match="a prompt of no places"):
        generate_ids(model, processor, [SequenceBuilder().row()], GenerationConstraint("text"))
    with pytest.raises(ValueError, match="one for each of 3 rows, got 2"):
        generate_ids(
            model, processor, rows, GenerationConstraint("text"), Sampling(), None, generators(2)
        )
    for settings, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 <= least <= most"):
        GenerationConstraint("image", 3, 2)
