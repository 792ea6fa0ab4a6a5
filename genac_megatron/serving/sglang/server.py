"""One SGLang server as a child of this process: its command line, start, health and end.

The server runs in an environment of its own (`python tools/env.py serve`) by way of boot.py there. It ends
when this process does, however that comes about. Nothing here imports sglang.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from genac_megatron.errors import InputError, PeerLost
from genac_megatron.platform import socket_folder
from genac_megatron.platform.network import family
from genac_megatron.serving.sglang.boot import CORES, KEY, group_members, shared_files

BOOT = Path(__file__).with_name("boot.py")
PYTHON_VARIABLE = "GENAC_SERVE_PYTHON"
ZYGOTE_LIMIT_S = 300.0  # to import SGLang, on a busy machine
FORK_LIMIT_S = 60.0
END_LIMIT_S = 20.0  # for processes to be gone after SIGKILL
POLL_S = 0.1
PROBE_S = 5.0
TAIL_LINES = 12
SCRATCH = "genac-"  # and 8 characters of mkdtemp's: a server's TMPDIR
SOCKETS = 48  # bytes for those and what SGLang and multiprocessing call sockets in it, 41 at most in 0.5.23
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# A CPU has none of what the other choices need; without the overlap scheduler it is also faster there.
CPU_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-overlap-schedule", "--skip-server-warmup"),
    "--sleep-on-idle",  # else an idle server takes a whole core from the trainer
)


@dataclass(frozen=True)
class ServerSpec:
    """What a server is started with. Its model folder needs a config.json alone with load_format "dummy"."""

    name: str  # for messages: "actor/0"
    model: Path
    port: int
    dtype: Literal["fp32", "bf16"] = "bf16"
    tp: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    host: str = "127.0.0.1"
    key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    load_format: str = "dummy"  # random weights until the first publication; "auto" reads the folder's
    mem_fraction: float = 0.3  # of the memory, for weights and KV cache
    max_running: int | None = 64  # requests decoded together; None: SGLang's own, 2,048 and more on a GPU
    max_tokens: int | None = None  # in the KV cache; None: as many as fit, which a CPU server cannot tell
    args: tuple[str, ...] = ()  # more of SGLang's; they come last, so they win
    env: Mapping[str, str] = field(default_factory=dict)  # more variables, for example CUDA_VISIBLE_DEVICES
    cores: tuple[int, ...] = ()  # hardware threads that it runs on; none: those of this process
    # Of a server that spans nodes, this node's part: how many there are, which it is (the first one answers
    # requests), and where their ranks meet, "host:port" of the first
    nnodes: int = 1
    node_rank: int = 0
    meeting: str = ""

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def arguments(self) -> list[str]:
        """SGLang's command line, the key left out. Token ids in and out: no tokenizer is loaded."""
        given = {
            "--model-path": self.model,
            "--load-format": self.load_format,
            "--dtype": DTYPES[self.dtype],
            "--tp": self.tp,
            "--host": self.host,
            "--port": self.port,
            "--mem-fraction-static": self.mem_fraction,
            "--log-level-http": "warning",
            # A request names its stop tokens. A model's own would stop it too; llama's default is token 2.
            "--json-model-override-args": '{"eos_token_id": null}',
        }
        if self.nnodes > 1:
            given |= {
                "--nnodes": self.nnodes,
                "--node-rank": self.node_rank,
                "--dist-init-addr": self.meeting,
            }
        limits = {"--max-running-requests": self.max_running, "--max-total-tokens": self.max_tokens}
        given |= {name: limit for name, limit in limits.items() if limit is not None}
        pairs = [str(part) for pair in given.items() for part in pair]
        cpu = CPU_ARGS if self.device == "cpu" else ()
        return [*pairs, "--skip-tokenizer-init", *cpu, *self.args]

    def environment(self) -> dict[str, str]:
        """Variables on top of this process's own."""
        cores = self.cores or sorted(os.sched_getaffinity(0))
        bind = {"SGLANG_CPU_OMP_THREADS_BIND": cpu_groups(self.tp, cores)}
        own = {KEY: self.key} | ({CORES: ",".join(map(str, self.cores))} if self.cores else {})
        return own | (bind if self.device == "cpu" and self.tp > 1 else {}) | dict(self.env)


def cpu_groups(ranks: int, cores: Sequence[int]) -> str:
    """SGLang's binding of tensor-parallel ranks to cores, "0-1|2-3": it has no default beyond NUMA nodes."""
    each = max(1, len(cores) // ranks)
    groups = [[cores[(rank * each + n) % len(cores)] for n in range(each)] for rank in range(ranks)]
    return "|".join(",".join(map(str, sorted(group))) for group in groups)


def serving_python(configured: str | None = None) -> Path:
    """The interpreter of the serving environment. Raises InputError where there is none."""
    found = configured or os.environ.get(PYTHON_VARIABLE)
    if not found or not os.access(found, os.X_OK):
        raise InputError(
            f"{found} is no interpreter" if found else "the interpreter of SGLang's environment is not known",
            where="engine.python",
            way_out=f"`make serve-env` builds and prints it: set engine.python, or export {PYTHON_VARIABLE}",
        )
    return Path(found)


class Zygote:
    """For CPU machines: a process that imported SGLang once and forks servers in seconds."""

    def __init__(self, python: Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [str(python), "-W", "ignore", str(BOOT), "zygote", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=_clean_environment(env or {}),
                start_new_session=True,
            )
        self._pending = b""
        self._ready = False

    def fork(self, arguments: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
        """Process id (and group) of a new server. Raises PeerLost where the zygote is gone or silent."""
        if not self._ready:  # the imports went on meanwhile
            self._answer(ZYGOTE_LIMIT_S, "to import SGLang")
            self._ready = True
        asked = json.dumps({"args": list(arguments), "log": str(log), "env": dict(env)})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(asked.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost("has ended") from error
        return int(self._answer(FORK_LIMIT_S, "to fork a server")["pid"])

    def close(self) -> None:
        """End it. Servers that still run follow within a second."""
        _end_group(self._process.pid)
        self._process.wait(END_LIMIT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self, limit_s: float, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left = until - time.monotonic()
            if left <= 0:
                raise self._lost(f"took more than {limit_s:.0f} s {what}")
            if select.select([self._process.stdout], [], [], min(left, 1.0))[0]:
                got = os.read(self._process.stdout.fileno(), 65536)
                if not got:
                    raise self._lost(f"ended before it came {what}")
                self._pending += got
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise self._lost(f"said {line[:200]!r}") from error
        return answer

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(f"{what}; its log ends:\n{tail(self.log)}", where="SGLang zygote")


class Server:
    """One server process tree. Without a zygote it imports SGLang itself, which takes a minute on a CPU."""

    def __init__(
        self, spec: ServerSpec, log: Path, *, python: Path | None = None, zygote: Zygote | None = None
    ) -> None:
        self.spec, self.log = spec, log
        self._python, self._zygote = python, zygote
        self._child: subprocess.Popen[bytes] | None = None  # where it is ours, not the zygote's
        self._pid: int | None = None
        self._scratch: Path | None = None
        self._shared: set[str] = set()  # files of its shared memory, which outlive it

    @property
    def pid(self) -> int | None:
        """Process id, and process group, of the running server."""
        return self._pid

    def start(self) -> None:
        """Start it and return at once. Raises PeerLost where its port is taken."""
        assert self._pid is None, "it runs already"
        self._check_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(
            tempfile.mkdtemp(prefix=SCRATCH, dir=socket_folder(len(f"/{SCRATCH}") + SOCKETS))
        )
        env = {**self.spec.environment(), "TMPDIR": str(self._scratch)}
        if self._zygote is not None:
            self._pid = self._zygote.fork(self.spec.arguments(), self.log, env)
            return
        python = self._python or serving_python()
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
            self._child = subprocess.Popen(
                [str(python), "-W", "ignore", str(BOOT), "serve", str(os.getpid()), *self.spec.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=_clean_environment(env),
                start_new_session=True,
            )
        self._pid = self._child.pid

    def wait_healthy(self, limit_s: float) -> float:
        """Seconds until it answered. Raises PeerLost with the log's end where it died or took longer."""
        began = time.monotonic()
        while time.monotonic() - began < limit_s:
            self._note_shared()
            if not self.alive():
                raise self._lost("died at its start")
            if self._answers():
                self._note_shared()
                return time.monotonic() - began
            time.sleep(POLL_S)
        raise self._lost(f"was not healthy within {limit_s:.0f} s (engine.start_timeout_s)")

    def alive(self) -> bool:
        """Whether its main process runs; a hung one does too."""
        if self._child is not None:
            return self._child.poll() is None
        return self._pid is not None and self._pid in group_members(self._pid)

    def stop(self) -> None:
        """End all its processes at once, and remove what they leave behind."""
        self._note_shared()
        if self._pid is not None:
            _end_group(self._pid)
        if self._child is not None:
            self._child.wait(END_LIMIT_S)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        for path in self._shared:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._shared = set()
        self._pid = self._child = self._scratch = None

    def _note_shared(self) -> None:
        """Its shared memory is found by its processes: where they were killed, as they were seen last."""
        if self._pid is not None:
            self._shared |= shared_files(group_members(self._pid))

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        return tail(self.log, lines)

    def _check_port(self) -> None:
        with socket.socket(family(self.spec.host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((self.spec.host, self.spec.port))
            except OSError as error:
                raise PeerLost(
                    f"port {self.spec.port} of {self.spec.host} cannot be had ({error.strerror})",
                    where=f"SGLang server {self.spec.name}",
                    way_out="choose another engine.port, or leave it out for a free one",
                ) from error

    def _answers(self) -> bool:
        """Whether this server, rather than another on its port, is ready: only ours accepts the key."""
        headers = {"Authorization": f"Bearer {self.spec.key}"}
        try:
            if httpx.get(f"{self.spec.url}/health", timeout=PROBE_S, trust_env=False).status_code != 200:
                return False
            if self.spec.node_rank > 0:  # it has a health endpoint of its own, once all parts have met
                return True
            reply = httpx.get(
                f"{self.spec.url}/model_info", headers=headers, timeout=PROBE_S, trust_env=False
            )
        except httpx.TransportError:
            return False
        if reply.status_code in (401, 403, 404):
            raise self._lost(f"is not the one that answers on {self.spec.url} ({reply.status_code})")
        return reply.status_code == 200

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(
            f"{what}; its log ends:\n{self.log_tail()}",
            where=f"SGLang server {self.spec.name}",
            way_out=f"the whole log is {self.log}",
        )


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented; "(empty)" where there are none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        text = ""
    return "\n".join(f"    {line[:300]}" for line in text.splitlines()[-lines:]) or "    (empty)"


def _clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's variables, but for those that lead an interpreter to the trainer's packages."""
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", *launch)
    return {key: value for key, value in os.environ.items() if key not in dropped} | dict(more)


def _end_group(group: int) -> None:
    """SIGKILL to a process group, and wait until all of it is gone: its port is free then."""
    until = time.monotonic() + END_LIMIT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while group_members(group) and time.monotonic() < until:
        time.sleep(0.02)
