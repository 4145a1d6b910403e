"""One function from a table of codes to a table of images, for every engine that maps tables.

    key, codes, [index, reason, ...]  -decode_batch->  key, image, reason, [index, ...]

Other columns are passed through.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from lavit_tok.checkpoints.weights import update_digest
from lavit_tok.codes import CodeError, VisualCodes

if TYPE_CHECKING:
    from lavit_tok.decode.pipeline import PixelDecoder

PROGRAM = "lavit-tok"
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Name -> class of diffusers; each is built from the config of the decoder's own."""


def decode_batch(table: pa.Table, decoder: PixelDecoder, seed: int = 0, **options: Any) -> pa.Table:
    """Decode the codes of a table; a record that cannot be decoded has a reason and no image.

    Args:
        table: with "codes" (lists of integers; null for a record that is not decoded). The noise of
            an image is a function of `seed` and of "index" (int64; by default the position in the
            table), not of the batch. "reason" (text) is kept where it is not null, and a "digest"
            (text) is stored in the image.
        decoder: decodes all records as one batch.
        seed: of the noise.
        options: arguments of `decoder`, such as num_inference_steps, guidance_scale and mode.

    Returns:
        The table with "image" (a PNG file as bytes, or null) and "reason" (null where there is an
        image) in place of "codes", "length" and "keep".
    """
    config, names = decoder.conditioner.config, table.column_names
    reasons = table["reason"].to_pylist() if "reason" in names else [None] * len(table)
    lists: list[list[int]] = []
    decoded = []
    for i, codes in enumerate(table["codes"].to_pylist()):
        if codes is None or reasons[i] is not None:
            continue
        try:
            require_codes(codes, config.codebook_size, config.patches)
        except ValueError as error:
            reasons[i] = str(error)
        else:
            lists.append(codes)
            decoded.append(i)
    files: list[bytes | None] = [None] * len(table)
    if lists:
        numbers = table["index"].to_pylist() if "index" in names else range(len(table))
        digests = table["digest"].to_pylist() if "digest" in names else [None] * len(table)
        noise = generators(seed, [numbers[i] for i in decoded])
        codes = VisualCodes.from_list(lists, config.codebook_size)
        images = decoder(codes, generator=noise, **options).images
        for i, image in zip(decoded, images, strict=True):
            files[i] = png(image, digests[i])
    replaced = [name for name in ("codes", "length", "keep", "reason") if name in names]
    table = table.drop_columns(replaced).append_column("image", pa.array(files, pa.binary()))
    return table.append_column("reason", pa.array(reasons, pa.string()))


class DecodeBatch:
    """`decode_batch` that loads the decoder when it is first called, in the calling process.

    It is picklable, so that `dataset.map_batches(DecodeBatch(...), batch_format="pyarrow")` in Ray
    can use it.

    Args:
        decoder: "default", directory or Hub id.
        device: of the model.
        scheduler: a name of SCHEDULERS; None for the decoder's own.
        seed, options: see `decode_batch`.
    """

    model = "decoder"

    def __init__(
        self,
        decoder: str = "default",
        device: str = "cpu",
        scheduler: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.name, self.device, self.scheduler = decoder, device, scheduler
        self.seed, self.options = seed, options

    @cached_property
    def decoder(self) -> PixelDecoder:
        """The loaded decoder.

        Raises:
            ValueError: a scheduler for a decoder that has none.
        """
        import diffusers

        from lavit_tok.decode.pipeline import PixelDecoder

        decoder = PixelDecoder.from_pretrained(self.name, device=self.device)
        decoder.set_progress_bar_config(disable=True)
        if self.scheduler is not None:
            if decoder.scheduler is None:
                raise ValueError(
                    "--scheduler: expected a decoder of mode 'sample', this one has none"
                )
            scheduler = getattr(diffusers, SCHEDULERS[self.scheduler])
            decoder.scheduler = scheduler.from_config(decoder.scheduler.config)
        return decoder

    def digest(self) -> str:
        """16 hexadecimal digits of the weights and options that images depend on."""
        values = [self.seed, self.options]
        sha = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        update_with_parts(sha, self.decoder.components)
        return sha.hexdigest()[:16]

    def __call__(self, table: pa.Table) -> pa.Table:
        return decode_batch(table, self.decoder, self.seed, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "decoder"}


def update_with_parts(sha: Any, components: dict[str, Any]) -> None:
    """Add the configs and weights of the parts of a model to a hash."""
    for name, part in sorted(components.items()):
        config = dict(getattr(part, "config", None) or {})
        known = {key: config[key] for key in sorted(config) if not key.startswith("_")}
        sha.update(f"{name} {type(part).__name__} {known}".encode())
        if isinstance(part, nn.Module):
            update_digest(sha, part)


def require_codes(codes: list[int], size: int, patches: int) -> None:
    """Raise CodeError unless a decoder of this codebook size and patch count can decode them."""
    VisualCodes.from_list([codes], size)
    if not 1 <= len(codes) <= patches:
        raise CodeError(f"expected 1..{patches} codes, got {len(codes)}")


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """The noise of numbered images, which depends on nothing else."""
    states = [
        np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] for number in numbers
    ]
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def png(image: Image.Image, digest: str | None = None) -> bytes:
    """A PNG file with text chunks: this program, and the digest of the inputs if there is one."""
    mark = PngInfo()
    mark.add_text("Software", PROGRAM)
    if digest is not None:
        mark.add_text("Digest", digest)
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=mark)
    return stream.getvalue()
