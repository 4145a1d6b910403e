"""Tokenize images by Daft: python examples/scale/daft_udf.py 'FOLDER/*.png' OUT

Not run by the tests, which do not install Daft; run with Daft 0.6.14 on 2026-11-29.
"""

import sys
from typing import Any

import daft
import pyarrow as pa

from lavit_tok import TokenizeBatch

CODES = daft.DataType.list(daft.DataType.int32())


class Tokenize:
    def __init__(self) -> None:
        self.tokenize = TokenizeBatch("default")  # loaded once in each process

    def __call__(self, images: Any) -> Any:
        table = pa.table({"image": images.to_arrow()})
        return self.tokenize(table)["codes"].combine_chunks()


tokenize: Any = daft.udf(return_dtype=CODES, batch_size=32)(Tokenize)

if __name__ == "__main__":
    pattern, out = sys.argv[1:]
    images = daft.from_glob_path(pattern)
    images = images.with_column("image", images["path"].url.download())
    codes = images.with_column("codes", tokenize(images["image"]))
    codes.exclude("image").write_parquet(out)
