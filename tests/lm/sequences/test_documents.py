"""Texts and images in turn: clips, storyboards, files of documents, and training on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from helpers.lm_runs import Losses, data, module, saving, trainer
from PIL import Image

from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.documents import (
    Documents,
    as_segments,
    clip,
    document_line,
    read_clip,
    storyboard,
)
from lavit_lm.sequences.segments import ImageSegment, TextSegment
from lavit_lm.sequences.token_sequence import Role
from lavit_lm.training.sampler import segment_length
from lavit_tok import ImageError, VisualImageProcessor, VisualTokenizer

EMU = Emu(queries=3, depth=1, heads=2, train_encoder=False)

IMAGES = VisualImageProcessor(32)


@pytest.fixture
def album(tmp_path: Path, photos: list[Path]) -> Path:
    """Six documents beside four images; a line between them is empty."""
    (tmp_path / "album" / "walk").mkdir(parents=True)
    for i, photo in enumerate(photos):
        Image.open(photo).convert("RGB").resize((40, 40)).save(
            tmp_path / "album" / "walk" / f"{i}.png"
        )
    one, two = PurePosixPath("walk/0.png"), PurePosixPath("walk/1.png")
    kinds: list[list[Any]] = [["rain"], [one], ["a red apple", one, "and", two], [two, one, "rain"]]
    lines = [document_line(f"document {i}", kinds[i % 4]) for i in range(6)]
    (tmp_path / "album" / "pages.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    return tmp_path / "album" / "pages.jsonl"


def test_frames_of_a_clip():
    """The image in clip."""
    assert clip(list(range(10)), 3) == [1, 5, 8]
    assert clip(list(range(300))) == [18, 56, 93, 131, 168, 206, 243, 281] and clip([4, 5]) == [
        4,
        5,
    ]
    assert clip(list(range(8))) == list(range(8)) and clip(list(range(9)), 1) == [4]
    for images, frames in (([], 8), ([1], 0)):
        with pytest.raises(ValueError, match="expected a clip of at least one frame"):
            clip(images, frames)


def animated(path: Path, count: int) -> Path:
    """Gray frames, each 10 levels brighter than the last."""
    first, *others = [Image.new("RGB", (32, 32), (20 + 10 * i,) * 3) for i in range(count)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=40, **lossless)
    return path


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_frames_of_an_animated_file(suffix: str, tmp_path: Path):
    path = animated(tmp_path / f"clip{suffix}", 20)
    shades = [image.getpixel((5, 5)) for image in read_clip(path)]
    assert shades == [(20 + 10 * i,) * 3 for i in clip(range(20))]
    assert [image.size for image in read_clip(animated(path, 1))] == [(32, 32)], "a still image"
    with pytest.raises(ValueError, match="expected a clip of at least one frame"):
        read_clip(path, 0)
    whole = animated(path, 20).read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ImageError, match=rf"clip{suffix}"):
        read_clip(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty file"):
        read_clip(path)


def test_clips_in_documents(album: Path, tiny_tokenizer: VisualTokenizer):
    """An animated file and a list of files are both their images in turn."""
    walk = animated(album.parent / "walk" / "clip.webp", 9)
    files = {"frames": [f"walk/{i % 4}.png" for i in range(3)], "target": False}
    line = {"segments": [{"frames": "walk/clip.webp"}, {"text": "then"}, files]}
    album.write_text(json.dumps(line))
    segments = Documents(album, IMAGES)[0][0]
    assert [segment.is_target for segment in segments] == [True] * 9 + [False] * 3
    shown: Any = [segment for segment in segments if segment.is_image]
    for segment, frame in zip(shown, read_clip(walk), strict=False):
        assert torch.equal(segment.image(), IMAGES.to_uint8(frame)[0])
    assert torch.equal(shown[-1].image(), IMAGES.to_uint8(album.parent / "walk" / "2.png")[0])
    coded: Any = Documents(album, IMAGES, encode=tiny_tokenizer.encode, pixels=False, batch=4)[0][0]
    assert torch.equal(coded[3].codes, tiny_tokenizer.encode(read_clip(walk)[3])[0])
    walk.write_bytes(walk.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"pages.jsonl, line 1: .*clip.webp"):
        Documents(album, IMAGES)[0][0][8].image()  # type: ignore[union-attr, operator]


def test_subtitles_come_before_the_next_frame():
    """The image at the head of documents.py."""
    frames, generated = (
        [(0.0, "f0"), (4.0, "f4"), (8.0, "f8")],
        [(1.0, "one"), (2.0, " two "), (9.0, "nine")],
    )
    assert storyboard(frames, generated) == ["f0", "one two", "f4", "f8", "nine"]
    assert storyboard(frames[:1], []) == ["f0"] and storyboard(frames[:1], [(0.0, "at once")]) == [
        "f0",
        "at once",
    ]
    assert storyboard(frames[1:2], [(1.0, "before"), (2.0, " ")]) == ["before", "f4"]
    with pytest.raises(
        ValueError, match=r"frames: expected times that do not decrease, got \[4.0, 0.0\]"
    ):
        storyboard(frames[1::-1], [])
    with pytest.raises(ValueError, match="subtitles: expected times"):
        storyboard(frames, generated[::-1])
    with pytest.raises(ValueError, match="at least one frame"):
        storyboard([], generated)


def test_parts_become_segments(photos: list[Path]):
    made = as_segments(["rain", photos[0]], IMAGES, is_target=False)
    assert (
        isinstance(made[0], TextSegment)
        and isinstance(made[1], ImageSegment)
        and not made[0].is_target
        and not made[1].is_target
    )
    assert callable(made[1].image) and torch.equal(made[1].image(), IMAGES.to_uint8(photos[0])[0])


def test_documents_with_pixels_only(album: Path):
    documents = Documents(album, IMAGES)
    assert len(documents) == 6
    segments, key = documents[4]
    assert key == "document 4" and segments == [TextSegment("rain")]
    segments, key = documents[2]
    assert key == "document 2" and [type(s) for s in segments] == [
        TextSegment,
        ImageSegment,
        TextSegment,
        ImageSegment,
    ]
    shown: Any = segments[3]
    assert shown.codes is None and torch.equal(
        shown.image(), IMAGES.to_uint8(album.parent / "walk" / "1.png")[0]
    )


def test_segments_that_are_no_targets(album: Path):
    line = {"segments": [{"image": "walk/0.png", "target": False}, {"text": "a", "target": True}]}
    album.write_text(json.dumps(line))
    assert [segment.is_target for segment in Documents(album, IMAGES)[0][0]] == [False, True]


def test_documents_are_encoded(album: Path, tiny_tokenizer: VisualTokenizer):
    documents = Documents(album, IMAGES, encode=tiny_tokenizer.encode, pixels=False, batch=1)
    shown: Any = documents[2][0][1]
    wanted = tiny_tokenizer.encode(album.parent / "walk" / "0.png")
    assert wanted.keep is not None
    assert (
        torch.equal(shown.codes, wanted[0])
        and torch.equal(shown.keep, wanted.keep[0])
        and shown.image is None
    )
    both: Any = Documents(album, IMAGES, encode=tiny_tokenizer.encode)[2][0][1]
    assert torch.equal(both.codes, wanted[0]) and callable(both.image)


def test_images_by_their_codes(album: Path, tiny_tokenizer: VisualTokenizer):
    own = {"fingerprint": "d7d5", "codebook_size": 16}

    def documents(codes: Any, fingerprint: str = "d7d5") -> Documents:
        image = {"codes": codes, "fingerprint": fingerprint}
        album.write_text(json.dumps({"segments": [{"text": "a", "target": False}, image]}))
        return Documents(album, IMAGES, encode=tiny_tokenizer.encode, **own)

    text, image = documents([7, 3, 15])[0][0]
    assert isinstance(image, ImageSegment) and image.image is None and image.is_target
    assert image.codes is not None and image.codes.tolist() == [7, 3, 15] and not text.is_target
    with pytest.raises(ValueError, match=r"line 1: expected codes of the codebook d7d5, this mod"):
        documents([7], "another")
    for codes in ([], [16], [-1], [1.0], [True], 3, "7"):
        with pytest.raises(ValueError, match=r"line 1: expected one or more codes in 0..15, got"):
            documents(codes)


def test_a_given_text_stays_before_its_image(folder: Path):
    """A pair is laid out in both orders only if both are targets."""
    lm = module(folder)
    for targets in ((True, True), (False, True), (True, False)):
        segments = [
            TextSegment("a red apple", targets[0]),
            ImageSegment(torch.tensor([7, 3, 15]), is_target=targets[1]),
        ]
        first, lengths = set(), [segment_length(s, lm.processor) for s in segments]
        for seed in range(20):
            draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
            objective = LaVIT(prompt_drop=0.0)
            sequence = objective.layout(segments, lm.processor, draws[0])
            assert objective.sequence_length(lengths, lm.processor, draws[1]) == len(sequence.ids)
            first.add(int(sequence.ids[len(lm.processor.start)]))
            if targets == (False, True):
                image = [*lm.processor.codes(segments[1].codes), lm.processor.vocabulary.end]
                ids = [lm.processor.vocabulary.begin, *image, lm.processor.stop]
                assert sequence.ids[sequence.predict].tolist() == ids
        assert len(first) == (2 if all(targets) else 1), targets


BAD = {
    "{": "line 2: not JSON",
    "[]": 'line 2: expected {"key": text, "segments"',
    '{"key": "x", "segments": []}': "line 2: expected",
    '{"key": 3, "segments": [{"text": "a"}]}': "line 2: expected",
    '{"segments": [{"words": "a"}]}': "line 2: expected segments "
    '{"text": ...}, {"image": ...}, {"frames": ...} or {"codes": ..., "fingerprint": ...}, got '
    '{"words": "a"}',
    '{"segments": [{"codes": [1]}]}': "line 2: expected segments",
    '{"segments": [{"codes": [1], "fingerprint": "f"}]}': "line 2: codes: this model reads the "
    "pixels of images, expected an image",
    '{"segments": [{"frames": []}]}': "line 2: expected a clip of at least one frame, got",
    '{"segments": [{"frames": ["walk/0.png", ""]}]}': "line 2: expected a string that is not empty",
    '{"segments": [{"frames": "none.gif"}]}': "line 2: no such image beside pages.jsonl",
    '{"segments": [{"frames": "pages.jsonl"}]}': "line 2: ALBUM/pages.jsonl: not an image",
    '{"segments": [{"text": "a", "image": "b.png"}]}': "line 2: expected segments",
    '{"segments": [{"text": "a", "target": 1}]}': 'line 2: expected "target": true or false',
    '{"segments": [{"target": true}]}': "line 2: expected segments",
    '{"segments": [{"text": ""}]}': "line 2: expected a string that is not empty",
    '{"segments": [{"image": 4}]}': "line 2: expected a string that is not empty",
    '{"segments": [{"image": "/etc/hostname"}]}': "line 2: expected an image in the file's folder",
    '{"segments": [{"image": "../a.png"}]}': "line 2: expected an image in the file's folder",
    '{"segments": [{"image": "none.png"}]}': "line 2: no such image beside pages.jsonl",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines(line: str, album: Path):
    album.write_text(f'{{"segments": [{{"text": "good"}}]}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        Documents(album, IMAGES)
    wanted = BAD[line].replace("ALBUM", str(album.parent))
    assert str(caught.value).startswith(f"{album}, {wanted}") and "\n" not in str(caught.value)


def test_bad_files(album: Path, tiny_tokenizer: VisualTokenizer):
    with pytest.raises(ValueError, match="documents cannot be read"):
        Documents(album.with_name("none.jsonl"), IMAGES)
    (album.parent / "walk" / "1.png").write_bytes(b"no picture")
    shown: Any = Documents(album, IMAGES)[2][0][3]
    with pytest.raises(ImageError, match=r"pages.jsonl, line 3: .*1.png"):
        shown.image()
    with pytest.raises(ImageError, match=r"pages.jsonl, line 3: .*1.png"):
        Documents(album, IMAGES, encode=tiny_tokenizer.encode)
    album.write_text("\n\n")
    with pytest.raises(ValueError, match="expected one document per line, got none"):
        Documents(album, IMAGES)
    album.write_text(json.dumps({"segments": [{"text": "rain"}]}))
    assert Documents(album, IMAGES)[0][1] == "pages.jsonl:1", "named by its line"


@pytest.mark.parametrize(
    "objective", [EMU, LaVIT(), LaVIT(continuous=True)], ids=["emu", "lavit", "lavit-continuous"]
)
def test_a_stopped_run_on_documents_goes_on(objective: Any, folder: Path, album: Path):
    steps, images = 8, str(folder / "pictures") if objective.connectors.needs_pixels else None

    def run(callbacks: list[Any], ckpt: str | None = None) -> None:
        chosen = data(folder, images=images, documents=str(album), block=96)
        trainer(folder, steps, callbacks).fit(
            module(folder, objective=objective), chosen, ckpt_path=ckpt
        )

    whole, cut, rest = Losses(), Losses(stop=4), Losses()
    run([whole])
    keys = {key for batch in whole.keys for block in batch for key in block}
    assert {f"document {i}" for i in range(6)} <= keys and any(key.endswith(".png") for key in keys)
    with pytest.raises(RuntimeError, match="power cut"):
        run([cut, saving(folder)])
    run([rest, saving(folder)], "last")
    done = len(whole.values) - len(rest.values)
    assert (
        cut.values[:done] + rest.values == whole.values
        and cut.keys[:done] + rest.keys == whole.keys
    )


def test_documents_and_pairs_in_one_block(folder: Path, album: Path):
    """Images of shards have masks of patches and those of documents none: Emu asks for neither."""
    training = module(folder, objective=replace(EMU, order="given"))
    chosen = data(folder, images=str(folder / "pictures"), documents=str(album), block=96)
    trainer(folder, 1, []).fit(training, chosen)
    assert chosen.sampler is not None
    pairs = len(chosen.sampler.layout.examples.pairs)
    plans = (block for window in range(60) for block in chosen.sampler._plan(window))
    mixed = next(block for block in plans if len({number < pairs for _, number in block}) == 2)
    blocks = [chosen.blocks[mixed]]
    keys = {sequence.key.split(" ")[0].split("/")[0] for sequence in blocks[0]}
    assert keys == {"document", "train"}
    batch = chosen.blocks.collate(blocks)
    assert (
        len(batch.images) * 3 == batch.is_embedding.sum() == (batch.roles == Role.VISUAL).sum()
        and batch.keep.numel() == 0
    )
