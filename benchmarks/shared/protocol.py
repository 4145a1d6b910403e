"""Names of distances: every departure from the protocol is part of a number's name.

    rFID    Inception-v3 2048-d, the same center crops as reference, at least 10,000 images

Another feature space is a "Frechet distance in ... (not FID)". A number is beside published ones
only under their protocol: ImageNet-1k validation, 50,000 images, 256x256 center crops.
"""

import importlib.metadata
from dataclasses import dataclass

FID_MIN_IMAGES, FID_USUAL_IMAGES = 2048, 10_000
SETS = {"imagenet-val": 50_000, "coco-val2017": 5_000}
"""Sets with a name of their own, and how many images they have."""
PUBLISHED_SET, PUBLISHED_SIZE = "imagenet-val", 256


@dataclass(frozen=True)
class Protocol:
    """How a measurement was made."""

    images: int
    size: int
    cropped: bool
    bad_records: int = 0
    set_name: str | None = None
    """What the user declares the images to be; the count is checked against it."""
    random_weights: bool = False

    def departures(self) -> list[str]:
        """Departures from the protocol of any rFID, in words; empty if there are none."""
        found = []
        if self.images < FID_USUAL_IMAGES:
            found.append(f"only {self.images} images, comparable from {FID_USUAL_IMAGES}")
        if not self.cropped:
            found.append("whole images resized to a square, no center crop")
        if self.set_name and self.images != SETS[self.set_name]:
            bad = f", {self.bad_records} unreadable" if self.bad_records else ""
            expected = f"the {SETS[self.set_name]} images of {self.set_name}"
            found.append(f"{self.images} of {expected}{bad}")
        if self.random_weights:
            found.append("random weights")
        return found

    def against_published(self) -> list[str]:
        """All reasons why a number cannot be compared with published ones."""
        found = self.departures()
        if self.set_name != PUBLISHED_SET:
            found.append(f"the images are not declared to be {PUBLISHED_SET}")
        if self.size != PUBLISHED_SIZE:
            found.append(f"{self.size}x{self.size} pixels, not {PUBLISHED_SIZE}x{PUBLISHED_SIZE}")
        return found

    def distance_name(self, space: str, antialias: bool | None) -> str:
        """The full name of a distance: rFID with its resizing, or a Frechet distance in a space.

        Args:
            antialias: of Inception's resizing; None for another space.
        """
        departures = "; ".join(self.departures())
        name = distance_name(antialias, "rFID", space)
        return name + (f" [{departures}]" if departures else "")


def distance_name(antialias: bool | None, kind: str, space: str) -> str:
    """The name of a distance, of `kind` only in Inception's space."""
    if antialias is None:
        return f"Frechet distance in {space} (not FID)"
    version = importlib.metadata.version("torchmetrics")
    return f"{kind}, torchmetrics {version} Inception-v3 2048-d, antialias={antialias}"


def refuse_few(images: int, force: bool) -> None:
    """Raise ValueError for an FID over so few images that it means nothing."""
    if images < FID_MIN_IMAGES and not force:
        raise ValueError(
            f"FID over {images} images means nothing: give at least {FID_MIN_IMAGES}, or --force"
        )
