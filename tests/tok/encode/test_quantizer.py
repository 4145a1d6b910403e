"""Exact nearest entries, and the projection to the code space."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import reference
import torch
from helpers.tensors import codebook, unit
from torch.nn import functional as F

from lavit_tok.encode import quantizer
from lavit_tok.encode.quantizer import Quantizer


def test_reduced_precision_of_products_does_not_reach_the_codes():
    """Under "high" products are in float64: of these distances, float32 rounds both to a tie."""
    book, z = codebook(torch.tensor([[4096.0], [4097.0]])), torch.tensor([[4096.6]])
    assert book.nearest(z).tolist() == [0]
    torch.set_float32_matmul_precision("high")
    try:
        assert book.nearest(z).tolist() == [1]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("normed", [True, False])
def test_nearest_is_exact(normed: bool):
    """Against squared differences in float64; with other norms it is not the cosine."""
    for seed in range(5):
        entries, z = unit(64, 8, seed=seed), unit(100, 8, seed=seed + 50)
        if not normed:
            entries = entries * torch.linspace(0.2, 3, 64)[:, None]
        assert codebook(entries).nearest(z).tolist() == reference.nearest(z, entries)
    if not normed:
        assert (
            codebook(entries).nearest(z) != (z @ F.normalize(entries, dim=-1).T).argmax(1)
        ).any()


def test_of_equal_entries_the_first():
    entries = unit(6, 4)
    entries[4] = entries[1]
    entries[5] = entries[1]
    assert codebook(entries).nearest(entries).tolist() == [0, 1, 2, 3, 1, 1]
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert codebook(opposite).nearest(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist() == [0, 0]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    entries, z = unit(32, 8), unit(101, 8, seed=1)
    whole = codebook(entries).nearest(z)
    for chunk in (1, 32, 96, 32 * 101, 10**9):
        monkeypatch.setattr(quantizer, "CHUNK", chunk)
        assert torch.equal(codebook(entries).nearest(z), whole)
    assert codebook(entries).nearest(z[:0]).tolist() == []


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("matmul_precision")
def test_low_precision_around_it_changes_no_code():
    entries, z = unit(512, 16), unit(400, 16, seed=1)
    book = codebook(entries)
    expected = book.nearest(z)
    book.to(torch.bfloat16)
    assert book.embeddings.dtype == torch.float32 and torch.equal(book.embeddings, entries)
    assert torch.equal(book.nearest(z), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.nearest(z), expected)
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(book.nearest(z), expected)
    rounded = (z.bfloat16() @ entries.bfloat16().T).argmax(1)
    assert (rounded != expected).any(), "which bfloat16 would have changed"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad: float):
    z = unit(5, 4)
    z[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        codebook(unit(8, 4)).nearest(z)


def test_projection_equals_the_slow_version_and_has_unit_length():
    torch.manual_seed(0)
    module = Quantizer(16, 32, 4)
    merged = torch.randn(7, 16)
    z = module.project(merged)
    torch.testing.assert_close(z.double(), reference.project(module, merged), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(7))
    assert module.to(torch.bfloat16).project(merged.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(module.codebook.embeddings.norm(dim=1), torch.ones(32))
    assert torch.equal(
        module.codebook.lookup(torch.tensor([3, 3])), module.codebook.embeddings[[3, 3]]
    )
