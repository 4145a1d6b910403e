"""A codebook that learns by the formula, its k-means start, and usage statistics."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from helpers.tensors import codebook, unit
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.training.codebook import TrainingCodebook, spherical_kmeans, usage


def test_usage_of_counts_made_by_hand():
    stats = usage(torch.tensor([5, 5, 0, 2]), 8)
    assert (stats.used, stats.entropy_bits) == (
        3 / 8,
        pytest.approx(1.5),
    ) and stats.perplexity == pytest.approx(2**1.5)
    even = usage(torch.arange(16).repeat(3), 16)
    assert (
        even.used == 1
        and even.perplexity == pytest.approx(16)
        and even.entropy_bits == pytest.approx(4)
    )
    one = usage(torch.full((9,), 3), 4)
    assert (
        one.used == 0.25
        and one.perplexity == pytest.approx(1)
        and one.entropy_bits == pytest.approx(0)
    )
    none = usage(torch.empty(0, dtype=torch.int64), 4)
    assert (none.used, none.perplexity, none.entropy_bits) == (0, 0, 0)
    for wrong in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises((ValueError, RuntimeError)):
            usage(wrong, 4)


def trained(entries: Tensor, counts: Tensor | None = None, **options: float) -> TrainingCodebook:
    module = TrainingCodebook(codebook(entries), **options).train()  # type: ignore[arg-type]
    if counts is not None:
        module.load_embeddings(entries, counts)
    return module


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_ema_equals_the_formula(decay: float):
    """One step and several, from even and from uneven counts."""
    for counts in (torch.ones(6), torch.tensor([9.0, 1, 4, 2, 30, 0.5])):
        entries = unit(6, 4)
        module = trained(entries, counts, decay=decay, dead_ratio=0.0)
        module.set_vectors_per_step(50)
        sums = entries * counts[:, None]
        for step in range(5):
            z = unit(50, 4, seed=step + 1)
            quantized, codes, _ = module(z)
            before = entries
            entries, counts, sums, expected = reference.ema_step(entries, counts, sums, z, decay)
            assert codes.tolist() == expected
            torch.testing.assert_close(
                quantized.double(), before[codes].double(), rtol=0, atol=1e-6
            )
            torch.testing.assert_close(module.embeddings.double(), entries, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                module.vq._codebook.cluster_size[0].double(), counts, rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                module.vq._codebook.embed_avg[0].double(), sums, rtol=1e-5, atol=1e-5
            )


def test_loaded_entries_survive_a_step():
    """`embed` alone is undone by the first step; load_embeddings sets all buffers."""
    loaded, z = unit(6, 4, seed=9), unit(12, 4, seed=1)
    module = trained(unit(6, 4), decay=0.99)
    module.load_embeddings(loaded, torch.full((6,), 100.0))
    assert torch.equal(module.embeddings, loaded)
    module(z)
    assert (
        F.cosine_similarity(module.embeddings, loaded, dim=1) > 0.999
    ).all() and not torch.equal(module.embeddings, loaded)
    careless = trained(unit(6, 4), decay=0.99)
    careless.vq._codebook.embed.copy_(loaded[None])
    careless(z)
    assert (F.cosine_similarity(careless.embeddings, loaded, dim=1) < 0.999).any()


def test_dead_entries_are_replaced_relative_to_the_mean_count():
    """64 vectors a step, K = 8: mean count 8, dead below 0.05 * 8 = 0.4. One is never used."""
    entries = torch.cat(
        [F.normalize(torch.eye(7, 8) + 0.01, dim=-1), -F.normalize(torch.ones(1, 8), dim=-1)]
    )
    module = trained(entries, torch.full((8,), 8.0), decay=0.5, dead_ratio=0.05)
    module.set_vectors_per_step(64)
    z = F.normalize(entries[:7].repeat(10, 1)[:64] + 0.05 * unit(64, 8), dim=-1)
    for count in (4, 2, 1, 0.5):
        _, codes, _ = module(z)
        assert 7 not in codes.tolist()
        torch.testing.assert_close(
            module.embeddings[7], entries[7], rtol=0, atol=1e-6
        )  # still alive
        assert float(module.vq._codebook.cluster_size[0, 7]) == pytest.approx(count)
    others = module.embeddings[:7].clone()
    module(z)  # 0.25 < 0.4
    assert ((z - module.embeddings[7]).abs().amax(1) < 1e-5).any(), "replaced by an input"
    assert (F.cosine_similarity(module.embeddings[:7], others, dim=1) > 0.999).all(), (
        "no other entry changed"
    )
    fresh = module.embeddings[7].clone()
    _, codes, _ = module(z)
    assert 7 in codes.tolist()
    assert F.cosine_similarity(module.embeddings[7], fresh, dim=0) > 0.9, (
        "a replaced entry that is used is kept"
    )


def test_what_is_not_dead_is_not_replaced():
    """An absolute threshold would make every entry dead in small batches; 0 never replaces."""
    entries = unit(32, 8)
    small = trained(entries, torch.full((32,), 0.25), decay=0.99, dead_ratio=0.05)
    small.set_vectors_per_step(8)
    small(unit(8, 8, seed=1))
    assert (F.cosine_similarity(small.embeddings, entries, dim=1) > 0.95).all()
    never = trained(entries, torch.full((32,), 1e-3), decay=0.5, dead_ratio=0.0)
    never.set_vectors_per_step(8)
    for _ in range(20):
        never(entries[:8])
    torch.testing.assert_close(never.embeddings, entries, rtol=0, atol=1e-4)


def test_replacement_follows_the_seed():
    def run(seed: int) -> Tensor:
        module = trained(unit(32, 8), torch.full((32,), 1e-3), decay=0.5, dead_ratio=0.5)
        module.set_vectors_per_step(64)
        module(unit(64, 8, seed=1)[:40], seed)
        return module.embeddings.clone()

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    module = trained(unit(32, 8), dead_ratio=0.5)
    module.set_vectors_per_step(64)
    before = torch.random.get_rng_state()
    module(unit(64, 8, seed=1), 5)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is not used"


def test_eval_mode_changes_nothing():
    entries, z = unit(16, 4), unit(40, 4, seed=1)
    module = trained(entries, dead_ratio=0.9)
    module.set_vectors_per_step(1000)  # nearly every entry would count as dead
    module.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    quantized, codes, _ = module(z)
    assert torch.equal(codes, codebook(entries).nearest(z))
    torch.testing.assert_close(quantized, entries[codes])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_gradient_passes_the_rounding(gradient: str):
    entries, z = unit(8, 4), unit(20, 4, seed=1).requires_grad_()
    module = TrainingCodebook(codebook(entries), gradient=gradient).train()  # type: ignore[arg-type]
    quantized, codes, loss = module(z)
    torch.testing.assert_close(quantized, entries[codes], rtol=0, atol=1e-5)

    def along_the_sphere(slope: Tensor) -> Tensor:  # the package brings z to unit length first
        return slope - (slope * z).sum(1, keepdim=True).detach() * z.detach()

    upstream = unit(20, 4, seed=2)
    (received,) = torch.autograd.grad((quantized * upstream).sum(), z, retain_graph=True)
    assert received.isfinite().all()
    straight = torch.allclose(received, along_the_sphere(upstream), atol=1e-6)
    assert straight == (gradient == "straight_through")
    expected = F.mse_loss(z.detach(), entries[codes])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    (pull,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(
        pull, along_the_sphere(2 * (z.detach() - entries[codes]) / z.numel()), rtol=1e-4, atol=1e-6
    )


def test_autocast_does_not_reach_the_codebook():
    entries, z = unit(512, 16), unit(400, 16, seed=1)
    expected = codebook(entries).nearest(z)
    module = trained(entries).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(z)[1], expected)


def planted(clusters: int, each: int, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    centers = unit(clusters, 16, seed=3)
    samples = centers.repeat_interleave(each, 0) + spread * unit(clusters * each, 16, seed=4)
    return centers, F.normalize(samples, dim=-1)


def test_kmeans_recovers_planted_clusters():
    """With more entries than clusters every center is found, and every entry is near a center."""
    centers, samples = planted(10, 60)
    entries, counts = spherical_kmeans(samples, 40, 15, torch.Generator().manual_seed(0))
    similarity = centers @ entries.T
    assert (similarity.amax(1) > 0.99).all(), "each center has an entry"
    assert (similarity.amax(0) > 0.98).all(), "each entry has a center"
    torch.testing.assert_close(entries.norm(dim=1), torch.ones(40))
    owner = similarity.argmax(0)
    for cluster in range(10):
        assert counts[owner == cluster].sum() == 60


def test_kmeans_improves_and_is_repeatable():
    samples = unit(500, 8)

    def quality(iterations: int) -> float:
        entries, counts = spherical_kmeans(
            samples, 20, iterations, torch.Generator().manual_seed(1)
        )
        assert iterations == 0 or int(counts.sum()) == 500
        return float((samples @ entries.T).amax(1).mean())

    scores = [quality(n) for n in (0, 1, 3, 10)]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 0.02 and quality(10) == scores[-1]


def test_kmeans_of_few_samples():
    samples = unit(8, 4)
    entries, counts = spherical_kmeans(samples, 8, 5, torch.Generator().manual_seed(0))
    assert counts.tolist() == [1] * 8 and math.isclose(
        float((samples @ entries.T).amax(1).min()), 1, abs_tol=1e-5
    )
    with pytest.raises(ValueError, match="at least 9 samples, got 8"):
        spherical_kmeans(samples, 9, 5, torch.Generator().manual_seed(0))
    same = unit(1, 4).repeat(20, 1)  # every cluster but one is empty and restarts
    entries, _ = spherical_kmeans(same, 5, 3, torch.Generator().manual_seed(0))
    assert entries.isfinite().all() and torch.allclose(entries, same[:5], atol=1e-5)
