"""The speed benchmarks: each runs end to end at laptop size, and counts what can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lavit_tok import VisualTokenizer

pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")


def run(script: Any, out: Path, *words: object) -> dict[str, Any]:
    script.main(script.arguments().parse_args([*map(str, words), "--out", str(out)]))
    (path,) = out.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 1000
    text = path.with_suffix(".md").read_text()
    for part in (
        "command: `",
        "commit: ",
        "hardware: ",
        "versions: python 3",
        f"![images/s]({path.stem}.png)",
    ):
        assert part in text
    assert list(out.glob(".*")) == []
    return json.loads(path.read_text())


def test_encoding_beside_other_tokenizers(
    scripts: Any, tmp_path: Path, tiny_tokenizer: VisualTokenizer
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [
        "--tokenizer",
        tmp_path / "tokenizer",
        "--cases",
        "shipped",
        "--batch-sizes",
        2,
        "--repeats",
        2,
    ]
    words += [
        "--seconds",
        0,
        "--warm",
        1,
        "--beside",
        "helpers.small_tokenizers:chameleon",
        "helpers.small_tokenizers:vqmodel",
    ]
    rows = run(
        scripts("encode_speed"), tmp_path / "out", *words, "--beside-repeats", 2, "--memory"
    )["beside"]
    bare, own, chameleon, vqmodel = rows
    assert [r["name"] for r in rows] == [
        "shipped: bare encoder",
        "shipped: lavit-tok",
        "chameleon",
        "vqmodel",
    ]
    assert own["tokens_per_image"] == pytest.approx(
        16 / 3, abs=0.3
    )  # a third of the patches, spent across the batch
    assert own["bits_per_image"] == pytest.approx(own["tokens_per_image"] * math.log2(16))
    assert (chameleon["tokens_per_image"], chameleon["bits_per_image"]) == (
        4,
        4 * 6,
    )  # a grid of 2 x 2, 64 codes
    assert vqmodel["tokens_per_image"] == 8 * 8
    assert (
        bare["parameters"]
        == sum(p.numel() for p in tiny_tokenizer.encoder.parameters())
        < own["parameters"]
    )
    assert bare["gflops_per_image"] < own["gflops_per_image"]
    assert own["flop_ratio"] == pytest.approx(own["gflops_per_image"] / bare["gflops_per_image"])
    assert {r["weights"] for r in rows[2:]} == {"random weights"}
    assert all(0 < r["peak_memory"]["imports_gib"] <= r["peak_memory"]["run_gib"] for r in rows[1:])


def test_decoding_beside_the_bare_loop_and_other_decoders(
    scripts: Any, tmp_path: Path, tiny_decoder: Any
) -> None:
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    words = [
        "--decoder",
        tmp_path / "decoder",
        "--steps",
        2,
        4,
        "--guidance",
        1,
        3,
        "--repeats",
        2,
        "--batch-size",
        2,
    ]
    words += ["--beside", "helpers.small_tokenizers:janus", "helpers.small_tokenizers:chameleon"]
    rows = run(scripts("decode_speed"), tmp_path / "out", *words)["rows"]
    assert len(rows) == 4 * 2 + 1  # chameleon has no decoder
    assert rows[-1]["name"] == "janus"
    assert rows[-1]["tokens_per_image"] == 4
    flops = {
        (r["name"].split(",")[0], r.get("steps"), r.get("guidance")): r["gflops_per_image"]
        for r in rows[:-1]
    }
    bare, ours = "bare U-Net loop", "lavit-tok"
    assert flops[bare, 4, 1.0] == pytest.approx(2 * flops[bare, 2, 1.0])  # twice the steps
    assert flops[bare, 2, 3.0] == pytest.approx(
        2 * flops[bare, 2, 1.0]
    )  # both halves of the guidance
    vae = (
        flops[ours, 2, 1.0] - flops[bare, 2, 1.0]
    )  # condition and VAE, whatever the number of steps
    assert vae > 0
    assert flops[ours, 4, 1.0] - flops[bare, 4, 1.0] == pytest.approx(vae)


def test_the_bare_loop_calls_the_u_net_as_the_pipeline_does(
    scripts: Any, tiny_decoder: Any
) -> None:
    script, seen = scripts("decode_speed"), []
    tiny_decoder.set_progress_bar_config(disable=True)
    codes = script.random_codes(tiny_decoder, 2, 0.5)
    assert codes.lengths.tolist() == [8, 8]
    handle = tiny_decoder.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (float(kwargs["timestep"]), tuple(kwargs["sample"].shape))
        ),
        with_kwargs=True,
    )
    script.bare_loop(tiny_decoder, codes, 3, guided=True)()
    bare = list(seen)
    seen.clear()
    script.drawing(tiny_decoder, codes, 3, 2.0)()
    handle.remove()
    assert bare == seen
    assert len(seen) == 3


@pytest.mark.parametrize("stretch", ["sampled", "quantised"])
def test_training_beside_the_bare_modules(
    stretch: str,
    scripts: Any,
    tmp_path: Path,
    tiny_tokenizer: VisualTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = scripts("train_speed")
    monkeypatch.setattr(script, "STRETCHES", (stretch,))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [
        "--tokenizer",
        tmp_path / "tokenizer",
        "--cases",
        "shipped",
        "--batch-size",
        4,
        "--steps",
        2,
        "--warm",
        1,
    ]
    (row,) = run(script, tmp_path / "out", *words)["rows"]
    assert row["steps"] == 2
    assert row["kept_share"] == pytest.approx(1 / 3, abs=0.15)
    assert row["bare_gflops_per_image"] > 0
    assert row["images_per_second"]["bare"] == pytest.approx(4 / row["seconds"]["bare"])
    frozen = sum(p.numel() for p in tiny_tokenizer.encoder.parameters())
    total = sum(p.numel() for p in tiny_tokenizer.parameters())
    assert row["parameters"] == {"trained": total - frozen, "frozen": frozen}


def test_the_bare_step_trains_what_lightning_trains(
    scripts: Any, tiny_tokenizer: VisualTokenizer
) -> None:
    """All but the selector, whose gradient only the sampled policy has; the encoder stays as it is."""
    script = scripts("train_speed")
    images = script.images(32, 4, 1)[0]["images"]
    for stretch in script.STRETCHES:
        bare = script.Bare(tiny_tokenizer, stretch, "cpu", 1.0)
        before = {n: p.clone() for n, p in bare.tokenizer.named_parameters()}
        losses = [bare.step(images) for _ in range(8)]
        moved = {
            n.split(".")[0]
            for n, p in bare.tokenizer.named_parameters()
            if not torch.equal(p, before[n])
        }
        assert moved == {"merger", "quantizer", "reconstructor"}
        assert losses[-1] < losses[0]


def test_rows_are_compared_to_the_row_they_name(scripts: Any) -> None:
    speeds = scripts("speeds")
    a, b = torch.zeros(64, 64), torch.zeros(64, 128)
    entries = [
        speeds.Entry("small", "none", 2, lambda: a @ a, lambda: a @ a, 10),
        speeds.Entry(
            "large", "none", 2, lambda: a @ b, lambda: a @ b, 20, tokens=3.0, bits=6.0, beside=0
        ),
    ]
    small, large = speeds.side_by_side(entries, 2, "cpu")
    assert "time_ratio" not in small
    assert (large["flop_ratio"], large["beside"]) == (2, "small")
    assert large["gflops_per_image"] == pytest.approx(2 * 64 * 64 * 128 / 1e9)
    assert large["images_per_second"] == pytest.approx(2 / large["seconds"])
    assert "| large" in speeds.table([small, large])
