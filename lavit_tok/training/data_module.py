"""ImageDataModule: pictures, and captions if asked, as batches that a resumed run continues exactly.

    batch = {"images": uint8 [b 3 s s], "index": int64 [b], "captions": list[str] if asked}

Order and augmentation are pure functions of (seed, epoch, position); the only state is the number of batches trained
on, which Lightning's own counters keep. Pixels are not normalised here: the model does that.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from lavit_tok.data.image_sources import (
    Augmentation,
    MapImages,
    StreamImages,
    collate,
    load_splits,
    undecoded,
)
from lavit_tok.encode.image_processor import ResizeMode, VisualImageProcessor

HOLDOUT_EVERY = 20  # without a validation split, every 20th row of the training split validates


class EpochOrder(DistributedSampler):
    """The training order: of each epoch one permutation, this rank's stride of it, from the first batch not yet seen.

    It is a DistributedSampler so that Lightning leaves it in place; `consumed` tells how many batches are already
    trained on, so that iterating yields (epoch, index) pairs from there to the end of that epoch. `len` is a full
    epoch's.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        consumed: Callable[[int], tuple[int, int]],
    ):
        self.rows, self.batch_size, self.seed, self.rank, self.world = (
            rows,
            batch_size,
            seed,
            rank,
            world,
        )
        self.consumed = consumed

    def __len__(self) -> int:
        return self.rows // self.world

    def set_epoch(self, epoch: int) -> None:
        """Ignored: the epoch follows from the number of consumed batches."""

    @property
    def batches(self) -> int:
        """Batches of a full epoch; an incomplete last one is dropped unless it is the only one."""
        return max(1, len(self) // self.batch_size)

    def indices(self, epoch: int) -> list[int]:
        """This rank's row numbers of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.rows, generator=generator)
        return order[self.rank :: self.world][: len(self)].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        consumed, batches = self.consumed(self.batches)
        epoch, batch = divmod(consumed, batches)
        for index in self.indices(epoch)[batch * self.batch_size :]:
            yield epoch, index


class RejectingLoader(DataLoader):
    """A DataLoader that hands each batch's rejects to `report` and passes over batches without any good picture."""

    def __init__(self, *args: Any, report: Callable[[list[dict[str, str]]], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.report = report
        self.passes = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch promises its own iterator class
        if isinstance(self.dataset, StreamImages):
            self.dataset.epoch, self.passes = self.passes, self.passes + 1
        for batch in super().__iter__():
            self.report(batch.pop("rejects"))
            if "images" in batch:
                yield batch


class ResumingLoader(RejectingLoader):
    """Map-style training loader. The two empty methods tell Lightning, truthfully, that a run resumed in mid-epoch goes
    on where it was: the count lives in Lightning's own progress, which `EpochOrder` reads."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class ImageDataModule(LightningDataModule):
    """Image data of any kind that `datasets` opens.

    Args:
        data: image folder, parquet file or folder, webdataset tars, arrow folder, or a Hub name.
        image_size: side of the square that pictures are resized to (bicubic), in pixels.
        batch_size: pictures per batch and device.
        num_workers: loading processes per device; 0 is fastest with `cache`.
        seed: fixes order, flips and crops.
        image_column: name of the picture column; if absent, the column of pictures is found (webdataset: jpg, png).
        caption_column: name of the caption column, or None for pictures alone.
        splits: names of the training, validation and test split; without a validation split, every 20th row of the
            training split is held out, and without a test split the validation rows are tested.
        streaming: read without indexing or downloading first; sharded by rank and worker, not exactly resumable.
        flip: probability of a left-right flip in training.
        crop_scale: least and greatest share of the area kept by training crops; (1, 1) for none.
        cache: decode once to uint8 in memory (12 kB a picture at 64 px), by far the fastest for small data.
        resize_mode: "square" resizes both sides, as LaVIT does; "center_crop" and "pad" keep the aspect ratio.
    """

    def __init__(
        self,
        data: str,
        image_size: int = 64,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        image_column: str = "image",
        caption_column: str | None = None,
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        streaming: bool = False,
        flip: float = 0.0,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        cache: bool = False,
        resize_mode: ResizeMode = "square",
    ):
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if streaming and cache:
            raise ValueError(
                "cache=True keeps every decoded picture in memory and cannot be combined with streaming"
            )
        self.data, self.image_size, self.batch_size, self.num_workers = (
            str(data),
            image_size,
            batch_size,
            num_workers,
        )
        self.seed, self.image_column, self.caption_column, self.splits = (
            seed,
            image_column,
            caption_column,
            splits,
        )
        self.streaming, self.cache = streaming, cache
        self.augment = Augmentation(
            VisualImageProcessor(image_size, resize_mode), flip, crop_scale, seed
        )
        self.rejects: list[dict[str, str]] = []
        self.sets: dict[str, MapImages | StreamImages] = {}

    def prepare_data(self) -> None:
        if not self.streaming:
            load_splits(self.data)  # one process downloads and converts; the others find it done

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that the stage ("fit", "validate", "test" or None for all) needs."""
        found = self._named_splits()
        wanted = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for name in wanted.get(stage or "", ("train", "validation", "test")):
            if name not in found or name in self.sets:
                continue
            rows, column = undecoded(found[name], self.image_column)
            if self.caption_column and self.caption_column not in rows.features:
                names = ", ".join(rows.features)
                raise ValueError(
                    f"{self.data}: expected a caption column {self.caption_column!r}, got columns {names}"
                )
            training = name == "train"
            if self.streaming:
                rows = rows.shuffle(seed=self.seed, buffer_size=1000) if training else rows
                rows = _split_by_rank(rows, *self._ranks())
                self.sets[name] = StreamImages(
                    rows, column, self.caption_column, self.augment, training
                )
                continue
            images = MapImages(
                rows, column, self.caption_column, self.augment, training, self.cache
            )
            self.sets[name] = images
            self._report(images.rejects)
            if not len(images):
                raise ValueError(
                    f"{self.data}: no readable picture in the {name} split, e.g. {self.rejects[:1]}"
                )

    def _named_splits(self) -> dict[str, Any]:
        loaded = load_splits(self.data, self.streaming)
        roles = zip(("train", "validation", "test"), self.splits, strict=True)
        found = {role: loaded[name] for role, name in roles if name in loaded}
        if not found:
            raise ValueError(
                f"{self.data}: expected one of the splits {self.splits}, got {', '.join(loaded)}"
            )
        if (
            "validation" not in found
            and "train" in found
            and not self.streaming
            and len(found["train"]) > 1
        ):
            rows = range(len(found["train"]))
            found["validation"] = found["train"].select([i for i in rows if i % HOLDOUT_EVERY == 0])
            found["train"] = found["train"].select([i for i in rows if i % HOLDOUT_EVERY])
        if "test" not in found and "validation" in found:
            found["test"] = found["validation"]
        return found

    def train_dataloader(self) -> DataLoader:
        images = self.sets["train"]
        if isinstance(images, StreamImages):
            return self._loader(images, drop_last=True)
        order = EpochOrder(len(images), self.batch_size, self.seed, *self._ranks(), self._consumed)
        return self._loader(
            images, ResumingLoader, sampler=order, drop_last=len(order) >= self.batch_size
        )

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.sets["validation"]) if "validation" in self.sets else []

    def test_dataloader(self) -> DataLoader | list:
        return self._loader(self.sets["test"]) if "test" in self.sets else []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share with this one for its order to continue; the count itself is Lightning's."""
        return {"seed": self.seed, "batch_size": self.batch_size, "world": self._ranks()[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        changed = {name: (value, self.state_dict()[name]) for name, value in state.items()}
        changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
        if changed:
            message = f"resumed with other settings {changed}: pictures of this epoch will repeat or be missed"
            warnings.warn(message, stacklevel=2)

    def teardown(self, stage: str | None = None) -> None:
        """Write the rejected pictures, if any, as JSON lines beside the run's other files."""
        if self.rejects and self.trainer is not None and self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "rejects.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(reject) + "\n" for reject in self.rejects))

    def _loader(
        self, images: Any, kind: type[RejectingLoader] = RejectingLoader, **options: Any
    ) -> DataLoader:
        return kind(
            images,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            report=self._report,
            **options,
        )

    def _report(self, rejects: list[dict[str, str]]) -> None:
        known = {reject["key"] for reject in self.rejects}
        self.rejects += [reject for reject in rejects if reject["key"] not in known]

    def _ranks(self) -> tuple[int, int]:
        return (
            (self.trainer.global_rank, self.trainer.world_size)
            if self.trainer is not None
            else (0, 1)
        )

    def _consumed(self, batches: int) -> tuple[int, int]:
        """(batches trained on so far, batches an epoch has under this trainer); without a trainer, a first epoch."""
        if self.trainer is None:
            return 0, batches
        limit = self.trainer.limit_train_batches
        limit = limit if isinstance(limit, int) else int(batches * limit)
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return done.processed, max(1, min(batches, limit))


def _split_by_rank(rows: Any, rank: int, world: int) -> Any:
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(rows, rank=rank, world_size=world) if world > 1 else rows
