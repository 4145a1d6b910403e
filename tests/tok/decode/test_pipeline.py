"""The guided loop, its random numbers, its schedulers, and decoders on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from torch import nn

from lavit_tok import CodeError, PixelDecoder, VisualCodes, VisualTokenizer, WeightsError
from lavit_tok.decode.conditioner import Conditioner

BLOCKS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
ROWS = [[3, 1, 4, 1, 5], [9], list(range(16))]


@pytest.fixture
def codes() -> VisualCodes:
    return VisualCodes.from_list(ROWS, codebook_size=16)


@pytest.fixture
def decoders(
    tiny_decoder: PixelDecoder, tiny_tokenizer: VisualTokenizer
) -> dict[str, PixelDecoder]:
    """One of each kind, all with the tiny decoder's VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made = {"sd": tiny_decoder}
        pooled = Conditioner.for_tokenizer(
            tiny_tokenizer.config,
            tiny_tokenizer.quantizer.codebook,
            tiny_tokenizer.reconstructor,
            style="sdxl",
            cross_dims=[6, 10],
            pooled_dim=12,
            pool_heads=2,
        )
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        unet = UNet2DConditionModel(
            **BLOCKS, **extra, projection_class_embeddings_input_dim=12 + 6 * 4
        )
        made["sdxl"] = PixelDecoder(pooled, unet.eval(), tiny_decoder.vae, tiny_decoder.scheduler)
        spatial = Conditioner.for_tokenizer(
            tiny_tokenizer.config,
            tiny_tokenizer.quantizer.codebook,
            tiny_tokenizer.reconstructor,
            cross_dims=[16],
            spatial_channels=3,
            null_length=16,
        )
        unet = UNet2DConditionModel(**BLOCKS, in_channels=7)
        made["spatial"] = PixelDecoder(
            spatial, unet.eval(), tiny_decoder.vae, tiny_decoder.scheduler
        )
    for decoder in made.values():
        decoder.set_progress_bar_config(disable=True)
    return made


def noise(seed: int = 0, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def draw(
    decoder: PixelDecoder, codes: VisualCodes, steps: int = 2, guidance: float = 3.0, **options: Any
) -> Any:
    return decoder(codes, steps, guidance, **{"output_type": "pt", **options}).images


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_guidance_by_hand(kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    """One DDIM step of the pipeline is the formula u + s (c - u), each half computed alone."""
    decoder = decoders[kind]
    scheduler = DDIMScheduler.from_config(decoder.scheduler.config)
    scheduler.set_timesteps(1)
    with torch.no_grad():
        given = decoder.conditioner(codes)
        null, ids = (
            decoder.conditioner.unconditional(given),
            torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3),
        )
        c, u = (
            decoder.unet(timestep=scheduler.timesteps[0], **x.inputs(noise(), ids)).sample
            for x in (given, null)
        )
        expected = scheduler.step(u + 3 * (c - u), scheduler.timesteps[0], noise()).prev_sample
    drawn = draw(decoder, codes, steps=1, latents=noise(), output_type="latent")
    # A step from nearly pure noise divides by a small alpha, rounding errors too: up to 1.4e-4.
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
    assert (c - u).abs().max() > 1e-4  # else guidance would change nothing


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_guidance_one_is_the_condition_alone(
    kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes
) -> None:
    decoder = decoders[kind]
    nearly = draw(decoder, codes, guidance=1 + 1e-7, latents=noise(), output_type="latent")
    sizes: list[int] = []
    decoder.unet.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["sample"])), with_kwargs=True
    )
    alone = draw(decoder, codes, guidance=1, latents=noise(), output_type="latent")
    assert sizes == [3, 3]
    draw(decoder, codes, guidance=2, latents=noise(), output_type="latent")
    assert sizes == [3, 3, 6, 6]
    torch.testing.assert_close(alone, nearly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_alone_or_together(
    kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes
) -> None:
    """With its own generator, an image does not depend on the rest of its batch."""
    together = draw(decoders[kind], codes, generator=generators([5, 6, 7]))
    for i, seed in enumerate((5, 6, 7)):
        alone = draw(decoders[kind], codes.take([i]), generator=generators([seed]))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-3, atol=1e-4)
    turned = draw(decoders[kind], codes.take([2, 0, 1]), generator=generators([7, 5, 6]))
    torch.testing.assert_close(turned, together[[2, 0, 1]], rtol=1e-3, atol=1e-4)


def test_chance_is_an_argument(decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    decoder = decoders["sd"]
    torch.manual_seed(0)
    first = draw(decoder, codes, generator=torch.Generator().manual_seed(1), eta=0.5)
    torch.manual_seed(1)
    same = draw(decoder, codes, generator=torch.Generator().manual_seed(1), eta=0.5)
    other = draw(decoder, codes, generator=torch.Generator().manual_seed(2), eta=0.5)
    assert torch.equal(first, same) and not torch.equal(first, other)
    plain = draw(decoder, codes, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first, plain)  # eta adds noise
    with pytest.raises(ValueError, match=r"a torch\.Generator or a list of 3, got a list of 2"):
        draw(decoder, codes, generator=generators([1, 2]))


def test_output_types(decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    decoder = decoders["sd"]
    pt, array = (draw(decoder, codes, latents=noise(), output_type=t) for t in ("pt", "np"))
    images = decoder(codes, 2, latents=noise()).images
    assert (
        pt.shape == (3, 3, 16, 16) and pt.dtype == torch.float32 and 0 <= pt.min() < pt.max() <= 1
    )
    assert array.shape == (3, 16, 16, 3) and np.allclose(array, pt.permute(0, 2, 3, 1).numpy())
    assert [p.size for p in images] == [(16, 16)] * 3
    assert np.abs(np.stack([np.asarray(p) for p in images]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    (bare,) = decoder(codes, 2, latents=noise(), output_type="pt", return_dict=False)
    assert torch.equal(bare, pt)
    with pytest.raises(
        ValueError, match="output_type: expected 'pil', 'np', 'pt' or 'latent', got 'jpg'"
    ):
        draw(decoder, codes, output_type="jpg")


def test_sizes(decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    for kind in ("sd", "spatial", "sdxl"):
        drawn = draw(
            decoders[kind], codes, height=24, width=32, generator=torch.Generator().manual_seed(0)
        )
        assert drawn.shape == (3, 3, 24, 32)
    decoder = decoders["sdxl"]
    small = draw(decoder, codes, latents=noise(), original_size=(8, 8))
    assert not torch.equal(small, draw(decoder, codes, latents=noise()))
    assert torch.equal(
        draw(decoder, codes, latents=noise(), original_size=(16, 16)),
        draw(decoder, codes, latents=noise()),
    )
    with pytest.raises(ValueError, match="multiples of 2 up to 16384, got 15"):
        draw(decoder, codes, height=15)
    with pytest.raises(ValueError, match=r"latents: expected \[3, 4, 8, 8\], got \[2, 4, 8, 8\]"):
        draw(decoder, codes, latents=noise(batch=2))


@pytest.mark.parametrize(
    "arguments",
    [
        *({"num_inference_steps": value} for value in (0, 10**9, 2.5)),
        *({"guidance_scale": value} for value in (float("nan"), float("inf"), 1e9)),
        *({"eta": value} for value in (-0.1, 1.1)),
        *({"height": value} for value in (0, 10**9)),
    ],
    ids=str,
)
def test_numbers_out_of_range(
    arguments: dict[str, Any],
    decoders: dict[str, PixelDecoder],
    codes: VisualCodes,
    unchecked: None,
) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}.*: expected .*got"):
        decoders["sd"](codes, **arguments)


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler]
)
def test_schedulers_can_be_swapped(
    kind: Any, decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    decoder = decoders["spatial"]
    before = draw(decoder, codes, steps=4, latents=noise())
    decoder.scheduler = kind.from_config(decoder.scheduler.config)
    after = draw(
        decoder, codes, steps=4, latents=noise(), generator=torch.Generator().manual_seed(0)
    )
    assert (
        after.shape == before.shape
        and bool(after.isfinite().all())
        and not torch.equal(before, after)
    )
    decoder.save_pretrained(tmp_path)
    again = PixelDecoder.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is kind
    same = draw(again, codes, steps=4, latents=noise(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(after, same)


def test_memory_options_change_nothing(
    decoders: dict[str, PixelDecoder], codes: VisualCodes
) -> None:
    decoder = decoders["sd"]
    plain = draw(decoder, codes, latents=noise())
    decoder.enable_attention_slicing()
    decoder.vae.enable_slicing()
    torch.testing.assert_close(draw(decoder, codes, latents=noise()), plain, rtol=1e-4, atol=1e-4)
    decoder.vae.enable_tiling()
    assert draw(decoder, codes, latents=noise()).shape == plain.shape


def test_vae_decodes_in_float32_where_it_asks_for_it(decoders: dict[str, PixelDecoder]) -> None:
    decoder = decoders["sd"]
    exact = decoder.decode_latents(noise())
    nn.Module.to(decoder.vae, torch.bfloat16)
    rounded = {n: p.float().clone() for n, p in decoder.vae.named_parameters()}
    seen = []
    decoder.vae.decoder.conv_in.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    for ask, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        decoder.vae.register_to_config(force_upcast=ask)
        with torch.no_grad():
            pixels = decoder.decode_latents(noise())
        assert (
            seen.pop() == dtype
            and pixels.dtype == torch.float32
            and decoder.vae.dtype == torch.bfloat16
        )
        assert (pixels - exact).abs().max() < 0.1
    assert all(torch.equal(p.float(), rounded[n]) for n, p in decoder.vae.named_parameters())


def test_refuses_codes_of_another_tokenizer(decoders: dict[str, PixelDecoder]) -> None:
    with pytest.raises(CodeError, match="another tokenizer"):
        draw(decoders["sd"], VisualCodes.from_list([[1]], codebook_size=1024))


def test_refuses_parts_that_do_not_fit(decoders: dict[str, PixelDecoder]) -> None:
    sd, spatial = decoders["sd"], decoders["spatial"]
    with pytest.raises(
        ValueError, match=r"unet\.in_channels: expected 7 for this conditioner and VAE, got 4"
    ):
        PixelDecoder(spatial.conditioner, sd.unet, sd.vae, sd.scheduler)


# Files


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_round_trip(
    kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    decoders[kind].save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    again = PixelDecoder.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(
        draw(again, codes, latents=noise()), draw(decoders[kind], codes, latents=noise())
    )
    assert not again.unet.training and not again.vae.training


def test_half_precision_files(
    decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    decoder = decoders["sd"]
    decoder.save_pretrained(tmp_path, dtype=torch.float16)
    assert decoder.unet.dtype == decoder.vae.dtype == torch.float32  # saving changes nothing here
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    rows = load_file(tmp_path / "conditioner" / "diffusion_pytorch_model.safetensors")[
        "codebook.embeddings"
    ]
    assert torch.equal(rows, decoder.conditioner.codebook.embeddings)  # the codebook stays exact
    again = PixelDecoder.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.unet.dtype == torch.float32
    difference = draw(again, codes, latents=noise()) - draw(decoder, codes, latents=noise())
    assert difference.abs().max() < 0.02
    bf16 = PixelDecoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bf16.set_progress_bar_config(disable=True)
    assert (
        bf16.unet.dtype == torch.bfloat16
        and bf16.conditioner.codebook.embeddings.dtype == torch.float32
    )
    assert (
        draw(bf16, codes, latents=noise()) - draw(decoder, codes, latents=noise())
    ).abs().mean() < 0.05


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_classes_are_not_chosen_by_files(
    decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    """Classes in model_index.json are ignored; a config of another class is refused."""
    decoders["sd"].save_pretrained(tmp_path)
    edit(
        tmp_path / "model_index.json",
        unet=["os", "system"],
        _class_name="Evil",
        condition=["subprocess", "Popen"],
    )
    assert type(PixelDecoder.from_pretrained(tmp_path).conditioner) is Conditioner
    (tmp_path / "model_index.json").unlink()
    assert type(PixelDecoder.from_pretrained(tmp_path)) is PixelDecoder
    edit(tmp_path / "scheduler" / "scheduler_config.json", _class_name="DiffusionPipeline")
    with pytest.raises(
        WeightsError,
        match=r"expected _class_name to be one of .*DDIMScheduler.*, got 'DiffusionPipeline'",
    ):
        PixelDecoder.from_pretrained(tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    edit(tmp_path / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(
        WeightsError, match=r"vae.config.json: expected _class_name 'AutoencoderKL', got 'VQModel'"
    ):
        PixelDecoder.from_pretrained(tmp_path)


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_tampered_weights_are_refused(decoders: dict[str, PixelDecoder], tmp_path: Path) -> None:
    decoders["sd"].save_pretrained(tmp_path / "good")

    def refused(change: Any, *messages: str) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(WeightsError) as error:
            PixelDecoder.from_pretrained(tmp_path / "bad")
        assert all(m in str(error.value) for m in messages), str(error.value)

    unet, condition = (
        "unet/diffusion_pytorch_model.safetensors",
        "conditioner/diffusion_pytorch_model.safetensors",
    )

    def several(tensors: dict[str, Any]) -> None:
        tensors["extra"] = torch.zeros(2)
        tensors["conv_in.bias"] = torch.zeros(3)
        del tensors["conv_out.bias"]

    refused(
        lambda d: rewrite(d / unet, several),
        *(
            "unexpected  extra [2]",
            "missing     conv_out.bias [4]",
            "mis-shaped  conv_in.bias: expected [16], got [3]",
        ),
    )
    refused(
        lambda d: rewrite(d / condition, lambda t: t["codebook.embeddings"].fill_(torch.nan)),
        "codebook.embeddings",
        "NaN",
    )
    refused(
        lambda d: (d / unet).write_bytes((d / unet).read_bytes()[:-64]),
        "not a complete safetensors file",
    )
    refused(lambda d: (d / unet).unlink(), "found neither")
    refused(lambda d: edit(d / "unet" / "config.json", color="red"), "unknown entries ['color']")
    refused(lambda d: edit(d / "conditioner" / "config.json", null_length=0), "null_length")
    refused(
        lambda d: edit(d / "conditioner" / "config.json", codebook_size=17),
        "mis-shaped  codebook.embeddings",
    )
    refused(lambda d: (d / "vae" / "config.json").write_text("{"), "cannot be read as JSON")
    refused(lambda d: shutil.rmtree(d / "scheduler"), "got no scheduler")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="expected 'default', 'nested', an existing directory or a Hub id"
    ):
        PixelDecoder.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("codes", [[[1, 2]], ([1], [2]), None, 3])
def test_what_is_decoded(codes: Any, tiny_decoder: PixelDecoder, unchecked: None) -> None:
    with pytest.raises(CodeError, match=r"expected VisualCodes, e\.g\. VisualCodes\.from_list"):
        tiny_decoder(codes)


@pytest.mark.parametrize("generator", [3, [torch.Generator(), 3], [torch.Generator()]])
def test_what_noise_is_drawn_from(
    generator: Any, tiny_decoder: PixelDecoder, codes: VisualCodes, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=r"generator: expected a torch\.Generator or a list of 2"):
        tiny_decoder(codes.take([0, 1]), generator=generator)
