"""Weights on disk: differences from the model are listed; nothing in a directory is executed."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavit_tok import ConfigError, VisualTokenizer, WeightsError
from lavit_tok.checkpoints import weights
from lavit_tok.checkpoints.weights import (
    compare,
    find_directory,
    load_weights,
    read_json,
    save_weights,
    weight_files,
)


class Malicious:
    """A pickle attack: unpickling it writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.proof), "w")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor([4, 5]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "net"
    folder.mkdir()
    save_weights(Net(), folder)
    return folder


def test_round_trip(saved: Path):
    one, two = Net(), Net()
    save_weights(one, saved)
    load_weights(two, saved)
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted(saved: Path, dtype: torch.dtype):
    one, two = Net(), Net()
    save_weights(one, saved, dtype)
    with safe_open(saved / "model.safetensors", "pt") as opened:
        assert {opened.get_tensor(k).dtype for k in opened.keys()} == {dtype, torch.int64}  # noqa: SIM118
    load_weights(two, saved)
    assert two.linear.weight.dtype == torch.float32
    assert torch.equal(two.linear.weight, one.linear.weight.to(dtype).float())
    half = Net().half()
    load_weights(half, saved)
    assert half.linear.weight.dtype == torch.float16 and half.count.tolist() == [4, 5]


def test_shards(saved: Path):
    one, two = Net(), Net()
    save_weights(one, saved, max_shard_size=20)
    assert len(weight_files(saved)) > 1 and not (saved / "model.safetensors").exists()
    load_weights(two, saved)
    assert torch.equal(one.linear.weight, two.linear.weight)
    one.linear.weight.data += (
        1  # a later save leaves nothing of an earlier one to be read by mistake
    )
    for size in ("5GB", 20, 30):
        save_weights(one, saved, max_shard_size=size)
        load_weights(two, saved)
        assert torch.equal(one.linear.weight, two.linear.weight)
        assert len(list(saved.glob("*.safetensors"))) == len(weight_files(saved))


def test_every_difference_is_listed(saved: Path):
    def change(state: dict[str, Tensor]) -> None:
        del state["linear.bias"]
        state["linear.weight"] = torch.zeros(3, 2)
        state["extra"] = torch.zeros(1)

    rewrite(saved / "model.safetensors", change)
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(net, saved)
    assert str(caught.value).splitlines()[1:] == [
        "unexpected  extra [1]",
        "missing     linear.bias [2]",
        "mis-shaped  linear.weight: expected [2, 3], got [3, 2]",
    ]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), (
        "nothing half loaded"
    )
    assert compare({"a": (1,)}, {"a": (1,)}) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("linear.bias", torch.tensor([0.0, float("nan")]), "holds NaN or infinity"),
        ("linear.bias", torch.tensor([0.0, float("inf")]), "holds NaN or infinity"),
        ("linear.bias", torch.tensor([0.0, 1e300], dtype=torch.float64), "holds NaN or infinity"),
        ("linear.bias", torch.tensor([0, 1]), "expected torch.float32, got torch.int64"),
        ("linear.bias", torch.tensor([True, False]), "expected torch.float32, got torch.bool"),
        ("count", torch.tensor([0.5, 1.0]), "expected torch.int64, got torch.float32"),
    ],
)
def test_values_that_cannot_be_weights(saved: Path, name: str, value: Tensor, message: str):
    rewrite(saved / "model.safetensors", lambda state: state.update({name: value}))
    with pytest.raises(WeightsError, match=f"{re.escape(name)}.*{message}"):
        load_weights(Net(), saved)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path):
    net = Net()
    net.linear.weight.data[0, 0] = 1e6  # finite, but not in float16
    with pytest.raises(WeightsError, match=r"linear\.weight"):
        save_weights(net, tmp_path, torch.float16)
    assert not list(tmp_path.iterdir())
    save_weights(net, tmp_path)
    net.linear.bias.data[0] = float("nan")
    with pytest.raises(WeightsError, match=r"linear\.bias"):
        save_weights(net, tmp_path)


@pytest.mark.parametrize("size", [0, 4, 50, 0.5, 0.99])
def test_truncated_files(saved: Path, size: float):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(size * len(whole)) if isinstance(size, float) else size])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a complete safetensors file"):
        load_weights(Net(), saved)


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "absent", "..", ""]
)
def test_an_index_may_name_only_files_beside_it(saved: Path, shard: str):
    (saved / "model.safetensors").rename(saved.parent / "elsewhere.safetensors")
    (saved / "sub").mkdir()
    (saved / "sub" / "x.safetensors").write_bytes(
        (saved.parent / "elsewhere.safetensors").read_bytes()
    )
    (saved / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"linear.weight": shard}})
    )
    with pytest.raises(WeightsError, match=r"index\.json: expected shards in the same directory"):
        load_weights(Net(), saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {}}',
        "[" * 99_999,
    ],
)
def test_a_broken_index(saved: Path, text: str):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json: "):
        load_weights(Net(), saved)


def test_a_tensor_in_two_shards(saved: Path):
    state = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    save_file(state, saved / "a.safetensors")
    save_file({"linear.bias": torch.ones(2)}, saved / "b.safetensors")
    index = {
        "weight_map": {**dict.fromkeys(state, "a.safetensors"), "linear.bias": "b.safetensors"}
    }
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"twice +linear\.bias, again in b\.safetensors"):
        load_weights(Net(), saved)


def test_a_pickle_is_never_run(tiny_tokenizer: VisualTokenizer, tmp_path: Path):
    """The same attack under every name that other loaders open; first, that it works."""
    proof = tmp_path / "proof"
    attack = pickle.dumps({"selector.judge.0.weight": Malicious(proof)})
    pickle.loads(attack)
    assert proof.exists(), "this pickle does create a file when it is loaded"
    proof.unlink()
    torch.save({"weight": Malicious(proof)}, tmp_path / "zipped.bin")
    torch.load(tmp_path / "zipped.bin", weights_only=False)
    assert proof.exists()
    proof.unlink()

    folder = tmp_path / "model"
    tiny_tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    for content in (attack, (tmp_path / "zipped.bin").read_bytes()):
        for name in (
            "pytorch_model.bin",
            "model.pt",
            "model.safetensors",
            "tf_model.h5",
            "modeling.py",
        ):
            (folder / name).write_bytes(content)
            with pytest.raises(WeightsError):
                VisualTokenizer.from_pretrained(folder)
            (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
        index = {"weight_map": {"selector.judge.0.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(
            WeightsError, match=r"pytorch_model\.bin: not a complete safetensors file"
        ):
            VisualTokenizer.from_pretrained(folder)
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin").unlink()
    assert not proof.exists()


def test_only_a_pickle_beside_the_config(tiny_tokenizer: VisualTokenizer, tmp_path: Path):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"expected model\.safetensors or model\.safetensors\.index"
    ):
        VisualTokenizer.from_pretrained(tmp_path)


def test_a_config_cannot_choose_code(tiny_tokenizer: VisualTokenizer, tmp_path: Path):
    tiny_tokenizer.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    (tmp_path / "modeling.py").write_text("raise SystemExit('this ran')")
    for change in (
        {"auto_map": {"AutoModel": "modeling.Model"}},
        {"_target_": "os.system"},
        {"encoder": {**config["encoder"], "auto_map": {"AutoModel": "modeling.Model"}}},
        {"encoder": {**config["encoder"], "attn_implementation": "someone/kernel"}},
        {"encoder": {**config["encoder"], "model_type": "modeling"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises((ConfigError, WeightsError)):
            VisualTokenizer.from_pretrained(tmp_path)


def test_a_config_of_another_size_lists_the_differences(
    tiny_tokenizer: VisualTokenizer, tmp_path: Path
):
    tiny_tokenizer.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "merger_depth": 3, "codebook_size": 17})
    )
    with pytest.raises(WeightsError) as caught:
        VisualTokenizer.from_pretrained(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert "mis-shaped  quantizer.codebook.embeddings: expected [17, 4], got [16, 4]" in lines
    missing = [line for line in lines if line.startswith("missing     merger.blocks.2.")]
    assert missing and len(missing) == len(lines) - 1


@pytest.mark.parametrize(
    "name",
    [
        "nonexistent",
        "./nonexistent",
        "../nonexistent",
        "/nonexistent",
        "a/b/c",
        "a/",
        "~/model",
        "a b/c",
        "a/b\n",
    ],
)
def test_names_that_no_hub_could_have_cause_no_traffic(name: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(weights, "snapshot_download", lambda *args, **kwargs: asked.append(args[0]))
    with pytest.raises(
        WeightsError,
        match="expected 'default', 'selected', an existing directory or a Hub id owner/name",
    ):
        VisualTokenizer.from_pretrained(name)
    assert not asked


def test_a_hub_name_that_cannot_be_had(tmp_path: Path):
    with pytest.raises(
        WeightsError, match="someone/nothing: no such directory, and the Hub gave none"
    ):
        find_directory("someone/nothing", "tokenizer", local_files_only=True, cache_dir=tmp_path)


def test_from_the_hub_only_safetensors_and_json_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(weights, "snapshot_download", download)
    assert find_directory("owner/name", "tokenizer", revision="abc") == tmp_path
    assert asked == {
        "name": "owner/name",
        "allow_patterns": ["*.json", "*.safetensors"],
        "revision": "abc",
    }


def test_a_file_is_no_directory(saved: Path):
    with pytest.raises(WeightsError, match="an existing directory"):
        VisualTokenizer.from_pretrained(saved / "model.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json"):
        VisualTokenizer.from_pretrained(saved)
