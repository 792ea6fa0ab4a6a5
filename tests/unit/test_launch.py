"""The launcher with small Python children: exit codes, signals, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.launch import adopt_slurm, cause, check_world, in_world, rank_command

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 30.0  # for processes to start or end on a busy machine
DYING_S = 10.0  # for a killed process to get its last turn there; those of the tests live for a minute
GRACE_S = 1.0

# What each rank runs: it leaves its pid, and notes in the same file whatever signals reach it.
PREAMBLE = """
import os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
notes = open(f"rank{rank}", "a", buffering=1)
def note(word): notes.write(word + "\\n")
note(str(os.getpid()))
"""
NOTE_SIGNALS = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda got, frame: note(signal.Signals(got).name))
note("ready")
"""
LAUNCH = """
import sys
from genac_megatron.launch import Launcher
sys.exit(Launcher([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), 3, grace_s=float(sys.argv[3])).run())
"""


class Launched:
    """A launcher in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path, body: str, ranks: int, grace_s: float) -> None:
        self.folder, self.ranks = folder, ranks
        script = PREAMBLE + textwrap.dedent(body)
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, script, str(ranks), str(grace_s)],
            cwd=folder, env={**environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def notes(self, rank: int) -> list[str]:
        path = self.folder / f"rank{rank}"
        return path.read_text().split() if path.exists() else []

    def wait_for(self, done: Callable[[list[str]], bool]) -> None:
        """Until every rank's notes satisfy `done`."""
        give_up = time.monotonic() + WAIT_S
        while not all(done(self.notes(rank)) for rank in range(self.ranks)):
            assert time.monotonic() < give_up, [self.notes(rank) for rank in range(self.ranks)]
            time.sleep(0.02)

    def ready(self) -> None:
        self.wait_for(lambda notes: "ready" in notes)

    def end(self) -> int:
        """The launcher's exit code; every process that left its pid must be gone, or killed and about to."""
        code = self.process.wait(WAIT_S)
        give_up = time.monotonic() + DYING_S
        for pid in self.pids():
            while alive(pid):
                assert time.monotonic() < give_up, f"{pid} outlives the launcher"
                time.sleep(0.02)
        return code

    def pids(self) -> list[int]:
        return [int(word) for rank in range(self.ranks) for word in self.notes(rank) if word.isdecimal()]


def alive(pid: int) -> bool:
    """Whether the process runs (one that is a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


Start = Callable[..., Launched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    begun: list[Launched] = []

    def start(body: str, ranks: int = 2, grace_s: float = GRACE_S) -> Launched:
        begun.append(Launched(tmp_path, body, ranks, grace_s))
        return begun[-1]

    yield start
    for one in begun:
        for pid in (one.process.pid, *one.pids()) if one.process.poll() is None else one.pids():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        one.process.communicate()


def test_each_rank_gets_its_place_in_the_world(start: Start) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    launched = start(f"for name in {names}: note(name + '=' + os.environ[name])", ranks=3)
    assert launched.end() == 0
    seen = [dict(word.split("=") for word in launched.notes(rank)[1:]) for rank in range(3)]
    assert [place["RANK"] for place in seen] == [place["LOCAL_RANK"] for place in seen] == ["0", "1", "2"]
    assert {place["WORLD_SIZE"] for place in seen} == {"3"}
    assert {place["MASTER_ADDR"] for place in seen} == {"127.0.0.1"}
    assert {place["OMP_NUM_THREADS"] for place in seen} == {"3"}
    assert len({place["MASTER_PORT"] for place in seen}) == 1


def test_the_port_where_ranks_meet_is_bound_before_any_of_them_runs(start: Start) -> None:
    """Rank 0 holds the launcher's listening socket; nobody else can take its port while ranks import."""
    launched = start(
        """
        import socket
        port, held = int(os.environ["MASTER_PORT"]), os.environ["GENAC_MEETING"]
        if rank == 0:
            listening = socket.socket(fileno=int(held))
            note("same" if listening.getsockname()[1] == port else "other")
            while not os.path.exists("tried"):
                time.sleep(0.02)
        else:
            assert held == ""
            try:
                socket.create_server(("127.0.0.1", port))
                note("free")
            except OSError:
                note("taken")
            open("tried", "w").close()
        """,
        ranks=2,
    )
    assert launched.end() == 0
    assert launched.notes(0)[1:] == ["same"]
    assert launched.notes(1)[1:] == ["taken"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 75])
def test_an_exit_code_is_passed_on(start: Start, code: int) -> None:
    assert start(f"sys.exit({code})").end() == code


def test_a_rank_that_dies_of_a_signal(start: Start) -> None:
    assert start("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)").end() == 128 + 9


def test_a_cause_that_comes_later_than_its_consequence_wins(start: Start) -> None:
    """Rank 1 says that its peer was lost, rank 0 ends a little later and says why."""
    body = "time.sleep(0 if rank else 1.0)\nsys.exit(4 if rank else 2)"
    assert start(body, grace_s=WAIT_S / 2).end() == 2, "a grace that a slow start does not use up"


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        ([4, 1, 4], 1),  # one failed by itself, such as in a write, and its peers lost it
        ([4, -9], 4),  # one was killed
        ([1, -9, 4], 4),  # and a third made something else of it
        ([1, -6, 4], 1),  # NCCL's watchdog ends the peers of one that failed
        ([4, 2, 1], 2),
        ([75, 4], 75),
        ([4, 4], 4),
        ([-9], None),
        ([5, -11], None),
    ],
)
def test_what_the_ends_of_several_ranks_follow_from(ends: list[int], wanted: int | None) -> None:
    assert cause(ends) == cause(ends[::-1]) == wanted


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_failed_by_itself_wins_over_its_peers_loss(start: Start, first: int) -> None:
    """Whichever leaves first: a rank's end takes long, and its peers may notice it before."""
    body = f"time.sleep(1.0 if rank == {first} else 0)\nsys.exit(1 if rank else 4)"
    assert start(body, grace_s=WAIT_S).end() == 1


PARENT = """
import subprocess, sys, threading
child = "import os, sys, time; from genac_megatron.launch import end_with; " \
    "end_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)"
import os
started = []
def start():  # by a thread that ends: the kernel would take that for the parent's end
    started.append(subprocess.Popen([sys.executable, "-c", child, str(os.getpid())], stdout=subprocess.PIPE))
thread = threading.Thread(target=start); thread.start(); thread.join()
print(started[0].stdout.readline().decode().strip(), flush=True)
input()
"""


def test_a_helper_ends_with_the_process_that_started_it_however_that_ends() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    helper = int(parent.stdout.readline())
    time.sleep(1.0)
    assert alive(helper)
    parent.kill()
    parent.communicate()
    give_up = time.monotonic() + WAIT_S
    while alive(helper):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_the_first_failure_wins_and_the_others_are_ended_after_the_grace(start: Start) -> None:
    """Rank 0 goes on and ends by itself, with another code; rank 2 ignores what it is told."""
    launched = start(
        """
        if rank == 2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("ready")
        while not all(os.path.exists(f"rank{r}") and "ready" in open(f"rank{r}").read() for r in range(3)):
            time.sleep(0.02)
        if rank == 1:
            sys.exit(3)
        time.sleep(0.5 if rank == 0 else 60)
        sys.exit(2)
        """,
        ranks=3,
    )
    launched.ready()
    began = time.monotonic()
    assert launched.end() == 3
    assert 0.5 < time.monotonic() - began < 20.0  # the grace, then SIGTERM, and 5 s later SIGKILL


def test_a_rank_may_end_by_itself_within_the_grace(start: Start) -> None:
    """It is about to save: nobody ends it while it does."""
    launched = start(NOTE_SIGNALS + "if rank == 0: sys.exit(4)\ntime.sleep(1); note('saved')", grace_s=20)
    began = time.monotonic()
    assert launched.end() == 4
    assert launched.notes(1)[1:] == ["ready", "saved"]
    assert time.monotonic() - began < 15.0


def test_of_failures_at_once_one_that_says_why_wins(start: Start) -> None:
    """Rank 1 names what is wrong; rank 0 loses its peer right after, mostly within the same poll."""
    launched = start(
        """
        note("ready")
        while not all(os.path.exists(f"rank{r}") and "ready" in open(f"rank{r}").read() for r in range(2)):
            time.sleep(0.001)
        if rank == 1:
            os._exit(2)
        peer = int(open("rank1").read().split()[0])
        while os.path.exists(f"/proc/{peer}") and ") Z " not in open(f"/proc/{peer}/stat").read():
            time.sleep(0.001)
        os._exit(1)
        """
    )
    assert launched.end() == 2


def test_a_ctrl_c_reaches_every_rank_once(start: Start) -> None:
    """The terminal signals the launcher's whole group; ranks are not in it."""
    launched = start(NOTE_SIGNALS + "while 'SIGINT' not in open(f'rank{rank}').read(): time.sleep(0.02)\n"
                     "time.sleep(0.5); sys.exit(75)", ranks=3)  # fmt: skip
    launched.ready()
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.end() == 75
    for rank in range(3):
        assert launched.notes(rank)[1:] == ["ready", "SIGINT"]
    assert launched.process.stdout is not None
    assert launched.process.stdout.read().count("press Ctrl-C again") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_schedulers_signal_is_passed_on(start: Start, name: str) -> None:
    launched = start(NOTE_SIGNALS + f"while '{name}' not in open(f'rank{{rank}}').read(): time.sleep(0.02)\n"
                     "sys.exit(75)")  # fmt: skip
    launched.ready()
    launched.process.send_signal(getattr(signal, name))
    assert launched.end() == 75
    assert [launched.notes(rank)[1:] for rank in range(2)] == [["ready", name]] * 2


def test_a_second_ctrl_c_leaves_even_where_ranks_do_not_listen(start: Start) -> None:
    """A rank inside a collective runs no handler."""
    launched = start(NOTE_SIGNALS + "time.sleep(60)")
    launched.ready()
    launched.process.send_signal(signal.SIGINT)
    launched.wait_for(lambda notes: notes.count("SIGINT") == 1)
    assert launched.process.poll() is None
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == 130


def test_helpers_of_a_rank_are_ended_too(start: Start) -> None:
    launched = start(
        """
        if rank == 0:
            helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            note(str(helper.pid))
        note("ready")
        while not all(os.path.exists(f"rank{r}") and "ready" in open(f"rank{r}").read() for r in range(2)):
            time.sleep(0.02)
        if rank == 1:
            sys.exit(2)
        time.sleep(60)
        """
    )
    launched.ready()
    assert len(launched.pids()) == 3
    assert launched.end() == 2


def test_helpers_of_a_rank_that_is_gone_already_are_ended_too(start: Start) -> None:
    launched = start(
        """
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        note(str(helper.pid))
        os._exit(3)
        """
    )
    launched.wait_for(lambda notes: len(notes) == 2)
    assert launched.end() == 3
    assert len(launched.pids()) == 4


def test_ranks_are_told_when_the_launcher_is_killed(start: Start) -> None:
    """They may still save; a real rank takes SIGTERM as a request to stop."""
    launched = start(
        "from genac_megatron.launch import follow_launcher\nfollow_launcher()" + NOTE_SIGNALS
        + "while 'SIGTERM' not in open(f'rank{rank}').read(): time.sleep(0.02)\nnote('saved')"
    )  # fmt: skip
    launched.ready()
    launched.process.kill()
    launched.wait_for(lambda notes: notes[1:] == ["ready", "SIGTERM", "saved"])


def test_a_command_that_cannot_start_leaves_no_ranks(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(
        """
        from genac_megatron.launch import Launcher
        try:
            Launcher(["/nowhere/python"], 2, 1).run()
        except FileNotFoundError:
            sys.exit(9)
        """
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=WAIT_S).returncode == 9


# --- worlds that others started ------------------------------------------------------------------

SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"RANK": "0"}, True),
        (SRUN, True),
        (SRUN | {"SLURM_STEP_ID": "12"}, True),
        # srun of a single task: start ranks here
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, False),
        (BATCH, False),  # a batch script without srun
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, False),  # the batch step, as some versions number it
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, False),  # salloc's interactive step
        (BATCH | {"SLURM_STEP_ID": "4294967292"}, False),  # the extern step: ssh into a job's node
        (BATCH | {"SLURM_STEP_ID": "batch"}, False),
        (BATCH | {"RANK": "0"}, True),  # torchrun in a batch script
        ({"SLURM_NTASKS": "8"}, False),  # a shell of salloc
    ],
)
def test_in_world(environ: dict[str, str], wanted: bool) -> None:
    assert in_world(environ) is wanted


def test_srun_gives_ranks_their_place() -> None:
    assert adopt_slurm(SRUN | MASTER) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    no_local = {k: v for k, v in (SRUN | MASTER).items() if k != "SLURM_LOCALID"}
    assert adopt_slurm(no_local)["LOCAL_RANK"] == "0"
    assert adopt_slurm({}) == {}
    assert adopt_slurm(BATCH) == {}
    assert adopt_slurm(SRUN | MASTER | {"RANK": "2"}) == {}, "torchrun knows better"


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_srun_without_a_meeting_place(missing: str) -> None:
    environ = {k: v for k, v in (SRUN | MASTER).items() if k != missing}
    with pytest.raises(InputError, match="export them in the batch script") as raised:
        adopt_slurm(environ)
    assert "unset SLURM_STEP_ID" in str(raised.value)  # a notebook that is a task of srun
    environ.pop("SLURM_STEP_ID")
    assert adopt_slurm(environ) == {}
    assert not in_world(environ)


def test_a_ranks_command() -> None:
    assert rank_command(["run", "x.yaml"]) == [sys.executable, "-m", "genac_megatron", "run", "x.yaml"]


WORLD = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "told", "agreed"),
    [
        ({}, "the recipe wants 2 ranks, 1 were started", True),
        ({"WORLD_SIZE": "4", "RANK": "3"}, "the recipe wants 2 ranks, 4 were started", True),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, of a WORLD_SIZE of 2", True),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": ""}, "no MASTER_ADDR", False),
        ({"WORLD_SIZE": ""}, "RANK=0, no WORLD_SIZE", False),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT=http", False),
        ({"RANK": "first"}, "RANK=first", False),
    ],
)
def test_a_world_that_a_platform_has_preset_is_told_with_a_way_out(
    changes: dict[str, str], told: str, agreed: bool
) -> None:
    with pytest.raises(InputError) as raised:
        check_world(2, {**WORLD, **changes})
    assert told in str(raised.value)
    assert "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT" in str(raised.value)
    assert raised.value.agreed is agreed, "what only this rank may know, it tells"
    check_world(2, {**WORLD, "WORLD_SIZE": "2", "RANK": "1"})
