"""Training of a decoder of vectors that generates codes (objectives/vector_codes.py).

    caption -frozen LM-> generated vectors, of "" at prompt_drop -.
                                                                  +-LM of codes-> cross-entropy
    codes of the caption's image, from token shards --------------'

The LM of codes is one that has learned codes from captions, such as the shipped one: only its
prompts become others. No image is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.multimodal import MultimodalLM
from lavit_lm.objectives.vector_codes import VectorCodes, VectorPrompt
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.training.generated_vectors import KEPT, GeneratedVectors, require_vectors
from lavit_lm.training.module import LanguageModeling, LMOptimizerConfig
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.optimizers import ScheduleConfig


@dataclass(frozen=True)
class VectorPromptConfig:
    """The transformer that reads the generated vectors."""

    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    hidden_size: int = 256
    """Width of the blocks."""
    prompt_drop: float = 0.1
    """Probability that a caption is replaced by an empty one, for guidance."""


class CodesDecoderTraining(LanguageModeling):
    """Trains an LM of codes to generate them from the vectors of another LM, which is frozen.

    Args:
        model: directory or Hub id of a MultimodalLM that generates vectors.
        lm: "default", directory or Hub id of an LM of codes, trained on captions.
        visual_tokenizer: "default", directory or Hub id: the tokenizer of the codes in the shards;
            by default, on the command line, the one that the shards name.
        pixel_decoder: decoder of the codes: "default" for the one that is shipped with the visual
            tokenizer, a directory or a Hub id.
        reader: the transformer that reads the generated vectors.
        optimizer: AdamW, and Muon; visual_lr is the reader's peak learning rate.
        schedule: learning-rate schedule.
        compile: torch.compile the LM of codes.
        out: where the trained decoder is saved; None keeps checkpoints only.
        seed: seed of all initial weights.

    Raises:
        ValueError: a `model` that generates codes.
    """

    def __init__(
        self,
        model: str,
        lm: str = "default",
        visual_tokenizer: str | None = None,
        pixel_decoder: str = "default",
        reader: VectorPromptConfig = VectorPromptConfig(),
        optimizer: LMOptimizerConfig = LMOptimizerConfig(lr=4e-4, visual_lr=1e-3),
        schedule: ScheduleConfig = ScheduleConfig(min_lr_ratio=0.03),
        compile: bool = False,
        out: str | None = None,
        seed: int = 0,
    ) -> None:
        frozen = MultimodalLM.from_pretrained(model, decoder=None)
        n = require_vectors(frozen, model)
        width = frozen.model.causal.config.get_text_config().hidden_size
        sizes = n, width, reader.depth, reader.heads, reader.hidden_size
        objective = VectorCodes(*sizes, reader.prompt_drop, pixel_decoder)
        super().__init__(
            lm,
            visual_tokenizer=visual_tokenizer,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
            compile=compile,
            out=out,
            seed=seed,
        )
        self.save_arguments()
        self.kind = "decoder of vectors"
        self.source = model
        self.frozen_lm = Frozen(frozen)
        self.vectors = GeneratedVectors(frozen, KEPT)

    def next_command(self) -> str:
        """Images are generated next."""
        return f"lavit-lm generate PROMPT --model {self.source} --decoder {self.out} --out images"

    def _sequence_model(self) -> SequenceModel:
        """With a reader that measures this model's vectors, also if it was trained on others."""
        model = super()._sequence_model()
        assert isinstance(model.bridge, VectorPrompt)
        model.bridge.measured.zero_()
        return model

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Add the vectors of each example, whose key is its caption; see VectorCodes.layout."""
        self.frozen_lm.module.model.to(self.device)
        captions = [key for keys in batch.keys for key in keys]
        return replace(batch, images=self.vectors(captions))
