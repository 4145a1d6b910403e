"""The best of several generated images as documents: which is kept, and training on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_parts import processor_and_model
from helpers.lm_runs import small_run
from helpers.trainers import two_steps

from benchmarks.shared.provenance import recipe
from lavit_lm import MultimodalLM
from lavit_lm.cli import main
from lavit_lm.cli.batches import item_generator
from lavit_tok import VisualCodes, VisualTokenizer

OPTIONS = {"temperature": 1.0, "guidance_scale": 2.0}


def test_the_best_candidate_is_kept(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any):
    best_of = recipe("lm/best_of.py")
    processor, model = processor_and_model()
    lm = MultimodalLM(model, processor, tiny_tokenizer, tiny_decoder)
    pairs = [("one", "a red apple"), ("two", "rain")]
    together = best_of.best(lm, pairs, 3, 0, **OPTIONS)
    assert together == [best_of.best(lm, [pair], 3, 0, **OPTIONS)[0] for pair in pairs]
    kept = set()
    for document, (key, caption) in zip(together, pairs, strict=True):
        text, image = document["segments"]
        assert document["key"] == f"best/{key}" and text == {"text": caption, "target": False}
        assert image["fingerprint"] == tiny_tokenizer.fingerprint()
        nats, codes = [], []
        for i in range(3):
            draw = item_generator(0, key, i)
            codes.append(lm.generate_codes_batch([caption], generator=[draw], **OPTIONS))
            noise = item_generator(0, f"{key} noise", i)
            (shown,) = lm.decode_images(codes[-1], [noise])
            nats.append(float(lm.score([[shown]], [caption])))
        at = int(torch.tensor(nats).argmax())
        assert image["codes"] == codes[at][0].tolist()
        kept.add(at)
    assert kept != {0}, "else the first would do"


def test_a_stopped_run_goes_on_and_is_trained_on(folder: Path, tiny_decoder: Any):
    best_of = recipe("lm/best_of.py")
    processor, model = processor_and_model()
    visual = VisualTokenizer.from_pretrained(folder / "visual")
    lm = MultimodalLM(model, processor, visual)
    lm.save_pretrained(folder / "small", str(folder / "visual"))
    tiny_decoder.save_pretrained(folder / "decoder")
    args = ["--model", str(folder / "small"), "--decoder", str(folder / "decoder")]
    args += ["--data", str(folder / "pictures"), "--captions", "5", "--candidates", "2", "--out"]
    best_of.main([*args, str(whole := folder / "whole.jsonl")])
    lines = whole.read_text().splitlines()
    assert len(lines) == 5
    begun = "".join(f"{line}\n" for line in lines[:2]) + lines[2][:40]  # stopped while it wrote
    (stopped := folder / "stopped.jsonl").write_text(begun)
    best_of.main([*args, str(stopped)])
    assert stopped.read_text() == whole.read_text()
    parts = []
    for part in ("0", "1"):
        best_of.main([*args, str(folder / part), "--part", part, "2"])
        parts += (folder / part).read_text().splitlines()
    assert sorted(parts) == sorted(lines)
    for wrong in (["--part", "2", "2"], ["--part", "0", "0"], ["--candidates", "0"]):
        with pytest.raises(SystemExit):
            best_of.main([*args, str(folder / "wrong"), *wrong])
    with pytest.raises(ValueError, match=r"--captions: expected 1 to 24, got 25"):
        best_of.main([*args, str(folder / "wrong"), "--captions", "25"])
    sources = [
        {"documents": str(whole), "weight": 4},
        {"shards": str(folder / "shards"), "images": str(folder / "pictures"), "weight": 1},
    ]
    recipe_file = Path(__file__).parents[2] / "recipes/lm/best-of.yaml"
    more = {"model.objective.init_args.nested_vectors": 4, "data.block": 96}
    assert main(["fit", *two_steps(recipe_file, small_run(folder, sources, **more))]) == 0
    trained = MultimodalLM.from_pretrained(folder / "made", decoder=None)
    codes = json.loads(lines[0])["segments"][1]["codes"]
    text = VisualCodes.from_list([torch.tensor(codes)], codebook_size=16)
    assert trained.score([["a"]], [text]).isfinite().all()
