"""Whether somebody answers at an endpoint, asked before a run spends time. No torch."""

from __future__ import annotations

import time

import httpx

from genac_megatron.errors import InputError
from genac_megatron.serving.chat import check_address
from genac_megatron.serving.transport import no_reply

TRIES = 3
WAIT_S = 0.5  # after the first one; it doubles
LIMIT_S = 10.0  # of a try
DOWN = (502, 503, 504)  # a gateway that has nobody behind it


def need_there(url: str, who: str, setting: str, path: str = "/models") -> None:
    """Raise InputError where nobody answers: a list of models is asked for, which costs nothing and which an
    endpoint may refuse.

    who: such as "judge". setting: the key or option that names it.
    """
    check_address(url, setting)
    why = ""
    with httpx.Client(timeout=LIMIT_S) as client:
        for number in range(TRIES):
            try:
                status = client.get(url.rstrip("/") + path).status_code
            except httpx.RequestError as error:
                why = no_reply(error, LIMIT_S, LIMIT_S)
            else:
                if status not in DOWN:
                    return
                why = f"status {status}"
            if number + 1 < TRIES:
                time.sleep(WAIT_S * 2**number)
    raise InputError(
        f"the {who} does not answer at {url}: {why}",
        where=setting,
        way_out="start it, or correct the address; nothing was begun",
    )
