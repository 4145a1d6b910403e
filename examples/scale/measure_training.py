"""What docs/results.md records of training a language model on very many examples.

    python examples/scale/measure_training.py order --count 10000 1000000 100000000 1000000000
    python examples/scale/measure_training.py start --count 10000 100000000

order: processor time and memory of the examples of a window of 4,096 positions, of one source and
of a mixture of three.
start: from the start of the process to the first step of the shipped model's size on so many
examples: shards of 4,096 which all have the content of one (hard links), read and checked as any.
Then processor time of a step and of its data, with one thread; blocks of 128, batches of 64.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

LM = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
LM |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
LM |= {"tie_word_embeddings": True}
SHARD = 4096
WORDS = "a red apple and two dogs on the old wooden table in front of rain at sunset".split()  # noqa: SIM905


def order(counts: list[int]) -> None:
    from lavit_lm.training.mixture import Mixture

    for count in counts:
        weights = [0.7, 0.2, 0.1]
        sizes = [max(1, round(count * weight)) for weight in weights]
        for sources in (Mixture([count]), Mixture(sizes, weights)):
            tracemalloc.start()
            sources[10**12 : 10**12 + SHARD]
            memory = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            times = []
            for i in range(50):
                begin = time.process_time()
                sources[i * 10**9 : i * 10**9 + SHARD]
                times.append(1000 * (time.process_time() - begin))
            text = f"{count} examples, {len(sources.sizes)} sources: {np.median(times):.2f} ms"
            print(f"{text}, {memory:.1f} MB", flush=True)


def write_shards(folder: Path, count: int) -> None:
    """A training split of `count` records (a multiple of 4,096, or less) and 64 held-out ones."""
    import pyarrow as pa

    from lavit_tok import VisualTokenizer
    from lavit_tok.data.shard_manifest import (
        Manifest,
        Shard,
        ShardConfig,
        ShardedSplit,
        SplitSource,
        shard_bytes,
        shard_name,
    )

    tokenizer, rng = VisualTokenizer.from_pretrained("default"), np.random.default_rng(0)
    sizes = tokenizer.config.codebook_size, tokenizer.config.num_patches
    config = ShardConfig("default", tokenizer.fingerprint(), "", *sizes, None, None, False, SHARD)
    splits = {}
    folder.mkdir()
    for split, total in (("train", count), ("validation", 64)):
        size = min(total, SHARD)
        lengths = rng.integers(12, 30, size)
        keep = [np.sort(rng.permutation(sizes[1])[:n]) for n in lengths]
        table: Any = pa.table(
            {
                "key": [f"images/{i:08d}.jpg" for i in range(size)],
                "caption": [" ".join(rng.choice(WORDS, rng.integers(4, 12))) for _ in lengths],
                "codes": [rng.integers(0, sizes[0], n) for n in lengths],
                "length": lengths,
                "keep": keep,
            }
        )
        source = SplitSource("image", "caption", None, None, data="", images=total, digest="")
        footer = {"split": split, "columns": source, "last": True, "images": size}
        content, made = shard_bytes(table, {**footer, "digest": "", "rejects": []}, config)
        names = [shard_name(split, number) for number in range(-(-total // SHARD))]
        (folder / names[0]).write_bytes(content)
        for name in names[1:]:
            os.link(folder / names[0], folder / name)
        codes, sha = made.footer.codes, made.sha256
        shards = tuple(Shard(name, size, codes, 0, sha, size) for name in names)
        source = SplitSource(**{**asdict(source), "images": size * len(names)})
        splits[split] = ShardedSplit(source, shards)
    Manifest(config, splits).write(folder)


def start(counts: list[int]) -> None:
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="start") as name:
            write_shards(Path(name) / "shards", count)
            command = [sys.executable, __file__, "run", "--folder", name]
            subprocess.run([*command, "--begin", str(time.time())], check=True)


def run(folder: Path, begin: float) -> None:
    """Two steps on the shards of a folder, then the data of 40 more."""
    import torch
    from pytorch_lightning import Callback, Trainer

    from lavit_lm.checkpoints.native import DEFAULT
    from lavit_lm.training.data_module import LanguageDataModule
    from lavit_lm.training.module import LanguageModeling

    torch.set_num_threads(1)
    imported = time.process_time()
    ready: dict[str, float] = {}
    steps: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            ready.setdefault("seconds", time.time() - begin)
            ready.setdefault("of the processor", time.process_time())
            ready.setdefault("MB", memory)
            steps.append(-time.process_time())

        def on_train_batch_end(self, *_: Any) -> None:
            steps[-1] += time.process_time()

    data = LanguageDataModule(str(folder / "shards"), block=128, batch_size=64, verify=False)
    module = LanguageModeling(LM, text_tokenizer=str(DEFAULT))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    options: dict[str, Any] = {"max_epochs": -1, "accelerator": "cpu", "limit_val_batches": 0}
    trainer = Trainer(max_steps=2, callbacks=[Clock()], default_root_dir=folder, **options, **quiet)
    trainer.fit(module, data)
    batches = iter(data.train_dataloader())
    next(batches)
    clock = time.process_time()
    for _ in range(40):
        next(batches)
    of_data = (time.process_time() - clock) / 40
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    values = {"examples": len(data.mixture), "imports": imported, **ready, "MB, later": total}
    values |= {"step": float(np.median(steps)), "its data": of_data}
    values["data / step"] = of_data / values["step"]
    print(json.dumps({name: round(value, 4) for name, value in values.items()}), flush=True)


if __name__ == "__main__":
    text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("what", choices=("order", "start", "run"))
    parser.add_argument("--count", type=int, nargs="+", default=[10_000])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.what == "run":
        run(values.folder, values.begin)
    else:
        {"order": order, "start": start}[values.what](values.count)
