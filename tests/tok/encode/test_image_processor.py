"""Every image gives the right pixels, or one error that names it and the reason."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from lavit_tok import ConfigError, ImageError, VisualImageProcessor
from lavit_tok.encode.image_files import as_list, find_images, open_image
from lavit_tok.encode.image_processor import CLIP_MEAN, CLIP_STD

PROCESSOR = VisualImageProcessor(32)

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def noise(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG written without Pillow, which supports no 16-bit color or wrong sizes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def values(source: Any) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_one_clear_error(kind: str, ratio: float, tmp_path: Path):
    whole = encoded(Image.fromarray(noise()), kind)
    assert values(whole).shape == (40, 60, 3)
    file = tmp_path / "cut"
    file.write_bytes(whole[: int(len(whole) * ratio)])
    with pytest.raises(ImageError, match=r"cut: (cannot be read|not an image)"):
        open_image(file)


def test_files_that_are_no_images(tmp_path: Path):
    cases = {
        "empty.png": b"",
        "text.jpg": b"hello",
        "zeros.png": bytes(999),
        "page.png": b"<html></html>",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"empty\.png: empty file"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="directory"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"absent\.png.*No such file"):
        open_image(tmp_path / "absent.png")
    for source in (None, 5, {"bytes": b""}, object()):
        with pytest.raises(ImageError, match="expected a PIL image, path, bytes or uint8 array"):
            open_image(source)


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch):
    from PIL import EpsImagePlugin

    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    with pytest.raises(ImageError, match="EPS"):
        open_image(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        )
    assert not started


# 100 million pixels: PIL only warns; 2,500 million: PIL refuses
@pytest.mark.parametrize("side", [10_000, 50_000])
def test_a_decompression_bomb_is_refused_before_decoding(side: int):
    with pytest.raises(ImageError, match="bomb"):
        open_image(png(side, side, 8, 0, bytes(1000)))


def test_the_bomb_check_does_not_hide_other_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_image(encoded(Image.fromarray(noise()), "PNG"))
        warnings.warn("unrelated", stacklevel=1)
    assert [str(w.message) for w in caught] == ["unrelated"]


def test_color_spaces_become_rgb():
    image = Image.fromarray(noise())
    cmyk = values(encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk.astype(int) - noise()).mean() < 6  # an inverted one would be off by 85
    gray = np.asarray(image.convert("L"))
    assert (values(encoded(image.convert("L"), "PNG")) == gray[..., None]).all()
    for mode in ("1", "P", "HSV", "YCbCr", "LA", "PA", "RGBX"):
        source = image.convert("L").convert(mode) if mode in ("LA",) else image.convert(mode)
        assert values(source).shape == (40, 60, 3)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None].repeat(2, 0)  # exactly 0, 1, .. 255
    expected = np.arange(256, dtype=np.uint8)[None, :, None].repeat(2, 0).repeat(3, 2)
    assert (values(encoded(Image.fromarray(ramp), "PNG")) == expected).all()
    assert (values(Image.fromarray(ramp)) == expected).all()
    Image.fromarray(ramp).save(tmp_path / "ramp.tiff")
    assert (values(tmp_path / "ramp.tiff") == expected).all()
    assert (values(b"P5\n256 2\n65535\n" + ramp.astype(">u2").tobytes()) == expected).all()

    color = np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 32896)], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in color)
    read = values(png(256, 2, 16, 2, rows))
    assert np.abs(read.astype(int) - (color // 257).astype(int)).max() <= 1


def test_thirty_two_bit_modes():
    gray = Image.fromarray(noise()).convert("L")
    for mode in ("I", "F"):  # Pillow keeps 8-bit values in them; as 16 bits they would be black
        assert (values(gray.convert(mode))[..., 0] == np.asarray(gray)).all()
    assert values(Image.fromarray(np.full((2, 2), 65535, dtype=np.int32))).min() == 255
    for bad in (
        np.full((2, 2), np.nan),
        np.full((2, 2), 0.5),
        np.full((2, 2), -3.0),
        np.full((2, 2), 1e6),
    ):
        with pytest.raises(ImageError, match=r"NaN|expected gray values"):
            open_image(Image.fromarray(bad.astype(np.float32)))


def test_transparent_pixels_become_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert (values(clear) == 255).all()
    assert values(half)[0, 0].tolist() == [255, 127, 127]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    assert values(encoded(palette, "PNG"))[0, 0].tolist() == [0, 255, 0]
    assert (values(encoded(palette, "PNG", transparency=1)) == 255).all()
    assert (values(encoded(palette, "GIF", transparency=1)) == 255).all()
    # one alpha for each palette entry
    alphas = encoded(palette, "PNG", transparency=bytes([255, 128]))
    assert values(alphas)[0, 0].tolist() == [127, 255, 127]
    assert (values(encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == 255).all()
    assert (
        values(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255
    ).all()
    assert (values(np.zeros((4, 4, 4), np.uint8)) == 255).all()


def test_exif_rotation_is_applied():
    marked = np.zeros((8, 16, 3), np.uint8)
    marked[0, :] = 255  # a white top edge
    for orientation, edge in (
        (1, np.s_[0, :]),
        (3, np.s_[-1, :]),
        (6, np.s_[:, -1]),
        (8, np.s_[:, 0]),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = values(encoded(Image.fromarray(marked), "PNG", exif=exif))
        assert read.shape[:2] == ((8, 16) if orientation in (1, 3) else (16, 8))
        assert (read[edge] == 255).all() and (read == 255).mean() == (1 / 8)
    broken = encoded(Image.fromarray(marked), "JPEG", exif=b"Exif\0\0not a TIFF header")
    assert values(broken).shape == (8, 16, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(kind: str):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(values(moving).astype(int) - [255, 0, 0]).max() <= 2
    assert np.abs(values(Image.open(io.BytesIO(moving))).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (2, 3)])
@pytest.mark.parametrize("mode", ["square", "center_crop", "pad"])
def test_extreme_shapes_fill_the_square(size: tuple[int, int], mode: Any):
    color = (10, 200, 30)
    processor = VisualImageProcessor(32, mode, background=color)
    pixels = processor.to_uint8(Image.new("RGB", size, color))
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.uint8
    assert (pixels == torch.tensor(color, dtype=torch.uint8)[None, :, None, None]).all()


def test_an_empty_image_is_refused():
    for empty in (
        Image.new("RGB", (0, 5)),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.uint8),
    ):
        with pytest.raises(ImageError, match=r"expected (at least one pixel|shape)"):
            open_image(empty)


def test_arrays_and_tensors_in_every_layout_agree():
    hwc = noise(5, 7)
    chw = np.ascontiguousarray(hwc.transpose(2, 0, 1))
    for same in (hwc, chw, torch.from_numpy(hwc), torch.from_numpy(chw), Image.fromarray(hwc)):
        assert (values(same) == hwc).all()
    gray = hwc[..., 0]
    for same in (gray, gray[..., None], gray[None], torch.from_numpy(gray[None].copy())):
        assert (values(same) == gray[..., None]).all()
    alpha = np.concatenate([hwc, np.full((5, 7, 1), 255, np.uint8)], -1)
    assert (values(alpha) == hwc).all() and (values(alpha.transpose(2, 0, 1)) == hwc).all()
    assert values(hwc[::-1, ::2]).shape == (5, 4, 3)  # a view with strides


def test_layouts_that_could_be_either():
    """[3 h 1] is a color image of width 1; if in doubt, tensors have channels first."""
    column = noise(9, 1)
    assert (values(torch.from_numpy(column.transpose(2, 0, 1).copy())) == column).all()
    assert values(np.zeros((3, 9, 1), np.uint8)).shape == (9, 1, 3)
    assert values(np.zeros((3, 9, 3), np.uint8)).shape == (3, 9, 3)
    assert values(torch.zeros(3, 9, 3, dtype=torch.uint8)).shape == (9, 3, 3)
    assert values(np.zeros((1, 9, 3), np.uint8)).shape == (1, 9, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.full((4, 4, 3), 0.5, np.float16),
        np.full((4, 4, 3), np.nan),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4), complex),
        np.array([None]),
        torch.zeros(3, 4, 4),
        torch.full((3, 4, 4), float("nan")),
        torch.full((3, 4, 4), float("inf")),
        torch.zeros(3, 4, 4, dtype=torch.bfloat16),
        torch.zeros(3, 4, 4, dtype=torch.int32),
        torch.zeros(3, 4, 4, dtype=torch.bool),
    ],
    ids=lambda a: str(a.dtype),
)
def test_arrays_of_another_dtype_are_refused(array: Any):
    with pytest.raises(ImageError, match=r"(expected uint8 values 0\.\.255, got|contains NaN)"):
        open_image(array)


@pytest.mark.parametrize("shape", [(4,), (2, 5, 6), (5, 6, 2), (5, 6, 7), (2, 3, 5, 6)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ImageError, match="expected shape"):
        open_image(np.zeros(shape, np.uint8))


def test_a_bad_image_in_a_batch_is_named(photos: list[Path], tmp_path: Path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        PROCESSOR.to_uint8([photos[0], bad, photos[1]])
    with pytest.raises(ImageError, match="image 1 of 3 <bytes>"):
        PROCESSOR.to_uint8([photos[0], b"nothing", photos[1]])
    with pytest.raises(ImageError, match=r"image 2 of 3 <ndarray>.*float64"):
        PROCESSOR.to_uint8([photos[0], photos[1], np.zeros((4, 4, 3))])


@pytest.mark.parametrize(
    "empty", [[], (), np.zeros((0, 8, 8, 3), np.uint8), torch.zeros(0, 3, 32, 32).byte()]
)
def test_an_empty_batch_is_refused(empty: Any):
    with pytest.raises(ValueError, match="at least one image"):
        PROCESSOR.to_uint8(empty)


def test_one_image_or_many(photos: list[Path]):
    one = PROCESSOR.to_uint8(photos[0])
    for same in (
        str(photos[0]),
        photos[0].read_bytes(),
        io.BytesIO(photos[0].read_bytes()),
        Image.open(photos[0]),
    ):
        assert torch.equal(PROCESSOR.to_uint8(same), one)
    with photos[0].open("rb") as stream:
        assert torch.equal(PROCESSOR.to_uint8(stream), one)
    batch = PROCESSOR.to_uint8(photos)
    assert PROCESSOR.to_uint8(batch) is batch, "pixels of this size are not resized again"
    assert batch.shape == (4, 3, 32, 32)
    assert torch.equal(PROCESSOR.to_uint8(iter(photos)), batch)
    assert torch.equal(PROCESSOR.to_uint8(batch), batch)
    assert torch.equal(PROCESSOR.to_uint8(batch.permute(0, 2, 3, 1).numpy()), batch)
    for i, photo in enumerate(photos):
        assert torch.equal(PROCESSOR.to_uint8(photo)[0], batch[i])
    assert len(as_list(batch)) == 4 and len(as_list(batch[0])) == 1 and len(as_list("a.png")) == 1


def test_it_equals_the_published_recipe(photos: list[Path]):
    for photo in photos:
        ours = PROCESSOR(photo, return_tensors="pt").pixel_values
        assert (ours - reference.pixels(Image.open(photo), PROCESSOR)).abs().max() < 1e-6
    values = PROCESSOR.normalize(
        torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    )
    for c, (mean, std) in enumerate(zip(CLIP_MEAN, CLIP_STD, strict=True)):
        assert values[:, c].flatten().tolist() == pytest.approx([-mean / std, (1 - mean) / std])


def test_it_equals_clip_s_own_image_processor(photos: list[Path]):
    """CLIPImageProcessorPil, without its center crop."""
    size = {"height": 32, "width": 32}
    square = CLIPImageProcessorPil(size=size, do_center_crop=False)
    expected = square([Image.open(p).convert("RGB") for p in photos], return_tensors="pt")
    ours = PROCESSOR(photos, return_tensors="pt")
    torch.testing.assert_close(ours.pixel_values, expected.pixel_values, atol=1e-6, rtol=0)


def test_resize_modes():
    """The drawing of the class's docstring."""
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    image, gray = Image.fromarray(wide), [90, 90, 90]

    def row(mode: Any, at: int) -> list[int]:
        pixels = VisualImageProcessor(60, mode, background=gray).resize(image)
        assert torch.equal(pixels[0], pixels[1])
        return pixels[0, at, [10, 30, 50]].tolist()

    assert row("square", 5) == row("square", 30) == row("pad", 30) == [0, 255, 0]
    assert row("center_crop", 5) == [255, 255, 255]
    assert row("pad", 5) == row("pad", 55) == gray
    assert PROCESSOR.resize(image, 48).shape == (3, 48, 48)
    assert VisualImageProcessor(4, background=gray).open(Image.new("LA", (2, 2))).getpixel(
        (0, 0)
    ) == tuple(gray)


@pytest.mark.usefixtures("unchecked")
def test_saved_and_loaded(tmp_path: Path):
    processor = VisualImageProcessor(48, "pad", (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), (1, 2, 3))
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    saved = json.loads(file.read_text())
    assert saved == processor.to_dict() == VisualImageProcessor.from_pretrained(tmp_path).to_dict()
    assert VisualImageProcessor.from_pretrained("default").to_dict()["size"] == 128
    file.write_text(json.dumps({**saved, "image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: unknown entries \['image_p"):
        VisualImageProcessor.from_pretrained(tmp_path)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="size: expected a positive integer"):
        VisualImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0),
        ("size", 32.0),
        ("size", True),
        ("resize_mode", "crop"),
        ("resize_mode", None),
        ("image_mean", None),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", "abc"),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", [0.5, 0.5, True]),
        ("background", [0, 0, 256]),
        ("background", [0.5, 0, 0]),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_setting_is_named(name: str, value: Any):
    with pytest.raises(ConfigError, match=name):
        VisualImageProcessor.from_dict({**PROCESSOR.to_dict(), name: value})


def test_folders_are_walked_in_order(tmp_path: Path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in find_images([tmp_path])]
    assert names == ["a.JPG", "b.png", "sub/c.webp"]
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    assert find_images([]) == []


def test_only_regular_files_are_opened(tmp_path: Path):
    """A FIFO would wait for a writer, and /dev/zero never end."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, kind in (("fifo.png", "a FIFO"), ("zero.png", "a character device")):
        with pytest.raises(ImageError, match=f"{name}: expected a regular file, got {kind}"):
            open_image(tmp_path / name)


def test_size_limits(tmp_path: Path):
    """Of a sparse file of 3 GB nothing is read; both limits can be set, and are not saved."""
    path = tmp_path / "sparse.jpg"
    path.touch()
    os.truncate(path, 3 << 30)
    with pytest.raises(
        ImageError, match=r"sparse\.jpg: .* at most 268435456 bytes, got 3221225472"
    ):
        open_image(path)
    file = io.BytesIO()
    Image.new("RGB", (20, 30)).save(file, "PNG")
    processor = VisualImageProcessor(8)
    saved = processor.to_dict()
    processor.max_pixels = 599
    with pytest.raises(ImageError, match="more than 599 pixels"):
        processor.to_uint8(file.getvalue())
    processor.max_pixels, processor.max_bytes = 600, 50
    with pytest.raises(ImageError, match="at most 50 bytes"):
        processor.to_uint8(file.getvalue())
    file_of_a_line = io.BytesIO()
    Image.new("L", (1, 2**18 + 1)).save(file_of_a_line, "PNG")
    with pytest.raises(ImageError, match="expected sides up to 262144, got 1x262145"):
        open_image(file_of_a_line.getvalue())
    processor.max_bytes = len(file.getvalue())
    assert processor.to_uint8(file.getvalue()).shape == (1, 3, 8, 8)
    assert processor.to_dict() == saved


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F"])
def test_strips_do_not_change_pixels(mode: str, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(rng.integers(256, size=(50, 30, 4), dtype=np.uint8)).convert(mode)
    else:
        values = rng.integers(1000, 65536, size=(50, 30))
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
    expected = np.asarray(open_image(image))
    monkeypatch.setattr("lavit_tok.encode.image_files.STRIP", 100)
    assert np.array_equal(np.asarray(open_image(image)), expected)


MEMORY = """
import resource, sys
from lavit_tok import VisualImageProcessor
from lavit_tok.cli.items import open_images
from lavit_tok.data.rejects import Rejects
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
images = open_images(enumerate(sys.argv[1:]), Rejects(None), VisualImageProcessor(64))
VisualImageProcessor(64).to_uint8(sys.argv[1:])
print(len(images), peak() - before)
"""


def test_memory_of_a_batch_of_large_images(tmp_path: Path):
    """6 JPEGs of 20 megapixels: one at a time is in memory at full size, not 6 (360 MB)."""
    Image.new("RGB", (5000, 4000), (20, 40, 60)).save(path := tmp_path / "large.jpg")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *[str(path)] * 6],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    count, megabytes = done.stdout.split()
    assert int(count) == 6
    assert float(megabytes) < 300


def test_warnings_are_kept_with_the_image(recwarn: pytest.WarningsRecorder):
    file = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\0\0\xf0\xff\0\0"
    Image.new("RGB", (20, 30)).save(file, "JPEG", exif=exif)
    assert len(open_image(file.getvalue()).info["warnings"]) == 2
    file = io.BytesIO()
    Image.new("RGB", (20, 30)).save(file, "JPEG")
    assert "warnings" not in open_image(file.getvalue()).info
    assert not recwarn.list
