r"""What a response's final answer is. Whether it is right is another question: equality.py, tasks/grading.py.

The rule, whose forms a recipe names (`task.answer_forms`; docs/tasks.md):

1. Only what stands after the reasoning counts. Reasoning that is not closed leaves no answer.
2. The last mark counts: a box, a tag, an "Answer:" line, a #### line. Boxes of one answer are joined. A mark
   that was begun and not finished, and none after it, leaves no answer: what stood before was given up.
3. Where there is no mark: a last sentence "The answer is X.", the last line, the last number, if the recipe
   allows them.

All scans are linear in the text's length: models write anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genac_megatron.recipe.tasks import AnswerForm

MARKED: tuple[AnswerForm, ...] = ("boxed", "tag", "line", "sentence")  # where a recipe names no forms
EXACT: tuple[AnswerForm, ...] = (*MARKED, "last_line")  # the same for the verifier `exact`

REASONING = re.compile(
    r"<(?P<a>/?)(?:think|thinking|thoughts?|reasoning|seed:think|longcat_think)>"
    r"|\[(?P<b>/?)THINK\]|◁(?P<c>/?)think▷"
    r"|<\|(?P<d>begin|end)_of_thought\|>|<\|(?P<e>START|END)_THINKING\|>",
    re.IGNORECASE,
)
_WRAPPED_ANSWER = re.compile(r"\A\s*<\|[\w-]{1,30}\|>")  # <|begin_of_solution|>, <|START_RESPONSE|>
# gpt-oss writes messages in channels. Where a tokenizer leaves special tokens out, their names stand bare:
# "analysisWe add.assistantfinal34".
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(?P<name>\w+)[^<\n]{0,80}(?:<\|constrain\|>[\w ]{0,20})?<\|message\|>"
)
_CHANNEL_BEGUN, _MESSAGE_END = "<|channel|>", re.compile(r"<\|(?:end|return|start|call)\|>")
_BARE_CHANNELS = re.compile(r"\Aanalysis(?=[\w$\\\"'(])")
_BARE_CHANNEL = re.compile(r"assistant(?P<name>analysis|commentary|final)")
_TURN_END = re.compile(r"(?:<\|[\w-]{1,30}\|>|</s>|<eos>|<end_of_turn>)\Z")
_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s?(?P<bare>[-+]?\d[\d.,/]*)|\\\\(?!boxed|fbox)|\\[{}]|[{}]"
)
_TAG = re.compile(r"<\s?(/?)\s?(?:(?:final_)?answer|(?-i:SOLUTION))\s?>", re.IGNORECASE)
_WORDS = r"(?:(?:so|thus|hence|therefore|finally|and|then|in conclusion|consequently)\b[,\s]*){0,3}"
_MARKUP = r"[ \t>*_#`-]{0,12}"
_BEGIN = (
    r"(?:[^\w\n]|_){0,12}(?:\d{1,2}[.)][^\w\n]{0,4})?"  # of a line: markup of any kind, the number of an item
)
_DAAN = "(?:最终|最后)?答案"  # answer
# "Answer" in other languages, where a colon, or a word for "is", comes next.
_ANSWER_ABROAD = (
    r"(?:(?:la |die |a )?(?:r[ée]ponse|respuesta|resposta|risposta|antwort)(?: final[ea]?| correct[ae]?)?"
    r"|(?:окончательный )?ответ|odpowiedź|cevap|jawaban|đáp (?:án|số)"
    r"|(?:最終的な)?(?:答え|解答)|(?:최종 )?(?:정답|답))"
)
# "Answer: X", "**Final Answer:** X", "The answer is: X", "Answer (in cm): X", where a line or sentence begins
_LINE = re.compile(
    rf"(?:^{_BEGIN}|(?<=[.!?]) {{1,3}}){_WORDS}(?:(?:the|my|our)[ ])?(?:final[ ]|correct[ ])?answer"
    r"(?:[ ]\([^()\n]{1,40}\)|[ ]to[ ][^:\n]{1,60})?(?:[ ]is)?[*_` \t]{0,6}[:：=](?P<said>[^\n]*)"
    rf"|^{_BEGIN}{_ANSWER_ABROAD}[*_` \t]{{0,4}}(?:(?:は|은)\s?[:：]?|[:：])(?P<abroad>[^\n]*)"
    rf"|(?:【{_DAAN}】[:：]?|{_DAAN}[*_` \t]{{0,4}}(?:[是为选]\s?[:：]?|[:：])|故选\s?[:：]?\s?(?=[A-J]))"
    r"[*_` \t]{0,4}(?P<chinese>[^\n]*)"
    rf"|^[ \t]*(?:#{{1,6}}[ ]|\*\*)[*_ \t]{{0,4}}(?:(?:final[ ])?answer|{_DAAN})[*_ \t]{{0,4}}$(?P<heading>)",
    re.IGNORECASE | re.MULTILINE,
)
_POLITE = re.compile(r"\s*(?:です|である|입니다|이다)[。.]?\s*$")  # "is", behind what it is
_HASHES = re.compile(r"(?:^[ \t]*[*_]{0,3}|(?<=\s))####(?!#)[ \t]*(?P<said>[^\n]*)", re.MULTILINE)
_LAST_HASHES = re.compile(r"[*_]{0,3}####[ \t]*(?P<said>[*_]{0,3}[-+]?\\?\$?\.?\d.{0,60})")  # a number
_NEXT_BLOCK = re.compile(
    r"\s*(?:```\w*\n(?P<code>.{1,2000}?)\n?```|(?P<text>\$\$.{1,2000}?\$\$|\\\[.{1,2000}?\\\]|[^\n]+))",
    re.DOTALL,
)
_SENTENCE = re.compile(
    rf"(?:(?:^|[.!?:]\s|\n|[,;]?\s(?=(?:so|thus|hence|therefore)\b)){_MARKUP}{_WORDS}"
    r"(?:we (?:get|find|conclude|see)(?: that)?[,\s]+)?"
    r"(?:(?:the|our|my)\s)?(?:final\s|correct\s|required\s)?(?:answer|option|choice)\s(?:to [^.\n]{1,80}\s)?"
    r"(?:is|equals|=|must be|should be|will be)(?:\sthen)?\b\s*:?"
    rf"|(?:^|[.!?:]\s|\n){_MARKUP}(?:(?:donc|por tanto|portanto|quindi|also)[,\s]+)?{_ANSWER_ABROAD}\s"
    r"(?:est|es|é|è|ist)\b\s*:?)"
    r"(?P<said>\s*(?:\$\$.*\$\$|\\\[.*\\\]|[^\n]*)\s*)$",
    re.IGNORECASE | re.DOTALL,
)
_HOPE = re.compile(r"\.?\s*I hope it is correct\.?\s*$", re.IGNORECASE)
_TAIL = 600  # characters in which a last sentence lies
_NUMBER = re.compile(r"(?<![\w.])[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?!\w)")
_REASON = re.compile(
    r",?\s(?:because|since)\s|,\sas\s"
    r"|\sas\s(?=(?:the|it|we|there|this|that|these|they|both|each|all|required|expected|shown|stated)\b)"
)
_TAKEN_BACK = re.compile(
    r"\b(?:but|however|actually|wait|no|not|rather|instead|correction|misread|mistake|wrong|oops)\b",
    re.IGNORECASE,
)
_ABBREVIATED = (  # a period behind these ends nothing: St. Louis, approx. 5, No. 1
    r"(?<!\b[A-Z])(?<!\b(?:St|Dr|Mr|Ms|Mt|sq|ca|vs))(?<!\b(?:Mrs|Gen|Col))(?<!\bProf)(?<!\bapprox)"
    r"(?<!\bApprox)(?!(?<=\bNo).\s\d)"
)
# Behind a semicolon: 2; 3 and x = 1; y = 2
_GOES_ON = r"\s*[-+−(\[{$\\]*\s*(?:\d|[A-Za-z](?:_?\w)?\s*=|[A-Za-z](?!\w|\s\w))"
_SENTENCE_END = re.compile(
    rf"{_ABBREVIATED}\.(?=\s|$)|。(?=\s|$)|[；;](?=\s|$)(?!{_GOES_ON})|{_REASON.pattern}"
)

# Between two boxes of one answer: a comma, "and", "or", and perhaps what the second one is called.
_SPACING = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}|\\(?:[,;:! ]|\\)|\\[()\[\]]|[$*~]")
_CALLED = (
    r"(?:(?:[A-Za-z](?:_?\{?\w{1,3}\}?|')?|[A-Za-z]\([\w,]{1,5}\)|\\[a-z]{2,8})\s*(?:=|\\approx|\\in|is|:)"
    r"|(?:the|its)\s(?:other\s)?(?!total|answer|result|sum|final)[a-z]+(?:\s[a-z]+)?\s(?:is|are|equals|=))"
)
_SEPARATOR = r"[,;&、，和或]|\\q?quad\b|(?:and|or)\b"
_PART = r"\((?:[a-h]|[ivx]{1,4})\)"  # (b), (ii)
_JOINT = re.compile(
    rf"\)?\s*(?:(?:(?:{_SEPARATOR})\s*)+(?:{_PART})?|[.,;]?\s*{_PART})\s*"
    rf"\(?\s*(?:{_CALLED})?\s*\(?\s*",
    re.IGNORECASE,
)
_JOINT_LIMIT = 80  # characters


@dataclass(frozen=True)
class _Mark:
    """Something in a text that says: here is the answer. `said` is None where it was not finished."""

    start: int
    end: int
    said: str | None


def final_answer(
    text: str, forms: Sequence[AnswerForm] = MARKED, ended: bool = True, opened: bool = False
) -> str | None:
    """The final answer of a response; None where it gives none.

    `ended`: whether the response ended by itself. In one that was cut off only what is closed counts: boxes,
    tags, and lines that something follows. `opened`: the prompt had opened the reasoning already.
    """
    answer = after_reasoning(_without_turn_ends(text), opened)
    if answer is None:
        return None
    boxes = list(_boxes(answer))
    marks = [*(boxes if "boxed" in forms else ())]
    if "tag" in forms:
        marks += _tags(answer)
    if "line" in forms:
        marks += _lines(_LINE, answer, ended)
    if "hashes" in forms:
        marks += _lines(_HASHES, answer, ended)
    if marks:
        last = max(marks, key=lambda mark: mark.start)
        if last.said is None:
            return None
        # A box inside a tag or a line is what these say.
        inside = [box for box in boxes if box.said is not None and last.start <= box.start < last.end]
        return _joined(answer, boxes, inside[-1]) if inside else last.said.strip() or None
    return _unmarked(answer, forms) if ended else None


def referred(reference: str) -> str:
    r"""The final answer that a reference gives: what its last box holds or, at the end of a solution as
    GSM8K's, its line "#### X"; else the reference itself.
    """
    boxed = final_answer(reference, ("boxed",))
    if boxed is not None:
        return boxed
    last = _HASHES.fullmatch(reference.strip().rpartition("\n")[2])
    return last["said"].strip() if last is not None and last["said"].strip() else reference


def after_reasoning(text: str, opened: bool = False) -> str | None:
    """What stands after the last closed reasoning; None where reasoning is not closed.

    `opened`: the prompt's last words opened it, as some chat templates do.
    """
    if _CHANNEL_BEGUN in text or _BARE_CHANNELS.match(text):
        said = _final_channel(text)
        return None if said is None else after_reasoning(said)
    last = _last(REASONING, text)
    if last is None:
        return None if opened else text
    closing = any((last[group] or "").lower() in ("/", "end") for group in "abcde")
    return _WRAPPED_ANSWER.sub("", text[last.end() :]) if closing else None


def _final_channel(text: str) -> str | None:
    """What the final channel holds, where that is the last one; None where another is, or is begun."""
    marked = _CHANNEL_BEGUN in text
    last = _last(_CHANNEL if marked else _BARE_CHANNEL, text)
    if last is None or last["name"] != "final" or _CHANNEL_BEGUN in text[last.end() :]:
        return None
    end = _MESSAGE_END.search(text, last.end())
    return text[last.end() : len(text) if end is None else end.start()]


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last: re.Match[str] | None = None
    for found in pattern.finditer(text):
        last = found
    return last


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt's text ends with reasoning that it has opened."""
    end = prompt[-200:]
    channel = _last(_CHANNEL, end)
    if channel is not None:
        return channel["name"] != "final" and _MESSAGE_END.search(end, channel.end()) is None
    return after_reasoning(end) is None


def _without_turn_ends(text: str) -> str:
    """The text without tokens such as </s> at its end, as some endpoints leave them there."""
    while (found := _TURN_END.search(text, max(len(text) - 40, 0))) is not None:
        text = text[: found.start()].rstrip()
    return text


def last_tagged(text: str, opened: bool = False) -> str | None:
    """What the last <answer>...</answer> after the reasoning holds, as it is; None where there is none.

    `opened`: the prompt had opened the reasoning already.
    """
    answer = after_reasoning(text, opened)
    marks = [] if answer is None else list(_tags(answer))
    return marks[-1].said if marks else None


def _boxes(text: str) -> Iterator[_Mark]:
    r"""\boxed{...} and \fbox{...}, the outermost, in order; braces balanced, empty ones left out."""
    open_braces: list[re.Match[str] | None] = []  # None: a plain brace
    found: list[_Mark] = []
    for token in _BRACES.finditer(text):
        if token["bare"] is not None:
            found.append(_Mark(token.start(), token.end(), token["bare"].rstrip(".,/")))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                while found and found[-1].start > box.start():
                    found.pop()  # inside this one
                found.append(_Mark(box.start(), token.end(), text[box.end() : token.start()]))
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token)
    found = [mark for mark in found if mark.said and mark.said.strip()]
    unfinished = [_Mark(box.start(), len(text), None) for box in open_braces if box is not None]
    yield from sorted([*found, *unfinished], key=lambda mark: mark.start)


def _tags(text: str) -> Iterator[_Mark]:
    """<answer>...</answer>, each from the opening next to its end; one without an end is unfinished."""
    opening: re.Match[str] | None = None
    for token in _TAG.finditer(text):
        if not token[1]:
            opening = token
        elif opening is not None:
            said = text[opening.end() : token.start()]
            if said.strip():
                yield _Mark(opening.start(), token.end(), said)
            opening = None
    if opening is not None:
        yield _Mark(opening.start(), len(text), None)


def _lines(pattern: re.Pattern[str], text: str, ended: bool) -> Iterator[_Mark]:
    """Lines that say the answer, or whose next line does."""
    for match in pattern.finditer(text):
        said = next(
            (match[group] for group in ("said", "chinese", "abroad") if match.groupdict().get(group)), ""
        )
        end = match.end()
        if not said.strip(" \t*_`") and (block := _NEXT_BLOCK.match(text, match.end())) is not None:
            said, end = block["code"] or block["text"], block.end()
        if not ended and end >= len(text.rstrip(" \t")):
            yield _Mark(match.start(), len(text), None)
        elif said.strip(" \t*_`"):
            yield _Mark(match.start(), end, _first_sentence(_POLITE.sub("", said)))


def _first_sentence(said: str) -> str:
    said = _HOPE.sub("", said.strip())
    inner = _SENTENCE.search(said) if len(said) <= _TAIL else None
    said = (inner["said"] if inner is not None else said).strip()
    end = _SENTENCE_END.search(said)
    return said[: end.start()].strip() if end is not None and end.start() else said


def _joined(text: str, boxes: Sequence[_Mark], last: _Mark) -> str:
    """What the box `last` holds, with the boxes before it that are parts of the same answer."""
    parts = [str(last.said).strip()]
    at = boxes.index(last)
    while at > 0 and boxes[at - 1].said is not None:
        between = text[boxes[at - 1].end : boxes[at].start]
        if len(between) > _JOINT_LIMIT or not _JOINT.fullmatch(_SPACING.sub(r" \1 ", between).strip()):
            break
        at -= 1
        parts.append(str(boxes[at].said).strip())
    return ", ".join(dict.fromkeys(reversed(parts)))


def _unmarked(text: str, forms: Sequence[AnswerForm]) -> str | None:
    """The answer of a text without a mark, where `forms` allow one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if "sentence" in forms and (match := _SENTENCE.search(_HOPE.sub("", text[-_TAIL:].rstrip()))) is not None:
        said = match["said"].strip().rstrip(".。")
        reason = _REASON.search(said)
        if said and not _SENTENCE_END.search(said if reason is None else said[: reason.start()]):
            after = "" if reason is None else said[reason.end() :]
            if not _SENTENCE_END.search(after) and not _TAKEN_BACK.search(after):
                return said[: len(said) if reason is None else reason.start()]
    if "line" in forms and (hashes := _LAST_HASHES.fullmatch(lines[-1])) is not None:
        return hashes["said"]
    if "last_line" in forms:
        return lines[-1]
    if "number" in forms:
        numbers = _NUMBER.findall(text)
        return str(numbers[-1]).rstrip(",") if numbers else None
    return None
