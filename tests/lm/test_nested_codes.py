"""Language models of nested codes: ids for each stage, generation, the restricted softmax."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_parts import CODES, image, processor_and_model
from helpers.lm_runs import SMALL, Losses, data, module, trainer
from helpers.small_lms import small_tokenizer
from helpers.small_nested import SETTINGS, small_decoder
from helpers.tensors import generator
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

from lavit_lm import MultimodalLM, VisualVocabulary, VocabularyError
from lavit_lm.checkpoints.export import ExportError, export
from lavit_lm.cli import main as lavit_lm
from lavit_lm.generation.beam_search import beam_search
from lavit_lm.generation.sampling import GenerationConstraint, Sampling, generate_ids
from lavit_lm.models.losses import _chosen, log_likelihood, shift_targets, target_nats
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import pack, pad
from lavit_lm.sequences.segments import ImageSegment, SegmentLength, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.training.module import LanguageModeling
from lavit_lm.vocabulary.embeddings import CodeMap, embed_codebook
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import CODE, stages_for
from lavit_tok import TokenizerConfig, VisualCodes, VisualTokenizer, WeightsError
from lavit_tok.cli import main as lavit_tok
from lavit_tok.nn.nested_order import levels, rank_stages

STAGES, MOST = 5, 8  # ranks 0 | 1 | 2 | 3 | 4 5 6 7


@pytest.fixture(scope="module")
def visual(tmp_path_factory: pytest.TempPathFactory) -> VisualTokenizer:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nested") / "tokenizer"
    VisualTokenizer(TokenizerConfig.from_dict(SETTINGS)).save_pretrained(folder)
    return VisualTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def parts() -> tuple[MultimodalProcessor, SequenceModel]:
    return processor_and_model(stages=STAGES)


def sequences(processor: MultimodalProcessor, count: int = 6) -> list[TokenSequence]:
    texts = [TextSegment("a red apple"), TextSegment("rain")]
    pairs = [[image(i, 1 + 3 * i % 11), texts[i % 2]] for i in range(count)]
    return [LaVIT().layout(s, processor, generator(i), str(i)) for i, s in enumerate(pairs)]


def test_stages_of_the_ranks_are_those_of_the_order() -> None:
    found = [
        max(0, 3 * i - 2) + stage
        for i, level in enumerate(levels(256))
        for stage in range(level.stages)
        for _ in range(level.side**2)
    ]
    assert rank_stages(13) == found and len(found) == 256
    assert rank_stages(0) == [] and rank_stages(5) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_ids_of_codes_depend_on_the_stage_of_their_rank() -> None:
    tokenizer = small_tokenizer("llama")
    v = VisualVocabulary.extend(tokenizer, None, CODES, stages=STAGES)
    assert VisualVocabulary.from_tokenizer(tokenizer) == v
    assert v.max_codes == MOST and v.stop == v.first + STAGES * CODES
    codes = torch.tensor([[3] * 8, list(range(8))])
    stage = torch.tensor([0, 1, 2, 3, 4, 4, 4, 4])
    ids = v.to_ids(codes)
    assert torch.equal(ids, v.first + stage * CODES + codes)
    assert torch.equal(v.to_codes(ids), codes)
    names = tokenizer.convert_ids_to_tokens(ids[1].tolist())
    assert names[2] == "<|vis_02_00002|>" and names[7] == "<|vis_04_00007|>"
    assert [int(number) for number in CODE.findall("".join(names))] == list(range(8))
    assert torch.equal(v.to_codes(ids[:, :3]), codes[:, :3]), "a prefix is an image too"
    with pytest.raises(VocabularyError, match=r"stage 1 at rank 1, got id \d+ of stage 0"):
        v.to_codes(ids[0, [0, 0]])
    with pytest.raises(VocabularyError, match="at most 8 codes of an image, got 9"):
        v.to_ids(torch.zeros(9, dtype=torch.int64))
    with pytest.raises(VocabularyError, match=r"0\.\.15, got 16"):
        v.to_ids(torch.tensor([16]))
    with pytest.raises(VocabularyError, match=r"stages: expected 0\.\.28, got 29"):
        VisualVocabulary.extend(small_tokenizer("llama"), None, CODES, stages=29)


def test_the_pattern_of_an_image_is_what_generation_allows() -> None:
    tokenizer = small_tokenizer("llama")
    v = VisualVocabulary.extend(tokenizer, None, CODES, stages=2)
    assert v.pattern(1, 2) in (VisualVocabulary.pattern.__doc__ or "")
    nested, table = v.pattern(1, 2), VisualVocabulary(3, 4, 5, CODES).pattern(2, 3)
    for ranks in ([0], [0, 1], [1], [0, 0], [0, 1, 1], []):
        image = "".join(f"<|vis_{stage:02d}_00007|>" for stage in ranks) + "<|/img|>"
        assert bool(re.fullmatch(nested, image)) == (ranks in ([0], [0, 1])), image
    for count in range(5):
        image = "<|vis_00007|>" * count + "<|/img|>"
        assert bool(re.fullmatch(table, image)) == (count in (2, 3))
    for limits in ((0, 1), (2, 1), (1, 3)):
        with pytest.raises(VocabularyError, match="1 <= min_codes <= max_codes <= 2"):
            v.pattern(*limits)


def test_max_codes_is_the_end_of_a_stage() -> None:
    assert [stages_for(n, 13) for n in (1, 4, 8, 32, 256, None)] == [1, 4, 5, 8, 13, 13]
    assert stages_for(32, 7) == 7, "fewer patches than that"
    assert stages_for(None, 0) == stages_for(32, 0) == 0, "not nested"
    with pytest.raises(VocabularyError, match=r"one of \[1, 2, 3, 4, 8, 12, 16\], got 5"):
        stages_for(5, 7)


def test_images_are_cut_to_the_codes_that_have_ids(parts: Any) -> None:
    processor, _ = parts
    segments = [image(0, 11), TextSegment("a red apple")]
    sequence = LaVIT().layout(segments, processor, generator())
    assert (sequence.roles == Role.VISUAL).sum() == MOST
    text = "a red apple"
    lengths = [
        SegmentLength(processor.count(11)),
        SegmentLength(len(processor.text(text)), text),
    ]
    assert LaVIT().sequence_length(lengths, processor, generator()) == len(sequence)


@pytest.mark.parametrize("beams", [0, 3])
def test_generated_codes_are_of_their_stage(parts: Any, beams: int) -> None:
    processor, model = parts
    v = processor.vocabulary
    prompts = [LaVIT().prompt([TextSegment(t)], processor, "image") for t in ("rain", "a red")]
    constraint = GenerationConstraint("image", 7, MOST)
    if beams:
        found = beam_search(model, processor, prompts * 4, constraint, beams)
    else:
        found = generate_ids(
            model, processor, prompts * 4, constraint, Sampling(3.0), None, generator()
        )
    assert {len(ids) for ids in found} <= {8, 9}
    for ids in found:
        assert ids[-1] == v.end
        v.to_codes(torch.tensor(ids[:-1]))  # raises for an id of another stage


@pytest.mark.parametrize(("family", "stages"), [("llama", 5), ("phi", 5), ("gemma", 0)])
def test_the_restricted_softmax_is_a_softmax_over_what_generation_allows(
    family: str, stages: int
) -> None:
    processor, plain = processor_and_model(family, stages=stages, tied=family == "gemma")
    v = processor.vocabulary
    some = sequences(processor)
    batch = pack([some[:3], some[3:]], 64, processor.pad)
    model = SequenceModel(plain.lm, restricted=v).eval()
    LaVIT().total(LaVIT().losses(model(batch), batch)).backward()
    weight = model.causal.get_output_embeddings().weight
    found, weight.grad = weight.grad.clone(), None
    # the same with the logits of all ids, forbidden ones set to -inf
    output = plain(batch)
    logits = output.head(output.hidden_states.flatten(0, 1)).unflatten(0, batch.ids.shape)
    text = torch.arange(logits.shape[2]) <= v.begin
    nats = []
    for b in range(len(batch.ids)):
        rank = None
        for i in range(1, batch.ids.shape[1]):
            role, before = batch.roles[b, i], batch.roles[b, i - 1]
            rank = 0 if before == Role.BEGIN else rank + 1 if rank is not None else None
            rank = None if role in (Role.TEXT, Role.BEGIN) else rank
            if not batch.predict[b, i]:
                continue
            allowed = text.clone()
            if rank is not None:
                allowed = torch.zeros_like(text)
                allowed[v.end] = True
                masks = v.masks(logits.shape[2])
                if rank < len(masks) or not stages:
                    allowed |= masks[min(rank, len(masks) - 1)]
            masked = logits[b, i - 1].masked_fill(~allowed, -torch.inf)
            nats.append(-masked.log_softmax(0)[batch.ids[b, i]])
    torch.stack(nats).mean().backward()
    assert torch.allclose(found, weight.grad, atol=1e-6) and found.abs().max() > 1e-3
    restricted = log_likelihood(model(batch), batch)
    assert torch.isclose(-restricted.sum(), torch.stack(nats).sum(), rtol=1e-5)


@pytest.mark.parametrize("stages", [5, 0])
def test_one_target_in_so_many_is_predicted_among_all_ids(stages: int) -> None:
    processor, plain = processor_and_model(stages=stages)
    v = processor.vocabulary
    batch = pad(sequences(processor), processor.pad)
    output = SequenceModel(plain.lm, restricted=v).eval()(batch)
    source, target = shift_targets(batch, batch.predict)
    logits = output.head(output.hidden_states.flatten(0, 1)[source])[:, : v.stop]
    ids = batch.ids.flatten()[target]
    among_all = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    none, _ = target_nats(output, batch)
    always, _ = target_nats(replace(output, every=1), batch)
    assert torch.allclose(always, among_all, atol=1e-5) and bool((none < among_all).all())
    some, _ = target_nats(replace(output, every=4), batch)
    changed = some != none
    expected = none + 4 * (among_all - none)
    assert torch.allclose(some[changed], expected[changed], atol=1e-4)
    many = [LaVIT().layout([image(i, 8)], processor, generator(i), str(i)) for i in range(200)]
    chosen = _chosen(pad(many, processor.pad), 4).float()
    assert 0.22 < float(chosen.mean()) < 0.28
    assert bool((chosen.mean(0) > 0.1).all()), "every position is chosen in some blocks"
    alone = [_chosen(pad([row], processor.pad), 4).float() for row in many]
    assert torch.equal(torch.cat(alone), chosen), "whatever the other blocks of a batch"


def test_generation_without_constraints_follows_from_training() -> None:
    """The most probable of all ids can be at its position, although only some see all ids."""
    processor, model = processor_and_model(tied=True, stages=STAGES)
    v = processor.vocabulary
    first, second = sequences(processor, 2)
    model = SequenceModel(model.lm, restricted=v).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(200):
        rows = [[first] * (1 + step % 8) + [second] * (1 + (step + i) % 7) for i in range(4)]
        batch = pack(rows, 160, processor.pad)
        nats, _ = target_nats(model(batch), batch)
        optimizer.zero_grad()
        nats.mean().backward()
        optimizer.step()
    batch = pad([first, second], processor.pad)
    source, at = shift_targets(batch, batch.predict)
    model.eval()
    chosen = model.head(model(batch).hidden_states.flatten(0, 1)[source]).argmax(1)
    expected = batch.ids.flatten()[at]

    def group(ids: torch.Tensor) -> torch.Tensor:
        stage = torch.div(ids - v.first, CODES, rounding_mode="floor")
        return torch.where(ids <= v.begin, -2, torch.where(ids == v.end, -1, stage))

    assert float((group(chosen) == group(expected)).float().mean()) > 0.9


def test_other_orders_of_ids_have_no_restricted_softmax(parts: Any) -> None:
    with pytest.raises(ValueError, match="expected text, begin, end, codes"):
        SequenceModel(parts[1].lm, restricted=VisualVocabulary(3, 9, 4, 5))


def test_embeddings_of_codes_begin_like_their_entries() -> None:
    processor, model = processor_and_model(tied=True, stages=STAGES)
    v, weight = processor.vocabulary, model.causal.get_input_embeddings().weight
    text = weight[: v.begin].detach().clone()
    entries = torch.randn(STAGES, CODES, 4, generator=generator()) * 7 + 3
    entries[:, 1] = entries[:, 0] + 0.01
    entries[2] = entries[4] = entries[1]
    embed_codebook(model.causal, v.begin, v.first, entries, generator(1))
    made = weight[v.first : v.stop].detach().unflatten(0, (STAGES, CODES))
    assert torch.equal(weight[: v.begin], text)
    scaled = (made - text.mean(0)) / text.std(0, correction=0)
    assert 0.6 < float(scaled.std()) < 1.5, "as large as the embeddings of text"
    between = torch.cdist(scaled, scaled)
    assert between[:, 0, 1].max() < 0.1 * between.mean()
    # an orthonormal map keeps distances, up to the scale of each table
    expected = torch.cdist(entries, entries)
    ratio = (between / expected.clamp(min=1e-9))[:, 0, 2:]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert (made.mean(1)[0] - made.mean(1)[1]).abs().max() > 0.01, "a vector for each table"
    for table, same in ((2, True), (4, False)):  # tables 1 and 2 are of one level, 4 of the next
        shift = scaled[table] - scaled[1]
        assert torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-4) == same


@pytest.mark.parametrize("restricted", [True, False])
def test_embeddings_of_codes_are_computed_from_their_entries(restricted: bool) -> None:
    """In training by the map, in evaluation by the LM's own table, into which it was written."""
    processor, plain = processor_and_model(tied=True, stages=STAGES)
    v, weight = processor.vocabulary, plain.causal.get_input_embeddings().weight
    entries = torch.randn(STAGES, CODES, 4, generator=generator()) * 7 + 3
    code_map = CodeMap(entries, v.first, weight.shape[1], 0.02, 8, generator())
    torch.nn.init.normal_(code_map.outer, generator=generator())
    model = SequenceModel(plain.lm, restricted=v if restricted else None, code_map=code_map)
    batch = pad(sequences(processor), processor.pad)

    def total() -> torch.Tensor:
        return target_nats(replace(model(batch), every=0), batch)[0].mean()

    before = weight.detach().clone()
    loss = total()
    loss.backward()
    assert torch.equal(weight, before)
    assert not weight.grad[v.first : v.stop].any() and weight.grad[: v.first].any()
    assert all(p.grad is not None and p.grad.any() for p in code_map.parameters())
    scaled = code_map.entries
    torch.testing.assert_close(scaled.mean(1), torch.zeros(STAGES, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.square().mean((1, 2)), torch.ones(STAGES))
    for table in range(STAGES):  # one table at a time, as the docstring draws it
        x = code_map.entries[table]
        hidden = torch.nn.functional.gelu(x @ code_map.inner[table] + code_map.inner_bias[table])
        made = x @ code_map.linear[table] + code_map.bias[table] + hidden @ code_map.outer[table]
        ids = v.stage_ids(table)
        found = code_map(weight)[ids.start : ids.stop]
        assert torch.allclose(found, made, atol=1e-6)
    model.eval()
    assert torch.allclose(total(), loss, rtol=1e-5)
    assert not torch.equal(weight[v.first : v.stop], before[v.first : v.stop])
    assert torch.equal(weight[: v.first], before[: v.first])


def test_embeddings_that_are_not_tied_are_not_computed() -> None:
    processor, model = processor_and_model(tied=False, stages=STAGES)
    weight = model.causal.get_input_embeddings().weight
    code_map = CodeMap(
        torch.randn(STAGES, CODES, 4), processor.vocabulary.first, weight.shape[1], 0.02
    )
    with pytest.raises(ValueError, match="expected an LM with tied embeddings"):
        SequenceModel(model.lm, code_map=code_map)


def test_a_saved_model_has_its_ids_again_and_refuses_other_tokenizers(
    visual: VisualTokenizer, parts: Any, tiny_tokenizer: VisualTokenizer, tmp_path: Path
) -> None:
    processor, model = parts
    objective = LaVIT(restricted_softmax=True)
    lm = MultimodalLM(model, processor, visual, None, objective)
    lm.save_pretrained(tmp_path / "model", visual.name_or_path)
    again = MultimodalLM.from_pretrained(tmp_path / "model", decoder=None)
    assert again.processor.vocabulary == processor.vocabulary
    assert again.model.restricted == processor.vocabulary
    codes = again.generate_codes("a red apple", 3, generator=generator())
    assert codes.nested and int(codes.lengths.max()) <= MOST
    assert codes.to_list() == lm.generate_codes("a red apple", 3, generator=generator()).to_list()
    with pytest.raises(ValueError, match="max_codes <= 8"):
        again.generate_codes("a red apple", max_codes=9)
    whole = VisualCodes.from_list([[1] * 16], CODES, nested=True)
    cut = whole.truncate(MOST)
    assert again.rank("rain", [whole]).tolist() == again.rank("rain", [cut]).tolist()
    for stages, other in ((5, 0), (0, 7), (9, 7)):
        made = VisualVocabulary(3, 4, 5, CODES, stages)
        with pytest.raises(VocabularyError, match="there are ids for"):
            made.require_stages(other)
    assert visual.stages == 7 and tiny_tokenizer.stages == 0


def test_generated_codes_decode_in_the_mode_that_is_named(
    visual: VisualTokenizer, parts: tuple[MultimodalProcessor, SequenceModel], tmp_path: Path
) -> None:
    processor, model = parts
    MultimodalLM(model, processor, visual).save_pretrained(tmp_path / "model", visual.name_or_path)
    small_decoder(visual, sample=True).save_pretrained(tmp_path / "decoder")
    command = ["generate", "rain", "--model", str(tmp_path / "model"), "-n", "1"]
    command += ["--decoder", str(tmp_path / "decoder")]
    pixels = {}
    for mode in (None, "mean", "sample"):
        out = tmp_path / str(mode)
        assert lavit_lm([*command, "--out", str(out), *(["--mode", mode] if mode else [])]) == 0
        (path,) = out.glob("*.png")
        pixels[mode] = path.read_bytes()
    assert pixels[None] == pixels["sample"] != pixels["mean"]
    lm = MultimodalLM.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "decoder"))
    options: dict[str, Any] = {"generator": generator(0), "decoder_mode": "mean"}
    (drawn,) = lm.generate_images("rain", **options)
    assert drawn.tobytes() == Image.open(tmp_path / "mean" / path.name).tobytes()


def test_a_vocabulary_without_stages_is_refused_with_nested_codes(
    visual: VisualTokenizer, tmp_path: Path
) -> None:
    processor, model = processor_and_model()
    lm = MultimodalLM(model, processor, visual)
    lm.save_pretrained(tmp_path / "model", visual.name_or_path)
    with pytest.raises(WeightsError, match="ids for codes of one table, the visual tokenizer has"):
        MultimodalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", ["codebook", "mapped"])
def test_training_with_nested_shards(visual: VisualTokenizer, folder: Path, kind: str) -> None:
    """Shards of all codes, a model of the first four, saved and loaded again."""
    source, shards = str(visual.name_or_path), folder / f"nested-{kind}"
    command = ["shards", str(folder / "pictures"), "--tokenizer", source, "--out", str(shards)]
    assert lavit_tok([*command, "--budget", "9"]) == 0
    objective = LaVIT(restricted_softmax=True)
    options: dict[str, Any] = {"code_embeddings": kind, "objective": objective}
    options |= {"visual_tokenizer": source, "max_codes": 4}
    options |= {"lm": {**SMALL, "tie_word_embeddings": True}, "muon": kind == "mapped"}
    trained = module(folder, out=str(folder / "made"), **options)
    vocabulary = trained.processor.vocabulary
    assert (vocabulary.stages, vocabulary.max_codes) == (4, 4)
    losses = Losses()
    trainer(folder, 2, [losses]).fit(trained, data(folder, shards=str(shards)))
    assert len(losses.values) == 2
    lm = MultimodalLM.from_pretrained(folder / "made", decoder=None)
    assert lm.processor.vocabulary == lm.model.restricted == vocabulary
    assert lm.generate_codes("a red apple", 2).lengths.max() <= 4
    more = module(folder, **options | {"lm": str(folder / "made"), "text_tokenizer": None})
    more.configure_model()
    weights = [m.causal.get_input_embeddings().weight for m in (more.model.eval(), lm.model)]
    assert torch.equal(*weights), "embeddings that were trained are kept"
    small = module(folder, visual_tokenizer=source, objective=Emu())
    assert small.processor.vocabulary.max_codes == 1, "no ids for codes that are not used"
    with pytest.raises(ValueError, match=r"max_codes: expected the end of a stage.*got 5"):
        module(folder, visual_tokenizer=source, max_codes=5)
    made = {"lm": str(folder / "made"), "text_tokenizer": None, "visual_tokenizer": source}
    with pytest.raises(VocabularyError, match="has ids of 4 codes, got 8"):
        module(folder, **made, max_codes=8)


def test_images_are_read_as_vectors_or_as_codes(
    visual: VisualTokenizer, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has learned both captions images and codes, and is exported as one of codes."""
    source = str(visual.name_or_path)
    objective = LaVIT("image_first", nested_vectors=4, vector_ratio=0.5, restricted_softmax=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bridge, _ = objective.connectors.build(visual, 16)
    processor, plain = processor_and_model(tied=True, stages=STAGES)
    model = SequenceModel(plain.lm, bridge, restricted=processor.vocabulary).train()
    images = visual.image_processor.to_uint8(photos[:2])
    texts, samples = ["rain", "two dogs"], []
    for pixels, text in zip(images, texts, strict=True):
        codes = visual.encode(pixels[None], budget=3)
        samples.append([ImageSegment(codes[0], pixels, codes.keep[0]), TextSegment(text)])
    rows = [objective.layout(s, processor, generator(i)) for s in samples for i in range(6)]
    batch, optimizer = pad(rows, processor.pad), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(300):
        losses = objective.losses(model(batch), batch)
        if losses["text"].mean < 0.02:
            break
        optimizer.zero_grad()
        losses["text"].mean.backward()
        optimizer.step()
    lm = MultimodalLM(model.eval(), processor, visual, None, objective)
    codes = [VisualCodes.from_list([s[0].codes.tolist()], CODES, nested=True) for s in samples]
    assert losses["text"].mean < 0.02
    encode, encoded = VisualTokenizer.encode, []
    with monkeypatch.context() as patch:
        patch.setattr(
            VisualTokenizer, "encode", lambda *args, **o: encoded.append(args) or encode(*args, **o)
        )
        assert [lm.caption(image) for image in images] == texts
        nats = lm.rank([images[0]], texts)
        assert torch.allclose(lm.score([[images[0]]] * 2, texts), nats, atol=1e-4)
        assert nats.argmax() == 0 and not encoded, "images before a text are vectors alone"
        lm.rank(["rain"], list(images))
        assert len(encoded) == 2, "images that are predicted are codes"
    assert [lm.caption(one) for one in codes] == texts
    lm.save_pretrained(tmp_path / "lm", source)
    loaded = MultimodalLM.from_pretrained(tmp_path / "lm", decoder=None)
    assert [loaded.caption(image) for image in images] == texts
    lm.export(tmp_path / "auto", format="multimodal")
    exported = MultimodalLM.from_pretrained(tmp_path / "auto", decoder=None)
    assert exported.model.bridge is None and exported.objective.nested_vectors is None
    assert [exported.caption(one) for one in codes] == texts
    lm.objective = replace(objective, vector_ratio=1.0)
    with pytest.raises(ExportError, match="that reads and generates codes, got one with vectors"):
        lm.export(tmp_path / "no", format="multimodal")


@pytest.mark.usefixtures("unchecked")
def test_another_kind_of_embeddings() -> None:
    with pytest.raises(ValueError, match="expected one of random, codebook, mapped, got 'other'"):
        LanguageModeling("default", code_embeddings="other")  # type: ignore[arg-type]


def test_every_stage_learns_its_own_codes() -> None:
    """One number at two ranks is two ids: their counts are learned apart."""
    processor, model = processor_and_model(tied=True, stages=2)
    v = processor.vocabulary
    model = SequenceModel(model.lm, restricted=v).train()
    image_codes = [[3, 5], [3, 5], [4, 3], [4, 3]]
    objective = LaVIT(order="image_first", restricted_softmax=True)
    rows = [
        objective.layout([ImageSegment(torch.tensor(c))], processor, generator())
        for c in image_codes
    ]
    batch, optimizer = pad(rows, processor.pad), torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        losses = objective.losses(model(batch), batch)
        optimizer.zero_grad()
        objective.total(losses).backward()
        optimizer.step()
    # The first code is one of two, everything after it follows: ln 2 for each image at best.
    per_image = float(losses["image"].total.detach()) / len(rows)
    assert 0.69 < per_image < 0.8
    prompt = objective.prompt([], processor, "image")
    constraint = GenerationConstraint("image", 1, 2)
    drawn = generate_ids(model, processor, [prompt] * 40, constraint, Sampling(), None, generator())
    found = Counter(tuple(v.to_codes(torch.tensor(ids[:-1])).tolist()) for ids in drawn)
    assert found[(3, 5)] + found[(4, 3)] >= 38


@pytest.fixture
def exported(visual: VisualTokenizer, parts: Any, tmp_path: Path) -> MultimodalLM:
    """A model whose directory is tmp_path / "lm", for the Auto classes of transformers."""
    lm = MultimodalLM(parts[1], parts[0], visual, None, LaVIT(restricted_softmax=True))
    lm.export(tmp_path / "lm", format="multimodal")
    return lm


@pytest.mark.usefixtures("exported")
def test_auto_classes_generate_codes_of_their_stage(
    visual: VisualTokenizer, parts: Any, tmp_path: Path
) -> None:
    v = parts[0].vocabulary
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "lm")
    processor = AutoProcessor.from_pretrained(tmp_path / "lm")
    assert model.config.vocabulary == v and model.config.max_codes == MOST
    inputs = processor(text=["a red apple", "rain"])
    output = model.generate(
        **inputs, generation_mode="image", min_codes=6, temperature=3.0, generator=generator()
    )
    codes = processor.image_codes(output)  # raises for an id of another stage
    assert codes.nested and codes.lengths.min() >= 6
    text = model.generate(**inputs, max_new_tokens=4)
    assert not v.is_visual(text[:, inputs["input_ids"].shape[1] :]).any()
    photo = torch.randint(256, (3, 32, 32), generator=generator(), dtype=torch.uint8)
    ids = processor(images=[photo], text="<image>")["input_ids"]
    assert 1 <= int(v.is_code(ids).sum()) <= MOST
    own = visual.encode(photo[None]).truncate(MOST)
    assert processor.image_codes(ids).to_list() == own.to_list()


def test_images_of_prompts_have_as_many_codes_as_the_objective_says(
    visual: VisualTokenizer, parts: Any, tmp_path: Path
) -> None:
    photo = torch.randint(256, (3, 32, 32), generator=generator(), dtype=torch.uint8)
    objective = LaVIT(prompt_codes=5)
    lm = MultimodalLM(parts[1], parts[0], visual, None, objective)
    expected = visual.encode(photo[None], budget=5)[0]
    assert torch.equal(lm.prompts.segment(photo).codes, expected)
    lm.export(tmp_path / "lm", format="multimodal")
    auto = AutoProcessor.from_pretrained(tmp_path / "lm")
    ids = auto(images=[photo], text="<image>")["input_ids"]
    assert auto.image_codes(ids)[0].tolist() == expected.tolist()
    ids = auto(images=[photo], text="<image>", budget=2)["input_ids"]
    assert auto.image_codes(ids)[0].tolist() == expected[:2].tolist()
    more = MultimodalLM(parts[1], parts[0], visual, None, LaVIT(prompt_codes=300))
    assert len(more.prompts.segment(photo).codes) == 16, "at most all"
    with pytest.raises(ValueError, match="prompt_codes: expected an integer in 1"):
        LaVIT(prompt_codes=0)


def test_a_plain_export_has_the_same_ids(parts: Any, tmp_path: Path) -> None:
    processor, model = parts
    export(model.lm, processor.text_tokenizer, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    v = VisualVocabulary.from_tokenizer(tokenizer)
    assert v == processor.vocabulary
    ids = v.to_ids(torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])).tolist()
    image = tokenizer.decode([v.begin, *ids, v.end])
    assert tokenizer(image).input_ids[-10:] == [v.begin, *ids, v.end]
    found = re.fullmatch(r"<\|img\|>(.*)", image)
    assert found and re.fullmatch(v.pattern(1, MOST), found[1])
    assert "index the table of their stage" in (tmp_path / "plain" / "README.md").read_text()
