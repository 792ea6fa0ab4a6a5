"""`genac watch`: its socket, its address, and how one gets there from another machine."""

from __future__ import annotations

import errno
import getpass
import secrets
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server, select_address_family

from genac_megatron.errors import InputError
from genac_megatron.watch.app import App
from genac_megatron.watch.follow import Watched

PORT = 8642
TRIES = 20  # ports from PORT on
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = ("0.0.0.0", "::", "")


class Quiet(WSGIRequestHandler):
    """Says nothing of requests, whose first one has the key in its address."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def listen(host: str, port: int | None) -> socket.socket:
    """A bound socket. port: None for PORT or the next free one; 0 for any. Raises InputError."""
    for number in range(PORT, PORT + TRIES) if port is None else [port]:
        try:
            return _bound(host, number)
        except (OSError, OverflowError) as error:
            if port is None and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            raise InputError(
                f"cannot listen at {host}:{number}: {_why(error)}",
                where="--port" if _is_of_port(error) else "--host",
                way_out="give another --port, or none for a free one"
                if _is_of_port(error)
                else "give an address of this machine, or none for 127.0.0.1",
            ) from error
    raise InputError(
        f"the ports {PORT} to {PORT + TRIES - 1} are all in use", where="--port", way_out="give a free one"
    )


def _bound(host: str, port: int) -> socket.socket:
    made = socket.socket(select_address_family(host, port), socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()
    except BaseException:
        made.close()
        raise
    return made


def _is_of_port(error: Exception) -> bool:
    return isinstance(error, OverflowError) or getattr(error, "errno", None) in (
        errno.EADDRINUSE,
        errno.EACCES,
    )


def _why(error: Exception) -> str:
    if isinstance(error, OverflowError):
        return "a port is a number from 0 to 65535"
    return str(getattr(error, "strerror", None) or error)


def begin(paths: Sequence[Path], host: str, port: int | None) -> tuple[BaseWSGIServer, str]:
    """A server that is about to serve, and what a person is told of it. Raises InputError."""
    watched = Watched(paths)
    with listen(host, port) as bound:
        number = bound.getsockname()[1]
        secret = secrets.token_urlsafe(18)
        app = App(watched, secret, f"genac-watch-{number}")
        server = make_server(host, number, app, threaded=True, request_handler=Quiet, fd=bound.fileno())
    return server, told(watched, host, number, secret, moved=port is None and number != PORT)


def told(watched: Watched, host: str, port: int, secret: str, *, moved: bool) -> str:
    """Where the page is, from here and from elsewhere."""
    name = socket.gethostname()
    near = name if host in ANY else host
    at = f"[{near}]" if ":" in near else near
    inside = "127.0.0.1" if host in (*LOOPBACK, *ANY) else at
    ssh = shlex.join(["ssh", "-N", "-L", f"{port}:{inside}:{port}", f"{_user()}@{socket.getfqdn()}"])
    lines = [f"genac: watching {_what(watched)}"]
    if moved:
        lines.append(f"  port {PORT} is in use: {port} is taken")
    lines.append(f"  here:           http://{at}:{port}/?key={secret}")
    lines.append(f"  from elsewhere: {ssh}")
    lines.append(f"                  and then http://127.0.0.1:{port}/?key={secret}")
    if host not in LOOPBACK:
        lines.append(f"  warning: who reaches {near}:{port} and has the key can read these runs")
    lines += [f"  waiting for a run in {path}" for path in watched.waiting()]
    return "\n".join([*lines, "  Ctrl-C ends it; the runs go on"])


def _what(watched: Watched) -> str:
    runs = watched.runs()
    return ", ".join(runs) if runs else "for runs that are still to begin"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this number
        return "USER"
