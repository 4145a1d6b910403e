"""The guided loop, its random numbers, its schedulers, and decoders on disk."""

from __future__ import annotations

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
from helpers.files import edit, rewrite
from safetensors.torch import load_file
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
    made = {"sd": tiny_decoder}
    tokenizer, extra = tiny_tokenizer, {"addition_embed_type": "text_time"}
    extra |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12 + 6 * 4}
    pooled = {"style": "sdxl", "cross_dims": [6, 10], "pooled_dim": 12, "pool_heads": 2}
    spatial = {"cross_dims": [16], "spatial_channels": 3, "null_length": 16}
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]]
    kinds = {"sdxl": (pooled, extra), "spatial": (spatial, {"in_channels": 7})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for kind, (options, more) in kinds.items():
            codebook = tokenizer.quantizer.codebook
            condition = Conditioner.for_tokenizer(
                tokenizer.config, codebook, tokenizer.reconstructor, **options
            )
            unet = UNet2DConditionModel(**BLOCKS, **more).eval()
            made[kind] = PixelDecoder(condition, unet, tiny_decoder.vae, tiny_decoder.scheduler)
    for decoder in made.values():
        decoder.set_progress_bar_config(disable=True)
    return made


def noise(seed: int = 0, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
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
    (t,), ids = scheduler.timesteps, torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3)
    with torch.no_grad():
        given = decoder.conditioner(codes)
        both = given, decoder.conditioner.unconditional(given)
        c, u = (decoder.unet(timestep=t, **x.inputs(noise(), ids)).sample for x in both)
        expected = scheduler.step(u + 3 * (c - u), t, noise()).prev_sample
    drawn = draw(decoder, codes, steps=1, latents=noise(), output_type="latent")
    # A step from nearly pure noise divides by a small alpha, rounding errors too: up to 1.4e-4.
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
    assert (c - u).abs().max() > 1e-4  # else guidance would change nothing


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_guidance_one_is_the_condition_alone(
    kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes
) -> None:
    decoder, options = decoders[kind], {"latents": noise(), "output_type": "latent"}
    nearly = draw(decoder, codes, guidance=1 + 1e-7, **options)
    sizes: list[int] = []
    count = lambda _, args, given: sizes.append(len(given["sample"]))  # noqa: E731
    decoder.unet.register_forward_pre_hook(count, with_kwargs=True)
    alone = draw(decoder, codes, guidance=1, **options)
    assert sizes == [3, 3]
    draw(decoder, codes, guidance=2, **options)
    assert sizes == [3, 3, 6, 6]
    torch.testing.assert_close(alone, nearly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_alone_or_together(
    kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes
) -> None:
    """With its own generator, an image does not depend on the rest of its batch."""
    together = draw(decoders[kind], codes, generator=generators(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        alone = draw(decoders[kind], codes.take([i]), generator=generators(seed))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-3, atol=1e-4)
    turned = draw(decoders[kind], codes.take([2, 0, 1]), generator=generators(7, 5, 6))
    torch.testing.assert_close(turned, together[[2, 0, 1]], rtol=1e-3, atol=1e-4)


def test_randomness_is_an_argument(decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    def drawn(seed: int, **options: Any) -> Any:
        return draw(decoders["sd"], codes, generator=generators(seed)[0], **options)

    torch.manual_seed(0)
    first = drawn(1, eta=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, drawn(1, eta=0.5)) and not torch.equal(first, drawn(2, eta=0.5))
    assert not torch.equal(first, drawn(1)), "eta adds noise"
    with pytest.raises(ValueError, match=r"a torch\.Generator or a list of 3, got a list of 2"):
        draw(decoders["sd"], codes, generator=generators(1, 2))


def loaded(path: Path, **options: Any) -> PixelDecoder:
    decoder = PixelDecoder.from_pretrained(path, **options)
    decoder.set_progress_bar_config(disable=True)
    return decoder


def test_output_types(decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    decoder = decoders["sd"]
    pt, array = (draw(decoder, codes, latents=noise(), output_type=t) for t in ("pt", "np"))
    images = decoder(codes, 2, latents=noise()).images
    assert pt.shape == (3, 3, 16, 16) and pt.dtype == torch.float32
    assert 0 <= pt.min() < pt.max() <= 1
    assert array.shape == (3, 16, 16, 3) and np.allclose(array, pt.permute(0, 2, 3, 1).numpy())
    assert [p.size for p in images] == [(16, 16)] * 3
    assert np.abs(np.stack([np.asarray(p) for p in images]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    (bare,) = decoder(codes, 2, latents=noise(), output_type="pt", return_dict=False)
    assert torch.equal(bare, pt)
    with pytest.raises(ValueError, match="output_type: expected 'pil', 'np', 'pt' or 'latent', go"):
        draw(decoder, codes, output_type="jpg")


def test_sizes(decoders: dict[str, PixelDecoder], codes: VisualCodes) -> None:
    for decoder in decoders.values():
        drawn = draw(decoder, codes, height=24, width=32, generator=generators(0)[0])
        assert drawn.shape == (3, 3, 24, 32)
    decoder, options = decoders["sdxl"], {"latents": noise()}
    plain = draw(decoder, codes, **options)
    assert not torch.equal(draw(decoder, codes, original_size=(8, 8), **options), plain)
    assert torch.equal(draw(decoder, codes, original_size=(16, 16), **options), plain)
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
    def drawn(decoder: PixelDecoder) -> Any:
        return draw(decoder, codes, steps=4, latents=noise(), generator=generators(0)[0])

    decoder = decoders["spatial"]
    before = drawn(decoder)
    decoder.scheduler = kind.from_config(decoder.scheduler.config)
    after = drawn(decoder)
    assert after.shape == before.shape and bool(after.isfinite().all())
    assert not torch.equal(before, after)
    decoder.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again.scheduler) is kind and torch.equal(after, drawn(again))


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
    decoder, vae = decoders["sd"], decoders["sd"].vae
    exact = decoder.decode_latents(noise())
    nn.Module.to(vae, torch.bfloat16)
    rounded = {n: p.float().clone() for n, p in vae.named_parameters()}
    dtypes: list[torch.dtype] = []
    vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    for ask, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        vae.register_to_config(force_upcast=ask)
        with torch.no_grad():
            pixels = decoder.decode_latents(noise())
        assert (dtypes.pop(), pixels.dtype, vae.dtype) == (dtype, torch.float32, torch.bfloat16)
        assert (pixels - exact).abs().max() < 0.1
    assert all(torch.equal(p.float(), rounded[n]) for n, p in vae.named_parameters())


def test_refuses_parts_that_do_not_fit(decoders: dict[str, PixelDecoder]) -> None:
    sd, spatial = decoders["sd"], decoders["spatial"]
    expected = r"unet\.in_channels: expected 7 for this conditioner and VAE, got 4"
    with pytest.raises(ValueError, match=expected):
        PixelDecoder(spatial.conditioner, sd.unet, sd.vae, sd.scheduler)


# Files


@pytest.mark.parametrize("kind", ["sd", "sdxl", "spatial"])
def test_round_trip(
    kind: str, decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    decoders[kind].save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    again = loaded(tmp_path)
    drawn, expected = (draw(one, codes, latents=noise()) for one in (again, decoders[kind]))
    assert torch.equal(drawn, expected) and not again.unet.training and not again.vae.training


def test_half_precision_files(
    decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    decoder, name = decoders["sd"], "diffusion_pytorch_model.safetensors"
    decoder.save_pretrained(tmp_path, dtype=torch.float16)
    assert decoder.unet.dtype == decoder.vae.dtype == torch.float32  # saving changes nothing here
    assert {t.dtype for t in load_file(tmp_path / "unet" / name).values()} == {torch.float16}
    entries = load_file(tmp_path / "conditioner" / name)["codebook.embeddings"]
    assert torch.equal(entries, decoder.conditioner.codebook.embeddings)  # the codebook stays exact
    again, bf16 = loaded(tmp_path), loaded(tmp_path, dtype=torch.bfloat16)
    assert (again.unet.dtype, bf16.unet.dtype) == (torch.float32, torch.bfloat16)
    assert bf16.conditioner.codebook.embeddings.dtype == torch.float32
    drawn, half, low = (draw(one, codes, latents=noise()) for one in (decoder, again, bf16))
    assert (half - drawn).abs().max() < 0.02 and (low - drawn).abs().mean() < 0.05


def test_classes_are_not_chosen_by_files(
    decoders: dict[str, PixelDecoder], codes: VisualCodes, tmp_path: Path
) -> None:
    """Classes in model_index.json are ignored; a config of another class is refused."""
    decoders["sd"].save_pretrained(tmp_path)
    index, scheduler = tmp_path / "model_index.json", tmp_path / "scheduler/scheduler_config.json"
    other = {"unet": ["os", "system"], "condition": ["subprocess", "Popen"]}
    edit(index, _class_name="Evil", **other)
    assert type(PixelDecoder.from_pretrained(tmp_path).conditioner) is Conditioner
    index.unlink()
    assert type(PixelDecoder.from_pretrained(tmp_path)) is PixelDecoder
    edit(scheduler, _class_name="DiffusionPipeline")
    expected = r"expected _class_name to be one of .*DDIMScheduler.*, got 'DiffusionPipeline'"
    with pytest.raises(WeightsError, match=expected):
        PixelDecoder.from_pretrained(tmp_path)
    edit(scheduler, _class_name="DDIMScheduler")
    edit(tmp_path / "vae" / "config.json", _class_name="VQModel")
    expected = r"vae.config.json: expected _class_name 'AutoencoderKL', got 'VQModel'"
    with pytest.raises(WeightsError, match=expected):
        PixelDecoder.from_pretrained(tmp_path)


def several(tensors: dict[str, Any]) -> None:
    tensors["extra"] = torch.zeros(2)
    tensors["conv_in.bias"] = torch.zeros(3)
    del tensors["conv_out.bias"]


UNET_FILE = Path("unet/diffusion_pytorch_model.safetensors")
CONDITION = Path("conditioner")
DIFFERENCES = ["unexpected  extra [2]", "missing     conv_out.bias [4]"]
DIFFERENCES += ["mis-shaped  conv_in.bias: expected [16], got [3]"]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda d: rewrite(d / UNET_FILE, several), DIFFERENCES),
        (
            lambda d: rewrite(
                d / CONDITION / UNET_FILE.name, lambda t: t["codebook.embeddings"].fill_(torch.nan)
            ),
            ["codebook.embeddings", "NaN"],
        ),
        (
            lambda d: (d / UNET_FILE).write_bytes((d / UNET_FILE).read_bytes()[:-64]),
            ["not a complete safetensors file"],
        ),
        (lambda d: (d / UNET_FILE).unlink(), ["found neither"]),
        (lambda d: edit(d / "unet/config.json", color="red"), ["unknown entries ['color']"]),
        (lambda d: edit(d / CONDITION / "config.json", null_length=0), ["null_length"]),
        (
            lambda d: edit(d / CONDITION / "config.json", codebook_size=17),
            ["mis-shaped  codebook.embeddings"],
        ),
        (lambda d: (d / "vae/config.json").write_text("{"), ["cannot be read as JSON"]),
        (lambda d: shutil.rmtree(d / "scheduler"), ["got no scheduler"]),
    ],
)
def test_tampered_weights_are_refused(
    change: Any, messages: list[str], tiny_decoder: PixelDecoder, tmp_path: Path
) -> None:
    tiny_decoder.save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(WeightsError) as error:
        PixelDecoder.from_pretrained(tmp_path)
    assert all(m in str(error.value) for m in messages), str(error.value)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="expected 'default', 'selected', an existing directory or a Hub id"
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
