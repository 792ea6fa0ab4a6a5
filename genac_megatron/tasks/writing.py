r"""One writing for mathematical answers, so that math-verify is asked about what they say and not how.

Signs and digits of other keyboards, wrappings ($...$, **...**), parted thousands (12\,480), mixed numbers
(3 1/2), numbers such as 3.83e35 and 1.2 million. What is not known here stays as it is.
"""

from __future__ import annotations

import re

_SIGNS = {
    "\u3000": " ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "−": "-", "–": "-", "—": "-",
    "×": r"\times ", "÷": "/", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "°": r"^\circ ", "²": "^{2}", "³": "^{3}", "、": ",", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "€": "", "£": "", "¥": "", "￥": "", "₹": "", "₩": "", "₽": "", "¢": " cents",
    "“": '"', "”": '"', "’": "'",
}  # fmt: skip
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_TABLE = str.maketrans({**_FULL_WIDTH, **_SIGNS})
_PLAIN_SIGNS = {
    "<=": r"\le ",
    ">=": r"\ge ",
    "!=": r"\ne ",
    "+/-": r"\pm ",
    "+-": r"\pm ",
    "**": "",
    r"\div": "/",
}

_WRAPPED = re.compile(
    r"(?:\$\$?|\\\(|\\\[|\*{1,3}|__?|```\w*\n|`{1,3}|\")\s*(.*?)\s*(?:\$\$?|\\\)|\\\]|\*{1,3}|__?|`{1,3}|\")",
    re.DOTALL,
)
_PAIRED = '$*_`"'  # signs that open as they close
_FONT = re.compile(
    r"\\(?:bf|it|rm|sf|tt|em|tiny|small|large|Large|LARGE|huge|Huge|normalsize|displaystyle|textstyle|textdollar)"
    r"(?![A-Za-z])\s?"
)
_CURRENCY = re.compile(
    r"(?:\\text\{\s*)?(?:(?:US|AU?|CA?|HK|R)\\?\$|(?:USD|EUR|GBP|INR|CNY|RMB|JPY|CAD|AUD)\b|Rs\.?)(?:\s*\})?\s*(?=\.?\d)"
)
_SET_OF = re.compile(  # {x | 1 < x}: what holds for it
    r"(?:\\left)?\\?\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid|\\vert|[|:])"
    r"\s*([^{}|]+?)\s*(?:\\right)?\\?\}"
)
_BRACED = re.compile(
    r"\\(?:under|over)brace\s*\{((?:[^{}]|\{[^{}]*\})*)\}(?:\s*[_^]\s*\{(?:[^{}]|\{[^{}]*\})*\})?"
)
_DECORATED = re.compile(r"\\(?:underline|boldsymbol|bm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(?=(?:sin|cos|tan|cot|sec|csc|ln|log)\s*\()")
_REPEATING = re.compile(r"(?<![\d.])(\d{1,9})\.(\d{0,9})\\(?:overline|bar|dot)\s*\{(\d{1,9})\}")
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_ABOUT = re.compile(
    r"\s*(?:\\(?:approx|sim)\b|(?:approximately|about|roughly|around|exactly|only)\s)\s*", re.IGNORECASE
)
_PER_CENT = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*)?(?:percent|per cent|pct)\b\s*\}?", re.IGNORECASE)
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_GAP = r"(?:\\[,;:! ]|\{,\}|~|[ ])"  # what parts thousands; a bare comma is math-verify's to read
_THOUSANDS = re.compile(
    rf"(?<![\d.,])\d{{1,3}}(?:{_GAP}|\\!)+,?(?:\\!)*\d{{3}}(?:(?:{_GAP}|,)+\d{{3}})*(?!\d)"
)
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|~")
_MIXED = re.compile(
    r"(?:^|(?<=[\s,;=(\[{-]))(?P<sign>-?)(?P<whole>\d+)(?:"
    r"(?:\s+|\s*\\?(?:and|&)\s+)(?P<a>\d+)\s?/\s?(?P<b>\d+)"
    r"|\s*(?:and\s+)?\\[dt]?frac\s?(?:\{(?P<c>\d+)\}\s?\{(?P<d>\d+)\}|(?P<e>\d)(?P<f>\d)))(?![\d/])"
)
_POWER = re.compile(r"\^(-?\d{2,}|-\d)")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[x*]\s*(?=10\s*\^)")
_LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE_CHINESE = {"万亿": 12, "亿": 8, "万": 4, "千": 3}
_CHINESE_NUMBER = re.compile(
    r"(?<=\d)\s*(?:\\text\s*\{\s*)?(万亿|亿|万|千(?![米克瓦卡帕赫焦伏]))(?:(?<=[亿万千])\s*\})?"
)
_LARGE_NUMBER = re.compile(rf"(?<=\d)\s*(?:\\text\s*\{{\s*)?({'|'.join(_LARGE)})\b\s*\}}?", re.IGNORECASE)
_IN_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*)(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?"
)
_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}"
)

_E_NUMBER = r"([+-]?(?:\d+(?:\.\d+)?|\.\d+))[eE]([+-]?\d{1,6})"  # 3.83e35
_E_REFERENCE = re.compile(_E_NUMBER)
_E_ANSWER = re.compile(rf"(?<![\w.\\]){_E_NUMBER}(?!\w|\.\d)")
_EULER = re.compile(r"(?<![a-zA-Z\\])e(?![a-zA-Z])|\\mathrm\{e\}")


def tidy(text: str) -> str:
    """`text` in the writing that is compared."""
    text = _COLOUR.sub("", _unwrapped(text.translate(_TABLE)))
    text = _DECORATED.sub(r"\1", _BRACED.sub(r"\1", _FONT.sub("", text))).replace(
        r"\varnothing", r"\emptyset"
    )
    text = _REPEATING.sub(_fraction, _FUNCTION.sub(r"\\", text))
    for sign, latex in _PLAIN_SIGNS.items():
        text = text.replace(sign, latex)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1].strip('(){}')}}}", text)
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    text = _MIXED.sub(_improper, _SPACE.sub(" ", text))
    text = _PER_CENT.sub(r"\\%", text)
    text = _LARGE_NUMBER.sub(lambda word: rf" \times 10^{{{_LARGE[word[1].lower()]}}}", text)
    text = _CHINESE_NUMBER.sub(lambda word: rf" \times 10^{{{_LARGE_CHINESE[word[1]]}}}", text)
    text = _IN_DEGREES.sub(r"\1\\frac{\2\\pi}{180}", text)
    text = _POWER.sub(r"^{\1}", _TIMES_TEN.sub(r" \\times ", text))
    text = text[about.end() :] if (about := _ABOUT.match(text)) is not None else text.strip()
    text = text if (money := _CURRENCY.match(text)) is None else text[money.end() :]
    return text if (whole := _SET_OF.fullmatch(text)) is None else whole[1]


def _unwrapped(text: str) -> str:
    while True:
        text = text.strip().rstrip(".,;。，\\ ")
        whole = _WRAPPED.fullmatch(text)
        if whole is None or not whole[1] or "$" in whole[1] or "**" in whole[1]:
            return text
        if text[0] in _PAIRED and text[0] in whole[1]:
            return text  # two of them, not one around all
        text = whole[1]


def _improper(mixed: re.Match[str]) -> str:
    top, bottom = (int(mixed[a] or mixed[b] or mixed[c]) for a, b, c in ("ace", "bdf"))
    if top >= bottom:
        return mixed[0]  # a product
    return rf"{mixed['sign']}\frac{{{int(mixed['whole']) * bottom + top}}}{{{bottom}}}"


def _fraction(number: re.Match[str]) -> str:
    r"""0.1\overline{6} as \frac{15}{90}."""
    before, period = number[1] + number[2], number[3]
    bottom = (10 ** len(period) - 1) * 10 ** len(number[2])
    return rf"\frac{{{int(before + period) - int(before)}}}{{{bottom}}}"


def plain(text: str) -> str:
    r"""`text` without \text{} and the like, and with one blank for each white space."""
    return " ".join(_COMMAND.sub(r"\1", text).replace("\\$", "").replace("$", "").split())


def in_powers(reference: str, answer: str) -> tuple[str, str]:
    r"""The pair with numbers such as 3.83e35 as 3.83 \times 10^{35}: math-verify's e is Euler's.

    A reference is rewritten where it is such a number as a whole, answers where the reference has no e.
    """
    if (found := _E_REFERENCE.fullmatch(reference)) is not None:
        reference = _power(found)
    if _EULER.search(reference):
        return reference, answer
    return reference, _E_ANSWER.sub(_power, answer)


def _power(number: re.Match[str]) -> str:
    return f"{number[1]} \\times 10^{{{int(number[2])}}}"
