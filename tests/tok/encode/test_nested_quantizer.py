"""Nested codes against a slow version: one area, one stage after another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lavit_tok.decode.nested_reconstructor import NestedReconstructor
from lavit_tok.encode import quantizer as quantizer_module
from lavit_tok.encode.nested_quantizer import NestedCodebook, NestedQuantizer
from lavit_tok.nn.nested_order import nested_order
from lavit_tok.training.nested_codebook import NestedCodebookConfig, fit_quantizer, kmeans

PATCHES, SIDE, DIM = 16, 4, 5


def slow(codebook: NestedCodebook, vectors: Tensor) -> tuple[list[int], list[Tensor]]:
    """Codes of one image, and the sum of the entries after each; by the ranks of the order."""
    left, total, codes, sums = vectors.clone(), torch.zeros_like(vectors), [], []
    for rank in range(PATCHES):
        level = 0 if rank == 0 else 1 if rank < 4 else 2
        stage = 0 if rank == 0 else 1 + (rank - 1) if rank < 4 else 4 + (rank - 4) // 4
        size = SIDE if level < 2 else SIDE // 2
        patch = int(nested_order(PATCHES).patch[rank])
        top, left_edge = patch // SIDE // size * size, patch % SIDE // size * size
        area = [(top + y) * SIDE + left_edge + x for y in range(size) for x in range(size)]
        basis, table = codebook.basis(level), codebook.embeddings[stage]
        code = int((table - left[area].flatten() @ basis).square().sum(1).argmin())
        part = (basis @ table[code]).view(size * size, -1)
        left[area] -= part
        total[area] += part
        codes.append(code)
        sums.append(total.clone())
    return codes, sums


@pytest.fixture(scope="module")
def codebook() -> NestedCodebook:
    torch.manual_seed(0)
    return NestedCodebook(size=8, dim=DIM, patches=PATCHES, patch_dim=3)


def test_codes_and_sums_are_those_of_the_slow_version(codebook: NestedCodebook) -> None:
    vectors = torch.randn(3, PATCHES, 3)
    codes, left = codebook.encode(vectors, PATCHES)
    for image in range(3):
        expected, sums = slow(codebook, vectors[image])
        assert codes[image].tolist() == expected
        for count in range(1, PATCHES + 1):
            some = codes[image : image + 1, :count]
            found = codebook.decode(some, torch.tensor([count]))[0]
            torch.testing.assert_close(found, sums[count - 1], atol=1e-5, rtol=1e-5)
            distance = (vectors[image] - found).square().sum(-1).mean()
            torch.testing.assert_close(left[image, count - 1], distance, atol=1e-5, rtol=1e-4)


def test_fewer_codes_are_the_first_of_more(codebook: NestedCodebook) -> None:
    vectors = torch.randn(4, PATCHES, 3)
    whole, left = codebook.encode(vectors, PATCHES)
    for count in (1, 2, 4, 7, 9, 12, 16):
        codes, distances = codebook.encode(vectors, count)
        assert torch.equal(codes, whole[:, :count]) and torch.equal(distances, left[:, :count])
    lengths = torch.tensor([1, 3, 9, 16])
    noisy = whole.clone()
    noisy[torch.arange(PATCHES) >= lengths[:, None]] = 0
    together = codebook.decode(whole, lengths)
    assert torch.equal(codebook.decode(noisy, lengths), together)
    alone = codebook.decode(whole[2:3, :9], lengths[2:3])
    torch.testing.assert_close(alone[0], together[2])


def test_entries_that_change_are_noticed() -> None:
    """Their norms are kept from one call to the next: changed in place, replaced, moved, copied."""
    torch.manual_seed(0)
    codebook, vectors = NestedCodebook(8, DIM, PATCHES, 3), torch.randn(2, PATCHES, 3)

    def codes_are_right(of: NestedCodebook) -> bool:
        return all(
            of.encode(vectors, PATCHES)[0][image].tolist() == slow(of, vectors[image])[0]
            for image in range(2)
        )

    assert codes_are_right(codebook)
    codebook.embeddings[1:3] *= 3
    assert codes_are_right(codebook)
    codebook.embeddings = codebook.embeddings.flip(2) * 2
    assert codes_are_right(codebook)
    codebook.load_state_dict(NestedCodebook(8, DIM, PATCHES, 3).state_dict())
    assert codes_are_right(codebook)
    other = pickle.loads(pickle.dumps(copy.deepcopy(codebook)))
    other.embeddings.neg_()
    assert codes_are_right(other) and codes_are_right(codebook)
    with torch.inference_mode():
        made = NestedCodebook(8, DIM, PATCHES, 3)
        assert codes_are_right(made)
        made.embeddings *= torch.linspace(0.5, 2, 8)[:, None]
        assert codes_are_right(made)


def test_codes_do_not_depend_on_how_the_smallest_distance_is_found(
    codebook: NestedCodebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal distances, too: the first entry counts."""
    vectors = torch.randn(3, PATCHES, 3)
    tied = copy.deepcopy(codebook)
    tied.embeddings[:, 4:] = tied.embeddings[:, :4]
    expected = [x.encode(vectors, PATCHES)[0] for x in (codebook, tied)]
    assert int(expected[1].max()) < 4
    monkeypatch.setattr(quantizer_module, "NUMPY_THREADS", 0)
    found = [x.encode(vectors, PATCHES)[0] for x in (codebook, tied)]
    assert all(map(torch.equal, found, expected))


def test_vectors_hold_the_direction_around_the_mean_and_a_linear_map() -> None:
    torch.manual_seed(0)
    quantizer = NestedQuantizer(12, 4, 2, 4, 5)
    quantizer.center.normal_()
    x = 3 * torch.randn(2, 4, 12)
    around = x - quantizer.center
    direction = around / around.norm(dim=-1, keepdim=True) @ quantizer.direction.weight.T
    torch.testing.assert_close(quantizer.project(x), direction + quantizer.value(x))


def test_nan_is_refused(codebook: NestedCodebook) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        codebook.encode(torch.full((1, PATCHES, 3), torch.nan), 1)


def test_one_patch() -> None:
    codebook = NestedCodebook(size=4, dim=2, patches=1, patch_dim=2)
    vectors = torch.randn(2, 1, 2)
    codes, _ = codebook.encode(vectors, 1)
    assert codes.shape == (2, 1)
    assert codebook.decode(codes, torch.tensor([1, 1])).shape == (2, 1, 2)


def fitted(color_weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Errors of features and colors with 1, 4 and 16 codes of a fitted codebook."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    scene = torch.randn(400, 4, 6, generator=generator) @ torch.randn(6, 12, generator=generator)
    smooth = F.interpolate(scene.view(400, 2, 2, 12).permute(0, 3, 1, 2), (4, 4), mode="bilinear")
    features = smooth.flatten(2).transpose(1, 2)
    features = features + 0.1 * torch.randn(features.shape, generator=generator) + 3
    colors = 0.5 + 0.05 * features[..., :6] + 0.1
    quantizer = NestedQuantizer(12, 32, 8, PATCHES, 10)
    reconstructor = NestedReconstructor(12, PATCHES, 10, 1, 3, 8, colors=6)
    with torch.no_grad():
        config = NestedCodebookConfig(color_weight=color_weight, samples=2000, iterations=5)
        lines: list[str] = []
        parts = (features, colors, config, generator, lines.append)
        fit_quantizer(quantizer, reconstructor, *parts)
        codes, _ = quantizer.encode(features, PATCHES)
        errors = []
        for count in (1, 4, 16):
            lengths = torch.full((400,), count)
            vectors = quantizer.codebook.decode(codes[:, :count], lengths)
            found = reconstructor(vectors, lengths)
            plain = reconstructor.linear_part(vectors)  # blocks begin by adding nothing
            torch.testing.assert_close(found.features, plain.features)
            x, y = features - quantizer.center, found.features - quantizer.center
            cosine = 1 - F.cosine_similarity(x, y, dim=-1).mean()
            errors.append(torch.stack([cosine, (found.colors - colors).square().mean()]))
    reported = [float(line.split()[-1]) for line in lines]
    assert len(reported) == 7 and reported == sorted(reported, reverse=True)
    left = (quantizer.project(features) - vectors).square().sum(-1).mean()
    assert reported[-1] == pytest.approx(float(left), abs=1e-3)
    bases = [quantizer.codebook.basis(i) for i in range(3)]
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-4, rtol=0)
    one, four, all_codes = errors
    return one, four, all_codes, colors.var()


def test_a_fitted_codebook_describes_features_and_colors() -> None:
    one, four, all_codes, variance = fitted(color_weight=60.0)
    assert bool((one > four).all()) and bool((four > all_codes).all())
    assert all_codes[0] < 0.1 and all_codes[1] < 0.1 * variance
    *_, without, _ = fitted(color_weight=1e-3)
    assert without[0] < all_codes[0] and without[1] > all_codes[1]  # a trade between the two


def test_kmeans_finds_separate_clusters_and_needs_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    samples = (centers[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    found = kmeans(samples, 3, 20, generator)
    assert torch.cdist(centers, found).min(1).values.max() < 0.1
    with pytest.raises(ValueError, match="at least 200 vectors, got 150"):
        kmeans(samples, 200, 2, generator)


def test_precision_of_the_caller_changes_no_code() -> None:
    """As in a training with precision bf16-mixed, or of a model in half precision."""
    torch.manual_seed(0)
    features = torch.randn(8, PATCHES, 12)
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = NestedQuantizer(12, 32, 8, PATCHES, 10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in quantizer.state_dict().values()} == {torch.float32}
    lengths = torch.arange(1, 9)
    codes, _ = quantizer.encode(features, PATCHES)
    vectors = quantizer.codebook.decode(codes, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(features, PATCHES)[0], codes)
        assert torch.equal(quantizer.codebook.decode(codes, lengths), vectors)
    quantizer.half()
    assert torch.equal(quantizer.encode(features, PATCHES)[0], codes)
    assert torch.equal(quantizer.codebook.decode(codes, lengths), vectors)
