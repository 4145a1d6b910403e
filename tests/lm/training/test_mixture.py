"""Several sources with weights: exact at every position, after a stop, with any processes."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.lm_parts import processor_and_model
from helpers.lm_runs import Losses, module, saving, trainer

from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.training.data_module import LanguageDataModule, Source, source_names
from lavit_lm.training.mixture import Mixture
from lavit_lm.training.permutation import LocalPermutation, Permutation
from lavit_lm.training.sampler import BlockSampler, ExampleLayout, Examples, MixedExamples
from lavit_tok import ShardError


def test_the_table_of_the_docstring():
    """Source, example and epoch of each position, without permutations."""
    table = re.findall(r"(source|example|epoch) {4,}(.*)", Mixture.__doc__ or "")
    lines = {name: values.split() for name, values in table}
    sizes = 3, 2, 4
    sources, before = Mixture(sizes, [0.5, 0.3, 0.2]).assign(np.arange(12))
    expected = [
        ("ABC"[s], f"{'ABC'[s]}{n % sizes[s]}", str(n // sizes[s]))
        for s, n in zip(sources, before, strict=True)
    ]
    assert [*zip(lines["source"], lines["example"], lines["epoch"], strict=True)] == expected


@pytest.mark.parametrize(
    "weights", [[1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1e-3, 5.0, 2.0, 0.4, 1.0]]
)
def test_weights_hold_in_every_window(weights: list[float]):
    """Also at position 10^15; the counts are those of the positions before."""
    mixture, ideal = Mixture([10] * len(weights), weights), np.array(weights) / sum(weights)
    for start in (0, 10**15 + 7):
        sources, before = mixture.assign(np.arange(start, start + 3000))
        one_hot = np.eye(len(weights))[sources]
        counts = np.concatenate([np.zeros((1, len(weights))), one_hot.cumsum(0)])
        deviation = counts - np.arange(3001)[:, None] * ideal
        assert (deviation.max(0) - deviation.min(0)).max() <= len(weights), "of every window"
        own = before - before[[np.argmax(sources == s) for s in sources]]
        assert (own == counts[np.arange(3000), sources]).all()


def test_every_source_goes_through_its_own_epochs():
    mixture = Mixture([50, 7], [0.75, 0.25], seed=5)
    whole = mixture[0:400]
    assert mixture[123:140] == whole[123:140] and len(mixture) == 57
    for first, size in ((0, 50), (50, 7)):
        own = [(epoch, n - first) for epoch, n in whole if first <= n < first + size]
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert sorted(part) == [(epoch, n) for n in range(size)]
        assert own[:size] != [(0, n) for _, n in own[size : 2 * size]], "another order"
    assert [n for _, n in Mixture([50], seed=3)[50:100]] == Permutation(50, 3, 1)[:].tolist()


def test_local_permutations():
    """The drawing in the docstring; every example once; few chunks at a time."""
    assert LocalPermutation(9, 3, chunk=2, chunks=2)[:].tolist() == [0, 1, 7, 6, 4, 2, 3, 5, 8]
    for size in (0, 1, 4, 7, 8, 16, 17, 33):
        order = LocalPermutation(size, 1, chunk=2, chunks=4)
        assert sorted(order[:]) == list(range(size)) and len(order) == size
        assert [*order[3:13]] == [*order[:]][3:13]
    assert [*LocalPermutation(1000, 3, 1)[:]] == [*Permutation(1000, 3, 1)[:]]
    examples = LocalPermutation(10**9, 0)[10**8 : 10**8 + 4096]
    assert len({*examples}) == 4096 and 32 <= len({*(examples // 4096)}) <= 128


def mixed(sizes: tuple[int, ...]) -> MixedExamples:
    return MixedExamples(
        [
            Examples(
                [
                    {"key": f"{s} {i}", "caption": "a dog", "codes": [i % 16] * 3, "length": 3}
                    for i in range(size)
                ]
            )
            for s, size in enumerate(sizes)
        ]
    )


def test_any_number_of_processes():
    """Windows, blocks and batches of a mixture, from the start and from the middle."""
    processor, _ = processor_and_model("llama")
    layout = ExampleLayout(mixed((40, 9)), LaVIT(), processor, seed=1)
    mixture = Mixture([40, 9], [0.6, 0.4], seed=1)

    def blocks(count: int, rank: int = 0, world: int = 1, consumed: int = 0) -> list[Any]:
        order = BlockSampler(layout, 64, 2, 16, rank, world, lambda: consumed, mixture)
        iterator = iter(order)
        return [next(iterator) for _ in range(count)]

    every = blocks(56)
    for consumed in (0, 3):
        dealt = [blocks(8, rank, 4, consumed) for rank in range(4)]
        parts = [block for k in range(0, 8, 2) for own in dealt for block in own[k : k + 2]]
        assert parts == every[8 * consumed :][:32]
    keys = [layout.sequence(index).key for block in every for index in block]
    counts = Counter(key.split()[0] for key in keys)
    assert abs(counts["1"] / len(keys) - 0.4) < 0.05


def test_a_run_on_two_sources(folder: Path):
    """Cut off and resumed; held-out losses of each and of all; another weight is refused."""
    shutil.copytree(folder / "shards", folder / "more" / "shards")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"rain {i}"}) + "\n" for i in range(5))
    )

    def sources(weight: float = 0.25) -> Any:
        listed = [
            Source(str(folder / "shards"), weight=0.5),
            Source(str(folder / "more" / "shards"), weight=weight),
            Source(texts=str(folder / "texts.jsonl"), weight=0.25),
        ]
        options = {"block": 64, "batch_size": 2, "window": 12}
        return LanguageDataModule(sources=listed, **options)

    options: dict[str, Any] = {"val_check_interval": 6, "num_sanity_val_steps": 0}
    whole, used = Losses(), sources()
    trainer(folder, 6, [whole], **options).fit(module(folder), used)
    cut, rest = Losses(stop=3), Losses()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(folder, 6, [cut, saving(folder)], **options).fit(module(folder), sources())
    trainer(folder, 6, [rest, saving(folder)], **options).fit(
        module(folder), sources(), ckpt_path="last"
    )
    assert cut.values[:2] + rest.values == whole.values
    assert cut.keys[:2] + rest.keys == whole.keys
    keys = [key for batch in whole.keys for block in batch for key in block]
    assert {key for key in keys if key.startswith("text ")} == {f"text {i}" for i in range(5)}
    (held_out,) = whole.held_out
    for name in ("loss", "text", "image"):
        of_each = held_out[f"val/shards/{name}"], held_out[f"val/more/shards/{name}"]
        assert of_each[0] == of_each[1] == pytest.approx(held_out[f"val/{name}"])
    with pytest.raises(ValueError, match=r"other arguments \{'sources': .*0.25.*0.75"):
        trainer(folder, 8, []).fit(
            module(folder), sources(0.75), ckpt_path=folder / "ckpt/last.ckpt"
        )


def test_sources_on_the_command_line():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LanguageDataModule, "data")
    text = "--data.sources=[{shards: a, weight: 0.7}, {texts: b.jsonl}]"
    parsed = parser.parse_args([text]).data.sources
    assert [(s.shards, s.texts, s.weight) for s in parsed] == [
        ("a", None, 0.7),
        (None, "b.jsonl", 1.0),
    ]


@pytest.mark.parametrize(
    ("weight", "got"), [(0.0, "0.0"), (-1.0, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_weights_that_are_none(weight: float, got: str):
    with pytest.raises(ValueError, match=rf"source 1 \(b\): expected a finite .* 0, got {got}"):
        LanguageDataModule(sources=[Source("a"), Source("b", weight=weight)])


def test_sources_that_cannot_be_used(folder: Path):
    for arguments, message in (
        ({}, "source 0: expected shards, texts or documents, got none"),
        ({"sources": [Source(texts="a")]}, "of which at least one has shards"),
        ({"sources": [Source("a"), Source("./a")]}, "./a: is given twice"),
        ({"sources": [Source("a"), Source()]}, "source 1: expected shards, texts or documents"),
        (
            {"shards": "a", "sources": [Source("b")]},
            "expected data.sources, or data.shards .* both",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageDataModule(**arguments)
    with pytest.raises(ValueError, match=r"at least one example, got \[3, 0\]"):
        Mixture([3, 0], [1.0, 1.0])
    assert source_names([Source("x/a/shards"), Source(texts="x/b/t.jsonl")]) == [
        "a/shards",
        "b/t.jsonl",
    ]
    (folder / "empty.jsonl").write_text("")
    manifest = json.loads((folder / "shards" / "manifest.json").read_text())
    shutil.copytree(folder / "shards", folder / "other")
    text = json.dumps({**manifest, "fingerprint": "0123456789abcdef"})
    (folder / "other" / "manifest.json").write_text(text)
    for second, error, message in (
        (
            Source(texts=str(folder / "empty.jsonl")),
            ValueError,
            "empty.jsonl: expected at least one text",
        ),
        (
            Source(str(folder / "other")),
            ShardError,
            rf"other: .* {manifest['fingerprint']}, got 0123456789abcdef",
        ),
    ):
        used = LanguageDataModule(sources=[Source(str(folder / "shards")), second])
        with pytest.raises(error, match=message):
            trainer(folder, 1, []).fit(module(folder), used)
