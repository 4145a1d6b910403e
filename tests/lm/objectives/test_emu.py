"""Emu: what is laid out and predicted, that nothing leaks, exactly N vectors, and what a user can
ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.emu_parts import EMU, N, built, image
from helpers.lm_parts import losses as losses_of
from helpers.lm_parts import processor_and_model
from helpers.lm_runs import SMALL, Losses, data, module, trainer
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.generation.interleaved import generate_interleaved
from lavit_lm.models.losses import LossSum, ModelOutput, cross_entropy, regression, shift_targets
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives import by_name
from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.sequences.documents import as_segments, clip
from lavit_lm.sequences.packing import PADDING, PackedBatch, pack, pad
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.vision.resampler import CausalResampler
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualCodes, VisualTokenizer

FAMILIES = ["llama", "qwen2", "gpt2"]


def sequence(
    processor: MultimodalProcessor, sample: Sequence[Segment], objective: Emu = EMU, key: str = ""
) -> TokenSequence:
    return objective.layout(sample, processor, torch.Generator().manual_seed(0), key)


def mixed() -> list[list[Segment]]:
    """Rows with 0, 1 and 2 images, of different lengths."""
    return [
        [TextSegment("rain")],
        [image(0), TextSegment("two dogs run along the beach")],
        [TextSegment("a red apple"), image(1), TextSegment("and"), image(2)],
    ]


def test_the_drawing(tiny_tokenizer: VisualTokenizer):
    processor, _ = built(tiny_tokenizer)
    made = sequence(processor, [image(0), TextSegment("a table")], replace(EMU, queries=2))
    v, words = processor.vocabulary, processor.text("a table")
    assert made.ids.tolist() == [
        *processor.start,
        v.begin,
        processor.pad,
        processor.pad,
        v.end,
        *words,
        processor.stop,
    ]
    roles = [
        Role.TEXT,
        Role.BEGIN,
        Role.VISUAL,
        Role.VISUAL,
        Role.END,
        *[Role.TEXT] * (len(words) + 1),
    ]
    assert made.roles.tolist() == [int(role) for role in roles]
    marks = {"is_embedding": "..xx.", "predict": ".....", "regress": "..xxx"}
    after = {"is_embedding": ".", "predict": "x", "regress": "."}
    for name, drawn in marks.items():
        wanted = drawn + after[name] * (len(words) + 1)
        assert "".join("x" if flag else "." for flag in getattr(made, name).tolist()) == wanted, (
            name
        )
    assert not made.prefix.any() and len(made.image_segments) == 1 and made.keep.numel() == 0


def test_pairs_come_in_both_orders(tiny_tokenizer: VisualTokenizer):
    processor, _ = built(tiny_tokenizer)
    orders = {
        name: {
            int(
                Emu(name, queries=2)
                .layout(sample, processor, torch.Generator().manual_seed(s))
                .roles[1]
            )
            for s in range(16)
            for sample in ([image(0), TextSegment("rain")], [TextSegment("rain"), image(0)])
        }
        for name in ("both", "image_first", "text_first")
    }
    assert orders == {
        "both": {0, 1},
        "image_first": {int(Role.BEGIN)},
        "text_first": {int(Role.TEXT)},
    }
    question = sequence(
        processor,
        [
            replace(image(0), is_target=False),
            TextSegment("what?", is_target=False),
            TextSegment("rain"),
        ],
    )
    generated = question.ids[question.predict].tolist()
    assert generated == [*processor.text("rain"), processor.stop] and not question.regress.any()


def test_emu_01_vectors_are_causal(tiny_tokenizer: VisualTokenizer):
    """Another query i changes no vector before it, to the bit, and does change those from it on."""
    _, model = built(tiny_tokenizer, objective=replace(EMU, queries=5))
    bridge: Any = model.bridge
    images = torch.stack([image(i).image for i in range(3)])  # type: ignore[misc]
    none = torch.zeros(0, 0, dtype=torch.bool)
    with torch.no_grad():
        before = bridge(images, none).view(3, 5, -1)
        assert before.shape == (3, 5, 16)
        for i in range(5):
            keep = bridge.queries[i].clone()
            bridge.queries[i] += torch.linspace(-1, 1, 32)
            after = bridge(images, none).view(3, 5, -1)
            bridge.queries[i] = keep
            assert torch.equal(after[:, :i], before[:, :i])
            assert ((after - before)[:, i:].abs().amax(-1) > 1e-4).all()
        assert (before[0] - before[1]).abs().max() > 1e-3, "pictures differ"
        narrow = CausalResampler(tiny_tokenizer, 16, 4, 1, 2, hidden_size=8)
        assert narrow(images, none).shape == (12, 16)
    with pytest.raises(
        ValueError,
        match="heads that divide the hidden size, got 4 queries, 1 blocks, 3 heads",
    ):
        CausalResampler(tiny_tokenizer, 16, 4, 1, 3)


def test_emu_02_regression_terms(tiny_tokenizer: VisualTokenizer):
    """(N + 1) a image, in packed sequences."""
    processor, model = built(tiny_tokenizer)
    batch = pack(
        [[sequence(processor, s) for s in mixed()], [sequence(processor, mixed()[2])]],
        64,
        processor.pad,
    )
    before, at = shift_targets(batch, batch.regress)
    roles = batch.roles.flatten()
    assert len(at) == (N + 1) * 5
    assert set(roles[before].tolist()) == {int(Role.BEGIN), int(Role.VISUAL)}
    assert set(roles[at].tolist()) == {int(Role.VISUAL), int(Role.END)}
    assert (roles[before] == Role.BEGIN).sum() == (roles[at] == Role.END).sum() == 5
    assert EMU.losses(model(batch), batch)["vectors"].count == (N + 1) * 5


def test_emu_03_target_is_next_input(tiny_tokenizer: VisualTokenizer):
    """To the bit, and without a gradient: the loss, remade by a plain loop, moves the model by its
    sources alone.
    """
    processor, model = built(tiny_tokenizer)
    batch = pad([sequence(processor, s) for s in mixed()], processor.pad)
    output = model(batch)
    vectors = model.bridge(batch.images, batch.keep)  # type: ignore[misc]
    assert torch.equal(output.inputs_embeds[batch.is_embedding], vectors)
    end = model.causal.get_input_embeddings().weight[processor.vocabulary.end]
    assert torch.equal(output.inputs_embeds[batch.roles == Role.END], end.expand(3, -1))
    assert output.regressor is not None
    total = torch.zeros(())
    for b, i in batch.regress.nonzero().tolist():
        total = (
            total
            + (
                output.regressor(output.hidden_states[b, i - 1])
                - output.inputs_embeds[b, i].detach()
            )
            .square()
            .mean()
        )
    found = regression(output, batch)["vectors"]
    torch.testing.assert_close(found.total, total, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(total, output.inputs_embeds, retain_graph=True)[0]
    got = torch.autograd.grad(found.total, output.inputs_embeds, retain_graph=True)[0]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    # "spread" is the standard deviation of a dimension, from two targets on.
    for kept in (2, 1):
        flags = torch.zeros_like(batch.regress)
        for b, i in batch.regress.nonzero()[:kept].tolist():
            flags[b, i] = True
        spread = regression(output, replace(batch, regress=flags))["spread"]
        wanted_std = output.inputs_embeds[flags].std(0).mean() if kept > 1 else torch.zeros(())
        torch.testing.assert_close(spread.mean, wanted_std)
    states = output.hidden_states.detach()
    only_targets = regression(replace(output, hidden_states=states, regressor=lambda x: x), batch)[
        "vectors"
    ].total
    assert not only_targets.requires_grad, "a target needs no gradient"


def test_emu_04_what_has_cross_entropy(tiny_tokenizer: VisualTokenizer):
    processor, model = built(tiny_tokenizer)
    batch = pack([[sequence(processor, s) for s in mixed()]], 64, processor.pad)
    before, at = shift_targets(batch, batch.predict)
    assert (batch.documents.flatten()[at] != PADDING).all()
    assert (batch.roles.flatten()[at] == Role.TEXT).all()
    v = processor.vocabulary
    assert not torch.isin(batch.ids.flatten()[at], torch.tensor([v.begin, v.end])).any()
    after_pictures = (batch.roles.flatten()[before] == Role.END).sum()
    assert after_pictures == 3, "the first id after each picture is predicted from its end"
    texts = sum(
        len(sequence(processor, s)) - 1 - (N + 2) * sum(isinstance(p, ImageSegment) for p in s)
        for s in mixed()
    )
    assert len(at) == texts == EMU.losses(model(batch), batch)["text"].count
    assert cross_entropy(model(batch), batch)["image"].count == 0


def test_emu_05_no_gradient_from_targets(tiny_tokenizer: VisualTokenizer):
    """Of each single term, words and vectors, with respect to what the LM is embedded."""
    processor, model = built(tiny_tokenizer)
    batch = pack([[sequence(processor, s) for s in mixed()[1:]]], 64, processor.pad)
    inputs = model(batch).inputs_embeds.detach().requires_grad_(True)
    for flag, losses in ((batch.predict, cross_entropy), (batch.regress, regression)):
        name = "predict" if flag is batch.predict else "regress"
        for position in flag[0].nonzero().flatten().tolist():
            one = torch.zeros_like(flag)
            one[0, position] = True
            single = replace(batch, **{name: one})
            found = losses(
                replace(
                    model(single),
                    hidden_states=model.hidden_states(inputs, single),
                    inputs_embeds=inputs,
                ),
                single,
            )
            total = found["text"].total if name == "predict" else found["vectors"].total
            (gradient,) = torch.autograd.grad(total, inputs)
            document = batch.documents[0] == batch.documents[0, position]
            assert (gradient[0, position:] == 0).all() and (gradient[0, ~document] == 0).all()
            assert gradient[0, position - 1].abs().max() > 0


def left(batch: PackedBatch) -> PackedBatch:
    """The same sequences, with their free positions before them."""
    moved = {}
    for name in (
        "ids",
        "roles",
        "predict",
        "regress",
        "prefix",
        "is_embedding",
        "documents",
        "positions",
    ):
        sequences = getattr(batch, name)
        shifts = (batch.documents == PADDING).sum(1).tolist()
        moved[name] = torch.stack(
            [sequence.roll(shift) for sequence, shift in zip(sequences, shifts, strict=True)]
        )
    return replace(batch, **moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_emu_06_padding_and_caching(family: str, tiny_tokenizer: VisualTokenizer):
    processor, model = built(tiny_tokenizer, family)
    batch = pad([sequence(processor, s) for s in mixed()], processor.pad)
    assert (left(batch).documents[0] == PADDING).nonzero().flatten().tolist() == list(
        range((batch.documents[0] == PADDING).sum())
    )
    with torch.no_grad():
        right_losses = EMU.losses(model(batch), batch)
        left_losses = EMU.losses(model(left(batch)), left(batch))
        for name, loss in right_losses.items():
            torch.testing.assert_close(left_losses[name].mean, loss.mean, atol=1e-5, rtol=1e-5)
        prompts = [EMU.prompt(s, processor, "image") for s in mixed()]
        cached = generate_interleaved(
            model, processor, prompts, N, starts_with_image=True, max_new_tokens=4
        )
        plain = generate_interleaved(
            model, processor, prompts, N, starts_with_image=True, max_new_tokens=4, use_cache=False
        )
        alone = [
            generate_interleaved(
                model, processor, [prompt], N, starts_with_image=True, max_new_tokens=4
            )[0]
            for prompt in prompts
        ]
        for number, prompt in enumerate(prompts):
            slow = slowly(model, processor, prompt, room=len(prompts[2]))
            for generated in (cached, plain, alone):
                assert isinstance(generated[number][0], torch.Tensor)
                torch.testing.assert_close(generated[number][0], slow, atol=1e-4, rtol=1e-4)
                assert generated[number][1:] == cached[number][1:], "the words after the picture"


def slowly(
    model: SequenceModel, processor: MultimodalProcessor, prompt: TokenSequence, room: int
) -> torch.Tensor:
    """N vectors by whole forwards over a right-padded sequence, where vectors said are put in by
    hand.
    """
    generated: list[torch.Tensor] = []
    for _ in range(N):
        length = len(prompt) + len(generated)
        batch = pad([prompt], processor.pad)
        inputs = model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        free = model.causal.get_input_embeddings()(torch.tensor([processor.pad]))
        inputs = torch.cat(
            [inputs, *(v[None, None] for v in generated), free[None].expand(1, room, -1)], 1
        )
        documents = torch.where(torch.arange(length + room) < length, 0, PADDING)[None]
        wide = pack([[]], length + room, processor.pad)
        states = model.hidden_states(
            inputs, replace(wide, documents=documents, positions=torch.arange(length + room)[None])
        )
        generated.append(model.regressor(states[0, length - 1]))  # type: ignore[misc]
    return torch.stack(generated)


class RecordingDecoder:
    """An ImageDecoder that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def decode(self, outputs: ImageVectors, generator: Any = None, **options: Any) -> Any:
        self.calls.append((outputs.vectors, outputs.unconditional, options))
        return [Image.new("RGB", (4, 4))] * len(outputs.vectors)


@pytest.fixture
def lm(tiny_tokenizer: VisualTokenizer) -> MultimodalLM:
    processor, model = built(tiny_tokenizer)
    return MultimodalLM(model, processor, tiny_tokenizer, RecordingDecoder(), EMU)  # type: ignore[arg-type]


def test_emu_07_generation(lm: MultimodalLM, photos: list[Path]):
    """Exactly N; null is what is generated after an empty prompt. (Guidance of 1:
    test_vector_decoder.py.)
    """
    prompts = ["a red apple", [], ["a", photos[0], "rain"], [photos[0], photos[1]]]
    vectors = lm.generate_vectors_batch(prompts)
    assert vectors.shape == (4, N, 16)
    distance = torch.cdist(vectors.flatten(1), vectors.flatten(1)) + torch.eye(4)
    assert distance.min() > 1e-4, "each prompt has vectors of its own, blends of two pictures too"
    empty = lm.objective.prompt([], lm.processor, "image")
    assert empty.ids.tolist() == [*lm.processor.start, lm.processor.vocabulary.begin]
    null = slowly(lm.model, lm.processor, empty, room=2)
    torch.testing.assert_close(vectors[1], null, atol=1e-4, rtol=1e-4)
    options = {
        "decoder_guidance_scale": 1.0,
        "num_inference_steps": 2,
        "generator": torch.Generator(),
    }
    assert len(lm.generate_images("a red apple", 2, **options)) == 2
    ((asked, against, more),) = lm.decoder.calls
    torch.testing.assert_close(asked, vectors[:1].expand(2, -1, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(against, null[None], atol=1e-4, rtol=1e-4)
    assert more == {"num_inference_steps": 2, "guidance_scale": 1.0}


def test_emu_08_eight_samples_are_overfitted(tiny_tokenizer: VisualTokenizer):
    """A number names each image and the image its words, so that both losses can reach 0. Were the
    targets not detached, the second one would, by vectors that are all the same."""
    losses, before, after = learnt(tiny_tokenizer, EMU)
    assert losses["text"].mean < 0.1
    assert losses["vectors"].mean < 0.1 * after**2
    assert after > 0.5 * before and losses["spread"].mean > 0.2
    _, before, after = learnt(tiny_tokenizer, Undetached("given", queries=N, depth=2, heads=2))
    assert after < 0.1 * before


class Undetached(Emu):
    def losses(self, output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
        before, at = shift_targets(batch, batch.regress)
        error = (
            output.regressor(output.hidden_states.flatten(0, 1)[before])
            - output.inputs_embeds.flatten(0, 1)[at]
        )  # type: ignore[misc]
        return {
            **super().losses(output, batch),
            "vectors": LossSum(error.square().mean(1).sum(), torch.tensor(len(at))),
        }


def learnt(visual: VisualTokenizer, objective: Emu) -> tuple[dict[str, LossSum], float, float]:
    """(losses, std of the images' vectors before and after training)."""
    processor, _ = processor_and_model()
    words = [
        "a red apple",
        "two dogs run along the beach",
        "an apple and a table in the old town",
        "rain",
    ]
    samples: list[list[Segment]] = [
        [
            TextSegment("rain " * i + "and", is_target=False),
            image(i),
            TextSegment(words[i % 4] + " rain" * (i // 4)),
        ]
        for i in range(8)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**SMALL, vocab_size=processor.vocabulary.stop)
        )
        model = SequenceModel(lm, *objective.connectors.build(visual, 32))
    batch = pad([sequence(processor, s, objective) for s in samples], processor.pad)

    def deviation() -> float:
        with torch.no_grad():
            return float(model.bridge(batch.images, batch.keep).view(8, N, -1).var(0).mean().sqrt())  # type: ignore[misc]

    before, rates = deviation(), {"lm": 5e-3, "visual": 1e-3, "encoder": 1e-4}
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr": rates[name]} for name, p in model.trained_parameters().items()]
    )
    for _ in range(120):
        losses = losses_of(model, objective, batch)
        optimizer.zero_grad()
        objective.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return (
        {name: LossSum(loss.total.detach(), loss.count) for name, loss in losses.items()},
        before,
        deviation(),
    )


def test_emu_09_any_number_of_images(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    processor, model = built(tiny_tokenizer)
    frames = as_segments(clip([photos[i % 4] for i in range(30)]), tiny_tokenizer.image_processor)
    five: list[Segment] = [part for i in range(5) for part in (image(i), TextSegment("rain"))]
    samples = [
        [TextSegment("rain and rain")],
        [image(0)],
        [image(0), TextSegment("rain")],
        five,
        [*frames, TextSegment("two dogs run")],
    ]
    sequences = [sequence(processor, sample, key=str(i)) for i, sample in enumerate(samples)]
    batch = pack([sequences], sum(map(len, sequences)), processor.pad)
    assert (
        batch.fill == 1
        and len(batch.images) == 1 + 1 + 5 + 8
        and batch.is_embedding.sum() == 15 * N
    )
    with torch.no_grad():
        packed = EMU.losses(model(batch), batch)
        apart = [EMU.losses(model(b), b) for b in (pad([r], processor.pad) for r in sequences)]
    for name in ("text", "vectors"):
        whole = sum(float(losses[name].total) for losses in apart)
        assert math.isclose(float(packed[name].total), whole, rel_tol=1e-4)
    assert apart[0]["vectors"].count == 0 and apart[0]["vectors"].mean == 0
    assert apart[1]["text"].count == 1, "a picture alone ends its row"


def test_emu_09_three_learning_rates(folder: Path):
    objective = Emu(queries=N, depth=1, heads=2)
    rates = {"lr": 3e-3, "visual_lr": 2e-3, "encoder_lr": 1e-3}
    training = module(folder, objective=objective, **rates, out=str(folder / "out"))
    fitted, output = trainer(folder, 2, [Losses()]), Losses()
    fitted.fit(training, data(folder, images=str(folder / "pictures")))
    model: Any = training.model
    named = {id(p): name for name, p in model.named_parameters()}
    found = {
        named[id(p)]: group["initial_lr"]
        for group in fitted.optimizers[0].param_groups
        for p in group["params"]
    }
    unread = {
        name for name in named.values() if ".post_layernorm." in name
    }  # features are read before this norm
    assert unread and set(found) == set(named.values()) - unread, "everything else is trained"
    for name, rate in found.items():
        own = name.startswith("bridge.")
        wanted = (
            "encoder_lr" if name.startswith("bridge.encoder.") else "visual_lr" if own else "lr"
        )
        assert rate == rates[wanted], name
    assert "regressor.weight" in found and "bridge.queries" in found and output.values == []
    loaded = MultimodalLM.from_pretrained(folder / "out", decoder=None)
    assert loaded.objective == objective
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    source = {"lm": str(folder / "out"), "text_tokenizer": None, "seed": 5}
    again = module(folder, objective=objective, **source)
    again.configure_model()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), f"{name} is trained on"
    other = module(folder, objective=LaVIT(), **source)
    other.configure_model()
    assert other.model.bridge is None, "of another objective the LM only"
    frozen = module(folder, objective=replace(objective, train_encoder=False))
    frozen.configure_model()
    assert frozen.model.trained_parameters()["encoder"] == [] and not any(
        "encoder" in n for n in frozen.model.state_dict()
    )


def test_images_to_text(lm: MultimodalLM, photos: list[Path]):
    captions = lm.caption([str(photo) for photo in photos[:2]], max_new_tokens=5)
    assert captions == [lm.caption(str(photo), max_new_tokens=5) for photo in photos[:2]]
    assert isinstance(lm.answer(str(photos[0]), "What colour is it?", max_new_tokens=5), str)
    shown = lm.prompts.sequence([photos[0], "rain", photos[1]], "text")
    assert len(shown.image_segments) == 2 and shown.is_embedding.sum() == 2 * N, (
        "few-shot prompts are one after another"
    )
    generated = lm.complete(
        ["a red apple", photos[0]], 6, max_images=0, temperature=3.0, generator=torch.Generator()
    )
    assert all(isinstance(part, str) for part in generated)


def test_ranking_by_mean_cross_entropy(lm: MultimodalLM, photos: list[Path]):
    texts = ["a red apple", "rain", "two dogs run"]
    found = lm.rank([photos[0]], texts, per_token=True)
    for text, nats in zip(texts, found.tolist(), strict=True):
        sample = sequence(
            lm.processor,
            [replace(lm.prompts.segment(photos[0]), is_target=False), TextSegment(text)],
        )
        batch = pad([sample], lm.processor.pad)
        with torch.no_grad():
            assert math.isclose(
                -float(EMU.losses(lm.model(batch), batch)["text"].mean), nats, rel_tol=1e-4
            )


def test_what_is_refused(lm: MultimodalLM, photos: list[Path], tiny_tokenizer: VisualTokenizer):
    codes = tiny_tokenizer.encode(photos[0])
    with pytest.raises(ValueError, match="emu generates vectors for images, no codes"):
        lm.generate_codes("rain")
    with pytest.raises(ValueError, match="emu is not trained to generate the token that begins"):
        lm.complete("rain")
    with pytest.raises(
        ValueError, match="Emu needs the pixels of images, and the prompt has only the codes of one"
    ):
        lm.caption(codes)
    with pytest.raises(ValueError, match="the likelihood of image segments is not defined"):
        lm.rank("rain", [photos[0]])
    with pytest.raises(ValueError, match="example 'x' has only the codes of one"):
        sequence(lm.processor, [ImageSegment(torch.tensor([1, 2])), TextSegment("rain")], key="x")
    with pytest.raises(ValueError, match="example 'x' has no segments"):
        sequence(lm.processor, [], key="x")
    with pytest.raises(ValueError, match="at least one vector per image, got 0"):
        Emu(queries=0)
    with pytest.raises(ValueError, match=r"regression_weight: expected a number in 0\.\."):
        Emu(regression_weight=-1.0)
    with pytest.raises(ValueError, match="no decoder of vectors is shipped"):
        MultimodalLM(lm.model, lm.processor, lm.visual_tokenizer, "default", EMU).generate_images(
            "rain"
        )
    assert by_name("emu") is Emu and isinstance(VisualCodes, type)


def test_saved_and_loaded(
    lm: MultimodalLM, tmp_path: Path, photos: list[Path], tiny_tokenizer: VisualTokenizer
):
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    save_model(
        tmp_path / "lm",
        lm.model,
        lm.processor,
        EMU,
        str(tmp_path / "visual"),
        tiny_tokenizer.fingerprint(),
    )
    loaded = MultimodalLM.from_pretrained(tmp_path / "lm", decoder=None)
    prompt = ["a", photos[0]]
    assert torch.equal(loaded.generate_vectors_batch([prompt]), lm.generate_vectors_batch([prompt]))
    with pytest.raises(ValueError, match="no image decoder"):
        loaded.generate_images("rain")
