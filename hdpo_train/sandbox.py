"""Run a program a model wrote, in a process of its own, and learn whether it ran to its end.

    program ── Sandbox.finishes ──> new namespaces, limits, empty folder ──> did its last line run?

It stops accidents, not attackers. The program cannot reach a network, sees neither the environment nor the processes
outside, takes no more time than it is given and none of its processes more memory, and all it started ends with it. It
can read what its user can read, write and delete where its user can, connect to Unix sockets that are files, and, if
it knows this file, find the token and report an end it never reached. Code written to do harm belongs in a virtual
machine.
"""

import contextlib
import functools
import inspect
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

_MIN_MEMORY_MB = 64  # Python itself maps about 30
_FILE_BYTES = 16 << 20
_PROCESSES = 64


@dataclass(frozen=True)
class Sandbox:
    """Limits under which programs run. Linux only.

    Args:
        timeout: seconds on the clock, the start of Python included. CPU time has the same limit.
        memory_mb: address space of each process of the program, MiB.
        allow_network: run without namespaces, where the kernel refuses them. The program then has the network, sees the
            other processes of its user, and can leave processes behind if they leave its process group.

    A file may grow to 16 MiB. A program may have 64 processes and threads (before Linux 5.14 its user's others count
    too), unless the user is root, whose processes Linux does not limit: there only time bounds them.

    Raises:
        ValueError: a limit out of range, another system than Linux, or a kernel that gives no namespaces.
    """

    timeout: float = 10.0
    memory_mb: int = 1024
    allow_network: bool = False

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout must be a positive number of seconds, not {self.timeout}")
        if self.memory_mb < _MIN_MEMORY_MB:
            raise ValueError(f"memory_mb must be at least {_MIN_MEMORY_MB}, what Python needs, not {self.memory_mb}")
        if sys.platform != "linux":
            raise ValueError(f"programs of a model are run on Linux only, not on {sys.platform}: score them there")
        if not self.allow_network:
            _namespaces()

    def finishes(self, program: str) -> bool:
        """Whether the program ran to its end: no exception, no exit, no signal, no limit met.

        `__name__` is "program", so a block for `"__main__"` is left out; standard input is empty, output is discarded.
        Hashes of strings are seeded, so that the order of a set is the same in every run.

        Raises:
            OSError: Python did not start, so nothing is known about the program.
        """
        token = secrets.token_hex(16)
        command = [sys.executable, "-s", "-c", _RUNNER]
        if not self.allow_network:
            command = [*_namespaces(), *command]
        limits = [self.memory_mb << 20, math.ceil(self.timeout), _FILE_BYTES, _PROCESSES]
        with (
            tempfile.TemporaryDirectory(prefix="hdpo-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as source,
            tempfile.TemporaryFile() as report,  # files, not pipes: a process that holds one open keeps nobody waiting
        ):
            source.write(f"{token}\n{program}".encode(errors="surrogatepass"))
            source.seek(0)
            self._run([*command, *map(str, limits)], folder, source, report)
            report.seek(0)
            lines = report.read(1 << 16).decode(errors="replace").splitlines()
        if f"{token} started" not in lines:
            said = "\n".join(lines).strip() or f"not a word from it within {self.timeout} seconds"
            raise OSError(f"the sandbox did not start: {said}")
        return f"{token} finished" in lines

    def _run(self, command: list[str], folder: str, source: IO[bytes], report: IO[bytes]) -> None:
        # Nothing of the environment outside. -I would ignore the seed of hashes; all else it ignores is not here.
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a buffer per thread: memory
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=source,
            stdout=report,
            stderr=report,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """The command before a command that gives it no network, and ends all it started when it ends."""
    unshare = shutil.which("unshare")
    out = "On a machine without secrets, allow_network=True (--allow_network) runs programs without this protection."
    if unshare is None:
        raise ValueError(f"programs of a model are run without network by unshare, of util-linux: not found. {out}")
    # The user is not mapped: the program is nobody inside, without capabilities, even where this process is root's.
    command = (unshare, "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    probe = subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if probe.returncode:
        raise ValueError(
            f"programs of a model are run without network, and this kernel or container does not let a process have "
            f"namespaces of its own ({probe.stderr.strip()}). {out}"
        )
    return command


def _runner() -> None:
    """What the new process does. Only the source of this function gets there."""
    import os
    import resource
    import sys
    import types

    memory, seconds, file_bytes, processes = map(int, sys.argv[1:])
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(limit)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))
    os.write(report, token + b" started\n")
    sys.argv = ["program.py"]
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(program, "program.py", "exec"), module.__dict__)
    os.write(report, token + b" finished\n")
    os._exit(0)  # without waiting for threads, or for what was registered to run at exit


_RUNNER = f"{inspect.getsource(_runner)}\n_runner()"
