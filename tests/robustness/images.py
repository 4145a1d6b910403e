"""Damaged images of every format that Pillow writes, and some more: codes or ImageError."""

from __future__ import annotations

import io
import json
import signal
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from struct import pack
from typing import Any

import numpy as np
from PIL import Image

from robustness.process import Outcome, fork, peak_mb
from robustness.small import Workshop, damaged, image

LIMIT_S, LIMIT_MB = 2.0, 1024.0
BULK = 250  # images per child
MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "F", "I;16")
SEVERAL: dict[str, Any] = {"save_all": True, "append_images": [image(3)]}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{"progressive": True}, {"quality": 100, "subsampling": 0}],
    "TIFF": [SEVERAL, *({"compression": c} for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"))],
    "WEBP": [SEVERAL, {"lossless": True}],
    "JPEG2000": [{"irreversible": True}, {"no_jp2": True}],
    "TGA": [{"compression": "tga_rle"}],
    **{name: [SEVERAL] for name in ("PNG", "GIF", "AVIF")},
}


@cache
def originals() -> list[tuple[str, bytes]]:
    """A small image in every format, mode and way of compression."""
    Image.init()
    found, exif = [], Image.Exif()
    exif[0x0112] = 6  # rotated
    for format in sorted(Image.SAVE):
        for mode in MODES:
            for options in [{}, *(OPTIONS.get(format, []) if mode in ("RGB", "L") else [])]:
                file, pixels = io.BytesIO(), np.arange(1536, dtype=np.uint16).reshape(32, 48)
                wide = Image.fromarray(pixels) if mode == "I;16" else image(1, 48).convert(mode)
                more = {"exif": exif} if format in ("JPEG", "WEBP", "PNG") else {}
                try:
                    with warnings.catch_warnings(action="ignore"):
                        wide.save(file, format, **options, **more)
                except Exception:  # this format does not have this mode
                    continue
                found.append((format, file.getvalue()))
    rgb, pcx = image(1, 48).tobytes(), next(data for name, data in found if name == "PCX")
    cards = [b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 48", b"NAXIS2  = 32"]
    fits = b"".join(card.ljust(80) for card in [*cards, b"END"]).ljust(2880)
    psd = b"8BPS" + pack(">H6xHIIHH", 1, 3, 32, 48, 8, 3) + b"\0" * 14
    return [
        *found,
        ("SUN", pack(">8I", 0x59A66A95, 48, 32, 24, len(rgb), 1, 0, 0) + rgb),
        ("FITS", fits + rgb[: 48 * 32]),
        ("PSD", psd + rgb),
        ("DCX", pack("<III", 0x3ADE68B1, 12, 0) + pcx),
        ("GBR", pack(">IIIII4sI", 28, 2, 48, 32, 1, b"GIMP", 10) + rgb[:1536]),
        ("XPM", b'/* XPM */\nstatic char *x[] = {\n"2 1 1 1",\n"a c #ff0000",\n"aa"};\n'),
    ]


def mutated(number: int) -> tuple[str, bytes]:
    """Format and bytes of the image of this number."""
    rng, everything = np.random.default_rng((1, number)), originals()
    if rng.integers(5000) == 0:  # a small file of an image that is just acceptable, or not
        file, side = io.BytesIO(), int(rng.integers(8000, 11000))
        Image.new(str(rng.choice(["L", "RGBA"])), (side, side)).save(file, "PNG", compress_level=1)
        return "huge", file.getvalue()
    format, original = everything[rng.integers(len(everything))]
    data = damaged(original, rng, other=everything[rng.integers(len(everything))][1])
    return format, _checksums(data) if format == "PNG" and rng.integers(2) else data


def _checksums(data: bytes) -> bytes:
    """Right ones, so that damaged PNG chunks are read."""
    png, at = bytearray(data), 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 <= len(png):
            png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(png)


def run(work: Workshop, numbers: Sequence[int]) -> Iterator[Outcome]:
    tokenizer, left = work.tokenizer, list(numbers)
    while left:
        done = fork(lambda: _child(tokenizer, left[:BULK]), limit_s=600, watch=True)
        outcomes = [Outcome(**json.loads(line)) for line in done.out.splitlines()]
        if len(outcomes) < len(left[:BULK]):  # the next one ended the child
            kind, failure = mutated(left[len(outcomes)])[0], done.complaint or "exit"
            outcomes.append(Outcome(kind, failure, 10 * LIMIT_S, done.mb))
        elif done.complaint:
            outcomes[-1].failure = done.complaint
        yield from outcomes
        del left[: len(outcomes)]


def _child(path: Any, numbers: Sequence[int]) -> None:
    from lavit_tok import ImageError, VisualTokenizer

    tokenizer = VisualTokenizer.from_pretrained(path)
    tokenizer.encode(image(1))
    warnings.simplefilter("ignore")
    for number in numbers:
        format, data = mutated(number)
        signal.setitimer(signal.ITIMER_PROF, 10 * LIMIT_S)
        before, started, failure, note = peak_mb(reset=True), time.process_time(), None, "encoded"
        try:
            (codes,) = tokenizer.encode(data).to_list()
            failure = None if codes and {*codes} <= {*range(16)} else f"codes {codes}"
        except ImageError:
            note = "refused"
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
        seconds, mb = time.process_time() - started, max(0.0, peak_mb() - before)
        if seconds > LIMIT_S or mb > LIMIT_MB:
            failure = failure or f"{seconds:.1f} s, {mb:.0f} MB"
        print(json.dumps(vars(Outcome(format, failure, seconds, mb, note=note))), flush=True)
