"""SequenceModel: any causal LM of `transformers` over packed rows, with vectors in the places of some ids.

    ids -> embeddings, fed places overwritten -> the LM's blocks under masks.py's mask -> states -> objective's losses
                                                                                          '-> head: logits over ids
                                                                                          '-> regressor: vectors

Its forward ends at the losses, so that logits exist at predicted places only, and so that DDP and FSDP2 see one module
whose parameters, head and tied embedding included, are used in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from lavit_lm.models.kv_state import Decoding
from lavit_lm.models.losses import ModelOutput, Sum
from lavit_lm.sequences.masks import model_mask
from lavit_lm.sequences.packing import Packed
from lavit_lm.sequences.segments import TokenSequence


class SequenceModel(nn.Module):
    """A causal LM, the bridge that feeds it and the head that says vectors, if any.

    Args:
        lm: AutoModelForCausalLM of any family, or a peft model around one.
        bridge: pictures and keep masks -> vectors of the LM's width; None where nothing is fed but ids. Its parameters
            are trained at a rate of their own, those of its submodule "encoder", if it has one, at a third.
        regressor: states -> vectors of the LM's width; None where nothing is said but ids.
    """

    def __init__(
        self, lm: Any, bridge: nn.Module | None = None, regressor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.lm = lm
        self.bridge = bridge
        self.regressor = regressor

    @property
    def causal(self) -> Any:
        """The causal LM itself, inside of peft's wrapper where there is one."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def forward(self, batch: Packed, objective: Any) -> dict[str, Sum]:
        """Named losses of a batch."""
        return objective.losses(self.see(batch), batch)

    def see(self, batch: Packed) -> ModelOutput:
        """What the objectives' losses read."""
        inputs = self.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
        return ModelOutput(self.read(inputs, batch), inputs, self.head, self.regressor)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with a gradient, by the rate they are trained at: "lm", "visual" (the bridge), "encoder"."""
        bridge = [] if self.bridge is None else list(self.bridge.parameters())
        of_its_own: Any = getattr(self.bridge, "encoder", None)
        encoder = set() if of_its_own is None else {id(p) for p in of_its_own.parameters()}
        known = {id(p) for p in bridge}
        found = {
            "lm": [p for p in self.parameters() if id(p) not in known],
            "visual": [p for p in bridge if id(p) not in encoder],
            "encoder": [p for p in bridge if id(p) in encoder],
        }
        return {
            name: [p for p in parameters if p.requires_grad] for name, parameters in found.items()
        }

    def embed(
        self,
        ids: Int64[Tensor, "b l"],
        is_embedding: Bool[Tensor, "b l"],
        images: UInt8[Tensor, "k 3 h w"],
        keep: Bool[Tensor, "j patches"],
    ) -> Float[Tensor, "b l d"]:
        """What the LM reads: rows of its embedding, and the bridge's vectors at fed places."""
        embedded = self.causal.get_input_embeddings()(ids)
        if not bool(is_embedding.any()):
            if self.bridge is not None and torch.is_grad_enabled():
                # Processes that share gradients wait for each other's: the bridge has one, of 0, also without pictures.
                sums = [p.sum() for p in self.bridge.parameters() if p.requires_grad]
                embedded = (
                    embedded + 0 * torch.stack(sums).sum().to(embedded.dtype) if sums else embedded
                )
            return embedded
        if self.bridge is None:
            raise ValueError(
                "the batch has pictures to feed as vectors, but the model has no bridge for them"
            )
        return embedded.masked_scatter(
            is_embedding[..., None], self.bridge(images, keep).to(embedded.dtype)
        )

    def read(self, inputs: Float[Tensor, "b l d"], batch: Packed) -> Float[Tensor, "b l d"]:
        """Hidden states after the LM's last norm."""
        return self.causal.base_model(
            inputs_embeds=inputs,
            attention_mask=model_mask(self.causal, batch.documents, batch.prefix, inputs.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state

    def decoding(
        self, rows: Sequence[TokenSequence], pad: int, most: int, cached: bool = True
    ) -> Decoding:
        """Rows to go on with; see Decoding."""
        return Decoding(self, rows, pad, most, cached)

    def head(self, states: Float[Tensor, "t d"]) -> Float[Tensor, "t vocabulary"]:
        """Logits as the LM's own forward makes them.

        Raises:
            ValueError: a family that scales its logits in a way that is not known here.
        """
        config = self.causal.config.get_text_config()
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{config.model_type}: {name}={getattr(config, name)} would be left out of the loss"
                )
        logits = self.causal.get_output_embeddings()(states)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
