"""The forward pass of generation on a CPU, for a few positions at a time.

    x [t d] -> norm -> q, k, v -> rotation -> keys and values stored -> attention -> + x
            -> norm -> gate, up -> down -> + x             and so for every block

`transformers` computes the same by several times as many operations, of which each costs more than
its arithmetic when a step has one position. Here:

- q, k and v are one product, as are gate and up, with the weight of the norm before them in it;
- dimensions i and i + d/2 of queries and keys are next to each other, so that a rotation is one
  complex product;
- weights are transposed for one or two positions, and in the layout of oneDNN for more;
- keys and values are written into memory that is allocated once;
- of prompts of unequal lengths only the attention is padded;
- only the logits of ids that may follow are computed.

The copies of the weights are kept until a weight changes in a way that torch counts
(`Tensor._version`); a write through `.data` is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Complex64, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_lm.models.kv_state import DecodingState
from lavit_lm.sequences.masks import attention_mask
from lavit_lm.sequences.packing import PADDING
from lavit_lm.sequences.token_sequence import TokenSequence

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROTATIONS = ("default", "linear", "llama3")
"""Kinds of rotary embeddings that do not depend on the length of a sequence."""
MAX_WEIGHTS = 1 << 30  # their copies double the memory
FEW = 2  # positions for which plain products with transposed weights are the fastest
BATCH = 8  # positions that the layout of oneDNN is chosen for; it is no worse for others
ROWS = 16  # logits are computed for a multiple of this

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(block, q, k, v [t h d]) -> what the attention reads, [t h d]."""


class PackedLinear:
    """x -> x W^T + bias, with W in the layout that is fastest for the number of positions."""

    def __init__(self, weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> None:
        self.columns, self.bias = weight.t().contiguous(), bias
        self.packed: Tensor | None = None

    def __call__(
        self, x: Float[Tensor, "t i"], added: Float[Tensor, "t o"] | None = None
    ) -> Float[Tensor, "t o"]:
        """The product, and `added`, if it is given."""
        if len(x) <= FEW or not torch.backends.mkldnn.is_available():
            if added is None:
                product = torch.mm(x, self.columns)
            else:
                product = torch.addmm(added, x, self.columns)
            return product if self.bias is None else product + self.bias
        # torch.compile uses these functions; they have no public names.
        if self.packed is None:
            weight = self.columns.t().contiguous()
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH)
        linear: Any = torch.ops.mkldnn._linear_pointwise
        if added is None:
            return linear(x, self.packed, self.bias, "none", [], "")
        return linear.binary(x, added, self.packed, self.bias, "add")


@dataclass(frozen=True)
class _Block:
    qkv: PackedLinear
    qk_norm: Tensor | None  # [heads d], of queries and keys
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


class FusedDecoder:
    """The blocks and the output layer of a causal LM; see the top of this file.

    Args:
        causal: a causal LM for which `fits` is true.
    """

    @torch.no_grad()
    def __init__(self, causal: Any) -> None:
        config = causal.config
        self.key = weights_key(causal)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        attention = causal.base_model.layers[0].self_attn
        self.head_size: int = attention.head_dim
        # x / sqrt(mean(x^2) + eps) = sqrt(n) x / sqrt(|x|^2 + n eps), in three operations; sqrt(n)
        # is in the weights.
        widths = config.hidden_size, self.head_size
        self.least, self.head_least = (torch.tensor(n * config.rms_norm_eps).sqrt() for n in widths)
        self.size = (len(causal.base_model.layers), 2, self.kv_heads, self.head_size)
        self.blocks = [self._block(layer) for layer in causal.base_model.layers]
        self.norm = causal.base_model.norm.weight * config.hidden_size**0.5
        self.output: Any = causal.get_output_embeddings()
        self.rotary: Any = causal.base_model.rotary_emb
        self.parts: dict[bytes, tuple[PackedLinear, int]] = {}

    def rotation(self, length: int) -> Complex64[Tensor, "length 1 pairs"]:
        """What queries and keys at each position are multiplied by."""
        positions = torch.arange(length)[None]
        cos, sin = self.rotary(self.norm, positions)
        half = self.head_size // 2
        return torch.complex(cos[0, :, :half], sin[0, :, :half])[:, None]

    def __call__(
        self, x: Float[Tensor, "t d"], rotation: Complex64[Tensor, "t 1 pairs"], attend: Attend
    ) -> Float[Tensor, "t d"]:
        """Hidden states after the last norm.

        Args:
            x: input embeddings.
            rotation: of their positions.
            attend: stores keys and values of a block and computes its attention.
        """
        shape, queries = (-1, self.head_size), self.heads
        rotated = self.heads + self.kv_heads
        for number, block in enumerate(self.blocks):
            qkv = block.qkv(_unit(x, self.least)).unflatten(1, shape)
            qk, v = qkv[:, :rotated], qkv[:, rotated:]
            if block.qk_norm is not None:
                qk = _unit(qk, self.head_least) * block.qk_norm
            pairs = torch.view_as_complex(qk.unflatten(2, (-1, 2)))
            qk = torch.view_as_real(pairs * rotation).flatten(2)
            read = attend(number, qk[:, :queries], qk[:, queries:], v)
            x = block.out(read.reshape(len(x), -1), x)
            gate, up = block.gate_up(_unit(x, self.least)).chunk(2, 1)
            x = block.down(F.silu(gate) * up, x)
        return _unit(x, self.least) * self.norm

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "t d"], ids: Int64[Tensor, " n"]) -> Tensor:
        """The output layer of these ids, float [t n]."""
        key = ids.numpy().tobytes()
        if key not in self.parts:
            padded = F.pad(ids, (0, -len(ids) % ROWS))  # further columns are not used
            bias = None if self.output.bias is None else self.output.bias[padded]
            self.parts[key] = PackedLinear(self.output.weight[padded], bias), len(ids)
        layer, count = self.parts[key]
        return layer(hidden)[:, :count]

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        pairs = self._paired(self.heads), self._paired(self.kv_heads)
        order = *pairs, torch.arange(self.kv_heads * self.head_size)
        before, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        norms: Any = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        qk_norm = None
        if norms[0] is not None:
            counts, inside = (self.heads, self.kv_heads), self._paired(1)
            weights = [n.weight[inside].expand(c, -1) for n, c in zip(norms, counts, strict=True)]
            qk_norm = torch.cat(weights) * self.head_size**0.5
        return _Block(
            _joined([(one, rows) for one, rows in zip(qkv, order, strict=True)], before),
            qk_norm,
            _joined([(attention.o_proj, None)]),
            _joined([(mlp.gate_proj, None), (mlp.up_proj, None)], after),
            _joined([(mlp.down_proj, None)]),
        )

    def _paired(self, heads: int) -> Int64[Tensor, " rows"]:
        """0, d/2, 1, d/2 + 1, ... of every head."""
        rows = torch.arange(heads * self.head_size).reshape(heads, 2, -1)
        return rows.transpose(1, 2).flatten()


def _joined(
    layers: Sequence[tuple[nn.Linear, Tensor | None]], norm: Tensor | None = None
) -> PackedLinear:
    """Layers of one input as one, each with its outputs in an order; `norm` scales the input."""
    weights, biases = [], []
    for layer, order in layers:
        rows = torch.arange(len(layer.weight)) if order is None else order
        weights.append(layer.weight[rows])
        if layer.bias is not None:
            biases.append(layer.bias[rows])
    weight = torch.cat(weights)
    if norm is not None:
        weight = weight * (norm * len(norm) ** 0.5)
    return PackedLinear(weight, torch.cat(biases) if biases else None)


def _unit(x: Float[Tensor, "... n"], least: Float[Tensor, ""]) -> Float[Tensor, "... n"]:
    """Scale x by 1 / sqrt(|x|^2 + least^2)."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least)


def weights_key(causal: Any) -> tuple[Any, ...]:
    """Changes whenever a weight does, except through `.data`."""
    return tuple((p.data_ptr(), p._version) for p in causal.parameters())


def fits(causal: Any, length: int) -> bool:
    """Whether FusedDecoder computes what this LM does, for sequences up to a length."""
    config = causal.config
    if config.model_type not in FAMILIES or config.hidden_act != "silu":
        return False
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", 1) != 1
    if rope.get("rope_type", "default") not in FIXED_ROTATIONS or partial:
        return False
    weights = 0
    for p in causal.parameters():
        if p.dtype != torch.float32 or p.device.type != "cpu":
            return False
        weights += p.numel()
    # An adapter is a layer of another class; a hook may change what a layer computes.
    plain = type(causal.get_output_embeddings()) is nn.Linear and all(
        not (m._forward_hooks or m._forward_pre_hooks)
        and (type(m) is nn.Linear or not hasattr(m, "in_features"))
        for m in causal.modules()
    )
    return plain and weights <= MAX_WEIGHTS and not causal.training


_DECODERS: WeakKeyDictionary[nn.Module, FusedDecoder] = WeakKeyDictionary()


def fused_decoder(causal: Any, length: int) -> FusedDecoder | None:
    """The decoder of an LM, made anew after its weights have changed; None if it does not fit."""
    if not fits(causal, length):
        return None
    decoder = _DECODERS.get(causal)
    if decoder is None or decoder.key != weights_key(causal):
        decoder = _DECODERS[causal] = FusedDecoder(causal)
    return decoder


class FusedDecodingState(DecodingState):
    """DecodingState by a FusedDecoder.

    Args:
        decoder: of the model's LM.
        model, sequences, pad_id, max_new_tokens: see DecodingState.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        model: Any,
        sequences: Sequence[TokenSequence],
        pad_id: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(model, sequences, pad_id, max_new_tokens, use_cache=False)
        self.decoder = decoder
        batch, self.length = self.documents.shape
        layers, two, heads, size = decoder.size
        space = self.length + max_new_tokens
        self.stored = torch.zeros(layers, two, batch, heads, space, size)
        self.rotation = decoder.rotation(space)
        self.positions = (self.documents != PADDING).sum(1)
        """Of the next token of each sequence."""
        self.bias: Tensor | None = None
        if bool((self.documents == PADDING).any()):
            padding = F.pad(self.documents == PADDING, (0, max_new_tokens))
            self.bias = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None]

    def prefill(self) -> Float[Tensor, "b d"]:
        """Compute the prompts; the hidden state at each one's last position."""
        is_token = self.documents != PADDING
        rows, columns = is_token.nonzero(as_tuple=True)
        positions = (is_token.cumsum(1) - 1)[is_token]
        causal = self.bias is None and not bool(self.prefix.any())
        mask: Tensor | None = None
        if not causal:
            allowed = attention_mask(self.documents, self.prefix)[:, None]
            mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.stored[number]
            keys[rows, :, columns], values[rows, :, columns] = k, v
            queries = q.new_zeros(*is_token.shape, *q.shape[1:])
            queries[rows, columns] = q
            read = self._attention(queries.transpose(1, 2), number, mask, causal)
            return read.transpose(1, 2)[rows, columns]

        x = self.inputs_embeds[is_token]
        hidden = self.decoder(x, self.rotation[positions], attend)
        return hidden[is_token.sum(1).cumsum(0) - 1]

    def append_embeddings(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Append a vector to each sequence; the hidden state there."""
        column = self.length
        self.length += 1
        bias = None if self.bias is None else self.bias[..., : self.length]

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.stored[number, 0, :, :, column], self.stored[number, 1, :, :, column] = k, v
            return self._attention(q[:, :, None], number, bias, False)

        hidden = self.decoder(vectors, self.rotation[self.positions], attend)
        self.positions = self.positions + 1
        return hidden

    def logits(
        self, hidden: Float[Tensor, "b d"], ids: Int64[Tensor, " n"]
    ) -> Float[Tensor, "b n"]:
        """Logits of some ids only."""
        return self.model.capped(self.decoder.logits(hidden, ids))

    def reorder(self, index: Int64[Tensor, " b"]) -> None:
        """Continue with these of the sequences, some more than once, as beam search does."""
        self.stored, self.positions = self.stored[:, :, index], self.positions[index]
        self.bias = None if self.bias is None else self.bias[index]

    def _attention(
        self, queries: Float[Tensor, "b h q d"], number: int, mask: Tensor | None, causal: bool
    ) -> Float[Tensor, "b h q d"]:
        keys, values = self.stored[number, :, :, :, : self.length]
        grouped = self.decoder.heads != self.decoder.kv_heads
        return F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=causal, enable_gqa=grouped
        )
