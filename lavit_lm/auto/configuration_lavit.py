"""LavitConfig: a causal LM of `transformers` and the ids of its image tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, no_type_check

from transformers import AutoConfig, PreTrainedConfig

if TYPE_CHECKING:
    from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary


# Configs of transformers are dataclasses that accept other arguments, too; the check of shapes does
# not know that.
@no_type_check
class LavitConfig(PreTrainedConfig):
    """Config of LavitForConditionalGeneration; the ids are those of VisualVocabulary.

    Args:
        text_config: config of the language model, or its JSON with a model_type.
        boi_token_id: id before the codes of an image.
        eoi_token_id: id after them.
        first_code_id: id of code 0.
        codebook_size: K; code k has the id first_code_id + k.
        stages: of nested codes that have ids (VisualVocabulary); 0 for codes of one table.
        min_codes: smallest number of codes of a generated image.
        max_codes: largest number of codes of a generated image.
    """

    model_type = "lavit"
    auto_map: ClassVar[dict[str, Any]] = {}  # no remote code; TRL reads it
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: Any = None
    boi_token_id: int = 0
    eoi_token_id: int = 1
    first_code_id: int = 2
    codebook_size: int = 1
    stages: int = 0
    min_codes: int = 1
    max_codes: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the language model's config from its JSON, whose model_type is required."""
        import_module("lavit_lm.auto.modeling_lavit")  # registers it with its Auto class
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**(self.text_config or {"model_type": "llama"}))
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    @property
    def vocabulary(self) -> VisualVocabulary:
        """The ids of the image tokens. Raises VocabularyError if they overlap."""
        from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

        ids = self.boi_token_id, self.eoi_token_id, self.first_code_id
        return VisualVocabulary(*ids, self.codebook_size, self.stages)


AutoConfig.register(LavitConfig.model_type, LavitConfig, exist_ok=True)
