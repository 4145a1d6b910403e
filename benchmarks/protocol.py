"""What was asked and what was done: every departure from the protocol is part of a figure's name.

    rFID          Inception-v3 2048-d, the same centre crops as reference, at least 10,000 pictures
    anything else keeps no such name: another feature space is a "Frechet distance in ... (not FID)"

A figure may stand beside published ones (`comparable`) only if nothing departs from the protocol of those: ImageNet-1k
validation, 50,000 pictures, 256x256 centre crops, trained weights.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

FID_LEAST, FID_USUAL = 2048, 10_000
SETS = {"imagenet-val": 50_000, "coco-val2017": 5_000}
"""Sets with a name of their own, and how many pictures they have."""
PUBLISHED_SET, PUBLISHED_SIZE = "imagenet-val", 256


@dataclass(frozen=True)
class Done:
    """How a measurement was made."""

    pictures: int
    size: int
    cropped: bool
    bad_rows: int = 0
    set_name: str | None = None
    """What the user says the pictures are; the count is checked against it."""
    random_weights: bool = False

    def departures(self) -> list[str]:
        """From the protocol for any rFID, in words; empty if there are none."""
        found = []
        if self.images < FID_USUAL:
            found.append(f"only {self.pictures} pictures, comparable from {FID_USUAL} on")
        if not self.cropped:
            found.append("whole pictures squeezed to a square, no centre crop")
        if self.set_name and self.images != SETS[self.set_name]:
            bad = f", {self.bad_rows} unreadable" if self.bad_rows else ""
            found.append(
                f"{self.pictures} of the {SETS[self.set_name]} pictures of {self.set_name}{bad}"
            )
        if self.random_weights:
            found.append("random weights")
        return found

    def against_published(self) -> list[str]:
        """What else keeps a figure from standing beside published ones."""
        found = self.departures()
        if self.set_name != PUBLISHED_SET:
            found.append(f"the pictures are not said to be {PUBLISHED_SET}")
        if self.size != PUBLISHED_SIZE:
            found.append(f"{self.size}x{self.size} pixels, not {PUBLISHED_SIZE}x{PUBLISHED_SIZE}")
        return found


def rfid_name(antialias: bool, done: Done) -> str:
    """The full name of an rFID: implementation, its resize, and every departure."""
    version = importlib.metadata.version("torchmetrics")
    name = f"rFID, torchmetrics {version} Inception-v3 2048-d, antialias={antialias}"
    return _with(name, done.departures())


def frechet_name(space: str, done: Done) -> str:
    """The full name of a Frechet distance in another feature space."""
    return _with(f"Frechet distance in {space} (not FID)", done.departures())


def _with(name: str, departures: list[str]) -> str:
    return name + (f" [{'; '.join(departures)}]" if departures else "")


def refuse_few(pictures: int, force: bool) -> None:
    """Raise ValueError for an rFID over so few pictures that it means nothing."""
    if pictures < FID_LEAST and not force:
        raise ValueError(
            f"rFID over {pictures} pictures means nothing: give at least {FID_LEAST} (--pictures), or --force"
        )
