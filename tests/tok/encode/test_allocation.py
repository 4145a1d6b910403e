"""Keep decisions: every budget, with and without sampling, and the differentiable form."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers.tensors import generator
from torch import Tensor

from lavit_tok.encode.allocation import (
    dithered,
    keep_by_budget,
    logistic_noise,
    ordered_noise,
    select,
    shift_to_ratio,
    straight_through,
)
from lavit_tok.encode.selector import keep_scores


def log_probs(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    logits = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed))
    logits[..., 0] += shift
    return logits.log_softmax(-1)


def test_by_default_the_more_probable_choice():
    p = log_probs(4, 12)
    assert torch.equal(select(p), p[..., 0] > p[..., 1])
    for i in range(4):
        assert select(p)[i].tolist() == reference.select(p[i])


@pytest.mark.parametrize("budget", [None, 1, 0.01])
def test_at_least_one_patch_is_kept(budget: Any):
    p = log_probs(5, 8, shift=-100.0)
    keep = select(p, budget)
    assert keep.sum(1).tolist() == [1] * 5
    assert torch.equal(keep.int().argmax(1), keep_scores(p).argmax(1))
    equal = torch.zeros(3, 4, 2)
    assert select(equal, budget)[:, 0].all() and select(equal, budget).sum() == 3


def test_an_int_budget_is_exact():
    p = log_probs(3, 10)
    for budget in range(1, 11):
        keep = select(p, budget)
        assert keep.sum(1).tolist() == [budget] * 3
        for mask, scores in zip(keep, keep_scores(p), strict=True):
            assert not (~mask).any() or scores[mask].min() >= scores[~mask].max()


def test_a_budget_of_more_than_all_patches():
    with pytest.warns(UserWarning, match="budget: expected at most 10 codes per image, .* got 13"):
        keep = select(log_probs(3, 10), 13)
    assert keep.all()


@pytest.mark.usefixtures("unchecked")
def test_numpy_numbers_are_numbers():
    p = log_probs(3, 10)
    assert torch.equal(select(p, np.int64(4)), select(p, 4))  # type: ignore[arg-type]
    assert torch.equal(select(p, np.float64(0.5)), select(p, 0.5))


def test_a_fraction_is_spent_across_the_batch():
    rng = random.Random(0)
    for trial in range(100):
        batch, patches = rng.randrange(1, 6), rng.randrange(1, 12)
        p = log_probs(batch, patches, seed=trial, shift=rng.uniform(-3, 3))
        fraction = rng.uniform(0.01, 1.0)
        keep, scores = select(p, fraction), keep_scores(p)
        assert int(keep.sum()) == max(batch, round(fraction * batch * patches))
        assert keep.any(1).all()
        best = torch.zeros_like(keep).scatter(1, scores.argmax(1, keepdim=True), True)
        free = (
            keep & ~best
        )  # beyond each image's best one, only the highest scores of the whole batch
        if free.any() and not keep.all():
            assert scores[free].min() >= scores[~keep].max()
    assert select(log_probs(3, 4), 1.0).all()


def test_a_detailed_image_gets_more_of_a_common_budget():
    scores = torch.tensor([[5.0, 5.0, 5.0, 5.0], [-5.0, -5.0, -5.0, -4.0]])
    assert keep_by_budget(scores, 0.5).tolist() == [
        [True, True, True, False],
        [False, False, False, True],
    ]


def test_equal_scores_go_to_the_earlier_patch():
    scores = torch.zeros(2, 5)
    assert keep_by_budget(scores, 2).tolist() == [[True, True, False, False, False]] * 2
    assert keep_by_budget(scores, 0.4).tolist() == [
        [True, True, True, False, False],
        [True] + [False] * 4,
    ]


def test_infinite_scores_leave_each_image_one_patch():
    scores = torch.tensor([[float("inf")] * 4, [0.0, 1.0, -float("inf"), 0.0]])
    assert keep_by_budget(scores, 0.25).sum(1).tolist() == [1, 1]
    assert keep_by_budget(scores, 0.5).tolist() == [
        [True, True, True, False],
        [False, True, False, False],
    ]
    assert keep_by_budget(scores, None)[1].tolist() == [False, True, False, False]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "budget",
    [
        0,
        -1,
        0.0,
        -0.5,
        1.5,
        float("nan"),
        float("inf"),
        True,
        "8",
        [4],
        np.int64(0),
        torch.tensor(3),
    ],
)
def test_impossible_budgets(budget: Any):
    with pytest.raises(ValueError, match="budget"):
        select(log_probs(2, 4), budget)


def test_nan_scores_are_refused():
    p = log_probs(2, 4)
    p[1, 2] = float("nan")
    for budget in (None, 2, 0.5):
        with pytest.raises(ValueError, match="NaN"):
            select(p, budget)


def test_deterministic_without_sampling_and_repeatable_with():
    p = log_probs(8, 64)
    assert torch.equal(select(p), select(p))
    drawn = select(p, sample=True, generator=generator(1))
    assert torch.equal(drawn, select(p, sample=True, generator=generator(1)))
    assert not torch.equal(drawn, select(p, sample=True, generator=generator(2)))
    assert not torch.equal(drawn, select(p))
    state = torch.random.get_rng_state()
    select(p, sample=True, generator=generator(1))
    assert torch.equal(state, torch.random.get_rng_state()), (
        "with a generator the global one is not used"
    )
    for budget in (5, 0.3):
        drawn = select(p, budget, sample=True, generator=generator(1))
        assert not torch.equal(drawn, select(p, budget)) and drawn.sum() == select(p, budget).sum()


def test_sampling_keeps_with_the_probability_it_should():
    probability = torch.tensor([0.1, 0.5, 0.8])
    p = torch.stack([probability, 1 - probability], -1).log().expand(20_000, 3, 2)
    kept = (keep_scores(p) + logistic_noise(p[..., 0], generator())) > 0
    torch.testing.assert_close(kept.double().mean(0), probability.double(), rtol=0, atol=0.015)


def test_noise_is_finite(monkeypatch: pytest.MonkeyPatch):
    drawn = logistic_noise(torch.zeros(1_000_000), generator())
    assert drawn.isfinite().all() and abs(float(drawn.mean())) < 0.01
    assert float(drawn.std()) == pytest.approx(torch.pi / 3**0.5, rel=0.01)
    ends = torch.tensor([0.0, 1 - 2**-24])  # which rand returns once in 2^24 numbers
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ends)
    assert logistic_noise(ends, None).tolist() == pytest.approx([-13.8, 13.8], abs=0.1)


def test_the_training_decision_is_exactly_zero_or_one():
    """(hard + soft) - soft would sometimes be 1 + 1e-7: a kept patch of weight -1e-7."""
    for seed in range(20):
        policy = straight_through(log_probs(8, 64, seed=seed), generator(seed))
        assert set(policy.unique().tolist()) == {0.0, 1.0}
        assert (policy.sum(1) >= 1).all()


def test_the_training_decision_is_the_sampled_one_with_a_soft_gradient():
    p = log_probs(4, 16).requires_grad_()
    policy = straight_through(p, generator(3), temperature=0.7)
    assert torch.equal(policy.bool(), select(p, sample=True, generator=generator(3)))
    weights = torch.randn(4, 16, generator=generator(5))
    (policy * weights).sum().backward()
    soft = ((keep_scores(p) + logistic_noise(keep_scores(p), generator(3))) / 0.7).sigmoid()
    slope = weights * soft * (1 - soft) / 0.7
    torch.testing.assert_close(p.grad, torch.stack([slope, -slope], -1))  # type: ignore[arg-type]
    quiet = straight_through(p, None, sample=False)
    assert torch.equal(quiet.bool(), select(p))


def test_a_ratio_is_held_and_no_gradient_moves_it():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3 + 2
    scores.requires_grad_()
    for ratio in (0.1, 1 / 3, 0.9):
        shift = shift_to_ratio(scores, ratio)
        probability = (scores + shift).sigmoid()
        assert abs(float(probability.mean().detach()) - ratio) < 1e-5
        (slope,) = torch.autograd.grad(probability.mean(), scores, retain_graph=True)
        assert slope.abs().max() < 1e-6, "the mean cannot be moved"
        (slope,) = torch.autograd.grad(probability[0, 0], scores)
        moved = scores.detach().clone()
        moved[1, 1] += 0.05
        with torch.no_grad():  # against a finite difference, through the shift
            found = (moved + shift_to_ratio(moved, ratio)).sigmoid()[0, 0] - probability[0, 0]
        assert abs(float(found) / 0.05 - float(slope[1, 1])) < 1e-4
    for far in (-200.0, 200.0):  # scores that are all far from 0
        probability = (scores + far + shift_to_ratio(scores + far, 0.25)).sigmoid()
        assert abs(float(probability.mean().detach()) - 0.25) < 1e-4
    log_probs = torch.stack([scores.detach(), torch.zeros_like(scores)], -1).log_softmax(-1)
    draws = [
        straight_through(log_probs, torch.Generator().manual_seed(s), ratio=0.25).mean()
        for s in range(200)
    ]
    assert abs(float(torch.stack(draws).mean()) - 0.25) < 0.01


DITHER = """
         0  8  2 10
        12  4 14  6
         3 11  1  9
        15  7 13  5
"""


def test_the_pattern_that_is_drawn():
    drawn = torch.tensor(
        [[int(word) for word in line.split()] for line in DITHER.strip().splitlines()]
    )
    lines = [line[:20].split() for line in (ordered_noise.__wrapped__.__doc__ or "").splitlines()]
    assert [
        line for line in lines if len(line) >= 4 and all(word.isdigit() for word in line[:4])
    ] == [[str(int(n)) for n in row] for row in drawn]
    assert torch.allclose(
        ordered_noise(16).sigmoid() * 16 - 0.5, drawn.flatten().float(), atol=1e-4
    )
    for patches in (1, 4, 9, 64, 196, 256):
        ranks = ordered_noise(patches).sigmoid() * patches - 0.5
        assert torch.allclose(ranks.sort().values, torch.arange(patches).float(), atol=1e-3), (
            "each quantile once"
        )
    with pytest.raises(ValueError, match="square number"):
        ordered_noise(12)


def test_alike_patches_are_kept_evenly():
    """Uniform scores: the threshold keeps nothing, the pattern the ratio, in each quarter."""
    ratio = 0.3
    log_probs = torch.tensor([ratio, 1 - ratio]).log().expand(1, 64, 2)
    assert select(log_probs).sum() == 1
    even = dithered(log_probs)
    assert torch.allclose(even.exp().sum(-1), torch.ones(1, 64))
    assert torch.allclose(dithered(even, -1), log_probs, atol=1e-5)
    keep = select(even).view(8, 8)
    assert abs(float(keep.float().mean()) - ratio) <= 1 / 64
    quarters = [int(keep[r : r + 4, c : c + 4].sum()) for r in (0, 4) for c in (0, 4)]
    assert max(quarters) - min(quarters) <= 1
    best = keep_scores(even)[0].topk(16).indices.sort().values
    assert torch.equal(select(even, 16)[0].nonzero().flatten(), best), (
        "a budget takes the highest scores"
    )
    first, second = (torch.Generator().manual_seed(0) for _ in range(2))
    drawn = select(even, sample=True, generator=first, dither=True)
    assert torch.equal(drawn, select(log_probs, sample=True, generator=second)), (
        "sampled noise replaces it"
    )
