"""The codes of an image, predicted from the vectors that another model generated for it.

    caption -Emu or VL-GPT-> vectors [n d] -VectorPrompt-> input embeddings -.
    image   -visual tokenizer-> codes                                         |
                                                                              v
    position      0     1     2     3      4   5   6   7
    id            <s>   .     .     <img>  7   3   9   </img>
    role          TEXT  VIS   VIS   BEGIN  VIS VIS VIS END
    is_embedding  .     v1    v2    .      .   .   .   .
    predict       .     .     .     .      x   x   x   x

A model with this objective is the first half of an image decoder (generation/codes_decoder.py), no
model of its own: a pixel decoder makes images of its codes. Emu's decoder is a diffusion model for
the same reason: what vectors leave open, such as where an object is, has to be chosen, and a
regression would answer with the mean. It is trained on vectors that are generated from captions, as
Emu's is, since those are what it gets in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lavit_lm.models.losses import LossSum
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.records import Connectors
from lavit_lm.sequences.segments import ImageSegment, Segment, SegmentLength, TextSegment
from lavit_lm.sequences.token_sequence import Role, SequenceBuilder, TokenSequence
from lavit_lm.vision.vector_reader import VectorReader, VectorReaderConfig
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok.nn.ranges import require_number


@dataclass(frozen=True)
class VectorCodes(Objective):
    """Cross-entropy of codes after vectors.

    Args:
        vectors: n, of an image.
        width: d, of a vector; the hidden size of the model that generates them.
        depth, heads, hidden_size: blocks, heads and width of the reader of vectors.
        prompt_drop: probability that the caption of a training example is replaced by an empty one,
            whose vectors guidance subtracts.
        pixel_decoder: decoder of the codes: "default" for the one that is shipped with the visual
            tokenizer, a directory or a Hub id.

    Raises:
        ValueError: impossible sizes, or a probability outside 0..1.
    """

    name: ClassVar[str] = "vector_codes"
    vectors: int
    width: int
    depth: int = 2
    heads: int = 4
    hidden_size: int = 256
    prompt_drop: float = 0.1
    pixel_decoder: str = "default"

    def __post_init__(self) -> None:
        self._reader(1)
        require_number("prompt_drop", self.prompt_drop, 0, 1)

    @property
    def connectors(self) -> Connectors:
        """The reader of vectors."""
        return Connectors(self._prompt, reads_vectors=True)

    @property
    def restricted_softmax(self) -> bool:
        """Codes are only ever generated under the constraint."""
        return True

    def layout(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        generator: torch.Generator,
        key: str = "",
    ) -> TokenSequence:
        """The sequence of an image and its caption, if any.

        The caption, or an empty one, becomes the sequence's key: the trainer generates the vectors
        of a batch from its keys.

        Raises:
            ValueError: anything but one image with codes and at most one text.
        """
        dropped = torch.rand((), generator=generator).item() < self.prompt_drop
        images = [s for s in segments if isinstance(s, ImageSegment)]
        texts = [s.text for s in segments if isinstance(s, TextSegment)]
        if len(images) != 1 or len(texts) > 1 or images[0].codes is None:
            raise ValueError(
                f"example {key!r}: expected the codes of one image, and its caption, got "
                f"{len(images)} images and {len(texts)} texts"
            )
        builder, v = self._begin(images[0], processor), processor.vocabulary
        builder.add(processor.codes(images[0].codes), Role.VISUAL, predict=True)
        builder.add([v.end], Role.END, predict=True)
        return builder.build("" if dropped or not texts else texts[0])

    def sequence_length(
        self,
        lengths: Sequence[SegmentLength],
        processor: MultimodalProcessor,
        generator: torch.Generator,
    ) -> int:
        """The caption is not part of the sequence."""
        codes = sum(s.tokens for s in lengths if s.is_image)
        return len(processor.start) + self.vectors + 2 + codes

    def prompt(
        self,
        segments: Sequence[Segment],
        processor: MultimodalProcessor,
        output: Literal["text", "image"],
    ) -> TokenSequence:
        """After the vectors of one image, its codes. Raises ValueError for anything else."""
        image = segments[0] if len(segments) == 1 else None
        if output == "text" or not isinstance(image, ImageSegment) or image.image is None:
            raise ValueError(
                "this model generates the codes of an image from the vectors that another one "
                "generated for it, no text and nothing from text: give it as the image decoder "
                "(--decoder) of that model"
            )
        return self._begin(image, processor).build()

    def total(self, losses: dict[str, LossSum]) -> Tensor:
        """The mean over all codes."""
        return losses["image"].mean

    def _begin(self, image: ImageSegment, processor: MultimodalProcessor) -> SequenceBuilder:
        builder, pads = SequenceBuilder().text(processor.start), [processor.pad] * self.vectors
        builder.add(pads, Role.VISUAL, embed=image)
        return builder.add([processor.vocabulary.begin], Role.BEGIN)

    def _reader(self, hidden_size: int) -> VectorReaderConfig:
        sizes = self.depth, self.heads, self.hidden_size
        return VectorReaderConfig(self.width, self.vectors, hidden_size, self.vectors, *sizes)

    def _prompt(self, visual: object, hidden_size: int) -> VectorPrompt:
        return VectorPrompt(self._reader(hidden_size))


class VectorPrompt(nn.Module):
    """The vectors of images -> input embeddings, as many.

    Args:
        config: of the reader; its features are the embeddings.
    """

    measured: Tensor

    def __init__(self, config: VectorReaderConfig) -> None:
        super().__init__()
        self.reader = VectorReader(config)
        self.register_buffer("measured", torch.zeros(()))

    def forward(
        self, vectors: Float[Tensor, "k n d"], keep: Bool[Tensor, "j patches"]
    ) -> Float[Tensor, "m h"]:
        """Arguments as those of every bridge; no mask of patches is used.

        The first batch of a training sets the reader's normalization.

        Raises:
            ValueError: vectors of another number or width.
        """
        vectors = vectors.to(self.reader.mean)
        if self.training and not bool(self.measured):
            self.reader.measure(vectors)
            self.measured.fill_(1)
        return self.reader(vectors).flatten(0, 1)
