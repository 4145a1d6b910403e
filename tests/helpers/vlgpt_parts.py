"""A tiny Stable Diffusion with an IP-Adapter, as directories, and a tiny stage 1, for the tests of VL-GPT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from helpers.small_diffusion import small_unet, small_vae

WIDTH, SIDE, TEXT = (
    16,
    16,
    12,
)  # of the text encoder, of the image encoder's pictures, tokens of a caption


def tiny_diffusion(folder: Path, grid: bool = True) -> dict[str, Any]:
    """Settings of StableDiffusion for random weights written below `folder`.

    Args:
        grid: an adapter that reads all of the image encoder's tokens ("plus"), else one vector.
    """
    from diffusers import DDIMScheduler
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    ids = {
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
        "pad_token_id": len(words) - 1,
    }
    model, adapter = folder / "diffusion", folder / "adapter"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tokenizer = CLIPTokenizer(
            vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=TEXT
        )
        text = CLIPTextModel(
            CLIPTextConfig(vocab_size=len(words), max_position_embeddings=TEXT, **shape, **ids)
        )
        seeing = CLIPVisionModelWithProjection(
            CLIPVisionConfig(image_size=SIDE, patch_size=8, **shape)
        )
        unet, vae = small_unet(WIDTH), small_vae()
        tensors = _adapter(unet, grid)
    tokenizer.save_pretrained(model / "tokenizer")
    text.save_pretrained(model / "text_encoder")
    unet.save_pretrained(model / "unet")
    vae.save_pretrained(model / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(model / "scheduler")
    seeing.save_pretrained(adapter / "models" / "image_encoder")
    save_file(tensors, adapter / "models" / "ip.safetensors")
    names = {
        "model": str(model),
        "adapter": str(adapter),
        "folder": "models",
        "weights": "ip.safetensors",
    }
    return {"kind": "stable_diffusion", **names}


def _adapter(unet: Any, grid: bool) -> dict[str, torch.Tensor]:
    """An IP-Adapter's file: what reads the picture, and keys and values for each cross-attention of the U-Net."""
    found: dict[str, torch.Tensor] = {}
    if grid:  # the resampler of "plus": two queries, four blocks of one head
        found["image_proj.latents"] = torch.randn(1, 2, 64)
        found |= _named("image_proj.proj_in", nn.Linear(WIDTH, 64))
        found |= _named("image_proj.proj_out", nn.Linear(64, WIDTH))
        found |= _named("image_proj.norm_out", nn.LayerNorm(WIDTH))
        for block in range(4):  # as many as diffusers expects
            at = f"image_proj.layers.{block}"
            for name in ("0.norm1", "0.norm2", "1.0"):
                found |= _named(f"{at}.{name}", nn.LayerNorm(64))
            sizes = {
                "0.to_q": (64, 64),
                "0.to_kv": (128, 64),
                "0.to_out": (64, 64),
                "1.1": (256, 64),
                "1.3": (64, 256),
            }
            found |= {
                f"{at}.{name}.weight": torch.randn(size) * 0.1 for name, size in sizes.items()
            }
    else:
        found |= _named("image_proj.proj", nn.Linear(8, 4 * WIDTH))
        found |= _named("image_proj.norm", nn.LayerNorm(WIDTH))
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(crossing):
        wide = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            found[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(wide, WIDTH)
    return found


def _named(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor.detach().clone() for key, tensor in module.state_dict().items()}


def stage_one(
    folder: Path, width: int, conditions: dict[str, Any] | None = None, **more: Any
) -> Any:
    """A VLGPTTokenizerTraining on the visual tokenizer in folder/visual, by default for the pixel decoder in folder/decoder."""
    from lavit_lm.training.vlgpt_tokenizer import VLGPTTokenizerTraining

    conditions = conditions or {"kind": "pixel_decoder", "decoder": str(folder / "decoder")}
    sizes = {"queries": 4, "depth": 2, "heads": 2}
    return VLGPTTokenizerTraining(width, str(folder / "visual"), conditions, **{**sizes, **more})


def stage_one_directory(
    folder: Path, width: int, conditions: dict[str, Any] | None = None, **more: Any
) -> str:
    """What stage 1 writes, from random weights."""
    from lavit_lm.objectives.vlgpt.tokenizer_files import save_tokenizer

    stage = stage_one(folder, width, conditions, **more)
    save_tokenizer(folder / "stage", stage.model, str(folder / "visual"), stage.conditions.config)
    assert json.loads((folder / "stage" / "config.json").read_text())["sizes"]["width"] == width
    return str(folder / "stage")
