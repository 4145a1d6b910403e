"""Token shards and plain texts -> packed batches that a stopped run continues exactly.

    shards (codes, captions) --+-- order of an epoch --> windows of rows --> layout --> plan --> blocks --> batches
    texts ---------------------+   (seed, epoch)         (seed, epoch, row)

The order of an epoch, the draws of each row (which segment first, prompt dropped) and the packing of each window are
pure functions of seed, epoch and place. Where a run stands is one count, the batches trained on, which Lightning keeps,
and the window in which the count lies, which is saved with it so that nothing before it has to be planned again.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lavit_lm.lexicon import Lexicon
from lavit_lm.packing import Packed, pack, plan
from lavit_lm.segments import Image, Row, Segment, Text
from lavit_tok import ShardPictures, Shards

Place = tuple[int, int]
"""(epoch, row number): what a row's draws depend on, besides the seed."""


class Samples:
    """Samples by number: captioned pictures of token shards first, plain texts after them.

    Args:
        pairs: rows with "key", "caption" and "codes", e.g. Shards.dataset().
        texts: rows with "text", or None.
        pictures: the picture behind each pair by number, e.g. ShardPictures; the pairs then need "keep", the numbers of
            the patches behind the codes. None gives images without their pictures.
        patches: of a picture.
    """

    def __init__(self, pairs: Any, texts: Any | None = None, pictures: Any | None = None, patches: int = 0) -> None:
        self.pairs, self.texts, self.pictures, self.patches = pairs, texts, pictures, patches

    def __len__(self) -> int:
        return len(self.pairs) + (0 if self.texts is None else len(self.texts))

    def __getitem__(self, number: int) -> tuple[list[Segment], str]:
        """(segments, key). A picture without a caption is a sample of its own; nothing opens a picture here."""
        if number >= len(self.pairs):
            assert self.texts is not None
            at = number - len(self.pairs)
            return [Text(self.texts[at]["text"])], f"text {at}"
        row = self.pairs[number]
        image = Image(torch.as_tensor(row["codes"], dtype=torch.int64))
        if self.pictures is not None:
            keep = torch.zeros(self.patches, dtype=torch.bool)
            keep[torch.as_tensor(row["keep"], dtype=torch.int64)] = True
            image = Image(image.codes, partial(self.pictures.__getitem__, number), keep)
        return [image, *([Text(row["caption"])] if row["caption"] else [])], row["key"]


@dataclass(frozen=True)
class Layout:
    """Lays samples out as rows by an objective, the same row for the same place.

    Args:
        samples: what samples[i] gives, see Samples.
        objective: one of objectives/.
        lexicon: text tokenizer and visual vocabulary.
        seed: first of the three numbers that seed each row's generator.
    """

    samples: Any
    objective: Any
    lexicon: Lexicon
    seed: int = 0

    def row(self, place: Place) -> Row:
        word = np.random.SeedSequence([self.seed, *place]).generate_state(1)[0]
        segments, key = self.samples[place[1]]
        return self.objective.layout(segments, self.lexicon, torch.Generator().manual_seed(int(word)), key)


class Blocks(Dataset):
    """Places of a block's rows -> the rows; collate packs the blocks of a batch."""

    def __init__(self, layout: Layout, length: int) -> None:
        self.layout, self.length = layout, length

    def __getitem__(self, places: Sequence[Place]) -> list[Row]:
        return [self.layout.row(place) for place in places]

    def collate(self, blocks: list[list[Row]]) -> Packed:
        return pack(blocks, self.length, self.layout.lexicon.pad)


class BlockOrder(DistributedSampler):
    """Endless order of blocks, planned window by window, from the first batch not yet trained on.

    It is a DistributedSampler so that Lightning leaves it in place. A Lightning epoch is `len` blocks of it, whatever
    the data's own epochs; nothing is dropped at either border.

    Args:
        layout: makes rows, whose lengths the plan needs.
        length: places of a block.
        batch_size: blocks of a batch and rank.
        window: rows that are planned together; more fill blocks better, and take longer at the start.
        rank, world: this process and how many there are; of each group of batches, one for each rank.
        consumed: how many batches each rank has trained on; asked whenever the order is read anew.
    """

    def __init__(
        self,
        layout: Layout,
        length: int,
        batch_size: int,
        window: int,
        rank: int = 0,
        world: int = 1,
        consumed: Callable[[], int] = lambda: 0,
    ) -> None:
        self.layout, self.length, self.batch_size, self.window = layout, length, batch_size, window
        self.rank, self.world, self.consumed = rank, world, consumed
        self.starts = [(0, 0)]  # (first block, number) of the windows met so far
        self.too_long: dict[str, int] = {}
        self.blocks = max(1, len(self._plan(0)) * self._windows() // (world * batch_size)) * batch_size

    def __len__(self) -> int:
        """Blocks of a Lightning epoch on this rank: about one pass over the data, always whole batches."""
        return self.blocks

    def set_epoch(self, epoch: int) -> None:
        """Ignored: the order follows from the batches consumed."""

    def __iter__(self) -> Iterator[list[Place]]:
        skip = self.consumed() * self.batch_size * self.world  # blocks of all ranks
        start, first = self.window_of(skip)
        for window in itertools.count(first):
            blocks = self._plan(window)
            if (start, window) not in self.starts:
                self.starts.append((start, window))
            for number, block in enumerate(blocks, start):
                if number >= skip and number // self.batch_size % self.world == self.rank:
                    yield block
            start += len(blocks)

    def window_of(self, block: int | None = None) -> tuple[int, int]:
        """(first block, number) of the latest known window that does not begin after a block, by default the next."""
        block = self.consumed() * self.batch_size * self.world if block is None else block
        return max(start for start in self.starts if start[0] <= block)

    def _windows(self) -> int:
        return max(1, -(-len(self.layout.samples) // self.window))

    def _plan(self, number: int) -> list[list[Place]]:
        """Blocks of one window, in the order of training. Rows longer than a block are left out and counted by key."""
        epoch, part = divmod(number, self._windows())
        seeded = np.random.default_rng([self.layout.seed, epoch])
        rows = seeded.permutation(len(self.layout.samples))[part * self.window : (part + 1) * self.window]
        made = [(epoch, int(i)) for i in rows]
        lengths = []
        for place in made:
            row = self.layout.row(place)
            lengths.append(len(row))
            if len(row) > self.length:
                self.too_long[row.key] = len(row)
        fitting = [i for i, length in enumerate(lengths) if length <= self.length]
        if not fitting:
            raise ValueError(f"blocks of {self.length} places: no row fits, the shortest has {min(lengths)}")
        blocks = [[made[fitting[i]] for i in block] for block in plan([lengths[i] for i in fitting], self.length)]
        np.random.default_rng([self.layout.seed, epoch, part]).shuffle(blocks)
        return blocks


class HeldOutOrder(DistributedSampler):
    """A list of blocks, each once, dealt to the ranks in turn.

        blocks 0 1 2 3 4, two ranks     rank 0   0 2 4
                                        rank 1   1 3 []      empty, so that all ranks make as many steps

    It is a DistributedSampler so that Lightning leaves it in place: its own would repeat blocks, and the means would
    count them twice.
    """

    def __init__(self, blocks: list[list[Place]], rank: int = 0, world: int = 1) -> None:
        missing: list[list[Place]] = [[] for _ in range(-len(blocks) % world)]
        self.blocks = [*blocks, *missing][rank::world]

    def __len__(self) -> int:
        return len(self.blocks)

    def set_epoch(self, epoch: int) -> None:
        """Ignored: there is one order."""

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.blocks)


class ResumingLoader(DataLoader):
    """The two empty methods tell Lightning, truthfully, that a run resumed in mid-epoch goes on where it was."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: the order reads the count of batches."""


class LanguageDataModule(LightningDataModule):
    """Packed blocks of token shards and texts, laid out by the objective of the module that is trained.

    Args:
        shards: folder that `lavit-tok shards` wrote.
        block: places of a block.
        batch_size: blocks of a batch and device.
        texts: JSON lines, parquet or a Hub name with a column "text", mixed in as text-only rows; None for none.
        window: rows that are packed together.
        num_workers: loading processes per device.
        seed: fixes order and draws.
        splits: names of the training, validation and test split in the shards.
        pictures: the data set that the shards were made from (path or Hub name), for a module that is fed pictures as
            vectors; each is opened only when a row really feeds it.
    """

    def __init__(
        self,
        shards: str,
        block: int = 512,
        batch_size: int = 8,
        texts: str | None = None,
        window: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        pictures: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("block", block), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.shards, self.block, self.batch_size, self.texts = shards, block, batch_size, texts
        self.window, self.num_workers, self.seed, self.splits = window, num_workers, seed, splits
        self.pictures = pictures
        self.order: BlockOrder | None = None
        self.too_long: dict[str, int] = {}
        self.told = False

    def setup(self, stage: str | None = None) -> None:
        """Open shards, texts and pictures.

        Raises:
            ShardError: shards of another tokenizer than the module's, or pictures that the shards were not made from.
            ValueError: a module that is fed pictures without any being named, or the other way round.
        """
        module: Any = self.trainer.lightning_module
        if module.settings.continuous and self.pictures is None:
            raise ValueError(
                "continuous: images before text are fed as vectors of their pictures, which the shards do not hold; "
                f"give data.pictures, the data set that {self.shards} was made from"
            )
        if self.pictures is not None and not module.settings.continuous:
            raise ValueError("data.pictures: they are read only by a model with continuous=True, got continuous=False")
        if stage == "fit":
            layout = Layout(self._samples(self.splits[0], self._texts()), module.objective, module.lexicon, self.seed)
            sizes = self.block, self.batch_size, self.window
            self.order = BlockOrder(layout, *sizes, *self._ranks(), self._consumed)
            self.blocks = Blocks(layout, self.block)
        held_out = self._samples(self.splits[2 if stage == "test" else 1])
        self.held_out = Layout(held_out, module.objective, module.lexicon, self.seed)
        self._held_out_blocks = self._plan_held_out()
        self._tell_too_long()

    def _samples(self, split: str, texts: Any | None = None) -> Samples:
        module: Any = self.trainer.lightning_module
        shards = Shards.open(self.shards, split)
        vocabulary = module.lexicon.vocabulary
        shards.require(fingerprint=module.fingerprint, codebook_size=vocabulary.codebook_size)
        c = module.visual.config
        pictures = None if self.pictures is None else ShardPictures(shards, self.pictures, c.image_size, c.crop)
        return Samples(shards.dataset(), texts, pictures, shards.patches)

    def _texts(self) -> Any | None:
        if self.texts is None:
            return None
        import datasets

        kinds = {".jsonl": "json", ".parquet": "parquet"}
        kind = next((kind for suffix, kind in kinds.items() if self.texts.endswith(suffix)), None)
        files = {} if kind is None else {"data_files": self.texts}
        return datasets.load_dataset(kind or self.texts, split="train", **files)

    def train_dataloader(self) -> DataLoader:
        loader: dict[str, Any] = {"collate_fn": self.blocks.collate, "num_workers": self.num_workers}
        return ResumingLoader(self.blocks, self.batch_size, sampler=self.order, drop_last=True, **loader)

    def val_dataloader(self) -> DataLoader:
        """Every held-out sample once, in the order that its own draw gives it."""
        made = Blocks(self.held_out, self.block)
        order = HeldOutOrder(self._held_out_blocks, *self._ranks())
        loader: dict[str, Any] = {"collate_fn": made.collate, "num_workers": self.num_workers}
        return DataLoader(made, self.batch_size, sampler=order, **loader)

    test_dataloader = val_dataloader

    def _plan_held_out(self) -> list[list[Place]]:
        places = [(0, i) for i in range(len(self.held_out.samples))]
        rows = [self.held_out.row(place) for place in places]
        self.too_long |= {row.key: len(row) for row in rows if len(row) > self.block}
        fitting = [i for i, row in enumerate(rows) if len(row) <= self.block]
        return [[places[fitting[i]] for i in block] for block in plan([len(rows[i]) for i in fitting], self.block)]

    def _tell_too_long(self) -> None:
        """Warn once of rows that no block can hold, and list all those met in a file beside the run's others."""
        if self.order is not None:
            self.too_long |= self.order.too_long
        if not self.too_long or not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / "too_long.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"key": key, "places": places, "block": self.block} for key, places in self.too_long.items()]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        if not self.told:
            self.told = True
            first = ", ".join(f"{key} ({places})" for key, places in list(self.too_long.items())[:3])
            warnings.warn(
                f"{len(self.too_long)} of the rows planned so far have more places than a block of {self.block} and "
                f"are left out: {first}{', ...' if len(self.too_long) > 3 else ''}; all are listed in {path}",
                stacklevel=2,
            )

    def teardown(self, stage: str | None = None) -> None:
        self._tell_too_long()

    def state_dict(self) -> dict[str, Any]:
        at = (0, 0) if self.order is None else self.order.window_of()
        return {**self._settings(), "at": list(at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for settings under which the run's order would be another one."""
        if self.order is None:
            return  # nothing is trained
        now = self._settings()
        changed = {name: (state[name], value) for name, value in now.items() if state.get(name, value) != value}
        if changed:
            raise ValueError(f"resumed with other settings {changed}: rows would repeat or be missed")
        self.order.starts.append((state["at"][0], state["at"][1]))

    def _settings(self) -> dict[str, int]:
        """What the order follows from."""
        names = ("seed", "batch_size", "block", "window")
        rows = 0 if self.order is None else len(self.order.layout.samples)
        return {**{name: getattr(self, name) for name in names}, "rows": rows, "processes": self._ranks()[1]}

    def _ranks(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def _consumed(self) -> int:
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return done.processed
