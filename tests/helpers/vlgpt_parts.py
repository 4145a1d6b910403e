"""A small Stable Diffusion with an IP-Adapter, as directories, and a small VL-GPT tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from helpers.small_diffusion import small_unet, small_vae

# Width of the text encoder, pixels of the image encoder, tokens of a caption.
WIDTH, SIDE, TEXT = 16, 16, 12


def tiny_diffusion(folder: Path, grid: bool = True) -> dict[str, Any]:
    """The config of StableDiffusion for random weights, written below `folder`.

    Args:
        grid: the adapter attends to all tokens of the image encoder ("plus"), else to one vector.
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
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    last = len(vocabulary) - 1
    ids = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    model, adapter = folder / "diffusion", folder / "adapter"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tokenizer = CLIPTokenizer(
            vocab={text: i for i, text in enumerate(vocabulary)}, merges=[], model_max_length=TEXT
        )
        text = CLIPTextModel(
            CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=TEXT, **shape, **ids)
        )
        image = CLIPVisionModelWithProjection(
            CLIPVisionConfig(image_size=SIDE, patch_size=8, **shape)
        )
        unet, vae = small_unet(WIDTH), small_vae()
        tensors = _adapter(unet, grid)
    tokenizer.save_pretrained(model / "tokenizer")
    text.save_pretrained(model / "text_encoder")
    unet.save_pretrained(model / "unet")
    vae.save_pretrained(model / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(model / "scheduler")
    image.save_pretrained(adapter / "models" / "image_encoder")
    save_file(tensors, adapter / "models" / "ip.safetensors")
    names = {"model": str(model), "adapter": str(adapter), "folder": "models"}
    return {"kind": "stable_diffusion", **names, "weights": "ip.safetensors"}


def _adapter(unet: Any, grid: bool) -> dict[str, torch.Tensor]:
    """Tensors of an IP-Adapter: image projection, keys and values of each cross-attention."""
    tensors: dict[str, torch.Tensor] = {}
    if grid:  # the resampler of "plus": two queries, four blocks of one head
        tensors["image_proj.latents"] = torch.randn(1, 2, 64)
        tensors |= _named("image_proj.proj_in", nn.Linear(WIDTH, 64))
        tensors |= _named("image_proj.proj_out", nn.Linear(64, WIDTH))
        tensors |= _named("image_proj.norm_out", nn.LayerNorm(WIDTH))
        for block in range(4):  # as many as diffusers expects
            at = f"image_proj.layers.{block}"
            for name in ("0.norm1", "0.norm2", "1.0"):
                tensors |= _named(f"{at}.{name}", nn.LayerNorm(64))
            sizes = {"0.to_q": (64, 64), "0.to_kv": (128, 64), "0.to_out": (64, 64)}
            sizes |= {"1.1": (256, 64), "1.3": (64, 256)}
            tensors |= {
                f"{at}.{name}.weight": torch.randn(size) * 0.1 for name, size in sizes.items()
            }
    else:
        tensors |= _named("image_proj.proj", nn.Linear(8, 4 * WIDTH))
        tensors |= _named("image_proj.norm", nn.LayerNorm(WIDTH))
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(crossing):
        wide = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(wide, WIDTH)
    return tensors


def _named(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor.detach().clone() for key, tensor in module.state_dict().items()}


def stage_one(
    folder: Path, width: int, conditions: dict[str, Any] | None = None, **more: Any
) -> Any:
    """Its training on folder/visual, by default for the pixel decoder in folder/decoder."""
    from helpers.trainers import trainer_of
    from lavit_lm.training.vlgpt_tokenizer import VLGPTTokenizerTraining

    conditions = conditions or {"kind": "pixel_decoder", "decoder": str(folder / "decoder")}
    sizes = {"queries": 4, "depth": 2, "heads": 2}
    names = {"width": width, "visual_tokenizer": str(folder / "visual"), "conditions": conditions}
    return trainer_of(VLGPTTokenizerTraining, **{**names, **sizes, **more})


def stage_one_directory(
    folder: Path, width: int, conditions: dict[str, Any] | None = None, **more: Any
) -> str:
    """The directory that stage 1 writes, from random weights."""
    from lavit_lm.objectives.vlgpt.tokenizer_files import save_tokenizer

    stage = stage_one(folder, width, conditions, **more)
    save_tokenizer(folder / "stage", stage.model, str(folder / "visual"), stage.conditions.config)
    assert json.loads((folder / "stage" / "config.json").read_text())["sizes"]["width"] == width
    return str(folder / "stage")
