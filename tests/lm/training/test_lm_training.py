"""Training a language model: it learns, resumes exactly, and keeps frozen what is frozen; NaN stops
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.lm_parts import image, pairs, processor_and_model
from helpers.lm_parts import losses as losses_of
from helpers.lm_runs import (
    CAPTIONS,
    SMALL,
    SMALL_BART,
    Losses,
    data,
    module,
    saving,
    shards_of_all_patches,
    trainer,
)
from helpers.small_lms import small_tokenizer
from helpers.small_nested import small_tokenizer as nested_tokenizer
from helpers.trainers import recipes_of, two_steps
from helpers.vlgpt_parts import stage_one_directory

from lavit_lm import MultimodalLM
from lavit_lm.cli import main
from lavit_lm.objectives.davinci import DaVinci
from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.vlgpt import VLGPT
from lavit_lm.sequences.packing import pack, pad
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_lm.training.sampler import BlockSampler, ExampleLayout, Examples
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary
from lavit_tok import ShardError, VisualTokenizer, WeightsError

# tests/recipes/ trains these, on their documents.
ON_DOCUMENTS = ("instruct", "emu-clips", "best-of")
RECIPES = [path for path in recipes_of("lavit-lm fit") if not path.name.startswith(ON_DOCUMENTS)]


def test_a_stopped_run_is_resumed_exactly(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Through borders of windows, of the data's epochs and of Lightning's, with two batches a
    step.
    """
    steps, twice = 14, {"accumulate_grad_batches": 2}
    whole, weights = Losses(), module(folder)
    trainer(folder, steps, [whole], **twice).fit(weights, data(folder))
    cut = Losses(stop=5)
    interrupted = trainer(folder, steps, [cut, saving(folder)], **twice)
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted.fit(module(folder), data(folder))
    planned: list[int] = []
    plan = BlockSampler._plan
    counted = lambda self, number: planned.append(number) or plan(self, number)  # noqa: E731
    monkeypatch.setattr(BlockSampler, "_plan", counted)
    rest, resumed = Losses(), module(folder)
    at = sorted((folder / "ckpt").glob("epoch*"), key=lambda path: path.stat().st_mtime)[-1]
    trainer(folder, steps, [rest], **twice).fit(resumed, data(folder), ckpt_path=at)
    done = len(whole.values) - len(rest.values)
    assert done in (8, 10), "the checkpoint is of a step's end"
    assert cut.values[:done] + rest.values == whole.values
    assert cut.keys[:done] + rest.keys == whole.keys
    assert planned[0] == 0 and planned[1] > 2, "earlier windows are not planned again"
    assert weights.model is not None and resumed.model is not None
    for name, tensor in weights.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="examples would be repeated or missed"):
        trainer(folder, steps, []).fit(module(folder), data(folder, window=20), ckpt_path=at)


def test_the_order_of_blocks(folder: Path):
    processor = module(folder).processor
    records = []
    for i in range(50):
        length = 1 + i % 5
        record = {"key": str(i), "caption": CAPTIONS[i % 4], "codes": [i % 16] * length}
        records.append(record | {"length": length})
    layout = ExampleLayout(Examples(records), LaVIT(), processor, seed=3)

    def blocks(count: int, **more: Any) -> list[list[tuple[int, int]]]:
        order = iter(BlockSampler(layout, 64, 2, window=16, **more))
        return [next(order) for _ in range(count)]

    every = blocks(60)
    assert every == blocks(60), "the same again"
    first, second = ([i for block in every for e, i in block if e == epoch] for epoch in (0, 1))
    assert sorted(first) == list(range(50)), "each example once an epoch"
    assert first != second[:50], "each epoch in another order"
    assert all(sum(len(layout.sequence(p)) for p in block) <= 64 for block in every)
    for consumed in (1, 7, 20):
        assert blocks(10, consumed=lambda: consumed) == every[2 * consumed : 2 * consumed + 10]  # noqa: B023
    first, second = blocks(30, rank=0, world_size=2), blocks(30, rank=1, world_size=2)
    dealt = [b for k in range(15) for b in first[2 * k : 2 * k + 2] + second[2 * k : 2 * k + 2]]
    assert dealt == every, "batches are dealt to the ranks in turn"
    for rank in range(4):  # after 5 batches on one rank, 3 of each rank, then four ranks
        order = BlockSampler(layout, 64, 2, 16, rank, 4, consumed=lambda: 8)
        order.resumed = (5, 10)
        at, blocks_of_rank = 10 + 3 * 8 + 2 * rank, iter(order)
        expected = every[at : at + 2] + every[at + 8 : at + 10]
        assert [next(blocks_of_rank) for _ in range(4)] == expected
    short = BlockSampler(layout, 9, 1, window=50)
    assert short.too_long and all(length > 9 for length in short.too_long.values())
    with pytest.raises(ValueError, match="no sequence fits, the shortest has"):
        BlockSampler(layout, 2, 1, window=50)


@pytest.mark.parametrize(
    "objective",
    [
        LaVIT(prompt_drop=0.5),
        Emu(queries=3),
        VLGPT(tokenizer_sizes={"width": 32, "queries": 4}),
        DaVinci(plain_ratio=1.0, prompt_drop=0.5, caption_length=5),
    ],
    ids=lambda objective: objective.name,
)
def test_lengths_are_known_before_sequences_are_built(objective: Any, monkeypatch: Any):
    """Stored lengths and the same draws give the length of the sequence; planning builds none."""
    processor, _ = processor_and_model("llama")
    captions = [*CAPTIONS, "", "A red apple on the table of the old town hall, in the rain"]
    pairs = [
        {"key": f"{i}", "caption": c, "codes": [i] * 9, "length": 9, "keep": list(range(9))}
        for i, c in enumerate(captions)
    ]
    pixels = [torch.zeros(3, 24, 24, dtype=torch.uint8)] * len(pairs)
    examples = Examples(pairs, [{"text": "rain and sunset"}], pixels, patches=9)
    layout = ExampleLayout(examples, objective, processor, seed=5)
    indices = [(epoch, i) for epoch in range(12) for i in range(len(examples))]
    lengths = [len(layout.sequence(index)) for index in indices]
    assert len(set(lengths)) > 3
    monkeypatch.setattr(type(objective), "layout", None)
    assert [layout.length(index)[0] for index in indices] == lengths


def test_texts_are_mixed_in(folder: Path):
    texts, output = folder / "texts.jsonl", Losses()
    texts.write_text("\n".join('{"text": "rain and rain"}' for _ in range(12)))
    trainer(folder, 6, [output]).fit(module(folder), data(folder, texts=str(texts)))
    keys = {key for batch in output.keys for block in batch for key in block}
    assert any(key.startswith("text ") for key in keys)
    assert any(key.endswith(".png") for key in keys)


def test_eight_samples_are_overfitted(folder: Path):
    """Codes from text that is given: no target is random, so the loss can reach 0."""
    training = module(folder)
    training.configure_model()
    assert training.model is not None
    processor, layout, generator = training.processor, LaVIT("given").layout, torch.Generator()
    sequences = []
    for i in range(8):
        text = TextSegment(f"{'a red apple ' * i}rain", is_target=False)
        sequences.append(layout([text, image(i, 8)], processor, generator))
    batch = pad(sequences, processor.pad)
    optimizer = torch.optim.AdamW(training.model.parameters(), 5e-3)
    for _ in range(150):
        loss = LaVIT().total(losses_of(training.model, LaVIT(), batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_frozen_means_absent(folder: Path):
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    training = module(folder, lora=lora)
    fitted = trainer(folder, 3, [saving(folder)])
    fitted.fit(training, data(folder))
    assert training.model is not None
    trained = {n for n, p in training.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n or "trainable_tokens" in n for n in trained), trained
    held = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for n, p in training.named_parameters() if n in trained}
    first, *_, last = sorted((folder / "ckpt").glob("epoch*"))
    saved = torch.load(first, weights_only=True)["state_dict"]
    assert set(saved) == trained, "neither the LM nor the visual tokenizer is saved twice"
    trainer(folder, 4, []).fit(module(folder, lora=lora), data(folder), ckpt_path=last)
    training.save(folder / "merged")
    merged = MultimodalLM.from_pretrained(folder / "merged", decoder=None)
    processor, generator = training.processor, torch.Generator()
    batch = pad([LaVIT().layout(s, processor, generator) for s in pairs(2)], processor.pad)
    with torch.no_grad():
        ours, theirs = training.model.eval()(batch).hidden_states, merged.model(batch).hidden_states
    used = batch.documents >= 0
    torch.testing.assert_close(theirs[used], ours[used], atol=1e-4, rtol=1e-4)


def test_a_whole_lm_is_trained_and_saved(folder: Path):
    config = folder / "recipe.yaml"
    config.write_text(f"""
seed_everything: 0
trainer: {{accelerator: cpu, max_steps: 6, max_epochs: -1, val_check_interval: 3,
  check_val_every_n_epoch: null, num_sanity_val_steps: 0, log_every_n_steps: 1,
  enable_progress_bar: false, default_root_dir: {folder}/run,
  logger: {{class_path: pytorch_lightning.loggers.CSVLogger,
    init_args: {{save_dir: {folder}/run}}}}}}
model:
  lm: {SMALL}
  text_tokenizer: {folder}/text
  visual_tokenizer: {folder}/visual
  objective: {{class_path: lavit_lm.objectives.lavit.LaVIT, init_args: {{prompt_drop: 0.2}}}}
  gradient_checkpointing: true
  out: {folder}/out
data: {{shards: {folder}/shards, block: 64, batch_size: 2, window: 10}}
""")
    assert main(["fit", "-c", str(config)]) == 0
    metrics = next((folder / "run").rglob("metrics.csv")).read_text().splitlines()
    columns = metrics[0].split(",")
    names = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "text", "image")}
    assert {*names, "val/bits_per_image_token"} <= {*columns}
    lm = MultimodalLM.from_pretrained(folder / "out", decoder=None)
    assert len(lm.generate_codes("a red apple", 2, generator=torch.Generator().manual_seed(0))) == 2
    assert main(["validate", "-c", str(config), "--model.out", "null"]) == 0


def test_held_out_losses_are_exact_means(folder: Path):
    training = module(folder)
    fitted = trainer(folder, 1, [])
    fitted.fit(training, data(folder))
    (shown,) = fitted.validate(training, data(folder, batch_size=1), verbose=False)
    (other,) = fitted.validate(training, data(folder, batch_size=3, block=100), verbose=False)
    for name, value in shown.items():
        assert abs(value - other[name]) < 1e-5, "blocks and batches do not matter"
    named = data(folder, batch_size=1, splits=("train", "none", "validation"))
    (tested,) = fitted.test(training, named, verbose=False)
    assert tested == {name.replace("val/", "test/"): value for name, value in shown.items()}


def test_a_batch_with_nan_is_named(folder: Path):
    training = module(folder)
    training.configure_model()
    assert training.model is not None
    processor, generator = training.processor, torch.Generator()
    named = enumerate(pairs(2))
    sequences = [LaVIT().layout(s, processor, generator, f"image {i}") for i, s in named]
    batch = pack([sequences], 64, processor.pad)
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"got nan; stopped .* held: image 0, image 1"):
        training.training_step(batch, 0)


def test_what_does_not_fit_together(folder: Path, tmp_path: Path):
    config = VisualTokenizer.from_pretrained(folder / "visual").config
    VisualTokenizer(config).save_pretrained(folder / "other")
    other, text = module(folder, visual_tokenizer=str(folder / "other")), str(folder / "text")
    with pytest.raises(ShardError, match="the codes index another codebook"):
        trainer(folder, 1, []).fit(other, data(folder))
    for lm in ({"model_type": "nonsense"}, {"hidden_size": 8}, {"model_type": "vit"}, text):
        with pytest.raises(ValueError, match="lm: expected a causal LM of transformers, got"):
            module(folder, lm=lm, text_tokenizer=text).configure_model()
    tokenizer = small_tokenizer("llama")
    VisualVocabulary.extend(tokenizer, None, 5)
    tokenizer.save_pretrained(folder / "five")
    with pytest.raises(ValueError, match="has 5 codes, the visual tokenizer"):
        module(folder, text_tokenizer=str(folder / "five"))
    with pytest.raises(ValueError, match="a new LM has no tokenizer"):
        module(folder, text_tokenizer=None)
    with pytest.raises(WeightsError, match="expected a new or empty directory"):
        module(folder, out=str(folder))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        MultimodalProcessor.from_tokenizer(tokenizer)


def test_a_batch_with_images_needs_a_bridge(folder: Path):
    training, bridged = module(folder), module(folder, continuous=True)
    for one in (training, bridged):
        one.configure_model()
        assert one.model is not None
    keep = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor([3, 5]), True)
    shown = ImageSegment(torch.tensor([1, 2]), torch.zeros(3, 32, 32, dtype=torch.uint8), keep)
    layout, pair = LaVIT("given", continuous=True).layout, [shown, TextSegment("rain")]
    sequence = layout(pair, training.processor, torch.Generator())
    batch = pad([sequence], training.processor.pad)
    with pytest.raises(ValueError, match="but the model has no bridge"):
        losses_of(training.model, LaVIT(), batch)
    LaVIT().total(losses_of(bridged.model, LaVIT(), batch)).backward()
    gradients = {n: p.grad for n, p in bridged.model.bridge.named_parameters()}  # type: ignore[union-attr]
    moved = [n for n, grad in gradients.items() if grad is not None and grad.abs().sum() > 0]
    assert "path.projection.weight" in moved and any("merger.blocks" in n for n in moved)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_train(recipe: Path, folder: Path, tiny_decoder: Any):
    """Two steps at reduced width, everything else as in the recipe."""
    head = recipe.read_text()
    values = yaml.safe_load(head)
    lm, arguments = values["model"]["lm"], values["model"]["objective"].get("init_args", {})
    family = lm if isinstance(lm, str) else lm["model_type"]
    tied = {**SMALL, "tie_word_embeddings": True}
    needs_pixels = "images" in values["data"] or "--data.images" in head
    visual, nested = folder / "visual", "nested_vectors" in arguments
    if nested:
        visual = folder / "nested"
        nested_tokenizer().save_pretrained(visual)
    overrides = {
        "trainer.precision": 32,
        "trainer.accumulate_grad_batches": 1,
        "model.lm": json.dumps(SMALL_BART if family == "bart" else tied),
        "model.text_tokenizer": folder / "text",
        "model.visual_tokenizer": visual,
        "model.out": folder / "made",
        "model.schedule.warmup_steps": 1,
        "trainer.callbacks": "[lavit_lm.training.throughput.LogThroughput]",
        "data.shards": folder / "shards",
        "data.block": 64,
        "data.batch_size": 2,
    }
    overrides |= {"data.images": folder / "pictures"} if needs_pixels else {}
    if "--budget" in head:  # a code for every patch
        shards_of_all_patches(folder, visual)
    reduced: dict[str, Any] = {"depth": 1, "heads": 2, "hidden_size": 32, "nested_vectors": 4}
    if "tokenizer" in arguments:  # stage 1 comes before it
        tiny_decoder.save_pretrained(folder / "decoder")
        reduced["tokenizer"] = stage_one_directory(folder, SMALL["hidden_size"])
    own = {name: value for name, value in reduced.items() if name in arguments}
    overrides |= {f"model.objective.init_args.{name}": value for name, value in own.items()}
    assert main(["fit", *two_steps(recipe, overrides)]) == 0
    made = MultimodalLM.from_pretrained(folder / "made", decoder=None)
    assert made.caption(str(folder / "pictures" / "train" / "0.png"), 4) is not None
    assert made.objective.connectors.needs_pixels == needs_pixels
    assert (made.model.bridge is not None) == needs_pixels
