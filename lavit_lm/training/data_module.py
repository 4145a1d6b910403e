"""Token shards and plain texts -> packed batches, in an order that a resumed run continues exactly.

    shards (codes, captions) --+
    texts ---------------------+-- a source --+
    documents -----------------+              +-- mixture.py: order --> sampler.py: blocks, batches
                                 other sources --+

The state of a run is the number of batches trained on, which Lightning saves, and the window of
examples that contains this batch, which is saved with it so that earlier windows need not be
planned again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lavit_lm.sequences.documents import Documents
from lavit_lm.training.mixture import Mixture
from lavit_lm.training.sampler import (
    BlockDataset,
    BlockSampler,
    ExampleLayout,
    Examples,
    HeldOutSampler,
    MixedExamples,
)
from lavit_tok import Shards
from lavit_tok.data.shard_images import ShardImages
from lavit_tok.data.shard_records import ShardRecords
from lavit_tok.training.data_module import ResumingLoader


@dataclass(frozen=True)
class Source:
    """A source of examples: token shards, texts, documents, or several of them with one weight."""

    shards: str | None = None
    """Folder written by `lavit-tok shards`."""
    texts: str | None = None
    """JSON lines, parquet or a Hub name with a column "text"."""
    documents: str | None = None
    """JSON lines of texts and images in turn, see documents.py."""
    images: str | None = None
    """The data set from which the shards were created."""
    weight: float = 1.0
    """Number of its examples relative to those of the other sources."""

    @property
    def paths(self) -> list[str]:
        """What it reads examples from."""
        return [path for path in (self.shards, self.texts, self.documents) if path is not None]


def require_sources(sources: Sequence[Source]) -> list[Source]:
    """The sources. Raises ValueError for a weight, or for a path that is missing or repeated."""
    used: set[str] = set()
    for number, source in enumerate(sources):
        if not source.paths:
            raise ValueError(f"source {number}: expected shards, texts or documents, got none")
        if not 0 < source.weight < float("inf"):
            raise ValueError(
                f"source {number} ({source.paths[0]}): expected a finite weight above 0, got "
                f"{source.weight}"
            )
        for path in source.paths:
            if os.path.realpath(path) in used:
                raise ValueError(f"{path}: is given twice; a larger weight has the same effect")
            used.add(os.path.realpath(path))
    if not any(source.shards for source in sources):
        raise ValueError("expected data.shards, or data.sources of which at least one has shards")
    return list(sources)


def source_names(sources: Sequence[Source]) -> list[str]:
    """The first path of each source, without what the paths of all of them begin with."""
    paths = [os.path.realpath(source.paths[0]) for source in sources]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


class LanguageDataModule(LightningDataModule):
    """Packed blocks of token shards and texts, laid out by the trained module's objective.

    Args:
        shards: folder written by `lavit-tok shards`; with `texts`, `images` and `documents` the
            only source, of which every example comes once an epoch.
        block: tokens of a block.
        batch_size: blocks of a batch and device.
        texts: JSON lines, parquet or a Hub name with a column "text", mixed in as text-only
            sequences; None for none.
        window: examples that are packed together.
        num_workers: loading processes per device.
        seed: determines the order and all random draws.
        splits: names of the training, validation and test split in the shards.
        images: the data set from which the shards were created (path or Hub name), for an objective
            that embeds images as vectors; an image is opened only when its vectors are needed.
        documents: JSON lines of texts and images in turn, mixed in as sequences of their own; see
            documents.py. For an objective with codes their images are encoded at the start, by the
            module's visual tokenizer.
        sources: several sources with weights, in place of `shards` and the other three; held-out
            losses are logged for each source with shards and for all of them together.
        verify: compare every shard with its digest at the start; False does so when a shard is
            first read, for data of which this would take long.
    """

    def __init__(
        self,
        shards: str | None = None,
        block: int = 512,
        batch_size: int = 8,
        texts: str | None = None,
        window: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        images: str | None = None,
        documents: str | None = None,
        sources: list[Source] | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("block", block), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        alone = Source(shards, texts, documents, images)
        if sources and alone != Source():
            raise ValueError(
                "expected data.sources, or data.shards with texts, documents and images, got both"
            )
        self.sources = require_sources(sources or [alone])
        self.names = source_names(self.sources)
        self.block, self.batch_size, self.window = block, batch_size, window
        self.num_workers, self.seed, self.splits, self.verify = num_workers, seed, splits, verify
        self.sampler: BlockSampler | None = None
        self.too_long: dict[str, int] = {}
        self._warned = False

    def setup(self, stage: str | None = None) -> None:
        """Open shards, texts, documents and images.

        Raises:
            ShardError: shards of another tokenizer than the module's, or images from which the
                shards were not created.
            ValueError: an objective that needs pixels without `images`, or `images` for one that
                does not; a line that is not a document.
        """
        module: Any = self.trainer.lightning_module
        objective = module.objective
        for source in self.sources:
            needs_pixels = objective.connectors.needs_pixels and source.shards is not None
            if needs_pixels and source.images is None:
                raise ValueError(
                    f"{objective.name}: images are embedded as vectors of their pixels, which the "
                    "shards do not contain; give "
                    f"data.images, the data set from which {source.shards} was created"
                )
            if source.images is not None and not needs_pixels:
                raise ValueError(
                    f"data.images: the objective {objective.name}, as configured, uses codes and "
                    "no pixels"
                )
        if stage == "fit":
            sources = [self._training_examples(source) for source in self.sources]
            examples = sources[0] if len(sources) == 1 else MixedExamples(sources)
            layout = self._layout(examples)
            weights = [source.weight for source in self.sources]
            self.mixture = Mixture([len(source) for source in sources], weights, self.seed)
            sizes = self.block, self.batch_size, self.window
            ranks = self._ranks()
            self.sampler = BlockSampler(layout, *sizes, *ranks, self._consumed, self.mixture)
            self.blocks = BlockDataset(layout, self.block)
        split = self.splits[2 if stage == "test" else 1]
        self.held_out = {
            name: self._layout(self._pairs(source, split))
            for name, source in zip(self.names, self.sources, strict=True)
            if source.shards is not None
        }
        self._held_out_blocks = {}
        for name, held_out in self.held_out.items():
            indices = [(0, i) for i in range(len(held_out.examples))]
            self._held_out_blocks[name], too_long = held_out.plan(indices, self.block)
            self.too_long |= too_long
        self._report_too_long()
        if stage == "fit" and self.trainer.is_global_zero:
            counts = "" if len(self.sources) == 1 else f" ({self._counts()})"
            held_out_count = sum(len(h.examples) for h in self.held_out.values())
            print(
                f"examples: {self.splits[0]} {len(self.mixture)}{counts}, {split} {held_out_count}"
            )

    @property
    def held_out_examples(self) -> MixedExamples:
        """Those of all sources with shards."""
        return MixedExamples([layout.examples for layout in self.held_out.values()])

    def _counts(self) -> str:
        """E.g. "images 100 with weight 0.7, texts.jsonl 20 with weight 0.3"."""
        listed = zip(self.names, self.mixture.sizes, self.sources, strict=True)
        return ", ".join(f"{name} {size} with weight {s.weight:g}" for name, size, s in listed)

    def _layout(self, examples: Any) -> ExampleLayout:
        module: Any = self.trainer.lightning_module
        return ExampleLayout(examples, module.objective, module.processor, self.seed)

    def _training_examples(self, source: Source) -> Examples:
        others = _texts(source.texts), self._documents(source.documents)
        if source.shards is not None:
            return self._pairs(source, self.splits[0], *others)
        examples = Examples((), others[0], documents=others[1])
        if not len(examples):
            raise ValueError(f"{source.paths[0]}: expected at least one example, got none")
        return examples

    def _pairs(
        self,
        source: Source,
        split: str,
        texts: Any | None = None,
        documents: Documents | None = None,
    ) -> Examples:
        module: Any = self.trainer.lightning_module
        assert source.shards is not None
        shards = Shards.open(source.shards, split, True if self.verify else None)
        vocabulary = module.processor.vocabulary
        shards.require(fingerprint=module.fingerprint, codebook_size=vocabulary.codebook_size)
        records = ShardRecords(shards, verify=not self.verify)
        images = None
        if source.images is not None:
            images = ShardImages(shards, source.images, module.visual.image_processor)
        else:
            records = records.select_columns(["key", "caption", "codes"])
        return Examples(records, texts, images, shards.patches, documents)

    def _documents(self, file: str | None) -> Documents | None:
        if file is None:
            return None
        module: Any = self.trainer.lightning_module
        options: dict[str, Any] = {}
        connectors, image_output = module.objective.connectors, module.objective.image_output
        if connectors.codes != "none":
            budget = image_output.encode_budget(module.visual.config.num_patches)
            size = module.processor.vocabulary.codebook_size
            options = {"fingerprint": module.fingerprint, "codebook_size": size}
            options["encode"] = partial(module.visual.encode, budget=budget)
        processor = module.visual.image_processor
        return Documents(file, processor, pixels=connectors.needs_pixels, **options)

    def train_dataloader(self) -> DataLoader:
        return ResumingLoader(
            self.blocks,
            self.batch_size,
            sampler=self.sampler,
            drop_last=True,
            collate_fn=self.blocks.collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """For each source with shards, every held-out example once, with the draws of epoch 0."""
        loaders = []
        for name, layout in self.held_out.items():
            blocks = BlockDataset(layout, self.block)
            loaders.append(
                DataLoader(
                    blocks,
                    self.batch_size,
                    sampler=HeldOutSampler(self._held_out_blocks[name], *self._ranks()),
                    collate_fn=blocks.collate,
                    num_workers=self.num_workers,
                )
            )
        return loaders

    test_dataloader = val_dataloader

    def _report_too_long(self) -> None:
        """Warn once of sequences longer than a block; list all planned so far in too_long.jsonl."""
        if self.sampler is not None:
            self.too_long |= self.sampler.too_long
        if not self.too_long or not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / "too_long.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"key": key, "tokens": n, "block": self.block}, ensure_ascii=False)
            for key, n in self.too_long.items()
        ]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if not self._warned:
            self._warned = True
            first = ", ".join(f"{key} ({n})" for key, n in list(self.too_long.items())[:3])
            warnings.warn(
                f"{len(self.too_long)} of the sequences planned so far have more tokens than a "
                f"block of {self.block} "
                f"and are left out: {first}{', ...' if len(self.too_long) > 3 else ''}; all are "
                f"listed in {path}",
                stacklevel=2,
            )

    def teardown(self, stage: str | None = None) -> None:
        self._report_too_long()

    def state_dict(self) -> dict[str, Any]:
        if self.sampler is None:
            return {}
        return {
            **self._order_arguments(),
            "window_start": list(self.sampler.window_of()),
            "blocks": self.sampler.consumed_blocks(),
            "batches": self.sampler.consumed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for arguments under which the run's order would be another one.

        The number of processes and the batch size may change: the order of blocks stays the same.
        """
        if self.sampler is None:
            return  # validation or test
        changed: dict[str, tuple[Any, Any]] = {
            name: (state[name], value)
            for name, value in self._order_arguments().items()
            if state.get(name, value) != value
        }
        if "blocks" not in state:
            changed["order"] = ("of an earlier version", "computed for each position")
        if changed:
            raise ValueError(
                f"resumed with other arguments {changed}: examples would be repeated or missed"
            )
        first, number = state["window_start"]
        self.sampler.starts.append((first, number))
        self.sampler.resumed = state["batches"], state["blocks"]

    def _order_arguments(self) -> dict[str, Any]:
        """The arguments that determine the order."""
        arguments = {name: getattr(self, name) for name in ("seed", "block", "window")}
        arguments |= {"examples": len(self.mixture)}
        if len(self.sources) > 1:
            weights = [source.weight for source in self.sources]
            arguments["sources"] = [*map(list, zip(self.mixture.sizes, weights, strict=True))]
        return arguments

    def _ranks(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def _consumed(self) -> int:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed


def _texts(path: str | None) -> Any | None:
    if path is None:
        return None
    import datasets

    formats = {".jsonl": "json", ".parquet": "parquet"}
    file_format = formats.get(Path(path).suffix)
    if file_format and Path(path).is_file() and not Path(path).stat().st_size:
        raise ValueError(f"{path}: expected at least one text, got an empty file")
    files = {} if file_format is None else {"data_files": path}
    texts = datasets.load_dataset(file_format or path, split="train", **files)
    if "text" not in texts.column_names:
        got = ", ".join(texts.column_names)
        raise ValueError(f"{path}: expected a column 'text', got {got}")
    return texts
