"""SequenceModel: any causal LM of `transformers` over packed sequences of ids and vectors.

ids, images -> input embeddings -> the LM's blocks under the mask of masks.py -> hidden states
                                                                                 |-> head
                                                                                 '-> regressor
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from lavit_lm.models.fused_decoder import FusedDecodingState, fused_decoder
from lavit_lm.models.kv_state import DecodingState
from lavit_lm.models.losses import Head, ModelOutput
from lavit_lm.sequences.masks import model_mask
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.vocabulary.embeddings import CodeMap
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary

FULL_SOFTMAX_EVERY = 16
"""Of the restricted softmax in training, one target in so many is predicted among all ids."""


class SequenceModel(nn.Module):
    """A causal LM, the bridge that computes its input vectors, and the head that predicts vectors.

    Args:
        lm: AutoModelForCausalLM of any family, or a peft model around one.
        bridge: images and keep masks -> vectors of the LM's hidden size; None if all inputs are
            ids. Its parameters are trained with a learning rate of their own, those of its
            submodule "encoder", if any, with a third.
        regressor: hidden states -> vectors of the LM's hidden size; None if only ids are predicted.
        restricted: the vocabulary, if losses compare every id with those only that can be at its
            position; see LaVIT.
        code_map: computes the embeddings of codes while the model is trained; see CodeMap.
        vector_noise: of the input vectors that are predicted from text, in training; see
            noisy_vectors.

    Raises:
        ValueError: `restricted` with ids in another order than VisualVocabulary.extend gives; a
            `code_map` with input embeddings and output layer that are not tied.
    """

    def __init__(
        self,
        lm: Any,
        bridge: nn.Module | None = None,
        regressor: nn.Module | None = None,
        restricted: VisualVocabulary | None = None,
        code_map: CodeMap | None = None,
        vector_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.bridge = bridge
        self.regressor = regressor
        self.code_map = code_map
        self.vector_noise = vector_noise
        self.restricted = v = restricted
        if code_map is not None:
            tables = [lm.get_input_embeddings(), lm.get_output_embeddings()]
            if tables[0].weight is not tables[1].weight:
                raise ValueError("mapped embeddings of codes: expected an LM with tied embeddings")
        if v is not None and (v.end, v.first) != (v.begin + 1, v.begin + 2):
            raise ValueError(f"restricted softmax: expected text, begin, end, codes, got {v}")

    @property
    def causal(self) -> Any:
        """The LM itself, without peft's wrapper."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """Hidden states of a batch, from which an objective computes its losses."""
        table = None
        if self.code_map is not None and self.training:
            table = self.code_map(self.causal.get_input_embeddings().weight)
        images = batch.is_embedding, batch.images, batch.keep
        inputs_embeds = self.embed(batch.ids, *images, table)
        noisy = inputs_embeds
        if self.training and self.vector_noise:
            noisy = noisy_vectors(inputs_embeds, batch, self.vector_noise)
        return self.output(self.hidden_states(noisy, batch), inputs_embeds, table)

    def output(
        self,
        hidden_states: Float[Tensor, "b l d"],
        inputs_embeds: Float[Tensor, "b l d"],
        table: Float[Tensor, "vocabulary d"] | None = None,
    ) -> ModelOutput:
        """Hidden states with the heads of this model.

        Args:
            hidden_states: after the LM's last norm.
            inputs_embeds: the LM's inputs.
            table: see embed.
        """
        return ModelOutput(
            hidden_states,
            inputs_embeds,
            self.head if table is None else partial(self._mapped_head, table=table),
            self.regressor,
            self.restricted,
            partial(self.split_head, weight=table),
            FULL_SOFTMAX_EVERY if self.training else 0,
        )

    def train(self, mode: bool = True) -> SequenceModel:
        """Before evaluation, embeddings that the code map computes are written into the LM."""
        if not mode:
            self.write_code_embeddings()
        return super().train(mode)

    @torch.no_grad()
    def write_code_embeddings(self) -> None:
        """Write the embeddings that the code map computes, if there is one, into the LM."""
        if self.code_map is not None:
            weight = self.causal.get_input_embeddings().weight
            weight.copy_(self.code_map(weight))

    def trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters with a gradient by learning rate: "lm", "visual" (the bridge), "encoder"."""
        bridge = [] if self.bridge is None else list(self.bridge.parameters())
        encoder_module: Any = getattr(self.bridge, "encoder", None)
        encoder = set() if encoder_module is None else {id(p) for p in encoder_module.parameters()}
        in_bridge = {id(p) for p in bridge}
        groups = {
            "lm": [p for p in self.parameters() if id(p) not in in_bridge],
            "visual": [p for p in bridge if id(p) not in encoder],
            "encoder": [p for p in bridge if id(p) in encoder],
        }
        return {name: [p for p in group if p.requires_grad] for name, group in groups.items()}

    def embed(
        self,
        ids: Int64[Tensor, "b l"],
        is_embedding: Bool[Tensor, "b l"],
        images: UInt8[Tensor, "k 3 h w"] | Float[Tensor, "k n d"],
        keep: Bool[Tensor, "j patches"],
        table: Float[Tensor, "vocabulary d"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        """The LM's inputs: embeddings of ids, and the bridge's vectors where `is_embedding`.

        Args:
            ids: of all positions.
            is_embedding: positions of image vectors.
            images: the images of these vectors; or vectors that another model generated.
            keep: True at patches that the bridge uses.
            table: embeddings of all ids, in place of the LM's own.
        """
        layer = self.causal.get_input_embeddings()
        # Not F.embedding: some families scale embeddings in their layer
        embedded = layer(ids) if table is None else functional_call(layer, {"weight": table}, ids)
        if not bool(is_embedding.any()):
            if self.bridge is not None and torch.is_grad_enabled():
                # DDP and FSDP wait for a gradient of every parameter in every process: without
                # images the bridge's is 0.
                sums = [p.sum() for p in self.bridge.parameters() if p.requires_grad]
                if sums:
                    embedded = embedded + 0 * torch.stack(sums).sum().to(embedded.dtype)
            return embedded
        if self.bridge is None:
            raise ValueError(
                "the batch has images to embed as vectors, but the model has no bridge"
            )
        vectors = self.bridge(images, keep).to(embedded.dtype)
        return embedded.masked_scatter(is_embedding[..., None], vectors)

    def hidden_states(
        self, inputs_embeds: Float[Tensor, "b l d"], batch: PackedBatch
    ) -> Float[Tensor, "b l d"]:
        """Hidden states after the LM's last norm."""
        mask = model_mask(self.causal, batch.documents, batch.prefix, inputs_embeds.dtype)
        # Flash kernels find documents by positions that restart, which `transformers` ignores with
        # a cache or 2-D mask.
        return self.causal.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state

    def start_decoding(
        self,
        sequences: Sequence[TokenSequence],
        pad_id: int,
        max_new_tokens: int,
        use_cache: bool = True,
    ) -> DecodingState:
        """The state from which sequences are continued; see DecodingState."""
        if use_cache:
            longest = max(map(len, sequences), default=0) + max_new_tokens
            if decoder := fused_decoder(self.causal, longest):
                return FusedDecodingState(decoder, self, sequences, pad_id, max_new_tokens)
        return DecodingState(self, sequences, pad_id, max_new_tokens, use_cache)

    def head(self, hidden_states: Float[Tensor, "t d"]) -> Float[Tensor, "t vocabulary"]:
        """Logits as the LM's own forward computes them.

        Raises:
            ValueError: a family that scales its logits in a way that is not implemented here.
        """
        return self.capped(self.causal.get_output_embeddings()(hidden_states))

    def _mapped_head(
        self, hidden_states: Float[Tensor, "t d"], table: Float[Tensor, "vocabulary d"]
    ) -> Float[Tensor, "t vocabulary"]:
        """`head` with embeddings of all ids in place of the LM's own."""
        layer = self.causal.get_output_embeddings()
        return self.capped(functional_call(layer, {"weight": table}, hidden_states))

    def split_head(
        self, groups: Sequence[Sequence[range]], weight: Tensor | None = None
    ) -> list[Head]:
        """For each group of ids a head that computes their logits only, in the group's order.

        Args:
            groups: ranges of ids.
            weight: of the output layer, in place of its own.

        The gradients of all parts of the output layer become one: a slice of the weight for each
        part would have a gradient of the whole weight's size.
        """
        layer: Any = self.causal.get_output_embeddings()
        if type(layer) is not nn.Linear:  # of peft: its weight is not all that it computes

            def chosen(group: Sequence[range]) -> Head:
                ids = torch.cat([torch.arange(r.start, r.stop) for r in group])
                return lambda x: self.head(x)[:, ids.to(x.device)]

            return [chosen(group) for group in groups]
        starts = {edge for group in groups for r in group for edge in (r.start, r.stop)}
        weight = layer.weight if weight is None else weight
        edges = sorted(starts | {0, len(weight)})
        sizes = [stop - start for start, stop in pairwise(edges)]
        weights = weight.split(sizes)
        biases = None if layer.bias is None else layer.bias.split(sizes)

        def part(group: Sequence[range]) -> Head:
            numbers = [i for r in group for i, edge in enumerate(edges[:-1]) if edge in r]
            joined = torch.cat([weights[i] for i in numbers])
            bias = None if biases is None else torch.cat([biases[i] for i in numbers])
            return lambda x: self.capped(nn.functional.linear(x, joined, bias))

        return [part(group) for group in groups]

    def capped(self, logits: Float[Tensor, "t n"]) -> Float[Tensor, "t n"]:
        """Logits of the output layer -> those of the LM. Raises ValueError, see head."""
        config = self.causal.config.get_text_config()
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{config.model_type}: {name}={getattr(config, name)} would be left out of "
                    "the loss"
                )
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def noisy_vectors(
    inputs_embeds: Float[Tensor, "b l d"], batch: PackedBatch, largest: float
) -> Float[Tensor, "b l d"]:
    """The inputs of a training step, with Gaussian noise on vectors that are predicted from text.

        sequence    <s> a cat <img> v1 v2 </img> </s>      <s> <img> v1 v2 </img> a cat </s>
        noise        .  .  .   .    x  x   .      .         .   .    .  .   .     .  .   .

    In generation a vector follows vectors that the model predicted, with errors. Without noise it
    learns to continue true ones, from which the next is nearly known, and hardly reads the text.
    Noise of an image has a standard deviation of its own, uniform in 0..largest of that of its
    vectors' elements, so that the model learns to rely on vectors as far as they can be relied on.
    Images before all text, which are to be described, stay as they are.

    The noise depends on the batch's ids alone: a resumed training adds the same.

    Args:
        inputs_embeds: embeddings of ids, and vectors of images.
        batch: where they are.
        largest: the largest standard deviation, in standard deviations of the vectors.
    """
    at = batch.is_embedding & batch.regress & _after_text(batch)
    if not bool(at.any()):
        return inputs_embeds
    vectors = inputs_embeds[at].detach()
    spread = vectors.float().std(0) if len(vectors) > 1 else vectors.float()[0] * 0
    seed = torch.Generator().manual_seed(int(batch.ids.sum()))
    number = (batch.roles == Role.BEGIN).flatten().cumsum(0)[at.flatten()]
    images, image = torch.unique_consecutive(number, return_inverse=True)
    level = torch.rand(len(images), generator=seed).to(vectors.device)[image]
    noise = torch.randn(vectors.shape, generator=seed).to(vectors.device)
    added = (largest * level[:, None] * spread * noise).to(inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(at[..., None], inputs_embeds[at] + added)


def _after_text(batch: PackedBatch) -> Bool[Tensor, "b l"]:
    """True at positions that text of the same document precedes, <s> apart."""
    text = (batch.roles == Role.TEXT) & (batch.positions > 0)
    before = text.cumsum(1) - text.long()
    first = torch.arange(text.shape[1], device=text.device) - batch.positions
    return before > before.gather(1, first)
