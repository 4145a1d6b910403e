"""ImageDataModule: batches of images, and captions if requested, in an order that resumes exactly.

    batch = {"images": uint8 [b 3 s s], "index": int64 [b], "captions": list[str] if requested}

Order and augmentation are pure functions of (seed, epoch, position); the only state is the number
of batches trained on, which Lightning counts. Pixels are not normalized here, but by the model.
"""

from __future__ import annotations

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
)
from lavit_tok.data.rejects import write_rejects
from lavit_tok.data.splits import hold_out, load_splits, undecoded
from lavit_tok.encode.image_files import ResizeMode
from lavit_tok.encode.image_processor import VisualImageProcessor


class EpochOrder(DistributedSampler):
    """Training order: one permutation per epoch, of which each rank takes every world-th index.

    Iterating yields (epoch, index) pairs from the first batch that is not trained on yet to the end
    of its epoch; `len` is that of a full epoch. A DistributedSampler, because Lightning replaces
    any other sampler.

    Args:
        size: examples of the data set.
        batch_size: examples per batch and rank.
        seed: seed of the permutations.
        rank: this process.
        world: number of processes.
        consumed: called with the batches of a full epoch; returns the batches trained on so far,
            and the batches per epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        consumed: Callable[[int], tuple[int, int]],
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world, self.consumed = rank, world, consumed

    def __len__(self) -> int:
        return self.size // self.world

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the epoch follows from the number of consumed batches."""

    @property
    def batches(self) -> int:
        """Batches of a full epoch; an incomplete last one is dropped unless it is the only one."""
        return max(1, len(self) // self.batch_size)

    def indices(self, epoch: int) -> list[int]:
        """The indices of this rank in one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator)
        return order[self.rank :: self.world][: len(self)].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        consumed, batches = self.consumed(self.batches)
        epoch, batch = divmod(consumed, batches)
        for index in self.indices(epoch)[batch * self.batch_size :]:
            yield epoch, index


class ResumingLoader(DataLoader):
    """A loader whose sampler resumes by itself.

    Lightning finds the two methods and allows a run to resume within an epoch; the state is
    Lightning's own count of batches, which the sampler reads.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class RejectingLoader(DataLoader):
    """Reports the rejects of each batch, and skips batches without any readable image."""

    def __init__(self, *args: Any, report: Callable[[list[dict[str, str]]], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.report = report
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch promises its own iterator class
        if isinstance(self.dataset, StreamImages):
            self.dataset.epoch, self.epoch = self.epoch, self.epoch + 1
        for batch in super().__iter__():
            self.report(batch.pop("rejects"))
            if "images" in batch:
                yield batch


class TrainingLoader(RejectingLoader, ResumingLoader):
    """The map-style loader of the training split."""


class ImageDataModule(LightningDataModule):
    """Images, and captions if requested, of any data set that `datasets` opens.

    Args:
        data: image folder, parquet file or folder, webdataset tars, arrow folder, or a Hub name.
        image_size: side of the square that images are resized to (bicubic), in pixels.
        batch_size: images per batch and device.
        num_workers: loading processes per device; 0 is fastest with `cache`.
        seed: seed of order, flips and crops.
        image_column: name of the image column; if it does not exist, the column of images is used
            (webdataset: jpg, png).
        caption_column: name of the caption column, or None for images only.
        splits: names of the training, validation and test split; without a validation split, a
            twentieth of the training images is held out, chosen by their content, and without a
            test split the validation split is used.
        streaming: read without indexing or downloading first; sharded by rank and worker, not
            exactly resumable.
        flip: probability of a horizontal flip in training.
        crop_scale: smallest and largest fraction of the area kept by training crops; (1, 1) for
            none.
        variants: number of different crops and flips of an image, so that a model can keep what it
            computes of them; 0 for others in every epoch.
        cache: decode once to uint8 in memory (12 kB per image at 64 px), the fastest for small
            data.
        resize_mode: "square" resizes both sides, as LaVIT does; "center_crop" and "pad" keep the
            aspect ratio.
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
        variants: int = 0,
        cache: bool = False,
        resize_mode: ResizeMode = "square",
    ):
        super().__init__()
        for name, value, smallest in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        if streaming and cache:
            raise ValueError(
                "cache: expected False with streaming, as it decodes all images at first"
            )
        self.data, self.batch_size, self.num_workers = str(data), batch_size, num_workers
        self.seed, self.image_column, self.caption_column = seed, image_column, caption_column
        self.splits, self.streaming, self.cache = splits, streaming, cache
        processor = VisualImageProcessor(image_size, resize_mode)
        self.augment = Augmentation(processor, flip, crop_scale, seed, variants)
        self.rejects: list[dict[str, str]] = []
        self.held_out = False  # whether "validation" is a part of the training split
        self.sets: dict[str, MapImages | StreamImages] = {}

    def prepare_data(self) -> None:
        """Download and convert in one process, before the others."""
        if not self.streaming:
            load_splits(self.data)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits of a stage: "fit", "validate", "test", or None for all."""
        splits = self._named_splits()
        required = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for name in required.get(stage or "", ("train", "validation", "test")):
            if name not in splits or name in self.sets:
                continue
            split, column = undecoded(splits[name], self.image_column)
            if self.caption_column and self.caption_column not in split.features:
                raise ValueError(
                    f"{self.data}: expected a caption column {self.caption_column!r}, got columns "
                    f"{', '.join(split.features)}"
                )
            training = name == "train"
            options = column, self.caption_column, self.augment, training
            if self.streaming:
                if training:
                    split = split.shuffle(seed=self.seed, buffer_size=1000)
                self.sets[name] = StreamImages(self._of_rank(split), *options)
                continue
            images = self.sets[name] = MapImages(split, *options, cache=self.cache)
            self._report(images.rejects)
            if not len(images):
                raise ValueError(
                    f"{self.data}: no readable image in the {name} split, e.g. {self.rejects[:1]}"
                )
        if stage == "fit" and self.trainer is not None and self.trainer.is_global_zero:
            where = " (held out of train by content)" if self.held_out else ""
            sizes = [
                f"{name} {len(s)}" for name, s in self.sets.items() if isinstance(s, MapImages)
            ]
            if sizes:
                print(f"images: {', '.join(sizes)}{where}", flush=True)

    def _named_splits(self) -> dict[str, Any]:
        loaded = load_splits(self.data, self.streaming)
        roles = zip(("train", "validation", "test"), self.splits, strict=True)
        splits = {role: loaded[name] for role, name in roles if name in loaded}
        if not splits:
            raise ValueError(
                f"{self.data}: expected one of the splits {self.splits}, got {', '.join(loaded)}"
            )
        if not self.streaming:
            self.held_out = "validation" not in splits
            splits = hold_out(splits, self.image_column)
            self.held_out &= "validation" in splits
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits["validation"]
        return splits

    def train_dataloader(self) -> DataLoader:
        images = self.sets["train"]
        if isinstance(images, StreamImages):
            return self._loader(images, drop_last=True)
        order = EpochOrder(len(images), self.batch_size, self.seed, *self._ranks(), self._consumed)
        options = {"sampler": order, "drop_last": len(order) >= self.batch_size}
        return self._loader(images, TrainingLoader, **options)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.sets["validation"]) if "validation" in self.sets else []

    def test_dataloader(self) -> DataLoader | list:
        return self._loader(self.sets["test"]) if "test" in self.sets else []

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on; the count of batches is Lightning's."""
        return {"seed": self.seed, "batch_size": self.batch_size, "world": self._ranks()[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn if the order of the resumed run differs."""
        now = self.state_dict()
        changed = {name: (state[name], now[name]) for name in state if state[name] != now[name]}
        if changed:
            warnings.warn(
                f"resumed with other values of {changed}: images of this epoch will repeat or be "
                "missed",
                stacklevel=2,
            )

    def teardown(self, stage: str | None = None) -> None:
        """Write the rejected images, if any, as JSON lines to the folder of the run."""
        if self.rejects and self.trainer is not None and self.trainer.is_global_zero:
            write_rejects(Path(self.trainer.default_root_dir) / "rejects.jsonl", self.rejects)

    def _loader(
        self, images: Any, kind: type[RejectingLoader] = RejectingLoader, **options: Any
    ) -> DataLoader:
        options |= {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return kind(images, collate_fn=collate, report=self._report, **options)

    def _report(self, rejects: list[dict[str, str]]) -> None:
        known = {reject["key"] for reject in self.rejects}
        self.rejects += [reject for reject in rejects if reject["key"] not in known]

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _of_rank(self, split: Any) -> Any:
        from datasets.distributed import split_dataset_by_node

        rank, world = self._ranks()
        return split_dataset_by_node(split, rank=rank, world_size=world) if world > 1 else split

    def _consumed(self, batches: int) -> tuple[int, int]:
        """(batches trained on, batches per epoch); without a trainer, the start of an epoch."""
        if self.trainer is None:
            return 0, batches
        limit = self.trainer.limit_train_batches
        limit = limit if isinstance(limit, int) else int(batches * limit)
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed, max(1, min(batches, limit))
