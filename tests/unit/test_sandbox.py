"""What a program may do in the sandbox, and what it may not: real programs, each in a jail of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from genac_megatron.environments import make_environment, sandbox
from genac_megatron.environments.base import EnvironmentFault
from genac_megatron.environments.host import Job, digest
from genac_megatron.environments.jail import WORK
from genac_megatron.environments.sandbox import JAIL, MOST_BYTES, Wanted, need_sandbox, run_python, seen_paths
from genac_megatron.environments.tools import Tools
from genac_megatron.errors import InputError
from genac_megatron.recipe.environments import EnvironmentConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from tests.unit.test_conversations import PROMPT
from tests.unit.test_tools import call

REPOSITORY = Path(__file__).parents[2]
SECONDS, MIB = 20.0, 256


@pytest.fixture(scope="module")
def why_not() -> str:
    """What this machine says to shutting a program in; empty where it does."""
    try:
        need_sandbox()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def machine_that_can(request: pytest.FixtureRequest, why_not: str) -> None:
    """Most containers allow no namespaces: there what is refused is tested, and nothing else can be."""
    if why_not and request.function is not test_where_nothing_can_be_shut_in_nothing_is_run:
        pytest.skip(why_not)


def run(code: str, seconds: float = SECONDS) -> str:
    return run_python(code, seconds, MIB)


def refused(code: str) -> str:
    """What an attempt raises, by the program's own words; it must not succeed."""
    indented = "\n".join(f"    {line}" for line in code.splitlines())
    tried = f"try:\n{indented}\n    print('DONE')\nexcept BaseException as e:\n    print(type(e).__name__, e)"
    found = run(tried)
    assert "DONE" not in found
    return found


def test_a_program_prints() -> None:
    assert run("import math\nprint(math.factorial(20))\nprint('é')") == "2432902008176640000\né"
    assert run("x = 1") == "[ended with 0, and printed nothing]"
    assert run("import sys; sys.exit(3)") == "[ended with 3, and printed nothing]"
    failed = run("print('so far')\n1 / 0")
    assert failed.startswith("so far\nTraceback")
    assert failed.endswith("ZeroDivisionError: division by zero")
    assert "SyntaxError" in run("print(")
    assert run("print(1)\0") == "SyntaxError: source code cannot contain null bytes"
    assert run("print('half \ud83d')") == "half ?"
    assert run("import sympy; print(sympy.factor('x**2 - 1'))") == "(x - 1)*(x + 1)", "packages are seen"


DEAF = (
    "import signal, time\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\ntime.sleep(99)"
)
SILENT = "import os, time; os.close(1); os.close(2); time.sleep(99)"


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(99)", SILENT, DEAF])
def test_a_program_is_ended_in_time(code: str) -> None:
    began = time.monotonic()
    assert run(code, 0.5) == "[ended after 0.5 s]"
    assert time.monotonic() - began < SECONDS


def test_memory_is_bounded() -> None:
    assert refused("x = bytearray(1 << 30)").startswith("MemoryError")
    assert refused("import mmap\nx = mmap.mmap(-1, 1 << 30)").startswith("OSError")
    grown = run("x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert "MemoryError" in grown
    assert "not permitted" in refused("import os\nos.memfd_create('a')")
    attached = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    assert run(f"{attached}print(libc.shmget(0, 1 << 20, 0o1600), ctypes.get_errno())") == "-1 1"


def test_what_it_prints_and_writes_is_bounded() -> None:
    flood = run("while True: print('x' * 10000)")
    assert flood.endswith(f"\n[ended: it printed more than {MOST_BYTES >> 10} KiB]")
    assert len(flood) < MOST_BYTES + 99
    assert "OSError" in refused("open('big', 'wb').write(bytes(1 << 24))")
    disk = "n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(1 << 20))\n    n += 1"
    assert "No space left" in refused(disk)
    assert run("open('mine', 'w').write('kept')\nprint(open('mine').read())") == "kept"
    assert "No such file" in refused("open('mine')"), "nothing is left of the one before"


def test_a_fork_bomb_does_not_begin() -> None:
    before = set(psutil.pids())
    assert "PermissionError" in refused("import os\nwhile True: os.fork()")
    assert "Error" in refused("import subprocess\nsubprocess.run(['/bin/true'])")
    assert "thread" in refused("import threading\nthreading.Thread(target=print).start()")
    now = [p.info for p in psutil.process_iter(["pid", "cmdline"])]  # also of those that end meanwhile
    assert [one for one in now if one["pid"] not in before and "main.py" in (one["cmdline"] or ())] == []


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "PermissionError" in refused(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
    for family in ("AF_UNIX", "AF_NETLINK", "AF_VSOCK", "AF_PACKET"):
        made = f"import socket\nsocket.socket(socket.{family}, socket.SOCK_DGRAM)"
        assert "PermissionError" in refused(made), family
    loop = "import asyncio\nasync def f(): return 4\nprint(asyncio.run(f()))"
    assert run(loop) == "4", "an event loop needs a pair of sockets, and has it"


def test_nothing_of_the_machine_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o644)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    home, here = os.path.expanduser("~"), REPOSITORY / "README.md"
    for path in (secret, here, "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/fd", "/sys",
                 f"{home}/.bashrc", "/root/.ssh", "/dev/sda", "/dev/mem", "/dev/shm", "/tmp"):  # fmt: skip
        assert "No such file" in refused(f"open({str(path)!r})"), path
    seen = "import os\nprint(sorted(os.environ), os.getcwd(), os.getppid() != 0, sorted(os.listdir('/')))"
    shown = run(seen)
    assert "WANDB" not in shown
    assert "proc" not in shown
    assert repr(WORK.lstrip("/")) in shown
    assert run("import os; print([n for n in range(3, 60) if os.path.exists(f'/dev/fd/{n}')])") == "[]"
    held = (
        "import os\nfor n in range(3, 64):\n    try: os.fstat(n); print(n)\n    except OSError: pass\nprint()"
    )
    assert "printed nothing" in run(held), "no descriptor but the three"


def test_an_interpreter_may_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "mine").write_text("seen")
        monkeypatch.setattr(sandbox, "seen_paths", lambda: [*seen_paths(), folder])
        assert run(f"print(open({folder!r} + '/mine').read(), len(open('/dev/null').read()))") == "seen 0"
    assert run("import os\nprint(os.getcwd())") == WORK
    assert not Path(WORK).exists(), "of no machine's own folders"


def test_nothing_of_the_machine_is_written() -> None:
    for path in (sys.prefix, "/usr", "/usr/lib", "/", "/dev"):
        assert "Error" in refused(f"open({path!r} + '/mine', 'w')"), path
    assert not (Path(sys.prefix) / "mine").exists()
    assert "Error" in refused("import os\nos.chmod('/usr', 0o777)")
    libc = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    calls = (
        f"mount(b'tmpfs', b'{WORK}', b'tmpfs', 0, None)", "mount(b'none', b'/', None, 4128, None)",
        f"umount2(b'{WORK}', 2)", "unshare(0x10000000)", "ptrace(0, 0, 0, 0)",
    )  # fmt: skip
    for what in calls:
        assert run(f"{libc}print(libc.{what}, ctypes.get_errno())") == "-1 1", what
    assert "PermissionError" in refused("import os\nos.setuid(0)")


def test_other_processes_are_out_of_reach() -> None:
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        assert "ProcessLookupError" in refused(f"import os\nos.kill({other.pid}, 9)")
        assert "ProcessLookupError" in refused(f"import os\nos.kill({os.getpid()}, 9)")
        everyone = "import os, signal\nos.kill(-1, signal.SIGKILL)"
        assert "ended by SIGKILL" in run(everyone) or "Error" in run(everyone)
        run("import os\nos.kill(1, 9)\nos.killpg(0, 9)")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert run("print('still')") == "still"


def test_it_ends_with_who_started_it() -> None:
    """Also where that is killed, and the program has asked not to be."""
    ask = (
        "from genac_megatron.environments.sandbox import run_python\n"
        "run_python('import ctypes, os, time\\nctypes.CDLL(None).prctl(1, 0)\\nos.setsid()\\n"
        'open("mine", "w")\\ntime.sleep(77)\', 90, 256)'
    )
    parent = subprocess.Popen([sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    seen = psutil.Process(parent.pid)
    try:
        until = time.monotonic() + 60
        inside: list[psutil.Process] = []
        while not any("main.py" in p.cmdline() for p in inside) and time.monotonic() < until:
            time.sleep(0.02)
            inside = seen.children(recursive=True)
        assert len(inside) == 3
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(inside, timeout=10)
    assert not alive


def test_without_rights_of_ones_own_it_takes_a_namespace_of_users() -> None:
    """As a user who may nothing: the system's interpreter, which such a one may read."""
    if os.getuid() != 0:
        pytest.skip("the other tests run as such a user")
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("no interpreter that everyone may read")
    code = (
        "import os\nprint(os.getuid(), sorted(os.listdir('/')))\ntry: os.fork()\n"
        "except OSError as e: print(e)\ntry: open('/etc/passwd')\nexcept OSError as e: print(e)\n"
        "import time\nos.kill(1, 2)\ntime.sleep(0.3)"
    )
    asked = json.dumps(vars(Wanted(code, SECONDS, MIB, python, seen_paths())))
    read, write = os.pipe()
    outer = f"import subprocess, os, sys\nsubprocess.run([{python!r}, '-I', '-S', '-c', sys.argv[1], " \
            f"'{write}', str(os.getpid())], pass_fds=({write},), stdin=0)"  # fmt: skip
    done = subprocess.run(
        [python, "-I", "-S", "-c", outer, JAIL.read_text()], input=asked, text=True, capture_output=True,
        user=65534, group=65534, extra_groups=[], pass_fds=(write,), cwd="/", check=False,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as told:
        line = told.readline()
    if "unshare" in line:
        pytest.skip(f"this kernel has no namespaces of users: {line}")
    assert json.loads(line) == {"code": 0}, done.stderr
    assert done.stdout.splitlines()[0].startswith("65534 ['bin', 'dev'") or "'usr'" in done.stdout
    assert "not permitted" in done.stdout
    assert "No such file" in done.stdout


def test_where_nothing_can_be_shut_in_nothing_is_run() -> None:
    """In a process that may not leave its namespaces, as in most containers."""
    ask = (
        "import platform\nfrom genac_megatron.environments import jail, sandbox\n"
        "machine = platform.machine()\n"
        "jail.CALLS = {machine: {'unshare': jail.CALLS[machine]['unshare']}}\njail.deny()\n"
        "sandbox.need_sandbox()"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert "shuts no program in, and none is run that is not" in done.stderr
    assert "unshare (namespaces): Operation not permitted" in done.stderr
    assert done.stdout == ""


def test_the_refusal_has_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "seen_paths", list)  # no interpreter in sight
    with pytest.raises(EnvironmentFault, match=r"could not shut a program in: .*No such file"):
        run("print(1)")
    with pytest.raises(InputError, match="shuts no program in") as told:
        need_sandbox()
    assert "leave the tool python out" in str(told.value)


def test_memory_that_is_too_little_for_any_program_is_refused() -> None:
    with pytest.raises(InputError, match="shuts no program in") as told:
        need_sandbox(4)
    assert "raise environment.sandbox_mib" in str(told.value)


def test_an_interpreter_behind_a_link_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a package manager's folder names its newest version."""
    link = tmp_path / "env"
    link.symlink_to(sys.prefix)
    for name in ("prefix", "exec_prefix"):
        monkeypatch.setattr(sys, name, str(link))
    monkeypatch.setattr(sys, "executable", str(link / "bin" / Path(sys.executable).name))
    assert run("import numpy; print(6 * 7)") == "42"


def test_programs_of_a_turn_share_its_time() -> None:
    tools = Tools(["python"], 4.0, MIB)
    turn = call("python", code="print(6 * 7)") + call("python", code="import time; time.sleep(9)")
    shown = tools.step(turn + call("python", code="print(1)") + call("python", program="1"))
    contents = [message["content"] for message in shown.observation]  # type: ignore[index]
    assert contents[0] == "42"
    assert re.fullmatch(r"\[ended after [0-3]\.\d+ s\]", contents[1]), "what the first has left"
    assert contents[2] == "error: the programs of a turn have 4 s together, and they are over"
    assert contents[3] == "error: the arguments of python lack 'code'"


def test_an_environment_of_programs_needs_no_turns_again() -> None:
    config = EnvironmentConfig(kind="tools", tools=["python"], step_s=30.0)
    environment = make_environment(config, StateTrackingTask(kind="state_tracking"))
    try:
        turns = (call("python", code="import time; print(time.time())"), call("python", code="print(2)"))
        job = Job("a", PROMPT, 0, turns, digest(None), ("what an answer of another time was",))
        answer = asyncio.run(environment.ask(job))
        assert answer.step is not None, answer.failure
        assert answer.step.messages == (("tool", "2"),)
    finally:
        environment.close()
