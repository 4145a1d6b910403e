"""Codes -> features of every patch, independently of the rest of the batch."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from lavit_tok.codes import RaggedLayout
from lavit_tok.decode.reconstructor import Reconstructor

WIDTH, PATCHES, DIM = 16, 9, 4


@pytest.fixture(scope="module")
def reconstructor() -> Reconstructor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Reconstructor(WIDTH, PATCHES, DIM, 2, 2, 40)
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.requires_grad_(False)


def vectors(lengths: list[int]) -> Tensor:
    return torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(0))


def run(
    reconstructor: Reconstructor,
    entries: Tensor,
    lengths: list[int],
    fill: float = 0,
    spare: int = 0,
) -> Tensor:
    layout = RaggedLayout(torch.tensor(lengths))
    padded, mask = layout.pad(entries, fill), layout.mask
    if spare:  # wider than the longest needs
        padded = torch.cat([padded, padded.new_full((len(lengths), spare, DIM), fill)], 1)
        mask = torch.cat([mask, torch.zeros(len(lengths), spare, dtype=torch.bool)], 1)
    return reconstructor(padded, torch.arange(padded.shape[1])[None], mask)


def test_equals_the_slow_version(reconstructor: Reconstructor):
    lengths = [3, 1, PATCHES, 2]
    entries = vectors(lengths)
    output = run(reconstructor, entries, lengths)
    assert output.shape == (4, PATCHES, WIDTH)
    for one, own in zip(output, entries.split(lengths), strict=True):
        torch.testing.assert_close(
            one.double(), reference.reconstruct(reconstructor, own), rtol=0, atol=2e-5
        )


def test_padding_values_do_not_matter(reconstructor: Reconstructor):
    lengths = [3, 1, 5]
    expected = run(reconstructor, vectors(lengths), lengths)
    for fill, spare in ((7.0, 0), (-1e4, 0), (1e4, 3), (0.0, 4)):
        torch.testing.assert_close(
            run(reconstructor, vectors(lengths), lengths, fill, spare), expected, rtol=0, atol=1e-5
        )


def test_the_position_in_the_sequence_matters(reconstructor: Reconstructor):
    entries = vectors([4])
    reordered = run(reconstructor, entries.flip(0), [4])
    assert (reordered - run(reconstructor, entries, [4])).abs().max() > 1e-3
    index = torch.arange(4).flip(0)[
        None
    ]  # the same entries at their positions, stored in another order
    same = reconstructor(entries.flip(0)[None], index, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(same, run(reconstructor, entries, [4]), rtol=0, atol=1e-5)


def test_a_float_policy_gives_the_same_and_passes_a_gradient(reconstructor: Reconstructor):
    lengths = [3, 1, 5]
    layout, entries = RaggedLayout(torch.tensor(lengths)), vectors(lengths)
    policy = layout.mask.float().requires_grad_()
    index = torch.arange(5)[None]
    output = reconstructor(layout.pad(entries), index, policy)
    torch.testing.assert_close(
        output.detach(), run(reconstructor, entries, lengths), rtol=0, atol=1e-5
    )
    output.square().mean().backward()
    assert (
        policy.grad is not None and policy.grad.isfinite().all() and (policy.grad[0, 3:] != 0).any()
    )


def test_codes_of_all_patches_and_no_more(reconstructor: Reconstructor):
    assert run(reconstructor, vectors([PATCHES]), [PATCHES]).shape == (1, PATCHES, WIDTH)
    with pytest.raises(IndexError):
        run(reconstructor, vectors([PATCHES + 1]), [PATCHES + 1])
