"""The decoder of vectors by codes: its sequences, its training, its files and its commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.emu_parts import EMU, N, built
from helpers.lm_parts import image, processor_and_model
from helpers.lm_runs import CAPTIONS, Losses, data, saving, trainer
from helpers.tensors import generator
from helpers.trainers import recipes_of, trainer_of, two_steps

from lavit_lm import MultimodalLM, TextSegment
from lavit_lm.checkpoints.native import save_model
from lavit_lm.cli import main
from lavit_lm.generation.codes_decoder import VectorCodesDecoder
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives import by_name
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.objectives.vector_codes import VectorCodes
from lavit_lm.sequences.packing import pad
from lavit_lm.sequences.segments import ImageSegment, Segment, SegmentLength
from lavit_lm.sequences.token_sequence import Role
from lavit_lm.training.codes_decoder import CodesDecoderTraining
from lavit_tok import VisualTokenizer, WeightsError

RECIPES = recipes_of("lavit-lm fit-codes-decoder")
SIZES: dict[str, Any] = {"vectors": N, "width": 16, "depth": 1, "heads": 2, "hidden_size": 16}


@pytest.fixture
def parts(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, folder: Path) -> dict[str, str]:
    """Directories of an LM of vectors, an LM of codes, and a pixel decoder, beside shards/."""
    shared = str(folder / "visual"), tiny_tokenizer.fingerprint()
    save_model(folder / "lm", *_swapped(built(tiny_tokenizer)), EMU, *shared)
    save_model(folder / "codes", *_swapped(processor_and_model()), LaVIT(), *shared)
    tiny_decoder.save_pretrained(folder / "pixels")
    names = {"model": "lm", "lm": "codes", "visual_tokenizer": "visual", "pixel_decoder": "pixels"}
    return {name: str(folder / path) for name, path in names.items()}


def _swapped(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    processor, model = pair
    return model, processor


def training(parts: dict[str, str], **settings: Any) -> CodesDecoderTraining:
    small = {"depth": 1, "heads": 2, "hidden_size": 32, "warmup_steps": 1, "lr": 3e-3}
    return trainer_of(CodesDecoderTraining, **parts, **{**small, "visual_lr": 3e-3, **settings})


@pytest.fixture
def directory(parts: dict[str, str], folder: Path) -> Path:
    """A decoder with random weights."""
    processor, plain = processor_and_model()
    objective = VectorCodes(**SIZES, pixel_decoder=parts["pixel_decoder"])
    visual = VisualTokenizer.from_pretrained(parts["visual_tokenizer"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        bridge: Any = objective.connectors.build(visual, 16)[0]
    bridge.reader.out[1].weight.data.mul_(30)  # so that codes depend on the vectors
    model = SequenceModel(plain.lm, bridge, restricted=processor.vocabulary)
    shared = parts["visual_tokenizer"], visual.fingerprint()
    save_model(folder / "decoder", model, processor, objective, *shared)
    return folder / "decoder"


def outputs(count: int = 3) -> ImageVectors:
    draw = generator(7)
    return ImageVectors(
        torch.randn(count, N, 16, generator=draw), torch.randn(1, N, 16, generator=draw)
    )


def test_sequence():
    """<s> v1 v2 v3 <img> c c </img>, of which codes and </img> are predicted."""
    processor, _ = processor_and_model()
    objective, v = VectorCodes(**SIZES, prompt_drop=0.0), processor.vocabulary
    codes, text = image(0, 2), TextSegment("a red apple")
    sequence = objective.layout([codes, text], processor, generator(), "key")
    assert codes.codes is not None
    made = [*processor.start, *[processor.pad] * N, v.begin, *v.to_ids(codes.codes).tolist(), v.end]
    assert sequence.ids.tolist() == made and sequence.key == "a red apple"
    roles = [Role.TEXT, *[Role.VISUAL] * N, Role.BEGIN, Role.VISUAL, Role.VISUAL, Role.END]
    assert sequence.roles.tolist() == [int(role) for role in roles]
    assert sequence.is_embedding.nonzero().flatten().tolist() == [1, 2, 3]
    assert sequence.predict.nonzero().flatten().tolist() == [5, 6, 7]
    lengths = [SegmentLength(2), SegmentLength(3, "a red apple")]
    assert objective.sequence_length(lengths, processor, generator()) == len(sequence)
    assert objective.layout([codes], processor, generator(), "key").key == ""
    always = VectorCodes(**SIZES, prompt_drop=1.0)
    assert always.layout([text, codes], processor, generator(), "key").key == ""
    assert by_name("vector_codes")(**always.to_dict()) == always


def test_what_cannot_be_a_sequence():
    processor, _ = processor_and_model()
    objective, text = VectorCodes(**SIZES), TextSegment("rain")
    wrong: tuple[list[Segment], ...] = ([text], [image(0), image(1)], [image(0), text, text])
    for segments in wrong:
        with pytest.raises(ValueError, match="'k': expected the codes of one image"):
            objective.layout(segments, processor, generator(), "k")
    vectors = ImageSegment(image=torch.zeros(N, 16))
    for segments, output in (
        ([text], "image"),
        ([], "image"),
        ([vectors], "text"),
        ([image(0)], "image"),
    ):
        with pytest.raises(ValueError, match="give it as the image decoder"):
            objective.prompt(segments, processor, output)  # type: ignore[arg-type]
    for name, value in (("vectors", 0), ("heads", 3), ("prompt_drop", 1.5)):
        with pytest.raises(ValueError, match="expected"):
            VectorCodes(**{**SIZES, name: value})


def test_saved_decodes_independently_of_the_batch(directory: Path):
    """With a generator for each image; guidance subtracts what follows the empty prompt."""
    decoder, given = VectorCodesDecoder.from_pretrained(directory), outputs()
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}

    def drawn(images: list[int], free: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        generators = [generator(i) for i in images]
        some = ImageVectors(given.vectors[images], free)
        return decoder.decode(some, generators, guidance_scale=scale, **options)

    together = drawn([0, 1, 2], given.unconditional)
    for i in range(3):
        torch.testing.assert_close(drawn([i], given.unconditional)[0], together[i])
    assert not torch.equal(together[0], together[1])
    other = given.vectors[:1]
    assert torch.equal(drawn([1, 2], other, 1.0), drawn([1, 2], given.unconditional, 1.0))
    assert not torch.equal(drawn([1, 2], other, 9.0), drawn([1, 2], given.unconditional, 9.0))
    assert len(decoder.decode(given, num_inference_steps=1)) == 3, "without a generator"
    again = VectorCodesDecoder.from_pretrained(directory)
    same = again.decode(given, [generator(i) for i in range(3)], guidance_scale=2.0, **options)
    assert torch.equal(same, together)


def test_what_is_no_decoder(directory: Path, parts: dict[str, str], tmp_path: Path):
    with pytest.raises(WeightsError, match=r"got a language model \(lavit\): give it as the model"):
        VectorCodesDecoder.from_pretrained(parts["lm"])
    decoder = VectorCodesDecoder.from_pretrained(directory)
    shape = rf"expected {N} vectors of width 16 per image, got shape \[2, 5, 16\]"
    with pytest.raises(ValueError, match=shape):
        decoder.decode(ImageVectors(torch.zeros(1, 5, 16), torch.zeros(1, 5, 16)))
    lm = MultimodalLM.from_pretrained(directory, decoder=None)
    with pytest.raises(ValueError, match="give it as the image decoder"):
        lm.generate_codes("rain")
    visual = VisualTokenizer.from_pretrained(parts["visual_tokenizer"])
    with torch.no_grad():
        decoder.pixels.pipeline.conditioner.codebook.embeddings.add_(
            torch.randn(visual.quantizer.codebook.embeddings.shape, generator=generator())
        )
    decoder.pixels.pipeline.save_pretrained(parts["pixel_decoder"])
    with pytest.raises(WeightsError, match="codes would decode to unrelated images"):
        VectorCodesDecoder.from_pretrained(directory)
    with pytest.raises(ValueError, match=r"expected one that generates vectors, got .*\(lavit\)"):
        training({**parts, "model": parts["lm"]})


def test_learns_codes_from_captions(parts: dict[str, str]):
    """The loss falls, by what the captions say and not only by what images have in common."""
    module = training(parts, prompt_drop=0.0)
    module.configure_model()
    assert module.model is not None
    model, objective = module.model.train(), module.objective
    pairs = [[image(i, 4), TextSegment(CAPTIONS[i])] for i in range(4)]
    sequences = [objective.layout(p, module.processor, generator(), "") for p in pairs]
    batch = module.on_after_batch_transfer(pad(sequences, module.processor.pad), 0)
    expected = module.frozen_lm.module.generate_vectors_batch(CAPTIONS)
    torch.testing.assert_close(batch.images, expected, atol=2e-3, rtol=2e-3)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)

    def loss(of: Any) -> torch.Tensor:
        return objective.total(objective.losses(model(of), of))

    before = float(loss(batch))
    reader = model.bridge.reader  # type: ignore[union-attr]
    torch.testing.assert_close(reader.mean, batch.images.mean(0))
    for _ in range(80):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    model.eval()
    others = replace(batch, images=batch.images.roll(1, 0))
    after, swapped = float(loss(batch)), float(loss(others))
    assert after < 0.3 * before and swapped > 2 * after, (before, after, swapped)


def test_a_stopped_run_goes_on(parts: dict[str, str], folder: Path):
    """Vectors that were generated in another batch differ in their last digits."""

    def fit(steps: int, root: str, ckpt: str | None = None) -> tuple[list[float], Any]:
        module, losses = training(parts), Losses()
        options: dict[str, Any] = {"num_sanity_val_steps": 0, "limit_val_batches": 0}
        run = trainer(folder / root, steps, [losses, saving(folder / root)], **options)
        run.fit(module, data(folder), ckpt_path=ckpt, weights_only=False)
        return losses.values, module

    whole, module = fit(4, "whole")
    at = next((folder / "whole" / "ckpt").glob("*step=2*"))
    rest, resumed = fit(4, "rest", str(at))
    torch.testing.assert_close(torch.tensor(rest), torch.tensor(whole[2:]), atol=1e-4, rtol=0)
    assert len(set(whole)) == 4
    for name, one in module.model.state_dict().items():
        torch.testing.assert_close(one, resumed.model.state_dict()[name], atol=1e-4, rtol=1e-3)
    saved = torch.load(at, weights_only=True)["state_dict"]
    assert all(name.startswith("model.") for name in saved), "nothing of the frozen model"


def test_trained_and_used_by_command(parts: dict[str, str], folder: Path, capsys: Any):
    overrides = {
        "trainer.precision": 32,
        "trainer.default_root_dir": folder / "run",
        **{f"model.{name}": value for name, value in parts.items()},
        "model.out": folder / "made",
        "model.schedule.warmup_steps": 1,
        "model.reader.hidden_size": 32,
        "model.reader.depth": 1,
        "model.reader.heads": 2,
        "data.shards": folder / "shards",
        "data.block": 64,
        "data.batch_size": 2,
    }
    assert len(RECIPES) == 2
    for recipe in RECIPES:
        assert main(["fit-codes-decoder", *two_steps(recipe, overrides)]) == 0
    following = f"lavit-lm generate PROMPT --model {parts['model']} --decoder {folder / 'made'}"
    assert following in capsys.readouterr().err
    command = ["generate", "rain", "--model", parts["model"], "--decoder", str(folder / "made")]
    assert main([*command, "--out", str(folder / "drawn"), "-n", "2", "--steps", "2"]) == 0
    assert len(list((folder / "drawn").glob("*.png"))) == 2
    assert (
        main(["generate", "rain", "--model", str(folder / "made"), "--out", str(folder / "no")])
        == 2
    )
    assert "give it as the image decoder" in capsys.readouterr().err
