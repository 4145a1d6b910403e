"""The recipe for the captioned data set: splits, captions, and a tiny build. No network."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("data_recipe")


def test_held_out_images_are_copied_from_unpacked_packages(tmp_path: Path, monkeypatch):
    import held_out

    monkeypatch.setattr(held_out, "fetch_package", lambda *_: "1")  # no network
    emoji = tmp_path / "raw" / held_out.EMOJI / "package/img/twitter/64"
    emoji.mkdir(parents=True)
    for i in range(150):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(emoji / f"{i:03}.png")
    held_out.main(["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out/test").iterdir())
    assert len(names) == 8 + 60 and names[0] == "000-astronaut.png"
    assert names[8:11] == ["008-000.png", "009-002.png", "010-005.png"]  # evenly from all
    assert names[-1] == "067-147.png"


def test_split_depends_on_the_hash_alone():
    from build import split_of

    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(20000)]
    splits = [split_of(digest) for digest in digests]
    assert splits == [split_of(digest[:8] + bytes(24)) for digest in digests]
    assert splits[::-1] == [split_of(digest) for digest in reversed(digests)]
    assert splits.count("test") / len(splits) == pytest.approx(0.10, abs=0.01)
    assert splits.count("validation") / len(splits) == pytest.approx(0.05, abs=0.01)
    assert set(splits) == {"train", "validation", "test"}
    for number, name in ((9, "test"), (10, "validation"), (14, "validation"), (15, "train")):
        assert split_of(number.to_bytes(8, "big")) == name


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("animals/birds/blue_bird_01.png", "blue bird, birds, animals"),
        ("plants/flowers/pink-rose_tess_brady_01.png", "pink rose, flowers, plants"),
        ("tools/insecticide_nicu_buculei_02.png", "insecticide, tools"),
        ("tools/natural_gas_pump_well_jo_01.png", "natural gas pump well, tools"),
        ("people/clothing/wedding_rings_jarno_vas1.png", "wedding rings, clothing, people"),
        (
            "recreation/games/cards/white/white_s_10.png",
            "ten of spades, white, cards, games, recreation",
        ),
        ("unsorted/duplicates/tavolozza_architetto_fra_01.png", "tavolozza"),
        ("food/fruit/lemon.png", "lemon, fruit, food"),
        ("food/food.png", "food"),
        ("shapes/arrows/arrow08_1.png", "arrow, arrows, shapes"),
        ("unsorted/01.png", "clip art"),
    ],
)
def test_clip_art_captions(path, caption):
    from captions import openclipart_caption

    assert openclipart_caption(path) == caption


def test_other_captions():
    from captions import emoji_caption, tuxpaint_caption

    assert tuxpaint_caption("A red  fox.\nde.utf8=Ein Fuchs.\n") == "A red fox."
    assert tuxpaint_caption("\ufeffAn owl.\r\nfr.utf8=Un hibou.") == "An owl."
    assert tuxpaint_caption("\n") == "stamp"
    assert emoji_caption("GRINNING FACE") == "grinning face"


def test_crop_boxes_are_reproducible_and_inside():
    from build import crop_boxes

    boxes = crop_boxes((640, 480), 50, b"seed")
    assert boxes == crop_boxes((640, 480), 50, b"seed") != crop_boxes((640, 480), 50, b"other")
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        assert min(right - left, bottom - top) >= 480 / 3 * 0.8 - 2
        assert max(right - left, bottom - top) <= 480


def make_raw(raw: Path) -> None:
    """Two valid images (one transparent, one large), a duplicate of one, and a corrupt one."""
    from sources import CLIPART

    folder = raw / CLIPART / "animals"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "big_dog_01.png")
    glass = np.zeros((40, 30, 4), dtype=np.uint8)
    glass[10:20, 5:25] = (255, 0, 0, 255)
    Image.fromarray(glass).save(folder / "red_fish.png")
    Image.fromarray(glass).save(folder / "red_fish_again.png", compress_level=1)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of use")


def test_tiny_build(tmp_path):
    from build import build, split_of
    from datasets import Dataset

    raw, out = tmp_path / "raw", tmp_path / "out"
    make_raw(raw)
    manifest = build(raw, out, workers=0)
    assert sum(manifest["total"].values()) == 2
    assert manifest["rejected"] == {"duplicate": 1, "unreadable": 1}
    assert json.loads((out / "manifest.json").read_text()) == manifest

    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [Path(item["key"]).name for item in rejects] == ["broken.png", "red_fish_again.png"]

    records = {}
    for path in sorted((out / "data").glob("*.parquet")):
        part = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        assert part.column_names == ["image", "caption", "source", "key", "license"]
        for record in part:
            records[record["caption"]] = record
            digest = hashlib.sha256((raw / record["key"]).read_bytes()).digest()
            assert path.name.split("-")[0] == split_of(digest)
    dog, fish = records["big dog, animals"]["image"], records["red fish, animals"]["image"]
    assert dog.size == (160, 80) and fish.size == (30, 40) and fish.mode == "RGB"
    assert fish.getpixel((0, 0)) == (255, 255, 255) and fish.getpixel((10, 15)) == (255, 0, 0)
    assert build(raw, tmp_path / "again", workers=0)["sha256"] == manifest["sha256"]


def test_fetch_reports_a_failing_package_and_goes_on(tmp_path, monkeypatch, capsys):
    import fetch

    def fake(name, command, pattern, raw):
        if name == "openclipart-png":
            raise fetch.FetchError("no such package")
        return "1.0"

    monkeypatch.setattr(fetch, "fetch_package", fake)
    assert fetch.main(["--raw", str(tmp_path)]) == 1
    assert "error: openclipart-png: no such package" in capsys.readouterr().err
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert "openclipart-png" not in versions and "mate-backgrounds" in versions


def test_views_are_crops_of_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from build import write_split
    from datasets import load_dataset
    from views import MIN_AREA, main

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    (tmp_path / "data" / "data").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        records = []
        for number in range(3):
            Image.fromarray(pixels).save(tmp_path / "one.png")
            image = {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}
            record = {
                "image": image,
                "caption": f"caption {number}",
                "source": "s",
                "key": f"k{number}",
                "license": "MIT",
            }
            records.append(record)
        write_split(records, split, tmp_path / "data")
    for out in ("views", "again"):
        monkeypatch.setattr(
            sys,
            "argv",
            ["views.py", "--data", str(tmp_path / "data"), "--out", str(tmp_path / out)],
        )
        main()
    made, again = (
        load_dataset("parquet", data_dir=str(tmp_path / out / "data")) for out in ("views", "again")
    )
    assert {split: len(records) for split, records in made.items()} == {
        "train": 9,
        "validation": 3,
        "test": 3,
    }
    assert made["train"]["key"][:3] == ["k0", "k0@1", "k0@2"]
    assert made["train"]["caption"][:3] == ["caption 0"] * 3
    for record, other in zip(made["train"], again["train"], strict=True):
        cut = np.asarray(record["image"])
        assert np.array_equal(cut, np.asarray(other["image"])), "the key alone decides"
        height, width = cut.shape[:2]
        assert MIN_AREA * 0.9 < height * width / (40 * 30) <= 1
        where = [(y, x) for y in range(41 - height) for x in range(31 - width)]
        assert any(np.array_equal(cut, pixels[y : y + height, x : x + width]) for y, x in where)
    assert np.array_equal(np.asarray(made["test"][0]["image"]), pixels)


def test_file_captions():
    from captions import file_caption

    assert file_caption("greatPyramidOfGiza") == "great pyramid of giza"
    assert file_caption("fish12") == "fish"
    assert file_caption("07") == "image"


def test_files_of_one_group_fall_into_one_split(tmp_path):
    from build import make_record
    from sources import Task

    image = Image.new("RGB", (20, 20), "red")
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(40)]
    task = Task(tmp_path, "key", "source", "caption", "MIT", group="painting")
    assert len({make_record(image, task, "key", digest, False)["split"] for digest in digests}) == 1
    alone = task._replace(group="")
    assert len({make_record(image, alone, "key", d, False)["split"] for d in digests}) > 1


def archive(files: dict[str, bytes], compressed: bool) -> bytes:
    """A Qt resource archive of version 3 with one folder, `images`, that holds these files."""
    import struct
    import zlib

    names, at = b"", {}
    for name in ("images", *files):
        at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, nodes = b"", [struct.pack(">IHIIQ", 0, 2, 1, 1, 0)]
    nodes.append(struct.pack(">IHIIQ", at["images"], 2, len(files), 2, 0))
    for name, body in files.items():
        nodes.append(struct.pack(">IHIIQ", at[name], int(compressed), 0, len(data), 0))
        body = struct.pack(">I", len(body)) + zlib.compress(body) if compressed else body
        data += struct.pack(">I", len(body)) + body
    tree = b"".join(nodes)
    head = struct.pack(">4s4II", b"qres", 3, 24, 24 + len(tree), 24 + len(tree) + len(data), 0)
    return head + tree + data + names


@pytest.mark.parametrize("compressed", [False, True])
def test_qt_resources_are_read(tmp_path, compressed):
    from qt_resources import extract_images, read_archive

    files = {"cat.webp": b"a cat" * 9, "notes.txt": b"text"}
    data = archive(files, compressed)
    assert dict(read_archive(data)) == {f"images/{name}": body for name, body in files.items()}
    (tmp_path / "animals.rcc").write_bytes(data)
    extract_images(tmp_path / "animals.rcc")
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".rcc"]
    assert found == [tmp_path / "animals/images/cat.webp"]
    with pytest.raises(ValueError, match="starts with b'qres'"):
        next(read_archive(b"PK"))
