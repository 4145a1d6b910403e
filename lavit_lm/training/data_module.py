"""Token shards and plain texts -> packed batches that a stopped run continues exactly.

    shards (codes, captions) --+-- order.py: rows, blocks --> batches
    texts ---------------------+
    documents -----------------+

Where a run stands is one count, the batches trained on, which Lightning keeps, and the window of rows in which the
count lies, which is saved with it so that nothing before it has to be planned again.
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
from lavit_lm.sequences.packing import plan
from lavit_lm.training.sampler import (
    BlockOrder,
    Blocks,
    ExampleLayout,
    HeldOutOrder,
    Place,
    Samples,
)
from lavit_tok import Shards
from lavit_tok.data.shard_images import ShardImages


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
        pictures: the data set that the shards were made from (path or Hub name), for an objective that feeds pictures
            as vectors; each is opened only when a row really feeds it.
        documents: JSON lines of texts and pictures in turn, mixed in as rows of their own; see documents.py. For an
            objective that says codes their pictures are tokenised at the start, by the module's visual tokenizer.
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
        self.order: BlockOrder | None = None
        self.too_long: dict[str, int] = {}
        self.told = False

    def setup(self, stage: str | None = None) -> None:
        """Open shards, texts, documents and pictures.

        Raises:
            ShardError: shards of another tokenizer than the module's, or pictures that the shards were not made from.
            ValueError: an objective that reads pictures without any being named, or the other way round; a line that is
                no document.
        """
        module: Any = self.trainer.lightning_module
        name = module.objective.name
        if module.objective.needs_pixels and self.images is None:
            raise ValueError(
                f"{name}: images are fed as vectors of their pictures, which the shards do not hold; give "
                f"data.pictures, the data set that {self.shards} was made from"
            )
        if self.images is not None and not module.objective.needs_pixels:
            raise ValueError(
                f"data.pictures: the objective {name}, as it is set, reads codes and no pictures"
            )
        if stage == "fit":
            samples = self._samples(self.splits[0], self._texts(), self._documents())
            layout = ExampleLayout(samples, module.objective, module.processor, self.seed)
            sizes = self.block, self.batch_size, self.window
            self.order = BlockOrder(layout, *sizes, *self._ranks(), self._consumed)
            self.blocks = Blocks(layout, self.block)
        held_out = self._samples(self.splits[2 if stage == "test" else 1])
        self.held_out = ExampleLayout(held_out, module.objective, module.processor, self.seed)
        self._held_out_blocks = self._plan_held_out()
        self._tell_too_long()

    def _samples(
        self, split: str, texts: Any | None = None, documents: Any | None = None
    ) -> Samples:
        module: Any = self.trainer.lightning_module
        shards = Shards.open(self.shards, split)
        vocabulary = module.processor.vocabulary
        shards.require(fingerprint=module.fingerprint, codebook_size=vocabulary.codebook_size)
        processor = module.visual.image_processor
        images = None if self.images is None else ShardImages(shards, self.images, processor)
        return Samples(shards.dataset(), texts, images, shards.patches, documents)

    def _documents(self) -> Documents | None:
        if self.documents is None:
            return None
        module: Any = self.trainer.lightning_module
        c, encode = module.visual.config, None
        if module.objective.image_output == "codes":
            least, _ = module.objective.lengths(c.num_patches)
            encode = partial(module.visual.encode, budget=None if least == 1 else least)
        return Documents(
            self.documents,
            module.visual.image_processor,
            encode,
            open_later=module.objective.needs_pixels,
        )

    def _texts(self) -> Any | None:
        if self.texts is None:
            return None
        import datasets

        kinds = {".jsonl": "json", ".parquet": "parquet"}
        kind = next((kind for suffix, kind in kinds.items() if self.texts.endswith(suffix)), None)
        files = {} if kind is None else {"data_files": self.texts}
        return datasets.load_dataset(kind or self.texts, split="train", **files)

    def train_dataloader(self) -> DataLoader:
        loader: dict[str, Any] = {
            "collate_fn": self.blocks.collate,
            "num_workers": self.num_workers,
        }
        return ResumingLoader(
            self.blocks, self.batch_size, sampler=self.order, drop_last=True, **loader
        )

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
        return [
            [places[fitting[i]] for i in block]
            for block in plan([len(rows[i]) for i in fitting], self.block)
        ]

    def _tell_too_long(self) -> None:
        """Warn once of rows that no block can hold, and list all those met in a file beside the run's others."""
        if self.order is not None:
            self.too_long |= self.order.too_long
        if not self.too_long or not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / "too_long.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            {"key": key, "places": places, "block": self.block}
            for key, places in self.too_long.items()
        ]
        path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
        if not self.told:
            self.told = True
            first = ", ".join(
                f"{key} ({places})" for key, places in list(self.too_long.items())[:3]
            )
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
        changed = {
            name: (state[name], value)
            for name, value in now.items()
            if state.get(name, value) != value
        }
        if changed:
            raise ValueError(
                f"resumed with other settings {changed}: rows would repeat or be missed"
            )
        self.order.starts.append((state["at"][0], state["at"][1]))

    def _settings(self) -> dict[str, int]:
        """What the order follows from."""
        names = ("seed", "batch_size", "block", "window")
        rows = 0 if self.order is None else len(self.order.layout.samples)
        return {
            **{name: getattr(self, name) for name in names},
            "rows": rows,
            "processes": self._ranks()[1],
        }

    def _ranks(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def _consumed(self) -> int:
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return done.processed
