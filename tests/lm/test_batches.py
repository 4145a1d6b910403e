"""Jobs of many prompts or images: the same results in any batches, resumed, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lm_parts import processor_and_model
from PIL import Image

from lavit_lm import MultimodalLM
from lavit_lm.cli import main
from lavit_tok import VisualTokenizer
from lavit_tok.data.code_files import CodeRecord, read_codes

PROMPTS = ["a red apple", "rain", "two dogs run", "the old town hall", "a red", "apple at sunset"]


@pytest.fixture
def model(tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> str:
    tiny_tokenizer.save_pretrained(tmp_path / "visual")
    processor, model = processor_and_model("llama")
    lm = MultimodalLM(model, processor, tiny_tokenizer)
    lm.save_pretrained(tmp_path / "lm", str(tmp_path / "visual"))
    return str(tmp_path / "lm")


def results(folder: Path) -> dict[str, Any]:
    """Result lines by key, without the names of images."""
    lines = [line for path in sorted(folder.glob("0*.jsonl")) for line in path.open()]
    found = [json.loads(line) for line in lines]
    return {r["key"]: {k: v for k, v in r.items() if k != "image"} for r in found if "key" in r}


def prompt_file(path: Path, order: int = 1) -> str:
    lines = [json.dumps({"key": f"k{i}", "prompt": p}) for i, p in enumerate(PROMPTS)]
    bad = [json.dumps({"key": "long", "prompt": "rain " * 99}), '{"key": "none"}', "no JSON"]
    path.write_text("\n".join([lines[0], *bad, "", *lines[1:]][::order]))
    return str(path)


def test_prompts_in_any_batches(model: str, tmp_path: Path, capsys: Any):
    """One by one, in batches, in another order; stopped, resumed and with other options."""
    prompts = prompt_file(tmp_path / "prompts.jsonl")

    def generate(out: str, *more: str, prompts: str = prompts) -> int:
        options = ["--model", model, "--codes-only", "-n", "2", "--out", str(tmp_path / out)]
        return main(["generate", "--prompts", prompts, *options, *more])

    assert generate("one", "--batch-size", "1") == 0
    assert "generated 12 images in" in capsys.readouterr().err
    batches = "--batch-size", "6", "--block-size", "4"
    assert generate("many", *batches) == 0
    assert "generated 12 images" in (err := capsys.readouterr().err) and "3 skipped" in err
    back = prompt_file(tmp_path / "back.jsonl", -1)
    assert generate("back", *batches, "--split", "x", prompts=back) == 0
    whole = results(tmp_path / "many")
    assert whole == results(tmp_path / "one") == results(tmp_path / "back")
    assert sorted(whole) == sorted(f"k{i}-{n}" for i in range(6) for n in range(2))
    assert whole["k0-0"]["codes"] != whole["k0-1"]["codes"]
    rejects = (tmp_path / "many" / "rejects.jsonl").read_text()
    reasons = {r["key"]: r["reason"] for r in map(json.loads, rejects.splitlines())}
    assert "exceed the model's context" in reasons["long"] and "got None" in reasons["none"]
    assert reasons["3"] == "expected a prompt that is a text, got None"
    header, records = read_codes(tmp_path / "many" / "000000.jsonl")
    (first, *_) = records
    assert isinstance(first, CodeRecord) and first.codes == whole["k0-0"]["codes"]
    assert header.codebook_size == 16

    files = {path: path.read_bytes() for path in (tmp_path / "many").glob("*.jsonl")}
    for path in files:
        if path.name in ("000001.jsonl", "rejects.jsonl"):
            path.unlink()
    kept = (tmp_path / "many" / "000000.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert generate("many", *batches) == 0 and "12 images" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == files
    assert (tmp_path / "many" / "000000.jsonl").stat().st_mtime_ns == kept
    assert generate("many", *batches, "--seed", "1") == 2
    assert "000000.jsonl: was made with other values of options" in capsys.readouterr().err
    assert generate("many", *batches, prompts=back) == 2
    assert "other values of items" in capsys.readouterr().err


def test_images_of_prompts(model: str, tiny_decoder: Any, tmp_path: Path):
    """Noise depends on the key, too; parquet with numbers as keys."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny_decoder.save_pretrained(tmp_path / "decoder")
    pq.write_table(pa.table({"prompt": PROMPTS[:3]}), tmp_path / "prompts.parquet")
    command = ["generate", "--prompts", str(tmp_path / "prompts.parquet"), "--model", model]
    command += ["--decoder", str(tmp_path / "decoder"), "--steps", "2", "-n", "1"]
    sheets = []
    for size in ("1", "3"):
        out = tmp_path / size
        assert main([*command, "--out", str(out), "--batch-size", size]) == 0
        lines = [json.loads(line) for line in (out / "000000.jsonl").open()][1:]
        assert [line["key"] for line in lines] == ["0", "1", "2"]
        sheets.append(np.stack([np.asarray(Image.open(out / line["image"])) for line in lines]))
    assert np.abs(sheets[0].astype(int) - sheets[1]).max() <= 1
    assert (sheets[0][0] != sheets[0][1]).any()


@pytest.mark.filterwarnings("ignore")
def test_prompts_on_ray(
    model: str,
    tiny_decoder: Any,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    """The files of the local engine, skipped prompts and images included; resumed by either."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'lavit-tok[ray]')")
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    tiny_decoder.save_pretrained(tmp_path / "decoder")
    prompts = prompt_file(tmp_path / "prompts.jsonl")
    command = ["generate", "--prompts", prompts, "--model", model, "-n", "2", "--steps", "1"]
    command += ["--decoder", str(tmp_path / "decoder"), "--batch-size", "4", "--block-size", "3"]
    on_ray = ["--engine", "ray", "--workers", "2"]
    # Workers have one thread; with another number convolutions round otherwise.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)

    def files(folder: str) -> dict[str, bytes]:
        paths = (path for path in (tmp_path / folder).rglob("[!.]*") if path.is_file())
        return {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in paths}

    assert main([*command, "--out", str(tmp_path / "local")]) == 0
    whole = files("local")
    assert len(whole) == 3 + 1 + 12  # blocks, rejects, images
    out = ["--out", str(tmp_path / "ray")]
    assert main([*command, *out, *on_ray]) == 0
    assert "generated 12 images" in (err := capsys.readouterr().err) and "3 skipped" in err
    assert files("ray") == whole
    (tmp_path / "ray" / "000001.jsonl").unlink()
    assert main([*command, *out]) == 0 and files("ray") == whole
    assert main([*command, *out, *on_ray]) == 0 and files("ray") == whole  # nothing is missing
    assert main(["generate", "rain", *out, *on_ray]) == 2
    assert "--engine ray: expected --prompts" in capsys.readouterr().err


def test_captions_of_images_and_shards(model: str, folder: Path, tmp_path: Path, capsys: Any):
    """Codes of shards give the captions of their images; answers are computed in batches, too."""
    images = folder / "pictures" / "validation"
    (images / "bad.png").write_bytes(b"none")
    model = str(tmp_path / "lm")
    command = ["caption", "--model", model, "--max-new-tokens", "4", "--block-size", "4"]
    for out, source, size in (
        ("one", images, "1"),
        ("many", images, "5"),
        ("codes", folder / "shards", "5"),
    ):
        options = ["--out", str(tmp_path / out), "--batch-size", size, "--split", "validation"]
        assert main([*command, str(source), *options]) == 0
    assert "captioned 6 images" in (err := capsys.readouterr().err) and "1 skipped" in err
    texts = {Path(key).name: r["text"] for key, r in results(tmp_path / "many").items()}
    assert len(texts) == 6
    assert results(tmp_path / "many") == results(tmp_path / "one")
    of_codes = {Path(key).name: r["text"] for key, r in results(tmp_path / "codes").items()}
    assert of_codes == texts
    question = [*command, str(images), "--question", "what is it?", "--out", str(tmp_path / "q")]
    assert main(question) == 0 and len(results(tmp_path / "q")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either a prompt or --prompts"),
        (["rain", "--prompts", "p.jsonl"], "expected either a prompt or --prompts"),
        (["--prompts", "p.txt"], "p.txt: expected a .jsonl or .parquet file, or a folder"),
        (["--prompts", "p.jsonl"], "No such file or directory: 'p.jsonl'"),
        (["--prompts", "p.jsonl", "--temperature", "nan"], "temperature: expected"),
    ],
)
def test_jobs_that_cannot_start(
    arguments: list[str], message: str, model: str, tmp_path: Path, capsys: Any
):
    out = ["--out", str(tmp_path / "out"), "--model", model, "--codes-only"]
    assert main(["generate", *arguments, *out]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / ".lock").unlink(missing_ok=True)
    (tmp_path / "out" / "notes").write_text("mine")
    assert main(["generate", "--prompts", prompt_file(tmp_path / "p.jsonl"), *out]) == 2
    assert "out: expected a new or empty folder" in capsys.readouterr().err
