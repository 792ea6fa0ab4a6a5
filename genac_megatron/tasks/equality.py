r"""Whether a final answer is right: math-verify's verdict on the answer as a whole, and what it misses.

math-verify looks for something mathematical in any text, and takes a number out of prose where it finds
nothing else. Here it is given an answer as one expression, which holds as a whole or not at all. Before that
both sides are brought to one writing, and option letters and units are read; afterwards numbers that it takes
for equal because both are small are told apart. It is imported when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from itertools import combinations
from typing import Any

from genac_megatron.tasks.answers import referred
from genac_megatron.tasks.dates import same_moment
from genac_megatron.tasks.units import NUMERAL, readings, units_differ
from genac_megatron.tasks.writing import in_powers, plain, tidy

_DECIMAL = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_INTEGER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)")
_LETTER = re.compile(r"(?:(?:option|choice)\s+)?\(?\s*([A-J])\s*\)?\s*[.:)]?", re.IGNORECASE)
_LETTERS = re.compile(r"[A-J](?:(?:\s*(?:[,;&]|and\b)\s*|\s)[A-J])+|[A-J]{2,10}")  # A, C and AC
_LABELLED = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(\s*([A-J])\s*\):?|([A-J])\s*[.:)])(?:\\q?quad|\s)*(\S.*)", re.DOTALL
)
_NEXT_TO = re.compile(r"(?:([A-J])\s*[-=]|([A-J])\s(?=[\d\\]))\s*\S.*", re.DOTALL)  # B - 42, B 42
_RATIO = re.compile(
    r"(?:[A-Za-z]+(?:\s*:\s*[A-Za-z]+)+\s*=\s*)?(?P<parts>\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?){2,})"
)
_SAID = re.compile(
    r"(?P<before>.*)(?:(?<![A-Za-z])(?:is|are|equals|be)\b\s*:?|(?<=[A-Za-z]):)\s*(?P<said>\S.*)", re.DOTALL
)
_NEGATED = re.compile(r"\b(?:not|never|no|whether|if|unless|might|may|could|cannot)\b|n't\b", re.IGNORECASE)
_SAYS_A_NUMBER = re.compile(
    rf"{NUMERAL}(?:\s*(?:\\%|%))?(?:\s*[A-Za-z/]+(?:\s[a-z]+)?)?|\$.*\$|\\.*", re.DOTALL
)
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}(?![A-Za-z])")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])")
_MATHS_WORDS = frozenset(("and", "all", "for", "sqrt", "sin", "cos", "tan", "log", "exp", "inf", "infinity"))
_PROSE = 300  # characters of an answer that may be read as prose


def agrees(reference: str, answer: str) -> bool:
    """Whether the final answer `answer` is right. Hostile text may take minutes: call it in a worker."""
    reference = tidy(referred(reference))
    reference, answer = in_powers(reference, tidy(answer))
    if not reference or not answer:
        return False
    if _same_words(reference, answer):
        return True
    if (verdict := same_moment(plain(reference), plain(answer))) is not None:
        return verdict
    if (verdict := _options(reference, answer)) is not None:
        return verdict
    if (verdict := _same_ratio(plain(reference), plain(answer))) is not None:
        return verdict
    if (label := _LABELLED.fullmatch(plain(reference))) is not None:
        reference = label[3]
    return any(_agree(reference, said) for said in _without_words(answer))


def _same_words(reference: str, answer: str) -> bool:
    """Whether both are the same text: case is no matter in words, and is in single letters."""
    one, other = (plain(text).rstrip(".").strip() for text in (reference, answer))
    if len(one) < 2:
        return one == other and bool(one)
    return one.casefold() == other.casefold()


def _same_ratio(reference: str, answer: str) -> bool | None:
    """Whether two ratios of three or more numbers, 2:3:5 or a:b:c = 2:3:5, are the same; None for others.

    math-verify multiplies them.
    """
    both = _RATIO.fullmatch(reference), _RATIO.fullmatch(answer)
    if both[0] is None or both[1] is None:
        return None
    one, other = ([Decimal(part) for part in found["parts"].split(":")] for found in both if found)
    return len(one) == len(other) and all(
        a * y == b * x for (a, b), (x, y) in combinations(zip(one, other, strict=True), 2)
    )


def _options(reference: str, answer: str) -> bool | None:
    """The verdict on options such as B, (B), B. 42, where they decide; else None."""
    if (several := _same_letters(plain(reference), plain(answer))) is not None:
        return several
    wanted, given = _option(reference), _option(answer)
    if _is_letter(reference):
        # Lower case may be a variable: b answers B, and B answers b, where both are letters alone.
        if given is None or (plain(reference).islower() and not _is_letter(answer)):
            return False
        return wanted == given
    if wanted is not None and given is not None and (wanted != given or _is_letter(answer)):
        return wanted == given
    return None


def _same_letters(reference: str, answer: str) -> bool | None:
    """Whether two lists of options name the same ones, one of them parted: A, C and AC. None for no lists."""
    if not (_LETTERS.fullmatch(reference) and _LETTERS.fullmatch(answer)):
        return None
    if reference.isalpha() and answer.isalpha():
        return None  # a product, a segment
    one, other = (sorted(filter(str.isupper, text)) for text in (reference, answer))
    return one == other


def _is_letter(text: str) -> bool:
    return _LETTER.fullmatch(plain(text)) is not None


def _option(text: str) -> str | None:
    r"""The letter of the option that is named: B, b, (B), \textbf{(B)}, option B, B. 42."""
    short = plain(text)[:_PROSE]
    found = _LETTER.fullmatch(short) or _LABELLED.fullmatch(short) or _NEXT_TO.fullmatch(short)
    return None if found is None else str(found[1] or found[2]).upper()


def _without_words(answer: str) -> Iterator[str]:
    """The answer as it is; without its option's letter; what words before it introduce ("the sum is 34")."""
    yield answer
    if len(answer) > _PROSE:
        return
    text = plain(answer).rstrip(".")
    if text != answer:
        yield tidy(text)
    if (label := _LABELLED.fullmatch(text)) is not None:
        yield tidy(label[3])
    said = _SAID.fullmatch(text)
    if said is not None and not _NEGATED.search(said["before"]) and _SAYS_A_NUMBER.fullmatch(said["said"]):
        yield tidy(said["said"])


def _agree(reference: str, answer: str) -> bool:
    """Whether the two are equal, units taken off; 5 km are not 5 m."""
    for wanted, wanted_unit in readings(reference):
        for given, given_unit in readings(answer):
            if units_differ(wanted_unit, given_unit):
                return False
            if _equal(wanted, given):
                return True
    return False


def _equal(reference: str, answer: str) -> bool:
    """math-verify's verdict on two whole expressions. Its own time limits, off here, need a main thread."""
    if _DECIMAL.fullmatch(reference) and _DECIMAL.fullmatch(answer):
        if Decimal(reference.replace(",", "")) == Decimal(answer.replace(",", "")):
            return True
        if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
            return False
    if _prose(answer) and not _WORD.search(reference):
        return False  # it would be a product of letters, at the cost of seconds
    from math_verify import verify

    gold, given = _parsed(reference), _parsed(answer)
    if not gold or not given:
        return False
    gold, given = _as_region(gold, reference), _as_region(given, answer)
    alike = verify(list(gold), list(given), timeout_seconds=None, allow_set_relation_comp=True)
    return bool(alike) and not _apart(gold[0], given[0])


def _as_region(parsed: tuple[Any, ...], text: str) -> tuple[Any, ...]:
    """Of "x < 2 or x > 5" the numbers for which it holds: math-verify reads a set of two relations."""
    from sympy import FiniteSet, Union
    from sympy.core.relational import Relational

    value = parsed[0]
    if not _OR.search(text) or not isinstance(value, FiniteSet) or len(value.free_symbols) != 1:
        return parsed
    if not all(isinstance(part, Relational) for part in value.args):
        return parsed
    return (Union(*(part.as_set() for part in value.args)),)


def _prose(text: str) -> bool:
    words = [word for word in _WORD.findall(text) if word.lower() not in _MATHS_WORDS]
    return len(words) > 1 or any(len(word) > 3 for word in words)


@lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[Any, ...]:
    """math-verify's reading of `text` as one expression, then as text, no unit taken off; () for none."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    writing = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    target = LatexExtractionConfig(boxed_match_priority=0, normalization_config=writing)
    boxed = rf"\boxed{{{text}}}"
    return tuple(parse(boxed, [target], extraction_mode="first_match", parsing_timeout=None))


# --- numbers that math-verify takes for equal: it compares to 6 and to 15 decimal places --------------

_DIGITS = 40
_ROUNDED = 1e-4  # relative, of decimals
_EXACT = 1e-12  # of all others


def _apart(gold: Any, given: Any) -> bool:
    """Whether numbers in two expressions, or in the sets, tuples and relations that these are, differ."""
    if _per_cent(gold) or _per_cent(given):
        return False  # 50 % is 50 and 1/2
    one, other = _numbers(gold), _numbers(given)
    if len(one) != len(other):
        return False
    return any(all(_differ(a, b) for b in other) for a in one)


def _per_cent(value: Any) -> bool:
    from sympy import UnevaluatedExpr

    return any(isinstance(part, UnevaluatedExpr) for part in getattr(value, "args", ()))


def _numbers(value: Any) -> list[Any]:
    from sympy import Basic, FiniteSet, Interval, MatrixBase, Tuple
    from sympy.core.relational import Relational

    if isinstance(value, MatrixBase):
        return [number for part in value.flat() for number in _numbers(part)]
    if isinstance(value, FiniteSet | Tuple | Interval | Relational):
        return [number for part in value.args for number in _numbers(part)]
    if not isinstance(value, Basic) or value.free_symbols or not getattr(value, "is_number", False):
        return []
    return [value]


def _differ(one: Any, other: Any) -> bool:
    from sympy import Float

    close = _ROUNDED if one.has(Float) or other.has(Float) else _EXACT
    a, b = _value(one), _value(other)
    if not (a.is_finite and b.is_finite):
        return bool(a != b)  # ends of intervals; of infinities there is no difference
    scale = max(abs(a), abs(b))
    return bool(scale.is_comparable and abs(a - b) > close * scale)


def _value(number: Any) -> Any:
    """A number's first 40 digits; 0 where it is 0 in a form that evaluation does not see."""
    from sympy import Integer, simplify

    value = number.doit().evalf(_DIGITS)
    if value.is_finite and abs(value) < _EXACT and value != 0 and simplify(number) == 0:
        return Integer(0)
    return value
