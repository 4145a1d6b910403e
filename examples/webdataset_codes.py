"""WebDataset tars of images -> tars of codes, with all other members of each sample.

    python examples/webdataset_codes.py 'images-{000..009}.tar' codes-%06d.tar
    needs: pip install webdataset

    00001.jpg, 00001.txt, ...  ->  00001.codes.json, 00001.txt, ...

Read them with `wds.WebDataset(urls).decode()`: sample["codes.json"] is a list of integers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import webdataset

from lavit_tok import ImageError, VisualTokenizer

SUFFIXES = ("jpg", "jpeg", "png", "webp")


def encoded(
    samples: Iterator[dict[str, Any]], tokenizer: VisualTokenizer, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Each sample with "codes.json" instead of its image; unreadable images are left out."""
    while batch := list(islice(samples, batch_size)):
        images, readable = [], []
        for sample in batch:
            suffix = next(suffix for suffix in SUFFIXES if suffix in sample)
            try:
                images.append(tokenizer.image_processor.open(sample.pop(suffix)))
                readable.append(sample)
            except ImageError as error:
                print(f"{sample['__key__']}: {error}")
        if not readable:
            continue
        for sample, codes in zip(readable, tokenizer.encode(images).to_list(), strict=True):
            members = {name: value for name, value in sample.items() if name[0] != "_"}
            yield {
                "__key__": sample["__key__"],
                "codes.json": json.dumps(codes).encode(),
                **members,
            }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="tars of images, such as images-{000..009}.tar")
    parser.add_argument("out", help="tars of codes, such as codes-%%06d.tar")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples-per-tar", type=int, default=10_000)
    arguments = parser.parse_args(argv)
    tokenizer = VisualTokenizer.from_pretrained("default")
    samples = iter(webdataset.WebDataset(arguments.source, shardshuffle=False, empty_check=False))
    count = 0
    with webdataset.ShardWriter(arguments.out, maxcount=arguments.samples_per_tar) as writer:
        for sample in encoded(samples, tokenizer, arguments.batch_size):
            writer.write(sample)
            count += 1
    print(f"{count} samples of codes; tokenizer {tokenizer.fingerprint()}")
    return count


if __name__ == "__main__":
    main()
