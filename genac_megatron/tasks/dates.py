"""Dates and times of day as answers: 2024-01-05 is no difference, and 3:20 is no ratio beside 6:40."""

from __future__ import annotations

import re

_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
           "november", "december")  # fmt: skip
_NAMED = {name[:size]: number for number, name in enumerate(_MONTHS, 1) for size in (3, 4, len(name))}
_YEAR_FIRST = re.compile(r"(\d{4})\s?([-/.])\s?(\d{1,2})\s?\2\s?(\d{1,2})")
_YEAR_LAST = re.compile(r"(\d{1,2})\s?([-/.])\s?(\d{1,2})\s?\2\s?(\d{4})")
_CHINESE = re.compile(r"(?:(\d{4})\s?年\s?)?(\d{1,2})\s?月\s?(\d{1,2})\s?[日号]")
_MONTH_FIRST = re.compile(r"([a-z]{3,9})\.?\s(\d{1,2})(?:st|nd|rd|th)?(?:,?\s(\d{4}))?")
_DAY_FIRST = re.compile(r"(\d{1,2})(?:st|nd|rd|th)?\s(?:of\s)?([a-z]{3,9})\.?(?:,?\s(\d{4}))?")
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s?(?:([ap])\.?\s?m\b\.?)?")

Date = tuple[object, ...]  # year (None: not said), month, day; or, of an order that is not known, as written


def same_moment(reference: str, answer: str) -> bool | None:
    """Whether two dates, or two times of day, are the same; None where they are not both of these.

    A date beside what is none is another thing. A time without a.m. or p.m. may be either.
    """
    wanted, given = _date(reference), _date(answer)
    if wanted is not None or given is not None:
        return wanted == given
    one, other = _time(reference), _time(answer)
    if one is None or other is None:
        return None
    return one[:3] == other[:3] and (one[3] == other[3] or None in (one[3], other[3]))


def _date(text: str) -> Date | None:
    text = " ".join(text.lower().split())
    if (found := _YEAR_FIRST.fullmatch(text)) is not None:
        return int(found[1]), int(found[3]), int(found[4])
    if (found := _CHINESE.fullmatch(text)) is not None:
        return int(found[1]) if found[1] else None, int(found[2]), int(found[3])
    if (found := _YEAR_LAST.fullmatch(text)) is not None:  # day or month first: nobody knows
        return "written", int(found[1]), int(found[3]), int(found[4])
    for form, month, day in ((_MONTH_FIRST, 1, 2), (_DAY_FIRST, 2, 1)):
        if (found := form.fullmatch(text)) is not None and found[month] in _NAMED:
            return int(found[3]) if found[3] else None, _NAMED[found[month]], int(found[day])
    return None


def _time(text: str) -> tuple[int, int, int, str | None] | None:
    found = _TIME.fullmatch(" ".join(text.lower().split()))
    if found is None or (found[2] is None and found[4] is None):
        return None
    return int(found[1]), int(found[2] or 0), int(found[3] or 0), found[4]
