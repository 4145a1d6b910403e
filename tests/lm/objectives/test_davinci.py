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
from helpers.lm_runs import CAPTIONS, SMALL, SMALL_BART, data, module, trainer
from helpers.small_lms import small_tokenizer
from PIL import Image

from lavit_lm import MultimodalLM
from lavit_lm.generation.beam_search import beam_search
from lavit_lm.generation.rerank import rerank
from lavit_lm.generation.sampling import GenerationConstraint, generate_ids
from lavit_lm.models.encoder_decoder import PrefixSeq2Seq
from lavit_lm.models.loading import load_lm, sequence_model
from lavit_lm.objectives.davinci import DaVinci
from lavit_lm.objectives.davinci.patch_bridge import LATER, PatchBridge, codes_below
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.masks import attention_mask
from lavit_lm.sequences.packing import PackedBatch, pack, pad
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.training.log_samples import LogSamples
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary
from lavit_tok import VisualCodes, VisualTokenizer
from lavit_tok.cli import main as lavit_tok

PATCHES = 16
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
}
T5 |= {"dropout_rate": 0.0}
LMS: dict[str, dict[str, Any]] = {"llama": SMALL, "t5": T5, "bart": SMALL_BART}
EACH = pytest.mark.parametrize("family", LMS)


def processor() -> MultimodalProcessor:
    tokenizer = small_tokenizer("llama")
    VisualVocabulary.extend(tokenizer, None, 16)
    return MultimodalProcessor.from_tokenizer(tokenizer)


def built(
    family: str, visual: VisualTokenizer, objective: DaVinci | None = None
) -> tuple[MultimodalProcessor, Any]:
    words, objective = processor(), objective or DaVinci()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bridge, _ = objective.connectors.build(visual, 32)
    lm = load_lm(
        {**LMS[family], "tie_word_embeddings": True}, words, words.vocabulary.begin, True, 0
    )
    return words, sequence_model(lm, bridge).eval()


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
    v, names = (
        words.vocabulary,
        {words.start[0]: "<s>", words.stop: "</s>", words.vocabulary.begin: "<img>"},
    )
    names |= {v.end: "</img>", LATER: "later"}
    shown: list[str] = []
    for i, (token, prefix, is_embedding) in enumerate(
        zip(sequence.ids.tolist(), sequence.prefix, sequence.is_embedding, strict=True)
    ):
        shown += ["|"] if not prefix and sequence.prefix[i - 1] else []
        code = v.first <= token < v.stop
        name = names.get(token) or (
            str(token - v.first) if code else words.text_tokenizer.decode([token]).strip()
        )
        shown.append("v" if is_embedding else name)
    text = " ".join(shown)
    for word in ("red", "apple"):
        text = text.replace(
            " ".join(words.text_tokenizer.decode([i]).strip() for i in words.text(word)), word
        )
    return text


def marks(sequence: TokenSequence) -> str:
    return "".join(
        "P" if prefix else ("x" if generated else ".")
        for prefix, generated in zip(sequence.prefix, sequence.predict, strict=True)
    )


def a_generator_for(
    objective: DaVinci, sample: list[Segment], words: MultimodalProcessor, wanted: Any
) -> TokenSequence:
    sequences = (
        objective.layout(sample, words, torch.Generator().manual_seed(seed))
        for seed in itertools.count()
    )
    return next(sequence for sequence in sequences if wanted(sequence))


def test_the_drawing(photos: list[Path]):
    """Of the module's docstring: a image of 3 x 3 patches, whose codes are 0 to 8."""
    words = processor()
    image = ImageSegment(
        torch.arange(9), torch.zeros(3, 24, 24, dtype=torch.uint8), torch.ones(9, dtype=torch.bool)
    )
    pair: list[Segment] = [image, TextSegment("A red apple")]
    ids = {n: len(words.text(n)) for n in ("a", "red", "apple", "a red")}

    sequence = a_generator_for(
        only("text"), pair, words, lambda sequence: int(sequence.prefix.sum()) == 12 + ids["a"]
    )
    page = sys.modules[DaVinci.__module__].__doc__ or ""
    assert drawn(sequence, words) == "<s> <img> v v v v v v v v v </img> a | <s> red apple </s>"
    assert f"id       {drawn(sequence, words)}\n" in page
    assert marks(sequence) == "P" * 13 + "." + "x" * (ids["red"] + ids["apple"] + 1)
    sequence = a_generator_for(
        only("image"), pair, words, lambda sequence: int(sequence.is_embedding.sum()) == 3
    )
    assert drawn(sequence, words) == "<s> <img> v v v </img> a red apple | <img>" + " later" * 6
    assert marks(sequence).lstrip("P") == ".xxxxxx"
    assert sequence.roles[-7:].tolist() == [Role.BEGIN] + [Role.VISUAL] * 6
    sequence = a_generator_for(
        only("image", image_prefix=False), pair, words, lambda sequence: True
    )
    assert drawn(sequence, words) == "<s> a red apple | <img> 0 1 2 3 4 5 6 7 8"
    assert marks(sequence).lstrip("P") == "." + "x" * 9 and not sequence.image_segments
    sequence = a_generator_for(
        only("plain"), pair, words, lambda sequence: int(sequence.prefix.sum()) == 1 + ids["a red"]
    )
    assert drawn(sequence, words) == "<s> a red | <s> apple </s>" and not sequence.image_segments


@EACH
def test_davinci_01_attention(family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    """Every pair of positions of two documents in one block, by gradients."""
    words, model = built(family, tiny_tokenizer)
    samples: list[list[Segment]] = [
        [shown(tiny_tokenizer, photos[0]), TextSegment("a red apple")],
        [TextSegment("two dogs run")],
    ]
    sequences = rows_of(only("text"), samples, words, 5)
    batch = pack([sequences], sum(map(len, sequences)) + 2, words.pad)
    inputs = (
        model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        .detach()
        .requires_grad_()
    )

    def depends(states: torch.Tensor) -> torch.Tensor:
        """True where a state's gradient reaches an input; a sum over the width, since a norm hides
        a uniform one.
        """
        weights = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
        found = [
            torch.autograd.grad(s @ weights, inputs, retain_graph=True)[0][0].abs().sum(1)
            for s in states[0]
        ]
        return torch.stack(found) > 0

    expected = attention_mask(batch.documents, batch.prefix)[0]
    prefix, there = batch.prefix[0], batch.documents[0] >= 0
    output = depends(model.hidden_states(inputs, batch))
    if family == "llama":
        assert torch.equal(output[there], expected[there])
    else:
        suffix = there & ~prefix
        assert torch.equal(output[suffix], expected[suffix]), "nothing is lost, nothing leaks"
        assert not output[prefix].any(), "the decoder says nothing at prefixes"
        for document in (
            0,
            1,
        ):  # a sequence of the encoder each, without the suffix that it cannot see
            own = prefix & (batch.documents[0] == document)
            read = depends(
                model.encode(inputs[:, own], torch.ones(1, int(own.sum()), dtype=torch.bool))
            )
            assert torch.equal(read, own.expand_as(read))
    first, last = prefix.nonzero()[0], (prefix & (batch.documents[0] == 0)).nonzero()[-1]
    assert expected[first, last] and expected[last, first], "prefix to prefix, both ways"
    assert (
        expected[there & ~prefix][:, first].any() and not expected[prefix][:, there & ~prefix].any()
    )


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
    batch = objective.connectors.complete_batch(
        pack([sequences[:7], sequences[7:]], 256, words.pad), tiny_tokenizer, words
    )
    together = losses_of(model, objective, batch)
    assert {name: int(loss.count) for name, loss in together.items()} == {
        "text": sum(
            int(sequence.predict.sum())
            for sequence in sequences
            if sequence.is_embedding.any() and sequence.roles[sequence.predict][0] == Role.TEXT
        ),
        "image": sum(
            int((sequence.predict & (sequence.roles == Role.VISUAL)).sum())
            for sequence in sequences
        ),
        "plain": sum(
            int(sequence.predict.sum())
            for sequence in sequences
            if sequence.roles[sequence.predict][0] == Role.TEXT and not sequence.is_embedding.any()
        ),
    }
    alone = [
        losses_of(
            model,
            objective,
            objective.connectors.complete_batch(pad([sequence], words.pad), tiny_tokenizer, words),
        )
        for sequence in sequences
    ]
    for name, loss in together.items():
        torch.testing.assert_close(
            loss.total, torch.stack([one[name].total for one in alone]).sum(), rtol=1e-4, atol=1e-3
        )
        assert int(loss.count) > 0
    total = objective.total(together)
    total.backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, "processes that share gradients would wait for these"
    torch.testing.assert_close(total, sum(loss.mean for loss in together.values()))
    if family != "llama":
        assert isinstance(model, PrefixSeq2Seq)
        for sequence in sequences[:4]:
            one = objective.connectors.complete_batch(
                pad([sequence], words.pad), tiny_tokenizer, words
            )
            inputs, prefix = (
                model.embed(one.ids, one.is_embedding, one.images, one.keep),
                one.prefix[0],
            )
            logits = model.lm(
                inputs_embeds=inputs[:, prefix], decoder_inputs_embeds=inputs[:, ~prefix]
            ).logits
            torch.testing.assert_close(
                model.head(model(one).hidden_states[0, ~prefix]), logits[0], atol=1e-4, rtol=1e-4
            )


def test_davinci_02_what_an_encoder_decoder_cannot_split(
    tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    words, model = built("t5", tiny_tokenizer)
    without = LaVIT().layout([TextSegment("rain")], words, torch.Generator())
    with pytest.raises(ValueError, match="which objectives without prefixes do not lay out"):
        losses_of(model, LaVIT(), pad([without], words.pad))
    sequence = rows_of(only("plain"), [[TextSegment("rain")]], words)[0]
    early = replace(sequence, predict=~sequence.prefix)
    with pytest.raises(ValueError, match="lay out a start"):
        losses_of(model, DaVinci(), pad([early], words.pad))
    with pytest.raises(ValueError, match="suffixes of one length"):
        model.start_decoding(
            [
                sequence,
                replace(
                    sequence, prefix=sequence.prefix & False | (torch.arange(len(sequence)) < 2)
                ),
            ],
            words.pad,
            4,
        )
    with pytest.raises(ValueError, match="families t5, bart"):
        sequence_model(load_lm({**T5, "model_type": "mt5"}, words, words.vocabulary.begin, True, 0))
    _, bart = built("bart", tiny_tokenizer)
    with pytest.raises(ValueError, match="exceeds the model's context of 128"):
        bart(pad(rows_of(only("plain"), [[TextSegment("rain " * 400)]], words), words.pad))


def test_davinci_03_samplers(tiny_tokenizer: VisualTokenizer):
    """Support and evenness of k and r; draws of one cell differ from even by less than 5
    deviations.
    """
    words = processor()
    assert len(words.text("a a a")) == 3, "a word is an id here"
    sides = {4: PATCHES, 16: 256}
    images = {
        side: ImageSegment(
            torch.zeros(n, dtype=torch.int64),
            lambda: torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.ones(n) > 0,
        )
        for side, n in sides.items()
    }

    def counted(objective: DaVinci, sample: list[Segment], of: Any, draws: int) -> Counter[int]:
        generator = torch.Generator().manual_seed(0)
        return Counter(int(of(objective.layout(sample, words, generator))) for _ in range(draws))

    def even(found: Counter[int], cells: dict[int, float], draws: int) -> None:
        assert set(found) == set(cells), "exactly these"
        for cell, share in cells.items():
            assert (
                abs(found[cell] - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5 + 1e-9
            ), cell

    def k(sequence: TokenSequence) -> int:
        return int((sequence.prefix & (sequence.roles == Role.TEXT)).sum()) - 1

    told, many = [images[4], TextSegment("a a a a a")], [images[4], TextSegment("a " * 50)]
    even(counted(only("text"), told, k, 500), dict.fromkeys(range(5), 1 / 5), 500)
    even(counted(only("text"), many, k, 1000), dict.fromkeys(range(30), 1 / 30), 1000)
    longer = only("text", caption_length=40)
    even(counted(longer, many, k, 1000), {**dict.fromkeys(range(30), 1 / 40), 30: 10 / 40}, 1000)
    plain = counted(DaVinci(), [TextSegment("a " * 120)], k, 1500)
    even(plain, {**dict.fromkeys(range(96), 1 / 120), 96: 24 / 120}, 1500)
    assert set(counted(DaVinci(), [TextSegment("")], k, 20)) == {0}
    for side, n in sides.items():
        found = counted(
            only("image"),
            [images[side], TextSegment("a")],
            lambda sequence, side=side: sequence.is_embedding.sum() / side,
            1000,
        )
        even(found, dict.fromkeys(range(side - 1), 1 / (side - 1)), 1000)
        sequence = only("image", image_prefix=False).layout(
            [images[side], TextSegment("a")], words, torch.Generator()
        )
        assert int(sequence.predict.sum()) == n and not sequence.is_embedding.any(), (
            "r = 0: the whole picture"
        )
    dropped = only("image", image_prefix=False, prompt_drop=0.25)
    even(counted(dropped, told, lambda sequence: k(sequence) == 0, 500), {0: 0.75, 1: 0.25}, 500)
    shares = DaVinci(text_ratio=1.0, image_ratio=2.0, plain_ratio=1.0, image_prefix=False)
    tasks = counted(
        shares,
        told,
        lambda sequence: (
            2 * bool(sequence.is_embedding.any()) + (sequence.roles == Role.VISUAL).any()
        ),
        500,
    )
    even(tasks, {0: 1 / 4, 1: 1 / 2, 3: 1 / 4}, 500)


@EACH
def test_davinci_04_text_loss(family: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    objective = only("text")
    words, model = built(family, tiny_tokenizer, objective)
    (sequence,) = rows_of(
        objective,
        [[shown(tiny_tokenizer, photos[0]), TextSegment("A red apple on a wooden table")]],
        words,
        3,
    )
    batch = pad([sequence], words.pad)
    output = model(batch)
    output.inputs_embeds.retain_grad()
    losses = objective.losses(output, batch)
    losses["text"].mean.backward()
    assert (output.inputs_embeds.grad[batch.is_embedding].abs().sum(1) > 0).all(), (
        "every cell of the grid matters"
    )
    assert int(batch.is_embedding.sum()) == PATCHES
    assert (model.bridge.positions.grad.abs().sum(1) > 0).all()
    suffix = int((~sequence.prefix).sum())
    assert (
        int(losses["text"].count) == suffix - 1 and not (sequence.predict & sequence.prefix).any()
    )
    generated = sequence.ids[sequence.predict].tolist()
    assert (
        generated[-1] == words.stop
        and words.text_tokenizer.decode(generated[:-1]).strip() in "a red apple on a wooden table"
    )


def test_davinci_05_image_targets(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    words, objective = processor(), only("image")
    images = [shown(tiny_tokenizer, photo) for photo in photos]
    sequences = [
        a_generator_for(
            objective,
            [image, TextSegment("rain")],
            words,
            lambda sequence, r=r: int(sequence.is_embedding.sum()) == 4 * r,
        )
        for image, r in zip(images, (0, 1, 2, 2), strict=True)
    ]
    assert (sequences[1].ids[sequences[1].predict] == LATER).all() and not (
        sequences[0].ids == LATER
    ).any()
    batch = objective.connectors.complete_batch(
        pack([sequences[:3], sequences[3:]], 80, words.pad), tiny_tokenizer, words
    )
    positions = batch.predict & (batch.roles == Role.VISUAL)
    generated = [batch.ids[0][positions[0] & (batch.documents[0] == d)] for d in range(3)] + [
        batch.ids[1][positions[1]]
    ]
    assert [len(ids) for ids in generated] == [(4 - r) * 4 for r in (0, 1, 2, 2)]
    assert words.vocabulary.is_code(torch.cat(generated)).all()
    codes = [words.vocabulary.to_codes(ids) for ids in generated]
    assert torch.equal(codes[0], images[0].codes)
    differ = 0
    for image, own, r in zip(images[1:], codes[1:], (1, 2, 2), strict=True):
        moved = torch.zeros(1, 3, 32, 32)
        moved[:, :, : 32 - 8 * r] = tiny_tokenizer.preprocess(image.image)[:, :, 8 * r :]
        assert torch.equal(own, tiny_tokenizer.encode_pixels(moved, PATCHES)[0][: len(own)]), (
            "the crop, encoded"
        )
        differ += int((own != image.codes[4 * r :]).sum())
    assert differ > 0, "and not the codes of the whole picture, cut"
    changed = images[2].image.clone()
    changed[:, :16] = 0
    masks = torch.stack([torch.arange(PATCHES) < 8] * 2)
    above = codes_below(tiny_tokenizer, torch.stack([images[2].image, changed]), masks)
    assert torch.equal(above[:8], above[8:]), "rows above do not tell"
    below = images[2].image.clone()
    below[:, 16:] = 0
    bridge = PatchBridge(tiny_tokenizer, 32)
    vectors = bridge(torch.stack([images[2].image, below]), masks)
    assert vectors.shape == (16, 32) and torch.equal(vectors[:8], vectors[8:]), (
        "rows below are not told"
    )
    with pytest.raises(ValueError, match="whole upper lines of 4 patches"):
        codes_below(tiny_tokenizer, images[2].image[None], torch.arange(PATCHES)[None] < 6)
    words, model = built("llama", tiny_tokenizer)
    with pytest.raises(IndexError):
        model(
            pack([sequences[1:3]], 80, words.pad)
        )  # an unfinished batch cannot be trained on by mistake


@pytest.fixture
def whole(folder: Path) -> Path:
    """The shared folder, its shards with a code for every patch."""
    (folder / "shards").rename(folder / "dynamic")
    command = [
        "shards",
        str(folder / "pictures"),
        "--tokenizer",
        str(folder / "visual"),
        "--budget",
        str(PATCHES),
    ]
    assert lavit_tok([*command, "--out", str(folder / "shards")]) == 0
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
    with pytest.raises(
        ValueError,
        match=r"has codes of \d+ of 16 patches: create the shards with .* --budget 16`",
    ):
        trainer(folder, 1, []).fit(training, data(folder, images=str(folder / "pictures")))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("task", ["text", "image", "whole image", "plain"])
def test_davinci_07_eight_samples_are_overfitted(
    family: str, task: str, tiny_tokenizer: VisualTokenizer, photos: list[Path]
):
    objective = only(task.split()[-1], image_prefix=task == "image")
    words, model = built(family, tiny_tokenizer, objective)
    crops = [
        Image.open(photos[i % 4]).convert("RGB").crop((0, 0, 90 + 60 * i, 80 + 50 * i))
        for i in range(8)
    ]
    images = [shown(tiny_tokenizer, crop) for crop in crops]
    texts = [
        TextSegment(text)
        for text in (
            "rain",
            "a red",
            "two dogs",
            "apple at sunset",
            "the town",
            "table",
            "run",
            "beach",
        )
    ]
    samples: list[list[Segment]] = [
        [image, text] for image, text in zip(images, texts, strict=True)
    ]
    sequences = rows_of(objective, samples, words)
    if task == "plain":  # what nothing foretells cannot be learned: one word in, another out
        sequences = [
            a_generator_for(
                objective,
                [TextSegment(f"{t.text} {t.text}")],
                words,
                lambda sequence: int(sequence.prefix.sum()) > 1,
            )
            for t in texts
        ]
    batch = objective.connectors.complete_batch(pad(sequences, words.pad), tiny_tokenizer, words)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2 if family == "llama" else 5e-3)
    for _ in range(500):
        losses = losses_of(model, objective, batch)
        loss = objective.total(losses)
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
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
    for sample in ([], [image, image], [TextSegment("a"), TextSegment("b")]):
        with pytest.raises(ValueError, match="expected an image, a text, or one of each"):
            DaVinci().layout(sample, words, torch.Generator())
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
    """Also of a model that would rather say words, or end the image."""
    with torch.no_grad():
        lm.model.causal.get_output_embeddings().weight[: lm.processor.vocabulary.first] *= 20
    drawn = lm.generate_codes(
        "A red apple", 3, generator=torch.Generator().manual_seed(0), temperature=3.0
    )
    assert drawn.lengths.tolist() == [PATCHES] * 3 and drawn.codebook_size == 16
    sequence = lm.prompts.for_image("A red apple")
    assert sequence.ids.tolist() == [
        *lm.processor.start,
        *lm.processor.text("a red apple"),
        lm.processor.vocabulary.begin,
    ]
    with pytest.raises(ValueError, match="davinci generates images from text only"):
        lm.generate_codes([photos[0], "a red apple"])
    for cached in (True, False):
        greedy = lm.generate_codes("rain", 1, temperature=0.0, use_cache=cached, guidance_scale=2.0)
        assert greedy[0].tolist() == by_hand(lm, "rain", 2.0)


@torch.no_grad()
def by_hand(lm: MultimodalLM, prompt: str, scale: float) -> list[int]:
    """Greedy codes under guidance, one full forward for each."""
    vocabulary, generated = lm.processor.vocabulary, []
    streams = [lm.prompts.sequence(text, "image") for text in (prompt, "")]
    while len(generated) < PATCHES:
        logits = []
        for sequence in streams:
            positions = torch.tensor(generated, dtype=torch.int64)
            flags = {
                name: torch.cat([getattr(sequence, name), torch.zeros(len(generated)) > 0])
                for name in ("prefix", "is_embedding")
            }
            more = len(sequence) + len(generated)
            flags |= {name: torch.zeros(more) > 0 for name in ("predict", "regress")}
            longer = replace(
                sequence,
                ids=torch.cat([sequence.ids, positions]),
                roles=torch.zeros(more, dtype=torch.int8),
                **flags,
            )
            batch = pad([longer], lm.processor.pad)
            logits.append(lm.model.head(lm.model(batch).hidden_states[0, -1:])[0])
        guided = logits[1] + scale * (logits[0] - logits[1])
        generated.append(
            vocabulary.first + int(guided[vocabulary.first : vocabulary.stop].argmax())
        )
    return [token - vocabulary.first for token in generated]


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
    images = lm.generate_images(
        "rain", 3, generator=torch.Generator().manual_seed(0), num_inference_steps=1
    )
    light = [float(np.asarray(image).mean()) for image in images]
    (best,) = rerank(images, lambda given: [float(np.asarray(image).mean()) for image in given])
    assert best is images[light.index(max(light))] and len(set(light)) == 3
    likeliest = rerank(
        images, lambda given: [float(lm.rank([image], ["rain"])) for image in given], best=3
    )
    scores = [float(lm.rank([image], ["rain"])) for image in likeliest]
    assert scores == sorted(scores, reverse=True) and len(likeliest) == 3
    with pytest.raises(ValueError, match="a number for each of 3 images"):
        rerank(images, lambda given: [1.0])
    with pytest.raises(ValueError, match="best: expected 1 to"):
        rerank(images, lambda given: [1.0], best=0)


def test_captions_answers_and_completion(lm: MultimodalLM, photos: list[Path]):
    captions = lm.caption([str(photo) for photo in photos[:3]], 6)
    assert len(captions) == 3 and captions[1] == lm.caption(str(photos[1]), 6)
    sequence = lm.prompts.sequence([photos[0], "a picture of"], "text")
    start = [*lm.processor.start, *lm.processor.text("a picture of")]
    assert (
        sequence.ids[~sequence.prefix].tolist() == start
        and int(sequence.is_embedding.sum()) == PATCHES
    )
    asked = lm.prompts.sequence([photos[0], "What IS it?"], "text")
    assert asked.ids[~asked.prefix].tolist() == lm.processor.start, "a question is read, not said"
    assert isinstance(lm.answer(str(photos[0]), "What is it?", max_new_tokens=4), str)
    generated = lm.complete(["a red", photos[0]], 5, max_images=0)
    assert len(generated) <= 1 and all(isinstance(part, str) for part in generated)
    with pytest.raises(
        ValueError, match="davinci is not trained to generate the token that begins"
    ):
        lm.complete("a red")
    with pytest.raises(ValueError, match="generates codes for images, no vectors"):
        lm.generate_vectors_batch(["a red apple"])
    assert len(lm.generate_images("a red apple", 1, num_inference_steps=1)) == 1


def test_beams_find_the_most_probable(lm: MultimodalLM, photos: list[Path]):
    """Against all texts of up to two words of a small vocabulary; one beam is greedy."""
    sequences = [lm.prompts.sequence([photo, "a picture of"], "text") for photo in photos[:2]]
    rule = GenerationConstraint("text", 1, 5)
    greedy = generate_ids(
        lm.model, lm.processor, sequences, rule, type(lm_sampling())(temperature=0.0)
    )
    ended = [
        ids[: ids.index(lm.processor.stop) + 1] if lm.processor.stop in ids else ids
        for ids in greedy
    ]
    assert beam_search(lm.model, lm.processor, sequences, rule, 1) == ended
    wide = beam_search(
        lm.model, lm.processor, sequences, GenerationConstraint("text", 1, 2), 400, 0.0
    )
    (allowed,) = GenerationConstraint("text").content_masks(
        lm.processor, lm.model.head(torch.zeros(1, 32)).shape[1], lm.device
    )
    stop = lm.processor.stop
    for sequence, found in zip(sequences, wide, strict=True):
        best, score = None, -torch.inf
        with torch.no_grad():
            first = lm.model.head(
                lm.model.start_decoding([sequence], lm.processor.pad, 4).prefill()
            )[0]
            first = first.masked_fill(~allowed, -torch.inf).log_softmax(0)
            ids = allowed.nonzero().flatten()
            state = lm.model.start_decoding([sequence] * len(ids), lm.processor.pad, 4)
            state.prefill()
            may = allowed.clone()
            may[stop] = True
            second = (
                lm.model.head(state.append_ids(ids)).masked_fill(~may, -torch.inf).log_softmax(1)
            )
            both = first[ids][:, None] + second
            score, position = both.flatten().max(0)
            best = [int(ids[int(position) // both.shape[1]]), int(position) % both.shape[1]]
        assert found == best, score
    cached = beam_search(lm.model, lm.processor, sequences, rule, 3)
    assert cached == beam_search(lm.model, lm.processor, sequences, rule, 3, use_cache=False)
    assert (
        lm.caption(photos[0], 5, num_beams=3)
        == lm.caption([photos[0], photos[1]], 5, num_beams=3)[0]
    )
    with pytest.raises(ValueError, match="beam search does not sample"):
        lm.caption(photos[0], num_beams=2, temperature=1.0)


def lm_sampling() -> Any:
    from lavit_lm.generation.sampling import Sampling

    return Sampling()


def test_an_encoder_is_trained_with_the_rest(tiny_tokenizer: VisualTokenizer, photos: list[Path]):
    """A copy; what no feature depends on stays frozen, and so does the tokenizer's own."""
    bridge = PatchBridge(tiny_tokenizer, 32, train_encoder=True)
    images = tiny_tokenizer.image_processor.to_uint8(photos)
    bridge(images, torch.ones(len(images), PATCHES) > 0).square().sum().backward()
    moved = {
        name: p.grad is not None and bool(p.grad.any())
        for name, p in bridge.named_parameters()
        if p.requires_grad
    }
    assert len(moved) > 30
    assert {name for name, one in moved.items() if not one} <= {
        name for name in moved if name.endswith("k_proj.bias")
    }
    assert {name for name, p in bridge.named_parameters() if not p.requires_grad} == {
        "encoder.model.post_layernorm.weight",
        "encoder.model.post_layernorm.bias",
    }
    assert all(not p.requires_grad and p.grad is None for p in tiny_tokenizer.encoder.parameters())
    assert not tiny_tokenizer.features(tiny_tokenizer.preprocess(images)).requires_grad


def test_positions_of_a_suffix_restart_in_the_decoder(tiny_tokenizer: VisualTokenizer):
    """An encoder-decoder's state does not depend on where in a block its document stands."""
    words, model = built("bart", tiny_tokenizer)
    sequences = rows_of(
        only("plain"),
        [[TextSegment("two dogs run")], [TextSegment("a red apple on a table")]],
        words,
    )
    batch: PackedBatch = pack([sequences], 64, words.pad)
    states = model(batch).hidden_states[0]
    alone = model(pad([sequences[1]], words.pad)).hidden_states[0]
    torch.testing.assert_close(
        states[len(sequences[0]) : len(sequences[0]) + len(sequences[1])],
        alone,
        atol=1e-5,
        rtol=1e-5,
    )
