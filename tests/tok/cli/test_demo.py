"""`lavit-tok demo`: what the page shows, and the page itself in a browser where there is one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lavit_lm.cli.demo import GenerateTab
from lavit_tok import VisualTokenizer
from lavit_tok.cli.demo import AUTOMATIC, BUDGET, GROUP, QUALITY, Checkpoint, psnr
from lavit_tok.cli.parser import main
from lavit_tok.visualize import thumbnail, thumbnail_bits

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkpoint(tiny_tokenizer: VisualTokenizer, tiny_decoder: Any) -> Checkpoint:
    tiny_decoder.set_progress_bar_config(disable=True)
    return Checkpoint("tiny", tiny_tokenizer, tiny_decoder)


def test_reconstruction(checkpoint: Checkpoint, photos: list[Path]) -> None:
    result = checkpoint.reconstruct(photos[0], steps=2)
    codes = checkpoint.tokenizer.encode(photos[0])
    assert result.codes == codes[0].tolist()
    assert result.kept is not None
    assert {x.size for x in (result.kept, result.decoded, result.thumbnail)} == {(256, 256)}
    assert f"{len(result.codes)} of 16 codes, {4 * len(result.codes)} bits" in result.summary
    # The dropped patches of 64 x 64 pixels are darker.
    brightness = np.asarray(result.kept, float).mean(2).reshape(4, 64, 4, 64).mean((1, 3)).ravel()
    everything = checkpoint.reconstruct(photos[0], BUDGET, 16, steps=1).kept
    whole = np.asarray(everything, float).mean(2).reshape(4, 64, 4, 64).mean((1, 3)).ravel()
    assert codes.keep is not None
    assert (brightness == whole).tolist() == codes.keep[0].tolist()


def test_number_of_codes_guidance_and_seed(checkpoint: Checkpoint, photos: list[Path]) -> None:
    def decoded(**options: Any) -> bytes:
        result = checkpoint.reconstruct(photos[0], BUDGET, 5, steps=2, **options)
        assert len(result.codes) == 5
        return result.decoded.tobytes()

    assert decoded() == decoded() != decoded(seed=1)
    assert decoded() != decoded(guidance=1.0)


def test_quality_only_with_a_tokenizer_that_predicts_it(
    checkpoint: Checkpoint, photos: list[Path]
) -> None:
    assert checkpoint.modes == [AUTOMATIC, BUDGET]
    with pytest.raises(ValueError, match="mode: expected one of"):
        checkpoint.reconstruct(photos[0], QUALITY)
    with pytest.raises(ValueError, match="expected an image, got none"):
        checkpoint.reconstruct(None)
    predicting = Checkpoint.load("default", "default")
    assert predicting.modes == [AUTOMATIC, BUDGET, QUALITY]
    result = predicting.reconstruct(photos[0], QUALITY, quality=0.7)
    assert result.codes == predicting.tokenizer.encode(photos[0], quality=0.7)[0].tolist()
    assert result.kept is None, "nested codes drop no patches"


def test_thumbnails_use_the_bits_and_improve_with_them(photos: list[Path]) -> None:
    image = Image.open(photos[0]).convert("RGB").resize((64, 64))
    assert thumbnail_bits(7) == pytest.approx(49 * 4 + 18 * np.log2(5))
    quality = [psnr(thumbnail(image, bits), image) for bits in (0, 60, 240, 4000, 1e9)]
    assert quality == sorted(quality) and quality[-1] > 25
    # One pixel: one color everywhere. Gray stays gray.
    assert len(thumbnail(image, 9).getcolors() or ()) == 1
    gray = thumbnail(image.convert("L").convert("RGB"), 240)
    assert np.ptp(np.asarray(gray, int), axis=2).max() <= 1
    assert thumbnail(image, thumbnail_bits(7)) == thumbnail(image, thumbnail_bits(8) - 0.1)
    assert thumbnail(image, thumbnail_bits(7)) != thumbnail(image, thumbnail_bits(8))


def test_generate_tab() -> None:
    """With the shipped models: images with captions, and bad prompts refused."""
    from lavit_lm import MultimodalLM

    tab = GenerateTab(MultimodalLM.from_pretrained("default"))
    (first, text), _ = tab.generate("a red bag", 2, steps=1)
    assert first.size == (128, 128) and text == tab.caption(first) != ""
    with pytest.raises(ValueError, match="expected an image"):
        tab.caption(None)
    with pytest.raises(ValueError, match="prompt"):
        tab.generate("  ")


def test_the_tab_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in project["entry-points"][GROUP].values():
        assert callable(resolve_name(name))


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_message_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo"]) == 2
    assert "pip install 'lavit-tok[demo]'" in capsys.readouterr().err


@pytest.fixture
def chromium() -> str:
    """Path of the browser; skips without it, or without what drives it."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine (Debian package chromium)")
    return path


@pytest.fixture
def address(chromium: str, checkpoint: Checkpoint, tmp_path: Path) -> Iterator[str]:
    """Address of the page, served by the command in another process, with the tiny models."""
    checkpoint.tokenizer.save_pretrained(tmp_path / "tokenizer")
    checkpoint.decoder.save_pretrained(tmp_path / "decoder")
    models = [str(tmp_path / "tokenizer"), str(tmp_path / "decoder")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--tokenizer", models[0], "--decoder", models[1], "--compare", *models]
    command = [sys.executable, "-m", "lavit_tok.cli", "demo", *options, "--port", port]
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(url, timeout=10).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def test_in_a_browser(chromium: str, address: str, photos: list[Path]) -> None:
    """Upload, slider, a prompt, two checkpoints; nothing is loaded from another server."""
    from playwright.sync_api import sync_playwright

    foreign: list[str] = []

    def record(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            foreign.append(request.url)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.on("request", record)
        page.goto(address, wait_until="domcontentloaded")
        # Upload: the image appears with its kept patches, and again, decoded.
        page.locator("input[type=file]").first.set_input_files(photos[0])
        decoded = page.get_by_alt_text("Decoded").first
        decoded.wait_for()
        before = decoded.get_attribute("src")
        # Slider: another number of codes, and another image.
        page.get_by_label("budget", exact=True).check()
        page.get_by_text("4 of 16 codes, 16 bits").wait_for()
        slider = page.get_by_label("range slider for Budget (codes)")
        slider.click(position={"x": slider.bounding_box()["width"] - 2, "y": 1})
        page.get_by_text("16 of 16 codes, 64 bits").wait_for()
        assert decoded.get_attribute("src") != before
        assert decoded.evaluate("image => image.naturalWidth") == 256
        # The tab of lavit_lm, which is found if the package is installed and not only on the path.
        if entry_points(group=GROUP):
            page.get_by_role("tab", name="Generate").click()
            page.get_by_label("number input for Denoising steps").nth(1).fill("1")
            page.get_by_role("button", name="Generate", exact=True).click()
            page.locator(".grid-container img").nth(3).wait_for()
        page.get_by_role("tab", name="Compare").click()
        page.locator("input[type=file]").last.set_input_files(photos[1])
        page.get_by_role("button", name="Compare", exact=True).click()
        page.locator("div.tabitem:visible").get_by_text("of 16 codes").nth(1).wait_for()
        browser.close()
    assert not foreign
