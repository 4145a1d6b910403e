"""The error head: shape of its curves, its interpolation, and that it learns what a curve depends
on."""

from __future__ import annotations

import pytest
import torch

from lavit_tok.encode.error_head import ErrorHead, interpolation, summary


def test_the_drawn_interpolation():
    drawn = torch.tensor([[1, 0, 0, 0], [0, 1, 0.415, 0], [0, 0, 0.585, 1]])
    assert torch.allclose(interpolation(4), drawn, atol=1e-3)
    assert interpolation(1).tolist() == [[1.0]]


@pytest.mark.parametrize("patches", [4, 9, 64, 144, 256])
def test_weights_sum_to_one_and_curves_never_rise(patches):
    weights = interpolation(patches)
    assert torch.allclose(weights.sum(0), torch.ones(patches))
    assert weights[0, 0] == 1 and weights[-1, -1] == 1
    head = ErrorHead(8, patches)
    torch.nn.init.normal_(head.mlp[-1].weight)
    curve = head(torch.randn(3, patches, 8))
    assert curve.shape == (3, patches)
    assert bool((curve.diff(dim=1) <= 1e-6).all()) and bool((curve > 0).all())


def test_variance_within_cells():
    flat = torch.ones(1, 16, 2)
    assert summary(flat, 2)[0, 4:].exp().tolist() == pytest.approx([1e-6] * 3)
    halves = (
        torch.tensor([0.0, 0.0, 2.0, 2.0]).repeat(4).view(1, 16, 1)
    )  # left half 0, right half 2
    levels = summary(halves, 2)[0, 2:].exp()
    assert levels[0] == pytest.approx(1.0)  # the whole image varies by 1
    assert levels[1] == pytest.approx(1e-6)  # its quarters do not
    assert levels[2] == pytest.approx(
        (0 + 4 / 3) / 2
    )  # neighbors: rows alike, one column of three differs by 2


def test_no_gradient_reaches_the_features():
    features = torch.randn(2, 16, 8, requires_grad=True)
    head = ErrorHead(8, 16)
    head(features).sum().backward()
    assert features.grad is None
    assert head.mlp[0].weight.grad is not None


def test_it_learns_that_busy_images_need_more():
    torch.manual_seed(0)
    head = ErrorHead(8, 16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    busy = torch.rand(256, 1, 1)
    features = torch.randn(256, 16, 8) * busy
    target = busy[:, :, 0] * torch.linspace(1, 0.1, 16)
    for _ in range(150):
        loss = (head(features) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
