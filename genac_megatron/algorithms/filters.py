"""Which responses the actor learns from. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def keep_whole(truncated: Sequence[bool]) -> list[bool]:
    """EasyPPO's overlong filter (arXiv 2609.36802): responses that were not cut off at the token limit. [B]

    For the actor's loss and the whitening of its advantages; critics go on learning from all of them.
    """
    return [not cut for cut in truncated]
