"""Peak memory of loading released weights: how much more than the weights' own size?

    overhead = (peak resident memory after loading - before) / (bytes of the loaded tensors)

Writes a release of the published size (or of --layers and --depth blocks) with random weights to a folder, then loads
it in a process of its own, once a dtype. At full size the folder takes about 8 GB of disk, and writing its largest file
as much memory. Writes released_memory.md and .json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import torch
from encode_speed import _peak as peak

from lavit_tok import TokenizerConfig, VisualTokenizer
from lavit_tok.checkpoints.released.loader import load_released
from lavit_tok.checkpoints.weights import empty

TARGET = 1.15


def write_release(root: Path, layers: int, depth: int) -> int:
    """visual_tokenizer/ and language_model/visual_weight.bin; the names are those of the test's random release."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import reference_released

    size = {
        "image": 224,
        "patch": 14,
        "width": 1408,
        "layers": layers,
        "encoder_mlp": 6144,
        "mlp": 6144,
    }
    size |= {
        "merger_depth": depth,
        "reconstructor_depth": depth,
        "codes": 16384,
        "code_dim": 32,
        "llm": 4096,
    }
    skipped = ("visual_tokenizer/highres_tokenizer_decoder.bin",)
    reference_released.write(root, 0, skipped, **size, low=768, high=(768, 1280), null=77)
    return sum(path.stat().st_size for path in root.rglob("*.bin"))


def load(root: str, dtype: torch.dtype, continuous: bool) -> dict[str, float]:
    """GiB before and at the peak of loading, bytes of the tensors, seconds."""
    empty(
        lambda: VisualTokenizer(TokenizerConfig.lavit()), dtype
    )  # imports all that loading imports
    before, start = peak(), time.perf_counter()
    tokenizer, _ = load_released(root, dtype=dtype, continuous=continuous)
    weights = sum(tensor.nbytes for tensor in tokenizer.state_dict().values()) / 2**30
    after = peak()
    return {
        "weights_gib": weights,
        "before_gib": before,
        "peak_gib": after,
        "overhead": (after - before) / weights,
        "peak_over_weights": after / weights,
        "seconds": time.perf_counter() - start,
    }


def main(arguments: Namespace) -> dict[str, Any]:
    runs = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        written = write_release(Path(folder), arguments.layers, arguments.depth)
        for name in arguments.dtypes:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(
                    load, folder, getattr(torch, name), arguments.continuous
                ).result()
            runs.append({"dtype": name, **found})
            print(
                f"{name}: {found['overhead']:.3f} of the weights' {found['weights_gib']:.2f} GiB",
                flush=True,
            )
    values = {
        "target": TARGET,
        "files_gib": written / 2**30,
        "layers": arguments.layers,
        "runs": runs,
    }
    head = ("dtype", "weights, GiB", "before", "peak", "overhead", "peak / weights", "seconds")
    keys = ("weights_gib", "before_gib", "peak_gib", "overhead", "peak_over_weights", "seconds")
    body = (
        f"Target: (peak - before) / weights at most {TARGET}. {arguments.layers} encoder blocks, "
    )
    body += f"{arguments.depth} of merger and reconstructor, width 1408, random float32 files.\n\n"
    body += common.table(head, [(r["dtype"], *(f"{r[k]:.3f}" for k in keys)) for r in runs])
    common.write(
        "released_memory", arguments.out, "Memory of loading released weights", body, values
    )
    return values


def arguments() -> Any:
    found = common.parser(__doc__, data=False)
    found.add_argument("--layers", type=int, default=40, help="blocks of the encoder")
    found.add_argument("--depth", type=int, default=12, help="blocks of merger and reconstructor")
    found.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    found.add_argument("--continuous", action="store_true", help="also the continuous path")
    found.add_argument(
        "--folder", help="where to write the files; the system's temporary folder by default"
    )
    return found


if __name__ == "__main__":
    raise SystemExit(common.run(main, arguments().parse_args()))
