"""MultimodalLM as users call it: images and text in and out, saved and loaded, and bad requests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import rewrite
from helpers.lm_parts import CODES, processor_and_model
from helpers.tensors import generator
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavit_lm import MultimodalLM
from lavit_lm.cli import main
from lavit_lm.generation.sampling import GenerationConstraint, Sampling, generate_ids
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.vision.continuous import ContinuousBridge
from lavit_tok import CodeError, VisualCodes, VisualTokenizer, WeightsError


@pytest.fixture
def lm(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any) -> MultimodalLM:
    processor, model = processor_and_model("llama")
    tiny_decoder.set_progress_bar_config(disable=True)
    return MultimodalLM(model, processor, tiny_tokenizer, tiny_decoder)


@pytest.fixture
def directory(lm: MultimodalLM, tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    lm.save_pretrained(tmp_path / "lm", str(tmp_path / "visual"))
    return tmp_path / "lm"


def test_text_to_images(lm: MultimodalLM):
    def codes(seed: int, **limits: int) -> VisualCodes:
        return lm.generate_codes("a red apple", 3, generator=generator(seed), **limits)

    short = codes(0, max_codes=9)
    assert len(short) == 3 and short.codebook_size == CODES and int(short.lengths.max()) <= 9
    assert codes(0, max_codes=9).to_list() == short.to_list() != codes(1).to_list()
    assert codes(0, min_codes=5, max_codes=5).lengths.tolist() == [5] * 3
    images = lm.generate_images("a red apple", 2, generator=generator(), num_inference_steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2


def test_prompts_of_text_and_images(lm: MultimodalLM, photos: list[Path]):
    photo = Image.open(photos[0])
    mixed = ["a red apple", photo, "in the rain"]
    assert len(lm.generate_codes(mixed, generator=generator())) == 1
    v, codes = lm.processor.vocabulary, lm.visual_tokenizer.encode(photo)
    image = [v.begin, *v.to_ids(codes[0]).tolist(), v.end]
    texts = [lm.processor.text("a red apple"), lm.processor.text("in the rain")]
    expected = [*lm.processor.start, *texts[0], *image, *texts[1], v.begin]
    assert lm.prompts.sequence(mixed, "image").ids.tolist() == expected
    from_codes = lm.prompts.sequence([codes], "text").ids.tolist()
    assert from_codes == [*lm.processor.start, *image], "codes in place of their image"
    batch = lm.generate_codes_batch(["a red apple", "rain"], generator=[generator(4), generator(5)])
    alone = lm.generate_codes_batch(["rain"], generator=[generator(5)])
    assert batch[1].tolist() == alone[0].tolist()


def test_images_to_text(lm: MultimodalLM, photos: list[Path]):
    paths = [str(photo) for photo in photos[:2]]
    captions = lm.caption(paths, max_new_tokens=5)
    assert len(captions) == 2 and all(isinstance(text, str) for text in captions)
    assert lm.caption(paths[1], max_new_tokens=5) == captions[1]
    assert isinstance(lm.answer(paths[0], "What color is it?", max_new_tokens=5), str)
    sampled = [lm.caption(paths[0], 8, temperature=3.0, generator=generator()) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_a_caption_is_never_empty(lm: MultimodalLM, photos: list[Path]):
    """Even if the end of text is by far the most likely token."""

    def ends(layer: Any, states: Any, logits: torch.Tensor) -> None:
        logits[..., lm.processor.stop] += 1e3

    lm.model.causal.get_output_embeddings().register_forward_hook(ends)
    prompt, constraint = (
        lm.prompts.sequence([photos[0]], "text"),
        GenerationConstraint("text", 1, 5),
    )
    (ids,) = generate_ids(lm.model, lm.processor, [prompt], constraint, Sampling(0.0))
    assert len(ids) == 2
    (text,) = lm.generate_text_batch([[photos[0]]], 5)
    assert text


def test_interleaved_output(lm: MultimodalLM, photos: list[Path]):
    begin = lm.processor.vocabulary.begin
    with torch.no_grad():  # images become more likely
        lm.model.causal.get_output_embeddings().weight[begin] *= 3
    options: dict[str, Any] = {"decode": False, "temperature": 4.0}
    kinds = set()
    for seed in range(12):
        prompt = ["a red apple", photos[0]]
        outputs = lm.complete(prompt, 20, 2, generator=generator(seed), **options)
        kinds |= {type(part) for part in outputs}
        assert sum(isinstance(part, VisualCodes) for part in outputs) <= 2
    assert kinds == {str, VisualCodes}
    outputs = lm.complete("a", 30, 1, generator=generator(3), temperature=4.0)
    images = [part for part in outputs if not isinstance(part, str)]
    assert all(isinstance(image, Image.Image) for image in images)


def test_rank_is_the_log_likelihood(lm: MultimodalLM, photos: list[Path]):
    texts = ["a red apple", "rain", "two dogs run"]
    found = lm.rank([photos[0]], texts)
    start = lm.prompts.sequence([photos[0]], "text").ids.tolist()
    for text, nats in zip(texts, found.tolist(), strict=True):
        ids = [*start, *lm.processor.text(text), lm.processor.stop]
        with torch.no_grad():
            log_p = lm.model.causal(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = sum(float(log_p[i - 1, ids[i]]) for i in range(len(start), len(ids)))
        assert abs(nats - expected) < 1e-3
    images = lm.rank("a red apple", photos[:3], per_token=True)
    assert images.shape == (3,) and len(set(images.tolist())) == 3


def test_the_most_probable_of_several_candidates(lm: MultimodalLM, photos: list[Path]):
    texts = ["a red apple", "rain", "two dogs run"]
    pairs = lm.score([[photo] for photo in photos[:3]], texts)
    one = torch.cat([lm.rank([p], [text]) for p, text in zip(photos, texts, strict=False)])
    torch.testing.assert_close(pairs, one)
    prompt = "a red apple"
    images = lm.generate_images(prompt, 6, generator=generator(3), num_inference_steps=2)
    nats = [float(lm.rank([image], [prompt])) for image in images]
    order = sorted(range(6), key=lambda i: -nats[i])
    assert lm.rerank(images, prompt, 2) == order[:2] and len(set(nats)) > 2
    kept = lm.generate_images(
        prompt, 2, generator=generator(3), candidates=3, num_inference_steps=2
    )
    assert [image.tobytes() for image in kept] == [images[i].tobytes() for i in order[:2]]
    with pytest.raises(ValueError, match="candidates: expected a prompt that is a text"):
        lm.generate_images(["a", photos[0]], candidates=2)
    for n, wrong in ((1, 0), (1, 257), (2, 129)):
        with pytest.raises(ValueError, match=rf"candidates: expected .* got {wrong}"):
            lm.generate_images(prompt, n, candidates=wrong)
    with pytest.raises(ValueError, match="as many candidates, got 1 and 2"):
        lm.score([[photos[0]]], texts[:2])


def test_saved_and_loaded(lm: MultimodalLM, directory: Path, photos: list[Path]):
    loaded = MultimodalLM.from_pretrained(directory, decoder=None)
    codes = [m.generate_codes("a red apple", 2, generator=generator()) for m in (loaded, lm)]
    assert codes[0].to_list() == codes[1].to_list()
    assert loaded.caption(str(photos[0]), 6) == lm.caption(str(photos[0]), 6)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    ids = lm.prompts.sequence("rain", "text").ids[None]
    assert torch.equal(plain(ids).logits.argmax(-1), lm.model.causal(ids).logits.argmax(-1))
    assert len(AutoTokenizer.from_pretrained(directory)) == len(lm.processor.text_tokenizer)
    with pytest.raises(ValueError, match="no image decoder"):
        loaded.generate_images("rain")
    loaded.save_pretrained(directory, "elsewhere")  # replaces the older model
    assert json.loads((directory / "lavit_lm.json").read_text())["visual_tokenizer"] == "elsewhere"
    (directory / "lavit_lm.json").unlink()
    with pytest.raises(WeightsError, match=r"or one with lavit_lm\.json to replace"):
        loaded.save_pretrained(directory, "elsewhere")


def test_saved_in_half_precision(lm: MultimodalLM, directory: Path, tmp_path: Path):
    lm.save_pretrained(tmp_path / "half", str(tmp_path / "visual"), torch.float16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    loaded = MultimodalLM.from_pretrained(tmp_path / "half", decoder=None)
    assert loaded.model.causal.dtype == torch.float32
    ids = loaded.prompts.sequence("rain", "text").ids[None]
    assert torch.allclose(loaded.model.causal(ids).logits, lm.model.causal(ids).logits, atol=1e-2)


def test_images_as_vectors(tiny_tokenizer: VisualTokenizer, tmp_path: Path, photos: list[Path]):
    processor, model = processor_and_model("llama")
    model.bridge = ContinuousBridge(tiny_tokenizer, 16)
    assert not [n for n in model.state_dict() if "encoder" in n], "the tokenizer is not saved"
    lm = MultimodalLM(model, processor, tiny_tokenizer, objective=LaVIT(continuous=True))
    sequence = lm.prompts.sequence([photos[0], "a"], "text")
    codes = tiny_tokenizer.encode(str(photos[0]))
    assert sequence.is_embedding.sum() == len(codes[0]) and torch.equal(sequence.keep, codes.keep)
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    lm.save_pretrained(tmp_path / "lm", str(tmp_path / "visual"))
    loaded = MultimodalLM.from_pretrained(tmp_path / "lm", decoder=None)
    assert loaded.caption(str(photos[0]), 8) == lm.caption(str(photos[0]), 8)
    generated = loaded.generate_codes([photos[0], "a"], generator=generator())
    assert generated.to_list(), "images are generated as codes"
    path = tmp_path / "lm" / "objective_modules.safetensors"
    rewrite(path, lambda tensors: tensors.pop("bridge.path.projection.weight"))
    with pytest.raises(WeightsError, match=r"missing +bridge\.path\.projection\.weight"):
        MultimodalLM.from_pretrained(tmp_path / "lm", decoder=None)


def test_unusable_directories(directory: Path, tmp_path: Path):
    other = VisualTokenizer(VisualTokenizer.from_pretrained(tmp_path / "visual").config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WeightsError, match="codes would be of unrelated images"):
        MultimodalLM.from_pretrained(directory, visual_tokenizer=str(tmp_path / "other"))
    path, file = directory / "lavit_lm.json", directory / "model.safetensors"
    values, lost = json.loads(path.read_text()), "model.layers.0.mlp.down_proj.weight"
    for text, message in (
        ("{", r"lavit_lm\.json: cannot be read"),
        ("{}", "expected lavit_lm version 1"),
        (json.dumps({**values, "version": 2}), "expected lavit_lm version 1, got lavit_lm 2"),
        (json.dumps({**values, "objective": {"name": "new"}}), "'new' is not one of this lib"),
        (json.dumps({**values, "objective": {"name": "lavit", "x": 1}}), "objective .*'x'"),
    ):
        path.write_text(text)
        with pytest.raises(WeightsError, match=message):
            MultimodalLM.from_pretrained(directory)
    path.write_text(json.dumps(values))
    rewrite(file, lambda tensors: tensors.pop(lost))
    with pytest.raises(WeightsError, match=re.escape(lost)):
        MultimodalLM.from_pretrained(directory)
    with pytest.raises(WeightsError, match="expected 'default', an existing directory or a Hub id"):
        MultimodalLM.from_pretrained(tmp_path / "nothing")


def test_impossible_requests(lm: MultimodalLM, unchecked: None):
    assert len(lm.generate_codes([], 2, generator=generator())) == 2, "without a prompt"
    foreign = VisualCodes.from_list([[CODES + 3]], codebook_size=CODES + 9)
    two = VisualCodes.from_list([[1], [2]], codebook_size=CODES)
    with pytest.raises(CodeError):
        lm.generate_codes([foreign])
    for message, prompt, options in (
        (r"1 <= min_codes <= max_codes <= 16, got 1 and 0", "a", {"max_codes": 0}),
        (r"n: expected an integer in 1\.\.10000, got 0", "a", {"n": 0}),
        ("a prompt of text or images, got ' '", " ", {}),
        ("codes of one image in a prompt, got 2", [two], {}),
        ("exceed the model's context of 128", "a red apple " * 60, {}),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_codes(prompt, **options)
    with pytest.raises(ValueError, match="at least one candidate"):
        lm.rank("a", [])
    for name, value in (("min_codes", "1"), ("max_codes", 2.5), ("max_codes", float("nan"))):
        with pytest.raises(ValueError, match=rf"{name}: expected an integer in 1\.\.16"):
            lm.generate_codes("a", **{name: value})  # type: ignore[arg-type]
    for name, value in (("max_images", -1), ("max_images", 1.5), ("guidance_scale", float("nan"))):
        with pytest.raises(ValueError, match=rf"{name}: expected .*\.\."):
            lm.complete("a", **{"max_images": 0, name: value})  # type: ignore[arg-type]
    image = Image.new("RGB", (8, 8))
    for name, options in (("question", {"question": None}), ("template", {"template": 3})):
        with pytest.raises(ValueError, match=f"{name}: expected a text, got"):
            lm.answer(image, **{"question": "q", **options})  # type: ignore[arg-type]


def test_commands(
    directory: Path, tiny_decoder: Any, tmp_path: Path, photos: list[Path], capsys: Any
):
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    model = ["--model", str(directory)]
    args = ["generate", "a red apple", *model, "--decoder", str(tmp_path / "decoder")]
    assert main([*args, "--out", str(tmp_path / "out"), "-n", "2", "--steps", "2"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    lines = (tmp_path / "out" / "codes.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a red apple"] * 2
    several = [*args, "--out", str(tmp_path / "best"), "-n", "1", "--candidates", "2"]
    assert main([*several, "--steps", "2"]) == 0
    (best,) = (tmp_path / "best" / "codes.jsonl").read_text().splitlines()
    assert best in lines and len(list((tmp_path / "best").glob("*.png"))) == 1
    (tmp_path / "out" / "codes.jsonl").write_text("{}")
    again = [*args, "--out", str(tmp_path / "out"), "-n", "1", "--steps", "1"]
    assert main(again) == 2 and "codes.jsonl: not written by" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    (tmp_path / "bad.png").write_bytes(b"not an image")
    capsys.readouterr()
    assert main(["caption", str(photos[0]), str(tmp_path / "bad.png"), *model]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{photos[0]}\t")
    assert "1 of 2 images; 1 skipped" in printed.err
    assert main(["export", str(directory), str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain" / "tokenizer.json").exists()
    native = str(tmp_path / "native")
    decoder = ["--decoder", str(tmp_path / "decoder")]
    assert main(["export", str(directory), native, "--format", "multimodal", *decoder]) == 0
    names = json.loads((tmp_path / "native/processor_config.json").read_text())
    assert names["pixel_decoder"] == decoder[1]
    assert f"AutoModelForMultimodalLM.from_pretrained({native!r})" in capsys.readouterr().err
    assert main(["caption", str(photos[0]), "--model", native]) == 0
    assert main(["caption", str(photos[0]), "--model", str(tmp_path / "nothing")]) == 2
    assert "expected 'default', an existing directory or a Hub id" in capsys.readouterr().err
