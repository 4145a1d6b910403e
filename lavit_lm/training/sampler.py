"""Which examples a run trains on, in which order and blocks: functions of seed and index.

    positions  -Mixture->  windows of examples  -lengths, plan_blocks->  blocks, an endless order

Draws depend on (seed, epoch, example) and the order on (seed, position), so that a run can continue
from any batch. An example is built once, in the loader: blocks are planned from the stored number
of codes and the number of text tokens, counted once.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from lavit_lm.objectives.base import Objective
from lavit_lm.sequences.packing import PackedBatch, pack, plan_blocks
from lavit_lm.sequences.segments import ImageSegment, Segment, SegmentLength, TextSegment
from lavit_lm.sequences.token_sequence import TokenSequence
from lavit_lm.training.mixture import ExampleIndex, Mixture
from lavit_lm.vocabulary.processor import MultimodalProcessor

COUNTS_KEPT = 1_000_000
"""Texts of which the number of tokens is kept, so that it is counted once in a small data set."""


class Examples:
    """Examples by number: captioned images of token shards first, then plain texts, then documents.

    Args:
        pairs: records with "key", "caption", "codes" and "length" (the number of codes), e.g.
            ShardRecords.
        texts: records with "text", or None.
        images: the image of each pair by number, e.g. ShardImages; the pairs then need "keep", the
            indices of the patches of the codes. None gives segments without pixels.
        patches: of an image.
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
        # The codes of a pair are a list: planning reads the other columns only.
        columns = ["key", "caption", "length"]
        self._index = pairs.select_columns(columns) if hasattr(pairs, "select_columns") else pairs
        self._token_counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.pairs) + len(self.texts) + len(self.documents)

    def __getitem__(self, number: int) -> tuple[list[Segment], str]:
        """(segments, key); an image without a caption is an example of its own."""
        kind, i = self._find(number)
        if kind == "document":
            return self.documents[i]
        if kind == "text":
            return [TextSegment(self.texts[i]["text"])], f"text {i}"
        record = self.pairs[i]
        image = ImageSegment(torch.as_tensor(record["codes"], dtype=torch.int64))
        if self.images is not None:
            keep = torch.zeros(self.patches, dtype=torch.bool)
            keep[torch.as_tensor(record["keep"], dtype=torch.int64)] = True
            image = ImageSegment(image.codes, partial(self.images.__getitem__, i), keep)
        caption = record["caption"]
        return [image, *([TextSegment(caption)] if caption else [])], record["key"]

    def lengths(
        self, number: int, processor: MultimodalProcessor
    ) -> tuple[list[SegmentLength], str]:
        """(lengths of the segments, key), without codes; texts of pairs are tokenized once."""
        kind, i = self._find(number)
        if kind == "document":
            segments, key = self.documents[i]
            return [segment_length(s, processor) for s in segments], key
        record = self.texts[i] if kind == "text" else self._index[i]
        text = record["text"] if kind == "text" else record["caption"]
        count = self._token_counts.get(number)
        if count is None:
            if len(self._token_counts) >= COUNTS_KEPT:  # memory that does not depend on the data
                self._token_counts.clear()
            count = self._token_counts[number] = len(processor.text(text)) if text else 0
        text_length = [SegmentLength(count, text)] if text else []
        if kind == "text":
            return text_length or [SegmentLength(0, "")], f"text {i}"
        return [SegmentLength(processor.count(record["length"])), *text_length], record["key"]

    def _find(self, number: int) -> tuple[str, int]:
        for kind, records in (("pair", self.pairs), ("text", self.texts)):
            if number < len(records):
                return kind, number
            number -= len(records)
        return "document", number


class MixedExamples:
    """The examples of several sources; numbers count through the sources, as those of Mixture."""

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = sources
        self._ends = [*itertools.accumulate(len(source) for source in sources)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> tuple[list[Segment], str]:
        source, i = self._find(number)
        return source[i]

    def lengths(
        self, number: int, processor: MultimodalProcessor
    ) -> tuple[list[SegmentLength], str]:
        """(lengths of the segments, key), without codes."""
        source, i = self._find(number)
        return source.lengths(i, processor)

    def _find(self, number: int) -> tuple[Any, int]:
        at = bisect.bisect_right(self._ends, number)
        return self.sources[at], number - (self._ends[at - 1] if at else 0)


def segment_length(segment: Segment, processor: MultimodalProcessor) -> SegmentLength:
    """The length of a segment that is not None."""
    if isinstance(segment, TextSegment):
        count = len(processor.text(segment.text))
        return SegmentLength(count, segment.text, segment.is_target)
    count = 0 if segment.codes is None else processor.count(len(segment.codes))
    return SegmentLength(count, is_target=segment.is_target)


@dataclass(frozen=True)
class ExampleLayout:
    """Builds the sequences of examples by an objective, the same sequence for the same index.

    Args:
        examples: examples[i] is (segments, key), examples.lengths(i, processor) their lengths; see
            Examples.
        objective: one of objectives/.
        processor: text tokenizer and visual vocabulary.
        seed: first of the three numbers that seed each sequence's generator.
    """

    examples: Any
    objective: Objective
    processor: MultimodalProcessor
    seed: int = 0

    def sequence(self, index: ExampleIndex) -> TokenSequence:
        """The sequence of an example in an epoch."""
        segments, key = self.examples[index[1]]
        return self.objective.layout(segments, self.processor, self._generator(index), key)

    def length(self, index: ExampleIndex) -> tuple[int, str]:
        """(length of that sequence, key), built only if the objective cannot compute its length."""
        lengths, key = self.examples.lengths(index[1], self.processor)
        generator = self._generator(index)  # seeded as for the sequence: the same draws
        length = self.objective.sequence_length(lengths, self.processor, generator)
        return (len(self.sequence(index)) if length is None else length), key

    def plan(
        self, indices: Sequence[ExampleIndex], block: int
    ) -> tuple[list[list[ExampleIndex]], dict[str, int]]:
        """(blocks of the sequences that fit into one, the lengths of the others by key)."""
        lengths, too_long, fitting = [], {}, []
        for index in indices:
            length, key = self.length(index)
            if length > block:
                too_long[key] = length
            else:
                fitting.append(index)
                lengths.append(length)
        blocks = [[fitting[i] for i in numbers] for numbers in plan_blocks(lengths, block)]
        return blocks, too_long

    def _generator(self, index: ExampleIndex) -> torch.Generator:
        return torch.Generator().manual_seed(_mixed(self.seed, *index))


@lru_cache(maxsize=1 << 14)  # the same example is planned, and then built
def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class BlockDataset(Dataset):
    """Indices of a block's examples -> their sequences; collate packs the blocks of a batch."""

    def __init__(self, layout: ExampleLayout, length: int) -> None:
        self.layout, self.length = layout, length

    def __getitem__(self, block: Sequence[ExampleIndex]) -> list[TokenSequence]:
        return [self.layout.sequence(index) for index in block]

    def collate(self, blocks: list[list[TokenSequence]]) -> PackedBatch:
        """Pack the blocks of a batch."""
        return pack(blocks, self.length, self.layout.processor.pad)


class BlockSampler(DistributedSampler):
    """Endless order of blocks, planned window by window, from the first batch not yet trained on.

    It is a DistributedSampler so that Lightning does not replace it. A Lightning epoch is `len`
    blocks of it, independent of the data's own epochs; nothing is dropped at either boundary.

    Args:
        layout: builds sequences.
        length: positions of a block.
        batch_size: blocks of a batch.
        window: examples that are packed together.
        rank, world_size: batches are assigned to the ranks in turn.
        consumed: returns how many batches each rank has trained on; called whenever an iteration
            starts.
        mixture: the order of the examples; by default that of a single source.

    A pass is as many positions as there are examples, and its last window is shorter: of a single
    source, no window has examples of two epochs.

    `resumed` is (batches of each rank, blocks of all ranks) when the number of processes or the
    batch size last changed.
    """

    def __init__(
        self,
        layout: ExampleLayout,
        length: int,
        batch_size: int,
        window: int,
        rank: int = 0,
        world_size: int = 1,
        consumed: Callable[[], int] = lambda: 0,
        mixture: Mixture | None = None,
    ) -> None:
        self.mixture = mixture or Mixture([len(layout.examples)], seed=layout.seed)
        self.layout, self.length, self.batch_size, self.window = layout, length, batch_size, window
        self.rank, self.world_size, self.consumed = rank, world_size, consumed
        self.resumed = (0, 0)
        self.starts = [(0, 0)]  # (first block, number) of the windows planned so far
        self.too_long: dict[str, int] = {}
        self._latest: tuple[int, list[list[ExampleIndex]]] = -1, []  # the last planned window
        batches = len(self._plan(0)) * self._windows() // (world_size * batch_size)
        self.blocks = max(1, batches) * batch_size

    def __len__(self) -> int:
        """Blocks of a Lightning epoch on this rank: about one pass over the data, whole batches."""
        return self.blocks

    def set_epoch(self, epoch: int) -> None:
        """Ignored: the order follows from the number of batches consumed."""

    def __iter__(self) -> Iterator[list[ExampleIndex]]:
        skip = self.consumed_blocks()
        start, first = self.window_of(skip)
        for window in itertools.count(first):
            blocks = self._plan(window)
            if (start, window) not in self.starts:
                self.starts.append((start, window))
            for number, block in enumerate(blocks, start):
                batch = (number - skip) // self.batch_size
                if number >= skip and batch % self.world_size == self.rank:
                    yield block
            start += len(blocks)

    def window_of(self, block: int | None = None) -> tuple[int, int]:
        """(first block, number) of the planned window with a block, by default the next one."""
        block = self.consumed_blocks() if block is None else block
        return max(start for start in self.starts if start[0] <= block)

    def consumed_blocks(self) -> int:
        """Blocks of all ranks."""
        batches, blocks = self.resumed
        return blocks + (self.consumed() - batches) * self.batch_size * self.world_size

    def _windows(self) -> int:
        return -(-len(self.mixture) // self.window)

    def _plan(self, number: int) -> list[list[ExampleIndex]]:
        """Blocks of one window, in the order of training; longer sequences are left out."""
        if self._latest[0] == number:
            return self._latest[1]
        number_of_pass, part = divmod(number, self._windows())
        start, stop = (
            number_of_pass * len(self.mixture) + p * self.window for p in (part, part + 1)
        )
        examples = self.mixture[start : min(stop, (number_of_pass + 1) * len(self.mixture))]
        blocks, too_long = self.layout.plan(examples, self.length)
        if not blocks:
            raise ValueError(
                f"blocks of {self.length} tokens: no sequence fits, the shortest has "
                f"{min(too_long.values())}"
            )
        self.too_long |= too_long
        np.random.default_rng([self.layout.seed, number_of_pass, part]).shuffle(blocks)
        self._latest = number, blocks
        return blocks


class HeldOutSampler(DistributedSampler):
    """A list of blocks, each once, assigned to the ranks in turn.

        blocks 0 1 2 3 4, two ranks     rank 0   0 2 4
                                        rank 1   1 3 []      empty: equal numbers of steps

    It is a DistributedSampler so that Lightning does not replace it: Lightning's own would repeat
    blocks, and the means would count them twice.
    """

    def __init__(
        self, blocks: list[list[ExampleIndex]], rank: int = 0, world_size: int = 1
    ) -> None:
        missing: list[list[ExampleIndex]] = [[] for _ in range(-len(blocks) % world_size)]
        self.blocks = [*blocks, *missing][rank::world_size]

    def __len__(self) -> int:
        return len(self.blocks)

    def set_epoch(self, epoch: int) -> None:
        """Ignored: there is one order."""

    def __iter__(self) -> Iterator[list[ExampleIndex]]:
        return iter(self.blocks)
