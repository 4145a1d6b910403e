"""Files appear when they are complete, or not at all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from helpers.files import limited
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from lavit_tok import ImageError, VisualTokenizer
from lavit_tok.checkpoints.files import atomic_files, exclusive_folder
from lavit_tok.checkpoints.weights import load_weights, save_weights
from lavit_tok.encode.image_files import open_image


def test_a_full_disk_leaves_the_model_before(
    tiny_tokenizer: VisualTokenizer, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    tiny_tokenizer.quantizer.codebook.embeddings.neg_()
    with (
        limited(resource.RLIMIT_FSIZE, 2000),
        pytest.raises(OSError, match=r"/model.*: not written: .*File too large"),
    ):
        tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    killed = tmp_path / ".new.999999999.part/part"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").touch()
    (tmp_path / "other").touch()
    with atomic_files(tmp_path) as folder:
        (folder / "part").mkdir()
        (folder / "part/config.json").write_text("{}")
        assert sorted(os.listdir(tmp_path)) == [folder.name, "other"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == [tmp_path / "other", tmp_path / "part/config.json"]


def test_weights_as_one_file_or_as_shards_replace_each_other(tmp_path: Path) -> None:
    """A single file would be read in place of newer shards."""
    model, other = nn.Linear(4, 4), tmp_path / "other.safetensors"
    for size, count in (("5GB", 2), (40, 4), ("5GB", 2)):
        nn.init.normal_(model.weight)
        with atomic_files(tmp_path) as folder:
            save_weights(model, folder, max_shard_size=size)
        other.touch()
        assert len(os.listdir(tmp_path)) == count
        load_weights(found := nn.Linear(4, 4), tmp_path)
        assert torch.equal(found.weight, model.weight)


def test_a_model_card_is_kept(tiny_tokenizer: VisualTokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "lavit-tok" and "image-tokenizer" in card.data.tags
    (tmp_path / "README.md").write_text("mine")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("folder", ["lavit_tok/default", "lavit_tok/selected", "lavit_lm/default"])
def test_shipped_cards_have_metadata(folder: str) -> None:
    card = ModelCard.load(Path(__file__).parents[3] / folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.tags and card.text.startswith("# ")


def test_a_model_is_loaded_beside_the_partial_folder_of_a_killed_process(
    tiny_tokenizer: VisualTokenizer, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    (partial := tmp_path / ".new.999999999.part").mkdir()
    (partial / "config.json").write_text('{"auto')
    loaded = VisualTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint() == tiny_tokenizer.fingerprint()
    with exclusive_folder(tmp_path):
        assert not partial.exists()


def test_an_image_is_not_unreadable_because_too_many_files_are_open(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path := tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    os.close(next_handle := os.open(os.devnull, os.O_RDONLY))
    with (
        limited(resource.RLIMIT_NOFILE, next_handle),
        pytest.raises(OSError, match="Too many open"),
    ):
        open_image(path)
    assert open_image(path).size == (8, 8)
    with pytest.raises(ImageError, match="not an image"):
        open_image(tmp_path / "bad.png")
