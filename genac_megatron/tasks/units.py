r"""Units and what else an answer counts: 60 km/h, 25 \text{ cm}^2, 72 clips, 90^\circ.

math-verify takes the units of its own list off any expression, "ab" among them, so that 2ab is 2. Here a unit
is what follows a numeral and cannot be algebra.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from genac_megatron.tasks.writing import plain

NUMERAL = (
    r"[-+]?\s?(?:\\?\$\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\\[dtc]?frac\s*\{[-\d.]+\}\s*\{[-\d.]+\})"
    r"(?:\s?/\s?\d+)?(?:(?:\s*(?:\\times|\\cdot)\s*10)?\s*\^\s*(?:\{[-+]?\d+\}|\d))?"
)
_WITH_UNIT = re.compile(
    rf"(?P<number>{NUMERAL})(?P<gap>\s*)(?P<unit>[A-Za-zμΩ\\'\"(\u4e00-\u9fff].*)", re.DOTALL
)
_IN_BRACKETS = re.compile(r"\((?:in )?([A-Za-z/^0-9 ]{1,20})\)")
_CHINESE = re.compile(r"[\u4e00-\u9fff]{1,8}")
_NO_CHINESE_UNIT = frozenset("万亿千百十或和不分")
_CHINESE_KILO = re.compile("千(?=[米克瓦卡帕赫焦伏])")
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*[CF]?$|\s*\\degree$")
_TEXT_UNIT = re.compile(
    r"(?<=[\w})])\s*\\(?:text|mathrm|textrm|mbox)\s*\{\s*([^{}]*)\}(\s*\^\s*\{?\s*\d\s*\}?|)$"
)
_WORD = re.compile(r"[A-Za-zμΩ]+")
_FRACTION_PER_CENT = re.compile(
    r"(?P<fraction>(?P<sign>-?)\\[dt]?frac\s*(?:\{(?P<top>\d+)\}\s*\{(?P<bottom>\d+)\}|(?P<t>\d)(?P<b>\d)))\s*\\?%"
)
_RAISED = re.compile(r"(?<=[A-Za-z])\s(?:squared|cubed)\b")  # the unit, and not the number before it
_NO_UNIT_SIGN = re.compile(r"\d{2}|[=<>+()\[\],;]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNITS = _words("""
    km cm mm nm dm mi ft yd in kg mg lb lbs oz ml dl cl kl hr hrs min mins sec secs ms kmh kph mph rpm kwh kw
    mw hz khz mhz kj mol kpa pa ev usd eur gbp rs cc sq cu ohm μm μs m s g L l h N J W V A K C F
""")
_CLOSE_UNITS = _words("m s g L")  # single letters that may follow without a blank
# Words after a number that change it, or make a sentence of it.
_NO_UNITS = _words("""
    million billion trillion thousand hundred dozen percent percentage pct half halves third thirds quarter
    quarters fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths
    thousandth thousandths squared cubed factorial choose mod modulo plus minus over base sqrt root sin cos
    tan cot csc log ln exp pi i e x y z is are was not no or and if but so then maybe wait to through mean
    means more less fewer at about than because which that hence thus therefore can could would should will
    when while until too large small big wrong incorrect sure unknown possible
""")
_SAME_UNIT = {
    "km": "kilometer, kilometre", "m": "meter, metre", "cm": "centimeter, centimetre",
    "mm": "millimeter, millimetre", "mi": "mile", "ft": "foot, feet", "in": "inch, inche", "yd": "yard",
    "kg": "kilogram", "g": "gram, gm", "mg": "milligram", "lb": "pound", "oz": "ounce", "h": "hour, hr",
    "min": "minute", "s": "second, sec", "day": "day", "week": "week", "month": "month", "year": "yr",
    "l": "liter, litre", "ml": "milliliter, millilitre", "dollar": "usd", "cent": "cent", "euro": "eur",
    "km/h": "km/hr, kmh, kph, km per hour, kilometers per hour, kilometres per hour",
    "mph": "miles per hour, mi/h", "m/s": "meters per second",
}  # fmt: skip
_POWER = re.compile(
    r"(?:(?P<before>square|sq\.?|cubic|cu\.?) )?(?P<unit>[^ ^].*?)"
    r"(?: (?P<after>squared|cubed)| ?\^ ?\{? ?(?P<digit>[23]) ?\}?)?"
)
_UNIT_NAMES = {name: unit for unit, names in _SAME_UNIT.items() for name in (unit, *names.split(", "))}


def readings(answer: str) -> Iterator[tuple[str, str]]:
    """(what is said, in which unit): the answer as it is, unit "", and without its degrees or its unit."""
    match = _WITH_UNIT.fullmatch(plain(answer))
    if match is not None and _is_unit(match["unit"], bool(match["gap"])):
        yield match["number"], match["unit"]
        if len(match["unit"]) == 1:
            yield answer, ""  # it may be algebra too
        return
    yield answer, ""
    if (share := _FRACTION_PER_CENT.fullmatch(answer)) is not None:  # math-verify reads no such
        yield answer[: share.end("fraction")], ""
        top, bottom = share["top"] or share["t"], share["bottom"] or share["b"]
        yield rf"{share['sign']}\frac{{{top}}}{{{bottom}00}}", ""
    bare = _DEGREES.sub("", answer)
    if bare != answer:
        yield bare, ""
    match = _TEXT_UNIT.search(answer)
    if match is not None and not _NO_UNITS & set(_WORD.findall(match[1].lower())):
        yield answer[: match.start()], match[1] + match[2]


def _is_unit(words: str, parted: bool) -> bool:
    """Whether what follows a number, `parted` from it by a blank or not, names what it counts."""
    if _CHINESE.fullmatch(words):
        return not _NO_CHINESE_UNIT & set(_CHINESE_KILO.sub("", words))
    if (inner := _IN_BRACKETS.fullmatch(words)) is not None:
        words = inner[1]
    if len(words) > 40 or _NO_UNIT_SIGN.search(words):
        return False
    found = _WORD.findall(_RAISED.sub("", words.replace(r"\frac", " ")))
    if not found or len(found) > 5 or _NO_UNITS & {word.lower() for word in found if len(word) > 1}:
        return False
    if len(found) == 1 and len(found[0]) == 1 and not parted and found[0] not in _CLOSE_UNITS:
        return False  # 2t is algebra
    return all(
        word in _UNITS or word.lower() in _UNITS or word.lower() in _UNIT_NAMES or len(word) > 2
        for word in found
    )


def units_differ(one: str, other: str) -> bool:
    """Whether two units are both known and not the same. Nothing is converted."""
    names = _known(one), _known(other)
    return None not in names and names[0] != names[1]


def _known(unit: str) -> tuple[str, int] | None:
    """(the name of a unit that is known, its power): cm^2 and square centimeters are ("cm", 2)."""
    match = _POWER.fullmatch(" ".join(plain(unit).lower().split()))
    if match is None:
        return None
    name = _UNIT_NAMES.get(match["unit"]) or _UNIT_NAMES.get(match["unit"].removesuffix("s"))
    raised = {word[:2] for word in (match["before"], match["after"], match["digit"]) if word}
    power = 2 if raised & {"sq", "2"} else 3 if raised & {"cu", "3"} else 1
    return None if name is None else (name, power)
