"""Mutation check of the core: how many small faults, put in one at a time, do its tests notice?

    python tests/mutations.py [--each 8] [--seed 0] [--jobs 2] [--only TEXT...] [FILE...]

Each fault is one change of a syntax tree: a sign, a comparison, an index, a dropped detach() or ~,
another reduction. A seeded sample of each file's faults is put into copies of the repository, where
the tests of that file run until one fails. A fault that no test notices has survived. Prints each
fault and the killed fraction; the exit code is 1 below 90 %. It takes tens of minutes and is not
part of the suite.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  once, before the forks
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
# Each file of the core, and the fast tests that are about it.
SEQUENCES = ["tests/lm/sequences/test_sequences.py"]
QUICK = ["-k", "not overfitted and not rates and not (emu and generation) and not saved"]
NESTED_LM = ["tests/lm/test_nested_codes.py", "tests/lm/vocabulary/test_vocabulary.py"]
OPTIMIZERS = ["tests/tok/training/test_optimizers.py"]
OPTIMIZERS += ["tests/tok/training/test_training_tokenizer.py"]
DECODERS = ["tests/tok/decode/test_mean_decoder.py", "tests/tok/decode/test_sample_decoder.py"]
UNTRAINED = ["-k", "not training and not command and not start_from"]
TARGETS = {
    "lavit_lm/models/losses.py": [
        *SEQUENCES,
        NESTED_LM[0],
        "tests/lm/objectives/test_emu.py",
        *QUICK,
    ],
    "lavit_lm/sequences/packing.py": SEQUENCES,
    "lavit_lm/sequences/masks.py": SEQUENCES,
    "lavit_tok/encode/quantizer.py": ["tests/tok/encode/test_quantizer.py"],
    "lavit_tok/encode/merger.py": ["tests/tok/encode/test_merger.py"],
    "lavit_tok/encode/image_files.py": ["tests/tok/encode/test_image_processor.py"],
    "lavit_tok/encode/image_processor.py": ["tests/tok/encode/test_image_processor.py"],
    "lavit_tok/encode/selector.py": ["tests/tok/encode/test_selector.py"],
    "lavit_tok/encode/allocation.py": ["tests/tok/encode/test_allocation.py"],
    "lavit_tok/encode/nested_quantizer.py": ["tests/tok/encode/test_nested_quantizer.py"],
    "lavit_tok/encode/error_head.py": ["tests/tok/encode/test_error_head.py"],
    "lavit_tok/nn/nested_order.py": ["tests/tok/nn/test_nested_order.py"],
    "lavit_tok/decode/mean_decoder.py": [DECODERS[0], *UNTRAINED],
    "lavit_tok/decode/sample_decoder.py": [*DECODERS[::-1], *UNTRAINED],
    "lavit_tok/codes.py": ["tests/tok/test_codes.py", "tests/tok/test_nested_tokenizer.py"],
    "lavit_tok/training/optimizers.py": [
        *OPTIMIZERS,
        "-k",
        "each_part or restart or learning_rate",
    ],
    "lavit_lm/vocabulary/embeddings.py": [*NESTED_LM, "-k", "embeddings or extend or bias"],
}
SECONDS = 240  # of processor time for the tests of one fault: one that loops for ever is noticed
MEMORY = 16 << 30  # address space of one run: one that allocates without end is noticed
PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)]
PAIRS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or)]
PAIRS += [(ast.In, ast.NotIn), (ast.FloorDiv, ast.Mod)]
OPERATORS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
METHODS = {"argmax": "argmin", "argmin": "argmax", "max": "min", "min": "max", "mean": "sum"}
METHODS |= {"sum": "mean", "tril": "triu", "log": "exp", "exp": "log", "sigmoid": "tanh"}
METHODS |= {"all": "any", "any": "all", "sin": "cos", "cos": "sin", "square": "abs"}
DROPPED = {"detach", "flatten", "normalize", "masked_fill"}  # the value itself is returned
NEGATED = {"cross_entropy", "log_softmax", "logit"}


def faults(node: ast.AST) -> Iterator[Callable[[Any], Any]]:
    """Changes of one node; each gets a copy of it and returns what replaces it."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield lambda n: ast.Compare(n.left, [OPERATORS[type(n.ops[0])]()], n.comparators)
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield lambda n: _with(n, op=OPERATORS[type(n.op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            yield lambda n: n.operand
        case ast.Constant(value=bool()):
            yield lambda n: ast.Constant(not n.value)
        case ast.Constant(value=int()):
            yield lambda n: ast.Constant(n.value + 1)
        case ast.IfExp():
            yield lambda n: ast.IfExp(n.test, n.orelse, n.body)
        case ast.Call(func=ast.Attribute(attr=name)):
            if name in METHODS:
                yield lambda n: _with(n, func=_with(n.func, attr=METHODS[n.func.attr]))
            if name in DROPPED and isinstance(node.func, ast.Attribute):
                of_torch = ast.unparse(node.func.value) in ("F", "torch")
                yield lambda n: n.args[0] if of_torch else n.func.value
            if name in NEGATED:
                yield lambda n: ast.UnaryOp(ast.USub(), n)


def _with(node: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


class Fault(ast.NodeTransformer):
    """Puts in one fault, by its number over the bodies of functions; not in messages or types."""

    def __init__(self, number: int) -> None:
        self.left, self.depth, self.what = number, 0, ""

    def visit(self, node: Any) -> Any:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.arguments):
            return node
        if isinstance(node, ast.FunctionDef):
            self.depth += 1
            node.body = [self.visit(item) for item in node.body]
            self.depth -= 1
            return node
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                node.value = self.visit(node.value)
            return node
        text = ast.unparse(node)
        if text == "-1" or (self.depth and isinstance(node, ast.expr) and "CHUNK" in text):
            return node  # the last of two axes; the size of chunks, which changes no result
        for change in faults(node) if self.depth else ():
            self.left -= 1
            if self.left < 0 and not self.what:
                after = change(copy.deepcopy(node))
                self.what = f"{node.lineno}: {text}  ->  {ast.unparse(after)}"
                return after
        return self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(line and what is changed, the changed source) for each fault."""
    for number in itertools.count():
        fault = Fault(number)
        tree = ast.fix_missing_locations(fault.visit(ast.parse(source)))
        if not fault.what:
            return
        yield fault.what, ast.unparse(tree)


def passes(name: str, source: str, pipe: Any) -> None:
    """Sends whether a file's tests pass with this source in its place; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with tempfile.TemporaryDirectory() as work, open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        for part in ("lavit_tok", "lavit_lm", "tests"):
            shutil.copytree(ROOT / part, f"{work}/{part}", copy_function=os.symlink)
        shutil.copy(ROOT / "pyproject.toml", work)
        (Path(work) / name).unlink()
        (Path(work) / name).write_text(source)
        os.chdir(work)
        sys.path[:0], sys.dont_write_bytecode = [work], True
        options = ["-xqWignore", "-n0", "-pno:cacheprovider", "--rootdir", work]
        pipe.send(pytest.main([*options, *TARGETS[name]]) == 0)


def survivors(tasks: list[tuple[str, str]], jobs: int) -> Iterator[bool]:
    """passes() of each (file, source), in order; in forks of this process, which has torch."""
    context = multiprocessing.get_context("fork")
    started: list[Any] = []
    for number in range(len(tasks)):
        while len(started) < min(len(tasks), number + jobs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=passes, args=(*tasks[len(started)], theirs))
            process.start()
            theirs.close()
            started.append((process, ours))
        process, pipe = started[number]
        try:
            yield bool(pipe.recv())
        except EOFError:  # the process ended itself: out of time or memory
            yield False
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation check of the core.")
    parser.add_argument("files", nargs="*", metavar="FILE", default=list(TARGETS))
    parser.add_argument("--each", type=int, default=8, help="faults in each file; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the faults that are chosen")
    parser.add_argument("--only", nargs="+", default=[""], help="faults that print one of these")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    chosen: list[tuple[str, str, str]] = []
    for name in arguments.files:
        source = (ROOT / name).read_text()
        every = mutants(source)
        found = [one for one in every if any(text in one[0] for text in arguments.only)]
        random.Random(arguments.seed).shuffle(found)
        chosen += [(name, "nothing changed", source)]
        chosen += [(name, *one) for one in found[: arguments.each or None]]
    tasks = [(name, source) for name, _, source in chosen]
    alive, total = 0, 0
    for (name, what, _), passed in zip(chosen, survivors(tasks, arguments.jobs), strict=True):
        if what == "nothing changed":
            if not passed:
                raise SystemExit(f"{name}: its tests fail without a fault: {TARGETS[name]}")
            continue
        alive, total = alive + passed, total + 1
        print(f"{'SURVIVED' if passed else 'killed  '} {name}:{what}", flush=True)
    print(f"{total - alive} of {total} faults killed ({1 - alive / total:.0%})")
    return int(total - alive < 0.9 * total)


if __name__ == "__main__":
    sys.exit(main())
