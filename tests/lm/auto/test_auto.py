"""The classes that `transformers` finds by its Auto classes: loading, generation, training."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import mpl_toolkits
import pytest
import torch
from helpers.lm_parts import CODES, processor_and_model
from helpers.tensors import generator
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    pipeline,
)

from lavit_lm import LavitForConditionalGeneration, LavitProcessor, MultimodalLM
from lavit_lm.auto.registration import AfterImport
from lavit_lm.checkpoints.export import ExportError
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.vision.continuous import ContinuousBridge
from lavit_tok import PixelDecoder, VisualImageProcessor, VisualTokenizer, WeightsError

PROMPTS = ["a red apple", "rain", "two dogs run along the beach"]
WEIGHTS = "model.safetensors"


@pytest.fixture
def visual(tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> VisualTokenizer:
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    return VisualTokenizer.from_pretrained(tmp_path / "visual")


@pytest.fixture
def decoder(tiny_decoder: Any, tmp_path: Path) -> str:
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


def saved(
    visual: VisualTokenizer, decoder: str, out: Path, family: str = "llama", seed: int = 0
) -> MultimodalLM:
    processor, model = processor_and_model(family, seed=seed)
    objective = LaVIT(order="image_first")
    lm = MultimodalLM(model, processor, visual, decoder, objective)
    lm.export(out, format="multimodal")
    return lm


@pytest.fixture
def lm(visual: VisualTokenizer, decoder: str, tmp_path: Path) -> MultimodalLM:
    return saved(visual, decoder, tmp_path / "lm")


@pytest.fixture
def directory(lm: MultimodalLM, tmp_path: Path) -> Path:
    return tmp_path / "lm"


@pytest.fixture
def model(directory: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(directory)


@pytest.fixture
def processor(directory: Path) -> LavitProcessor:
    return AutoProcessor.from_pretrained(directory)


@pytest.mark.parametrize(
    "first", ["import lavit_lm", "from transformers import AutoProcessor, AutoModelForCausalLM"]
)
def test_registered_whichever_is_imported_first(first: str, directory: Path):
    """The processor is loaded first: its class is known before any config of the model."""
    code = f"""{first}
import lavit_lm, sys
from transformers import AutoImageProcessor, AutoModelForMultimodalLM, AutoProcessor
for kind in (AutoProcessor, AutoImageProcessor, AutoModelForMultimodalLM):
    print(type(kind.from_pretrained({str(directory)!r})).__name__)
print([finder for finder in sys.meta_path if type(finder).__name__ == "AfterImport"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["LavitProcessor", "VisualImageProcessor", "LavitForConditionalGeneration", "[]"]
    assert done.stdout.split() == names


def test_other_imports_are_left_alone():
    """Those of a namespace package, too, whose path is not a Sequence."""
    finder = AfterImport({"a": "b"})
    assert finder.find_spec("mpl_toolkits.mplot3d", mpl_toolkits.__path__) is None
    assert finder.find_spec("json", None) is None and finder.imports == {"a": "b"}


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has no begin-of-text
def test_images_equal_our_own_loop(
    family: str, visual: VisualTokenizer, decoder: str, tmp_path: Path
):
    lm = saved(visual, decoder, tmp_path / "lm", family)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "lm")
    processor = AutoProcessor.from_pretrained(tmp_path / "lm")
    inputs = processor(text=PROMPTS)

    def both(scale: float, limits: dict[str, int], **options: Any) -> None:
        ours = {"temperature": 0.0} if options else {}
        randomness = [{} if options else {"generator": generator(7)} for _ in range(2)]
        expected = lm.generate_codes_batch(PROMPTS, scale, **ours, **limits, **randomness[0])
        mode = {"generation_mode": "image", "guidance_scale": scale}
        ids = model.generate(**inputs, **mode, **limits, **options, **randomness[1])
        assert processor.image_codes(ids).to_list() == expected.to_list()

    for scale in (1.0, 3.0):
        both(scale, {}, do_sample=False)
        both(scale, {})
        both(scale, {"min_codes": 5, "max_codes": 5})


def test_number_of_codes_of_one_call(processor: LavitProcessor, photos: list[Path]):
    images = [str(photo) for photo in photos[:2]]
    visual = processor.visual_tokenizer

    def codes(**options: Any) -> list[list[int]]:
        ids = processor(images=images, **options)["input_ids"]
        return processor.image_codes(ids).to_list()

    own = codes()
    for options in ({"budget": 7}, {"budget": 0.25}, {"min_codes": 12}, {"max_codes": 2}):
        expected = visual.encode(images, **options).to_list()
        assert codes(images_kwargs=options) == codes(**options) == expected != own
    chat = [{"role": "user", "content": [{"type": "image", "path": images[0]}]}]
    named = {"processor_kwargs": {"images_kwargs": {"budget": 7}}}
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **named)
    assert processor.image_codes(inputs["input_ids"])[0].shape == (7,)
    for wrong, message in [
        ({"budget": 0}, "positive number of codes"),
        ({"budget": 3, "quality": 0.5}, "budget and quality"),
        ({"quality": 0.5}, "no head that predicts"),
        ({"quality": 0.9, "verify": True}, "expected 0.9"),
        ({"size": 32}, "expected budget, quality, .* got size"),
    ]:
        with pytest.raises(ValueError, match=message):
            codes(images_kwargs=wrong)


def test_what_images_depend_on(model: Any, processor: LavitProcessor):
    inputs = processor(text=PROMPTS[:2])

    def codes(**options: Any) -> list[list[int]]:
        ids = model.generate(**inputs, generation_mode="image", **options)
        return processor.image_codes(ids).to_list()

    apart = codes(generator=[generator(1), generator(2)])
    alone = model.generate(
        **processor(text=PROMPTS[1]), generation_mode="image", generator=generator_list(2)
    )
    assert processor.image_codes(alone).to_list() == apart[1:]
    several = codes(generator=generator(), num_return_sequences=3)
    assert len(several) == 6 and len({str(one) for one in several}) > 1
    assert max(map(len, codes(max_new_tokens=5))) <= 4
    torch.manual_seed(0)
    first = codes()
    assert first != codes(), "torch's global generator"
    greedy = codes(do_sample=False)
    assert greedy == codes(top_k=1) == codes(temperature=1e-6, top_k=0)
    begun = {"text": [f"{prompt}<|img|>" for prompt in PROMPTS[:2]]}
    ids = model.generate(**processor(**begun), generation_mode="image", do_sample=False)
    assert processor.image_codes(ids).to_list() == greedy, "the prompts began the image themselves"
    output = model.generate(
        **inputs, generation_mode="image", return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences.shape[0] == 2 and len(output.scores) > 1


def generator_list(seed: int) -> list[torch.Generator]:
    return [generator(seed)]


def test_text(model: Any, processor: LavitProcessor, lm: MultimodalLM, photos: list[Path]):
    """Greedy captions are those of MultimodalLM; no way of decoding generates image tokens."""
    inputs = processor(images=photos[:3])
    greedy = model.generate(**inputs, max_new_tokens=8)
    texts = processor.batch_decode(greedy, skip_special_tokens=True)
    assert [text.strip() for text in texts] == lm.caption(photos[:3], 8)
    start = inputs["input_ids"].shape[1]
    helper = AutoModelForMultimodalLM.from_config(model.config)
    one = processor(images=photos[0])
    alone = model.generate(**one, max_new_tokens=8)
    assisted = model.generate(**one, max_new_tokens=8, assistant_model=helper)
    assert assisted.tolist() == alone.tolist()
    scored = {"return_dict_in_generate": True, "output_scores": True}
    beams = model.generate(**inputs, max_new_tokens=8, num_beams=3, **scored)
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=5.0)
    assert beams.sequences_scores.shape == (3,)
    for ids in (greedy, beams.sequences, sampled):
        assert not bool(processor.vocabulary.is_visual(ids[:, start:]).any())


def test_prompts(processor: LavitProcessor, lm: MultimodalLM, photos: list[Path]):
    """The ids are those of MultimodalLM's prompts, with or without the chat template."""
    expected = lm.prompts.sequence(["a red apple", photos[0], "in the rain"], "text").ids.tolist()
    plain = processor(images=[photos[0]], text="a red apple<image>in the rain")
    assert plain["input_ids"].tolist() == [expected]
    expected = lm.prompts.sequence(["a red apple", photos[0]], "text").ids.tolist()
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "a red apple"},
        {"role": "user", "content": [{"type": "image", "path": str(photos[0])}]},
    ]
    options = {"tokenize": True, "return_dict": True}
    assert processor.apply_chat_template(chat, **options)["input_ids"].tolist() == [expected]
    chat.append({"role": "assistant", "content": [{"type": "text", "text": "two dogs"}]})
    output = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    answer = [*lm.processor.text("two dogs"), lm.processor.stop]
    ids, mask = output["input_ids"][0], torch.as_tensor(output["assistant_masks"])[0].bool()
    assert ids.tolist() == [*expected, *answer]
    assert ids[mask].tolist() == answer


def test_saved_again(directory: Path, tmp_path: Path, lm: MultimodalLM, photos: list[Path]):
    """The same weights, processor and objective, also as MultimodalLM."""
    model, processor = (
        kind.from_pretrained(directory) for kind in (AutoModelForMultimodalLM, AutoProcessor)
    )
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    weights, again = (load_file(d / WEIGHTS) for d in (directory, tmp_path / "again"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for name in ("processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()
    loaded = MultimodalLM.from_pretrained(tmp_path / "again", decoder=None)
    assert loaded.objective == lm.objective == LaVIT(order="image_first")
    assert loaded.caption(photos[0], 8) == lm.caption(photos[0], 8)
    (tmp_path / "alone").mkdir()
    processor.save_pretrained(tmp_path / "alone")
    assert LavitProcessor.from_pretrained(tmp_path / "alone").to_dict() == processor.to_dict()
    image_processor = AutoImageProcessor.from_pretrained(directory)
    assert isinstance(image_processor, VisualImageProcessor)
    assert image_processor.to_dict() == lm.visual_tokenizer.image_processor.to_dict()
    placed = AutoModelForMultimodalLM.from_pretrained(directory, device_map="auto")
    ids = processor(text="rain")["input_ids"]
    assert torch.equal(placed(ids).logits, model(ids).logits)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mis-shaped", "NaN"])
def test_weights_are_compared_strictly(directory: Path, change: str):
    weights = load_file(directory / WEIGHTS)
    name = sorted(weights)[0]
    value = weights.pop(name)
    changed = {
        "missing": {},
        "unexpected": {name: value, "more": value.clone()},
        "mis-shaped": {name: value[:-1].contiguous()},
        "NaN": {name: torch.full_like(value, torch.nan)},
    }
    save_file(weights | changed[change], directory / WEIGHTS, {"format": "pt"})
    with pytest.raises(WeightsError, match="more" if change == "unexpected" else name):
        AutoModelForMultimodalLM.from_pretrained(directory)


def test_pipeline(directory: Path, photos: list[Path], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        pipe = pipeline("any-to-any", model=str(directory))
    assert not caplog.records and "torchvision" not in sys.modules
    content = [{"type": "image", "path": str(photos[0])}, {"type": "text", "text": "rain"}]
    chat = [{"role": "user", "content": content}]
    (output,) = pipe(text=chat, max_new_tokens=5, return_full_text=False)
    ids = pipe.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    text = pipe.processor.batch_decode(pipe.model.generate(**ids, max_new_tokens=5))[0]
    assert output["generated_text"] and output["generated_text"].strip() in text
    images = pipe(text=PROMPTS[:2], generation_mode="image")
    found = [
        one["generated_image"] for part in images for one in ([part], part)[type(part) is list]
    ]
    assert [image.size for image in found] == [(16, 16)] * 2
    with pytest.raises(ValueError, match="generation_mode"):
        pipe(text="rain", generation_mode="audio")


def test_decoded_images(model: Any, processor: LavitProcessor, decoder: str):
    ids = model.generate(
        **processor(text=PROMPTS), generation_mode="image", generator=generator(), max_codes=6
    )
    options = {"num_inference_steps": 2, "output_type": "pt"}
    images = processor.decode_image_tokens(ids, generator=generator(), **options)
    pipe = PixelDecoder.from_pretrained(decoder)
    expected = pipe(processor.image_codes(ids), generator=generator(), **options).images
    assert torch.equal(images, expected)


def test_peft(model: Any, processor: LavitProcessor, tmp_path: Path, photos: list[Path]):
    """Adapters learn, are saved and loaded, and are merged into a model of the same outputs."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = {name: value.clone() for name, value in model.state_dict().items()}
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    wrapped = get_peft_model(model, lora)
    inputs = processor(images=photos[:2], text=["<image>rain", "<image>a red apple"])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = wrapped(**inputs, labels=labels).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    wrapped.save_pretrained(tmp_path / "adapter")
    fresh = LavitForConditionalGeneration(model.config)
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(fresh.eval(), tmp_path / "adapter")
    expected = wrapped.eval()(**inputs).logits
    assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    assert merged.generate(**processor(text="rain"), max_new_tokens=3).shape[1] > 1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's
def test_trl(directory: Path, tmp_path: Path, photos: list[Path]):
    """SFTTrainer learns captions from messages and images; what it saves loads strictly."""
    from datasets import Dataset, Image
    from trl import SFTConfig, SFTTrainer

    def example(photo: Path, caption: str) -> dict[str, Any]:
        user = {"role": "user", "content": [{"type": "image", "text": None}]}
        assistant = {"role": "assistant", "content": [{"type": "text", "text": caption}]}
        return {"messages": [user, assistant], "images": [str(photo)]}

    data = [example(*pair) for pair in zip(photos[:3], PROMPTS, strict=True)]
    dataset = Dataset.from_list(data).cast_column("images", [Image()])
    config = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        assistant_only_loss=True,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForMultimodalLM.from_pretrained(directory),
        processing_class=AutoProcessor.from_pretrained(directory),
        args=config,
        train_dataset=dataset,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    loaded = MultimodalLM.from_pretrained(tmp_path / "tuned", decoder=None)
    assert isinstance(loaded.caption(photos[0], 4), str)


def test_bad_input(model: Any, processor: LavitProcessor, photos: list[Path]):
    """One clear error each."""
    with pytest.raises(ValueError, match="2 <image> tokens and 1 images"):
        processor(images=[photos[0]], text="<image> and <image>")
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<image>")
    with pytest.raises(TemplateError, match="got robot"):
        processor.apply_chat_template([{"role": "robot", "content": "rain"}])
    with pytest.raises(TemplateError, match="got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    inputs, image = processor(text=PROMPTS), {"generation_mode": "image"}
    with pytest.raises(ValueError, match="expected 'text' or 'image', got 'smell'"):
        model.generate(**inputs, generation_mode="smell")
    with pytest.raises(ValueError, match="got 'smell'"):
        processor.post_process_multimodal_output(inputs["input_ids"], generation_mode="smell")
    with pytest.raises(ValueError, match="only for generation_mode"):
        model.generate(**inputs, generator=generator())
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        model.generate(**inputs, max_new_tokens=128)
    long = processor(text=" ".join(PROMPTS) * 20)
    for options in ({"max_new_tokens": 1}, image):
        with pytest.raises(ValueError, match="exceed the model's context of 128"):
            model.generate(**long, **options)
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        model(**long)
    with pytest.raises(ValueError, match="left-padded"):
        model.generate(**processor(text=PROMPTS, padding_side="right"), **image)
    with pytest.raises(ValueError, match="all prompts end"):
        model.generate(**processor(text=["rain<|img|>", "rain"]), **image)
    with pytest.raises(ValueError, match="beam search"):
        model.generate(**inputs, **image, num_beams=2)
    with pytest.raises(ValueError, match="assisted"):
        model.generate(**inputs, **image, assistant_model=model)
    with pytest.raises(ValueError, match="1 <= min_codes <= max_codes <= 16, got 9 and 3"):
        model.generate(**inputs, **image, min_codes=9, max_codes=3)
    with pytest.raises(ValueError, match="expected input_ids"):
        model.generate(**image)
    with pytest.raises(ValueError, match="sequence 0 has no codes"):
        processor.image_codes(inputs["input_ids"])


def test_processors_that_do_not_fit(directory: Path, tmp_path: Path, photos: list[Path]):
    path = directory / "processor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"fingerprint": "0" * 16}))
    with pytest.raises(WeightsError, match="codes would be of unrelated images"):
        AutoProcessor.from_pretrained(directory)(images=photos[0])
    with pytest.raises(ValueError, match="pixel_decoder= of from_pretrained names another"):
        AutoProcessor.from_pretrained(directory).pixel_decoder  # noqa: B018
    path.write_text(json.dumps(values | {"version": 2}))
    with pytest.raises(WeightsError, match="expected lavit_lm version 1"):
        AutoProcessor.from_pretrained(directory)
    path.write_text(json.dumps(values))
    other = LavitProcessor.from_pretrained(directory, pixel_decoder="default")
    with pytest.raises(ValueError, match=f"4096 entries, the language model of {CODES}"):
        other.pixel_decoder  # noqa: B018


def test_models_that_cannot_be_written(
    lm: MultimodalLM, directory: Path, tmp_path: Path, unchecked: Any
):
    with pytest.raises(ExportError, match="already exists"):
        lm.export(directory, format="multimodal")
    with pytest.raises(ValueError, match="format: expected 'plain' or 'multimodal'"):
        lm.export(tmp_path / "new", format="gguf")
    lm.visual_tokenizer.name_or_path = ""
    with pytest.raises(ExportError, match="has no name"):
        lm.export(tmp_path / "new", format="multimodal")
    lm.model.bridge = ContinuousBridge(lm.visual_tokenizer, 16)
    with pytest.raises(ExportError, match="expected a causal LM that reads and generates codes"):
        lm.export(tmp_path / "new", format="multimodal")
    assert not (tmp_path / "new").exists()


def test_generation_config_is_not_changed(model: Any, processor: LavitProcessor):
    inputs, before = processor(text="rain"), model.generation_config.to_dict()
    given = GenerationConfig(do_sample=False)
    ids = model.generate(**inputs, generation_config=given, generation_mode="image")
    assert model.generation_config.to_dict() == before
    assert given.to_dict() == GenerationConfig(do_sample=False).to_dict()
    assert int(ids[0, -1]) in (processor.vocabulary.end, model.generation_config.pad_token_id)
