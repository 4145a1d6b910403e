"""MultimodalLM as a user has it: pictures and text in and out, saved and loaded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_parts import CODES, processor_and_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.cli import main
from lavit_lm.generation.sampling import GenerationConstraint, Sampling, generate_ids
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.vision.continuous import ContinuousBridge
from lavit_tok import CodeError, VisualCodes, VisualTokenizer, WeightsError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def lm(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any) -> MultimodalLM:
    processor, model = processor_and_model("llama")
    tiny_decoder.set_progress_bar_config(disable=True)
    return MultimodalLM(model, processor, tiny_tokenizer, tiny_decoder)


@pytest.fixture
def directory(lm: MultimodalLM, tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    save_model(
        tmp_path / "lm",
        lm.model,
        lm.processor,
        lm.objective,
        str(tmp_path / "visual"),
        tiny_tokenizer.fingerprint(),
    )
    return tmp_path / "lm"


def test_text_to_pictures(lm: MultimodalLM):
    codes = lm.generate_codes("a red apple", 3, generator=generator(), max_codes=9)
    assert len(codes) == 3 and codes.codebook_size == CODES and int(codes.lengths.max()) <= 9
    again = lm.generate_codes("a red apple", 3, generator=generator(), max_codes=9)
    assert (
        again.to_list()
        == codes.to_list()
        != lm.generate_codes("a red apple", 3, generator=generator(1)).to_list()
    )
    images = lm.generate_images("a red apple", 2, generator=generator(), num_inference_steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2
    exact = lm.generate_codes("a red apple", 1, generator=generator(), min_codes=5, max_codes=5)
    assert exact.lengths.tolist() == [5]


def test_prompts_of_text_and_pictures(lm: MultimodalLM, photos: list[Path]):
    shown = Image.open(photos[0])
    mixed = lm.generate_codes(["a red apple", shown, "in the rain"], generator=generator())
    assert len(mixed) == 1
    row = lm.prompts.row(["a red apple", shown, "in the rain"], "image")
    v = lm.processor.vocabulary
    seen = lm.visual.encode(shown)
    words = [lm.processor.text("a red apple"), lm.processor.text("in the rain")]
    image = [v.begin, *v.to_ids(seen[0]).tolist(), v.end]
    assert row.ids.tolist() == [*lm.processor.start, *words[0], *image, *words[1], v.begin]
    assert lm.prompts.row([seen], "text").ids.tolist() == [*lm.processor.start, *image], (
        "codes stand for their picture"
    )
    batch = lm.generate_codes_batch(["a red apple", "rain"], generator=[generator(4), generator(5)])
    assert (
        batch[1].tolist() == lm.generate_codes_batch(["rain"], generator=[generator(5)])[0].tolist()
    )


def test_pictures_to_text(lm: MultimodalLM, photos: list[Path]):
    captions = lm.caption([str(photo) for photo in photos[:2]], max_tokens=5)
    assert len(captions) == 2 and all(isinstance(text, str) for text in captions)
    assert lm.caption(str(photos[1]), max_tokens=5) == captions[1]
    assert isinstance(lm.answer(str(photos[0]), "What colour is it?", max_tokens=5), str)
    warm = lm.caption(str(photos[0]), 8, temperature=3.0, generator=generator())
    assert warm == lm.caption(str(photos[0]), 8, temperature=3.0, generator=generator())


def test_a_caption_is_never_empty(
    lm: MultimodalLM, photos: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """Of a model that would rather say nothing."""
    head = lm.model.head

    def ends(states: torch.Tensor) -> torch.Tensor:
        logits = head(states)
        logits[..., lm.processor.stop] += 1e3
        return logits

    monkeypatch.setattr(lm.model, "head", ends)
    row = lm.prompts.row([photos[0]], "text")
    assert (
        len(
            generate_ids(
                lm.model, lm.processor, [row], GenerationConstraint("text", 1, 5), Sampling(0.0)
            )[0]
        )
        == 2
    )
    assert (
        len(lm.generate_text_batch([[photos[0]]], 5)) == 1
        and len(lm.generate_text_batch([[photos[0]]], 5)[0]) > 0
    )


def test_interleaved_out(lm: MultimodalLM, photos: list[Path]):
    kinds = set()
    lm.model.causal.get_output_embeddings().weight.data[lm.processor.vocabulary.begin] *= (
        3  # likelier to draw
    )
    for seed in range(12):
        said = lm.complete(
            ["a red apple", photos[0]],
            20,
            2,
            generator=generator(seed),
            images=False,
            temperature=4.0,
        )
        kinds |= {type(part) for part in said}
        assert sum(isinstance(part, VisualCodes) for part in said) <= 2
    assert kinds == {str, VisualCodes}
    drawn = [
        part
        for part in lm.complete("a", 30, 1, generator=generator(3), temperature=4.0)
        if not isinstance(part, str)
    ]
    assert all(isinstance(part, Image.Image) for part in drawn)


def test_ranking_is_the_likelihood(lm: MultimodalLM, photos: list[Path]):
    texts = ["a red apple", "rain", "two dogs run"]
    found = lm.rank([photos[0]], texts)
    start = lm.prompts.row([photos[0]], "text").ids.tolist()
    for text, nats in zip(texts, found.tolist(), strict=True):
        ids = [*start, *lm.processor.text(text), lm.processor.stop]
        with torch.no_grad():
            log_p = lm.model.causal(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        assert (
            abs(nats - sum(float(log_p[i - 1, ids[i]]) for i in range(len(start), len(ids)))) < 1e-3
        )
    images = lm.rank("a red apple", photos[:3], per_token=True)
    assert images.shape == (3,) and len(set(images.tolist())) == 3


def test_saved_and_loaded(lm: MultimodalLM, directory: Path, photos: list[Path]):
    loaded = MultimodalLM.from_pretrained(directory, decoder=None)
    want = lm.generate_codes("a red apple", 2, generator=generator())
    assert (
        loaded.generate_codes("a red apple", 2, generator=generator()).to_list() == want.to_list()
    )
    assert loaded.caption(str(photos[0]), 6) == lm.caption(str(photos[0]), 6)
    plain, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    ids = torch.tensor([lm.prompts.row("rain", "text").ids.tolist()])
    assert torch.equal(plain(ids).logits.argmax(-1), lm.model.causal(ids).logits.argmax(-1))
    assert len(tokenizer) == len(lm.processor.text_tokenizer)
    with pytest.raises(ValueError, match="no pixel decoder"):
        loaded.generate_images("rain")
    save_model(
        directory, loaded.model, loaded.processor, loaded.objective, "elsewhere", "0" * 16
    )  # an older model is replaced
    assert json.loads((directory / "lavit_lm.json").read_text())["visual_tokenizer"] == "elsewhere"
    (directory / "lavit_lm.json").unlink()
    with pytest.raises(WeightsError, match=r"or one with lavit_lm\.json to replace"):
        save_model(
            directory, loaded.model, loaded.processor, loaded.objective, "elsewhere", "0" * 16
        )


def test_saved_in_half_precision(lm: MultimodalLM, directory: Path, tmp_path: Path):
    lm.save_pretrained(tmp_path / "half", str(tmp_path / "visual"), torch.float16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    loaded = MultimodalLM.from_pretrained(tmp_path / "half", decoder=None)
    assert loaded.model.causal.dtype == torch.float32
    ids = loaded.prompts.row("rain", "text").ids[None]
    assert torch.allclose(loaded.model.causal(ids).logits, lm.model.causal(ids).logits, atol=1e-2)


def test_reading_pictures_as_vectors(
    tiny_tokenizer: VisualTokenizer, tmp_path: Path, photos: list[Path]
):
    processor, model = processor_and_model("llama")
    model.bridge = ContinuousBridge(tiny_tokenizer, 16)
    assert not [n for n in model.state_dict() if "encoder" in n], (
        "the visual tokenizer is no part of the model"
    )
    vectors = MultimodalLM(model, processor, tiny_tokenizer, objective=LaVIT(continuous=True))
    row = vectors.prompts.row([photos[0], "a"], "text")
    codes = tiny_tokenizer.encode(str(photos[0]))
    assert row.is_embedding.sum() == len(codes[0]) and torch.equal(row.keep, codes.keep)
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    save_model(
        tmp_path / "lm",
        model,
        processor,
        vectors.objective,
        str(tmp_path / "visual"),
        tiny_tokenizer.fingerprint(),
    )
    loaded = MultimodalLM.from_pretrained(tmp_path / "lm", decoder=None)
    assert loaded.caption(str(photos[0]), 8) == vectors.caption(str(photos[0]), 8)
    assert loaded.generate_codes([photos[0], "a"], generator=generator()).to_list(), (
        "pictures are drawn by codes"
    )
    tensors = load_file(tmp_path / "lm" / "objective_modules.safetensors")
    tensors.pop("bridge.path.projection.weight")
    save_file(tensors, tmp_path / "lm" / "objective_modules.safetensors")
    with pytest.raises(WeightsError, match=r"path\.projection\.weight"):
        MultimodalLM.from_pretrained(tmp_path / "lm", decoder=None)


def test_directories_that_are_refused(directory: Path, tmp_path: Path):
    other = VisualTokenizer(VisualTokenizer.from_pretrained(tmp_path / "visual").config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WeightsError, match=r"codes would be of unrelated images"):
        MultimodalLM.from_pretrained(directory, visual_tokenizer=str(tmp_path / "other"))
    tensors = load_file(directory / "model.safetensors")
    lost = sorted(name for name in tensors if "mlp" in name)[0]
    save_file(
        {n: t for n, t in tensors.items() if n != lost},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(WeightsError, match=lost.replace(".", r"\.")):
        MultimodalLM.from_pretrained(directory)
    (directory / "lavit_lm.json").write_text("{")
    with pytest.raises(WeightsError, match=r"lavit_lm\.json: cannot be read"):
        MultimodalLM.from_pretrained(directory)
    (directory / "lavit_lm.json").write_text("{}")
    with pytest.raises(WeightsError, match="expected lavit_lm version 1"):
        MultimodalLM.from_pretrained(directory)
    with pytest.raises(WeightsError, match="expected 'default', an existing directory or a Hub id"):
        MultimodalLM.from_pretrained(tmp_path / "nothing")


def test_impossible_requests(lm: MultimodalLM, photos: list[Path]):
    with pytest.raises(ValueError, match=r"1 <= min_codes <= max_codes <= 16, got 1 and 0"):
        lm.generate_codes("a", max_codes=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        lm.generate_codes("a", 0)
    with pytest.raises(ValueError, match=r"a prompt of words or pictures, got ' '"):
        lm.generate_images(" ")
    assert len(lm.generate_codes([], 2, generator=generator())) == 2, "a picture of anything"
    with pytest.raises(CodeError):
        lm.generate_codes([VisualCodes.from_list([[CODES + 3]], codebook_size=CODES + 9)])
    with pytest.raises(ValueError, match="codes of one picture in a prompt, got 2"):
        lm.generate_codes([VisualCodes.from_list([[1], [2]], codebook_size=CODES)])
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        lm.generate_codes("a red apple " * 60)
    with pytest.raises(ValueError, match="at least one candidate"):
        lm.rank("a", [])


def test_commands(
    directory: Path, tiny_decoder: Any, tmp_path: Path, photos: list[Path], capsys: Any
):
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    words = [
        "generate",
        "a red apple",
        "--model",
        str(directory),
        "--decoder",
        str(tmp_path / "decoder"),
    ]
    assert main([*words, "--out", str(tmp_path / "out"), "-n", "2", "--steps", "2"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "codes.jsonl").read_text().splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["a red apple"] * 2
    (tmp_path / "bad.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert (
        main(["caption", str(photos[0]), str(tmp_path / "bad.png"), "--model", str(directory)]) == 0
    )
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{photos[0]}\t") and "1 of 2 pictures; 1 skipped" in shown.err
    assert main(["export", str(directory), str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain" / "tokenizer.json").exists()
    assert main(["caption", str(photos[0]), "--model", str(tmp_path / "nothing")]) == 2
    assert "expected 'default', an existing directory or a Hub id" in capsys.readouterr().err
