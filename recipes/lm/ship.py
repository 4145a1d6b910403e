"""Save a trained language model in half precision, as it is shipped in the package.

python recipes/lm/ship.py --model runs/lm/model [MODEL ...] --out lavit_lm/default

Of several models, one trained on from the other, the mean of their weights is saved ("model soups",
Wortsman et al., 2022; Ilharco et al., 2022).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lavit_lm import MultimodalLM


@torch.no_grad()
def mean_of(models: list[Path]) -> MultimodalLM:
    """The model with the mean of the weights of several ones.

    Raises:
        ValueError: weights of other names or shapes.
    """
    lm, *others = (MultimodalLM.from_pretrained(model, decoder=None) for model in models)
    # Not state_dict, which has a tied matrix twice
    states = [dict(other.model.named_parameters()) for other in others]
    weights = dict(lm.model.named_parameters())
    shapes = [{name: w.shape for name, w in state.items()} for state in (weights, *states)]
    if any(other != shapes[0] for other in shapes):
        names = ", ".join(map(str, models))
        raise ValueError(f"--model: expected models of the same names and shapes, got {names}")
    for name, weight in weights.items():
        weight.copy_(torch.stack([weight, *(state[name] for state in states)]).mean(0))
    return lm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, nargs="+", help="directories that lavit-lm fit wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument(
        "--visual-tokenizer", default="default", help="where its visual tokenizer will be"
    )
    arguments = parser.parse_args(argv)
    lm = mean_of(arguments.model)
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
