"""The error head: curves never rise, depend on earlier codes only, and learn what images need."""

from __future__ import annotations

import pytest
import torch

from lavit_tok.encode.error_head import ErrorHead, doublings, summary


@pytest.mark.parametrize("patches", [4, 16, 64, 256])
def test_curves_never_rise_and_do_not_depend_on_later_codes(patches):
    head = ErrorHead(8, patches)
    for layer in (head.mlp[-1], head.count):
        torch.nn.init.normal_(layer.weight)
    features, left = torch.randn(3, patches, 8), torch.rand(3, patches).sort(descending=True).values
    curve = head(features, left)
    assert curve.shape == (3, patches)
    assert bool((curve.diff(dim=1) <= 0).all()) and bool((curve > 0).all())
    for count in (1, patches // 2, patches - 1):
        torch.testing.assert_close(head(features, left[:, :count]), curve[:, :count])
    points = torch.tensor(doublings(patches))
    at = head.at(summary(features, head.levels), left, points)
    assert bool((curve[:, points - 1] <= at + 1e-6).all())
    torch.testing.assert_close(curve[:, 0], at[:, 0])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_and_deviation_of_every_channel(dtype: torch.dtype):
    features = 5 + torch.randn(3, 16, 2, dtype=dtype)
    features[0, :, 1] = 0.1  # no deviation
    before = features.clone()
    mean, deviation = summary(features, 2)[:, :4].split(2, dim=1)
    assert torch.equal(mean, features.mean(1).to(mean.dtype))
    expected = features.double().std(1, correction=0)
    torch.testing.assert_close(deviation.double(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(features, before)


def test_no_gradient_reaches_the_features():
    features = torch.randn(2, 16, 8, requires_grad=True)
    head = ErrorHead(8, 16)
    head(features, torch.rand(2, 16)).sum().backward()
    assert features.grad is None
    assert head.image.weight.grad is not None


def test_it_learns_that_busy_images_need_more():
    torch.manual_seed(0)
    head = ErrorHead(8, 16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    busy = torch.rand(256, 1, 1)
    features = torch.randn(256, 16, 8) * busy
    target = busy[:, :, 0] * torch.linspace(1, 0.1, 16)
    left = torch.ones(256, 16)  # says nothing
    for _ in range(150):
        loss = (head(features, left) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


def test_it_learns_from_what_the_codes_leave_over():
    torch.manual_seed(0)
    head = ErrorHead(8, 16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    left = torch.rand(256, 1) * torch.linspace(1, 0.1, 16)
    values = torch.ones(256, 2 * 8 + head.levels + 1)  # says nothing
    counts = torch.arange(1, 17)
    for _ in range(150):
        loss = (head.at(values, left, counts) - 0.5 * left).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
