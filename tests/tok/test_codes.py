"""RaggedLayout and VisualCodes: padding, slicing, joining, and what they refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lavit_tok import CodeError, VisualCodes
from lavit_tok import codes as codes_module
from lavit_tok.codes import RaggedLayout


def test_the_drawing():
    a, b, c, d = 5, 6, 7, 8
    drawing = (codes_module.__doc__ or "").partition("fill=-1):")[2].split()
    drawn = [{"a": a, "b": b, "c": c, "d": d}.get(x) or int(x) for x in drawing]
    codes = VisualCodes(torch.tensor([a, b, c, d]), torch.tensor([3, 1]))
    assert codes.padded(fill=-1).flatten().tolist() == drawn == [a, b, c, d, -1, -1]
    assert codes.padded(fill=99).tolist() == [[a, b, c], [d, 99, 99]]
    assert codes.layout.positions.tolist() == [0, 1, 2, 3]
    assert codes.layout.mask.tolist() == [[True, True, True], [True, False, False]]
    assert codes.to_list() == [[a, b, c], [d]]
    assert len(codes) == 2 and codes[0].tolist() == [a, b, c] and codes[-1].tolist() == [d]
    for index in (2, -3):
        with pytest.raises(IndexError):
            codes[index]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 3, 0], [1, 1, 1], [2, 0, 5, 1]])
def test_pad_and_unpad_are_inverse(lengths: list[int]):
    layout = RaggedLayout(torch.tensor(lengths, dtype=torch.int64))
    for rest in ((), (3,), (2, 2)):
        items = torch.rand(sum(lengths), *rest) + 1
        padded = layout.pad(items)
        assert padded.shape == (len(lengths), max(lengths, default=0), *rest)
        assert torch.equal(layout.unpad(padded), items)
        assert torch.equal(layout.unpad(layout.pad(items, fill=float("nan"))), items)
        assert not padded[~layout.mask].any()


def test_spread_repeats_items_where_pad_would_fill():
    items = torch.tensor([1, 2, 3, 4])
    doc = RaggedLayout.spread.__doc__ or ""
    assert [line.split()[-3:] for line in doc.splitlines()[2:4]] == [["a", "b", "c"], ["d"] * 3]
    assert RaggedLayout(torch.tensor([3, 1])).spread(items).tolist() == [[1, 2, 3], [4, 4, 4]]
    assert RaggedLayout(torch.tensor([2, 2])).full and not RaggedLayout(torch.tensor([3, 1])).full
    for lengths in ([], [0], [0, 0], [2, 2], [0, 3, 0], [3, 0, 1], [1, 0, 0, 4]):
        layout = RaggedLayout(torch.tensor(lengths, dtype=torch.int64))
        items = torch.arange(2 * sum(lengths)).view(-1, 2) + 1
        spread = layout.spread(items)
        assert spread.shape == (len(lengths), max(lengths, default=0), 2)
        assert torch.equal(layout.unpad(spread), items)
        assert set(spread.flatten().tolist()) <= set(items.flatten().tolist())


def test_random_batches_round_trip():
    rng = random.Random(0)
    for _ in range(200):
        lists = [
            [rng.randrange(50) for _ in range(rng.randrange(6))] for _ in range(rng.randrange(6))
        ]
        codes = VisualCodes.from_list(lists, codebook_size=50)
        assert codes.to_list() == lists == [x.tolist() for x in codes]
        assert codes.lengths.tolist() == [len(x) for x in lists] and len(codes) == len(lists)
        order = [rng.randrange(-len(lists), len(lists)) for _ in range(4)] if lists else []
        assert codes.take(order).to_list() == [lists[i] for i in order]
        cut = rng.randrange(len(lists) + 1)
        halves = [VisualCodes.from_list(half, 50) for half in (lists[:cut], lists[cut:])]
        assert VisualCodes.cat(halves).to_list() == lists
        for sequence, padded in zip(lists, codes.padded(-7).tolist(), strict=True):
            assert padded == sequence + [-7] * (len(padded) - len(sequence))


def test_layout_of_a_mask():
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert RaggedLayout.of(mask).lengths.tolist() == [2, 0, 3]
    assert RaggedLayout.of(mask[:0]).width == 0


def test_take_and_cat_carry_the_masks():
    keep = torch.tensor([[True, True, False], [False, False, True]])
    codes = VisualCodes(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), keep, 16)
    reordered = codes.take([1, 0, 1])
    assert reordered.to_list() == [[3], [1, 2], [3]]
    assert reordered.keep is not None and reordered.keep.tolist() == keep[[1, 0, 1]].tolist()
    assert reordered.codebook_size == 16
    assert codes.take([-1, 0]).to_list() == [[3], [1, 2]]
    assert codes.take([]).to_list() == []
    both = VisualCodes.cat([codes, reordered])
    assert both.keep is not None and both.keep.shape == (5, 3)
    assert VisualCodes.cat([codes, VisualCodes.from_list([[4]], 16)]).keep is None
    with pytest.raises(CodeError, match="at least one batch"):
        VisualCodes.cat([])
    with pytest.raises(CodeError, match="one tokenizer"):
        VisualCodes.cat([codes, VisualCodes.from_list([[4]], 17)])
    with pytest.raises(IndexError):
        codes.take([2])


@pytest.mark.parametrize(
    ("values", "lengths", "message"),
    [
        (torch.tensor([1.0]), torch.tensor([1]), "values: expected an int64 tensor"),
        (
            torch.tensor([1], dtype=torch.int32),
            torch.tensor([1]),
            "values: expected an int64 tensor",
        ),
        (torch.tensor([[1]]), torch.tensor([1]), r"values.*\[1, 1\]"),
        ([1], torch.tensor([1]), "values.*list"),
        (torch.tensor([1]), torch.tensor([1.0]), "lengths: expected an int64 tensor"),
        (torch.tensor([1]), torch.tensor(1), "lengths: expected an int64 tensor"),
        (torch.tensor([1, 2]), torch.tensor([1]), "add up to 1, but there are 2"),
        (torch.tensor([1]), torch.tensor([2, -1]), "none below 0"),
        (torch.tensor([-1]), torch.tensor([1]), r"expected codes in 0\.\., got -1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_invalid_batches_are_refused(values: Any, lengths: Any, message: str):
    with pytest.raises(CodeError, match=message):
        VisualCodes(values, lengths)


def test_masks_that_do_not_fit_the_codes():
    values, lengths = torch.tensor([1, 2]), torch.tensor([1, 1])
    for keep in (torch.ones(2, 3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)):
        with pytest.raises(CodeError, match="number of kept patches"):
            VisualCodes(values, lengths, keep)
    for other in (torch.eye(2), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(CodeError, match="expected bool"):
            VisualCodes(values, lengths, other)


def test_codes_out_of_range():
    assert VisualCodes.from_list([[0, 15]], 16).to_list() == [[0, 15]]
    with pytest.raises(CodeError, match=r"0\.\.15, got 0\.\.16"):
        VisualCodes.from_list([[0], [16]], 16)
    with pytest.raises(CodeError, match=r"0\.\.15, got -1\.\.3"):
        VisualCodes.from_list([[-1, 3]], 16)
    unknown = VisualCodes.from_list([[3, 40]])
    unknown.check(41)
    with pytest.raises(CodeError, match=r"0\.\.39"):
        unknown.check(40)
    with pytest.raises(CodeError, match="a codebook of 16 entries, this one has 32"):
        VisualCodes.from_list([[3]], 16).check(32)


@pytest.mark.parametrize(
    "codes",
    [
        [[1.0, 2.0]],
        [[True, False]],
        [["a"]],
        [[10**30]],
        [[None]],
        [1, 2, 3],  # without brackets: three images of one code each
        [[[1, 2], [3, 4]]],
        [torch.tensor(3)],
        [torch.tensor([1 + 2j])],
    ],
)
def test_invalid_lists_are_refused(codes: Any):
    with pytest.raises(CodeError, match="image 0: expected"):
        VisualCodes.from_list(codes)


def test_other_integer_types_are_accepted():
    for dtype in (torch.uint8, torch.int16, torch.int32):
        codes = VisualCodes.from_list([torch.tensor([1, 72], dtype=dtype), []])
        assert codes.to_list() == [[1, 72], []]


def test_empty_batches():
    empty = VisualCodes.from_list([])
    assert len(empty) == 0 and empty.to_list() == [] and empty.padded().shape == (0, 0)
    without_codes = VisualCodes.from_list([[], []])
    assert without_codes.to_list() == [[], []] and without_codes.padded().shape == (2, 0)
