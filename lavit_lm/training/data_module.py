"""Token shards and plain texts -> packed batches that a stopped run continues exactly.

    shards (codes, captions) --+-- sampler.py: sequences, blocks --> batches
    texts ---------------------+
    documents -----------------+

The state of a run is the number of batches trained on, which Lightning saves, and the window of
examples that contains this batch, which is saved with it so that earlier windows need not be
planned again.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lavit_lm.sequences.documents import Documents
from lavit_lm.training.sampler import (
    BlockDataset,
    BlockSampler,
    ExampleLayout,
    Examples,
    HeldOutSampler,
)
from lavit_tok import Shards
from lavit_tok.data.shard_images import ShardImages
from lavit_tok.training.data_module import ResumingLoader


class LanguageDataModule(LightningDataModule):
    """Packed blocks of token shards and texts, laid out by the trained module's objective.

    Args:
        shards: folder written by `lavit-tok shards`.
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
        images: str | None = None,
        documents: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("block", block), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.shards, self.block, self.batch_size, self.texts = shards, block, batch_size, texts
        self.window, self.num_workers, self.seed, self.splits = window, num_workers, seed, splits
        self.images, self.documents = images, documents
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
        name, needs_pixels = module.objective.name, module.objective.connectors.needs_pixels
        if needs_pixels and self.images is None:
            raise ValueError(
                f"{name}: images are embedded as vectors of their pixels, which the shards do "
                "not contain; give "
                f"data.images, the data set from which {self.shards} was created"
            )
        if self.images is not None and not needs_pixels:
            raise ValueError(
                f"data.images: the objective {name}, as configured, uses codes and no pixels"
            )
        if stage == "fit":
            examples = self._examples(self.splits[0], self._texts(), self._documents())
            layout = ExampleLayout(examples, module.objective, module.processor, self.seed)
            sizes = self.block, self.batch_size, self.window
            self.sampler = BlockSampler(layout, *sizes, *self._ranks(), self._consumed)
            self.blocks = BlockDataset(layout, self.block)
        examples = self._examples(self.splits[2 if stage == "test" else 1])
        self.held_out = ExampleLayout(examples, module.objective, module.processor, self.seed)
        self._held_out_blocks, too_long = self.held_out.plan(
            [(0, i) for i in range(len(examples))], self.block
        )
        self.too_long |= too_long
        self._report_too_long()
        if stage == "fit" and self.trainer.is_global_zero:
            train = len(self.sampler.layout.examples) if self.sampler else 0
            print(f"examples: {self.splits[0]} {train}, {self.splits[1]} {len(examples)}")

    def _examples(
        self, split: str, texts: Any | None = None, documents: Any | None = None
    ) -> Examples:
        module: Any = self.trainer.lightning_module
        shards = Shards.open(self.shards, split)
        vocabulary = module.processor.vocabulary
        shards.require(fingerprint=module.fingerprint, codebook_size=vocabulary.codebook_size)
        images = None
        if self.images is not None:
            images = ShardImages(shards, self.images, module.visual.image_processor)
        return Examples(shards.dataset(), texts, images, shards.patches, documents)

    def _documents(self) -> Documents | None:
        if self.documents is None:
            return None
        module: Any = self.trainer.lightning_module
        encode = None
        connectors, image_output = module.objective.connectors, module.objective.image_output
        if connectors.needs_codes:
            budget = image_output.encode_budget(module.visual.config.num_patches)
            encode = partial(module.visual.encode, budget=budget)
        return Documents(
            self.documents, module.visual.image_processor, encode, pixels=connectors.needs_pixels
        )

    def _texts(self) -> Any | None:
        if self.texts is None:
            return None
        import datasets

        formats = {".jsonl": "json", ".parquet": "parquet"}
        file_format = formats.get(Path(self.texts).suffix)
        files = {} if file_format is None else {"data_files": self.texts}
        return datasets.load_dataset(file_format or self.texts, split="train", **files)

    def train_dataloader(self) -> DataLoader:
        return ResumingLoader(
            self.blocks,
            self.batch_size,
            sampler=self.sampler,
            drop_last=True,
            collate_fn=self.blocks.collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        """Every held-out example once, always with the draws of epoch 0."""
        blocks = BlockDataset(self.held_out, self.block)
        return DataLoader(
            blocks,
            self.batch_size,
            sampler=HeldOutSampler(self._held_out_blocks, *self._ranks()),
            collate_fn=blocks.collate,
            num_workers=self.num_workers,
        )

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

        The number of processes and the batch size may change: the blocks go on where they stopped.
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

    def _order_arguments(self) -> dict[str, int]:
        """What the order is a function of."""
        names = ("seed", "block", "window")
        examples = 0 if self.sampler is None else len(self.sampler.layout.examples)
        arguments = {name: getattr(self, name) for name in names}
        return {**arguments, "examples": examples}

    def _ranks(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def _consumed(self) -> int:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed
