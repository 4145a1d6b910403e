"""Which patches attend to which, at what cost, independently of the rest of the batch."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavit_tok.encode.allocation import straight_through
from lavit_tok.encode.merger import Merger, cross_policy, grid_positions, self_policy
from lavit_tok.nn.attention import Formula

WIDTH, PATCHES = 16, 9


def merger(formula: Formula = "strict", depth: int = 2, patches: int | None = None) -> Merger:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Merger(WIDTH, depth, 2, 40, 1e-5, formula, patches)
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(
                parameter
            )  # no bias or norm at its neutral start
    return module


def features(batch: int, patches: int = PATCHES, seed: int = 0) -> Tensor:
    return torch.randn(batch, patches, WIDTH, generator=torch.Generator().manual_seed(seed))


def masks(batch: int, patches: int = PATCHES, seed: int = 0) -> Tensor:
    """Random ones, but the first keeps all, the second one patch, and every image at least one."""
    keep = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)) < 0.4
    keep[torch.arange(batch), torch.arange(batch) % patches] = True
    keep[0] = True
    if batch > 1:
        keep[1] = torch.arange(patches) == patches - 2
    return keep


DRAWING = """
    self-attention     key  0 1 2 3 4        cross-attention     key  0 1 2 3 4
    query 0 (k)             x . . . .        query 0 (k)              . x . . x
    query 2 (k)             x . x . .        query 2 (k)              . x . . x
    query 3 (k)             x . x x .        query 3 (k)              . x . . x
"""


@pytest.mark.parametrize("as_type", [torch.bool, torch.float32])
def test_the_drawing(as_type: torch.dtype):
    import lavit_tok.encode.merger as module

    assert module.__doc__ is not None and DRAWING.strip() in module.__doc__
    keep = torch.tensor([[True, False, True, True, False]])
    own, other = self_policy(keep.to(as_type)), cross_policy(keep.to(as_type))
    assert (
        own.dtype == other.dtype == as_type
        and own.shape == (1, 1, 5, 5)
        and other.shape == (1, 1, 1, 5)
    )
    for line in DRAWING.strip().splitlines()[1:]:
        _, query, _, *rest = line.split()
        drawn_own, drawn_other = rest[:5], rest[8:]
        assert ["x" if p else "." for p in own[0, 0, int(query)].tolist()] == drawn_own
        assert ["x" if p else "." for p in other[0, 0, 0].tolist()] == drawn_other
    assert own[0, 0, 1].tolist() == [1, 1, 0, 0, 0], "a dropped query still sees itself"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_smallest_pictures(n: int):
    for keep in (torch.ones(2, n, dtype=torch.bool), torch.zeros(2, n, dtype=torch.bool)):
        own, other = self_policy(keep), cross_policy(keep)
        assert torch.equal(
            own[0, 0], torch.ones(n, n).tril().bool() if keep.all() else torch.eye(n).bool()
        )
        assert torch.equal(other[:, 0, 0], ~keep)
        assert torch.equal(self_policy(keep.float()), own.float())
        assert torch.equal(cross_policy(keep.float()), other.float())


@pytest.mark.parametrize("patches", [None, PATCHES])
@pytest.mark.parametrize("formula", ["strict", "compat"])
def test_equals_the_slow_version(formula: Formula, patches: int | None):
    module, x, keep = merger(formula, patches=patches), features(4), masks(4)
    with torch.no_grad():
        merged = module(x, keep)
        slow = torch.cat([reference.merge(module, x[i], keep[i].tolist()) for i in range(4)])
    assert merged.shape == (int(keep.sum()), WIDTH)
    torch.testing.assert_close(merged.double(), slow, rtol=0, atol=2e-5)


@pytest.mark.parametrize("formula", ["strict", "compat"])
def test_bool_and_float_policies_agree_with_the_kept_rows(formula: Formula):
    module, x, keep = merger(formula), features(5), masks(5)
    with torch.no_grad():
        merged = module(x, keep)
        for policy in (keep, keep.float()):
            torch.testing.assert_close(module.dense(x, policy)[keep], merged, rtol=0, atol=2e-5)


def test_keep_all_and_keep_one():
    module, x = merger(), features(2)
    everything = torch.ones(2, PATCHES, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            module(x, everything), module.dense(x, everything).flatten(0, 1), rtol=0, atol=2e-5
        )
        for i in range(PATCHES):
            one = torch.zeros(2, PATCHES, dtype=torch.bool)
            one[:, i] = True
            slow = torch.cat([reference.merge(module, x[b], one[b].tolist()) for b in range(2)])
            torch.testing.assert_close(module(x, one).double(), slow, rtol=0, atol=2e-5)
        tiny = features(1, patches=1)
        assert module(tiny, torch.ones(1, 1, dtype=torch.bool)).shape == (1, WIDTH)
        assert module(x[:0], everything[:0]).shape == (0, WIDTH)


def test_without_blocks_only_the_norm_is_left():
    module, x, keep = merger(depth=0), features(3), masks(3)
    torch.testing.assert_close(module(x, keep), module.norm_out(x[keep]))


@pytest.mark.parametrize("path", ["ragged", "dense bool", "dense float"])
def test_strict_sees_nothing_it_should_not(path: str):
    """Zero gradient from later kept patches and other images; not from earlier and dropped ones."""
    module, keep = merger(), masks(3, seed=1)
    x = features(3).requires_grad_()
    policy = {"ragged": keep, "dense bool": keep, "dense float": keep.float()}[path]
    merged = module(x, keep) if path == "ragged" else module.dense(x, policy)[keep]
    rows = [(int(b), int(i)) for b, i in keep.nonzero()]
    for (b, i), row in zip(rows, merged, strict=True):
        (gradient,) = torch.autograd.grad(row.square().sum(), x, retain_graph=True)
        seen = gradient.abs().sum(-1) > 0
        expected = torch.zeros_like(keep)
        expected[b] = ~keep[b] | (torch.arange(PATCHES) <= i)
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("as_float", [False, True])
def test_cross_attention_sees_dropped_keys_only(as_float: bool):
    """Through cross-attention alone, kept patches have exactly zero gradient."""
    module, keep = merger(depth=1), masks(3, seed=2)
    x, context = features(3), features(3, seed=5).requires_grad_()
    policy = cross_policy(keep.float() if as_float else keep)
    module.blocks[0].cross_attention(x, context, policy).square().sum().backward()  # type: ignore[operator, union-attr]
    assert context.grad is not None
    assert torch.equal(context.grad.abs().sum(-1) > 0, ~keep)


def test_compat_leaks_as_the_release_does():
    """In compat a later kept patch changes an earlier one, a defect that strict does not have."""
    module, keep = merger("compat"), masks(3, seed=1)
    x = features(3).requires_grad_()
    module(x, keep)[0].square().sum().backward()
    assert x.grad is not None and (x.grad[0].abs().sum(-1) > 0).all() and (x.grad[1:] == 0).all()


@pytest.mark.parametrize("formula", ["strict", "compat"])
def test_the_selector_learns_through_the_policy(formula: Formula):
    module, x = merger(formula), features(4)
    scores = torch.zeros(4, PATCHES, 2, requires_grad=True)
    policy = straight_through(scores.log_softmax(-1), torch.Generator().manual_seed(0))
    merged = module.dense(x, policy)[policy.detach().bool()]
    merged.square().mean().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad.abs().sum(-1) > 0).float().mean() > 0.9, (
        "kept and dropped patches both hear of the loss"
    )


def test_a_hard_mask_would_teach_the_selector_nothing():
    module, x = merger(), features(4)
    scores = torch.zeros(4, PATCHES, 2, requires_grad=True)
    policy = straight_through(scores.log_softmax(-1), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(
        module.dense(x, policy > 0.5).mean(), scores, allow_unused=True
    )
    assert gradient is None


def test_large_features_stay_finite_in_both_paths():
    module, keep = merger(), masks(4)
    x = (features(4) * 1e4).requires_grad_()
    policy = keep.float().requires_grad_()
    (module.dense(x, policy).square().mean() + module(x, keep).square().mean()).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert policy.grad is not None and policy.grad.isfinite().all()


def flops(module: Merger, x: Tensor, keep: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x, keep)
    return sum(
        f
        for op, f in counter.get_flop_counts()["Global"].items()
        if str(op) in ("aten.addmm", "aten.mm")
    )


def test_strict_computes_kept_rows_only():
    """Linear layers compute kept patches, and dropped ones for cross keys and values."""
    module, x = merger(), features(4, 64)
    keep = masks(4, 64, seed=3)
    kept, dropped, mlp = int(keep.sum()), int((~keep).sum()), 40
    self_attention, cross = 4 * kept * WIDTH**2, (2 * kept + 2 * dropped) * WIDTH**2
    expected = 2 * len(module.blocks) * (self_attention + cross + 2 * kept * WIDTH * mlp)
    assert flops(module, x, keep) == expected
    few = torch.zeros_like(keep)
    few[:, ::16] = True
    assert flops(module, x, few) < 0.3 * flops(merger("compat"), x, few)


def test_positions_tell_places_apart():
    """Equal features at every patch: without positions all kept patches are equal."""
    x, keep = (
        features(1, 1).expand(1, PATCHES, WIDTH).contiguous(),
        torch.ones(1, PATCHES, dtype=torch.bool),
    )
    with torch.no_grad():
        same, told = merger(depth=0)(x, keep), merger(depth=0, patches=PATCHES)(x, keep)
    assert torch.pdist(same).max() < 1e-5 and torch.pdist(told).min() > 0.1


def test_a_grid_of_positions():
    grid = grid_positions(16, 8).unflatten(0, (4, 4))
    assert torch.equal(grid[0, :, :4], grid[0, :1, :4].expand(4, 4)), (
        "the first half knows the row alone"
    )
    assert torch.equal(grid[:, 0, 4:], grid[:1, 0, 4:].expand(4, 4)), (
        "the second half the column alone"
    )
    near, far = (grid[0, 0] - grid[0, 1]).norm(), (grid[0, 0] - grid[3, 3]).norm()
    assert near < far
    assert torch.pdist(grid.flatten(0, 1)).min() > 0.1, "no two places are alike"
    for side in (2, 4):  # wavelengths of twice the side and of two patches
        waves = torch.pi * torch.tensor([1 / side, 1])
        second = grid_positions(side**2, 8).unflatten(0, (side, side))[1, 0, :4]
        torch.testing.assert_close(second, torch.cat([waves.sin(), waves.cos()]))
    assert grid_positions(1, 4).shape == (1, 4)
    with pytest.raises(ValueError, match="square number of patches"):
        grid_positions(12, 8)
