"""LavitForConditionalGeneration: a causal LM of text tokens and codes, for `transformers`.

    generation_mode="text"    <s> <img> 7 3 9 </img>   ->  a cat </s>         no image tokens
    generation_mode="image"   <s> a cat                ->  <img> 7 3 9 </img>

Images are ids when they reach the model: LavitProcessor encodes and decodes them. What works with
`transformers` is listed in docs/transformers.md.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as NAMES

from lavit_lm.auto.configuration_lavit import LavitConfig
from lavit_lm.generation.logits_processors import (
    GuidanceLogitsProcessor,
    ImageConstraintLogitsProcessor,
    SamplingLogitsProcessor,
)
from lavit_lm.generation.sampling import GUIDANCE_SCALE, TOP_K, Sampling, sequence_generators
from lavit_lm.models.kv_state import cache_argument, check_context
from lavit_tok.checkpoints.weights import require_finite, require_fitting


class LavitForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Any causal LM of `transformers` whose vocabulary contains image tokens.

    Args:
        config: its config; the LM is `language_model`.
    """

    config_class = LavitConfig
    input_modalities = ("text",)  # ids only, so that pipelines need no torchvision
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LavitConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a directory or a Hub id; see `transformers` for the arguments.

        Raises:
            WeightsError: tensors that are missing, unexpected, mis-shaped, NaN or infinite.
        """
        name = pretrained_model_name_or_path
        options = {**kwargs, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(
            name, *model_args, output_loading_info=True, **options
        )
        require_fitting(report, str(name))
        quantized = getattr(model, "hf_quantizer", None) is not None  # tensors of other classes
        if not quantized and not any(value.is_meta for value in model.parameters()):  # on disk
            require_finite(model, str(name))
        return (model, report) if output_loading_info else model

    @property
    def base_model(self) -> Any:
        """The LM without its head: TRL computes losses from its hidden states."""
        return self.language_model.base_model

    def get_output_embeddings(self) -> Any:
        """The layer from hidden states to logits."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the layer from hidden states to logits."""
        self.language_model.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the mean cross-entropy of `labels` in nats; see the LM's own forward.

        Raises:
            ValueError: more positions than the context has.
        """
        for tensor in (input_ids, inputs_embeds):
            if tensor is not None:
                check_context(self.config.text_config, tensor.shape[1], 0)
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **cache_argument(self.language_model, past_key_values if cache is None else cache),
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Int64[Tensor, "b l"] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        *,
        generation_mode: str = "text",
        generator: Any = None,
        min_codes: int | None = None,
        max_codes: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text, or an image for each prompt.

        Args:
            inputs: ids of the prompts, left-padded; also as `input_ids`.
            generation_config: as in `transformers`. Images are sampled from the 50 most likely
                codes with guidance 3, unless do_sample, temperature, top_k, top_p or guidance_scale
                is given.
            logits_processor: further processors; those of images follow guidance and constraint.
            generation_mode: "text" or "image". An image begins after its prompt, whether or not the
                prompt ends with the id that begins it.
            generator: of images; one for all, or one for each, which makes them independent of the
                batch. None for torch's global one.
            min_codes: smallest number of codes of an image; config.min_codes by default.
            max_codes: largest number of codes of an image; config.max_codes by default, or what
                max_new_tokens leaves before the id that ends an image.
            kwargs: as in `transformers`.

        Returns:
            Prompts and generated ids, int64 [b l], or a ModelOutput for return_dict_in_generate;
            scores of guided images then have those of unconditional prompts after the others.

        Raises:
            ValueError: an unknown generation mode; right-padded prompts; a prompt that leaves too
                few positions in the context; impossible limits; images by beam search or assisted
                decoding.
        """
        if generation_mode not in self.output_modalities:
            raise ValueError(
                f"generation_mode: expected 'text' or 'image', got {generation_mode!r}"
            )
        config = copy.deepcopy(generation_config or self.generation_config)
        if generation_mode == "image" and config.do_sample is None:
            config.do_sample = True
        model_inputs = config.update(**kwargs)
        ids = inputs if inputs is not None else model_inputs.get("input_ids")
        processors, v = LogitsProcessorList(logits_processor or []), self.config.vocabulary
        if generation_mode == "text":
            if generator is not None or min_codes is not None or max_codes is not None:
                raise ValueError(
                    "generator, min_codes, max_codes: only for generation_mode='image'"
                )
            visual = [v.begin, v.end, *range(v.first, v.stop)]
            config.suppress_tokens = sorted({*visual, *(config.suppress_tokens or [])})
            if ids is not None:
                new = config.max_new_tokens or 0
                check_context(self.config.text_config, ids.shape[1], new)
            return super().generate(inputs, config, processors, **model_inputs)
        if ids is None:
            raise ValueError("generation_mode='image': expected input_ids")
        least = self.config.min_codes if min_codes is None else min_codes
        most = self.config.max_codes if max_codes is None else max_codes
        if max_codes is None and config.max_new_tokens is not None:
            most = min(most, config.max_new_tokens - 1)
        if not 1 <= least <= most <= self.config.max_codes:
            raise ValueError(
                f"expected 1 <= min_codes <= max_codes <= {self.config.max_codes}, got {least} and "
                f"{most}"
            )
        if (config.num_beams or 1) > 1 or model_inputs.get("assistant_model") is not None:
            raise ValueError(
                "generation_mode='image': expected sampling or greedy decoding, got beam search or "
                "assisted decoding"
            )
        mask = model_inputs.pop("attention_mask", None)
        copies = config.num_return_sequences or 1
        ids, mask = self._image_prompts(ids, mask, copies)
        count, scale = len(ids), config.guidance_scale
        scale = GUIDANCE_SCALE if scale is None else scale
        if scale != 1:
            ids, mask = self._with_unconditional(ids, mask)
            processors.insert(0, GuidanceLogitsProcessor(scale))
        check_context(self.config.text_config, ids.shape[1], most)
        limits = ids.shape[1], least, most
        processors.insert(int(scale != 1), ImageConstraintLogitsProcessor(v, *limits))
        if config.do_sample:
            values = {"temperature": config.temperature, "top_p": config.top_p}
            chosen = {name: value for name, value in values.items() if value is not None}
            top_k = TOP_K if config.top_k is None else config.top_k or None  # 0: all
            generators = sequence_generators(generator, count)
            sampling = Sampling(top_k=top_k, **chosen)
            processors.append(SamplingLogitsProcessor(sampling, generators))
        fixed = {"do_sample": False, "num_return_sequences": 1, "max_new_tokens": most + 1}
        unset = ("temperature", "top_k", "top_p", "guidance_scale", "min_new_tokens", "max_length")
        config.update(**fixed, **dict.fromkeys([*unset, "suppress_tokens"]), eos_token_id=v.end)
        model_inputs.pop("input_ids", None)
        output = super().generate(ids, config, processors, attention_mask=mask, **model_inputs)
        if isinstance(output, Tensor):
            return output[:count]
        output.sequences = output.sequences[:count]
        return output

    def _image_prompts(
        self, ids: Int64[Tensor, "b l"], mask: Tensor | None, copies: int
    ) -> tuple[Int64[Tensor, "n m"], Tensor]:
        """Ids and mask of left-padded prompts that end with the id that begins an image."""
        mask = torch.ones_like(ids) if mask is None else mask
        if not bool(mask[:, -1].all()):
            raise ValueError(
                "expected left-padded prompts, got right-padded ones: the image would follow "
                "padding instead of its prompt"
            )
        begins = ids[:, -1:] == self.config.boi_token_id
        if not bool(begins.all()):
            if bool(begins.any()):
                raise ValueError(
                    "expected that all prompts end with the id that begins an image, or none, got "
                    "some of them"
                )
            ids = torch.cat([ids, torch.full_like(ids[:, :1], self.config.boi_token_id)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)

    def _with_unconditional(
        self, ids: Int64[Tensor, "n m"], mask: Tensor
    ) -> tuple[Int64[Tensor, "r m"], Tensor]:
        """The prompts, then as many empty ones: begin-of-text, if there is one, and <img>."""
        bos = self.generation_config.bos_token_id
        start = [] if bos is None else [bos]
        free = torch.tensor([*start, self.config.boi_token_id], device=ids.device)
        missing = max(0, len(free) - ids.shape[1])
        ids, mask = (torch.nn.functional.pad(x, (missing, 0)) for x in (ids, mask))
        free_ids, free_mask = ids.clone(), torch.zeros_like(mask)
        free_ids[:, -len(free) :], free_mask[:, -len(free) :] = free, 1
        return torch.cat([ids, free_ids]), torch.cat([mask, free_mask])


# The pipeline logs an error for a class that is not in this table of names.
NAMES[LavitConfig.model_type] = LavitForConditionalGeneration.__name__
for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
    auto_class.register(LavitConfig, LavitForConditionalGeneration, exist_ok=True)
