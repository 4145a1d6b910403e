"""Pictures fed as vectors while training; rows that no block can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_runs import Losses, data, module, saving, trainer
from PIL import Image

from lavit_lm.sequences.packing import Packed
from lavit_tok import ImageError, ShardError, Shards, VisualImageProcessor, VisualTokenizer
from lavit_tok.cli import main as lavit_tok
from lavit_tok.data.shard_images import ShardImages


class Batches(Losses):
    """Keeps the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Packed] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        self.batches.append(batch)


def shown(folder: Path, **more: Any) -> Any:
    return data(folder, images=str(folder / "pictures"), **more)


def test_pictures_of_mirrored_shards_with_a_corrupt_one(folder: Path):
    """The picture in ShardImages."""
    (folder / "pictures" / "train" / "1.png").write_bytes(b"no picture")
    words = [
        "shards",
        str(folder / "pictures"),
        "--tokenizer",
        str(folder / "visual"),
        "--flip",
        "--split",
        "train",
    ]
    assert lavit_tok([*words, "--out", str(folder / "mirrored")]) == 0
    shards = Shards.open(folder / "mirrored", "train")
    rows, tokenizer = shards.dataset(), VisualTokenizer.from_pretrained(folder / "visual")
    images = ShardImages(shards, str(folder / "pictures"), tokenizer.image_processor)
    assert len(images) == len(rows) == 46
    for number, row in enumerate(rows):
        pixels = tokenizer.image_processor.to_uint8(folder / "pictures" / row["key"])[0]
        assert torch.equal(images[number], pixels.flip(2) if row["flipped"] else pixels)
        assert tokenizer.encode(images[number][None]).to_list() == [row["codes"]]
    assert [row["flipped"] for row in rows][:4] == [False, True, False, True]


def test_vectors_are_those_of_the_row_s_picture(folder: Path):
    """What the model reads at a fed place, against the bridge on the file itself; other rows read codes."""
    training, seen = module(folder, continuous=True), Batches()
    trainer(folder, 4, [seen]).fit(training, shown(folder))
    rows = {row["key"]: row for row in Shards.open(folder / "shards", "train").dataset()}
    checked = unfed = 0
    for batch in seen.batches:
        with torch.no_grad():
            embedded = training.model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        for b, keys in enumerate(batch.keys):
            for document, key in enumerate(keys):
                own = (batch.documents[b] == document) & batch.is_embedding[b]
                if not own.any():
                    unfed += 1
                    continue
                keep = torch.zeros(1, 16, dtype=torch.bool)
                keep[0, rows[key]["keep"]] = True
                with torch.no_grad():
                    pixels = VisualImageProcessor(32).to_uint8(folder / "pictures" / key)
                    expected = training.model.bridge(pixels, keep)
                torch.testing.assert_close(embedded[b][own], expected, atol=1e-5, rtol=1e-5)
                checked += 1
    assert checked > 3 and unfed > 3


def test_a_picture_is_opened_only_where_it_is_fed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[int] = []
    reads = ShardImages.__getitem__
    monkeypatch.setattr(
        ShardImages, "__getitem__", lambda self, row: opened.append(row) or reads(self, row)
    )
    loader, seen = shown(folder), Batches()
    fitted = trainer(folder, 3, [seen], limit_val_batches=0)
    fitted.fit(module(folder, continuous=True), loader)
    assert len(opened) == sum(len(batch.images) for batch in seen.batches) > 0, (
        "none for the plan's lengths"
    )


def test_continuous_training_resumes(folder: Path):
    """Two steps, stop, resume to four; only the LM and the bridge are trained and saved, each at its own rate."""
    steps, settings = 4, {"continuous": True, "lr": 3e-3, "visual_lr": 1e-3}
    whole = Losses()
    trainer(folder, steps, [whole]).fit(module(folder, **settings), shown(folder))
    cut, first = Losses(stop=3), module(folder, **settings)
    before = {name: tensor.clone() for name, tensor in first.visual.state_dict().items()}
    stopped = trainer(folder, steps, [cut, saving(folder)])
    with pytest.raises(RuntimeError, match="power cut"):
        stopped.fit(first, shown(folder))
    rest, loader = Losses(), shown(folder, num_workers=2)
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
    """Weights of bfloat16, as the recipe of a 7B model has them, beside a visual tokenizer of float32."""
    seen = Losses()
    trainer(folder, 2, [seen], precision="bf16-true").fit(
        module(folder, continuous=True), shown(folder)
    )
    assert len(seen.values) == 2 and all(value < 10 for value in seen.values)


def test_pictures_that_do_not_fit(folder: Path, photos: list[Path]):
    def fit(loader: Any, **settings: Any) -> None:
        trainer(folder, 2, []).fit(module(folder, **settings), loader)

    with pytest.raises(ValueError, match=r"which the shards do not hold; give data\.pictures"):
        fit(data(folder), continuous=True)
    with pytest.raises(ValueError, match="reads codes and no pictures"):
        fit(shown(folder))
    with pytest.raises(ValueError, match="expected an image folder, parquet"):
        fit(data(folder, images=str(folder / "nowhere")), continuous=True)
    with pytest.raises(ShardError, match=r"expected the 24 pictures .* got 6, of which"):
        fit(data(folder, images=str(folder / "pictures" / "validation")), continuous=True)
    shards = Shards.open(folder / "shards", "train")
    images = ShardImages(shards, str(folder / "pictures"), VisualImageProcessor(32))
    (folder / "pictures" / "train" / "3.png").unlink()
    with pytest.raises(
        ImageError, match=r"train/3\.png: .*; it could be read when the shards were made"
    ):
        images[3]
    Image.open(photos[0]).crop((0, 0, 99, 88)).save(folder / "pictures" / "train" / "3.png")
    with pytest.raises(
        ShardError, match="got 24, of which a key, a caption or a file size is another"
    ):
        fit(shown(folder), continuous=True)
    (folder / "pictures" / "train").rename(folder / "pictures" / "test")
    with pytest.raises(
        ShardError, match="expected a split 'train' as in the shards, got validation, test"
    ):
        fit(shown(folder), continuous=True)


def test_rows_that_no_block_holds_are_told(folder: Path):
    rows = Shards.open(folder / "shards", "train").dataset()
    with pytest.warns(
        UserWarning, match=r"have more places than a block of 14 and are left out: \S+\.png \(\d+\)"
    ):
        trainer(folder, 8, []).fit(module(folder), data(folder, block=14))
    lines = [json.loads(line) for line in (folder / "too_long.jsonl").read_text().splitlines()]
    assert lines and all(line["places"] > line["block"] == 14 for line in lines)
    assert len({line["key"] for line in lines}) == len(lines)
    assert {line["key"] for line in lines} <= {
        *rows["key"],
        *(f"validation/{i}.png" for i in range(6)),
    }
