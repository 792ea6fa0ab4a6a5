"""The batch scripts where no Slurm is: syntax, headers, and what each runtime makes of a command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from genac_megatron.cluster import script
from genac_megatron.cluster.heartbeat import write
from genac_megatron.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
TRAINING = sorted([*FOLDER.glob("genac_*.sh"), FOLDER / "smoke.sh"])


def bash(text: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["bash", "-c", text], env=path | environ, capture_output=True, text=True, cwd=FOLDER
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", *(f"slurm/{path.name}" for path in SCRIPTS)],
        capture_output=True, text=True, cwd=FOLDER.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["evaluate.sh", "convert.sh"])
def test_headers_of_what_is_requeued_and_goes_on(name: str) -> None:
    text = (FOLDER / name).read_text()
    for line in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text, line
    assert "genac_alone" in text


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_headers(path: Path) -> None:
    text = path.read_text()
    for line in ("--signal=B:USR1@300", "--requeue", "--open-mode=append", "--nodes=1"):
        assert f"#SBATCH {line}\n" in text, line
    assert "set -euo pipefail\n" in text
    assert "genac_job" in text


FINDS = [path for path in SCRIPTS if "scontrol show job" in path.read_text() and path.name != "common.sh"]


@pytest.mark.parametrize("arguments", ["", " -- a.b=c/d.sh 'x y'/e.sh", " to-hf /a/b.sh c"])
@pytest.mark.parametrize("path", FINDS, ids=lambda path: path.name)
def test_a_mocked_scontrol_tells_where_a_clone_with_spaces_is(
    tmp_path: Path, path: Path, arguments: str
) -> None:
    """Slurm runs a copy of the script from its spool; tests/slurm asks the real scontrol."""
    clone, spool = tmp_path / "my  clone/x.sh y" / "slurm", tmp_path / "spool"
    for folder in (clone, spool, tmp_path / "bin"):
        folder.mkdir(parents=True)
    (clone / "common.sh").write_text("echo found; genac_job() { :; }; genac_alone() { :; }\n")
    (spool / "slurm_script").write_text(path.read_text())
    (tmp_path / "bin" / "scontrol").write_text(
        "#!/bin/sh\ncat <<'END'\nJobId=7 JobName=x\n"
        f"   Command={clone}/{path.name}{arguments}\n   WorkDir=/\nEND\n"
    )
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    done = subprocess.run(
        ["bash", str(spool / "slurm_script")], capture_output=True, text=True,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "GENAC_HOME": "", "SLURM_JOB_ID": "7"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


@pytest.mark.parametrize("path", FINDS, ids=lambda path: path.name)
def test_without_slurm_a_script_finds_its_own_folder(tmp_path: Path, path: Path) -> None:
    (tmp_path / "my clone").mkdir()
    (tmp_path / "my clone" / "common.sh").write_text("echo found; genac_job() { :; }; genac_alone() { :; }\n")
    script = tmp_path / "my clone" / path.name
    script.write_text(path.read_text())
    done = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "GENAC_HOME": ""}
    )
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("run-1", "run-1"),
        ("my run", '"my run"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("run #2", '"run \\#2"'),
        ("it's", '"it\'s"'),
        ("24:00:00", "24:00:00"),
    ],
)
def test_a_value_of_an_sbatch_line_is_quoted(value: str, line: str) -> None:
    text = script._with_option("#!/bin/bash\n#SBATCH --job-name=x\n", "job-name", value)
    assert text == f"#!/bin/bash\n#SBATCH --job-name={line}\n"


def test_a_line_break_is_in_no_sbatch_line() -> None:
    with pytest.raises(InputError, match="line break"):
        script._with_option("#SBATCH --job-name=x\n", "job-name", "a\nb")


def test_a_container_mounts_no_folder_with_a_comma(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    done = bash(
        f"cd '{tmp_path}/a,b'; . '{FOLDER}/common.sh'; set_runtime", GENAC_RUNTIME="pyxis", GENAC_IMAGE="x"
    )
    assert done.returncode == 2
    assert "a comma or a colon" in done.stderr


SHOW = 'SLURMD_NODENAME=n1; . ./common.sh; set_runtime; printf "%s " "${alone[@]}"'


def test_venv() -> None:
    assert bash(SHOW, GENAC_PYTHON="/env/bin/python").stdout == "/env/bin/python -m genac_megatron "


def test_apptainer() -> None:
    done = bash(
        SHOW, GENAC_RUNTIME="apptainer", GENAC_IMAGE="x.sif", GENAC_MOUNTS="/data:/d", GENAC_PYTHON="python"
    )
    mounts = f"{FOLDER.parent},{FOLDER},/data:/d"
    assert (
        done.stdout == f"apptainer exec --nv --pwd {FOLDER} --bind {mounts} x.sif python -m genac_megatron "
    )


def test_pyxis() -> None:
    environ = {"GENAC_RUNTIME": "pyxis", "GENAC_IMAGE": "x.sqsh", "GENAC_MOUNTS": "/data:/d,/more"}
    text = bash(SHOW, **environ).stdout
    home = FOLDER.parent
    assert f"--container-mounts={home}:{home},{FOLDER}:{FOLDER},/data:/d,/more:/more" in text
    assert text.startswith("srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n1 ")
    assert "--container-image=x.sqsh" in text
    assert text.endswith("python3 -m genac_megatron ")


@pytest.mark.parametrize(
    ("environ", "said"),
    [({"GENAC_RUNTIME": "docker"}, "GENAC_RUNTIME is 'docker'"), ({"GENAC_RUNTIME": "pyxis"}, "GENAC_IMAGE")],
)
def test_a_wrong_runtime_is_told(environ: dict[str, str], said: str) -> None:
    done = bash(SHOW, **environ)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_missing_recipe_is_told() -> None:
    done = bash(". ./common.sh; find_recipe", RECIPE="none.yaml")
    assert done.returncode == 2
    assert "there is no recipe none.yaml" in done.stderr


@pytest.mark.parametrize(
    ("codes", "of_srun", "meant"),
    [
        ([0, 0], 0, 0),
        ([1, 4], 143, 1),  # one failed in a write of its own, the other lost it, srun ended that one
        ([4, None], 137, 4),  # one was killed
        ([3, 4], 4, 3),
        ([75, 75], 75, 75),
        ([None, None], 137, 137),
    ],
)
def test_a_job_ends_with_the_code_that_a_rank_meant(
    tmp_path: Path, codes: list[int | None], of_srun: int, meant: int
) -> None:
    (tmp_path / "heartbeats").mkdir()
    for rank, code in enumerate(codes):
        beat = {"rank": rank, "state": "running" if code is None else "ended", "code": code, "idle_s": 1.0}
        write(tmp_path / f"heartbeats/rank-{rank:05d}.json", beat)
    done = bash(f". ./common.sh; said_code {of_srun}", GENAC_LOGS=str(tmp_path))
    assert done.stdout.strip() == str(meant), done.stderr


STUBBORN = "trap '' USR1 TERM; sleep 77 & sleep 77"
LEAVES = "trap 'exit 75' USR1; sleep 77 & wait"
ALONE = """
. ./common.sh
set_runtime() { alone=(bash -c "$COMMAND"); }
scontrol() { echo "scontrol $*"; }
(sleep 1; kill -s "$SIGNAL" $$) &
genac_alone evaluate
"""


@pytest.mark.parametrize(
    ("command", "sent", "code", "said", "requeued"),
    [
        (LEAVES, "USR1", 75, "leaving at the next safe point", True),
        ("sleep 77", "USR1", 75, "ended with code 138", True),  # asked before it could take signals
        (STUBBORN, "USR1", 137, "no safe point within 2 s", False),
        (LEAVES, "TERM", 143, "ended with code 143", False),
        ("trap '' USR1; sleep 2; exit 3", "USR1", 3, "ended with code 3", False),
    ],
    ids=["leaves", "too early", "stubborn", "cancelled", "a gate"],
)
def test_one_command_that_is_asked_to_stop(
    command: str, sent: str, code: int, said: str, requeued: bool
) -> None:
    """Requeued where it left as asked; ended, and not requeued, where it did not. Nothing of it is left."""
    patience = "2" if command == STUBBORN else "60"
    grace = {"GENAC_GRACE_S": patience, "GENAC_LEAVE_S": "1", "SLURM_JOB_ID": "test-72"}
    done = bash(ALONE, COMMAND=command, SIGNAL=sent, **grace)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
    assert ("scontrol requeue test-72" in done.stdout) == requeued
    assert not [folder for folder in Path("/proc").glob("[0-9]*") if marked(folder, f"test-72-r0:{FOLDER}")]


def marked(process: Path, attempt: str) -> bool:
    try:
        return f"GENAC_RANK_OF={attempt}".encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def test_leftovers_of_an_attempt_are_ended_and_no_others() -> None:
    """Daemons that left their session, as a server that lost its parent would."""
    started = {
        attempt: subprocess.Popen(["sleep", "60"], env={"GENAC_RANK_OF": attempt}, start_new_session=True)
        for attempt in ("test-71-r0", "test-71-r1")
    }
    try:
        done = subprocess.run(
            ["bash", str(FOLDER / "reap.sh"), "test-71-r0"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "ended 1 leftover process(es) of attempt test-71-r0" in done.stdout
        assert started["test-71-r0"].wait(10) == -9
        assert started["test-71-r1"].poll() is None
    finally:
        for process in started.values():
            process.kill()
            process.wait()
