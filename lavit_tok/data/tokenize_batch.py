"""One function from a table of images to a table of codes, for every engine that maps tables.

    key, image, ...  -open_batch->    key, pixels, reason, ...
                     -tokenize_batch-> key, codes, length, keep, reason, ...[, flipped]

Other columns are passed through. With flip every image is followed by its horizontal flip:

    three images, number 1 corrupt     codes     c0   c0'  null  c2   c2'
                                       flipped   no   yes  no    no   yes
                                       reason    null null text  null null
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lavit_tok.checkpoints.weights import update_digest
from lavit_tok.data.open_batch import open_batch
from lavit_tok.tokenizer import VisualTokenizer


def tokenize_batch(
    table: pa.Table,
    tokenizer: VisualTokenizer,
    budget: int | float | None = None,
    flip: bool = False,
) -> pa.Table:
    """Encode the images of a table; a corrupt image is a record with a reason and no codes.

    Args:
        table: with "image", or with "pixels" and "reason"; see `open_batch`.
        tokenizer: encodes all images as one batch.
        budget: see `VisualTokenizer.encode`.
        flip: add the horizontal flip of each image.

    Returns:
        The table with "codes", "keep" (lists of int32; the patches of the codes in raster order),
        "length" (int32), "reason", and with flip "flipped" (bool), in place of the image.
    """
    if "pixels" not in table.column_names:
        table = open_batch(table, tokenizer.image_processor.reader)
    readable = table["reason"].is_null().to_numpy()
    views, count = 1 + flip, int(readable.sum())
    copies = np.where(readable, views, 1)
    rows = np.repeat(np.arange(len(table)), copies)
    view = np.arange(len(rows)) - np.repeat(copies.cumsum() - copies, copies)
    encoded = view * count + (readable.cumsum() - 1)[rows]
    numbers = pa.array(encoded, pa.int64(), mask=~readable[rows])
    codes, keep, length = _encode(table["pixels"], tokenizer, budget, flip)
    table = table.drop_columns(["pixels"]).take(rows)
    table = table.append_column("codes", codes.take(numbers))
    table = table.append_column("keep", keep.take(numbers))
    table = table.append_column("length", length.take(numbers))
    return table.append_column("flipped", pa.array(view == 1)) if flip else table


class TokenizeBatch:
    """`tokenize_batch` that loads the tokenizer when it is first called, in the calling process.

    It is picklable, so that `dataset.map_batches(TokenizeBatch(...), batch_format="pyarrow")` in
    Ray, or an iterator of record batches in Spark, can use it.

    Args:
        tokenizer: "default", directory or Hub id.
        device: of the model.
        budget, flip: see `tokenize_batch`.
    """

    model = "tokenizer"

    def __init__(
        self,
        tokenizer: str = "default",
        device: str = "cpu",
        budget: int | float | None = None,
        flip: bool = False,
    ) -> None:
        self.name, self.device, self.budget, self.flip = tokenizer, device, budget, flip

    @cached_property
    def tokenizer(self) -> VisualTokenizer:
        """The loaded tokenizer."""
        return VisualTokenizer.from_pretrained(self.name, device=self.device)

    def digest(self) -> str:
        """16 hexadecimal digits of all that codes depend on."""
        return weights_digest(self.tokenizer)

    def __call__(self, table: pa.Table) -> pa.Table:
        return tokenize_batch(table, self.tokenizer, self.budget, self.flip)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}


def weights_digest(tokenizer: VisualTokenizer) -> str:
    """16 hexadecimal digits of the preprocessing, config and weights that codes depend on."""
    configs = [tokenizer.image_processor.to_dict(), tokenizer.config.to_dict()]
    sha = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    for stage in ("encoder", "selector", "error_heads", "merger", "quantizer"):
        module = getattr(tokenizer, stage, None)  # nested codes have error heads, no selector
        if module is not None:
            update_digest(sha, module)
    return sha.hexdigest()[:16]


def _encode(column: Any, tokenizer: VisualTokenizer, budget: Any, flip: bool) -> tuple[Any, ...]:
    """Codes, kept patches and lengths of the images that are not null, then of their flips."""
    size = tokenizer.image_processor.size
    content = b"".join(value.as_py() for value in column.drop_null())
    numbers = pa.list_(pa.int32())
    if not content:
        return pa.array([], numbers), pa.array([], numbers), pa.array([], pa.int32())
    pixels = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
    pixels = pixels.reshape(-1, 3, size, size)
    views = [pixels, pixels.flip(3)] if flip else [pixels]
    batches = [tokenizer.encode(view, budget).to("cpu") for view in views]
    lengths = torch.cat([codes.lengths for codes in batches]).numpy().astype(np.int32)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    values = torch.cat([codes.values for codes in batches]).numpy()
    # Codes of images always have a keep mask.
    patches = torch.cat([codes.keep.nonzero()[:, 1] for codes in batches]).numpy()  # type: ignore[union-attr]
    lists = (pa.ListArray.from_arrays(offsets, pa.array(v, pa.int32())) for v in (values, patches))
    return *lists, pa.array(lengths)
