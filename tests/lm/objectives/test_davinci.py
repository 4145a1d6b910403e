"""DaVinci: prefixes of images and words, by a causal LM and by an encoder-decoder."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lm_parts import losses as losses_of
from helpers.lm_runs import (
    CAPTIONS,
    SMALL,
    SMALL_BART,
    data,
    module,
    shards_of_all_patches,
    trainer,
)
from helpers.small_lms import small_tokenizer
from helpers.small_nested import small_tokenizer as nested_tokenizer
from PIL import Image

from lavit_lm import MultimodalLM
from lavit_lm.generation.beam_search import beam_search
from lavit_lm.generation.rerank import rerank
from lavit_lm.generation.sampling import GenerationConstraint, Sampling, generate_ids
from lavit_lm.models.encoder_decoder import PrefixSeq2Seq
from lavit_lm.models.loading import load_lm, sequence_model
from lavit_lm.objectives.davinci import DaVinci
from lavit_lm.objectives.davinci.codes_below import LATER, codes_below
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.masks import attention_mask
from lavit_lm.sequences.packing import PackedBatch, pack, pad
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.training.log_samples import LogSamples
from lavit_lm.training.sampler import segment_length
from lavit_lm.vision.patch_vectors import PatchBridge
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary
from lavit_tok import VisualCodes, VisualTokenizer

PATCHES = 16
T5: dict[str, Any] = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64}
T5 |= {"num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
LMS: dict[str, dict[str, Any]] = {"llama": SMALL, "t5": T5, "bart": SMALL_BART}
EACH = pytest.mark.parametrize("family", LMS)


def processor(stages: int = 0) -> MultimodalProcessor:
    tokenizer = small_tokenizer("llama")
    VisualVocabulary.extend(tokenizer, None, 16, stages=stages)
    return MultimodalProcessor.from_tokenizer(tokenizer)


def built(
    family: str, visual: VisualTokenizer, objective: DaVinci | None = None
) -> tuple[MultimodalProcessor, Any]:
    objective = objective or DaVinci()
    words = processor(stages=5 if objective.nested else 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bridge, _ = objective.connectors.build(visual, 32)
    config = {**LMS[family], "tie_word_embeddings": True}
    lm = load_lm(config, words, words.vocabulary.begin, True, 0)
    restricted = words.vocabulary if objective.restricted_softmax else None
    return words, sequence_model(lm, bridge, restricted=restricted).eval()


def overfitted(
    model: Any, objective: DaVinci, batch: PackedBatch, family: str, below: float = 0.1
) -> dict[str, Any]:
    """The losses of a batch after training on it until their total is below a number."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2 if family == "llama" else 5e-3)
    for _ in range(500):
        losses = losses_of(model, objective, batch)
        loss = objective.total(losses)
        if loss < below:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < below
    return losses


def shown(visual: VisualTokenizer, source: Any) -> ImageSegment:
    pixels = visual.image_processor.to_uint8(source)
    codes = visual.encode(pixels, budget=PATCHES)
    assert codes.keep is not None
    return ImageSegment(codes[0], pixels[0], codes.keep[0])


def rows_of(
    objective: DaVinci, samples: list[list[Segment]], words: MultimodalProcessor, seed: int = 0
) -> list[TokenSequence]:
    return [
        objective.layout(s, words, torch.Generator().manual_seed(seed + i), str(i))
        for i, s in enumerate(samples)
    ]


def only(task: str, **more: Any) -> DaVinci:
    shares = {f"{name}_ratio": float(name == task) for name in ("text", "image", "plain")}
    return DaVinci(**{"prompt_drop": 0.0, **shares, **more})


def drawn(sequence: TokenSequence, words: MultimodalProcessor) -> str:
    """As in davinci.py's docstring."""
    v, text_of = words.vocabulary, words.text_tokenizer.decode
    names = {words.start[0]: "<s>", words.stop: "</s>", v.begin: "<img>", v.end: "</img>"}
    names[LATER] = "later"

    def name_of(token: int) -> str:
        code = v.first <= token < v.stop
        return (
            str((token - v.first) % v.codebook_size)
            if code
            else names.get(token) or text_of([token]).strip()
        )

    shown: list[str] = []
    flags = zip(sequence.ids.tolist(), sequence.prefix, sequence.is_embedding, strict=True)
    for i, (token, prefix, is_embedding) in enumerate(flags):
        shown += ["|"] if not prefix and sequence.prefix[i - 1] else []
        shown.append("v" if is_embedding else name_of(token))
    text = " ".join(shown)
    for word in ("red", "apple", "what", "color"):
        text = text.replace(" ".join(text_of([i]).strip() for i in words.text(word)), word)
    return text


def marks(sequence: TokenSequence) -> str:
    return "".join(
        "P" if prefix else ("x" if generated else ".")
        for prefix, generated in zip(sequence.prefix, sequence.predict, strict=True)
    )


def a_generator_for(
    objective: DaVinci, sample: list[Segment], words: MultimodalProcessor, wanted: Any
) -> TokenSequence:
    """The first seed's sequence that has the property."""
    for seed in itertools.count():
        sequence = objective.layout(sample, words, torch.Generator().manual_seed(seed))
        if wanted(sequence):
            return sequence
    raise AssertionError


def batch_of(
    objective: DaVinci, batch: PackedBatch, visual: VisualTokenizer, words: MultimodalProcessor
) -> PackedBatch:
    return objective.connectors.complete_batch(batch, visual, words)


def test_the_drawing(photos: list[Path]):
    """Of the module's docstring: a image of 3 x 3 patches, whose codes are 0 to 8."""
    words, pixels = processor(), torch.zeros(3, 24, 24, dtype=torch.uint8)
    image = ImageSegment(torch.arange(9), pixels, torch.ones(9, dtype=torch.bool))
    pair: list[Segment] = [image, TextSegment("A red apple")]
    ids = {n: len(words.text(n)) for n in ("a", "red", "apple", "a red")}

    def prefix_of(count: int) -> Any:
        return lambda sequence: int(sequence.prefix.sum()) == count

    sequence = a_generator_for(only("text"), pair, words, prefix_of(12 + ids["a"]))
    page = sys.modules[DaVinci.__module__].__doc__ or ""
    assert drawn(sequence, words) == "<s> <img> v v v v v v v v v </img> a | <s> red apple </s>"
    assert f"id       {drawn(sequence, words)}\n" in page
    assert marks(sequence) == "P" * 13 + "." + "x" * (ids["red"] + ids["apple"] + 1)
    upper_row = lambda sequence: int(sequence.is_embedding.sum()) == 3  # noqa: E731
    sequence = a_generator_for(only("image"), pair, words, upper_row)
    assert drawn(sequence, words) == "<s> <img> v v v </img> a red apple | <img>" + " later" * 6
    assert marks(sequence).lstrip("P") == ".xxxxxx"
    assert sequence.roles[-7:].tolist() == [Role.BEGIN] + [Role.VISUAL] * 6
    (sequence,) = rows_of(only("image", image_prefix=False), [pair], words)
    assert drawn(sequence, words) == "<s> a red apple | <img> 0 1 2 3 4 5 6 7 8"
    assert marks(sequence).lstrip("P") == "." + "x" * 9 and not sequence.image_segments
    sequence = a_generator_for(only("plain"), pair, words, prefix_of(1 + ids["a red"]))
    assert drawn(sequence, words) == "<s> a red | <s> apple </s>" and not sequence.image_segments
    asked = [*pair[:1], TextSegment("what color", False), TextSegment("red")]
    (sequence,) = rows_of(DaVinci(), [asked], words)
    assert f"id       {drawn(sequence, words)}\n" in page
    assert marks(sequence).lstrip("P") == "." + "x" * (ids["red"] + 1)
    image = ImageSegment(torch.arange(3), pixels, torch.arange(9) < 3)
    nested = only("image", image_prefix=False, nested_vectors=1)
    words = processor(stages=5)
    (sequence,) = rows_of(nested, [[image, TextSegment("A red apple")]], words)
    assert f"id       {drawn(sequence, words)}\n" in page
    assert marks(sequence).lstrip("P") == ".xxxx" and sequence.roles[-1] == Role.END


@EACH
def test_davinci_01_attention(family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    """Every pair of positions of two documents in one block, by gradients."""
    words, model = built(family, tiny_tokenizer)
    first: list[Segment] = [shown(tiny_tokenizer, photos[0]), TextSegment("a red apple")]
    sequences = rows_of(only("text"), [first, [TextSegment("two dogs run")]], words, 5)
    batch = pack([sequences], sum(map(len, sequences)) + 2, words.pad)
    embedded = model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
    inputs = embedded.detach().requires_grad_()

    def depends(states: torch.Tensor) -> torch.Tensor:
        """True where a state's gradient reaches an input; of a random projection, since the
        gradient of a norm is 0 along a uniform state.
        """
        weights = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
        grads = [torch.autograd.grad(s @ weights, inputs, retain_graph=True)[0] for s in states[0]]
        return torch.stack([one[0].abs().sum(1) for one in grads]) > 0

    expected = attention_mask(batch.documents, batch.prefix)[0]
    prefix, there = batch.prefix[0], batch.documents[0] >= 0
    suffix = there & ~prefix
    output = depends(model.hidden_states(inputs, batch))
    if family == "llama":
        assert torch.equal(output[there], expected[there])
    else:
        assert torch.equal(output[suffix], expected[suffix]), "nothing is lost, nothing leaks"
        assert not output[prefix].any(), "the decoder has no output at prefixes"
        for document in (0, 1):  # each is a sequence of the encoder, without its suffix
            own = prefix & (batch.documents[0] == document)
            everywhere = torch.ones(1, int(own.sum()), dtype=torch.bool)
            read = depends(model.encode(inputs[:, own], everywhere))
            assert torch.equal(read, own.expand_as(read))
    begin, end = prefix.nonzero()[0], (prefix & (batch.documents[0] == 0)).nonzero()[-1]
    assert expected[begin, end] and expected[end, begin], "prefix to prefix, both ways"
    assert expected[suffix][:, begin].any() and not expected[prefix][:, suffix].any()


@EACH
def test_davinci_02_one_objective_for_both(
    family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    """The same sequences; packed as alone; and an encoder-decoder's losses are those of its own
    forward.
    """
    objective = DaVinci(plain_ratio=1.0, train_encoder=family == "bart")
    words, model = built(family, tiny_tokenizer, objective)
    samples: list[list[Segment]] = [
        [shown(tiny_tokenizer, photos[i % 4]), TextSegment(CAPTIONS[i % 4])]
        if i % 4
        else [TextSegment(CAPTIONS[i % 3])]
        for i in range(16)
    ]
    sequences = rows_of(objective, samples, words)

    def task(sequence: TokenSequence) -> str:
        if sequence.roles[sequence.predict][0] != Role.TEXT:
            return "image"
        return "text" if sequence.is_embedding.any() else "plain"

    blocks = pack([sequences[:7], sequences[7:]], 256, words.pad)
    together = losses_of(model, objective, batch_of(objective, blocks, tiny_tokenizer, words))
    counts: Counter[str] = Counter()
    for sequence in sequences:
        visual = sequence.predict & (sequence.roles == Role.VISUAL)
        kind = task(sequence)
        counts[kind] += int((visual if kind == "image" else sequence.predict).sum())
    assert {name: int(loss.count) for name, loss in together.items()} == counts
    padded = [pad([sequence], words.pad) for sequence in sequences]
    singles = [batch_of(objective, one, tiny_tokenizer, words) for one in padded]
    alone = [losses_of(model, objective, one) for one in singles]
    for name, loss in together.items():
        total = torch.stack([one[name].total for one in alone]).sum()
        torch.testing.assert_close(loss.total, total, rtol=1e-4, atol=1e-3)
        assert int(loss.count) > 0
    total = objective.total(together)
    total.backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, "processes that share gradients would wait for these"
    torch.testing.assert_close(total, sum(loss.mean for loss in together.values()))
    for one in singles[:4] if family != "llama" else ():
        assert isinstance(model, PrefixSeq2Seq)
        prefix = one.prefix[0]
        inputs = model.embed(one.ids, one.is_embedding, one.images, one.keep)
        both = {"inputs_embeds": inputs[:, prefix], "decoder_inputs_embeds": inputs[:, ~prefix]}
        ours, theirs = model.head(model(one).hidden_states[0, ~prefix]), model.lm(**both).logits[0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_davinci_02_what_an_encoder_decoder_cannot_split(
    tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    words, model = built("t5", tiny_tokenizer)
    without = LaVIT().layout([TextSegment("rain")], words, torch.Generator())
    with pytest.raises(ValueError, match="which objectives without prefixes do not lay out"):
        losses_of(model, LaVIT(), pad([without], words.pad))
    sequence, long = rows_of(
        only("plain"), [[TextSegment("rain")], [TextSegment("rain " * 400)]], words
    )
    early = replace(sequence, predict=~sequence.prefix)
    with pytest.raises(ValueError, match="lay out a start"):
        losses_of(model, DaVinci(), pad([early], words.pad))
    other = replace(sequence, prefix=torch.arange(len(sequence)) < 2)
    with pytest.raises(ValueError, match="suffixes of one length"):
        model.start_decoding([sequence, other], words.pad, 4)
    with pytest.raises(ValueError, match="families t5, bart"):
        sequence_model(load_lm({**T5, "model_type": "mt5"}, words, words.vocabulary.begin, True, 0))
    causal_only = {"restricted": words.vocabulary, "vector_noise": 1.0}
    for name, value in causal_only.items():
        with pytest.raises(ValueError, match=f"{name}.*: expected a causal LM"):
            sequence_model(model.lm, **{name: value})
    _, bart = built("bart", tiny_tokenizer)
    with pytest.raises(ValueError, match="exceeds the model's context of 128"):
        bart(pad([long], words.pad))


def test_davinci_03_samplers(tiny_tokenizer: VisualTokenizer):
    """Support and evenness of k and r; draws of one cell differ from even by less than 5
    deviations.
    """
    words = processor()
    assert len(words.text("a a a")) == 3, "a word is an id here"
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    sides = {4: PATCHES, 16: 256}
    images = {
        side: ImageSegment(torch.zeros(n, dtype=torch.int64), lambda: pixels, torch.ones(n) > 0)
        for side, n in sides.items()
    }

    def even(
        objective: DaVinci, sample: list[Segment], of: Any, draws: int, cells: dict[int, float]
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        found = Counter(int(of(objective.layout(sample, words, generator))) for _ in range(draws))
        assert set(found) == set(cells), "exactly these"
        for cell, ratio in cells.items():
            deviation = (draws * ratio * (1 - ratio)) ** 0.5
            assert abs(found[cell] - draws * ratio) < 5 * deviation + 1e-9, cell

    def k(sequence: TokenSequence) -> int:
        return int((sequence.prefix & (sequence.roles == Role.TEXT)).sum()) - 1

    def task(sequence: TokenSequence) -> int:
        visual = bool((sequence.roles == Role.VISUAL).any())
        return 2 * bool(sequence.is_embedding.any()) + visual

    pair, many = [images[4], TextSegment("a a a a a")], [images[4], TextSegment("a " * 50)]
    even(only("text"), pair, k, 500, dict.fromkeys(range(5), 1 / 5))
    even(only("text"), many, k, 1000, dict.fromkeys(range(30), 1 / 30))
    longer = {**dict.fromkeys(range(30), 1 / 40), 30: 10 / 40}
    even(only("text", caption_length=40), many, k, 1000, longer)
    plain = {**dict.fromkeys(range(96), 1 / 120), 96: 24 / 120}
    even(DaVinci(), [TextSegment("a " * 120)], k, 1500, plain)
    even(DaVinci(), [TextSegment("")], k, 20, {0: 1.0})
    for side, n in sides.items():
        sample = [images[side], TextSegment("a")]
        rows = lambda sequence, side=side: sequence.is_embedding.sum() / side  # noqa: E731
        even(only("image"), sample, rows, 1000, dict.fromkeys(range(side - 1), 1 / (side - 1)))
        (sequence,) = rows_of(only("image", image_prefix=False), [sample], words)
        assert int(sequence.predict.sum()) == n, "r = 0: the whole image"
        assert not sequence.is_embedding.any()
    dropped = only("image", image_prefix=False, prompt_drop=0.25)
    even(dropped, pair, lambda sequence: k(sequence) == 0, 500, {0: 0.75, 1: 0.25})
    ratios = DaVinci(text_ratio=1.0, image_ratio=2.0, plain_ratio=1.0, image_prefix=False)
    even(ratios, pair, task, 500, {0: 1 / 4, 1: 1 / 2, 3: 1 / 4})


@EACH
def test_davinci_04_text_loss(family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    objective = only("text")
    words, model = built(family, tiny_tokenizer, objective)
    pair = [shown(tiny_tokenizer, photos[0]), TextSegment("A red apple on a wooden table")]
    (sequence,) = rows_of(objective, [pair], words, 3)
    batch = pad([sequence], words.pad)
    output = model(batch)
    output.inputs_embeds.retain_grad()
    losses = objective.losses(output, batch)
    losses["text"].mean.backward()
    reached = output.inputs_embeds.grad[batch.is_embedding].abs().sum(1) > 0
    assert len(reached) == PATCHES and reached.all(), "every patch matters"
    assert (model.bridge.positions.grad.abs().sum(1) > 0).all()
    assert int(losses["text"].count) == int((~sequence.prefix).sum()) - 1
    assert not (sequence.predict & sequence.prefix).any()
    *generated, last = sequence.ids[sequence.predict].tolist()
    text = words.text_tokenizer.decode(generated).strip()
    assert last == words.stop and text in "a red apple on a wooden table"


def test_davinci_05_image_targets(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    words, objective = processor(), only("image")
    images = [shown(tiny_tokenizer, photo) for photo in photos]
    above = (0, 1, 2, 2)  # rows of patches that are given
    sequences = []
    for image, r in zip(images, above, strict=True):
        wanted = lambda sequence, r=r: int(sequence.is_embedding.sum()) == 4 * r  # noqa: E731
        sequences.append(a_generator_for(objective, [image, TextSegment("rain")], words, wanted))
    assert (sequences[1].ids[sequences[1].predict] == LATER).all()
    assert not (sequences[0].ids == LATER).any()
    blocks = pack([sequences[:3], sequences[3:]], 80, words.pad)
    batch = batch_of(objective, blocks, tiny_tokenizer, words)
    positions = batch.predict & (batch.roles == Role.VISUAL)
    generated = [batch.ids[0][positions[0] & (batch.documents[0] == d)] for d in range(3)]
    generated.append(batch.ids[1][positions[1]])
    assert [len(ids) for ids in generated] == [(4 - r) * 4 for r in above]
    assert words.vocabulary.is_code(torch.cat(generated)).all()
    codes = [words.vocabulary.to_codes(ids) for ids in generated]
    assert torch.equal(codes[0], images[0].codes)
    differ = 0
    for image, own, r in zip(images[1:], codes[1:], above[1:], strict=True):
        moved = torch.zeros(1, 3, 32, 32)
        moved[:, :, : 32 - 8 * r] = tiny_tokenizer.preprocess(image.image)[:, :, 8 * r :]
        crop = tiny_tokenizer.encode_pixels(moved, PATCHES)[0]
        assert torch.equal(own, crop[: len(own)]), "the crop, encoded"
        differ += int((own != image.codes[4 * r :]).sum())
    assert differ > 0, "and not the codes of the whole image, cut"
    changed, below = images[2].image.clone(), images[2].image.clone()
    changed[:, :16], below[:, 16:] = 0, 0
    masks = torch.stack([torch.arange(PATCHES) < 8] * 2)
    found = codes_below(tiny_tokenizer, torch.stack([images[2].image, changed]), masks)
    assert torch.equal(found[:8], found[8:]), "independent of the rows above"
    vectors = PatchBridge(tiny_tokenizer, 32)(torch.stack([images[2].image, below]), masks)
    assert vectors.shape == (16, 32)
    assert torch.equal(vectors[:8], vectors[8:]), "independent of the rows below"
    with pytest.raises(ValueError, match="whole upper lines of 4 patches"):
        codes_below(tiny_tokenizer, images[2].image[None], torch.arange(PATCHES)[None] < 6)
    words, model = built("llama", tiny_tokenizer)
    with pytest.raises(IndexError):  # a batch without its codes cannot be trained on by mistake
        model(pack([sequences[1:3]], 80, words.pad))


@pytest.fixture
def whole(folder: Path) -> Path:
    """The shared folder, its shards with a code for every patch."""
    shards_of_all_patches(folder, folder / "visual")
    return folder


@EACH
def test_davinci_06_the_tied_matrix_is_trained_once(family: str, whole: Path, photos: list[Path]):
    """Through the module, three steps from shards; saved, loaded, and the same."""
    settings = {**LMS[family], "tie_word_embeddings": True}
    texts = whole / "texts.jsonl"
    texts.write_text("\n".join('{"text": "rain and rain"}' for _ in range(12)))
    objective = DaVinci(train_encoder=family == "bart")
    training = module(whole, lm=settings, objective=objective, out=str(whole / "made"))
    fitted = trainer(whole, 3, [LogSamples(every=2, images=2, decoder=None, max_new_tokens=4)])
    images = {"images": str(whole / "pictures"), "texts": str(texts), "num_workers": 2}
    fitted.fit(training, data(whole, **images))
    assert {"train/text", "train/image", "train/plain"} <= set(fitted.callback_metrics)
    assert list(whole.rglob("captions-*.md")), "and what it says was logged"
    held = [id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in training.parameters())
    lm = training.model.lm
    assert held.count(id(lm.get_input_embeddings().weight)) == 1
    tables = [p for p in training.parameters() if p.shape == lm.get_input_embeddings().weight.shape]
    assert len(tables) == 1, "encoder, decoder and head read one matrix"
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    made = MultimodalLM.from_pretrained(whole / "made", decoder=None)
    assert type(made.model) is type(training.model) and made.objective == objective
    ours = MultimodalLM(training.model, training.processor, training.visual, None, objective)
    assert made.caption(str(photos[0]), 6) == ours.caption(str(photos[0]), 6)
    draw = {"generator": torch.Generator().manual_seed(0)}
    assert made.generate_codes("rain", **draw).lengths.tolist() == [PATCHES]


def test_davinci_06_shards_with_fewer_codes_are_refused(folder: Path):
    training = module(folder, objective=DaVinci())
    expected = r"has codes of \d+ of 16 patches: create the shards with .* --budget 16`"
    with pytest.raises(ValueError, match=expected):
        trainer(folder, 1, []).fit(training, data(folder, images=str(folder / "pictures")))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("task", ["text", "image", "whole image", "plain"])
def test_davinci_07_eight_samples_are_overfitted(
    family: str, task: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    objective = only(task.split()[-1], image_prefix=task == "image")
    words, model = built(family, tiny_tokenizer, objective)
    texts = ["rain", "a red", "two dogs", "apple at sunset", "the town", "table", "run", "beach"]
    samples: list[list[Segment]] = []
    for i, text in enumerate(texts):
        crop = Image.open(photos[i % 4]).convert("RGB").crop((0, 0, 90 + 60 * i, 80 + 50 * i))
        samples.append([shown(tiny_tokenizer, crop), TextSegment(text)])
    sequences = rows_of(objective, samples, words)
    if task == "plain":  # only what follows from the prefix can be learned: each text twice
        given = lambda sequence: int(sequence.prefix.sum()) > 1  # noqa: E731
        twice = [TextSegment(f"{text} {text}") for text in texts]
        sequences = [a_generator_for(objective, [text], words, given) for text in twice]
    batch = batch_of(objective, pad(sequences, words.pad), tiny_tokenizer, words)
    losses = overfitted(model, objective, batch, family)
    assert [name for name, one in losses.items() if one.count > 0] == [task.split()[-1]]


@EACH
def test_davinci_07_empty_prefixes_and_texts(
    family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    words, model = built(family, tiny_tokenizer)
    image = shown(tiny_tokenizer, photos[0])
    cases: list[tuple[DaVinci, list[Segment], int]] = [
        (only("plain"), [TextSegment("")], 1),
        (only("text"), [image, TextSegment("")], 1),
        (only("image", image_prefix=False), [image, TextSegment("")], PATCHES),
        (only("text", image_prefix=False), [image], PATCHES),  # a image without words is generated
        (only("plain", text_prefix=0), [TextSegment("rain")], len(words.text("rain")) + 1),
        (only("text", caption_length=0), [image, TextSegment("rain")], 1),
    ]
    for objective, sample, targets in cases:
        (sequence,) = rows_of(objective, [sample], words)
        assert sequence.prefix.any() and int(sequence.predict.sum()) == targets
        loss = objective.total(losses_of(model, objective, pad([sequence], words.pad)))
        assert bool(loss.isfinite())
        loss.backward()
    for sample in ([], [image, image], [image, TextSegment("a"), image]):
        with pytest.raises(ValueError, match="expected an image, a text, one of each, or a doc"):
            DaVinci().layout(sample, words, torch.Generator())
    with pytest.raises(ValueError, match="a text at the end, got an image"):
        DaVinci().layout([TextSegment("a"), TextSegment("b"), image], words, torch.Generator())
    with pytest.raises(ValueError, match="has only the codes of one"):
        only("text").layout([ImageSegment(image.codes), TextSegment("a")], words, torch.Generator())
    for wrong, message in (
        ({"text_weight": -1.0}, "text_weight: expected a number in 0"),
        ({"text_ratio": 0.0, "image_ratio": 0.0}, "a ratio above 0"),
        ({"prompt_drop": 2.0}, "a probability"),
        ({"caption_length": -1}, "caption_length: expected a number in 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DaVinci(**wrong)  # type: ignore[arg-type]


@pytest.fixture(params=LMS)
def lm(request: Any, tiny_tokenizer: VisualTokenizer, tiny_decoder: Any) -> MultimodalLM:
    words, model = built(request.param, tiny_tokenizer)
    tiny_decoder.set_progress_bar_config(disable=True)
    return MultimodalLM(model, words, tiny_tokenizer, tiny_decoder, DaVinci())


def test_davinci_08_an_image_is_a_fixed_number_of_codes(lm: MultimodalLM, photos: list[Path]):
    """Also of a model to which text, or the end of the image, is more probable."""
    v, begin = lm.processor.vocabulary, lm.processor.start
    with torch.no_grad():
        lm.model.causal.get_output_embeddings().weight[: v.first] *= 20
    generator = torch.Generator().manual_seed(0)
    codes = lm.generate_codes("A red apple", 3, generator=generator, temperature=3.0)
    assert codes.lengths.tolist() == [PATCHES] * 3 and codes.codebook_size == 16
    sequence = lm.prompts.for_image("A red apple")
    assert sequence.ids.tolist() == [*begin, *lm.processor.text("a red apple"), v.begin]
    with pytest.raises(ValueError, match="davinci generates images from text only"):
        lm.generate_codes([photos[0], "a red apple"])
    for cached in (True, False):
        greedy = lm.generate_codes("rain", 1, temperature=0.0, use_cache=cached, guidance_scale=2.0)
        assert greedy[0].tolist() == by_hand(lm, "rain", 2.0)


@torch.no_grad()
def by_hand(lm: MultimodalLM, prompt: str, scale: float) -> list[int]:
    """Greedy codes under guidance, one full forward for each."""
    v, generated = lm.processor.vocabulary, []
    streams = [lm.prompts.sequence(text, "image") for text in (prompt, "")]
    while len(generated) < PATCHES:
        logits = []
        for sequence in streams:
            more = len(sequence) + len(generated)
            none, new = torch.zeros(more) > 0, torch.zeros(len(generated)) > 0
            longer = replace(
                sequence,
                ids=torch.cat([sequence.ids, torch.tensor(generated, dtype=torch.int64)]),
                roles=torch.zeros(more, dtype=torch.int8),
                prefix=torch.cat([sequence.prefix, new]),
                is_embedding=torch.cat([sequence.is_embedding, new]),
                predict=none,
                regress=none,
            )
            batch = pad([longer], lm.processor.pad)
            logits.append(lm.model.head(lm.model(batch).hidden_states[0, -1:])[0])
        guided = logits[1] + scale * (logits[0] - logits[1])
        generated.append(v.first + int(guided[v.first : v.stop].argmax()))
    return [token - v.first for token in generated]


@torch.no_grad()
def test_davinci_08_ranking_is_exhaustive_scoring(lm: MultimodalLM, photos: list[Path]):
    answers = ["Rain", "a red apple", "two dogs run"]
    found = lm.rank([photos[0], "What is it?"], answers)
    sequence = lm.prompts.sequence([photos[0], "what is it?"], "text")
    for text, nats in zip(answers, found.tolist(), strict=True):
        ids = torch.tensor([*lm.processor.text(text.lower()), lm.processor.stop])
        state = lm.model.start_decoding([sequence], lm.processor.pad, 60, use_cache=False)
        log_p, hidden = 0.0, state.prefill()
        for token in ids:
            log_p += float(lm.model.head(hidden).float().log_softmax(-1)[0, token])
            hidden = state.append_ids(token[None])
        assert abs(nats - log_p) < 1e-3
    assert lm.rank("a red apple", photos[:2]).shape == (2,), "pictures by words"
    with pytest.raises(ValueError, match="has only the codes of one"):
        lm.rank([VisualCodes.from_list([[1] * PATCHES], codebook_size=16)], answers)


def test_davinci_08_rerank_picks_the_scorer_s_best(lm: MultimodalLM):
    generator = torch.Generator().manual_seed(0)
    images = lm.generate_images("rain", 3, generator=generator, num_inference_steps=1)

    def light(given: Any) -> list[float]:
        return [float(np.asarray(image).mean()) for image in given]

    def likely(given: Any) -> list[float]:
        return [float(lm.rank([image], ["rain"])) for image in given]

    (best,) = rerank(images, light)
    assert best is max(images, key=lambda image: light([image])) and len(set(light(images))) == 3
    scores = likely(rerank(images, likely, best=3))
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    with pytest.raises(ValueError, match="a number for each of 3 images"):
        rerank(images, lambda given: [1.0])
    with pytest.raises(ValueError, match="best: expected 1 to"):
        rerank(images, lambda given: [1.0], best=0)


def test_captions_answers_and_completion(lm: MultimodalLM, photos: list[Path]):
    captions = lm.caption([str(photo) for photo in photos[:3]], 6)
    assert len(captions) == 3 and captions[1] == lm.caption(str(photos[1]), 6)
    sequence = lm.prompts.sequence([photos[0], "a picture of"], "text")
    start = [*lm.processor.start, *lm.processor.text("a picture of")]
    assert sequence.ids[~sequence.prefix].tolist() == start
    assert int(sequence.is_embedding.sum()) == PATCHES
    asked = lm.prompts.sequence([photos[0], "What IS it?"], "text")
    assert asked.ids[~asked.prefix].tolist() == lm.processor.start, "a question is in the prefix"
    assert isinstance(lm.answer(str(photos[0]), "What is it?", max_new_tokens=4), str)
    generated = lm.complete(["a red", photos[0]], 5, max_images=0)
    assert len(generated) <= 1 and all(isinstance(part, str) for part in generated)
    with pytest.raises(ValueError, match="davinci is not trained to generate the token that begi"):
        lm.complete("a red")
    with pytest.raises(ValueError, match="generates codes for images, no vectors"):
        lm.generate_vectors_batch(["a red apple"])
    assert len(lm.generate_images("a red apple", 1, num_inference_steps=1)) == 1


def test_beams_find_the_most_probable(lm: MultimodalLM, photos: list[Path]):
    """Against all texts of up to two words of a small vocabulary; one beam is greedy."""
    model, stop, pad_id = lm.model, lm.processor.stop, lm.processor.pad
    sequences = [lm.prompts.sequence([photo, "a picture of"], "text") for photo in photos[:2]]
    rule = GenerationConstraint("text", 1, 5)
    greedy = generate_ids(model, lm.processor, sequences, rule, Sampling(temperature=0.0))
    ended = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in greedy]
    assert beam_search(model, lm.processor, sequences, rule, 1) == ended
    two = GenerationConstraint("text", 1, 2)
    wide = beam_search(model, lm.processor, sequences, two, 400, 0.0)
    size = model.head(torch.zeros(1, 32)).shape[1]
    (allowed,) = GenerationConstraint("text").content_masks(lm.processor, size, lm.device)
    ids, may = allowed.nonzero().flatten(), allowed.clone()
    may[stop] = True
    for sequence, found in zip(sequences, wide, strict=True):
        with torch.no_grad():
            first = model.head(model.start_decoding([sequence], pad_id, 4).prefill())[0]
            first = first.masked_fill(~allowed, -torch.inf).log_softmax(0)
            state = model.start_decoding([sequence] * len(ids), pad_id, 4)
            state.prefill()
            second = model.head(state.append_ids(ids)).masked_fill(~may, -torch.inf)
        both = first[ids][:, None] + second.log_softmax(1)
        score, position = both.flatten().max(0)
        best = [int(ids[int(position) // both.shape[1]]), int(position) % both.shape[1]]
        assert found == best, score
    cached = beam_search(model, lm.processor, sequences, rule, 3)
    assert cached == beam_search(model, lm.processor, sequences, rule, 3, use_cache=False)
    together = lm.caption([photos[0], photos[1]], 5, num_beams=3)
    assert lm.caption(photos[0], 5, num_beams=3) == together[0]
    with pytest.raises(ValueError, match="beam search does not sample"):
        lm.caption(photos[0], num_beams=2, temperature=1.0)


def test_an_encoder_is_trained_with_the_rest(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    """A copy; what no feature depends on stays frozen, and so does the tokenizer's own."""
    bridge = PatchBridge(tiny_tokenizer, 32, train_encoder=True)
    images = tiny_tokenizer.image_processor.to_uint8(photos)
    bridge(images, torch.ones(len(images), PATCHES) > 0).square().sum().backward()
    trained = {name: p for name, p in bridge.named_parameters() if p.requires_grad}
    still = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
    assert len(trained) > 30 and all(name.endswith("k_proj.bias") for name in still)
    unread = {f"encoder.model.post_layernorm.{name}" for name in ("weight", "bias")}
    assert {name for name, _ in bridge.named_parameters()} - set(trained) == unread
    assert all(not p.requires_grad and p.grad is None for p in tiny_tokenizer.encoder.parameters())
    assert not tiny_tokenizer.features(tiny_tokenizer.preprocess(images)).requires_grad


def test_a_convolutional_encoder_is_trained_too(nested_visual: VisualTokenizer, photos: list[Path]):
    bridge = PatchBridge(nested_visual, 32, train_encoder=True, vectors=4)
    images = nested_visual.image_processor.to_uint8(photos[:2])
    bridge(images, torch.ones(2, 4) > 0).square().sum().backward()
    own = [p for p in bridge.encoder.parameters() if p.requires_grad]
    assert len(own) > 10 and all(p.grad is not None for p in own)
    assert not nested_visual.features(nested_visual.preprocess(images)).requires_grad


def test_positions_of_a_suffix_restart_in_the_decoder(tiny_tokenizer: VisualTokenizer):
    """An encoder-decoder's state does not depend on where in a block its document is."""
    words, model = built("bart", tiny_tokenizer)
    texts = [[TextSegment("two dogs run")], [TextSegment("a red apple on a table")]]
    first, second = rows_of(only("plain"), texts, words)
    states = model(pack([[first, second]], 64, words.pad)).hidden_states[0]
    alone = model(pad([second], words.pad)).hidden_states[0]
    own = states[len(first) : len(first) + len(second)]
    torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def nested_visual() -> VisualTokenizer:
    return nested_tokenizer()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nested_codes_are_learned_and_generated(
    family: str, nested_visual: VisualTokenizer, photos: list[Path]
):
    """Any number of codes; images are read as 4 vectors of 4 patches each."""
    objective = DaVinci(
        image_prefix=False, nested_vectors=4, restricted_softmax=family == "llama", prompt_drop=0.0
    )
    words, model = built(family, nested_visual, objective)
    model.train()
    texts, samples = ["rain", "a red", "two dogs"], []
    for i, text in enumerate(texts):
        pixels = nested_visual.image_processor.to_uint8(photos[i])
        codes = nested_visual.encode(pixels, budget=3 + 2 * i)
        samples.append([ImageSegment(codes[0], pixels[0], codes.keep[0]), TextSegment(text)])
    tasks = objective, replace(objective, text_ratio=0.0), replace(objective, image_ratio=0.0)
    for seed, one in itertools.product(range(5), tasks):
        for i, sequence in enumerate(rows_of(one, samples, words, seed)):
            lengths = [segment_length(segment, words) for segment in samples[i]]
            draw = torch.Generator().manual_seed(seed + i)
            assert one.sequence_length(lengths, words, draw) == len(sequence)
    sequences = [
        *rows_of(tasks[1], samples, words),
        *rows_of(replace(tasks[2], caption_prefix=0), samples, words),
    ]
    batch = pad(sequences, words.pad)
    assert batch.keep.shape == (3, 4) and int(batch.is_embedding.sum()) == 12
    overfitted(model, objective, batch, family)
    made = MultimodalLM(model.eval(), words, nested_visual, None, objective)
    for text, (image, _) in zip(texts, samples, strict=True):
        codes = made.generate_codes(text, 1, temperature=0.0)
        assert torch.equal(codes[0], image.codes), "as many codes as the image has"
        assert made.rank(text, [codes, codes.truncate(2)]).argmax() == 0, "it ends there"


def test_vectors_are_means_over_squares_of_patches(
    nested_visual: VisualTokenizer, photos: list[Path]
):
    images = nested_visual.image_processor.to_uint8(photos[:2])
    torch.manual_seed(0)
    bridge = PatchBridge(nested_visual, 32, vectors=4)
    features = nested_visual.features(nested_visual.preprocess(images))
    for number, patches in enumerate(([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13])):
        expected = bridge.projection(bridge.norm(features[:, patches].mean(1)))
        found = bridge(images, torch.ones(2, 4) > 0).unflatten(0, (2, 4))[:, number]
        torch.testing.assert_close(found, expected + bridge.positions[number])
    with pytest.raises(ValueError, match=r"squares of 4 x 4 patches, one of \[1, 4, 16\], got 8"):
        PatchBridge(nested_visual, 32, vectors=8)


def test_nested_codes_and_the_objective_must_agree():
    with pytest.raises(ValueError, match="image_prefix=False beside it"):
        DaVinci(nested_vectors=4)
    nested = DaVinci(nested_vectors=4, image_prefix=False)
    for objective, stages in ((nested, 0), (DaVinci(), 5)):
        with pytest.raises(ValueError, match="set it for nested codes only"):
            objective.layout([TextSegment("rain")], processor(stages), torch.Generator())


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_answers_to_questions_are_learned(
    family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    """Documents of images and texts; the sequence that is learned is the one that is asked."""
    objective = DaVinci(answer_prompt="Question: {} Answer:")
    words, model = built(family, tiny_tokenizer, objective)
    question = objective.answer_prompt.format("what is this?")
    samples: list[list[Segment]] = [
        [shown(tiny_tokenizer, photo), TextSegment(question, False), TextSegment(answer)]
        for photo, answer in zip(photos, ("rain", "a red apple", "two dogs", ""), strict=False)
    ]
    samples.append([samples[0][0], samples[1][0], *samples[2][1:]])
    samples.append([TextSegment("rain and rain", False), TextSegment("rain")])
    sequences = rows_of(objective, samples, words)
    for sequence, sample in zip(sequences, samples, strict=True):
        lengths = [segment_length(segment, words) for segment in sample]
        assert objective.sequence_length(lengths, words, torch.Generator()) == len(sequence)
        prompt = objective.prompt(sample[:-1], words, "text")
        assert torch.equal(sequence.ids[: len(prompt)], prompt.ids)
        assert torch.equal(sequence.prefix[: len(prompt)], prompt.prefix)
        scored = objective.scoring_sequence(sample[:-1], sample[-1], words)
        assert torch.equal(scored.ids, sequence.ids)
    batch = pad(sequences, words.pad)
    overfitted(model, objective, batch, family, below=0.02)
    made = MultimodalLM(model.eval(), words, tiny_tokenizer, None, objective)
    assert made.answer(photos[1], "what is this?") == "a red apple"
    asked = [photos[0], photos[1], question]
    assert made.rank(asked, ["rain", "a red apple", "two dogs"]).argmax() == 2, "of both images"
