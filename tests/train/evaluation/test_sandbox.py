"""What a program in the sandbox can and cannot do. Each limit has a control: the same program within it."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hdpo_train.evaluation import sandbox
from hdpo_train.evaluation.sandbox import Sandbox


def refusal() -> str:
    try:
        Sandbox()
    except ValueError as error:
        return str(error)
    return ""


REFUSAL = refusal()
mortal = pytest.mark.skipif(not sandbox.ends_with_this_process(), reason="setpriv of util-linux is not here")
isolated = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


def finishes(program: str, **options: object) -> bool:
    return Sandbox(**{"timeout": 30, "memory_mb": 256, **options}).finishes(program)  # type: ignore[arg-type]


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert 1 + 1 == 2",
        "import os; assert os.listdir() == [] and os.environ['HOME'] == os.getcwd()",
        "open('a', 'wb').write(bytes(1 << 20)); assert len(open('a', 'rb').read()) == 1 << 20",
        "assert __name__ == 'program'\nif __name__ == '__main__': raise SystemExit(1)",
        "import sys; assert sys.stdin.read() == '' and sys.argv == ['program.py']",
        "print('x' * 10_000_000)",  # discarded: no pipe to fill
        "# " + "long " * 100_000,
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nassert A().x == 1",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",  # not waited for
        "import os\nfor fd in range(3, 20):\n try: os.ftruncate(fd, 0)\n except OSError: pass",  # its report among them
    ],
)
def test_finishes_a_program_that_ends(program):
    assert finishes(program)


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "x = '\0'",
        "x = '\ud800'",  # what a broken tokenizer may decode to
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV); import ctypes; ctypes.string_at(0)",
        "input()",
        "import os\nfor fd in range(20):\n try: os.write(fd, b'finished\\n')\n except OSError: pass\nos._exit(0)",
        "import os; os.kill(os.getppid(), 9); raise SystemExit",
        "import os\nfor fd in range(20):\n try: os.ftruncate(fd, 0)\n except OSError: pass\nos._exit(0)",
        "import os; os.closerange(0, 64)",
        "def f(): f()\nf()",
    ],
)
def test_finishes_false_for_a_program_that_does_not_reach_its_end(program):
    assert not finishes(program)


@isolated
@pytest.mark.parametrize("ignore", ["", "import signal; [signal.signal(n, signal.SIG_IGN) for n in (2, 15, 24)]\n"])
def test_finishes_infinite_loop_is_stopped(ignore):
    start = time.monotonic()
    assert not finishes(f"{ignore}while True: pass", timeout=2)
    assert time.monotonic() - start < 20


@isolated
def test_finishes_memory_is_limited():
    hog = "x = bytearray(300 << 20)"
    assert not finishes(hog, memory_mb=200)
    assert finishes(hog, memory_mb=800)


@isolated
def test_finishes_size_of_files_is_limited():
    assert not finishes("open('a', 'wb').write(bytes(17 << 20))")


@isolated
@pytest.mark.skipif(os.getuid() == 0, reason="Linux does not count the processes of root")
def test_finishes_number_of_processes_is_limited():
    fork = "import os, time\nfor _ in range({}):\n if os.fork() == 0: time.sleep(60); os._exit(0)"
    assert finishes(fork.format(10))
    assert not finishes(fork.format(100))


def processes_with(argument: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended
            continue
        if argument in words:
            found.append(path.parent.name)
    return found


@isolated
@pytest.mark.parametrize("ends", [True, False])
def test_finishes_leaves_no_process(ends):
    seconds = f"60.{os.getpid()}{int(ends)}"  # a word to know them by
    program = f"""
import os, subprocess, time
for _ in range(20):  # children in the group, and grandchildren that left it
    subprocess.Popen(["sleep", "{seconds}"])
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execlp("sleep", "sleep", "{seconds}")
        os._exit(0)
{"" if ends else "time.sleep(60)"}
"""
    assert finishes(program, timeout=30 if ends else 3) is ends
    deadline = time.monotonic() + 10
    while processes_with(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(seconds) == []


@isolated
def test_sandbox_says_where_proc_cannot_be_hidden(monkeypatch, tmp_path):
    refusing, which = tmp_path / "unshare", shutil.which
    refusing.write_text(f'#!/bin/sh\ncase "$*" in *--mount-proc*) exit 1;; esac\nexec {which("unshare")} "$@"\n')
    refusing.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(refusing) if name == "unshare" else which(name))
    sandbox._namespaces.cache_clear()
    try:
        assert Sandbox().shows_processes and finishes("assert 1 + 1 == 2")
    finally:
        sandbox._namespaces.cache_clear()


# An evaluation in a process of its own loads the file alone: importing the package takes seconds.
EVALUATION = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sandbox", {sandbox.__file__!r})
module = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.Sandbox(timeout=60, allow_network=bool(int(sys.argv[1]))).finishes(sys.argv[2])
"""


@isolated
@mortal
@pytest.mark.parametrize("allow_network", [False, True])
def test_finishes_leaves_no_process_when_the_evaluation_is_killed(allow_network):
    seconds = f"59.{os.getpid()}{int(allow_network)}"
    program = f"import os; os.execlp('sleep', 'sleep', '{seconds}')"
    if not allow_network:  # where what a program starts ends too
        program = f"import subprocess; subprocess.run(['setsid', 'sleep', '{seconds}'])"
    evaluation = subprocess.Popen([sys.executable, "-c", EVALUATION, str(int(allow_network)), program])
    deadline = time.monotonic() + 30
    while not processes_with(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(seconds)
    evaluation.kill()
    evaluation.wait()
    while processes_with(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(seconds) == []


@mortal
def test_ends_with_this_process_does_not_start_where_the_parent_is_gone(monkeypatch):
    run = {"capture_output": True, "text": True}
    assert subprocess.run([*sandbox.ends_with_this_process(), "echo", "ran"], **run).stdout == "ran\n"
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as if it had died, and the child were init's
    assert subprocess.run([*sandbox.ends_with_this_process(), "echo", "ran"], **run).stdout == ""


@isolated
def test_finishes_cannot_reach_a_socket_of_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        assert not finishes(connect)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
        assert finishes(connect, allow_network=True)
        server.settimeout(5)
        server.accept()[0].close()


@isolated
def test_finishes_sees_no_environment_and_no_process_of_this_one(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    mine = hashlib.sha256(Path("/proc/self/environ").read_bytes()).hexdigest()
    look = f"""
import glob, hashlib, os
assert "API_KEY" not in os.environ
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        seen = open(path, "rb").read()
    except OSError:
        continue
    assert hashlib.sha256(seen).hexdigest() != "{mine}"
assert {Sandbox().shows_processes} or len(glob.glob("/proc/[0-9]*")) == 1
try:
    os.kill({os.getpid()}, 0)
except ProcessLookupError:
    pass
else:
    assert False
"""
    assert finishes(look)
    assert finishes('import os; assert "API_KEY" not in os.environ', allow_network=True)


@isolated
def test_finishes_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert finishes("import os; os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.chdir('a')")
    assert list(tmp_path.iterdir()) == []


@isolated
def test_finishes_seeds_the_hashes_of_strings():
    order = "list({str(i) for i in range(50)})"
    seeded = {**os.environ, "PYTHONHASHSEED": "0"}
    expected = subprocess.run(
        [sys.executable, "-c", f"print({order})"], env=seeded, check=True, capture_output=True, text=True
    ).stdout
    assert finishes(f"assert {order} == {expected}")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_finishes_without_namespaces_keeps_the_limits():
    assert finishes("assert 1 + 1 == 2", allow_network=True)
    assert not finishes("import sys; sys.exit(0)", allow_network=True)
    assert not finishes("x = bytearray(300 << 20)", memory_mb=200, allow_network=True)
    start = time.monotonic()
    # a grandchild of its group holds every descriptor open, and ends with it
    assert not finishes("import os; os.fork(); os.fork()\nwhile True: pass", timeout=2, allow_network=True)
    assert time.monotonic() - start < 20


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_finishes_raises_where_python_does_not_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(OSError, match="did not start"):
        finishes("", allow_network=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
        ({"timeout": float("nan")}, "not nan"),
        ({"timeout": float("inf")}, "not inf"),
        ({"memory_mb": 10}, "memory_mb must be at least 64"),
    ],
)
def test_sandbox_refuses_limits(options, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**options)


def test_sandbox_refuses_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="Linux only, not on darwin"):
        Sandbox(allow_network=True)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_sandbox_refuses_a_kernel_without_namespaces(monkeypatch, tmp_path):
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    refusing.chmod(0o755)
    for found, message in (
        (str(refusing), "Operation not permitted.*--allow_network"),
        (None, "util-linux: not found"),
    ):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        sandbox._namespaces.cache_clear()
        with pytest.raises(ValueError, match=message):
            Sandbox()
        assert Sandbox(allow_network=True).finishes("")
    sandbox._namespaces.cache_clear()
