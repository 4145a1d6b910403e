"""The image-text scorer: what its loss asks for, what it learns, and how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.shared.provenance import recipe


@pytest.fixture(scope="module")
def page() -> Any:
    pytest.importorskip("transformers")
    return recipe("default/scorer.py")


def test_equal_captions_are_equally_right(page: Any) -> None:
    scorer = page.Scorer().eval()
    features, sentences = torch.randn(5, len(scorer.mean)), torch.randn(3, 384)
    caption = torch.tensor([0, 1, 0, 2, 1])
    loss = page.contrastive(scorer, features, sentences[caption], caption)
    images = scorer.image_vectors(features)
    texts = scorer.text_vectors(sentences[caption])
    slow = torch.zeros(())
    for i in range(5):
        for a, b in ((images, texts), (texts, images)):
            log_p = (scorer.log_scale.exp() * b @ a[i]).log_softmax(0)
            slow = slow - log_p[caption == caption[i]].mean() / 10
    torch.testing.assert_close(loss, slow)


def test_it_learns_which_caption_is_whose(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "EPOCHS", 60)
    monkeypatch.setattr(page, "BATCH", 64)
    monkeypatch.setattr(page, "AMONG", 20)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(40, 384, generator=generator)
    scorer, sentences, caption = page.Scorer(), F.normalize(draw, dim=1), torch.arange(240) % 40
    features = torch.randn(40, len(scorer.mean), generator=generator)[caption]
    features = features + torch.randn(features.shape, generator=generator)
    before = page.held_out(scorer.eval(), features, sentences[caption], caption)
    page.train(scorer, features, sentences[caption], caption, 0)
    after = page.held_out(scorer, features, sentences[caption], caption)
    assert before["top1"] < 0.3 and after["top1"] > 0.9 and after["top5"] >= after["top1"]


def test_identified_by_brute_force(page: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 30, 6, generator=generator)
    b, ranks = a + noise, []
    for i in range(30):
        order = sorted(range(30), key=lambda j: -float(a[i].double() @ b[j].double()))
        ranks.append(order.index(i))
    ratios = {f"top{k}": sum(rank < k for rank in ranks) / 30 for k in (1, 5)}
    assert page.Scorer.identified(a, b) == ratios and 0 < ratios["top1"] < ratios["top5"] < 1
    alike = page.Scorer.identified(b, b * 0 + b[0])
    assert alike == {"top1": 0, "top5": 0}, "an answer that fits all identifies none"


def test_a_folder_without_a_scorer(page: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected the folder that recipes/default/scorer\.py wrot"
    ):
        page.load_scorer(tmp_path)


def test_images_of_any_size(page: Any) -> None:
    scorer, image = page.Scorer().eval(), torch.zeros(3, 3, 40, 60, dtype=torch.uint8)
    image[1:] = 200
    vectors = scorer.describe(image)
    assert vectors.shape == (3, page.WIDTH) and vectors[1].equal(vectors[2])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
