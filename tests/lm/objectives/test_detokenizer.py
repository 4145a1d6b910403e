"""VL-GPT's stage 1: a diffusion model's conditions are learned, each apart from the other, and it
is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from helpers.files import rewrite
from helpers.lm_runs import CAPTIONS
from helpers.tensors import generator
from helpers.trainers import quiet_trainer, recipes_of, two_steps
from helpers.vlgpt_parts import TEXT, WIDTH, stage_one, tiny_diffusion
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lavit_lm.cli import main
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.objectives.vlgpt import tokenizer as page
from lavit_lm.objectives.vlgpt.diffusion import (
    ConditionEmbeddings,
    PixelDecoderDiffusion,
    load_diffusion,
)
from lavit_lm.objectives.vlgpt.image_decoder import DetokenizingDecoder
from lavit_lm.objectives.vlgpt.stable_diffusion import StableDiffusion
from lavit_lm.objectives.vlgpt.tokenizer import Detokenizer, VLGPTTokenizerConfig
from lavit_lm.objectives.vlgpt.tokenizer_files import load_tokenizer, read_config, save_tokenizer
from lavit_tok import PixelDecoder, VisualTokenizer, WeightsError
from lavit_tok.encode.vision_encoder import VisionEncoder

RECIPES = recipes_of("lavit-lm fit-tokenizer")
SHAPE = VLGPTTokenizerConfig(24, 4, 2, 2, 16)


def outputs(vectors: torch.Tensor) -> ImageVectors:
    return ImageVectors(vectors, torch.zeros_like(vectors[:1]))


def images(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), generator=generator(), dtype=torch.uint8)


def raises(*_: Any, **__: Any) -> Any:
    raise AssertionError("the diffusion model ran in training")


@pytest.fixture
def where(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, tmp_path: Path) -> Path:
    """Folders of a visual tokenizer and of a pixel decoder that draws its codes."""
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    return tmp_path


def test_the_drawing_of_the_mask():
    lines = (page.__doc__ or "").splitlines()
    drawn = [line.split()[1:5] for line in lines if line[:2] in ("v1", "v2", "t1", "t2")]
    made = Detokenizer(SHAPE, (2, 6), (2, 8)).mask()
    assert [["x" if flag else "." for flag in row] for row in made.tolist()] == drawn
    assert len(drawn) == 4 and Detokenizer(SHAPE, (3, 6), None).mask().all()
    assert Detokenizer(SHAPE, None, (1, 8)).mask().shape == (1, 1)
    with pytest.raises(ValueError, match="without any condition"):
        Detokenizer(SHAPE, None, None)


def test_each_condition_is_estimated_as_if_alone():
    both = Detokenizer(SHAPE, (3, 6), (2, 8))
    vectors = torch.randn(2, 4, 24, generator=generator())
    with torch.no_grad():
        whole = both(vectors)
        assert whole.image.shape == (2, 3, 6) and whole.text.shape == (2, 2, 8)
        both.queries["image"].add_(torch.randn(3, 16, generator=generator(1)))
        moved = both(vectors)
    torch.testing.assert_close(moved.text, whole.text)
    assert not torch.allclose(moved.image, whole.image)


@pytest.mark.parametrize("grid", [True, False])
def test_stable_diffusion_s_own_encoders(grid: bool, tmp_path: Path):
    """e_v and e_t are what the pipeline itself would be conditioned on."""
    c = load_diffusion(tiny_diffusion(tmp_path, grid), None)
    assert isinstance(c, StableDiffusion)
    assert c._pipeline is None, "training reads neither U-Net nor VAE"
    assert (c.image_shape, c.text_shape) == ((5, WIDTH) if grid else (1, 8), (TEXT, WIDTH))
    output, read = c.encode_images(images()), c.encode_texts(CAPTIONS)
    assert output.shape == (4, *c.image_shape) and read.shape == (4, *c.text_shape)
    opened = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images()]
    own, without = c.pipeline.encode_image(opened, "cpu", 1, grid)
    if not grid:
        own, without = own[:, None], without[:, None]
    torch.testing.assert_close(output, own)
    torch.testing.assert_close(c.null_embeddings().image, without[:1])
    text, negative = c.pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    torch.testing.assert_close(read, text)
    torch.testing.assert_close(c.null_embeddings().text, negative[:1])
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    both = ConditionEmbeddings(output[:1], read[:1])
    ours = c.generate(both, **options, generator=generator())[0]
    given = {"ip_adapter_image": opened[0], "generator": generator()}
    (theirs,) = c.pipeline(CAPTIONS[0], **given, **options).images
    assert ours.tobytes() == theirs.tobytes(), "the pipeline generates the same from its inputs"
    assert c.generate(both, 2, 1.0, generator())[0].tobytes() != ours.tobytes()
    with pytest.raises(ValueError, match="to generate from"):
        c.generate(ConditionEmbeddings(None, None))


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_numbers_that_are_none_are_refused(part: str, tmp_path: Path):
    config = tiny_diffusion(tmp_path)
    (file,) = (tmp_path / "diffusion" / part).glob("*.safetensors")
    rewrite(file, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{part}.*NaN or infinity in 1 tensors"):
        _ = load_diffusion(config, None).pipeline


def test_a_pixel_decoder_s_condition(where: Path):
    """X_rec, which its projection reads: the image generated from it is that of its codes."""
    visual, path = VisualTokenizer.from_pretrained(where / "visual"), str(where / "decoder")
    c = load_diffusion({"kind": "pixel_decoder", "decoder": path}, visual)
    output, codes = c.encode_images(images(2)), visual.encode(images(2))
    torch.testing.assert_close(output, visual.reconstruct_features(codes))
    assert output.shape == (2, *c.image_shape) and c.text_shape is None
    assert c.null_embeddings() == (None, None)
    ours = c.generate(ConditionEmbeddings(output, None), 2, 2.0, generator())
    theirs = c.decoder(codes, 2, 2.0, generator()).images
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in theirs]
    with pytest.raises(ValueError, match="no text condition: it was trained without captions"):
        c.encode_texts(CAPTIONS)
    with pytest.raises(ValueError, match="to generate from"):
        c.generate(ConditionEmbeddings(None, None))
    with pytest.raises(ValueError, match="loaded to generate only"):
        PixelDecoderDiffusion.load(None, path).encode_images(images())
    expected = r"decodes \(patches, codebook size\) \(64, 2048\), the visual tokenizer has"
    with pytest.raises(ValueError, match=expected):
        load_diffusion({"kind": "pixel_decoder"}, visual)


def test_a_sample_decoder_s_condition():
    """Features and colors of all nested codes; the image is the sample decoder's."""
    visual = VisualTokenizer.from_pretrained()
    c = load_diffusion({"kind": "pixel_decoder", "decoder": "default"}, visual)
    opened = torch.randint(0, 256, (2, 3, 128, 128), generator=generator()).byte()
    output, codes = c.encode_images(opened), visual.encode(opened, 256)
    assert output.shape == (2, *c.image_shape) == (2, 256, 192 + 48)
    torch.testing.assert_close(output, c.decoder.conditioner.features(codes))
    ours = c.generate(ConditionEmbeddings(output, None), generator=generator())
    theirs = c.decoder(codes, generator=generator(), mode="sample").images
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in theirs]
    half = PixelDecoder.from_pretrained(dtype=torch.bfloat16)
    assert len(half.decode_features(output, "mean")) == 2, "features of another dtype"
    means = PixelDecoder(c.decoder.conditioner, mean_decoder=c.decoder.mean_decoder)
    with pytest.raises(ValueError, match="with a diffusion model or a sample decoder, got 'means'"):
        PixelDecoderDiffusion(means, visual, "means")
    with pytest.raises(ValueError, match="mode: expected a decoder with a 'sample' decoder"):
        means.decode_features(output)


def test_conditions_that_are_refused(tmp_path: Path):
    kinds = r"expected one of \['pixel_decoder', 'stable_diffusion'\]"
    for settings in ({"kind": "os.system"}, {"kind": "pixel_decoder", "temperature": 3}, {}):
        with pytest.raises(ValueError, match=kinds):
            load_diffusion(settings, None)
    settings = tiny_diffusion(tmp_path)
    for name, value, reason in (
        ("weights", "ip-adapter.bin", "expected a safetensors file"),
        ("weights", "other.safetensors", "expected the weights of an IP-Adapter"),
        ("model", str(tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(WeightsError, match=reason):
            load_diffusion({**settings, name: value}, None)


def test_vlgpt_02_the_loss_is_the_sum(where: Path):
    """By hand, and each weight at 0 leaves the other's branch alone."""
    settings = tiny_diffusion(where)
    stage = stage_one(where, 24, settings, image_weight=0.5, text_weight=2.0)
    assert stage.weights == {"image": 0.5, "text": 2.0}
    own, parameters = stage.conditions, dict(stage.model.detokenizer.named_parameters())
    for image, text in ((0.5, 2.0), (0.0, 1.0), (1.0, 0.0)):
        stage.weights = {"image": image, "text": text}
        stage.zero_grad()
        estimated = stage.model(images())
        loss = stage.total(stage.losses(estimated, stage.targets(images(), CAPTIONS)))
        with torch.no_grad():
            by_hand = image * (estimated.image - own.encode_images(images())).square().mean()
            by_hand += text * (estimated.text - own.encode_texts(CAPTIONS)).square().mean()
        torch.testing.assert_close(loss.detach(), by_hand)
        loss.backward()
        for name, weight in stage.weights.items():
            branch = (f"queries.{name}", f"heads.{name}")
            found = [p.grad for key, p in parameters.items() if key.startswith(branch)]
            moved = any(grad is not None and bool(grad.any()) for grad in found)
            assert len(found) == 3 and moved == (weight > 0), name
    condition = r"more than 0 for a condition that the diffusion model has \(image, text\)"
    with pytest.raises(ValueError, match=condition):
        stage_one(where, 24, settings, image_weight=0.0, text_weight=0.0)
    half = stage_one(where, 24, settings, text_weight=0.0)
    still = {name for name, p in half.model.named_parameters() if not p.requires_grad}
    assert half.learned == ["image"] and len(still) == 3 and all("text" in name for name in still)
    with pytest.raises(ValueError, match=r"model has \(image\), got \(0.0, 1.0\)"):
        stage_one(where, 24, image_weight=0.0)
    with pytest.raises(ValueError, match=r"the data have none: set data\.caption_column"):
        stage_one(where, 24, settings).targets(images(), None)


def test_vlgpt_02_the_diffusion_model_never_runs(
    folder: Path, tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch
):
    """Both kinds of conditions, trained by the command; frozen parts stay as they were, byte by
    byte.
    """
    tiny_decoder.save_pretrained(folder / "decoder")
    for kind in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler):
        for name in {"forward", "decode", "encode", "step"} & set(dir(kind)):
            monkeypatch.setattr(kind, name, raises)
    output: list[Any] = []
    monkeypatch.setattr(VisionEncoder, "train", lambda self, mode=True: output.append(mode) or self)
    settings = {"kind": "pixel_decoder", "decoder": str(folder / "decoder")}
    for conditions in (settings, tiny_diffusion(folder)):
        out = folder / conditions["kind"]
        config = folder / "recipe.yaml"
        config.write_text(f"""
seed_everything: 0
trainer: {{accelerator: cpu, max_steps: 3, logger: false, enable_progress_bar: false,
  num_sanity_val_steps: 0,
  enable_checkpointing: false, default_root_dir: {out}-run}}
model: {{width: 24, visual_tokenizer: {folder}/visual, out: {out},
  transformer: {{queries: 4, depth: 1, heads: 2}},
  conditions: {json.dumps(conditions)}}}
data: {{data: {folder}/pictures, image_size: 32, batch_size: 4, caption_column: caption}}
""")
        assert main(["fit-tokenizer", "-c", str(config)]) == 0
        values = read_config(out)
        assert values["diffusion"] == conditions and values["sizes"].queries == 4
        assert (values["text"] is None) == (conditions is settings)
        decoder, vectors = DetokenizingDecoder.from_pretrained(out), torch.zeros(1, 4, 24)
        with pytest.raises(AssertionError, match="ran in training"):
            decoder.decode(outputs(vectors), num_inference_steps=1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_train(recipe: Path, folder: Path, tiny_decoder: Any):
    """Two steps at reduced width, everything else as in the recipe."""
    tiny_decoder.save_pretrained(folder / "decoder")
    model = yaml.safe_load(recipe.read_text())["model"]
    kind = model["conditions"]["kind"]
    decoder = {"kind": "pixel_decoder", "decoder": str(folder / "decoder")}
    conditions = decoder if kind == "pixel_decoder" else tiny_diffusion(folder)
    assert set(conditions) == set(model["conditions"]) and conditions["kind"] == kind
    queries = model["transformer"]["queries"]
    if model["transformer"].get("pooled_queries"):
        queries = 16  # the patches of the small tokenizer, at most
    overrides = {
        "trainer.default_root_dir": folder / "run",
        "model.visual_tokenizer": folder / "visual",
        "model.out": folder / "made",
        "model.schedule.warmup_steps": 1,
        "model.conditions": json.dumps(conditions),
        "model.width": 24,
        "model.transformer.hidden_size": 32,
        "model.transformer.depth": 1,
        "model.transformer.heads": 2,
        "model.transformer.queries": queries,
        "data.data": folder / "pictures",
        "data.image_size": 32,
        "data.batch_size": 2,
    }
    assert main(["fit-tokenizer", *two_steps(recipe, overrides)]) == 0
    assert read_config(folder / "made")["sizes"].queries == queries


def test_vlgpt_01_tokens_are_causal_and_frozen_parts_stay(where: Path):
    stage = stage_one(where, 24, tiny_diffusion(where), lr=1e-2, warmup_steps=0)
    with torch.no_grad():
        vectors, queries = stage.model.vectors(images()), stage.model.tokenizer.queries
        assert vectors.shape == (4, 4, 24)
        for query in range(4):
            before = queries.clone()
            queries[query] += torch.randn(queries.shape[1], generator=generator(query))
            other = stage.model.vectors(images())
            assert torch.equal(other[:, :query], vectors[:, :query]), "no earlier vector changes"
            assert not torch.allclose(other[:, query], vectors[:, query])
            queries.copy_(before)
    own, visual = stage.conditions, stage.model.tokenizer._tokenizer[0]
    frozen = {"text": own.text_encoder, "image": own.image_encoder, "visual": visual}

    def state() -> dict[str, torch.Tensor]:
        states = {name: part.state_dict() for name, part in frozen.items()}
        return {f"{n} {k}": t.clone() for n, tensors in states.items() for k, t in tensors.items()}

    kept = state()
    start = {name: p.detach().clone() for name, p in stage.named_parameters()}
    assert all(name.startswith(("model.tokenizer", "model.detokenizer")) for name in start)
    assert not [name for name in start if "encoder" in name], "the two transformers alone"
    batch = {"images": images(), "captions": CAPTIONS}
    quiet_trainer(where, 3).fit(stage, DataLoader([batch] * 3, batch_size=None))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state().items())
    still = [name for name, p in stage.named_parameters() if torch.equal(p, start[name])]
    assert not still, "all of it is trained"


@pytest.mark.parametrize("pooled", [False, True])
def test_saved_and_read_strictly(where: Path, pooled: bool):
    visual, path = VisualTokenizer.from_pretrained(where / "visual"), where / "stage"
    stage = stage_one(where, 24, pooled_queries=pooled)
    config = stage.conditions.config
    save_tokenizer(path, stage.model, str(where / "visual"), config)
    read = load_tokenizer(path, visual)
    torch.testing.assert_close(read.vectors(read.features(images())), stage.model.vectors(images()))
    decoder = DetokenizingDecoder.from_pretrained(path)
    vectors = stage.model.vectors(images(1)).detach()
    ours, theirs = (one(vectors).image for one in (decoder.detokenizer, stage.model.detokenizer))
    torch.testing.assert_close(ours, theirs)
    (image,) = decoder.decode(outputs(vectors), generator=generator(), num_inference_steps=2)
    assert image.size == (16, 16)
    save_tokenizer(where / "half", stage.model, str(where / "visual"), config, ["text"])
    with pytest.raises(ValueError, match="to generate from"):
        DetokenizingDecoder.from_pretrained(where / "half").decode(outputs(vectors))
    with pytest.raises(WeightsError, match="expected a new or empty directory"):
        save_tokenizer(where, stage.model, "", {})
    with pytest.raises(WeightsError, match="expected a new or empty directory"):
        stage_one(where, 24, out=str(where))
    with pytest.raises(ValueError, match="leave_out: expected 'image', 'text' or None, got 'both'"):
        decoder.decode(outputs(vectors), leave_out="both")
    with pytest.raises(WeightsError, match="would be noise"):
        load_tokenizer(path, VisualTokenizer(visual.config))
    values = json.loads((path / "config.json").read_text())
    for wrong, message in (
        ({"sizes": {**values["sizes"], "depth": 3}}, r"blocks\.2"),
        ({"sizes": {"wide": 3}}, "missing a required argument: .width.|unexpected keyword argum"),
        ({"version": 2}, "expected lavit_lm.vlgpt_tokenizer version 1"),
    ):
        (path / "config.json").write_text(json.dumps({**values, **wrong}))
        with pytest.raises(WeightsError, match=message):
            load_tokenizer(path, visual)
    (path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"expected a JSON object"):
        read_config(path)
    with pytest.raises(WeightsError, match="written by lavit-lm fit-tokenizer"):
        read_config(where / "nowhere")


def test_vlgpt_07_what_is_overfitted(where: Path):
    """32 images; then each condition's estimate is near its target, and either left out changes
    the sample.
    """
    stage = stage_one(where, 32, tiny_diffusion(where), queries=8, hidden_size=64)
    colors = torch.randint(256, (32, 3, 2, 2), generator=generator(), dtype=torch.uint8)
    shown = colors.repeat_interleave(16, 2).repeat_interleave(16, 3)
    targets = stage.targets(shown, [f"{CAPTIONS[i % 4]} {i}" for i in range(32)])
    features = stage.model.tokenizer.features(shown)
    optimizer = torch.optim.AdamW(stage.model.parameters(), 4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        estimated = stage.model.detokenizer(stage.model.tokenizer.vectors(features))
        loss = stage.total(stage.losses(estimated, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for z, e in zip(estimated, targets, strict=True):
        # Around the mean of all images, which a detokenizer that ignores its input would predict.
        about = [(one - e.mean(0)).flatten(1) for one in (z, e)]
        assert F.cosine_similarity(z, e, dim=-1).mean() > 0.9
        assert F.cosine_similarity(*about, dim=-1).mean() > 0.5
    save_tokenizer(where / "stage", stage.model, str(where / "visual"), stage.conditions.config)
    decoder = DetokenizingDecoder.from_pretrained(where / "stage")
    vectors = outputs(stage.model.vectors(shown[:1]).detach())

    def decoded(**more: Any) -> bytes:
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator()}
        return bytes(decoder.decode(vectors, **options, **more)[0].tobytes())

    whole, image, text = (decoded(leave_out=left) for left in (None, "image", "text"))
    assert whole == decoded() and len({whole, image, text}) == 3
