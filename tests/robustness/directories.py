"""Tampered directories of weights: refused with one message, or equal results; nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from robustness.process import Done, Outcome
from robustness.small import JOBS, Workshop, damaged, files

LIMIT_S, LIMIT_MB = 10.0, 1024.0
TARGETS = ("tokenizer", "lm", "decoder")
CANARY = "it-ran"
EVIL = f"import pathlib\npathlib.Path(__file__).with_name('{CANARY}').touch()\nclass Evil: pass\n"
HOSTILE: list[Any] = [float("nan"), float("inf"), -float("inf"), -1, 0, 10**7, 10**10, 10**30]
HOSTILE += [1e300, "", "x" * 10**6, "../../../etc/passwd", None, [], {}, [[]], True, [10**9] * 99]
TEXTS = [b"", b"null", b"[]", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 10**5, b'{"a":' * 10**5]
AUTO_MAP = {f"Auto{name}": "evil.Evil" for name in ("Config", "Model", "ModelForCausalLM")}
AUTO_MAP |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
FOREIGN: list[dict[str, Any]] = [
    {"auto_map": AUTO_MAP, "tokenizer_class": "Evil"},
    {"custom_generate": "evil", "trust_remote_code": True},
    {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"},
    {"quantization_config": {"quant_method": "evil"}},
    {"_class_name": "Evil", "_diffusers_version": "evil"},
    {"visual_tokenizer": "evil/evil"},
]
SIZES = ("depth", "layers", "size", "channels", "layers_per_block", "timesteps", "positions")


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def trial(work: Workshop, number: int, target: str = "", kind: str = "") -> Outcome:
    rng = np.random.default_rng((3, number))
    target, kind = target or TARGETS[number % 3], kind or [*DAMAGES][number // 3 % len(DAMAGES)]
    expected, directory = _expected(work, target), _copy(work, target)
    demand = DAMAGES[kind](directory, rng)
    done, results = _use(work, target, directory)
    failure, same = done.complaint, results == expected
    if (directory / CANARY).exists():
        failure = "ran code of the directory"
    elif done.seconds > LIMIT_S or done.mb > LIMIT_MB:
        failure = f"{done.seconds:.0f} s, {done.mb:.0f} MB"
    elif failure is None and done.code == 0 and demand in ("equal", "refuse")[same:]:
        failure = "was loaded" if same else "was loaded with other results"
    note = {0: "equal results" if same else "other results", 2: "refused"}.get(done.code, "failed")
    return Outcome(f"{target}: {kind}", failure, done.seconds, done.mb, note=note)


@cache
def _expected(work: Workshop, target: str) -> dict[str, bytes]:
    done, results = _use(work, target, _copy(work, target))
    assert done.code == 0, done.err
    return results


def _copy(work: Workshop, target: str) -> Path:
    shutil.rmtree(work.folder / "tampered", ignore_errors=True)
    return Path(shutil.copytree(getattr(work, target), work.folder / "tampered"))


def _use(work: Workshop, target: str, directory: Path) -> tuple[Done, dict[str, bytes]]:
    how: dict[str, Any] = {"watch": True, "limit_s": 2 * LIMIT_S}
    if target == "decoder":
        out, decoder = work.folder / "trial", work.decoder
        shutil.rmtree(out, ignore_errors=True)
        program, args = JOBS["decoded"](work, out)
        args = [directory if arg == decoder else arg for arg in args]
        return work.command(program, args, **how), files(out)
    one = work.images / "train/00.png"
    if target == "lm":
        done = work.command("lavit-lm", ["caption", one, "--model", directory], **how)
    else:
        done = work.command("lavit-tok", ["encode", one, "--tokenizer", directory], **how)
    return done, {"stdout": done.out.encode()}


def _pick(directory: Path, rng: np.random.Generator, suffix: str) -> Path:
    found = sorted(directory.rglob(f"*{suffix}"))
    return found[rng.integers(len(found))]


def _header(directory: Path, rng: np.random.Generator) -> str:
    path = _pick(directory, rng, ".safetensors")
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(end if rng.integers(4) else 8)] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return "equal"


def _tensors(directory: Path, rng: np.random.Generator, finite: bool = True) -> str:
    path = _pick(directory, rng, ".safetensors")
    tensors = load_file(path)
    name = sorted(name for name in tensors if tensors[name].dtype == np.float32)[0]
    value = tensors.pop(name)
    changes = [{}, {"extra": value}, {name: value[:0]}, {name: value[None]}]
    changes += [{name: value.astype(np.int32)}, {name: value, "extra": value}]
    if not finite:
        value.flat[rng.integers(value.size)] = rng.choice([np.nan, np.inf, -np.inf])
        changes = [{name: value}]
    save_file(tensors | changes[rng.integers(len(changes))], path, {"format": "pt"})
    return "refuse"


def _value(directory: Path, rng: np.random.Generator, how: str) -> str:
    path = _pick(directory, rng, "config.json")
    values = at = json.loads(path.read_text())
    while True:
        keys: list[Any] = [*at] if isinstance(at, dict) else [*range(len(at))]
        if how == "size":
            keys = [key for key in keys if str(key).endswith(SIZES)] or keys
        key = keys[rng.integers(len(keys))]
        if not isinstance(at[key], dict | list) or not at[key]:
            break
        at = at[key]
    if how == "missing":
        del at[key]
    else:
        at[key] = 10**7 if how == "size" else HOSTILE[rng.integers(len(HOSTILE))]
    path.write_text(json.dumps(values))
    return "anything" if how == "missing" else "equal"


def _text(directory: Path, rng: np.random.Generator, bits: bool) -> str:
    path = _pick(directory, rng, ".json")
    data = path.read_bytes()
    texts = [*TEXTS, data[: int(rng.integers(len(data)))]]
    path.write_bytes(damaged(data, rng) if bits else texts[rng.integers(len(texts))])
    return "anything" if bits else "equal"  # another number may be as good as the first


def _foreign(directory: Path, rng: np.random.Generator, model_type: bool) -> str:
    for name in ("evil.py", "generate.py", "custom_generate/generate.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(EVIL)
    path = _pick(directory, rng, "config.json")
    values = json.loads(path.read_text()) | FOREIGN[rng.integers(len(FOREIGN))]
    if model_type:
        path = sorted(directory.rglob("config.json"))[0]
        values = json.loads(path.read_text()) | FOREIGN[0] | {"model_type": "evil"}
    path.write_text(json.dumps(values))
    return "refuse" if model_type else "equal"


def _pickles(directory: Path, rng: np.random.Generator) -> str:
    path, bomb = _pick(directory, rng, ".safetensors"), pickle.dumps(Bomb(directory / CANARY))
    path.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", path.name):
        if name != path.name or rng.integers(2):
            path.with_name(name).write_bytes(bomb)
    return "refuse"


def _special(directory: Path, rng: np.random.Generator) -> str:
    path = _pick(directory, rng, (".json", ".safetensors")[rng.integers(2)])
    size = path.stat().st_size
    path.unlink()
    makers: list[Callable[[], object]] = [
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: (path.touch(), os.truncate(path, 3 << 30)),  # sparse
        lambda: path.write_bytes(b"\0" * size),
    ]
    makers[rng.integers(len(makers))]()
    return "equal"


DAMAGES: dict[str, Callable[[Path, np.random.Generator], str]] = {
    "bits of a header": _header,
    "hostile value": lambda directory, rng: _value(directory, rng, "hostile"),
    "foreign code": lambda directory, rng: _foreign(directory, rng, False),
    "foreign model type": lambda directory, rng: _foreign(directory, rng, True),
    "not finite": lambda directory, rng: _tensors(directory, rng, finite=False),
    "huge size": lambda directory, rng: _value(directory, rng, "size"),
    "damaged JSON": lambda directory, rng: _text(directory, rng, True),
    "pickle": _pickles,
    "other tensors": _tensors,
    "missing value": lambda directory, rng: _value(directory, rng, "missing"),
    "other text": lambda directory, rng: _text(directory, rng, False),
    "special file": _special,
}
"""What each demands: "refuse", "equal" (or refused), or "anything" that ends cleanly."""
