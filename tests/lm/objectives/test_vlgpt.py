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
from lavit_lm.models.loading import sequence_model
from lavit_lm.models.sequence_model import SequenceModel, noisy_vectors
from lavit_lm.objectives.emu import Emu
from lavit_lm.objectives.records import ImageVectors
from lavit_lm.objectives.vlgpt import VLGPT
from lavit_lm.objectives.vlgpt import objective as page
from lavit_lm.sequences.packing import pack, pad
from lavit_lm.sequences.segments import ImageSegment, Segment, TextSegment
from lavit_lm.sequences.token_sequence import Role, TokenSequence
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_tok import VisualTokenizer, WeightsError

N = 4
LORA = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}


class Made(NamedTuple):
    processor: MultimodalProcessor
    model: SequenceModel
    objective: VLGPT


def image(seed: int, **more: Any) -> ImageSegment:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageSegment(image=pixels, **more)


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
        model = SequenceModel(plain.lm, *objective.connectors.build(visual, 16))
    return Made(processor, model.eval(), objective)


def sequence(made: Made, sample: Sequence[Segment], key: str = "") -> TokenSequence:
    return made.objective.layout(sample, made.processor, torch.Generator().manual_seed(0), key)


def test_the_drawing(tiny_tokenizer: VisualTokenizer):
    """The page's drawing, position by position, with the words that this tokenizer makes of "a
    cat".
    """
    sizes = {"width": 16, "queries": 2, "depth": 1, "heads": 2, "hidden_size": 32}
    objective = VLGPT(tokenizer_sizes=sizes, order="given")
    processor, _ = processor_and_model("llama")
    made = objective.layout([TextSegment("a cat"), image(0)], processor, torch.Generator())
    v, words, pad_id = processor.vocabulary, processor.text("a cat"), processor.pad
    ids = [*processor.start, *words, v.begin, pad_id, pad_id, v.end, processor.stop]
    assert made.ids.tolist() == ids
    lines = [x.split() for x in (page.__doc__ or "").splitlines() if x.startswith(" " * 26)]
    drawn = {name: columns[:8] for name, *columns in lines}
    names = {"TEXT": Role.TEXT, "BEGIN": Role.BEGIN, "VIS": Role.VISUAL, "END": Role.END}
    positions = [0, *[1] * len(words), *range(3, 8)]  # in the drawing "a cat" has two tokens
    assert made.roles.tolist() == [int(names[drawn["role"][p]]) for p in positions]
    for name in ("is_embedding", "predict", "regress"):
        assert getattr(made, name).tolist() == [drawn[name][p] != "." for p in positions], name
    assert not made.prefix.any() and len(made.image_segments) == 1 and len(made.keep) == 0


def test_order_and_learning(made: Made):
    both, pair = replace(made.objective, order="both"), [image(0), TextSegment("rain")]
    generators = [torch.Generator().manual_seed(seed) for seed in range(60)]
    made_orders = [both.layout(pair, made.processor, one).roles[1].item() for one in generators]
    assert 15 < made_orders.count(Role.BEGIN) < 45, "image before its text, or after it, at random"
    # Instruction tuning: the loss is on answers only.
    question = TextSegment(" Based on the image, what is it?", is_target=False)
    asked = sequence(made, [image(0, is_target=False), question, TextSegment("rain")])
    answer = len(made.processor.text("rain")) + 1
    assert asked.predict.tolist() == [False] * (len(asked) - answer) + [True] * answer
    assert not asked.regress.any()
    generated = sequence(made, [TextSegment("An image of rain.", is_target=False), image(0)])
    where = generated.roles != Role.TEXT
    assert generated.predict[where].tolist() == [True] + [False] * (N + 1)
    assert generated.predict[~where].sum() == 1
    assert generated.regress[where].tolist() == [False, *[True] * N, False]
    with pytest.raises(ValueError, match="give the directory of lavit-lm fit-tokenizer"):
        VLGPT()
    with pytest.raises(ValueError, match=r"regression_weight: expected a number in 0\.\."):
        VLGPT("x", regression_weight=-1.0)
    with pytest.raises(ValueError, match=r"vector_noise: expected a number in 0\.\."):
        VLGPT("x", vector_noise=-1.0)
    with pytest.raises(WeightsError, match="as written by lavit-lm fit-tokenizer"):
        VLGPT("nowhere").to_dict()
    with pytest.raises(ValueError, match="vectors of width 16, the LM's hidden size is 32"):
        made.objective.connectors.build(made.model.bridge._tokenizer[0], 32)  # type: ignore[union-attr,index]


def test_noise_on_vectors_that_follow_a_text(made: Made):
    """Where the drawing of `noisy_vectors` has it; in training only, and the same for a batch."""
    pairs = [TextSegment("rain"), image(1)], [image(2), TextSegment("rain")], [image(3)]
    answered = [TextSegment("rain"), image(4, is_target=False), TextSegment("rain")]
    batch = pad([sequence(made, s) for s in (*pairs, answered)], made.processor.pad)
    embeds = made.model.embed(batch.ids, batch.is_embedding, batch.images, batch.keep)
    noisy = noisy_vectors(embeds, batch, 2.0)
    changed = (noisy != embeds).any(-1)
    assert changed[0].equal(batch.is_embedding[0]) and not changed[1:].any()
    assert noisy.equal(noisy_vectors(embeds, batch, 2.0))


def test_the_largest_noise_is_a_ratio_of_the_spread(made: Made):
    sequences = [sequence(made, [TextSegment("rain"), image(i)]) for i in range(64)]
    blocks = [sequences[i : i + 2] for i in range(0, 64, 2)]
    packed = pack(blocks, 2 * len(sequences[0]), made.processor.pad)
    embeds = torch.randn(*packed.ids.shape, 16) * torch.linspace(0.1, 3, 16)
    added = (noisy_vectors(embeds, packed, 2.0) - embeds)[packed.is_embedding].view(64, N, 16)
    level = (added / embeds[packed.is_embedding].std(0)).flatten(1).std(1)
    assert level.min() < 0.3 and 1.7 < level.max() < 2.6  # one uniform level for each image
    assert 0.8 < level.mean() < 1.2


def test_noise_in_training_only(where: Path, tiny_tokenizer: VisualTokenizer):
    noise = replace(VLGPT(str(where / "stage"), order="given"), vector_noise=1.0)
    made = built(noise, tiny_tokenizer)
    model = sequence_model(made.model.lm, made.model.bridge, made.model.regressor, vector_noise=1.0)
    batch = pad([sequence(made, [TextSegment("rain"), image(1)])], made.processor.pad)
    before, trained = model.eval()(batch), model.train()(batch)
    assert trained.inputs_embeds.equal(before.inputs_embeds), "the targets have no noise"
    first = int(batch.is_embedding[0].nonzero()[0])
    assert trained.hidden_states[:, :first].equal(before.hidden_states[:, :first])
    assert not trained.hidden_states[:, first:].allclose(before.hidden_states[:, first:])


def test_losses_by_hand(made: Made):
    """Every target from its own position, slowly; packed with others it is the same."""
    three = [TextSegment("a red apple"), image(1), TextSegment("rain")]
    sequences = [sequence(made, s) for s in (three, [image(2)], [TextSegment("two dogs")])]
    batch = pad(sequences, made.processor.pad)
    with torch.no_grad():
        output = made.model(batch)
        losses = made.objective.losses(output, batch)
        nats, squares = [], []
        for b, one in enumerate(sequences):
            vectors = made.model.bridge(one.images, one.keep) if one.image_segments else ()
            vectors = iter(vectors)
            for position, role in enumerate(one.roles.tolist()):
                state = output.hidden_states[b, position - 1]
                if role == Role.VISUAL:
                    squares.append(((made.model.regressor(state) - next(vectors)) ** 2).mean())  # type: ignore[misc]
                elif role != Role.END and position:
                    nats.append(-made.model.head(state[None]).log_softmax(-1)[0, one.ids[position]])
        by_hand = torch.stack(nats).mean() + 0.5 * torch.stack(squares).mean()
        weighed = replace(made.objective, regression_weight=0.5)
        torch.testing.assert_close(weighed.total(losses), by_hand)
        assert int(losses["vectors"].count) == len(squares) == 2 * N
        assert int(losses["image"].count) == 2
        together = pack([sequences], sum(map(len, sequences)), made.processor.pad)
        packed = weighed.total(weighed.losses(made.model(together), together))
        torch.testing.assert_close(packed, by_hand, atol=1e-5, rtol=1e-5)


def test_vlgpt_03_the_head_follows_the_target(made: Made):
    """NaN in one head is never met by targets of the other kind, forwards or backwards."""
    texts = pad([sequence(made, [TextSegment("a red apple")])], made.processor.pad)
    both = pad([sequence(made, [TextSegment("rain"), image(1)])], made.processor.pad)
    vectors_only = replace(both, predict=torch.zeros_like(both.predict))
    assert made.model.regressor is not None
    output = made.model.causal.get_output_embeddings()

    def total(batch: Any) -> Tensor:
        return made.objective.total(made.objective.losses(made.model(batch), batch))

    for weight, without in ((made.model.regressor.weight, texts), (output.weight, vectors_only)):
        whole = weight.data.clone()
        weight.data.fill_(torch.nan)
        made.model.zero_grad()
        loss = total(without)
        loss.backward()
        gradient = next(made.model.causal.base_model.layers.parameters()).grad
        assert loss.isfinite() and loss > 0 and gradient.isfinite().all()
        assert total(both).isnan()
        weight.data.copy_(whole)


def test_vlgpt_04_img_is_a_target_here_and_not_in_emu(made: Made):
    emu, generator = Emu("given", queries=N), torch.Generator()
    longer = [TextSegment("rain"), image(0), TextSegment("a red apple"), image(1)]
    for sample in (longer, [image(2), TextSegment("rain")]):
        ours, theirs = sequence(made, sample), emu.layout(sample, made.processor, generator)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.is_embedding, theirs.is_embedding)
        begins, ends = ours.roles == Role.BEGIN, ours.roles == Role.END
        assert torch.equal(ours.predict, theirs.predict | begins) and ours.predict.sum() > 2
        assert not (theirs.predict & begins).any()
        assert torch.equal(ours.regress ^ theirs.regress, ends), "nor is its end a target here"


def trained_module(folder: Path, **more: Any) -> Any:
    objective = VLGPT(str(folder / "stage"))
    return module(folder, **{"objective": objective, "lora": LORA, "lm": SMALL, "lr": 1e-2, **more})


def test_vlgpt_05_what_is_trained(folder: Path, tiny_decoder: Any):
    tiny_decoder.save_pretrained(folder / "decoder")
    stage_one_directory(folder, SMALL["hidden_size"])
    training = trained_module(folder)
    training.configure_model()
    model, vocabulary = training.model, training.processor.vocabulary
    kinds = {name: type(part).__name__ for name, part in model.causal.named_modules()}
    linear = {name for name, kind in kinds.items() if kind == "Linear"}
    adapted = {name for name, part in model.causal.named_modules() if hasattr(part, "lora_A")}
    assert len(adapted) == 7 * SMALL["num_hidden_layers"]
    assert not any("lm_head" in name for name in adapted)
    assert all(any(name.startswith(a) for a in adapted) or "lm_head" in name for name in linear)
    lora = [f"lm.base_model.model.{n}.lora_{ab}.default.weight" for n in adapted for ab in "AB"]
    wanted = {*lora, "regressor.weight", "regressor.bias"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tokens = trained - wanted
    assert wanted < trained and tokens and all("trainable_tokens" in name for name in tokens)
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if name in tokens}
    assert shapes == {(vocabulary.stop - vocabulary.begin, SMALL["hidden_size"])}
    assert all(p.shape[0] == 32 for n, p in model.named_parameters() if "lora_A" in n)
    made = Made(training.processor, model, training.objective)
    batch = pad([sequence(made, [image(0), TextSegment("rain")])], 0)
    with torch.no_grad():
        started = model.eval()(batch).hidden_states
        with model.lm.disable_adapter():
            plain = model(batch).hidden_states
    torch.testing.assert_close(plain, started, msg="LoRA changes nothing at first")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    visual = {name: t.clone() for name, t in training.visual.state_dict().items()}
    rows = {"images": str(folder / "pictures")}
    output = Losses()
    trainer(folder, 4, [output, saving(folder)]).fit(training, data(folder, **rows))
    for name, p in training.model.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained), name
    for name, tensor in training.visual.state_dict().items():
        assert torch.equal(tensor, visual[name]), name
    last = sorted((folder / "ckpt").glob("epoch*"))[-1]
    saved = torch.load(last, weights_only=True)["state_dict"]
    names = {name.removeprefix("model.") for name in saved}
    assert names == trained, "frozen parts are saved by stage 1 alone"
    resumed = Losses()
    second = sorted((folder / "ckpt").glob("epoch*"), key=lambda path: path.stat().st_mtime)[1]
    fitted = trainer(folder, 4, [resumed])
    fitted.fit(trained_module(folder), data(folder, **rows), ckpt_path=second)
    assert resumed.values == output.values[-len(resumed.values) :] and 0 < len(resumed.values) < 4


def test_a_saved_model_needs_no_stage_1(folder: Path, tiny_decoder: Any):
    """Of an LM whose embedding is its head, too."""
    tiny_decoder.save_pretrained(folder / "decoder")
    stage_one_directory(folder, SMALL["hidden_size"])
    made, again = folder / "made", folder / "again"
    tied = {**SMALL, "tie_word_embeddings": True}
    training, images = trained_module(folder, out=str(made), lm=tied), str(folder / "pictures")
    trainer(folder, 3, []).fit(training, data(folder, images=images))
    shutil.move(folder / "stage", folder / "elsewhere")
    lm = MultimodalLM.from_pretrained(made)
    assert isinstance(lm.objective, VLGPT) and lm.objective.sizes.queries == N
    parts = Made(lm.processor, lm.model, lm.objective)
    batch = pad([sequence(parts, [image(0), TextSegment("rain")])], lm.processor.pad)
    with torch.no_grad():
        ours, theirs = (one(batch) for one in (training.model.eval(), lm.model))
        assert training.model.bridge is not None
        torch.testing.assert_close(theirs.inputs_embeds, ours.inputs_embeds)
        torch.testing.assert_close(theirs.hidden_states, ours.hidden_states, atol=1e-4, rtol=1e-4)
    shown = str(folder / "pictures" / "train" / "0.png")
    assert lm.caption(shown, 4) == MultimodalLM.from_pretrained(made).caption(shown, 4)
    with pytest.raises(ValueError, match=r"vector_noise: expected a number in 0\.\."):
        VLGPT("x", vector_noise=-1.0)
    with pytest.raises(WeightsError, match="as written by lavit-lm fit-tokenizer"):
        lm.generate_images("rain")
    decoding = MultimodalLM.from_pretrained(made, decoder=str(folder / "elsewhere"))
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    assert decoding.generate_images("rain", **options)[0].size == (16, 16)
    fingerprint = lm.visual_tokenizer.fingerprint()
    save_model(again, lm.model, lm.processor, lm.objective, str(folder / "visual"), fingerprint)
    text = (made / "lavit_lm.json").read_text()
    assert (again / "lavit_lm.json").read_text() == text
    # Sizes without weights: nothing random can pass for a tokenizer.
    values = json.loads(text)["objective"]
    unread = VLGPT(**{name: value for name, value in values.items() if name != "name"})
    hollow = module(folder, objective=unread, lora=LORA, lm=SMALL)
    with pytest.raises(ValueError, match="expected a finite loss, got nan; stopped before"):
        trainer(folder, 1, []).fit(hollow, data(folder, images=images))


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
    processor, model, tokenizer = made.processor, made.model, made.processor.text_tokenizer
    v, table = processor.vocabulary, model.causal.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    inputs = model.embed(prompt.ids[None], prompt.is_embedding[None], prompt.images, prompt.keep)[0]

    def state() -> Tensor:
        return model.causal.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]

    def banned(i: int) -> bool:
        if i == processor.stop or (i == v.begin and max_images):
            return False
        if i >= len(tokenizer) or v.begin <= i < v.stop:
            return True
        return tokenizer.convert_ids_to_tokens(i) in tokenizer.all_special_tokens

    generated: list[Any] = []
    in_image = opened
    while in_image or max_new_tokens:
        if in_image:
            vectors = []
            for _ in range(N):
                vectors.append(model.regressor(state()))  # type: ignore[misc]
                inputs = torch.cat([inputs, vectors[-1][None]])
            generated.append(torch.stack(vectors))
            if not max_new_tokens:
                break
            inputs = torch.cat([inputs, table(torch.tensor([v.end]))])
        in_image, words = False, []
        while len(words) < max_new_tokens:
            logits = model.head(state()[None]).float()
            logits[0, [i for i in range(logits.shape[1]) if banned(i)]] = -torch.inf
            (drawn,) = sampling.draw(logits, [generator]).tolist()
            if drawn == processor.stop:
                break
            inputs = torch.cat([inputs, table(torch.tensor([drawn]))])
            if drawn == v.begin:
                in_image, max_images = True, max_images - 1
                break
            words.append(drawn)
        if words:
            generated.append(words)
        if not in_image:
            break
    return generated


def kinds(parts: list[Any]) -> str:
    """Texts and images of an output in their order, such as "tit"."""
    return "".join("i" if isinstance(part, Tensor) else "t" for part in parts)


def close(ours: list[Any], theirs: list[Any]) -> None:
    """The same parts in the same order: equal ids, vectors up to rounding."""
    assert kinds(ours) == kinds(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, list):
            assert one == other
        else:
            assert one.shape == (N, 16)
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def opens_often(made: Made) -> None:
    """Make the model say <|img| about every third time; at random it would once in hundreds."""
    output = made.model.causal.get_output_embeddings()
    output.bias = torch.nn.Parameter(torch.zeros(len(output.weight)))
    output.bias.data[made.processor.vocabulary.begin] = 10.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vlgpt_06_n_vectors_then_text_again(
    where: Path, tiny_tokenizer: VisualTokenizer, family: str
):
    """Sequences of one batch in different states, against one sequence at a time, with and without
    a cache.
    """
    made = built(VLGPT(str(where / "stage"), order="given"), tiny_tokenizer, family)
    opens_often(made)
    samples = [[TextSegment("a")], [image(0), TextSegment("two dogs run along")]]
    samples += [[TextSegment("rain"), image(1)], [TextSegment("")]]
    prompts = [made.objective.prompt(segments, made.processor, "text") for segments in samples]
    sampling, seen = Sampling(temperature=2.0), set()
    with torch.no_grad():
        for trial, (words, images) in enumerate([(5, 2), (3, 1), (1, 3), (4, 0)]):
            seeds = [100 * trial + i for i in range(len(prompts))]
            options: dict[str, Any] = {"max_new_tokens": words, "max_images": images}
            expected = [
                slowly(made, prompt, False, words, images, sampling, seed)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            for cached in (True, False):
                options |= {"sampling": sampling, "use_cache": cached}
                options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
                found = generate_interleaved(made.model, made.processor, prompts, N, **options)
                for ours, theirs in zip(found, expected, strict=True):
                    close(ours, theirs)
            seen |= {kinds(ours) for ours in found}
            assert all(kinds(ours).count("i") <= images for ours in found)
    assert any("tit" in kind for kind in seen), seen
    assert any("ti" in kind and kind.count("i") > 1 for kind in seen), seen


def test_vlgpt_06_text_image_text_image_in_one_call(where: Path, tiny_tokenizer: VisualTokenizer):
    """A model that is made to generate a word, an image, a word, an image and the end."""
    # A family whose forward pass is that of `transformers` here, so that it can be replaced
    made = built(VLGPT(str(where / "stage"), order="given"), tiny_tokenizer, "gpt2")
    processor, causal = made.processor, made.model.causal
    v, table = processor.vocabulary, causal.get_input_embeddings().weight
    word = processor.text("rain")[-1]
    order = iter([word, v.begin, word, v.begin, processor.stop])
    asked: list[str] = []

    def head(states: Tensor) -> Tensor:
        asked.append("head")
        logits = torch.zeros(len(states), causal.get_output_embeddings().weight.shape[0])
        logits[:, next(order)] = 9.0
        return logits

    made.model.head = head  # type: ignore[method-assign]
    made.model.regressor.register_forward_hook(lambda *_: asked.append("regressor"))  # type: ignore[union-attr]
    last: list[Tensor] = []
    reads = causal.base_model.forward
    causal.base_model.forward = lambda **k: last.append(k["inputs_embeds"][0, -1]) or reads(**k)
    prompt = made.objective.prompt([TextSegment("a")], processor, "text")
    limits = {"max_new_tokens": 4, "max_images": 2}
    (parts,) = generate_interleaved(made.model, processor, [prompt], N, **limits)
    assert kinds(parts) == "titi" and parts[0] == parts[2] == [word]
    turn = ["head", "head", *["regressor"] * N]
    assert asked == [*turn, *turn, "head"], "N regressions, no more, and then the LM's head again"
    known = [table[word], table[v.begin], *parts[1], table[v.end]]
    known += [table[word], table[v.begin], *parts[3], table[v.end]]
    assert len(last) == len(known) + 1
    for position, (ours, theirs) in enumerate(zip(last[1:], known, strict=True)):
        torch.testing.assert_close(ours, theirs, msg=f"position {position}")


def test_prompts_for_an_image(made: Made):
    """It is opened by the prompt; with words after it, and without any."""
    model, processor = made.model, made.processor
    texts = [[TextSegment(text)] for text in ("rain", "two dogs run")]
    prompts = [made.objective.prompt(text, processor, "image") for text in texts]
    assert all(int(p.ids[-1]) == processor.vocabulary.begin for p in prompts)
    opened: dict[str, Any] = {"starts_with_image": True}
    with torch.no_grad():
        for words, images in ((0, 0), (3, 0), (3, 1)):
            limits = {"max_new_tokens": words, "max_images": images}
            found = generate_interleaved(model, processor, prompts, N, **opened, **limits)
            for prompt, ours in zip(prompts, found, strict=True):
                close(ours, slowly(made, prompt, True, words, images, Sampling(0.0), 0))
    nothing = generate_interleaved(model, processor, prompts, N)
    assert nothing == [[], []], "neither text nor images are allowed"
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_interleaved(model, processor, [], N)
    with pytest.raises(ValueError, match="without guidance"):
        generate_interleaved(model, processor, prompts, N, sampling=Sampling(guidance_scale=2.0))
    with pytest.raises(ValueError, match="exceed the model's context of 128"):
        generate_interleaved(model, processor, prompts, N, max_images=30, **opened)
    model.regressor = None
    with pytest.raises(ValueError, match="no regression head"):
        generate_interleaved(model, processor, prompts, N)


# As a user has it


@pytest.fixture
def lm(made: Made, tiny_tokenizer: VisualTokenizer) -> MultimodalLM:
    return MultimodalLM(made.model, made.processor, tiny_tokenizer, "default", made.objective)


def test_prompt_templates(lm: MultimodalLM, photos: list[Path]):
    p, v, shown = lm.processor, lm.processor.vocabulary, str(photos[0])
    captions = lm.caption([str(photo) for photo in photos[:2]], 5)
    assert len(captions) == 2 and lm.caption(str(photos[1]), 5) == captions[1]
    question = lm.objective.prompt_templates.answer.replace("{}", "what is it?")
    asked = lm.prompts.sequence([photos[0], question], "text")
    words = p.text(" Based on the image, what is it? Short answer:")
    assert asked.ids.tolist() == [*p.start, v.begin, *[p.pad] * N, v.end, *words]
    assert isinstance(lm.answer(shown, "what is it?", max_new_tokens=4), str)
    bare = replace(lm.objective, caption_prompt="", image_prompt="")  # type: ignore[type-var]
    plain = MultimodalLM(lm.model, p, lm.visual_tokenizer, None, bare)
    for one, text in ((lm, "An image of a red apple."), (plain, "a red apple")):
        ids = one.prompts.for_image("a red apple").ids.tolist()
        assert ids == [*p.start, *p.text(text), v.begin]
    assert plain.caption(shown, 5) == plain.generate_text_batch([[photos[0]]], 5)[0]
    saved = VLGPT(**{k: x for k, x in bare.to_dict().items() if k != "name"})
    assert saved.prompt_templates == bare.prompt_templates, "saved with the model"
    vectors = lm.generate_vectors_batch(["a red apple", ["rain", photos[0]]])
    assert vectors.shape == (2, N, 16)
    alone = lm.generate_vectors_batch(["a red apple"])[0]
    torch.testing.assert_close(alone, vectors[0], atol=1e-5, rtol=1e-5)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}
    assert [image.size for image in lm.generate_images("rain", 2, **options)] == [(16, 16)] * 2
    ranked = lm.rank([photos[0]], ["a red apple", "rain"])
    sequence = lm.prompts.sequence([photos[0], "rain"], "text")
    with torch.no_grad():
        states = lm.model(pad([sequence], p.pad)).hidden_states[0]
        log_p = lm.model.head(states).float().log_softmax(-1)
    ids = [*sequence.ids.tolist(), p.stop]
    targets = range(len(ids) - len(p.text("rain")) - 1, len(ids))
    assert abs(float(ranked[1]) - sum(float(log_p[i - 1, ids[i]]) for i in targets)) < 1e-3


def test_text_image_text_image(lm: MultimodalLM, photos: list[Path]):
    opens_often(Made(lm.processor, lm.model, lm.objective))
    seen = set()
    for seed in range(12):
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
        options["temperature"] = 2.0
        parts = lm.complete(["a red apple", photos[0]], 6, 2, decode=False, **options)
        seen.add(kinds(parts))
        assert all(part.shape == (N, 16) for part in parts if not isinstance(part, str))
    assert "titi" in {kind[:4] for kind in seen}, seen
    drawn = lm.complete("a", 6, 2, generator=torch.Generator().manual_seed(3), temperature=2.0)
    assert any(isinstance(part, Image.Image) for part in drawn)
    assert kinds(lm.complete("a", 4, 0)).count("i") == 0, "no images are allowed"


def test_vlgpt_07_either_condition_left_out_changes_the_sample(
    where: Path, tiny_tokenizer: VisualTokenizer
):
    """Through MultimodalLM's own decoder, with a diffusion model that has both."""
    stage_one_directory(where, 16, tiny_diffusion(where))
    stage = str(where / "stage")
    made = built(VLGPT(stage, order="given"), tiny_tokenizer)
    lm = MultimodalLM(made.model, made.processor, tiny_tokenizer, stage, made.objective)
    both = ImageVectors(*(lm.generate_vectors_batch([text]) for text in ("a red apple", "")))
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}

    def drawn(**more: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        (image,) = lm.decoder.decode(both, generator, **options, **more)
        return image.tobytes()

    whole, unseen, unread = drawn(), drawn(leave_out="image"), drawn(leave_out="text")
    assert whole == drawn() and whole != unseen and whole != unread and unseen != unread
    options = {"num_inference_steps": 2, "decoder_guidance_scale": 3.0}
    options["generator"] = torch.Generator().manual_seed(0)
    (image,) = lm.generate_images("a red apple", 1, **options)
    assert image.tobytes() == whole


def test_one_batch_is_overfitted(made: Made):
    """Words, the opening and the vectors of a text-first pair, each by its own head, with what
    stage 2 trains.
    """
    texts = ["rain", "a red apple"]
    samples = [[TextSegment(text, is_target=False), image(i)] for i, text in enumerate(texts)]
    sequences = [sequence(made, sample) for sample in samples]
    batch, bridge = pad(sequences, made.processor.pad), made.model.bridge
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], 5e-3)
    assert bridge is not None and not any(p.requires_grad for p in bridge.parameters())
    with torch.no_grad():
        made.model.regressor.weight.copy_(torch.eye(16))  # type: ignore[union-attr]
    for _ in range(200):
        losses = made.objective.losses(made.model(batch), batch)
        optimizer.zero_grad()
        made.objective.total(losses).backward()
        optimizer.step()
    assert float(losses["image"].mean) < 0.05
    assert float(losses["vectors"].mean) < 0.05 * float(losses["spread"].mean)
    assert isinstance(made.model.regressor, nn.Linear)
    prompts = [made.objective.prompt([TextSegment(x)], made.processor, "image") for x in texts]
    found = generate_interleaved(made.model, made.processor, prompts, N, starts_with_image=True)
    for one, (vectors,) in zip(sequences, found, strict=True):
        wanted = bridge(one.images, one.keep)
        assert (vectors - wanted).abs().mean() < 0.3 * wanted.std(), "the learned vectors"
