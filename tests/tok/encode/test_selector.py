"""Selector: log-probabilities of keeping and dropping each patch."""

from __future__ import annotations

import reference
import torch

from lavit_tok.encode.selector import Selector, keep_scores


def test_scores_equal_the_slow_version():
    torch.manual_seed(0)
    selector = Selector(16)
    features = torch.randn(3, 9, 16)
    assert [tuple(layer.weight.shape) for layer in selector.judge[::2]] == [(8, 16), (4, 8), (2, 4)]
    output = selector(features)
    assert output.shape == (3, 9, 2)
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(3, 9))
    slow = torch.stack([reference.score(selector, one) for one in features])
    torch.testing.assert_close(output.double(), slow, rtol=0, atol=1e-5)


def test_half_of_the_channels_see_the_whole_image():
    torch.manual_seed(0)
    selector = Selector(16)
    features = torch.randn(2, 9, 16, requires_grad=True)
    selector(features)[0, 0, 0].backward()
    assert features.grad is not None
    assert (features.grad[0].abs().sum(-1) > 0).all(), "every patch of the image is judged against"
    assert (features.grad[1] == 0).all(), "no patch of another image is"


def test_shift_moves_every_score_by_that_much():
    selector, features = Selector(16), torch.randn(1, 9, 16)
    before = keep_scores(selector(features))
    selector.shift(-1.5)
    torch.testing.assert_close(keep_scores(selector(features)), before - 1.5)


def test_stays_in_float32():
    selector, features = Selector(16), torch.randn(2, 9, 16)
    expected = selector(features.bfloat16().float())
    selector.to(torch.bfloat16)
    assert {p.dtype for p in selector.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = selector(features.bfloat16())
    assert output.dtype == torch.float32 and torch.equal(output, expected)
    torch.nn.Sequential(selector).half()
    assert {p.dtype for p in selector.double().parameters()} == {torch.float32}
    with torch.device("meta"):
        hollow = Selector(16)
    assert {p.dtype for p in hollow.half().to_empty(device="cpu").parameters()} == {torch.float32}
