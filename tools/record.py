"""Records a command's output as text: each line with the minutes and seconds since the beginning.

    python3.11 tools/record.py docs/quickstart-recorded.txt -- make quickstart

Written as it comes, also to the terminal. As the output is none, a line a minute is in the place of bars.
The clone is called "." and the home folder "~". Ends with the command's exit code. Standard library only.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]


def clean(text: str) -> str:
    """Without this machine's folders."""
    return text.replace(str(HOME), ".").replace(str(Path.home()), "~")


def head(words: list[str]) -> str:
    """What ran, of which commit, on what, beside what."""
    commit = subprocess.run(
        ["git", "-C", str(HOME), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    day = time.strftime("%Y-%m-%d", time.gmtime())
    where = f"{day}, commit {commit or 'unknown'}, {os.cpu_count()} cores, load before it {load}"
    return f"# {where}\n$ {clean(shlex.join(words))}\n"


def record(out: Path, words: list[str]) -> int:
    """Run `words`; the exit code."""
    began = time.monotonic()
    with out.open("w", encoding="utf-8") as file:
        file.write(head(words))
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
        )
        assert process.stdout is not None
        for line in process.stdout:
            minutes, seconds = divmod(int(time.monotonic() - began), 60)
            file.write(f"[{minutes:02}:{seconds:02}] {clean(line)}")
            file.flush()
            print(line, end="", flush=True)
        code = process.wait()
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        file.write(f"[{minutes:02}:{seconds:02}] ended with code {code}\n")
    return code


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        print("usage: record.py OUT -- COMMAND ...", file=sys.stderr)
        sys.exit(2)
    sys.exit(record(Path(sys.argv[1]), sys.argv[3:]))
