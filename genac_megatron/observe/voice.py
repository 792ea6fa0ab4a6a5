"""How warnings reach a person: one line each, in the project's form, above the bars and never through them.

What Python's loggers say goes through one handler, whoever's it is. Warnings of libraries about what this
machine lacks are left to `genac doctor`.
"""

from __future__ import annotations

import logging
import sys
import warnings

from genac_megatron.observe.progress import current

OURS = "genac_megatron"
WITH_HANDLERS = (
    "transformers",
    "datasets",
    "huggingface_hub",
)  # they have some of their own, and do not propagate


class Voice(logging.Handler):
    """Shows a record above the bars where there are some, else on stderr; what a library repeats, once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._heard: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self._text(record)
            if text is not None and record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
        except Exception:
            self.handleError(record)
            return
        if text is None:
            return
        progress = current()
        if progress is None or not progress.has_bars:
            print(text, file=sys.stderr, flush=True)
        else:
            progress.note(text)

    def _text(self, record: logging.LogRecord) -> str | None:
        said = record.getMessage().strip()
        level = record.levelname.lower()
        if record.name.split(".")[0] == OURS:  # "genac: error" is the one that ends a run, told last
            return said if said.startswith("genac:") else f"genac: warning: {said}"
        if said in self._heard:
            return None
        self._heard.add(said)
        return f"genac: {level} of {record.name.split('.')[0]}: {said}"


def one_voice() -> None:
    """From now on all loggers speak through one `Voice`. Call it again once more libraries are imported."""
    root = logging.getLogger()
    libraries = [logging.getLogger(name) for name in WITH_HANDLERS]
    for logger in (root, *libraries):
        logger.handlers = [one for one in logger.handlers if type(one) is not logging.StreamHandler]
    if not any(isinstance(one, Voice) for one in root.handlers):
        root.addHandler(Voice())
    for library in libraries:
        library.propagate = True
    # What is missing and what it costs is said once, by `genac doctor`, not by each rank.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
