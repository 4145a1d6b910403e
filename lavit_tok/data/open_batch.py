"""A table of images -> a table of pixels, in any process; without torch, see `ImageReader`."""

from __future__ import annotations

import pyarrow as pa

from lavit_tok.encode.image_files import ImageError, ImageReader, encoded_image


def open_batch(table: pa.Table, reader: ImageReader) -> pa.Table:
    """Open and resize images, on any CPU.

    Args:
        table: with a column "image": bytes, or a struct of "bytes" and "path". A column "key" names
            the images in messages.
        reader: that of the tokenizer's image processor.

    Returns:
        The table without "image", with "pixels" (uint8 [3 size size] as bytes of fixed size; null
        for an image that cannot be read) and "reason" (text; null for one that can).
    """
    keys = table["key"].to_pylist() if "key" in table.column_names else range(len(table))
    pixels: list[bytes | None] = []
    reasons: list[str | None] = []
    for key, value in zip(keys, table["image"].to_pylist(), strict=True):
        try:
            image = reader.open(encoded_image(value, str(key)), str(key))
            pixels.append(reader.resize(image).tobytes())
            reasons.append(None)
        except ImageError as error:
            pixels.append(None)
            reasons.append(str(error).removeprefix(f"{key}: "))
    size = 3 * reader.size**2
    table = table.drop_columns(["image"]).append_column("pixels", pa.array(pixels, pa.binary(size)))
    return table.append_column("reason", pa.array(reasons, pa.string()))
