"""Save a trained language model in half precision, as it is shipped in the package.

python recipes/lm/ship.py --model runs/lm/model --out lavit_lm/default
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lavit_lm import MultimodalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="directory that lavit-lm fit wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument(
        "--visual-tokenizer", default="default", help="where its visual tokenizer will be"
    )
    arguments = parser.parse_args()
    lm = MultimodalLM.from_pretrained(arguments.model, decoder=None)
    lm.save_pretrained(arguments.out, arguments.visual_tokenizer, torch.float16)
    # A line for each property of each token is most of this file.
    path = arguments.out / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    compact = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
