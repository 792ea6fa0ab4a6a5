"""Shared by all tests: hypothesis without a time limit per example, as the first one pays for imports."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("genac", deadline=None)
settings.load_profile("genac")
