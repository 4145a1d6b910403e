"""Texts and pictures in turn: videos, storyboards, and interleaved documents to train on.

    clip         many pictures                     -> 8 of them, evenly spread
    storyboard   frames, subtitles, both timed     -> parts: what was said since the last frame stands before the frame
    as_segments  parts                             -> what an objective lays out
    Documents    JSON lines beside their pictures  -> samples for order.py

`parts` are strings and pictures in turn, as MultimodalLM's prompts take them. A line of a file of documents:

    {"key": "a walk", "segments": [{"text": "In the morning"}, {"image": "walk/1.png"}, {"text": "we left."}]}

    frames at 0, 4, 8 s; subtitles at 1, 2, 9 s      ->      frame 0, "one two", frame 4, frame 8, "nine"
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_tok import ImageError, VisualCodes, VisualImageProcessor

FRAMES = 8
"""Of a video (Emu, appendix)."""
Encode = Callable[[UInt8[Tensor, "b 3 s s"]], VisualCodes]


def clip(images: Sequence[Any], frames: int = FRAMES) -> list[Any]:
    """The pictures in the middle of as many equal stretches; all of them if there are no more.

    10 pictures, 3 frames:  0 (1) 2 | 3 4 (5) 6 | 7 (8) 9

    Raises:
        ValueError: no picture, or less than one frame.
    """
    if not images or frames < 1:
        raise ValueError(
            f"expected pictures and at least one frame, got {len(images)} and {frames}"
        )
    if len(images) <= frames:
        return list(images)
    return [images[(2 * i + 1) * len(images) // (2 * frames)] for i in range(frames)]


def storyboard(
    frames: Sequence[tuple[float, Any]], subtitles: Sequence[tuple[float, str]]
) -> list[Any]:
    """Parts of a video with words: see the picture above.

    Args:
        frames: (seconds, picture), in the order of time.
        subtitles: (seconds, text); what is said at the very time of a frame stands after it.

    Raises:
        ValueError: no frames, or times that go back.
    """
    for name, timed in (("frames", frames), ("subtitles", subtitles)):
        times = [time for time, _ in timed]
        if times != sorted(times):
            raise ValueError(f"{name}: expected times that do not go back, got {times}")
    if not frames:
        raise ValueError("a storyboard needs at least one frame, got none")
    parts: list[Any] = []
    last = float("-inf")
    for time, image in [*frames, (float("inf"), None)]:
        said = " ".join(
            text.strip() for at, text in subtitles if last <= at < time and text.strip()
        )
        parts += ([said] if said else []) + ([] if image is None else [image])
        last = time
    return parts


def as_segments(
    parts: Sequence[Any], image_processor: VisualImageProcessor, is_target: bool = True
) -> list[Segment]:
    """Segments of an objective that reads pictures; a picture is opened only when it is fed.

    Args:
        parts: strings, and pictures as VisualTokenizer.encode takes them, files as pathlib.Path.
        image_processor: the visual tokenizer's.
        learn: whether the model is trained to say them.
    """
    return [
        TextSegment(part, is_target)
        if isinstance(part, str)
        else ImageSegment(image=partial(_opened, part, image_processor), is_target=is_target)
        for part in parts
    ]


def document_line(key: str, parts: Sequence[str | PurePosixPath]) -> str:
    """A line of a file of documents, without its end; pictures are paths relative to the file's folder."""
    segments = [
        {"text": part} if isinstance(part, str) else {"image": part.as_posix()} for part in parts
    ]
    return json.dumps({"key": key, "segments": segments}, ensure_ascii=False)


class Documents:
    """Map-style: documents[i] is (segments, key) of the i-th line, its pictures opened when they are fed.

    Every line is checked when the file is opened. For an objective that says codes, all pictures are tokenised then,
    too, once and in memory: some kB a hundred pictures, but as long as `lavit-tok shards` takes for as many.

    Args:
        file: JSON lines, see this file's head; pictures lie in its folder or below.
        image_processor: the visual tokenizer's.
        encode: uint8 [b 3 s s] -> their codes with keep masks; None where the objective reads pictures alone.
        open_later: give images with their pictures; False for an objective that reads codes alone.
        batch: pictures encoded at a time.

    Raises:
        ValueError: a file or picture that cannot be read, or a line that is no document, by its number.
    """

    def __init__(
        self,
        file: str | Path,
        image_processor: VisualImageProcessor,
        encode: Encode | None = None,
        open_later: bool = True,
        batch: int = 32,
    ) -> None:
        self.file, self.image_processor, self.open_later = Path(file), image_processor, open_later
        self.starts, self.lines = array("q"), array("q")
        self.codes: dict[str, tuple[Int64[Tensor, " n"], Bool[Tensor, " patches"]]] = {}
        names: dict[str, int] = {}
        try:
            with open(self.file, "rb") as opened:
                at = 0
                for number, line in enumerate(opened, 1):
                    if line.strip():
                        self.starts.append(at)
                        self.lines.append(number)
                        _, segments = self._parsed(line, number)
                        names |= {
                            s["image"]: number
                            for s in segments
                            if "image" in s and s["image"] not in names
                        }
                    at += len(line)
        except OSError as error:
            raise ValueError(f"{file}: documents cannot be read: {error}") from None
        if not self.starts:
            raise ValueError(f"{file}: expected a document a line, got none")
        if encode is not None:
            self._encode(names, encode, batch)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> tuple[list[Segment], str]:
        with open(self.file, "rb") as opened:
            opened.seek(self.starts[number])
            key, segments = self._parsed(opened.readline(), self.lines[number])
        return [self._segment(segment, self.lines[number]) for segment in segments], key

    def _segment(self, segment: dict[str, str], line: int) -> Segment:
        if "text" in segment:
            return TextSegment(segment["text"])
        codes, keep = self.codes.get(segment["image"], (None, None))
        return ImageSegment(
            codes, partial(self._picture, segment["image"], line) if self.open_later else None, keep
        )

    def _picture(self, name: str, line: int) -> UInt8[Tensor, "3 s s"]:
        try:
            return _opened(self.file.parent / name, self.image_processor)
        except ImageError as error:
            raise ImageError(f"{self.file}, line {line}: {error}") from None

    def _parsed(self, line: bytes, number: int) -> tuple[str, list[dict[str, str]]]:
        try:
            document = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.file}, line {number}: not JSON: {error}") from None
        segments = document.get("segments") if isinstance(document, dict) else None
        if (
            not isinstance(segments, list)
            or not segments
            or not isinstance(document.get("key", ""), str)
        ):
            raise ValueError(
                f'{self.file}, line {number}: expected {{"key": text, "segments": [one or more]}}'
            )
        for segment in segments:
            if reason := self._wrong(segment):
                shown = json.dumps(segment, ensure_ascii=False)[:80]
                raise ValueError(f"{self.file}, line {number}: {reason}, got {shown}")
        return document.get("key") or f"{self.file.name}:{number}", segments

    def _wrong(self, segment: Any) -> str:
        """Why this is no segment; empty if it is one."""
        if not isinstance(segment, dict) or set(segment) not in ({"text"}, {"image"}):
            return 'expected segments {"text": ...} or {"image": ...}'
        (said,) = segment.values()
        if not isinstance(said, str) or not said:
            return "expected a string that is not empty"
        if "image" in segment:
            path = PurePosixPath(said)
            if path.is_absolute() or ".." in path.parts:
                return "expected a picture in the file's folder or below"
            if not (self.file.parent / said).is_file():
                return f"no such picture beside {self.file.name}"
        return ""

    def _encode(self, names: dict[str, int], encode: Encode, batch: int) -> None:
        for some in _batches(list(names), batch):
            codes = encode(torch.stack([self._picture(name, names[name]) for name in some])).to(
                "cpu"
            )
            assert codes.keep is not None  # codes of pictures always know their patches
            for i, name in enumerate(some):
                self.codes[name] = codes[i].clone(), codes.keep[i].clone()


def _opened(source: Any, image_processor: VisualImageProcessor) -> UInt8[Tensor, "3 s s"]:
    return image_processor.to_uint8(source)[0]


def _batches(names: list[str], size: int) -> Iterator[list[str]]:
    return (names[at : at + size] for at in range(0, len(names), size))
