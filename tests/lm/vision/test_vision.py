"""Images as vectors during training; sequences that are longer than a block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_runs import Losses, data, module, saving, trainer
from PIL import Image

from lavit_lm.sequences.packing import PackedBatch
from lavit_tok import ImageError, ShardError, Shards, VisualImageProcessor, VisualTokenizer
from lavit_tok.cli import main as lavit_tok
from lavit_tok.data.shard_images import ShardImages


class Batches(Losses):
    """Stores the batches of a training."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[PackedBatch] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        self.batches.append(batch)


def with_images(folder: Path, **more: Any) -> Any:
    return data(folder, images=str(folder / "pictures"), **more)


def test_images_of_flipped_shards_with_a_corrupt_file(folder: Path):
    """The drawing in ShardImages."""
    (folder / "pictures" / "train" / "1.png").write_bytes(b"not an image")
    args = ["shards", str(folder / "pictures"), "--tokenizer", str(folder / "visual")]
    args += ["--flip", "--split", "train", "--out", str(folder / "flipped")]
    assert lavit_tok(args) == 0
    shards = Shards.open(folder / "flipped", "train")
    records, tokenizer = shards.dataset(), VisualTokenizer.from_pretrained(folder / "visual")
    images = ShardImages(shards, str(folder / "pictures"), tokenizer.image_processor)
    assert len(images) == len(records) == 46
    for number, record in enumerate(records):
        pixels = tokenizer.image_processor.to_uint8(folder / "pictures" / record["key"])[0]
        assert torch.equal(images[number], pixels.flip(2) if record["flipped"] else pixels)
        assert tokenizer.encode(images[number][None]).to_list() == [record["codes"]]
    assert [record["flipped"] for record in records][:4] == [False, True, False, True]


def test_vectors_are_those_of_the_example_s_image(folder: Path):
    """Input embeddings against the bridge on the file itself; other sequences have codes."""
    training, seen = module(folder, continuous=True), Batches()
    trainer(folder, 4, [seen]).fit(training, with_images(folder))
    records = {
        record["key"]: record for record in Shards.open(folder / "shards", "train").dataset()
    }
    checked = without = 0
    for batch in seen.batches:
        with torch.no_grad():
            embedded = training.model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        for b, keys in enumerate(batch.keys):
            for document, key in enumerate(keys):
                own = (batch.documents[b] == document) & batch.is_embedding[b]
                if not own.any():
                    without += 1
                    continue
                keep = torch.zeros(1, 16, dtype=torch.bool)
                keep[0, records[key]["keep"]] = True
                with torch.no_grad():
                    pixels = VisualImageProcessor(32).to_uint8(folder / "pictures" / key)
                    expected = training.model.bridge(pixels, keep)
                torch.testing.assert_close(embedded[b][own], expected, atol=1e-5, rtol=1e-5)
                checked += 1
    assert checked > 3 and without > 3


def test_images_are_opened_only_for_their_vectors(folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[int] = []
    reads = ShardImages.__getitem__
    monkeypatch.setattr(
        ShardImages, "__getitem__", lambda self, i: opened.append(i) or reads(self, i)
    )
    loader, seen = with_images(folder), Batches()
    fitted = trainer(folder, 3, [seen], limit_val_batches=0)
    fitted.fit(module(folder, continuous=True), loader)
    assert len(opened) == sum(len(batch.images) for batch in seen.batches) > 0, (
        "none to plan the blocks"
    )


def test_continuous_training_resumes(folder: Path):
    """Two steps, stop, resume to four; LM and bridge are trained, at their own rates, and saved."""
    steps, settings = 4, {"continuous": True, "lr": 3e-3, "visual_lr": 1e-3}
    whole = Losses()
    trainer(folder, steps, [whole]).fit(module(folder, **settings), with_images(folder))
    cut, first = Losses(stop=3), module(folder, **settings)
    before = {name: tensor.clone() for name, tensor in first.visual.state_dict().items()}
    stopped = trainer(folder, steps, [cut, saving(folder)])
    with pytest.raises(RuntimeError, match="power cut"):
        stopped.fit(first, with_images(folder))
    rest, loader = Losses(), with_images(folder, num_workers=2)
    trainer(folder, steps, [rest, saving(folder)]).fit(
        module(folder, **settings), loader, ckpt_path="last"
    )
    assert cut.values[:2] + rest.values == whole.values
    for name, tensor in first.visual.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    saved = torch.load(folder / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith(("model.lm.", "model.bridge.path.")) for name in saved)
    groups = stopped.optimizers[0].param_groups
    assert first.model is not None and first.model.bridge is not None
    visual = {id(p) for group in groups if group["initial_lr"] == 1e-3 for p in group["params"]}
    others = {id(p) for group in groups if group["initial_lr"] == 3e-3 for p in group["params"]}
    assert visual == {id(p) for p in first.model.bridge.parameters()}
    assert others == {id(p) for p in first.model.lm.parameters()}


def test_half_precision(folder: Path):
    """Weights in bfloat16, as in the 7B recipes, and a visual tokenizer in float32."""
    seen = Losses()
    trainer(folder, 2, [seen], precision="bf16-true").fit(
        module(folder, continuous=True), with_images(folder)
    )
    assert len(seen.values) == 2 and all(value < 10 for value in seen.values)


def test_images_that_do_not_match_the_shards(folder: Path, photos: list[Path]):
    def fit(loader: Any, **settings: Any) -> None:
        trainer(folder, 2, []).fit(module(folder, **settings), loader)

    with pytest.raises(ValueError, match=r"which the shards do not contain; give data\.images"):
        fit(data(folder), continuous=True)
    with pytest.raises(ValueError, match="uses codes and no pixels"):
        fit(with_images(folder))
    with pytest.raises(ValueError, match="expected an image folder, parquet"):
        fit(data(folder, images=str(folder / "nowhere")), continuous=True)
    with pytest.raises(ShardError, match=r"expected the 24 images .* got 5, with another key"):
        fit(data(folder, images=str(folder / "pictures" / "validation")), continuous=True)
    shards = Shards.open(folder / "shards", "train")
    images = ShardImages(shards, str(folder / "pictures"), VisualImageProcessor(32))
    (folder / "pictures" / "train" / "3.png").unlink()
    with pytest.raises(
        ImageError, match=r"train/3\.png: .*; it could be read when the shards were made"
    ):
        images[3]
    Image.open(photos[0]).crop((0, 0, 99, 88)).save(folder / "pictures" / "train" / "3.png")
    with pytest.raises(ShardError, match="got 24, with another key, caption or file size"):
        fit(with_images(folder), continuous=True)
    (folder / "pictures" / "train").rename(folder / "pictures" / "test")
    with pytest.raises(
        ShardError, match="expected a split 'train' as in the shards, got validation, test"
    ):
        fit(with_images(folder), continuous=True)


def test_sequences_longer_than_a_block_are_listed(folder: Path):
    keys = Shards.open(folder / "shards", "train").dataset()["key"]
    with pytest.warns(
        UserWarning, match=r"have more tokens than a block of 14 and are left out: \S+\.png \(\d+\)"
    ):
        trainer(folder, 8, []).fit(module(folder), data(folder, block=14))
    lines = [json.loads(line) for line in (folder / "too_long.jsonl").read_text().splitlines()]
    assert lines and all(line["tokens"] > line["block"] == 14 for line in lines)
    assert len({line["key"] for line in lines}) == len(lines)
    assert {line["key"] for line in lines} <= {
        *keys,
        *(f"validation/{i}.png" for i in range(6)),
    }
