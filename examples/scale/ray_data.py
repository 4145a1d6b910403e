"""Tokenize images of any Ray data set: python examples/scale/ray_data.py FOLDER OUT

`lavit-tok shards --engine ray` adds resuming, checks and the manifest to this.
"""

import sys

import pyarrow as pa
import ray

from lavit_tok import TokenizeBatch


def rename(table: pa.Table) -> pa.Table:
    return table.rename_columns({"bytes": "image", "path": "key"})


if __name__ == "__main__":
    folder, out = sys.argv[1:]
    images = ray.data.read_binary_files(folder, include_paths=True)
    renamed = images.map_batches(rename, batch_format="pyarrow")
    codes = renamed.map_batches(
        TokenizeBatch,
        fn_constructor_args=("default",),  # loaded once in each actor
        batch_size=32,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,  # or num_gpus=1, and device "cuda" in fn_constructor_args
    )
    codes.write_parquet(out)
