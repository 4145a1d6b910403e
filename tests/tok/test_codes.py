"""RaggedLayout and VisualCodes: how ragged batches lie, what they refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lavit_tok import CodeError, VisualCodes
from lavit_tok.codes import RaggedLayout


def test_the_drawing():
    """The picture at the head of records.py.

    image 0 has 3 rows, image 1 has 1:     values  a b c d      lengths  3 1
    padded(fill=-1):                       a  b  c
                                           d -1 -1
    """
    a, b, c, d = 5, 6, 7, 8
    codes = VisualCodes(torch.tensor([a, b, c, d]), torch.tensor([3, 1]))
    assert codes.padded(fill=-1).tolist() == [[a, b, c], [d, -1, -1]]
    assert codes.padded(fill=99).tolist() == [[a, b, c], [d, 99, 99]]
    assert codes.layout.column.tolist() == [0, 1, 2, 0]
    assert codes.layout.slots.tolist() == [0, 1, 2, 3]
    assert codes.layout.mask.tolist() == [[True, True, True], [True, False, False]]
    assert codes.to_list() == [[a, b, c], [d]]
    assert len(codes) == 2 and codes[0].tolist() == [a, b, c] and codes[-1].tolist() == [d]
    assert [row.tolist() for row in codes] == [[a, b, c], [d]]
    with pytest.raises(IndexError):
        codes[2]
    with pytest.raises(IndexError):
        codes[-3]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 3, 0], [1, 1, 1], [2, 0, 5, 1]])
def test_pad_and_unpad_are_inverse(lengths: list[int]):
    layout = RaggedLayout(torch.tensor(lengths, dtype=torch.int64))
    for rest in ((), (3,), (2, 2)):
        rows = (
            torch.arange(sum(lengths) * int(torch.tensor(rest).prod()))
            .view(sum(lengths), *rest)
            .float()
            + 1
        )
        padded = layout.pad(rows)
        assert padded.shape == (len(lengths), max(lengths, default=0), *rest)
        assert torch.equal(layout.unpad(padded), rows)
        assert torch.equal(layout.unpad(layout.pad(rows, fill=float("nan"))), rows)
        assert not padded[~layout.mask].any()
    assert layout.column.tolist() == [c for n in lengths for c in range(n)]


def test_spread_repeats_rows_where_pad_would_fill():
    """The picture of RaggedLayout.spread.

    With lengths 3 and 1 the rows a b c d become  a b c
                                                  d d d
    """
    rows = torch.tensor([1, 2, 3, 4])
    assert RaggedLayout(torch.tensor([3, 1])).spread(rows).tolist() == [[1, 2, 3], [4, 4, 4]]
    assert RaggedLayout(torch.tensor([2, 2])).full and not RaggedLayout(torch.tensor([3, 1])).full
    for lengths in ([], [0], [0, 0], [2, 2], [0, 3, 0], [3, 0, 1], [1, 0, 0, 4]):
        layout = RaggedLayout(torch.tensor(lengths, dtype=torch.int64))
        rows = torch.arange(2 * sum(lengths)).view(-1, 2) + 1
        spread = layout.spread(rows)
        assert spread.shape == (len(lengths), max(lengths, default=0), 2)
        assert torch.equal(layout.unpad(spread), rows)
        assert torch.equal(spread[layout.mask], layout.pad(rows)[layout.mask])
        assert set(spread.flatten().tolist()) <= set(rows.flatten().tolist()), (
            "a free slot repeats a row"
        )


def test_random_batches_round_trip():
    chance = random.Random(0)
    for _ in range(200):
        rows = [
            [chance.randrange(50) for _ in range(chance.randrange(6))]
            for _ in range(chance.randrange(6))
        ]
        codes = VisualCodes.from_list(rows, codebook_size=50)
        assert codes.to_list() == rows == [list(map(int, row)) for row in codes]
        assert codes.lengths.tolist() == [len(r) for r in rows] and len(codes) == len(rows)
        order = [chance.randrange(-len(rows), len(rows)) for _ in range(4)] if rows else []
        assert codes.take(order).to_list() == [rows[i] for i in order]
        cut = chance.randrange(len(rows) + 1)
        halves = [VisualCodes.from_list(part, 50) for part in (rows[:cut], rows[cut:])]
        assert VisualCodes.cat(halves).to_list() == rows
        for row, padded in zip(rows, codes.padded(-7).tolist(), strict=True):
            assert padded == row + [-7] * (len(padded) - len(row))


def test_layout_of_a_mask():
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert RaggedLayout.of(mask).lengths.tolist() == [2, 0, 3]
    assert RaggedLayout.of(mask[:0]).width == 0


def test_take_and_cat_carry_the_masks():
    keep = torch.tensor([[True, True, False], [False, False, True]])
    codes = VisualCodes(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), keep, 16)
    turned = codes.take([1, 0, 1])
    assert turned.to_list() == [[3], [1, 2], [3]]
    assert turned.keep is not None and turned.keep.tolist() == keep[[1, 0, 1]].tolist()
    assert turned.codebook_size == 16
    assert codes.take([-1, 0]).to_list() == [[3], [1, 2]]
    assert codes.take([]).to_list() == []
    both = VisualCodes.cat([codes, turned])
    assert both.keep is not None and both.keep.shape == (5, 3)
    assert VisualCodes.cat([codes, VisualCodes.from_list([[4]], 16)]).keep is None
    with pytest.raises(CodeError, match="at least one batch"):
        VisualCodes.cat([])
    with pytest.raises(CodeError, match="one tokenizer"):
        VisualCodes.cat([codes, VisualCodes.from_list([[4]], 17)])
    with pytest.raises(IndexError):
        codes.take([2])


@pytest.mark.parametrize(
    ("values", "lengths", "said"),
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
        (torch.tensor([-1]), torch.tensor([1]), "must not be negative"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_batch_of_codes(values: Any, lengths: Any, said: str):
    with pytest.raises(CodeError, match=said):
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
    with pytest.raises(CodeError, match="a codebook of 16 rows, this one has 32"):
        VisualCodes.from_list([[3]], 16).check(32)


@pytest.mark.parametrize(
    "codes",
    [
        [[1.0, 2.0]],
        [[True, False]],
        [["a"]],
        [[10**30]],
        [[None]],
        [1, 2, 3],  # forgotten brackets: this would be three images of one code each
        [[[1, 2], [3, 4]]],
        [torch.tensor(3)],
        [torch.tensor([1 + 2j])],
    ],
)
def test_what_is_no_list_of_codes(codes: Any):
    with pytest.raises(CodeError, match="image 0: expected"):
        VisualCodes.from_list(codes)


def test_other_integer_types_are_taken_as_they_are():
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert VisualCodes.from_list([torch.tensor([1, 200 % 128], dtype=dtype), []]).to_list() == [
            [1, 72],
            [],
        ]


def test_nothing_at_all():
    nothing = VisualCodes.from_list([])
    assert len(nothing) == 0 and nothing.to_list() == [] and nothing.padded().shape == (0, 0)
    hollow = VisualCodes.from_list([[], []])
    assert hollow.to_list() == [[], []] and hollow.padded().shape == (2, 0)
