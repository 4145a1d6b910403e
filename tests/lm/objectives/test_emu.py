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
from helpers.lm_parts import pairs, processor_and_model
from helpers.lm_runs import SMALL, data, module, trainer
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
from lavit_tok import VisualTokenizer

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
    v, words, pad_id = processor.vocabulary, processor.text("a table"), processor.pad
    ids = [*processor.start, v.begin, pad_id, pad_id, v.end, *words, processor.stop]
    assert made.ids.tolist() == ids
    roles = [Role.TEXT, Role.BEGIN, Role.VISUAL, Role.VISUAL, Role.END]
    assert made.roles.tolist() == [int(r) for r in [*roles, *[Role.TEXT] * (len(words) + 1)]]
    marks = {"is_embedding": "..xx..", "predict": ".....x", "regress": "..xxx."}
    for name, drawn in marks.items():
        found = "".join("x" if flag else "." for flag in getattr(made, name).tolist())
        assert found == drawn + drawn[-1] * len(words), name
    assert not made.prefix.any() and len(made.image_segments) == 1 and made.keep.numel() == 0


def test_pairs_come_in_both_orders(tiny_tokenizer: VisualTokenizer):
    processor, _ = built(tiny_tokenizer)
    pair, seeds = [image(0), TextSegment("rain")], range(16)

    def orders(name: str) -> set[int]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds for _ in range(2)]
        samples = [pair, pair[::-1]] * len(seeds)
        both = zip(samples, generators, strict=True)
        layout = Emu(name, queries=2).layout
        return {int(layout(sample, processor, one).roles[1]) for sample, one in both}

    assert orders("both") == {0, 1}
    assert orders("image_first") == {int(Role.BEGIN)}
    assert orders("text_first") == {int(Role.TEXT)}
    asked = [replace(image(0), is_target=False), TextSegment("what?", is_target=False)]
    question = sequence(processor, [*asked, TextSegment("rain")])
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
        assert (before[0] - before[1]).abs().max() > 1e-3, "images differ"
        narrow = CausalResampler(tiny_tokenizer, 16, 4, 1, 2, hidden_size=8)
        assert narrow(images, none).shape == (12, 16)
    expected = "heads that divide the hidden size, got 4 queries, 1 blocks, 3 heads"
    with pytest.raises(ValueError, match=expected):
        CausalResampler(tiny_tokenizer, 16, 4, 1, 3)


def test_emu_01_pooled_queries(tiny_tokenizer: VisualTokenizer):
    """Each vector follows its own square of patches more than any other does."""
    _, plain = built(tiny_tokenizer)
    pooled = replace(EMU, queries=4, pooled_queries=True)
    _, model = built(tiny_tokenizer, objective=pooled)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in plain.named_parameters()}, "no weights are added"
    bridge = model.bridge
    assert isinstance(bridge, CausalResampler)
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([4, 1, 2, 3, 0, *range(5, 16)])  # two patches of the first square swapped
    with torch.no_grad():
        before = bridge.vectors(features)
        assert torch.allclose(bridge.vectors(features[:, order]), before, atol=1e-5)
        for square, patch in enumerate((0, 2, 8, 10)):
            changed = features.clone()
            changed[:, patch] += torch.linspace(-3, 3, 32)
            change = (bridge.vectors(changed) - before).norm(dim=-1)
            assert (change.argmax(1) == square).all()
    with pytest.raises(ValueError, match=r"4 x 4 patches, one of \[1, 4, 16\], got 5"):
        CausalResampler(tiny_tokenizer, 16, 5, 1, 2, pooled_queries=True)


def test_emu_02_regression_terms(tiny_tokenizer: VisualTokenizer):
    """(N + 1) an image, in packed sequences."""
    processor, model = built(tiny_tokenizer)
    *_, two = sequences = [sequence(processor, s) for s in mixed()]
    batch = pack([sequences, [two]], 64, processor.pad)
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
    inputs, regressor = output.inputs_embeds, output.regressor
    vectors = model.bridge(batch.images, batch.keep)  # type: ignore[misc]
    assert torch.equal(inputs[batch.is_embedding], vectors)
    end = model.causal.get_input_embeddings().weight[processor.vocabulary.end]
    assert torch.equal(inputs[batch.roles == Role.END], end.expand(3, -1))
    assert regressor is not None
    total, targets = torch.zeros(()), batch.regress.nonzero().tolist()
    for b, i in targets:
        error = regressor(output.hidden_states[b, i - 1]) - inputs[b, i].detach()
        total = total + error.square().mean()
    found = regression(output, batch)["vectors"].total
    torch.testing.assert_close(found, total, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(total, inputs, retain_graph=True)[0]
    got = torch.autograd.grad(found, inputs, retain_graph=True)[0]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    # "spread" is the standard deviation of a dimension, from two targets on.
    for kept in (2, 1):
        flags = torch.zeros_like(batch.regress)
        for b, i in targets[:kept]:
            flags[b, i] = True
        spread = regression(output, replace(batch, regress=flags))["spread"]
        wanted = inputs[flags].std(0).mean() if kept > 1 else torch.zeros(())
        torch.testing.assert_close(spread.mean, wanted)
    states = output.hidden_states.detach()
    only_targets = replace(output, hidden_states=states, regressor=lambda x: x)
    loss = regression(only_targets, batch)["vectors"].total
    assert not loss.requires_grad, "a target needs no gradient"


def test_emu_04_what_has_cross_entropy(tiny_tokenizer: VisualTokenizer):
    processor, model = built(tiny_tokenizer)
    sequences = [sequence(processor, s) for s in mixed()]
    batch = pack([sequences], 64, processor.pad)
    before, at = shift_targets(batch, batch.predict)
    roles, ids, v = batch.roles.flatten(), batch.ids.flatten(), processor.vocabulary
    assert (batch.documents.flatten()[at] != PADDING).all() and (roles[at] == Role.TEXT).all()
    assert not torch.isin(ids[at], torch.tensor([v.begin, v.end])).any()
    ends = (roles[before] == Role.END).sum()
    assert ends == 3, "the first id after each image is predicted from its end"
    texts = sum(len(one) - 1 - (N + 2) * len(one.image_segments) for one in sequences)
    assert len(at) == texts == EMU.losses(model(batch), batch)["text"].count
    assert cross_entropy(model(batch), batch)["image"].count == 0


def test_emu_05_no_gradient_from_targets(tiny_tokenizer: VisualTokenizer):
    """Of each single term, text and vectors, with respect to the LM's input embeddings."""
    processor, model = built(tiny_tokenizer)
    batch = pack([[sequence(processor, s) for s in mixed()[1:]]], 64, processor.pad)
    inputs = model(batch).inputs_embeds.detach().requires_grad_(True)
    kinds = ("predict", "text", cross_entropy), ("regress", "vectors", regression)
    for flag, name, losses in kinds:
        for position in getattr(batch, flag)[0].nonzero().flatten().tolist():
            one = torch.zeros_like(batch.predict)
            one[0, position] = True
            single = replace(batch, **{flag: one})
            states = model.hidden_states(inputs, single)
            output = replace(model(single), hidden_states=states, inputs_embeds=inputs)
            (gradient,) = torch.autograd.grad(losses(output, single)[name].total, inputs)
            document = batch.documents[0] == batch.documents[0, position]
            assert (gradient[0, position:] == 0).all() and (gradient[0, ~document] == 0).all()
            assert gradient[0, position - 1].abs().max() > 0


def left(batch: PackedBatch) -> PackedBatch:
    """The same sequences, with their free positions before them."""
    names = "ids roles predict regress prefix is_embedding documents positions".split()  # noqa: SIM905
    shifts = (batch.documents == PADDING).sum(1).tolist()

    def moved(sequences: torch.Tensor) -> torch.Tensor:
        pairs = zip(sequences, shifts, strict=True)
        return torch.stack([sequence.roll(shift) for sequence, shift in pairs])

    return replace(batch, **{name: moved(getattr(batch, name)) for name in names})


@pytest.mark.parametrize("family", FAMILIES)
def test_emu_06_padding_and_caching(family: str, tiny_tokenizer: VisualTokenizer):
    processor, model = built(tiny_tokenizer, family)
    batch = pad([sequence(processor, s) for s in mixed()], processor.pad)
    free = left(batch).documents[0] == PADDING
    assert free.nonzero().flatten().tolist() == list(range(free.sum()))
    prompts = [EMU.prompt(s, processor, "image") for s in mixed()]

    def generated(prompts: list[TokenSequence], **more: Any) -> list[Any]:
        options = {"starts_with_image": True, "max_new_tokens": 4, **more}
        return generate_interleaved(model, processor, prompts, N, **options)

    with torch.no_grad():
        losses = EMU.losses(model(batch), batch)
        for name, loss in EMU.losses(model(left(batch)), left(batch)).items():
            torch.testing.assert_close(loss.mean, losses[name].mean, atol=1e-5, rtol=1e-5)
        cached, plain = generated(prompts), generated(prompts, use_cache=False)
        alone = [generated([prompt])[0] for prompt in prompts]
        for number, prompt in enumerate(prompts):
            slow = slowly(model, processor, prompt, free=len(prompts[2]))
            for vectors, *texts in (cached[number], plain[number], alone[number]):
                assert isinstance(vectors, torch.Tensor)
                torch.testing.assert_close(vectors, slow, atol=1e-4, rtol=1e-4)
                assert texts == cached[number][1:], "the text after the image"


def slowly(
    model: SequenceModel, processor: MultimodalProcessor, prompt: TokenSequence, free: int
) -> torch.Tensor:
    """N vectors by whole forwards over a right-padded sequence, with generated vectors as inputs.

    Args:
        free: padding positions after the sequence.
    """
    batch = pad([prompt], processor.pad)
    inputs = model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
    padding = model.causal.get_input_embeddings()(torch.tensor([[processor.pad]]))
    for length in range(len(prompt), len(prompt) + N):
        positions = torch.arange(length + free)[None]
        documents = torch.where(positions < length, 0, PADDING)
        wide = pack([[]], length + free, processor.pad)
        wide = replace(wide, documents=documents, positions=positions)
        states = model.hidden_states(torch.cat([inputs, padding.expand(1, free, -1)], 1), wide)
        vector = model.regressor(states[:, length - 1 : length])  # type: ignore[misc]
        inputs = torch.cat([inputs, vector], 1)
    return inputs[0, -N:]


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
    test_emu_image_decoder.py.)
    """
    prompts = ["a red apple", [], ["a", photos[0], "rain"], [photos[0], photos[1]]]
    vectors = lm.generate_vectors_batch(prompts)
    assert vectors.shape == (4, N, 16)
    distance = torch.cdist(vectors.flatten(1), vectors.flatten(1)) + torch.eye(4)
    assert distance.min() > 1e-4, "each prompt has vectors of its own, blends of two images too"
    empty = lm.objective.prompt([], lm.processor, "image")
    assert empty.ids.tolist() == [*lm.processor.start, lm.processor.vocabulary.begin]
    null = slowly(lm.model, lm.processor, empty, free=2)
    torch.testing.assert_close(vectors[1], null, atol=1e-4, rtol=1e-4)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator()}
    assert len(lm.generate_images("a red apple", 2, decoder_guidance_scale=1.0, **options)) == 2
    ((asked, against, more),) = lm.decoder.calls
    torch.testing.assert_close(asked, vectors[:1].expand(2, -1, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(against, null[None], atol=1e-4, rtol=1e-4)
    assert more == {"num_inference_steps": 2, "guidance_scale": 1.0}


def test_emu_08_eight_samples_are_overfitted(tiny_tokenizer: VisualTokenizer):
    """A number names each image and the image its words, so that both losses can reach 0. Were the
    targets not detached, the second one would, by vectors that are all the same."""
    losses, before, after = learned(tiny_tokenizer, EMU)
    assert losses["text"].mean < 0.1
    assert losses["vectors"].mean < 0.1 * after**2
    assert after > 0.5 * before and losses["spread"].mean > 0.2
    _, before, after = learned(tiny_tokenizer, Undetached("given", queries=N, depth=2, heads=2))
    assert after < 0.1 * before


class Undetached(Emu):
    def losses(self, output: ModelOutput, batch: PackedBatch) -> dict[str, LossSum]:
        before, at = shift_targets(batch, batch.regress)
        predicted = output.regressor(output.hidden_states.flatten(0, 1)[before])  # type: ignore[misc]
        error = (predicted - output.inputs_embeds.flatten(0, 1)[at]).square().mean(1).sum()
        return {**super().losses(output, batch), "vectors": LossSum(error, torch.tensor(len(at)))}


def learned(visual: VisualTokenizer, objective: Emu) -> tuple[dict[str, LossSum], float, float]:
    """(losses, std of the images' vectors before and after training)."""
    processor, _ = processor_and_model()
    texts = [part.text for _, part in pairs(4)]  # type: ignore[union-attr]
    samples: list[list[Segment]] = []
    for i in range(8):
        number, text = TextSegment("rain " * i + "and", is_target=False), texts[i % 4]
        samples.append([number, image(i), TextSegment(text + " rain" * (i // 4))])
    config = AutoConfig.for_model(**SMALL, vocab_size=processor.vocabulary.stop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config)
        model = SequenceModel(lm, *objective.connectors.build(visual, 32))
    batch = pad([sequence(processor, s, objective) for s in samples], processor.pad)

    def deviation() -> float:
        with torch.no_grad():
            return float(model.bridge(batch.images, batch.keep).view(8, N, -1).var(0).mean().sqrt())  # type: ignore[misc]

    before, rates = deviation(), {"lm": 5e-3, "visual": 1e-3, "encoder": 1e-4}
    groups = [{"params": p, "lr": rates[name]} for name, p in model.trained_parameters().items()]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(120):
        losses = losses_of(model, objective, batch)
        optimizer.zero_grad()
        objective.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = {name: LossSum(loss.total.detach(), loss.count) for name, loss in losses.items()}
    return found, before, deviation()


def test_emu_09_any_number_of_images(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    processor, model = built(tiny_tokenizer)
    frames = as_segments(clip([photos[i % 4] for i in range(30)]), tiny_tokenizer.image_processor)
    five: list[Segment] = [part for i in range(5) for part in (image(i), TextSegment("rain"))]
    samples = [[TextSegment("rain and rain")], [image(0)], [image(0), TextSegment("rain")]]
    samples += [five, [*frames, TextSegment("two dogs run")]]
    sequences = [sequence(processor, sample, key=str(i)) for i, sample in enumerate(samples)]
    batch = pack([sequences], sum(map(len, sequences)), processor.pad)
    assert batch.fill == 1 and len(batch.images) == 1 + 1 + 5 + 8
    assert batch.is_embedding.sum() == 15 * N
    with torch.no_grad():
        packed = EMU.losses(model(batch), batch)
        apart = [EMU.losses(model(b), b) for b in (pad([r], processor.pad) for r in sequences)]
    for name in ("text", "vectors"):
        whole = sum(float(losses[name].total) for losses in apart)
        assert math.isclose(float(packed[name].total), whole, rel_tol=1e-4)
    assert apart[0]["vectors"].count == 0 and apart[0]["vectors"].mean == 0
    assert apart[1]["text"].count == 1, "an image alone ends its sequence"


def test_emu_09_three_learning_rates(folder: Path):
    objective = Emu(queries=N, depth=1, heads=2)
    rates = {"lr": 3e-3, "visual_lr": 2e-3, "encoder_lr": 1e-3}
    training = module(folder, objective=objective, **rates, out=str(folder / "out"))
    fitted = trainer(folder, 2, [])
    fitted.fit(training, data(folder, images=str(folder / "pictures")))
    model: Any = training.model
    named = {id(p): name for name, p in model.named_parameters()}
    groups = fitted.optimizers[0].param_groups
    found = {named[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}
    unread = {name for name in named.values() if ".post_layernorm." in name}  # after the features
    assert unread and set(found) == set(named.values()) - unread, "everything else is trained"
    for name, rate in found.items():
        own = "visual_lr" if name.startswith("bridge.") else "lr"
        assert rate == rates["encoder_lr" if name.startswith("bridge.encoder.") else own], name
    assert "regressor.weight" in found and "bridge.queries" in found
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
    still = module(folder, objective=objective, **rates | {"encoder_lr": 0.0})
    still.configure_model()
    parts = still.model.trained_parameters()
    assert parts["encoder"] == [] and parts["visual"] and parts["lm"], "a rate of 0 freezes"
    frozen = module(folder, objective=replace(objective, train_encoder=False))
    frozen.configure_model()
    assert frozen.model.trained_parameters()["encoder"] == []
    assert not any("encoder" in name for name in frozen.model.state_dict())


def test_images_to_text(lm: MultimodalLM, photos: list[Path]):
    captions = lm.caption([str(photo) for photo in photos[:2]], max_new_tokens=5)
    assert captions == [lm.caption(str(photo), max_new_tokens=5) for photo in photos[:2]]
    assert isinstance(lm.answer(str(photos[0]), "What color is it?", max_new_tokens=5), str)
    shown = lm.prompts.sequence([photos[0], "rain", photos[1]], "text")
    assert len(shown.image_segments) == 2, "few-shot prompts are one after another"
    assert shown.is_embedding.sum() == 2 * N
    options: dict[str, Any] = {"temperature": 3.0, "generator": torch.Generator()}
    generated = lm.complete(["a red apple", photos[0]], 6, max_images=0, **options)
    assert all(isinstance(part, str) for part in generated)


def test_ranking_by_mean_cross_entropy(lm: MultimodalLM, photos: list[Path]):
    texts = ["a red apple", "rain", "two dogs run"]
    given = replace(lm.prompts.segment(photos[0]), is_target=False)
    found = lm.rank([photos[0]], texts, per_token=True)
    for text, nats in zip(texts, found.tolist(), strict=True):
        batch = pad([sequence(lm.processor, [given, TextSegment(text)])], lm.processor.pad)
        with torch.no_grad():
            loss = float(EMU.losses(lm.model(batch), batch)["text"].mean)
        assert math.isclose(-loss, nats, rel_tol=1e-4)


def test_what_is_refused(lm: MultimodalLM, photos: list[Path], tiny_tokenizer: VisualTokenizer):
    codes = tiny_tokenizer.encode(photos[0])
    with pytest.raises(ValueError, match="emu generates vectors for images, no codes"):
        lm.generate_codes("rain")
    with pytest.raises(ValueError, match="emu is not trained to generate the token that begins"):
        lm.complete("rain")
    with pytest.raises(ValueError, match="needs the pixels of images, and the prompt has only the"):
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
    shipped = MultimodalLM(lm.model, lm.processor, lm.visual_tokenizer, "default", EMU)
    with pytest.raises(ValueError, match="no decoder of vectors is shipped"):
        shipped.generate_images("rain")
    assert by_name("emu") is Emu


@pytest.mark.parametrize("pooled", [False, True])
def test_saved_and_loaded(
    tmp_path: Path, photos: list[Path], tiny_tokenizer: VisualTokenizer, pooled: bool
):
    visual, path = tmp_path / "visual", tmp_path / "lm"
    tiny_tokenizer.save_pretrained(visual)
    fingerprint = tiny_tokenizer.fingerprint()
    objective = replace(EMU, queries=4, pooled_queries=pooled)
    processor, model = built(tiny_tokenizer, objective=objective)
    lm = MultimodalLM(model, processor, tiny_tokenizer, objective=objective)
    save_model(path, lm.model, lm.processor, objective, str(visual), fingerprint)
    loaded = MultimodalLM.from_pretrained(path, decoder=None)
    prompt = ["a", photos[0]]
    assert torch.equal(loaded.generate_vectors_batch([prompt]), lm.generate_vectors_batch([prompt]))
    with pytest.raises(ValueError, match="no image decoder"):
        loaded.generate_images("rain")
