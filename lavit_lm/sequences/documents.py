"""Interleaved texts and images: videos, storyboards, and documents to train on.

    clip         many images                     -> 8 of them, evenly spaced
    read_clip    an animated GIF, APNG or WebP   -> the same of its frames
    storyboard   frames and subtitles with times -> parts: before a frame its subtitles
    as_segments  parts                           -> segments for an objective's layout
    Documents    JSON lines beside their images  -> examples for training/sampler.py

`parts` are strings and images in turn, as MultimodalLM's prompts. A line of a file of documents:

    {"key": "a walk", "segments": [{"text": "Then"}, {"image": "walk/1.png"}, {"text": "we left."}]}

A clip is {"frames": "walk.webp"}, or {"frames": ["walk/1.png", "walk/2.png"]}: its images in turn,
8 of them if there are more. An image may also be given by its codes, which are read as they are:
{"codes": [7, 3, 9], "fingerprint": "d7d50eab4640d28e"}, the latter that of their codebook. The
model is trained to generate every segment but those with "target": false, such as questions.

    frames at 0, 4, 8 s; subtitles at 1, 2, 9 s  ->  frame 0, "one two", frame 4, frame 8, "nine"
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_tok import ImageError, VisualCodes, VisualImageProcessor
from lavit_tok.data.animations import count_frames, read_frames

FRAMES = 8
"""Of a video (Emu, appendix)."""
Encode = Callable[[UInt8[Tensor, "b 3 s s"]], VisualCodes]
Frame = tuple[str, int | None]
"""The file of an image, and which frame of it; None for a still image."""


def clip(images: Sequence[Any], frames: int = FRAMES) -> list[Any]:
    """The middle images of as many equal intervals; all images if there are no more than `frames`.

    10 images, 3 frames:  0 (1) 2 | 3 4 (5) 6 | 7 (8) 9

    Raises:
        ValueError: no image, or less than one frame.
    """
    if not images or frames < 1:
        raise ValueError(
            f"expected a clip of at least one frame, and to use at least one, got {len(images)} "
            f"and {frames}"
        )
    if len(images) <= frames:
        return list(images)
    return [images[(2 * i + 1) * len(images) // (2 * frames)] for i in range(frames)]


def read_clip(file: str | os.PathLike[str], frames: int = FRAMES) -> list[Image.Image]:
    """Evenly spaced frames of an animated file, see `clip`; of a still image, the image.

    Raises:
        ImageError: a file that cannot be read.
        ValueError: less than one frame.
    """
    return read_frames(file, clip(range(count_frames(file)), frames))


def storyboard(
    frames: Sequence[tuple[float, Any]], subtitles: Sequence[tuple[float, str]]
) -> list[Any]:
    """Frames and subtitles of a video in order of time: see the drawing above.

    Args:
        frames: (seconds, image), in order of time.
        subtitles: (seconds, text); a subtitle at the very time of a frame comes after it.

    Raises:
        ValueError: no frames, or times that decrease.
    """
    for name, timed in (("frames", frames), ("subtitles", subtitles)):
        times = [time for time, _ in timed]
        if times != sorted(times):
            raise ValueError(f"{name}: expected times that do not decrease, got {times}")
    if not frames:
        raise ValueError("a storyboard needs at least one frame, got none")
    parts: list[Any] = []
    start = float("-inf")
    for time, image in [*frames, (float("inf"), None)]:
        texts = [text.strip() for at, text in subtitles if start <= at < time and text.strip()]
        parts += [" ".join(texts)] if texts else []
        parts += [] if image is None else [image]
        start = time
    return parts


def as_segments(
    parts: Sequence[Any], image_processor: VisualImageProcessor, is_target: bool = True
) -> list[Segment]:
    """Segments for an objective that needs pixels; images are opened when they are needed.

    Args:
        parts: strings, and images as VisualTokenizer.encode accepts them, files as pathlib.Path.
        image_processor: the visual tokenizer's.
        is_target: whether the model is trained to generate them.
    """
    return [
        TextSegment(part, is_target)
        if isinstance(part, str)
        else ImageSegment(image=partial(_open_image, part, image_processor), is_target=is_target)
        for part in parts
    ]


def document_line(key: str, parts: Sequence[str | PurePosixPath]) -> str:
    """A line of a file of documents, without newline; image paths are relative to the file."""
    segments = [{"text": p} if isinstance(p, str) else {"image": p.as_posix()} for p in parts]
    return json.dumps({"key": key, "segments": segments}, ensure_ascii=False)


class Documents:
    """Map-style: documents[i] is (segments, key) of line i; images are opened when needed.

    Every line is checked when the file is opened. For an objective with codes, all images are
    encoded then too, once and in memory: some kB per hundred images, but as slow as `lavit-tok
    shards` for the same number.

    Args:
        file: JSON lines, see the top of this file; images are in its folder or below.
        image_processor: the visual tokenizer's.
        encode: uint8 [b 3 s s] -> their codes with keep masks; None for an objective that uses
            pixels only.
        pixels: give image segments with pixels; False for an objective that uses codes only.
        batch: images encoded at a time.
        fingerprint: of the codebook that codes in the file must be of, VisualTokenizer's; None for
            an objective that uses pixels only.
        codebook_size: its entries.

    Raises:
        ValueError: a file or image that cannot be read, or a line that is not a document, by its
            number.
    """

    def __init__(
        self,
        file: str | Path,
        image_processor: VisualImageProcessor,
        encode: Encode | None = None,
        pixels: bool = True,
        batch: int = 32,
        fingerprint: str | None = None,
        codebook_size: int = 0,
    ) -> None:
        self.file, self.image_processor, self.pixels = Path(file), image_processor, pixels
        self.fingerprint, self.codebook_size = fingerprint, codebook_size
        self.offsets, self.line_numbers = array("q"), array("q")
        self.codes: dict[Frame, tuple[Int64[Tensor, " n"], Bool[Tensor, " patches"]]] = {}
        self._counts: dict[str, int] = {}  # frames of the animated files
        names: dict[Frame, int] = {}  # the first line that contains each image
        try:
            with open(self.file, "rb") as lines:
                offset = 0
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self.offsets.append(offset)
                        self.line_numbers.append(number)
                        for segment in self._parse(line, number)[1]:
                            if "image" in segment:
                                names.setdefault(segment["image"], number)
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"{file}: documents cannot be read: {error}") from None
        if not self.offsets:
            raise ValueError(f"{file}: expected one document per line, got none")
        if encode is not None:
            self._encode(names, encode, batch)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, number: int) -> tuple[list[Segment], str]:
        with open(self.file, "rb") as lines:
            lines.seek(self.offsets[number])
            key, segments = self._parse(lines.readline(), self.line_numbers[number])
        return [self._segment(segment, self.line_numbers[number]) for segment in segments], key

    def _segment(self, segment: dict[str, Any], line: int) -> Segment:
        is_target = segment.get("target", True)
        if "text" in segment:
            return TextSegment(segment["text"], is_target)
        if "codes" in segment:
            return ImageSegment(torch.tensor(segment["codes"]), is_target=is_target)
        frame = segment["image"]
        codes, keep = self.codes.get(frame, (None, None))
        pixels = partial(self._open, frame, line) if self.pixels else None
        return ImageSegment(codes, pixels, keep, is_target)

    def _open(self, frame: Frame, line: int) -> UInt8[Tensor, "3 s s"]:
        path, number = self.file.parent / frame[0], frame[1]
        try:
            image = path if number is None else read_frames(path, [number])[0]
            return _open_image(image, self.image_processor)
        except ImageError as error:
            raise ImageError(f"{self.file}, line {line}: {error}") from None

    def _parse(self, line: bytes, number: int) -> tuple[str, list[dict[str, Any]]]:
        label = f"{self.file}, line {number}"
        try:
            document = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{label}: not JSON: {error}") from None
        segments = document.get("segments") if isinstance(document, dict) else None
        if (
            not isinstance(segments, list)
            or not segments
            or not isinstance(document.get("key", ""), str)
        ):
            raise ValueError(f'{label}: expected {{"key": text, "segments": [one or more]}}')
        parts: list[dict[str, Any]] = []
        for segment in segments:
            if problem := self._problem(segment):
                shown = json.dumps(segment, ensure_ascii=False)[:80]
                raise ValueError(f"{label}: {problem}, got {shown}")
            try:
                parts += self._images(segment)
            except ImageError as error:
                raise ValueError(f"{label}: {error}") from None
        return document.get("key") or f"{self.file.name}:{number}", parts

    def _images(self, segment: dict[str, Any]) -> list[dict[str, Any]]:
        """A segment with a Frame in place of a name; of a clip, one for each of its images."""
        if "text" in segment or "codes" in segment:
            return [segment]
        value = segment.get("frames", [segment.get("image")])
        frames: list[Frame]
        if isinstance(value, list):
            frames = [(name, None) for name in clip(value)]
        else:
            if value not in self._counts:
                self._counts[value] = count_frames(self.file.parent / value)
            frames = [(value, number) for number in clip(range(self._counts[value]))]
        return [{"image": frame, "target": segment.get("target", True)} for frame in frames]

    def _problem(self, segment: Any) -> str:
        """Why this is not a segment; empty if it is one."""
        kinds = ({"text"}, {"image"}, {"frames"}, {"codes", "fingerprint"})
        if not isinstance(segment, dict) or set(segment) - {"target"} not in kinds:
            return (
                'expected segments {"text": ...}, {"image": ...}, {"frames": ...} or {"codes": '
                '..., "fingerprint": ...}'
            )
        if not isinstance(segment.get("target", True), bool):
            return 'expected "target": true or false'
        if "codes" in segment:
            return self._problem_of_codes(segment)
        (value,) = (value for name, value in segment.items() if name != "target")
        if value == [] and "frames" in segment:
            return "expected a clip of at least one frame"
        values = value if isinstance(value, list) and "frames" in segment else [value]
        if not all(isinstance(value, str) and value for value in values):
            return "expected a string that is not empty"
        for name in [] if "text" in segment else values:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                return "expected an image in the file's folder or below"
            if not (self.file.parent / name).is_file():
                return f"no such image beside {self.file.name}"
        return ""

    def _problem_of_codes(self, segment: dict[str, Any]) -> str:
        """Why these are not codes of this codebook; empty if they are."""
        if self.fingerprint is None:
            return "codes: this model reads the pixels of images, expected an image"
        if segment["fingerprint"] != self.fingerprint:
            return f"expected codes of the codebook {self.fingerprint}, this model's"
        codes, most = segment["codes"], self.codebook_size - 1
        right = isinstance(codes, list) and all(type(c) is int and 0 <= c <= most for c in codes)
        return "" if right and codes else f"expected one or more codes in 0..{most}"

    def _encode(self, lines: dict[Frame, int], encode: Encode, batch: int) -> None:
        names = list(lines)
        for start in range(0, len(names), batch):
            chunk = names[start : start + batch]
            pixels = torch.stack([self._open(name, lines[name]) for name in chunk])
            codes = encode(pixels).to("cpu")
            assert codes.keep is not None  # encoding always returns the keep mask
            for i, name in enumerate(chunk):
                self.codes[name] = codes[i].clone(), codes.keep[i].clone()


def _open_image(source: Any, image_processor: VisualImageProcessor) -> UInt8[Tensor, "3 s s"]:
    return image_processor.to_uint8(source)[0]
