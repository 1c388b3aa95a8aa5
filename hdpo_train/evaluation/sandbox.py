"""Run a program a model wrote, in a process of its own, and learn whether it ran to its end.

    program ── Sandbox.finishes ──> new namespaces, limits, empty folder ──> did its last line run?

It stops accidents, not attackers. The program cannot reach a network, sees neither the environment nor the processes
outside, takes no more time than it is given and none of its processes more memory, and all it started ends with it, or
with this process, even if that is killed. It can read what its user can read, write and delete where its user can,
connect to Unix sockets that are files, and, if it knows this file, find the token and report an end it never reached.
Code written to do harm belongs in a virtual machine.
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
            other processes of its user, and can leave processes behind if they leave its process group, or if this
            process is killed.

    Where the kernel gives namespaces but no /proc of their own (some containers hide parts of it), programs see which
    processes run outside, but cannot signal them or read their environment: `shows_processes`. That a program ends when
    this process is killed needs setpriv of util-linux.

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

    @property
    def shows_processes(self) -> bool:
        """Whether programs see which processes run outside."""
        return self.allow_network or _HIDE_PROCESSES not in _namespaces()

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
        command = [*ends_with_this_process(), *command]
        limits = [self.memory_mb << 20, math.ceil(self.timeout), _FILE_BYTES, _PROCESSES]
        with (
            tempfile.TemporaryDirectory(prefix="hdpo-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as source,
            # Files, not pipes: a process that holds one open keeps nobody waiting. Two files: the program can write to
            # the second one, and truncate it.
            tempfile.TemporaryFile() as started,
            tempfile.TemporaryFile() as report,
        ):
            source.write(f"{token}\n{program}".encode(errors="surrogatepass"))
            source.seek(0)
            self._run([*command, *map(str, limits)], folder, source, started, report)
            started.seek(0)
            report.seek(0)
            has_started = started.read() == token.encode()
            said = report.read(1 << 16).decode(errors="replace").strip()
        if not has_started:
            raise OSError(f"the sandbox did not start: {said or f'it printed nothing within {self.timeout:g} s'}")
        return f"{token} finished" in said.splitlines()

    def _run(self, command: list[str], folder: str, source: IO[bytes], started: IO[bytes], report: IO[bytes]) -> None:
        # Nothing of the environment outside. -I would ignore the seed of hashes; all else it ignores is not here.
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a buffer per thread: memory
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=source,
            stdout=started,
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


def ends_with_this_process() -> tuple[str, ...]:
    """A prefix for a command, so that it is killed when this process ends in any way; empty without setpriv.

    The kernel tells of a parent that dies later; that one died before, the shell sees.
    """
    signal_command = _parent_death_signal()
    return (*signal_command, "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())) if signal_command else ()


@functools.cache
def _parent_death_signal() -> tuple[str, ...]:
    command = (shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL")
    try:
        probe = subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError:  # no setpriv
        return ()
    return () if probe.returncode else command  # that of BusyBox has no such option


_HIDE_PROCESSES = "--mount-proc"


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """A prefix for a command, so that it has no network, and everything it started ends with it."""
    unshare = shutil.which("unshare")
    out = "On a machine without secrets, allow_network=True (--allow_network) runs programs without this protection."
    if unshare is None:
        raise ValueError(f"programs of a model are run without network by unshare, of util-linux: not found. {out}")
    # The user is not mapped: the program is nobody inside, without capabilities, even where this process is root's.
    least = (unshare, "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    for command in ((*least, _HIDE_PROCESSES), least):
        probe = subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if not probe.returncode:
            break
    else:
        raise ValueError(
            f"programs of a model are run without network, and this kernel or container does not let a process have "
            f"namespaces of its own ({probe.stderr.strip()}). {out}"
        )
    return command


def _runner() -> None:
    """The program of the new process, which gets nothing but the source of this function."""
    import os
    import resource
    import sys
    import types

    memory, seconds, file_bytes, processes = map(int, sys.argv[1:])
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    started, report = os.dup(1), os.dup(2)
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
    os.write(started, token)
    os.close(started)
    sys.argv = ["program.py"]
    module = sys.modules["program"] = types.ModuleType("program")
    exec(compile(program, "program.py", "exec"), module.__dict__)
    os.write(report, token + b" finished\n")
    os._exit(0)  # without waiting for threads, or for what was registered to run at exit


_RUNNER = f"{inspect.getsource(_runner)}\n_runner()"
