"""The text tokenizer of the default LM: byte-level BPE of the training split's captions.

python recipes/lm/text_tokenizer.py --shards runs/lm/shards --out runs/lm/text
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lavit_lm.vocabulary.text_tokenizer import TEXT_IDS, train_text_tokenizer
from lavit_tok import Shards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", type=Path, required=True, help="folder that lavit-tok shards wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument(
        "--size", type=int, default=TEXT_IDS, help="ids, the special ones and 256 bytes among them"
    )
    arguments = parser.parse_args()
    captions = Shards.open(arguments.shards, "train").dataset()["caption"]
    tokenizer = train_text_tokenizer(captions, arguments.size)
    tokenizer.save_pretrained(arguments.out)
    tokens = sum(len(ids) for ids in tokenizer(list(captions))["input_ids"])
    print(
        f"{len(tokenizer)} ids; {tokens / len(captions):.1f} tokens per caption; "
        f"saved in {arguments.out}"
    )


if __name__ == "__main__":
    main()
