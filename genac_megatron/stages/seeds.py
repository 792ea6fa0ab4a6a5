"""Seeds as a pure function of what they are for: nothing to save, nothing to restore."""

from __future__ import annotations

import hashlib


def seed_for(*parts: object) -> int:
    """A 63-bit seed from (run seed, stage, step, prompt, sample, ...); the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        >> 1
    )
