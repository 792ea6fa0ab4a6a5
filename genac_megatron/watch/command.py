"""`genac watch` and `genac compare`: their grammar, and what each calls. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genac_megatron.errors import EXIT_OK

COMMANDS = ("watch", "compare")


def add_commands(commands: Any) -> None:
    """Add both to the command line's subparsers."""
    watch = commands.add_parser(
        "watch", help="a local page over run folders, while runs go on and afterwards"
    )
    watch.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or the folder that runs are in")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    watch.add_argument("--port", type=int, help="port (8642, or the next free one)")
    compare = commands.add_parser("compare", help="runs beside each other, with intervals")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; the first is compared with")
    compare.add_argument("--out", help="a folder for a page, its plots and compare.json")
    compare.add_argument(
        "--unfinished", action="store_true", help="runs that go on or failed, as far as they are"
    )


def run_command(options: argparse.Namespace) -> int:
    """Run one of COMMANDS; returns the exit code."""
    paths = [Path(run) for run in options.runs]
    if options.command == "watch":
        return _watch(paths, options.host, options.port)
    return _compare(paths, Path(options.out) if options.out else None, unfinished=options.unfinished)


def _watch(paths: Sequence[Path], host: str, port: int | None) -> int:
    from genac_megatron.watch.server import begin

    server, told = begin(paths, host, port)
    print(told, flush=True)
    server.serve_forever()  # until Ctrl-C
    server.server_close()
    return EXIT_OK


def _compare(paths: Sequence[Path], out: Path | None, *, unfinished: bool) -> int:
    from genac_megatron.watch.compared import compare_runs

    made = compare_runs(paths, unfinished=unfinished)
    print(made.text(), flush=True)
    if out is not None:
        print(f"\n{made.write(out)}", flush=True)
    return EXIT_OK
