"""Damaged files of codes: bad lines are rejected, all others decoded; parquet is never misread."""

from __future__ import annotations

import shutil

import numpy as np

from robustness.process import Outcome
from robustness.small import JOBS, Workshop, damaged, files

NUMBERS = ("Infinity", "NaN", "1e400", "-1", "1.5", "true", "null", '"3"', "9" * 30, "9" * 5000)
LINE = '{{"key": {}, "codes": [{}], "length": {}, "keep": [0]}}'
LINES = [b"", b"null", b"\xff\xfe\0", b"[" * 10**5, b'{"key": "k", "codes": ' + b"[" * 10**5]
LINES += [LINE.format('"k"', n, 1).encode() for n in NUMBERS]
LINES += [LINE.format('"k"', 1, n).encode() for n in NUMBERS]
LINES += [LINE.format('"k"', "1," * 5000 + "1", 5001).encode(), LINE.format('"k"', "", 0).encode()]
LINES += [LINE.format(key, 1, 1).encode() for key in ('"\\ud800"', '"../../../up"', '["k"]')]
HEADER = '{{"format": "lavit_tok.codes", "version": {}, "codebook_size": {}, "patches": {}}}'
HEADERS = [*LINES[:5]] + [
    HEADER.format(*v).encode() for n in NUMBERS for v in ((n, 16, 16), (1, n, 16), (1, 16, n))
]


def trial(work: Workshop, number: int) -> Outcome:
    rng = np.random.default_rng((2, number))
    expected, out = files(work.decoded), work.folder / "trial"
    kind = str(rng.choice(["lines", "header", "parquet"], p=[0.6, 0.15, 0.25]))
    path = work.folder / f"damaged{'.parquet' if kind == 'parquet' else '.jsonl'}"
    untouched = {*range(len(expected))} if kind == "lines" else set()
    if kind == "parquet":
        path.write_bytes(damaged(work.table.read_bytes(), rng))
    else:
        lines = work.codes.read_bytes().splitlines()
        for at in [0] if kind == "header" else rng.integers(1, len(lines), size=3).tolist():
            hostile = LINES if at else HEADERS
            whole = damaged(lines[at], rng).replace(b"\n", b"?").replace(b"\r", b"?")
            lines[at] = whole if rng.integers(2) else hostile[rng.integers(len(hostile))]
            untouched -= {at - 1}
        path.write_bytes(b"\n".join(lines) + b"\n")
    shutil.rmtree(out, ignore_errors=True)
    program, args = JOBS["decoded"](work, out)
    args[1] = path
    done = work.command(program, args, limit_s=30)
    written, failure = files(out), done.complaint
    for name, data in expected.items():
        if int(name[:6]) in untouched and written.get(name) != data:
            failure = failure or f"a good line was {'changed' if name in written else 'lost'}"
        if kind == "parquet" and written.get(name, data) != data:
            failure = failure or "read with altered values"
    failure = failure or (f"{done.mb:.0f} MB" if done.mb > 1024 else None)
    return Outcome(kind, failure, done.seconds, done.mb, note="refused" if done.code else "decoded")
