"""Released LaVIT weights: golden outputs, a slow reference, strictness, memory, conversion."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_released as slow
import torch
from helpers.files import edit
from safetensors.torch import load_file
from torch import Tensor

from lavit_tok import PixelDecoder, VisualCodes, VisualTokenizer, WeightsError, cli
from lavit_tok.checkpoints import weights
from lavit_tok.checkpoints.released import pickled
from lavit_tok.checkpoints.released.loader import head_count, load_released
from lavit_tok.checkpoints.weights import load_weights, save_weights

MINI = Path(__file__).parents[2] / "golden" / "lavit-mini"
KINDS = ("lowres", "highres")
TOKENIZER = "visual_tokenizer/tokenizer_encoder.bin"
ENCODER = "visual_tokenizer/eva_vitg_psz14.bin"
LM = "language_model/visual_weight.bin"
pytestmark = pytest.mark.filterwarnings("ignore:the number of attention heads")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(MINI / "golden.safetensors")


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[VisualTokenizer, Any]]:
    found = {kind: load_released(MINI, kind) for kind in KINDS}  # type: ignore[arg-type]
    for _, decoder in found.values():
        assert decoder is not None
        decoder.set_progress_bar_config(disable=True)
    return found


def error(got: Tensor, reference: Tensor) -> float:
    """The measure of golden/README.md: largest difference / the reference's standard deviation."""
    assert got.shape == reference.shape
    return float((got - reference).abs().max() / reference.std())


def same_tensors(first: Any, second: Any) -> None:
    for (name, a), (_, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def draw(decoder: PixelDecoder, codes: VisualCodes, latents: Tensor, **options: Any) -> Tensor:
    asked = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64}
    return decoder(codes, latents=latents, output_type="pt", **{**asked, **options}).images


# The golden outputs


@torch.no_grad()
@pytest.mark.parametrize("mask", ["argmax", "given"])
def test_golden_codes(golden: dict[str, Tensor], loaded: dict[str, Any], mask: str):
    tokenizer, _ = loaded["lowres"]
    pixels, keep = golden["pixel_values"], golden[f"{mask}.keep"]
    features = tokenizer.features(pixels)
    log_probs, merged = tokenizer.score(features), tokenizer.merge(features, keep)
    codes = tokenizer.quantize(tokenizer.project(merged), keep.sum(1))
    for got, name in (
        (features, "encoder_features"),
        (log_probs, "selector_log_probs"),
        (merged, f"{mask}.merged"),
        (tokenizer.quantizer.projection(merged), f"{mask}.pre_quant"),
        (tokenizer.lookup(codes), f"{mask}.quantized"),
    ):
        assert error(got, golden[name]) < 1e-4, name
    every = [codes]
    if mask == "argmax":
        assert torch.equal(tokenizer.select(log_probs), keep)
        every.append(tokenizer.encode_pixels(pixels))
    for one in every:
        assert torch.equal(one.values, golden[f"{mask}.ids"])
        assert torch.equal(one.lengths, golden[f"{mask}.lengths"])
    for i, image in enumerate(codes):  # one by one as in the batch
        alone = tokenizer.merge(tokenizer.features(pixels[i : i + 1]), keep[i : i + 1])
        assert torch.equal(tokenizer.quantizer.codebook.nearest(tokenizer.project(alone)), image)


@torch.no_grad()
def test_golden_continuous_path(golden: dict[str, Tensor], loaded: dict[str, Any]):
    tokenizer, _ = loaded["highres"]
    features, keep = tokenizer.features(golden["pixel_values"]), golden["given.keep"]
    together = tokenizer.embed_features(features, keep=keep)
    assert error(together, golden["given.llm_embeds"]) < 1e-4
    alone = [tokenizer.embed_features(features[i : i + 1], keep=keep[i : i + 1]) for i in range(3)]
    assert error(torch.cat(alone), golden["given.llm_embeds"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("mask", ["argmax", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_conditions(golden: dict[str, Tensor], loaded: dict[str, Any], kind: str, mask: str):
    tokenizer, decoder = loaded[kind]
    codes = VisualCodes(golden[f"{mask}.ids"], golden[f"{mask}.lengths"])
    names = {"lowres": ["condition"], "highres": ["prompt_embeds", "pooled_prompt_embeds"]}[kind]
    for part in (slice(0, 3), slice(1, 2)):  # together, and one alone
        condition = decoder.conditioner(codes.take(range(3)[part]))
        for name, got in zip(names, (condition.tokens, condition.pooled), strict=False):
            assert error(got, golden[f"{mask}.{kind}.{name}"][part]) < 1e-4
    features = tokenizer.reconstruct_features(codes)
    assert torch.equal(features, decoder.conditioner.features(codes)), "the same reconstructor"


@pytest.mark.parametrize("kind", KINDS)
def test_golden_images(golden: dict[str, Tensor], loaded: dict[str, Any], kind: str):
    _, decoder = loaded[kind]
    codes = VisualCodes(golden["given.ids"], golden["given.lengths"])
    latents, images = golden[f"{kind}.latents"], golden[f"{kind}.image"]
    assert error(draw(decoder, codes, latents), images) < 1e-3
    assert error(draw(decoder, codes.take([1]), latents[1:2]), images[1:2]) < 1e-3


# Another size


SIZES: dict[str, Any] = {"image": 40, "patch": 8, "width": 96, "layers": 2, "encoder_mlp": 160}
SIZES |= {"merger_depth": 1, "mlp": 200, "reconstructor_depth": 3, "codes": 64, "code_dim": 6}
SIZES |= {"llm": 56, "low": 20, "high": (12, 28), "null": 3}
HEADS = 3  # not what the width suggests


def images() -> Tensor:
    side, generator = SIZES["image"], torch.Generator().manual_seed(3)
    return torch.randn(2, 3, side, side, generator=generator)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random release of other sizes with small U-Nets and VAEs of present diffusers."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    root = tmp_path_factory.mktemp("release")
    slow.write(root, 1, **SIZES)
    eva, encoder = slow.read(root / ENCODER), slow.read(root / TOKENIZER)
    every = [slow.score(encoder, slow.encode_features(eva, image, HEADS)) for image in images()]
    # Half of the patches are kept, and none is at the threshold: all or nothing would prove little.
    scores = torch.cat([one[:, 0] - one[:, 1] for one in every]).sort().values
    middle = scores[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean().float()
    bias = "token_predictor.out_conv.4.bias"
    change(root / TOKENIZER, lambda tensors: tensors[bias][0].sub_(middle))
    shape = {"sample_size": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
    shape |= {"norm_num_groups": 4, "attention_head_dim": 2}
    shape |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    shape |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    first, second = SIZES["high"]
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    xl |= {"projection_class_embeddings_input_dim": second + 24}
    kinds = {"pixel_decoding": {"cross_attention_dim": SIZES["low"]}}
    kinds["highres_pixel_decoding"] = {"cross_attention_dim": first + second, **xl}
    # The names of Stable Diffusion 1.5.
    old = {"to_out.0": "proj_attn", "to_q": "query", "to_k": "key", "to_v": "value"}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
    for folder, more in kinds.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            unet = UNet2DConditionModel(**shape, **more)
            vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, **blocks)
        for name, model in (("unet", unet), ("vae", vae)):
            model.save_config(root / folder / name)
            state = model.state_dict()
            for new, published in old.items() if name == "vae" else ():
                state = {key.replace(new, published): value for key, value in state.items()}
            torch.save(state, root / folder / name / "diffusion_pytorch_model.bin")
        PNDMScheduler(skip_prk_steps=True).save_config(root / folder / "scheduler")
    return root


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_equal_the_slow_reference(other: Path, kind: str):
    heads, pixels = HEADS, images()
    count = len(pixels)
    tokenizer, decoder = load_released(other, kind, num_heads=heads)  # type: ignore[arg-type]
    assert decoder is not None
    prefix = "" if kind == "lowres" else "highres_"
    names = (ENCODER, TOKENIZER, f"visual_tokenizer/{prefix}tokenizer_decoder.bin", LM)
    eva, encoder, w, lm = (slow.read(other / name) for name in names)
    codes = tokenizer.encode_pixels(pixels)
    condition = decoder.conditioner(codes)
    embeds = tokenizer.embed_features(tokenizer.features(pixels)).split(codes.lengths.tolist())
    for i in range(count):
        features = slow.encode_features(eva, pixels[i], heads)
        assert error(tokenizer.features(pixels[i : i + 1])[0].double(), features) < 1e-4
        log_probs = slow.score(encoder, features)
        keep = log_probs[:, 0] > log_probs[:, 1]
        assert 0 < int(keep.sum()) < len(keep) and torch.equal(codes.keep[i], keep)
        merged = slow.project(encoder, slow.merge(encoder, features, keep, heads))
        expected = slow.nearest(encoder, merged)
        assert codes[i].tolist() == expected
        llm = slow.linear(lm, "vit_proj", slow.merge(lm, features, keep, heads))
        assert error(embeds[i].double(), llm) < 1e-4
        x = slow.decode_features(w, encoder["quantize.embedding.weight"][expected], heads)
        assert error(tokenizer.reconstruct_features(codes)[i].double(), x) < 1e-4
        layers = ["unet_proj"] if kind == "lowres" else ["unet_proj_1", "unet_proj_2"]
        tokens = torch.cat([slow.linear(w, layer, x) for layer in layers], 1)
        assert error(condition.tokens[i].double(), tokens) < 1e-4
        if kind == "highres":
            assert error(condition.pooled[i].double(), slow.pool(w, x, heads)) < 1e-4
    if kind == "lowres":
        null, m = decoder.conditioner.unconditional(condition), SIZES["null"]
        assert null.mask.sum(1).tolist() == [m] * count
        published = torch.load(other / "pixel_decoding/uncond_embeddings.bin")
        assert torch.equal(null.tokens[0, :m], published[0])
    name = type(decoder.scheduler).__name__
    assert name == "DDIMScheduler", "published, whichever class the file names"
    options = {"height": 8, "width": 12, "output_type": "pt"}
    image = decoder(codes, 2, 2.0, torch.Generator().manual_seed(0), **options).images
    assert image.shape == (count, 3, 8, 12) and bool(image.isfinite().all())


def test_heads_by_width(other: Path):
    assert [head_count(w) for w in (1408, 88, 64, 96, 20)] == [16, 1, 4, 6, 4]
    with pytest.warns(UserWarning, match="width 96 it is assumed to be 6"):
        tokenizer, _ = load_released(other)
    assert tokenizer.config.num_heads == tokenizer.config.encoder["num_attention_heads"] == 6
    with pytest.raises(WeightsError, match="num_heads: expected a divisor of 96, got 7"):
        load_released(other, num_heads=7)


# What is refused


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "release"))


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    path.unlink()  # it may be mapped
    torch.save(tensors, path)


def test_every_difference_is_listed_by_file_and_tensor(copy: Path):
    def edit(tensors: dict[str, Any]) -> None:
        del tensors["causal_encoder.ln_vision.bias"]
        tensors["causal_encoder.blocks.1.extra"] = torch.zeros(2)
        tensors["encode_task_layer.2.bias"] = torch.zeros(7)

    unet = "pixel_decoding/unet/diffusion_pytorch_model.bin"
    change(copy / TOKENIZER, edit)
    change(copy / ENCODER, lambda tensors: tensors.pop("blocks.1.attn.q_bias"))
    change(copy / unet, lambda tensors: tensors.pop("conv_in.bias"))
    with pytest.raises(WeightsError) as caught:
        load_released(copy, "lowres")
    for line in (
        f"{TOKENIZER}: missing     causal_encoder.ln_vision.bias [64]",
        f"{TOKENIZER}: unexpected  causal_encoder.blocks.1.extra [2]",
        f"{TOKENIZER}: mis-shaped  encode_task_layer.2.bias: expected [8], got [7]",
        f"{ENCODER}: missing     blocks.1.attn.q_bias [64]",
        f"{unet}: missing     conv_in.bias [16]",
    ):
        assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + 5


def test_tensors_that_tell_the_size(copy: Path):
    change(copy / ENCODER, lambda tensors: tensors.pop("pos_embed"))
    change(copy / TOKENIZER, lambda tensors: tensors.pop("quantize.embedding.weight"))
    missing = r"(?s)eva_vitg_psz14.bin: missing +pos_embed.*quantize\.embedding\.weight"
    with pytest.raises(WeightsError, match=missing):
        load_released(copy)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((8,), float("nan")), "holds NaN or infinity as float32"),
        (torch.zeros(1).expand(8), "32 bytes by its shape, 4 stored"),
        (
            torch.zeros(8, dtype=torch.int64),
            "encode_task_layer.2.bias: expected floats, got torch.int64",
        ),
        ("text", "'encode_task_layer.2.bias': got str"),
    ],
)
def test_values_that_cannot_be_weights(copy: Path, value: Any, message: str):
    change(copy / TOKENIZER, lambda tensors: tensors.update({"encode_task_layer.2.bias": value}))
    with pytest.raises(WeightsError, match=message):
        load_released(copy)


def test_is_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.linspace(-3, 3, 1001).to(dtype)
        assert weights.is_finite(values)
        for place in (0, 500, 1000):
            for bad in ("nan", "inf", "-inf"):
                broken = values.clone()
                broken[place] = float(bad)
                assert not weights.is_finite(broken), (dtype, place, bad)
    assert weights.is_finite(torch.zeros(0)) and weights.is_finite(torch.ones(2, dtype=torch.int64))


@pytest.mark.usefixtures("unchecked")
def test_absent_and_damaged_files(copy: Path):
    (copy / "pixel_decoding/uncond_embeddings.bin").unlink()
    (copy / TOKENIZER).unlink()
    absent = r"tokenizer_encoder\.bin, pixel_decoding/uncond_embeddings\.bin"
    with pytest.raises(WeightsError, match=absent):
        load_released(copy, "lowres")
    damaged = r"tokenizer_encoder\.bin: (refused|not a complete file)"
    for content in (b"", b"not a file of tensors", (MINI / TOKENIZER).read_bytes()[:5000]):
        (copy / TOKENIZER).write_bytes(content)
        with pytest.raises(WeightsError, match=damaged):
            load_released(copy)
    with pytest.raises(ValueError, match="'highres', 'lowres' or None, got 'middle'"):
        load_released(copy, "middle")  # type: ignore[arg-type]


class Malicious:
    """Unpickled as usual, it makes a folder: a real attack would do worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name",
    [
        ENCODER,
        TOKENIZER,
        LM,
        "pixel_decoding/uncond_embeddings.bin",
        "pixel_decoding/vae/diffusion_pytorch_model.bin",
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_wants_to_run_code_is_refused(
    copy: Path, tmp_path: Path, name: str, zipped: bool
):
    mark = tmp_path / "it-ran"
    tensors = {"a": torch.zeros(2), "b": Malicious(mark)}
    torch.save(tensors, copy / name, _use_new_zipfile_serialization=zipped)
    torch.load(copy / name, weights_only=False)
    assert mark.is_dir(), "this pickle is harmless, so the test would prove nothing"
    mark.rmdir()
    with pytest.raises(WeightsError, match="refused, no code was run") as caught:
        load_released(copy, "lowres")
    assert name in str(caught.value) and "weights_only" not in str(caught.value)
    assert not mark.exists()


def test_a_config_cannot_choose_a_class(copy: Path):
    config = copy / "highres_pixel_decoding/vae/config.json"
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"FluxTransformer2DModel"'))
    with pytest.raises(WeightsError, match="expected _class_name 'AutoencoderKL'"):
        load_released(copy, "highres")


def test_a_config_cannot_have_more_layers_than_tensors(copy: Path):
    config = copy / "highres_pixel_decoding/unet/config.json"
    edit(config, layers_per_block=10**6)
    with pytest.raises(WeightsError, match="layers_per_block: expected at most"):
        load_released(copy, "highres")


# What is read, into which memory


def test_only_what_is_asked_for_is_read(copy: Path, golden: dict[str, Tensor]):
    for path in copy.rglob("*.bin"):
        if str(path.relative_to(copy)) not in (ENCODER, TOKENIZER):
            path.unlink()
    tokenizer, decoder = load_released(copy)
    assert decoder is None
    codes = tokenizer.encode_pixels(golden["pixel_values"])
    assert torch.equal(codes.values, golden["argmax.ids"])
    with pytest.raises(ValueError, match="no reconstructor"):
        tokenizer.reconstruct_features(codes)
    with pytest.raises(ValueError, match="no continuous path"):
        tokenizer.embed(torch.zeros(3, 112, 112, dtype=torch.uint8))
    (copy / LM).write_bytes(b"would be refused if it were opened")
    load_released(copy, continuous=False)
    with pytest.raises(WeightsError, match="visual_weight"):
        load_released(copy)


def test_streaming_and_shared_memory(monkeypatch: pytest.MonkeyPatch, loaded: dict[str, Any]):
    tokenizer, decoder = loaded["highres"]
    opened: list[Path] = []
    load = pickled.load_pickled
    record = lambda path, *rest: (opened.append(path), load(path, *rest))[1]  # noqa: E731
    monkeypatch.setattr(pickled, "load_pickled", record)
    monkeypatch.setattr(pickled, "MAPPED", 200_000)  # bytes: the files are mapped anew all the time
    again, _ = load_released(MINI, "highres")
    assert opened.count(MINI / ENCODER) > 4
    same_tensors(tokenizer, again)
    own = decoder.conditioner.reconstructor.state_dict()
    for name, tensor in tokenizer.reconstructor.state_dict().items():
        assert own[name].data_ptr() == tensor.data_ptr(), name
    for layer in tokenizer.encoder.model.encoder.layers:
        assert not bool(layer.self_attn.qkv.bias.chunk(3)[1].any())
    assert not any(p.requires_grad for p in tokenizer.encoder.parameters())


def test_dtype(golden: dict[str, Tensor]):
    tokenizer, decoder = load_released(MINI, "highres", dtype=torch.bfloat16)
    assert decoder is not None
    assert {p.dtype for p in tokenizer.encoder.parameters()} == {torch.bfloat16}
    assert decoder.unet.dtype == tokenizer.merger.norm_in.weight.dtype == torch.bfloat16
    exact = tokenizer.quantizer.codebook.embeddings, tokenizer.selector.judge[0].weight
    assert {tensor.dtype for tensor in exact} == {torch.float32}
    features = tokenizer.features(golden["pixel_values"]).float()
    assert error(features, golden["encoder_features"]) < 0.2
    decoder.set_progress_bar_config(disable=True)
    dtypes: list[torch.dtype] = []
    decoder.vae.decoder.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    codes = VisualCodes(golden["given.ids"], golden["given.lengths"]).take([0])
    image = draw(decoder, codes, golden["highres.latents"][:1], num_inference_steps=2)
    assert dtypes == [torch.float32] and bool(image.isfinite().all())  # force_upcast
    assert decoder.vae.dtype == torch.bfloat16


def test_strict_can_be_chosen(golden: dict[str, Tensor]):
    merged = {}
    for attention in ("compat", "strict"):
        tokenizer, _ = load_released(MINI, attention=attention, continuous=False)  # type: ignore[arg-type]
        assert tokenizer.config.attention == attention
        codes = tokenizer.encode_pixels(golden["pixel_values"])
        assert torch.equal(codes.keep, golden["argmax.keep"])  # the selector knows no attention
        with torch.no_grad():
            for block in tokenizer.merger.blocks:  # large scores, where the formulas part
                block.self_attention.query.weight *= 30
            merged[attention] = tokenizer.merge(golden["encoder_features"], golden["given.keep"])
    assert error(merged["strict"], merged["compat"]) > 0.01


# Memory options of diffusers


@pytest.mark.parametrize(
    "option", ["attention slicing", "VAE slicing", "offload of models", "offload of layers"]
)
def test_memory_options_leave_the_picture(
    golden: dict[str, Tensor], loaded: dict[str, Any], option: str
):
    _, plain = loaded["lowres"]
    codes = VisualCodes(golden["given.ids"], golden["given.lengths"])
    expected = draw(plain, codes, golden["lowres.latents"], num_inference_steps=2)
    _, decoder = load_released(MINI, "lowres", continuous=False)
    assert decoder is not None
    decoder.set_progress_bar_config(disable=True)
    if option == "attention slicing":
        decoder.enable_attention_slicing(1)
    elif option == "VAE slicing":
        decoder.vae.enable_slicing()
    else:
        pytest.importorskip("accelerate")
        if torch.cuda.is_available():
            turn_on = {
                "models": decoder.enable_model_cpu_offload,
                "layers": decoder.enable_sequential_cpu_offload,
            }
            turn_on[option.split()[-1]]()
        elif option == "offload of models":
            decoder.enable_model_cpu_offload(device="cpu")
        else:  # fails for diffusers' pipelines, too: the second pass finds tensors, not parameters
            pytest.skip("accelerate offloads layers from accelerators only")
    got = draw(decoder, codes, golden["lowres.latents"], num_inference_steps=2)
    assert error(got, expected) < 1e-3


def test_vae_tiling(golden: dict[str, Tensor]):
    _, decoder = load_released(MINI, "lowres", continuous=False)
    assert decoder is not None
    decoder.set_progress_bar_config(disable=True)
    codes = VisualCodes(golden["given.ids"], golden["given.lengths"]).take([0])
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    size = {"height": 96, "width": 64, "num_inference_steps": 2}
    whole = draw(decoder, codes, noise, **size)
    calls: list[int] = []
    decoder.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[2]))
    decoder.vae.enable_tiling()
    tiled = draw(decoder, codes, noise, **size)
    assert len(calls) > 1 and max(calls) < 12  # latent height of a tile
    assert tiled.shape == whole.shape and float((tiled - whole).abs().mean()) < 0.2


# Our own format


@pytest.mark.parametrize("kind", KINDS)
def test_convert(
    golden: dict[str, Tensor], loaded: dict[str, Any], kind: str, tmp_path: Path, capsys: Any
):
    out = tmp_path / "out"
    options = ["--decoder", "lowres"] if kind == "lowres" else []
    assert cli.main(["convert", str(MINI), str(out), *options]) == 0
    assert f"{kind} decoder" in capsys.readouterr().err and not list(out.rglob("*.bin"))
    tokenizer = VisualTokenizer.from_pretrained(out / "tokenizer")
    decoder = PixelDecoder.from_pretrained(out / "decoder")
    before, drawn = loaded[kind]
    assert tokenizer.config == before.config
    same_tensors(before, tokenizer)
    for part in ("conditioner", "unet", "vae"):
        same_tensors(getattr(drawn, part), getattr(decoder, part))
    scheduler = dict(decoder.scheduler.config)
    assert scheduler["steps_offset"] == 1 and scheduler["clip_sample"] is False
    codes = tokenizer.encode_pixels(golden["pixel_values"])
    assert torch.equal(codes.values, golden["argmax.ids"])
    features = tokenizer.features(golden["pixel_values"])
    embeds = tokenizer.embed_features(features, keep=golden["given.keep"])
    assert error(embeds, golden["given.llm_embeds"]) < 1e-4
    decoder.set_progress_bar_config(disable=True)
    given = VisualCodes(golden["given.ids"], golden["given.lengths"])
    assert error(draw(decoder, given, golden[f"{kind}.latents"]), golden[f"{kind}.image"]) < 1e-3


def test_convert_refuses_to_mix_files(tmp_path: Path, capsys: Any):
    (tmp_path / "something").write_text("already here")
    assert cli.main(["convert", str(MINI), str(tmp_path)]) == 2
    assert "expected a new or empty directory" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_large_models_are_sharded(
    loaded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer, _ = loaded["lowres"]
    save_weights(tokenizer, tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    (tmp_path / "config.json").write_text(json.dumps(tokenizer.config.to_dict()))
    tokenizer.image_processor.save_pretrained(tmp_path)
    monkeypatch.setattr(weights, "MAPPED", 100_000)
    again = VisualTokenizer.from_pretrained(tmp_path)
    same_tensors(tokenizer, again)
    load_weights(again, tmp_path)  # into a model that has memory already
