"""Generation for a table of prompts, in this process or in one that Ray starts.

number, key, prompt  -GenerateBatch->  number, results (JSON), images (PNG files), reason
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lavit_lm.cli.batches import Computed, Engine, Item, compute_items, item_generator
from lavit_tok.cli.items import chunks
from lavit_tok.data.decode_batch import png, update_with_parts
from lavit_tok.data.decode_files import png_name
from lavit_tok.data.ray_engine import RayOptions, Work, map_on_ray
from lavit_tok.data.tokenize_batch import weights_digest

if TYPE_CHECKING:
    from lavit_lm.multimodal import MultimodalLM

RESULTS = pa.schema(
    {
        "number": pa.int64(),
        "results": pa.string(),  # a JSON list
        "images": pa.list_(pa.struct({"name": pa.string(), "png": pa.binary()})),
        "reason": pa.string(),
    }
)


class GenerateBatch:
    """Images of prompts, by a model that is loaded when it is first used; picklable.

    Args:
        lm: "default", directory or Hub id of the language model.
        visual_tokenizer: see `MultimodalLM.from_pretrained`.
        decoder: makes the images; None for codes only.
        device: of the models.
        n: images of a prompt.
        seed: of all random numbers, with the key of a prompt and the number of its image.
        guidance: guidance scale of the language model.
        sampling: top_k and temperature.
        decoding: options of the decoder.
        block_size: prompts of a folder of images.
    """

    model = "language model"

    def __init__(
        self,
        lm: str,
        visual_tokenizer: str | None,
        decoder: str | None,
        device: str,
        n: int,
        seed: int,
        guidance: float,
        sampling: dict[str, Any],
        decoding: dict[str, Any],
        block_size: int,
    ) -> None:
        self.name, self.visual_tokenizer, self.decoder = lm, visual_tokenizer, decoder
        self.device, self.n, self.seed, self.block_size = device, n, seed, block_size
        self.guidance, self.sampling, self.decoding = guidance, sampling, decoding

    @cached_property
    def lm(self) -> MultimodalLM:
        """The loaded model."""
        from lavit_lm.multimodal import MultimodalLM

        return MultimodalLM.from_pretrained(
            self.name,
            visual_tokenizer=self.visual_tokenizer,
            decoder=self.decoder,
            device=self.device,
        )

    @property
    def makes_codes(self) -> bool:
        """Whether the model generates codes, not vectors."""
        return self.lm.objective.image_output.kind == "codes"

    def digest(self) -> str:
        """16 hexadecimal digits of the weights and options that images depend on."""
        values = [self.n, self.seed, self.guidance, self.sampling, self.decoding]
        sha = hashlib.sha256(json.dumps([*values, self.decoder is None]).encode())
        sha.update(weights_digest(self.lm.visual_tokenizer).encode())
        update_with_parts(sha, {"lm": self.lm.model})
        if self.decoder is not None and hasattr(self.lm.decoder, "pipeline"):
            update_with_parts(sha, self.lm.decoder.pipeline.components)
        return sha.hexdigest()[:16]

    def compute(self, items: Sequence[Item]) -> list[Computed]:
        """Generate for prompts as one batch."""
        images = [(item, i) for item in items for i in range(self.n)]
        generators = [item_generator(self.seed, item.key, i) for item, i in images]
        if self.makes_codes:
            prompts = [item.content for item, _ in images]
            outputs: Any = self.lm.generate_codes_batch(
                prompts, self.guidance, generators, **self.sampling
            )
        else:
            vectors = self.lm.generate_vectors_batch([item.content for item in items])
            outputs = vectors.repeat_interleave(self.n, 0)
        results: list[dict[str, Any]] = [
            {"key": item.key if self.n == 1 else f"{item.key}-{i}", "prompt": item.content}
            for item, i in images
        ]
        if self.makes_codes:
            for result, codes in zip(results, outputs.to_list(), strict=True):
                result |= {"codes": codes, "length": len(codes)}
        files: list[tuple[str, bytes]] = []
        if self.decoder is not None:
            decoded = self.lm.decode_images(outputs, generators, **self.decoding)
            for (item, i), result, image in zip(images, results, decoded, strict=True):
                folder = f"{item.number // self.block_size:06d}"
                result["image"] = f"{folder}/{png_name(item.number * self.n + i, item.key)}"
                files.append((result["image"], png(image)))
        return [
            Computed(item.number, tuple(of_item), tuple(saved))
            for item, of_item, saved in zip(
                items,
                chunks(results, self.n),
                [*chunks(files, self.n)] or [[]] * len(items),
                strict=True,
            )
        ]

    def __call__(self, table: pa.Table) -> pa.Table:
        items = [Item(*json.loads(item)) for item in table["item"].to_pylist()]
        rows = [
            {
                "number": one.number,
                "results": json.dumps(one.results),
                "images": [{"name": name, "png": content} for name, content in one.images],
                "reason": one.reason,
            }
            for one in compute_items(self.compute, items)
        ]
        return pa.Table.from_pylist(rows, RESULTS)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lm"}


def generate_on_ray(stage: GenerateBatch, batch_size: int, options: RayOptions) -> Engine:
    """The engine "ray" of a job, in a `ray_cluster`; batches are those of the local engine."""

    def engine(blocks: Iterator[list[Item]]) -> Iterator[Computed]:
        # A block is a piece of work, whose prompts are sent with it: this process has read them.
        work = [
            Work(number, content=json.dumps([[i.number, i.key, i.content] for i in block]))
            for number, block in enumerate(blocks)
        ]
        read = PromptBatches(batch_size)
        for table in map_on_ray(work, read, stage, stage.digest(), options):
            for row in table.to_pylist():
                images = tuple((image["name"], image["png"]) for image in row["images"])
                results = tuple(json.loads(row["results"]))
                yield Computed(row["number"], results, images, row["reason"])

    return engine


class PromptBatches:
    """The batches of a piece of work."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, work: Work) -> Iterator[pa.Table]:
        assert work.content is not None
        for batch in chunks(json.loads(work.content), self.batch_size):
            yield pa.table({"item": [json.dumps(item) for item in batch]})
