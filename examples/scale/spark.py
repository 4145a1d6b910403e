"""Tokenize images by Spark: python examples/scale/spark.py FOLDER OUT

Not run by the tests, which do not install Spark; run with Spark 4.3.0 on 2026-11-29.
"""

import sys
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from lavit_tok import TokenizeBatch

SCHEMA = "key string, reason string, codes array<int>, keep array<int>, length int"
tokenize = TokenizeBatch("default")  # loaded at the first batch, in each Python worker


def map_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from tokenize(pa.Table.from_batches([batch])).to_batches()


if __name__ == "__main__":
    folder, out = sys.argv[1:]
    spark = SparkSession.builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", 32)
    images = spark.getOrCreate().read.format("binaryFile").load(folder)
    images = images.selectExpr("path as key", "content as image")
    images.mapInArrow(map_batches, SCHEMA).write.parquet(out)
