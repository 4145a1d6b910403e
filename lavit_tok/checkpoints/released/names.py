"""Names of LaVIT's released files and tensors, and ours for them. The only file that knows theirs.

    visual_tokenizer/eva_vitg_psz14.bin             encoder
                     tokenizer_encoder.bin          selector, merger, projection, codebook
                     tokenizer_decoder.bin          reconstructor, low-res condition
                     highres_tokenizer_decoder.bin  reconstructor, high-res condition
    language_model/visual_weight.bin                continuous path (second merger and projection)
    pixel_decoding/{unet,vae,scheduler}, uncond_embeddings.bin
    highres_pixel_decoding/{unet,vae,scheduler}

Every tensor of a file is used by one of these tables or dropped by DROPPED; others are errors.
An entry is `ours: theirs`; "#" is the number of a block, ".*" weight and bias; the notation of the
right side is that of pickled.TensorRecipe.
"""

from __future__ import annotations

from typing import Literal

DecoderKind = Literal["highres", "lowres"]

ENCODER = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.*": "patch_embed.proj.*",
    "encoder.layers.#.layer_norm1.*": "blocks.#.norm1.*",
    "encoder.layers.#.self_attn.qkv.weight": "blocks.#.attn.qkv.weight",
    # The bias of the keys is zero by design, but transformers' class has it.
    "encoder.layers.#.self_attn.qkv.bias": "blocks.#.attn.q_bias 0 blocks.#.attn.v_bias",
    "encoder.layers.#.self_attn.projection.*": "blocks.#.attn.proj.*",
    "encoder.layers.#.layer_norm2.*": "blocks.#.norm2.*",
    "encoder.layers.#.mlp.fc1.*": "blocks.#.mlp.fc1.*",
    "encoder.layers.#.mlp.fc2.*": "blocks.#.mlp.fc2.*",
}
SELECTOR = {
    "local.0.*": "in_conv.0.*",
    "local.1.*": "in_conv.1.*",
    "judge.0.*": "out_conv.0.*",
    "judge.2.*": "out_conv.2.*",
    "judge.4.*": "out_conv.4.*",
}
QUANTIZER = {
    "projection.0.*": "encode_task_layer.0.*",
    "projection.2.*": "encode_task_layer.2.*",
    "codebook.embeddings": "quantize.embedding.weight",
}


def _blocks(own: str, cross: str) -> dict[str, str]:
    """The block of merger and reconstructor; `own` and `cross` are the names of its attentions."""
    return {
        "blocks.#.norm_self.*": "blocks.#.norm0.*",
        "blocks.#.self_attention.query.*": f"blocks.#.{own}.qkv.*[0]",
        "blocks.#.self_attention.key.*": f"blocks.#.{own}.qkv.*[1]",
        "blocks.#.self_attention.value.*": f"blocks.#.{own}.qkv.*[2]",
        "blocks.#.self_attention.out.*": f"blocks.#.{own}.proj.*",
        "blocks.#.norm_cross.*": "blocks.#.norm1.*",
        "blocks.#.cross_attention.query.*": f"blocks.#.{cross}.query.*",
        "blocks.#.cross_attention.key.*": f"blocks.#.{cross}.key.*",
        "blocks.#.cross_attention.value.*": f"blocks.#.{cross}.value.*",
        "blocks.#.cross_attention.out.*": f"blocks.#.{cross}.proj.*",
        "blocks.#.norm_mlp.*": "blocks.#.norm2.*",
        "blocks.#.mlp.0.*": "blocks.#.mlp.fc1.*",
        "blocks.#.mlp.2.*": "blocks.#.mlp.fc2.*",
    }


MERGER = {
    "norm_in.*": "ln_vision.*",
    **_blocks("token_causal_attn", "token_cross_attn"),
    "norm_out.*": "norm.*",
}
CONTINUOUS = {"projection.*": "vit_proj.*"}
RECONSTRUCTOR = {
    "project_in.*": "in_proj.*",
    "position": "pos_embed[None]",
    "queries": "query_embed[None]",
    **_blocks("self_attn", "cross_attn"),
    "norm_out.*": "norm.*",
    "project_out.0.*": "decode_task_layer.0.*",
    "project_out.2.*": "decode_task_layer.2.*",
}
CONDITION = {
    "lowres": {"projection.tokens.0.*": "unet_proj.*"},
    "highres": {
        "projection.tokens.0.*": "unet_proj_1.*",
        "projection.tokens.1.*": "unet_proj_2.*",
        "projection.pool.position": "unet_attnpool.positional_embedding",
        "projection.pool.query.*": "unet_attnpool.q_proj.*",
        "projection.pool.key.*": "unet_attnpool.k_proj.*",
        "projection.pool.value.*": "unet_attnpool.v_proj.*",
        "projection.pool.out.*": "unet_attnpool.c_proj.*",
    },
}
DROPPED = {
    # The classification head, after the last block.
    "encoder": ("norm.weight", "norm.bias", "head.weight", "head.bias"),
    # Statistics of the EMA training of the codebook.
    "tokenizer": (
        "quantize.*one_hot*",
        "quantize.cluster_size",
        "quantize.initted",
        "quantize.embedding.cluster_size",
        "quantize.embedding.embed_avg",
        "quantize.embedding.initted",
    ),
    # If only the reconstructor is loaded.
    "lowres": ("unet_proj.*",),
    "highres": ("unet_proj_1.*", "unet_proj_2.*", "unet_attnpool.*"),
}
"""Patterns of tensors that may be in a file and are not used, by the file's key in FILES."""

OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention of VAEs in diffusers before 0.18, as in Stable Diffusion 1.5's files."""

FILES = {
    "encoder": "visual_tokenizer/eva_vitg_psz14.bin",
    "tokenizer": "visual_tokenizer/tokenizer_encoder.bin",
    "lowres": "visual_tokenizer/tokenizer_decoder.bin",
    "highres": "visual_tokenizer/highres_tokenizer_decoder.bin",
    "continuous": "language_model/visual_weight.bin",
    "null": "pixel_decoding/uncond_embeddings.bin",
}
FOLDERS = {"lowres": "pixel_decoding", "highres": "highres_pixel_decoding"}
DIFFUSERS_FILE = "diffusion_pytorch_model.bin"
