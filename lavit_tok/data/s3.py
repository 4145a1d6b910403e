"""The file system of s3:// that remote_files.py gives to fsspec."""

from __future__ import annotations

from typing import Any

from s3fs import S3FileSystem


class S3(S3FileSystem):
    """s3fs for `datasets`, which opens tars with a block size when it streams them.

    s3fs takes that for an option of botocore's session, and fails.
    """

    def __init__(self, *args: Any, block_size: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
