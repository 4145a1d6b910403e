"""VL-GPT's stage 1: a diffusion model's conditions are learned, each apart from the other, and it
is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.vlgpt_parts import TEXT, WIDTH, stage_one, tiny_diffusion
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lavit_lm.cli import main
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.objectives.vlgpt.diffusion import (
    ConditionEmbeddings,
    PixelDecoderDiffusion,
    load_diffusion,
)
from lavit_lm.objectives.vlgpt.image_decoder import DetokenizingDecoder
from lavit_lm.objectives.vlgpt.stable_diffusion import StableDiffusion
from lavit_lm.objectives.vlgpt.tokenizer import Detokenizer, VLGPTTokenizerConfig
from lavit_lm.objectives.vlgpt.tokenizer_files import load_tokenizer, read_config, save_tokenizer
from lavit_tok import VisualTokenizer, WeightsError

FOLDER = Path(__file__).parents[3] / "recipes" / "lm"
RECIPES = sorted(
    path
    for path in FOLDER.glob("*.yaml")
    if "lavit-lm fit-tokenizer -c recipes/lm/" + path.name in path.read_text()
)
CAPTIONS = ["a red apple", "two dogs run", "the old town hall", "rain at sunset"]
SHAPE = VLGPTTokenizerConfig(24, 4, 2, 2, 16)


def outputs(vectors: torch.Tensor) -> ImageVectors:
    return ImageVectors(vectors, torch.zeros_like(vectors[:1]))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    from lavit_lm.objectives.vlgpt import tokenizer as page

    assert page.__doc__ is not None
    sequences = [
        line.split()[1:5]
        for line in page.__doc__.splitlines()
        if line[:2] in ("v1", "v2", "t1", "t2")
    ]
    made = Detokenizer(SHAPE, (2, 6), (2, 8)).mask()
    assert [
        ["x" if output else "." for output in sequence] for sequence in made.tolist()
    ] == sequences and len(sequences) == 4
    assert Detokenizer(SHAPE, (3, 6), None).mask().all() and Detokenizer(
        SHAPE, None, (1, 8)
    ).mask().shape == (1, 1)
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
    assert isinstance(c, StableDiffusion) and c._pipeline is None, (
        "training reads neither U-Net nor VAE"
    )
    assert (c.image_shape, c.text_shape) == ((5, WIDTH) if grid else (1, 8), (TEXT, WIDTH))
    output, read = c.encode_images(images()), c.encode_texts(CAPTIONS)
    assert output.shape == (4, *c.image_shape) and read.shape == (4, *c.text_shape)
    opened = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images()]
    own, without = c.pipeline.encode_image(opened, "cpu", 1, grid)
    torch.testing.assert_close(output, own if grid else own[:, None])
    torch.testing.assert_close(
        c.null_embeddings().image, (without if grid else without[:, None])[:1]
    )
    text, negative = c.pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    torch.testing.assert_close(read, text)
    torch.testing.assert_close(c.null_embeddings().text, negative[:1])
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    ours = c.generate(ConditionEmbeddings(output[:1], read[:1]), **options, generator=generator())
    theirs = c.pipeline(
        CAPTIONS[0], ip_adapter_image=opened[0], **options, generator=generator()
    ).images
    assert ours[0].tobytes() == theirs[0].tobytes(), (
        "the pipeline draws the same by its own ways in"
    )
    unguided = c.generate(ConditionEmbeddings(output[:1], read[:1]), 2, 1.0, generator())
    assert unguided[0].tobytes() != ours[0].tobytes()
    with pytest.raises(ValueError, match="to generate from"):
        c.generate(ConditionEmbeddings(None, None))


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_numbers_that_are_none_are_refused(part: str, tmp_path: Path):
    config = tiny_diffusion(tmp_path)
    (file,) = (tmp_path / "diffusion" / part).glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{part}.*NaN or infinity in 1 tensors"):
        _ = load_diffusion(config, None).pipeline


def test_a_pixel_decoder_s_condition(where: Path):
    """X_rec, which its projection reads: drawn from it, a image is the one that its codes draw."""
    visual = VisualTokenizer.from_pretrained(where / "visual")
    c = load_diffusion({"kind": "pixel_decoder", "decoder": str(where / "decoder")}, visual)
    output = c.encode_images(images(2))
    torch.testing.assert_close(output, visual.reconstruct_features(visual.encode(images(2))))
    assert (
        output.shape == (2, *c.image_shape)
        and c.text_shape is None
        and c.null_embeddings() == (None, None)
    )
    ours = c.generate(ConditionEmbeddings(output, None), 2, 2.0, generator())
    theirs = c.decoder(visual.encode(images(2)), 2, 2.0, generator()).images
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in theirs]
    with pytest.raises(ValueError, match="no text condition: it was trained without captions"):
        c.encode_texts(CAPTIONS)
    with pytest.raises(ValueError, match="to generate from"):
        c.generate(ConditionEmbeddings(None, None))
    with pytest.raises(ValueError, match="loaded to generate only"):
        PixelDecoderDiffusion.load(None, str(where / "decoder")).encode_images(images())
    with pytest.raises(
        ValueError,
        match=r"decodes \(patches, codebook size\) \(64, 2048\), the visual tokenizer has",
    ):
        load_diffusion({"kind": "pixel_decoder"}, visual)


def test_conditions_that_are_refused(tmp_path: Path):
    for settings in ({"kind": "os.system"}, {"kind": "pixel_decoder", "temperature": 3}, {}):
        with pytest.raises(
            ValueError, match=r"expected one of \['pixel_decoder', 'stable_diffusion'\]"
        ):
            load_diffusion(settings, None)
    settings = tiny_diffusion(tmp_path)
    with pytest.raises(WeightsError, match="expected a safetensors file"):
        load_diffusion({**settings, "weights": "ip-adapter.bin"}, None)
    with pytest.raises(WeightsError, match="expected the weights of an IP-Adapter"):
        load_diffusion({**settings, "weights": "other.safetensors"}, None)
    with pytest.raises(WeightsError, match="nowhere"):
        load_diffusion({**settings, "model": str(tmp_path / "nowhere")}, None)


def test_vlgpt_02_the_loss_is_the_sum(where: Path):
    """By hand, and each weight at 0 leaves the other's branch alone."""
    settings = tiny_diffusion(where)
    stage = stage_one(where, 24, settings, image_weight=0.5, text_weight=2.0)
    assert stage.weights == {"image": 0.5, "text": 2.0}
    own, parameters = stage.conditions, dict(stage.model.detokenizer.named_parameters())
    branches = {"image": ("queries.image", "heads.image"), "text": ("queries.text", "heads.text")}
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
            found = [p.grad for key, p in parameters.items() if key.startswith(branches[name])]
            assert len(found) == 3 and any(g is not None and bool(g.any()) for g in found) == (
                weight > 0
            ), name
    with pytest.raises(
        ValueError,
        match=r"more than 0 for a condition that the diffusion model has \(image, text\)",
    ):
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
    import diffusers

    from lavit_tok.encode.vision_encoder import VisionEncoder

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
        with pytest.raises(AssertionError, match="ran in training"):
            DetokenizingDecoder.from_pretrained(out).decode(
                outputs(torch.zeros(1, 4, 24)), num_inference_steps=1
            )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_train(recipe: Path, folder: Path, tiny_decoder: Any):
    """Two steps at reduced width, everything else as the recipe predicts."""
    head = recipe.read_text()
    for word in ("command:", "hardware:", "time:", "expected:"):
        assert word in head
    tiny_decoder.save_pretrained(folder / "decoder")
    generated = yaml.safe_load(head)["model"]["conditions"]
    own = {"pixel_decoder": lambda: {"kind": "pixel_decoder", "decoder": str(folder / "decoder")}}
    conditions = {**own, "stable_diffusion": lambda: tiny_diffusion(folder)}[generated["kind"]]()
    assert set(conditions) == set(generated)
    words = [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.num_nodes=1",
        "--trainer.strategy=auto",
    ]
    words += ["--trainer.max_steps=2", "--trainer.callbacks=[]", "--trainer.val_check_interval=2"]
    words += [
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
    ]
    words += ["--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={folder}/run"]
    words += [
        f"--model.visual_tokenizer={folder}/visual",
        f"--model.out={folder}/made",
        "--model.schedule.warmup_steps=1",
    ]
    words += [
        f"--model.conditions={json.dumps(conditions)}",
        "--model.width=24",
        "--model.transformer.hidden_size=32",
    ]
    words += ["--model.transformer.depth=1", "--model.transformer.heads=2"]
    words += [
        f"--data.data={folder}/pictures",
        "--data.image_size=32",
        "--data.batch_size=2",
        "--data.num_workers=0",
    ]
    assert main(["fit-tokenizer", "-c", str(recipe), *words]) == 0
    assert (
        read_config(folder / "made")["sizes"].queries
        == yaml.safe_load(head)["model"]["transformer"]["queries"]
    )


def test_vlgpt_01_tokens_are_causal_and_frozen_parts_stay(where: Path):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    stage = stage_one(where, 24, tiny_diffusion(where), lr=1e-2, warmup_steps=0)
    with torch.no_grad():
        vectors = stage.model.vectors(images())
        assert vectors.shape == (4, 4, 24)
        queries = stage.model.tokenizer.queries
        for query in range(4):
            before = queries.clone()
            queries[query] += torch.randn(queries.shape[1], generator=generator(query))
            other = stage.model.vectors(images())
            assert torch.equal(other[:, :query], vectors[:, :query]), (
                "a later query changes no earlier vector"
            )
            assert not torch.allclose(other[:, query], vectors[:, query])
            queries.copy_(before)
    own = stage.conditions
    visual = stage.model.tokenizer._tokenizer[0]
    frozen = {"text": own.text_encoder, "image": own.image_encoder, "visual": visual}
    keep = {
        name: {k: t.clone() for k, t in part.state_dict().items()} for name, part in frozen.items()
    }
    learnt = {name: p.detach().clone() for name, p in stage.named_parameters()}
    assert all(name.startswith(("model.tokenizer", "model.detokenizer")) for name in learnt)
    assert not [name for name in learnt if "encoder" in name], (
        "the two transformers alone are trained"
    )
    fitted = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=where,
    )  # fmt: skip
    batch = {"images": images(), "captions": CAPTIONS}
    fitted.fit(stage, DataLoader([batch] * 3, batch_size=None))
    for name, part in frozen.items():
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, keep[name][key]), f"{name}: {key}"
    assert all(not torch.equal(p, learnt[name]) for name, p in stage.named_parameters()), (
        "all of it is trained"
    )


def test_saved_and_read_strictly(where: Path):
    visual = VisualTokenizer.from_pretrained(where / "visual")
    stage = stage_one(where, 24)
    save_tokenizer(where / "stage", stage.model, str(where / "visual"), stage.conditions.config)
    read = load_tokenizer(where / "stage", visual)
    torch.testing.assert_close(read.vectors(read.features(images())), stage.model.vectors(images()))
    decoder = DetokenizingDecoder.from_pretrained(where / "stage")
    vectors = stage.model.vectors(images(1)).detach()
    torch.testing.assert_close(
        decoder.detokenizer(vectors).image, stage.model.detokenizer(vectors).image
    )
    assert decoder.decode(outputs(vectors), generator=generator(), num_inference_steps=2)[
        0
    ].size == (16, 16)
    save_tokenizer(
        where / "half", stage.model, str(where / "visual"), stage.conditions.config, ["text"]
    )
    with pytest.raises(ValueError, match="to generate from"):
        DetokenizingDecoder.from_pretrained(where / "half").decode(outputs(vectors))
    with pytest.raises(WeightsError, match="expected a new or empty directory"):
        save_tokenizer(where, stage.model, "", {})
    with pytest.raises(WeightsError, match="expected a new or empty directory"):
        stage_one(where, 24, out=str(where))
    with pytest.raises(ValueError, match="leave_out: expected 'image', 'text' or None, got 'both'"):
        decoder.decode(outputs(vectors), leave_out="both")
    other = VisualTokenizer(visual.config)
    with pytest.raises(WeightsError, match="would be noise"):
        load_tokenizer(where / "stage", other)
    config = json.loads((where / "stage" / "config.json").read_text())
    for wrong, message in (
        ({"sizes": {**config["sizes"], "depth": 3}}, r"blocks\.2"),
        (
            {"sizes": {"wide": 3}},
            "missing a required argument: .width.|unexpected keyword argument",
        ),
        ({"version": 2}, "expected lavit_lm.vlgpt_tokenizer version 1"),
    ):
        (where / "stage" / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(WeightsError, match=message):
            load_tokenizer(where / "stage", visual)
    (where / "stage" / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"expected a JSON object"):
        read_config(where / "stage")
    with pytest.raises(WeightsError, match="written by lavit-lm fit-tokenizer"):
        read_config(where / "nowhere")


def test_vlgpt_07_what_is_overfitted(where: Path):
    """32 images; then each condition's estimate is near what it is to be, and either left out
    changes the sample.
    """
    stage = stage_one(where, 32, tiny_diffusion(where), queries=8, hidden_size=64)
    colours = torch.randint(256, (32, 3, 2, 2), generator=generator(), dtype=torch.uint8)
    shown = colours.repeat_interleave(16, 2).repeat_interleave(16, 3)
    words = [f"{CAPTIONS[i % 4]} {i}" for i in range(32)]
    targets = stage.targets(shown, words)
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
        # Around the mean of all images, which a detokenizer that does not look at all would say.
        about = [one - e.mean(0) for one in (z, e)]
        assert F.cosine_similarity(z, e, dim=-1).mean() > 0.9
        assert F.cosine_similarity(*[one.flatten(1) for one in about], dim=-1).mean() > 0.5
    save_tokenizer(where / "stage", stage.model, str(where / "visual"), stage.conditions.config)
    decoder = DetokenizingDecoder.from_pretrained(where / "stage")
    vectors = stage.model.vectors(shown[:1]).detach()
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    drawn = {
        left: list(
            decoder.decode(outputs(vectors), leave_out=left, generator=generator(), **options)[
                0
            ].tobytes()
        )
        for left in (None, "image", "text")
    }
    assert drawn[None] == list(
        decoder.decode(outputs(vectors), generator=generator(), **options)[0].tobytes()
    )
    assert drawn[None] != drawn["image"] != drawn["text"] != drawn[None]
