"""Work in a forked copy of this process: limited in time and memory, watched, killed where asked.

Time is that of the processor, which does not depend on what else the machine does; a child that
waits forever is ended after ten times its limit.

The process that forks imports everything once, so that a child costs milliseconds. It must stay
without threads: models run in children only.
"""

from __future__ import annotations

import fcntl
import importlib
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import termios
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PRELOAD = """datasets diffusers.models.autoencoders.autoencoder_kl pyarrow.parquet tensorboard
    diffusers.models.unets.unet_2d_condition pytorch_lightning.cli lavit_tok.cli.commands
    lavit_lm.cli.commands lavit_lm.multimodal lavit_lm.objectives.lavit
    transformers.models.llama.modeling_llama transformers.models.clip.modeling_clip"""
WATCHED = ("os.system", "os.exec", "subprocess.Popen", "socket.connect", "pickle.find_class")
ANSWERS = b"y\n" * 500  # waits on stdin, so that a question would be answered


@dataclass
class Outcome:
    """How one trial ended."""

    kind: str
    failure: str | None  # what should not have happened
    seconds: float
    mb: float = 0.0  # peak memory above that at its start
    tried: int = 1  # kills, for a job that is killed several times before it ends
    note: str = ""  # counted in the report, e.g. "refused"


@dataclass(frozen=True)
class Done:
    """How a child ended: exit code, or minus the signal; bytes that it read from stdin.

    `seconds` of the processor, `duration` by the clock.
    """

    code: int
    out: str
    err: str
    seconds: float
    duration: float
    mb: float
    read: int

    @property
    def complaint(self) -> str | None:
        """What is wrong with the end of a command.

        None for success, or one line and code 2, or code 1 if no item of a job could be used.
        """
        last = (self.err.strip().splitlines() or [""])[-1]
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        if "WATCHED " in self.err:
            return f"ran code: {self.err[self.err.index('WATCHED ') :].splitlines()[0]}"
        if self.read:
            return "asked a question on stdin"
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {last}"
        expected = {2: ": error: ", 1: ": error: none of "}
        if self.code and (self.code not in expected or expected[self.code] not in last):
            return f"exit code {self.code}: {last}"
        return None


def preload() -> None:
    """Import what the commands import, and keep torch to one thread."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    for name in PRELOAD.split():
        importlib.import_module(name)
    for package in map(importlib.import_module, ("lavit_tok", "lavit_lm")):
        assert all(hasattr(package, name) for name in package.__all__)  # imports its module
    importlib.import_module("torch").set_num_threads(1)


def fork(
    work: Callable[[], int | None],
    *,
    limit_s: float = 180,
    kill_after: float | None = None,  # SIGKILL after so many seconds,
    kill_at_replace: int | None = None,  # or just before the n-th os.replace
    watch: bool = False,  # report what it executes, connects to and unpickles
    limits: dict[int, int] | None = None,  # of `resource`; RLIMIT_NOFILE counts further files
    nobody: bool = False,  # without the rights of root
) -> Done:
    """Run `work` in a child."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin, answers = os.pipe()
        os.write(answers, ANSWERS)
        os.close(answers)
        inherited, started = mmap.mmap(-1, 8), time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                for number, stream in enumerate((stdin, out.fileno(), err.fileno())):
                    os.dup2(stream, number)
                sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rww"[n]) for n in range(3))
                for number in (signal.SIGALRM, signal.SIGPROF):
                    signal.signal(number, signal.SIG_DFL)  # also ends a loop in C
                signal.setitimer(signal.ITIMER_PROF, limit_s)
                signal.setitimer(signal.ITIMER_REAL, 10 * limit_s)
                inherited[:] = struct.pack("d", peak_mb(reset=True))
                _limit(limits or {}, nobody)
                _hook(watch, kill_at_replace)
                code = _exit_code(work)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        duration = time.monotonic() - started
        left = struct.unpack("i", fcntl.ioctl(stdin, termios.FIONREAD, b"\0" * 4))[0]
        os.close(stdin)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        mb = max(0.0, usage.ru_maxrss / 1024 - struct.unpack("d", inherited[:])[0])
        code = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        return Done(code, *texts, seconds, duration, mb, len(ANSWERS) - left)


def command(program: str, args: Sequence[object], **how: Any) -> Done:
    """A command line of "lavit-tok" or "lavit-lm" in a child."""
    main = importlib.import_module(f"{program.replace('-', '_')}.cli").main
    return fork(lambda: main([str(arg) for arg in args]), **how)


def peak_mb(reset: bool = False) -> float:
    """Greatest resident size of this process since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def _limit(limits: dict[int, int], nobody: bool) -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 30),) * 2)  # protects the machine
    for kind, value in limits.items():
        now = len(os.listdir("/proc/self/fd")) if kind == resource.RLIMIT_NOFILE else 0
        resource.setrlimit(kind, (now + value,) * 2)
    if nobody and os.geteuid() == 0:
        os.seteuid(65534)


def _hook(watch: bool, kill_at_replace: int | None) -> None:
    replace, before = os.replace, iter(range(1, kill_at_replace or 1))

    def counted(*args: Any, **more: Any) -> None:
        if next(before, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args, **more)

    def report(event: str, args: tuple[object, ...]) -> None:
        if event in WATCHED:
            os.write(2, f"WATCHED {event} {str(args)[:200]!r}\n".encode())

    if kill_at_replace:
        os.replace = counted
    if watch:
        sys.addaudithook(report)


def _exit_code(work: Callable[[], int | None]) -> int:
    try:
        return work() or 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
