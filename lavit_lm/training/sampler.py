"""Which rows a run sees, in which order and in which blocks: pure functions of the seed and the place.

order of an epoch   -->  windows of rows  -->  layout               -->  plan        -->  blocks, endless
(seed, epoch)                                  (seed, epoch, row)        (packing.py)     from any count on
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from lavit_lm.sequences.packing import Packed, pack, plan
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor

Place = tuple[int, int]
"""(epoch, row number): what a row's draws depend on, besides the seed."""


class Samples:
    """Samples by number: captioned pictures of token shards first, then plain texts, then documents.

    Args:
        pairs: rows with "key", "caption" and "codes", e.g. Shards.dataset().
        texts: rows with "text", or None.
        pictures: the picture behind each pair by number, e.g. ShardImages; the pairs then need "keep", the numbers of
            the patches behind the codes. None gives images without their pictures.
        patches: of a picture.
        documents: documents[i] is (segments, key), e.g. Documents; or None.
    """

    def __init__(
        self,
        pairs: Any,
        texts: Any | None = None,
        images: Any | None = None,
        patches: int = 0,
        documents: Any | None = None,
    ) -> None:
        self.pairs, self.texts, self.images, self.patches = pairs, texts or (), images, patches
        self.documents = documents or ()

    def __len__(self) -> int:
        return len(self.pairs) + len(self.texts) + len(self.documents)

    def __getitem__(self, number: int) -> tuple[list[Segment], str]:
        """(segments, key). A picture without a caption is a sample of its own; nothing opens a picture here."""
        if number >= len(self.pairs) + len(self.texts):
            return self.documents[number - len(self.pairs) - len(self.texts)]
        if number >= len(self.pairs):
            at = number - len(self.pairs)
            return [TextSegment(self.texts[at]["text"])], f"text {at}"
        row = self.pairs[number]
        image = ImageSegment(torch.as_tensor(row["codes"], dtype=torch.int64))
        if self.images is not None:
            keep = torch.zeros(self.patches, dtype=torch.bool)
            keep[torch.as_tensor(row["keep"], dtype=torch.int64)] = True
            image = ImageSegment(image.codes, partial(self.images.__getitem__, number), keep)
        return [image, *([TextSegment(row["caption"])] if row["caption"] else [])], row["key"]


@dataclass(frozen=True)
class ExampleLayout:
    """Lays samples out as rows by an objective, the same row for the same place.

    Args:
        samples: what samples[i] gives, see Samples.
        objective: one of objectives/.
        lexicon: text tokenizer and visual vocabulary.
        seed: first of the three numbers that seed each row's generator.
    """

    samples: Any
    objective: Any
    processor: MultimodalProcessor
    seed: int = 0

    def row(self, place: Place) -> TokenSequence:
        word = np.random.SeedSequence([self.seed, *place]).generate_state(1)[0]
        segments, key = self.samples[place[1]]
        return self.objective.layout(
            segments, self.processor, torch.Generator().manual_seed(int(word)), key
        )


class Blocks(Dataset):
    """Places of a block's rows -> the rows; collate packs the blocks of a batch."""

    def __init__(self, layout: ExampleLayout, length: int) -> None:
        self.layout, self.length = layout, length

    def __getitem__(self, places: Sequence[Place]) -> list[TokenSequence]:
        return [self.layout.row(place) for place in places]

    def collate(self, blocks: list[list[TokenSequence]]) -> Packed:
        return pack(blocks, self.length, self.layout.processor.pad)


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
        layout: ExampleLayout,
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
        self._latest: tuple[int, list[list[Place]]] = -1, []  # the window that was planned last
        self.blocks = (
            max(1, len(self._plan(0)) * self._windows() // (world * batch_size)) * batch_size
        )

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
        if self._latest[0] != number:
            self._latest = number, self._planned(number)
        return self._latest[1]

    def _planned(self, number: int) -> list[list[Place]]:
        epoch, part = divmod(number, self._windows())
        seeded = np.random.default_rng([self.layout.seed, epoch])
        rows = seeded.permutation(len(self.layout.samples))[
            part * self.window : (part + 1) * self.window
        ]
        made = [(epoch, int(i)) for i in rows]
        lengths = []
        for place in made:
            row = self.layout.row(place)
            lengths.append(len(row))
            if len(row) > self.length:
                self.too_long[row.key] = len(row)
        fitting = [i for i, length in enumerate(lengths) if length <= self.length]
        if not fitting:
            raise ValueError(
                f"blocks of {self.length} places: no row fits, the shortest has {min(lengths)}"
            )
        blocks = [
            [made[fitting[i]] for i in block]
            for block in plan([lengths[i] for i in fitting], self.length)
        ]
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
