"""The two formulas of attention.py: exact about forbidden keys, and without NaN at the limits."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

from lavit_tok.nn.attention import Attention, Block, Formula, attend, masked_softmax


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def random_policy(*shape: int, seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("formula", ["strict", "compat"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_weights_equal_the_formula_read_aloud(formula: Formula, scale: float):
    scores, policy = noise(2, 3, 4, 7, scale=scale), random_policy(2, 1, 4, 7).float()
    weights = masked_softmax(scores, policy, formula)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                expected = reference.weights_of_a_query(
                    scores[b, h, i].tolist(), policy[b, 0, i].tolist(), formula
                )
                assert weights[b, h, i].tolist() == pytest.approx(expected, abs=1e-6)


def test_compat_leaks_and_strict_does_not():
    """A forbidden key of a large score takes most of compat's weight (up to 99.6 % of the sum)."""
    scores = torch.tensor([[[[0.0, 1.0, 20.0]]]])
    policy = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    strict, compat = (masked_softmax(scores, policy, f)[0, 0, 0] for f in ("strict", "compat"))
    assert strict[2] == 0 and strict.sum() == pytest.approx(1)
    assert strict[1] / strict[0] == pytest.approx(math.e, rel=1e-5)
    assert compat[2] > 0.3 and compat.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_fused_path_gives_the_same_numbers(scale: float):
    q, k, v = (noise(2, 3, n, 8, seed=i, scale=scale) for i, n in enumerate((5, 9, 9)))
    policy = random_policy(2, 1, 5, 9)
    policy[1, 0, 2] = False  # a query without allowed keys
    fused, written_out = attend(q, k, v, policy), attend(q, k, v, policy.float())
    torch.testing.assert_close(fused, written_out, rtol=1e-4, atol=1e-5)
    assert (fused[1, :, 2] == 0).all() and (written_out[1, :, 2] == 0).all()
    everything = torch.ones(1, 1, 5, 9)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, everything), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_type", [torch.bool, torch.float32])
def test_rows_without_any_key(as_type: torch.dtype):
    """Zeros forwards, and no NaN backwards."""
    q, k, v = (noise(1, 2, 3, 4, seed=i).requires_grad_() for i in range(3))
    output = attend(q, k, v, torch.zeros(1, 1, 3, 3).to(as_type))
    assert (output == 0).all()
    output.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and (tensor.grad == 0).all()
    averaged = attend(q, k, v, torch.zeros(1, 1, 3, 3), "compat")
    torch.testing.assert_close(
        averaged, v.mean(2, keepdim=True).expand_as(averaged), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("large", [50.0, 1e4, 1e30])
def test_a_huge_forbidden_score_is_harmless(large: float):
    scores = torch.tensor([[[[1.0, 2.0, large]]]], requires_grad=True)
    policy = torch.tensor([[[[1.0, 1.0, 0.0]]]], requires_grad=True)
    weights = masked_softmax(scores, policy, "strict")
    expected = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(weights[0, 0, 0, :2], expected)
    assert weights[0, 0, 0, 2] == 0
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad[..., 2] == 0
    assert policy.grad is not None and policy.grad.isfinite().all() and policy.grad[..., 2] > 1


def test_gradient_to_the_policy_is_the_derivative():
    scores, policy = noise(1, 1, 2, 4).double(), torch.tensor([[[[1.0, 0.0, 1.0, 1.0]]]]).double()
    values = noise(4, seed=3).double()

    def loss(p: Tensor) -> Tensor:
        raised = (scores - scores[..., [0, 2, 3]].amax(-1, keepdim=True)).exp() * p
        return ((raised / raised.sum(-1, keepdim=True)) @ values).sum()

    p = policy.clone().requires_grad_()
    (masked_softmax(scores, p, "strict") @ values).sum().backward()
    for j in range(4):
        step = torch.zeros_like(policy)
        step[..., j] = 1e-6
        slope = (loss(policy + step) - loss(policy - step)) / 2e-6
        assert float(p.grad[..., j]) == pytest.approx(float(slope), abs=1e-6)  # type: ignore[index]


def test_masking_with_minus_infinity_would_cut_that_gradient():
    """Why strict multiplies by p: a key masked by -inf gets no gradient."""
    scores = noise(1, 1, 2, 3)
    policy = torch.tensor([1.0, 0.0, 1.0]).requires_grad_()
    scores.masked_fill(policy < 0.5, float("-inf")).softmax(-1).square().sum()
    assert not scores.masked_fill(policy < 0.5, float("-inf")).softmax(-1).requires_grad
    masked_softmax(scores, policy.expand(1, 1, 2, 3), "strict").square().sum().backward()
    assert policy.grad is not None and policy.grad[1] != 0


@pytest.mark.parametrize("formula", ["strict", "compat"])
def test_the_module_equals_its_loops(formula: Formula):
    torch.manual_seed(0)
    module = Attention(12, 3)
    x, context = noise(2, 4, 12), noise(2, 6, 12, seed=1)
    policy = random_policy(2, 1, 4, 6).float()
    output = module(x, context, policy, formula)
    for i in range(2):
        slow = reference.attention(module, x[i], context[i], policy[i, 0], formula)
        torch.testing.assert_close(output[i].double(), slow, rtol=0, atol=1e-5)
    alone = module(x)
    slow = reference.attention(module, x[0], x[0], torch.ones(4, 4), "strict")
    torch.testing.assert_close(alone[0].double(), slow, rtol=0, atol=1e-5)


def test_a_block_equals_its_loops():
    torch.manual_seed(0)
    module = Block(12, 3, 20, 1e-5)
    x, context = noise(2, 4, 12), noise(2, 5, 12, seed=1)
    own = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    other = random_policy(2, 1, 1, 5, seed=4)
    output = module(x, context, own, other)
    for i in range(2):
        slow = reference.block(
            module,
            x[i].double(),
            context[i].double(),
            own[0, 0].double(),
            other[i, 0].expand(4, 5).double(),
            "strict",
        )
        torch.testing.assert_close(output[i].double(), slow, rtol=0, atol=1e-5)


def test_low_precision_stays_close_and_in_its_type():
    q, k, v = (noise(1, 2, 6, 8, seed=i).bfloat16() for i in range(3))
    for policy in (None, random_policy(1, 1, 6, 6), random_policy(1, 1, 6, 6).float()):
        output = attend(q, k, v, policy)
        assert output.dtype == torch.bfloat16
        exact = attend(q.float(), k.float(), v.float(), policy)
        assert (output.float() - exact).abs().max() < 0.05
    trained = q.clone().requires_grad_()
    attend(trained, k, v, random_policy(1, 1, 6, 6)).sum().backward()
    assert trained.grad is not None and trained.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("shared", [True, False])
def test_a_few_images_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch, shared: bool):
    q, k, v = noise(5, 2, 3, 4, seed=1), noise(5, 2, 6, 4, seed=2), noise(5, 2, 6, 4, seed=3)
    policy = random_policy(1 if shared else 5, 1, 1 if shared else 3, 6)
    with torch.no_grad():
        together = attend(q, k, v, policy, "compat")
        monkeypatch.setattr("lavit_tok.nn.attention.SCORES", 2 * 2 * 3 * 6)  # two images
        assert torch.equal(attend(q, k, v, policy, "compat"), together)
        monkeypatch.setattr("lavit_tok.nn.attention.SCORES", 1)
        assert torch.equal(attend(q, k, v, policy, "compat"), together)
