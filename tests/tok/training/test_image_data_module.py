"""Images in, batches out: every kind of source, corrupt images, and runs that resume exactly."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.trainers import quiet_trainer
from PIL import Image
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint

from lavit_tok import VisualImageProcessor
from lavit_tok.data import splits as sources
from lavit_tok.data.image_sources import Augmentation
from lavit_tok.training.data_module import EpochOrder, ImageDataModule


def image(number: int) -> bytes:
    """A plain 12x10 image whose red value is its number."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 255 - number, 40)).save(stream, "PNG")
    return stream.getvalue()


def numbers(batches: list[dict]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch["images"]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("names", "by_names"),
    [
        (["b.png", "a.png", "carnival.png", ".hidden.png"], True),
        (["cat/1.png", "dog/2.png"], True),
        (["train/x/1.png", "validation/1.png", "test/2.png", "other/3.png"], True),
        (["1.png", "1.txt", "2.png", "2.txt"], True),
        (["train/1.png", "val/2.png"], False),
        (["train_1.png", "test_2.png"], False),
        (["1.png", "2.png", "LICENSE"], False),
    ],
)
def test_folders_are_those_that_datasets_finds(tmp_path, monkeypatch, names, by_names):
    for number, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number) if path.suffix == ".png" else b"a text")
    suffixes = sources.SUFFIXES | {".txt"}
    assert (sources._image_files(tmp_path / "images", suffixes) is not None) == by_names

    def found():
        splits = sources.load_splits(str(tmp_path / "images"))
        undecoded = datasets.Image(decode=False)
        return {k: (v.features, v.cast_column("image", undecoded)[:]) for k, v in splits.items()}

    fast = found()
    monkeypatch.setattr(sources, "_image_files", lambda *_: None)
    assert fast == found() and list(fast)


def folder(path: Path, count: int = 23, corrupt: tuple[int, ...] = (3,)) -> Path:
    for split in ("train", "validation"):
        (path / split).mkdir(parents=True)
        for i in range(count if split == "train" else 5):
            bad = i in corrupt and split == "train"
            (path / split / f"{i:03}.png").write_bytes(b"no image" if bad else image(i))
    return path


def parquet(path: Path, count: int = 23, corrupt: tuple[int, ...] = (3,)) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "image": {"bytes": image(i)[: 30 if i in corrupt else None], "path": None},
            "caption": f"number {i}",
            "key": f"record/{i}",
        }
        for i in range(count)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "caption": datasets.Value("string"),
            "key": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(records, features=features).to_parquet(path / "train.parquet")
    return path


def webdataset(path: Path, count: int = 23, corrupt: tuple[int, ...] = (3,)) -> Path:
    path.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(path / f"train-{shard}.tar", "w") as tar:
            for i in range(shard, count, 2):
                parts = {
                    "png": b"no image" if i in corrupt else image(i),
                    "txt": f"number {i}".encode(),
                }
                for suffix, content in parts.items():
                    info = tarfile.TarInfo(f"{i:03}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


def arrow(path: Path, count: int = 23, corrupt: tuple[int, ...] = (3,)) -> Path:
    records = datasets.load_dataset(str(parquet(path / "source", count, corrupt)), split="train")
    datasets.DatasetDict(train=records, validation=records).save_to_disk(path / "arrow")
    return path / "arrow"


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("source", [folder, parquet, webdataset, arrow])
def test_every_source_gives_every_readable_image_once(source, cache, tmp_path):
    data = ImageDataModule(str(source(tmp_path / "data")), image_size=8, batch_size=4, cache=cache)
    data.setup("validate")
    data.setup("fit")
    held_out = numbers(list(data.val_dataloader()))
    loaded = numbers(list(data.train_dataloader()))
    assert data.held_out == (source in (parquet, webdataset)), "those have no validation split"
    if data.held_out:
        assert 0 < len(data.sets["validation"].split) < 6
        assert not set(held_out) & set(loaded)
    assert 3 not in loaded
    assert len(loaded) == len(data.sets["train"]) // 4 * 4
    assert len(set(loaded)) >= len(loaded) - (
        not cache
    )  # without a cache the corrupt one is replaced by the next
    assert len(data.rejects) == 1
    assert "reason" in data.rejects[0] and "3" in data.rejects[0]["key"]


def test_batches_are_uint8_with_row_numbers_and_captions(tmp_path):
    path = parquet(tmp_path / "data", corrupt=())
    data = ImageDataModule(
        str(path), image_size=8, batch_size=4, caption_column="caption", cache=True
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"images", "index", "captions"}
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (4, 3, 8, 8)
    assert batch["index"].dtype == torch.int64
    assert batch["captions"] == [f"number {i}" for i in numbers([batch])]


def test_streaming_gives_the_same_images_and_its_rejects(tmp_path):
    data = ImageDataModule(
        str(webdataset(tmp_path / "data")), image_size=8, batch_size=2, streaming=True
    )
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = numbers(list(loader)), numbers(list(loader))
    assert set(first) <= set(range(23)) - {3} and len(set(first)) >= 20
    assert sorted(first) != first and first != second  # shuffled, and anew each epoch
    assert len(data.rejects) == 1
    assert data.val_dataloader() == []


def test_ranks_share_an_epoch_without_overlap():
    ranks = [
        EpochOrder(23, 4, seed=5, rank=r, world=2, consumed=lambda n: (0, n)) for r in range(2)
    ]
    first, second = (order.indices(epoch=1) for order in ranks)
    assert len(first) == len(second) == len(ranks[0]) == 11
    assert not set(first) & set(second)
    assert first != ranks[0].indices(epoch=2)


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    one = Augmentation(VisualImageProcessor(8), flip=0.5, crop_scale=(0.5, 1.0), seed=1)
    torch.manual_seed(3)
    first = one(image, epoch=2, index=7)
    torch.manual_seed(4)
    assert torch.equal(first, one(image, epoch=2, index=7))
    assert not torch.equal(first, one(image, epoch=3, index=7))
    assert not torch.equal(first, one(image, epoch=2, index=8))
    two = Augmentation(VisualImageProcessor(8), 0.5, (0.5, 1.0), seed=1, variants=2)
    assert torch.equal(two(image, 5, 7), two(image, 3, 7)) and torch.equal(
        two(image, 4, 7), one(image, 0, 7)
    )
    assert torch.equal(two(image, 1, 7), one(image, 1, 7))
    plain = np.array(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert torch.equal(
        Augmentation(VisualImageProcessor(8))(image, 0, 0), torch.from_numpy(plain).permute(2, 0, 1)
    )


def test_crops_keep_their_proportions():
    """Of a wide image only the columns of its central square are kept, augmented or not."""
    columns = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 6, 20, 0).repeat(3, 2)
    wide = Image.fromarray(columns)
    center = VisualImageProcessor(10, "center_crop")
    plain = Augmentation(center)(wide, 0, 0)
    assert torch.equal(plain, Augmentation(center).resized(wide))
    assert 10 * 6 <= int(plain.min()) < 13 * 6 and 26 * 6 < int(plain.max()) <= 29 * 6
    assert int(Augmentation(VisualImageProcessor(10))(wide, 0, 0).min()) < 3 * 6
    cut = Augmentation(center, crop_scale=(0.5, 0.5))
    for index in range(20):
        cropped = cut(wide, 0, index).int()
        assert int(cropped.min()) >= 10 * 6 and int(cropped.max()) <= 29 * 6
        spread = (
            int(cropped.max() - cropped.min()) / 6
        )  # columns across: the side of the square is 0.5 ** 0.5 of 20
        assert 10 < spread < 15


class Recorder(LightningModule):
    """Records the pixels of every batch, trains nothing; stops at `stop`, as if killed."""

    def __init__(self, stop: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.pixels: list[torch.Tensor] = []
        self.stop = stop

    def training_step(self, batch, batch_idx):
        self.pixels.append(batch["images"].clone())
        if len(self.pixels) - 1 == self.stop:
            raise KeyError("killed")
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("workers", "limit", "killed_at"), [(0, None, 7), (0, 4, 6), (1, None, 12), (0, None, 10)]
)
def test_a_killed_run_resumes_with_exactly_the_batches_it_would_have_seen(
    workers, limit, killed_at, tmp_path
):
    source = str(folder(tmp_path / "data"))

    def run(model: Recorder, name: str, checkpoint: str | None = None) -> list[torch.Tensor]:
        data = ImageDataModule(
            source,
            image_size=8,
            batch_size=4,
            num_workers=workers,
            flip=0.5,
            crop_scale=(0.5, 1.0),
            cache=True,
        )
        keep = ModelCheckpoint(
            tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}"
        )
        options = {"limit_train_batches": limit, "enable_checkpointing": True}
        trainer = quiet_trainer(tmp_path / name, 14, keep, **options)
        with contextlib.suppress(KeyError):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False)
        return model.pixels

    whole = run(Recorder(), "whole")
    assert len(whole) == 14 and not torch.equal(whole[0], whole[5])
    run(Recorder(stop=killed_at), "killed")
    step = killed_at // 2 * 2
    rest = run(Recorder(), "resumed", str(tmp_path / "killed" / f"step={step}.ckpt"))
    assert len(rest) == 14 - step
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[step:], strict=True))
    rejects = [
        json.loads(line) for line in (tmp_path / "whole" / "rejects.jsonl").read_text().splitlines()
    ]
    assert len(rejects) == 1 and rejects[0]["key"].endswith("003.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nowhere/at/all"}, "nowhere/at/all"),
        ({"caption_column": "text"}, "expected a caption column 'text'"),
        ({"splits": ("training", "b", "c")}, "expected one of the splits"),
    ],
)
def test_bad_sources_get_one_clear_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    path = parquet(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**({"data": str(path)} | arguments)).setup("fit")


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"crop_scale": (0.0, 1.0)}, {"streaming": True, "cache": True}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"batch_size|crop_scale|cache"):
        ImageDataModule("data", **arguments)


def test_a_split_without_any_readable_image_is_an_error(tmp_path):
    path = parquet(tmp_path / "data", count=3, corrupt=(0, 1, 2))
    with pytest.raises(ValueError, match="no readable image"):
        ImageDataModule(str(path), cache=True).setup("fit")
