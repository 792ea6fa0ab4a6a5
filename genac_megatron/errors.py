"""What a run ends with when something is wrong: one class per exit code, one clear message each."""

from __future__ import annotations

from typing import TypeVar

EXIT_OK = 0
EXIT_FAILED = 1  # the file system or the training, as a message says; else a fault of ours
EXIT_INPUT = 2
EXIT_GATE = 3
EXIT_LOST = 4
EXIT_REQUEUE = 75


class GenacError(Exception):
    """A failure with a message meant for a person: what is wrong, where, and the way out."""

    exit_code = EXIT_FAILED
    agreed = False  # every rank raises it alike, so that one of them tells it
    told = False  # its words were shown already, by the ranks that it comes from

    def __init__(self, what: str, *, where: str = "", way_out: str = "") -> None:
        self.what, self.where, self.way_out = what, where, way_out
        super().__init__(
            "\n".join(
                part
                for part in (
                    f"{where}: {what}" if where else what,
                    f"  way out: {way_out}" if way_out else "",
                )
                if part
            )
        )

    def add(self, line: str) -> None:
        """A further line of the message."""
        self.args = (f"{self}\n  {line}",)


class InputError(GenacError):
    """The recipe, the data, a checkpoint or a model folder is wrong (exit code 2)."""

    exit_code = EXIT_INPUT


class GateFailed(GenacError):
    """A stage ended below its gate (exit code 3)."""

    exit_code = EXIT_GATE
    agreed = True  # gates judge figures that all ranks share


class LeftBand(GateFailed):
    """A figure is not as the recipe expects it early on, and it asks for an end then (exit code 3)."""


class PeerLost(GenacError):
    """An engine or a rank was lost beyond its budget (exit code 4)."""

    exit_code = EXIT_LOST


class StopRequested(GenacError):
    """The run was asked to stop, saved a checkpoint and can go on with --resume (exit code 75)."""

    exit_code = EXIT_REQUEUE
    agreed = True


class NotFinite(GenacError):
    """Training made NaN or infinity; nothing of it is saved (exit code 1)."""


E = TypeVar("E", bound=GenacError)


def on_all_ranks(error: E) -> E:
    """The error, marked as one that every rank raises alike: rank 0 alone tells it."""
    error.agreed = True
    return error
