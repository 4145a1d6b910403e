"""VL-GPT's stage 2: what is laid out, which head reads what, what is trained, and words and images
in turn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.lm_parts import processor_and_model
from helpers.lm_runs import SMALL, Losses, data, module, saving, trainer
from helpers.vlgpt_parts import stage_one_directory, tiny_diffusion
from PIL import Image
from torch import Tensor, nn

from lavit_lm import MultimodalLM
from lavit_lm.checkpoints.native import save_model
from lavit_lm.generation.interleaved import generate_interleaved
from lavit_lm.generation.sampling import Sampling
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives import by_name
from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.objectives.vlgpt import VLGPT
from lavit_lm.sequences.packing import pack, pad
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualCodes, VisualTokenizer, WeightsError

N = 4
LORA = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}


class Made(NamedTuple):
    processor: MultimodalProcessor
    model: SequenceModel
    objective: VLGPT


def image(seed: int, **more: Any) -> ImageSegment:
    generator = torch.Generator().manual_seed(seed)
    return ImageSegment(
        image=torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8), **more
    )


@pytest.fixture
def where(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any, tmp_path: Path) -> Path:
    """Folders of a visual tokenizer, of a pixel decoder, and of a stage 1 for an LM of width 16."""
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    stage_one_directory(tmp_path, 16)
    return tmp_path


@pytest.fixture
def made(where: Path, tiny_tokenizer: VisualTokenizer) -> Made:
    return built(VLGPT(str(where / "stage"), order="given"), tiny_tokenizer)


def built(objective: VLGPT, visual: VisualTokenizer, family: str = "llama") -> Made:
    processor, plain = processor_and_model(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Made(
            processor,
            SequenceModel(plain.lm, *objective.connectors.build(visual, 16)).eval(),
            objective,
        )


def sequence(made: Made, sample: Sequence[Segment], key: str = "") -> TokenSequence:
    return made.objective.layout(sample, made.processor, torch.Generator().manual_seed(0), key)


def test_the_drawing(tiny_tokenizer: VisualTokenizer):
    """The page's drawing, position by position, with the words that this tokenizer makes of "a
    cat".
    """
    import lavit_lm.objectives.vlgpt.objective as page

    objective = VLGPT(
        tokenizer_sizes={"width": 16, "queries": 2, "depth": 1, "heads": 2, "hidden_size": 32},
        order="given",
    )
    processor, _ = processor_and_model("llama")
    made = objective.layout([TextSegment("a cat"), image(0)], processor, torch.Generator())
    v, words = processor.vocabulary, processor.text("a cat")
    assert made.ids.tolist() == [
        *processor.start,
        *words,
        v.begin,
        processor.pad,
        processor.pad,
        v.end,
        processor.stop,
    ]
    assert page.__doc__ is not None
    drawn = {
        line.split()[0]: line.split()[1:9]
        for line in page.__doc__.splitlines()
        if line.startswith(" " * 26)
    }
    names = {"TEXT": Role.TEXT, "BEGIN": Role.BEGIN, "VIS": Role.VISUAL, "END": Role.END}
    positions = [
        0,
        *[1] * len(words),
        *range(3, 8),
    ]  # of the drawing, in which "a cat" has two words
    assert made.roles.tolist() == [int(names[drawn["role"][p]]) for p in positions]
    for name in ("is_embedding", "predict", "regress"):
        assert getattr(made, name).tolist() == [drawn[name][p] != "." for p in positions], name
    assert not made.prefix.any() and len(made.image_segments) == 1 and len(made.keep) == 0


def test_order_and_learning(made: Made):
    pair = [image(0), TextSegment("rain")]
    both = replace(made.objective, order="both")
    orders = [
        both.layout(pair, made.processor, torch.Generator().manual_seed(seed)).roles[1].item()
        for seed in range(60)
    ]
    first = sum(role == Role.BEGIN for role in orders)
    assert 15 < first < 45, "image before its text, or after it, at random"
    # Instruction tuning: the loss is on answers only.
    asked = sequence(
        made,
        [
            image(0, is_target=False),
            TextSegment(" Based on the image, what is it?", is_target=False),
            TextSegment("rain"),
        ],
    )
    answer = len(made.processor.text("rain")) + 1
    assert (
        asked.predict.tolist() == [False] * (len(asked) - answer) + [True] * answer
        and not asked.regress.any()
    )
    painted = sequence(made, [TextSegment("An image of rain.", is_target=False), image(0)])
    where = painted.roles != Role.TEXT
    assert (
        painted.predict[where].tolist() == [True] + [False] * (N + 1)
        and painted.predict[~where].sum() == 1
    )
    assert painted.regress[where].tolist() == [False, *[True] * N, False]
    with pytest.raises(ValueError, match="example 'x' has no segments"):
        sequence(made, [], "x")
    with pytest.raises(
        ValueError, match="VL-GPT needs the pixels of images, and example 'x' has only the codes"
    ):
        sequence(made, [ImageSegment(torch.tensor([1, 2]))], "x")
    with pytest.raises(ValueError, match="give the directory of lavit-lm fit-tokenizer"):
        VLGPT()
    with pytest.raises(ValueError, match=r"regression_weight: expected a number in 0\.\."):
        VLGPT("x", regression_weight=-1.0)
    with pytest.raises(WeightsError, match="as written by lavit-lm fit-tokenizer"):
        VLGPT("nowhere").to_dict()
    with pytest.raises(ValueError, match="vectors of width 16, the LM's hidden size is 32"):
        made.objective.connectors.build(made.model.bridge._tokenizer[0], 32)  # type: ignore[union-attr,index]


def test_losses_by_hand(made: Made):
    """Every target from its own position, slowly; packed with others it is the same."""
    sequences = [
        sequence(made, s)
        for s in (
            [TextSegment("a red apple"), image(1), TextSegment("rain")],
            [image(2)],
            [TextSegment("two dogs")],
        )
    ]
    batch = pad(sequences, made.processor.pad)
    with torch.no_grad():
        output = made.model(batch)
        losses = made.objective.losses(output, batch)
        nats, squares = [], []
        for b, one in enumerate(sequences):
            vectors = (
                iter(made.model.bridge(one.images, one.keep)) if one.image_segments else iter(())
            )
            for position, role in enumerate(one.roles.tolist()):
                state = output.hidden_states[b, position - 1]
                if role == Role.VISUAL:
                    squares.append(((made.model.regressor(state) - next(vectors)) ** 2).mean())  # type: ignore[misc]
                elif role != Role.END and position:
                    nats.append(-made.model.head(state[None]).log_softmax(-1)[0, one.ids[position]])
        by_hand = torch.stack(nats).mean() + 0.5 * torch.stack(squares).mean()
        weighed = replace(made.objective, regression_weight=0.5)
        torch.testing.assert_close(weighed.total(losses), by_hand)
        assert (
            int(losses["vectors"].count) == len(squares) == 2 * N
            and int(losses["image"].count) == 2
        )
        together = pack([sequences], sum(map(len, sequences)), made.processor.pad)
        packed = weighed.total(weighed.losses(made.model(together), together))
        torch.testing.assert_close(packed, by_hand, atol=1e-5, rtol=1e-5)


def test_vlgpt_03_the_head_follows_the_target(made: Made):
    """NaN in one head is never met by targets of the other kind, forwards or backwards."""
    texts = pad([sequence(made, [TextSegment("a red apple")])], made.processor.pad)
    painted = pad([sequence(made, [TextSegment("rain"), image(1)])], made.processor.pad)
    vectors_only = replace(painted, predict=torch.zeros_like(painted.predict))

    def total_and_gradient(batch: Any) -> tuple[Tensor, Tensor]:
        made.model.zero_grad()
        total = made.objective.total(made.objective.losses(made.model(batch), batch))
        total.backward()
        return total.detach(), next(
            made.model.causal.base_model.layers.parameters()
        ).grad.isfinite().all()

    assert made.model.regressor is not None
    whole = made.model.regressor.weight.data.clone()
    made.model.regressor.weight.data.fill_(torch.nan)
    total, finite = total_and_gradient(texts)
    assert total.isfinite() and total > 0 and finite
    assert total_and_gradient(painted)[0].isnan()
    made.model.regressor.weight.data.copy_(whole)
    made.model.causal.get_output_embeddings().weight.data.fill_(torch.nan)
    total, finite = total_and_gradient(vectors_only)
    assert total.isfinite() and total > 0 and finite
    assert total_and_gradient(painted)[0].isnan()


def test_vlgpt_04_img_is_a_target_here_and_not_in_emu(made: Made):
    emu = Emu("given", queries=N)
    for sample in (
        [TextSegment("rain"), image(0), TextSegment("a red apple"), image(1)],
        [image(2), TextSegment("rain")],
    ):
        ours, theirs = sequence(made, sample), emu.layout(sample, made.processor, torch.Generator())
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(
            ours.is_embedding, theirs.is_embedding
        )
        assert (
            torch.equal(ours.predict ^ theirs.predict, ours.roles == Role.BEGIN)
            and ours.predict.sum() > 2
        )
        assert torch.equal(ours.predict & ~theirs.predict, ours.roles == Role.BEGIN)
        assert torch.equal(ours.regress ^ theirs.regress, ours.roles == Role.END), (
            "nor is its end a target here"
        )


def trained_module(folder: Path, **more: Any) -> Any:
    objective = VLGPT(str(folder / "stage"))
    return module(folder, **{"objective": objective, "lora": LORA, "lm": SMALL, "lr": 1e-2, **more})


def test_vlgpt_05_what_is_trained(folder: Path, tiny_decoder: Any):
    tiny_decoder.save_pretrained(folder / "decoder")
    stage_one_directory(folder, SMALL["hidden_size"])
    training = trained_module(folder)
    training.configure_model()
    model = training.model
    linear = {
        name for name, part in model.causal.named_modules() if type(part).__name__ == "Linear"
    }
    adapted = {name for name, part in model.causal.named_modules() if hasattr(part, "lora_A")}
    assert len(adapted) == 7 * SMALL["num_hidden_layers"] and not any(
        "lm_head" in name for name in adapted
    )
    assert all(any(name.startswith(a) for a in adapted) or "lm_head" in name for name in linear)
    wanted = {
        f"lm.base_model.model.{name}.lora_{ab}.default.weight" for name in adapted for ab in "AB"
    }
    wanted |= {"regressor.weight", "regressor.bias"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    sequences = trained - wanted
    assert (
        wanted < trained and sequences and all("trainable_tokens" in name for name in sequences)
    ), sequences ^ wanted
    new = training.processor.vocabulary.stop - training.processor.vocabulary.begin
    assert {tuple(p.shape) for n, p in model.named_parameters() if n in sequences} == {
        (new, SMALL["hidden_size"])
    }
    assert all(p.shape[0] == 32 for n, p in model.named_parameters() if "lora_A" in n)
    batch = pad(
        [
            sequence(
                Made(training.processor, model, training.objective), [image(0), TextSegment("rain")]
            )
        ],
        0,
    )
    with torch.no_grad():
        started = model.eval()(batch).hidden_states
        with model.lm.disable_adapter():
            torch.testing.assert_close(
                model(batch).hidden_states, started, msg="LoRA changes nothing at first"
            )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    visual = {name: t.clone() for name, t in training.visual.state_dict().items()}
    output = Losses()
    fitted = trainer(folder, 4, [output, saving(folder)])
    fitted.fit(training, data(folder, images=str(folder / "pictures")))
    for name, p in training.model.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained), name
    for name, tensor in training.visual.state_dict().items():
        assert torch.equal(tensor, visual[name]), name
    saved = torch.load(sorted((folder / "ckpt").glob("epoch*"))[-1], weights_only=True)[
        "state_dict"
    ]
    assert {name.removeprefix("model.") for name in saved} == trained, (
        "frozen parts are saved by stage 1 alone"
    )
    resumed = Losses()
    last = sorted((folder / "ckpt").glob("epoch*"), key=lambda path: path.stat().st_mtime)[1]
    trainer(folder, 4, [resumed]).fit(
        trained_module(folder), data(folder, images=str(folder / "pictures")), ckpt_path=last
    )
    assert resumed.values == output.values[-len(resumed.values) :] and 0 < len(resumed.values) < 4


def test_a_saved_model_needs_no_stage_1(folder: Path, tiny_decoder: Any):
    """Of an LM whose embedding is its head, too."""
    tiny_decoder.save_pretrained(folder / "decoder")
    stage_one_directory(folder, SMALL["hidden_size"])
    training = trained_module(
        folder, out=str(folder / "made"), lm={**SMALL, "tie_word_embeddings": True}
    )
    trainer(folder, 3, []).fit(training, data(folder, images=str(folder / "pictures")))
    shutil.move(folder / "stage", folder / "elsewhere")
    lm = MultimodalLM.from_pretrained(folder / "made")
    assert isinstance(lm.objective, VLGPT) and lm.objective.sizes.queries == N
    batch = pad(
        [sequence(Made(lm.processor, lm.model, lm.objective), [image(0), TextSegment("rain")])],
        lm.processor.pad,
    )
    with torch.no_grad():
        ours, theirs = (one(batch) for one in (training.model.eval(), lm.model))
        assert training.model.bridge is not None
        torch.testing.assert_close(theirs.inputs_embeds, ours.inputs_embeds)
        torch.testing.assert_close(theirs.hidden_states, ours.hidden_states, atol=1e-4, rtol=1e-4)
    shown = folder / "pictures" / "train" / "0.png"
    assert lm.caption(str(shown), 4) == MultimodalLM.from_pretrained(folder / "made").caption(
        str(shown), 4
    )
    with pytest.raises(WeightsError, match="as written by lavit-lm fit-tokenizer"):
        lm.generate_images("rain")
    drawn = MultimodalLM.from_pretrained(
        folder / "made", decoder=str(folder / "elsewhere")
    ).generate_images("rain", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert drawn[0].size == (16, 16)
    save_model(
        folder / "again",
        lm.model,
        lm.processor,
        lm.objective,
        str(folder / "visual"),
        lm.visual_tokenizer.fingerprint(),
    )
    assert (folder / "again" / "lavit_lm.json").read_text() == (
        folder / "made" / "lavit_lm.json"
    ).read_text()
    # Sizes without weights: nothing random can pass for a tokenizer.
    generated = json.loads((folder / "made" / "lavit_lm.json").read_text())["objective"]
    unread = VLGPT(**{name: value for name, value in generated.items() if name != "name"})
    hollow = module(folder, objective=unread, lora=LORA, lm=SMALL)
    with pytest.raises(ValueError, match="expected a finite loss, got nan; stopped before"):
        trainer(folder, 1, []).fit(hollow, data(folder, images=str(folder / "pictures")))


# Words and images in turn


def slowly(
    made: Made,
    prompt: TokenSequence,
    opened: bool,
    max_new_tokens: int,
    max_images: int,
    sampling: Sampling,
    seed: int,
) -> list[Any]:
    """What generate_interleaved does, for one sequence, in the plainest words; every step reads the
    whole sequence anew.
    """
    processor, model = made.processor, made.model
    v, table = processor.vocabulary, model.causal.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    keep, shown = prompt.keep, prompt.images
    inputs = model.embed(prompt.ids[None], prompt.is_embedding[None], shown, keep)[0]

    def state() -> Tensor:
        return model.causal.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]

    generated: list[Any] = []
    painting = opened
    while painting or max_new_tokens:
        if painting:
            vectors = []
            for _ in range(N):
                vectors.append(model.regressor(state()))  # type: ignore[misc]
                inputs = torch.cat([inputs, vectors[-1][None]])
            generated.append(torch.stack(vectors))
            if not max_new_tokens:
                break
            inputs = torch.cat([inputs, table(torch.tensor([v.end]))])
        painting, words = False, []
        while len(words) < max_new_tokens:
            logits = model.head(state()[None]).float()
            for i in range(logits.shape[1]):
                token = (
                    processor.text_tokenizer.convert_ids_to_tokens(i)
                    if i < len(processor.text_tokenizer)
                    else None
                )
                if i == processor.stop or (i == v.begin and max_images):
                    continue
                if (
                    token is None
                    or v.begin <= i < v.stop
                    or token in processor.text_tokenizer.all_special_tokens
                ):
                    logits[0, i] = -torch.inf
            (drawn,) = sampling.draw(logits, [generator]).tolist()
            if drawn == processor.stop:
                break
            inputs = torch.cat([inputs, table(torch.tensor([drawn]))])
            if drawn == v.begin:
                painting, max_images = True, max_images - 1
                break
            words.append(drawn)
        if words:
            generated.append(words)
        if not painting:
            break
    return generated


def opens_often(made: Made) -> None:
    """Make the model say <|img| about every third time; at random it would once in hundreds."""
    head, begin = made.model.head, made.processor.vocabulary.begin

    def louder(states: Tensor) -> Tensor:
        logits = head(states)
        return logits.index_add(1, torch.tensor([begin]), torch.full((len(logits), 1), 10.0))

    made.model.head = louder  # type: ignore[method-assign]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vlgpt_06_n_vectors_then_text_again(
    where: Path, tiny_tokenizer: VisualTokenizer, family: str
):
    """Rows of one batch in different states, against one sequence at a time, with and without a
    cache.
    """
    made = built(VLGPT(str(where / "stage"), order="given"), tiny_tokenizer, family)
    opens_often(made)
    prompts = [
        made.objective.prompt(segments, made.processor, "text")
        for segments in (
            [TextSegment("a")],
            [image(0), TextSegment("two dogs run along")],
            [TextSegment("rain"), image(1)],
            [TextSegment("")],
        )
    ]
    kinds: set[str] = set()
    with torch.no_grad():
        for trial, (words, images) in enumerate([(5, 2), (3, 1), (1, 3), (4, 0)]):
            sampling = Sampling(temperature=2.0)
            seeds = [100 * trial + i for i in range(len(prompts))]
            generators = lambda: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731, B023
            options: dict[str, Any] = {
                "max_new_tokens": words,
                "max_images": images,
                "sampling": sampling,
            }
            for cached in (True, False):
                found = generate_interleaved(
                    made.model,
                    made.processor,
                    prompts,
                    N,
                    generator=generators(),
                    use_cache=cached,
                    **options,
                )
                for prompt, seed, ours in zip(prompts, seeds, found, strict=True):
                    theirs = slowly(made, prompt, False, words, images, sampling, seed)
                    assert [type(part) for part in ours] == [type(part) for part in theirs]
                    for one, other in zip(ours, theirs, strict=True):
                        if isinstance(one, list):
                            assert one == other
                        else:
                            assert one.shape == (N, 16)
                            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
            kinds |= {
                "".join("t" if isinstance(part, list) else "i" for part in ours) for ours in found
            }
            assert all(sum(isinstance(part, Tensor) for part in ours) <= images for ours in found)
    assert any("tit" in kind for kind in kinds) and any(
        "ti" in k and k.count("i") > 1 for k in kinds
    ), kinds


def test_vlgpt_06_text_image_text_image_in_one_call(made: Made):
    """A model that is made to say a word, a image, a word, a image and its end."""
    v, processor = made.processor.vocabulary, made.processor
    word = processor.text("rain")[-1]
    order = iter([word, v.begin, word, v.begin, processor.stop])
    asked: list[str] = []

    def head(states: Tensor) -> Tensor:
        asked.append("head")
        logits = torch.zeros(len(states), made.model.causal.get_output_embeddings().weight.shape[0])
        logits[:, next(order)] = 9.0
        return logits

    made.model.head = head  # type: ignore[method-assign]
    made.model.regressor.register_forward_hook(lambda *_: asked.append("regressor"))  # type: ignore[union-attr]
    is_embedding: list[Tensor] = []
    table = made.model.causal.get_input_embeddings()
    reads = made.model.causal.base_model.forward
    made.model.causal.base_model.forward = lambda **k: (
        is_embedding.append(k["inputs_embeds"][0, -1]) or reads(**k)
    )
    prompt = made.objective.prompt([TextSegment("a")], processor, "text")
    (generated,) = generate_interleaved(
        made.model, processor, [prompt], N, max_new_tokens=4, max_images=2
    )
    assert [type(part) for part in generated] == [list, Tensor, list, Tensor] and generated[
        0
    ] == generated[2] == [word]
    turn = ["head", "head", *["regressor"] * N]
    assert asked == [*turn, *turn, "head"], "N regressions, no more, and then the LM's head again"
    known = [table.weight[word], table.weight[v.begin], *generated[1], table.weight[v.end]]
    known += [table.weight[word], table.weight[v.begin], *generated[3], table.weight[v.end]]
    assert len(is_embedding) == len(known) + 1
    for position, (ours, theirs) in enumerate(zip(is_embedding[1:], known, strict=True)):
        torch.testing.assert_close(ours, theirs, msg=f"place {position}")


def test_prompts_for_an_image(made: Made):
    """It is opened by the prompt; with words after it, and without any."""
    prompts = [
        made.objective.prompt([TextSegment(text)], made.processor, "image")
        for text in ("rain", "two dogs run")
    ]
    assert all(int(p.ids[-1]) == made.processor.vocabulary.begin for p in prompts)
    with torch.no_grad():
        for words, images in ((0, 0), (3, 0), (3, 1)):
            options: dict[str, Any] = {
                "starts_with_image": True,
                "max_new_tokens": words,
                "max_images": images,
            }
            found = generate_interleaved(made.model, made.processor, prompts, N, **options)
            for prompt, ours in zip(prompts, found, strict=True):
                theirs = slowly(made, prompt, True, words, images, Sampling(0.0), 0)
                assert [type(part) for part in ours] == [type(part) for part in theirs]
                torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
                assert [p for p in ours if isinstance(p, list)] == [
                    p for p in theirs if isinstance(p, list)
                ]
    assert generate_interleaved(made.model, made.processor, prompts, N) == [[], []], (
        "neither words nor pictures: nothing"
    )
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_interleaved(made.model, made.processor, [], N)
    with pytest.raises(ValueError, match="without guidance"):
        generate_interleaved(
            made.model, made.processor, prompts, N, sampling=Sampling(guidance_scale=2.0)
        )
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        generate_interleaved(
            made.model, made.processor, prompts, N, starts_with_image=True, max_images=30
        )
    made.model.regressor = None
    with pytest.raises(ValueError, match="no regression head"):
        generate_interleaved(made.model, made.processor, prompts, N)


# As a user has it


@pytest.fixture
def lm(made: Made, tiny_tokenizer: VisualTokenizer) -> MultimodalLM:
    return MultimodalLM(made.model, made.processor, tiny_tokenizer, "default", made.objective)


def test_prompt_templates(lm: MultimodalLM, photos: list[Path]):
    captions = lm.caption([str(photo) for photo in photos[:2]], 5)
    assert len(captions) == 2 and lm.caption(str(photos[1]), 5) == captions[1]
    asked = lm.prompts.sequence(
        [photos[0], lm.objective.prompt_templates.answer.replace("{}", "what is it?")], "text"
    )
    v = lm.processor.vocabulary
    words = lm.processor.text(" Based on the image, what is it? Short answer:")
    assert asked.ids.tolist() == [
        *lm.processor.start,
        v.begin,
        *[lm.processor.pad] * N,
        v.end,
        *words,
    ]
    assert isinstance(lm.answer(str(photos[0]), "what is it?", max_new_tokens=4), str)
    opened = lm.prompts.for_image("a red apple")
    assert opened.ids.tolist() == [
        *lm.processor.start,
        *lm.processor.text("An image of a red apple."),
        v.begin,
    ]
    bare = replace(lm.objective, caption_prompt="", image_prompt="")  # type: ignore[type-var]
    plain = MultimodalLM(lm.model, lm.processor, lm.visual_tokenizer, None, bare)
    assert plain.prompts.for_image("a red apple").ids.tolist() == [
        *lm.processor.start,
        *lm.processor.text("a red apple"),
        v.begin,
    ]
    assert plain.caption(str(photos[0]), 5) == plain.generate_text_batch([[photos[0]]], 5)[0]
    assert (
        VLGPT(**{k: x for k, x in bare.to_dict().items() if k != "name"}).prompt_templates
        == bare.prompt_templates
    ), "saved with the model"
    vectors = lm.generate_vectors_batch(["a red apple", ["rain", photos[0]]])
    assert vectors.shape == (2, N, 16)
    torch.testing.assert_close(
        lm.generate_vectors_batch(["a red apple"])[0], vectors[0], atol=1e-5, rtol=1e-5
    )
    drawn = lm.generate_images(
        "rain", 2, generator=torch.Generator().manual_seed(0), num_inference_steps=2
    )
    assert [p.size for p in drawn] == [(16, 16)] * 2
    ranked = lm.rank([photos[0]], ["a red apple", "rain"])
    sequence = lm.prompts.sequence([photos[0], "rain"], "text")
    with torch.no_grad():
        batch = pad([sequence], lm.processor.pad)
        log_p = lm.model.head(lm.model(batch).hidden_states[0]).float().log_softmax(-1)
    ids = [*sequence.ids.tolist(), lm.processor.stop]
    start = len(ids) - len(lm.processor.text("rain")) - 1
    assert (
        abs(float(ranked[1]) - sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
        < 1e-3
    )


def test_text_image_text_image(lm: MultimodalLM, photos: list[Path]):
    opens_often(Made(lm.processor, lm.model, lm.objective))
    kinds = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "temperature": 2.0}
        generated = lm.complete(["a red apple", photos[0]], 6, 2, decode=False, **options)
        kinds.add("".join("t" if isinstance(part, str) else "i" for part in generated))
        assert all(part.shape == (N, 16) for part in generated if not isinstance(part, str))
    assert "titi" in {kind[:4] for kind in kinds}, kinds
    drawn = lm.complete("a", 6, 2, generator=torch.Generator().manual_seed(3), temperature=2.0)
    assert any(isinstance(part, Image.Image) for part in drawn)
    assert all(isinstance(part, str) for part in lm.complete("a", 4, 0)), (
        "no pictures asked for, none said"
    )


def test_what_is_refused(lm: MultimodalLM, photos: list[Path]):
    with pytest.raises(ValueError, match="vlgpt generates vectors for images, no codes"):
        lm.generate_codes("rain")
    with pytest.raises(
        ValueError,
        match="VL-GPT needs the pixels of images, and the prompt has only the codes of one",
    ):
        lm.complete([VisualCodes.from_list([[1, 2]], 16)], 3, 0)
    with pytest.raises(ValueError, match="vlgpt: the likelihood of image segments is not defined"):
        lm.rank("rain", [photos[0]])
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        lm.generate_images("a red apple " * 60)
    assert by_name("vlgpt") is VLGPT


def test_vlgpt_07_either_condition_left_out_changes_the_sample(
    where: Path, tiny_tokenizer: VisualTokenizer
):
    """Through MultimodalLM's own decoder, with a diffusion model that has both."""
    stage_one_directory(where, 16, tiny_diffusion(where))
    made = built(VLGPT(str(where / "stage"), order="given"), tiny_tokenizer)
    lm = MultimodalLM(
        made.model, made.processor, tiny_tokenizer, str(where / "stage"), made.objective
    )
    vectors, null = lm.generate_vectors_batch(["a red apple"]), lm.generate_vectors_batch([""])
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}

    def drawn(**more: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        (image,) = lm.decoder.decode(ImageVectors(vectors, null), generator, **options, **more)
        return image.tobytes()

    whole, unseen, unread = drawn(), drawn(leave_out="image"), drawn(leave_out="text")
    assert whole == drawn() and whole != unseen and whole != unread and unseen != unread
    seeded = torch.Generator().manual_seed(0)
    (image,) = lm.generate_images(
        "a red apple", 1, generator=seeded, num_inference_steps=2, decoder_guidance_scale=3.0
    )
    assert image.tobytes() == whole


def test_one_batch_is_overfitted(made: Made):
    """Words, the opening and the vectors of a text-first pair, each by its own head, with what
    stage 2 trains.
    """
    sequences = [
        sequence(made, [TextSegment(text, is_target=False), image(i)])
        for i, text in enumerate(["rain", "a red apple"])
    ]
    batch = pad(sequences, made.processor.pad)
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], 5e-3)
    assert made.model.bridge is not None and not any(
        p.requires_grad for p in made.model.bridge.parameters()
    )
    with torch.no_grad():
        made.model.regressor.weight.copy_(torch.eye(16))  # type: ignore[union-attr]
    for _ in range(200):
        losses = made.objective.losses(made.model(batch), batch)
        optimizer.zero_grad()
        made.objective.total(losses).backward()
        optimizer.step()
    assert float(losses["image"].mean) < 0.05 and float(losses["vectors"].mean) < 0.05 * float(
        losses["spread"].mean
    )
    assert isinstance(made.model.regressor, nn.Linear)
    prompts = [
        made.objective.prompt([TextSegment(text)], made.processor, "image")
        for text in ("rain", "a red apple")
    ]
    for i, (vectors,) in enumerate(
        generate_interleaved(made.model, made.processor, prompts, N, starts_with_image=True)
    ):
        wanted = made.model.bridge(sequences[i].images, sequences[i].keep)
        assert (vectors - wanted).abs().mean() < 0.3 * wanted.std(), "what was learnt is said"
