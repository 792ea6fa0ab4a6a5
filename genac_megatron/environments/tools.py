"""Tools over a task's problems: a turn that calls some is answered with results, one without a call ends.

Calls are read in the forms of Qwen and Hermes (`<tool_call>{"name": ..., "arguments": ...}</tool_call>`,
several in a turn) and of Llama (the turn is objects `{"name": ..., "parameters": ...}`, `;` between them).
The chat template shows the tools, whose schemas are the prompt's.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from genac_megatron.environments.base import Step
from genac_megatron.environments.sandbox import run_python
from genac_megatron.records import Prompt

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
MOST_CALLS = 8  # of a turn
LONGEST = 500  # characters of an expression
LARGEST = 10**300


def schema(name: str, says: str, argument: str, what: str) -> dict[str, Any]:
    """A tool's JSON schema, as chat templates take it."""
    properties = {argument: {"type": "string", "description": what}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": says, "parameters": parameters}}


SCHEMAS = {
    "calculator": schema(
        "calculator", "Work out an arithmetic expression.", "expression", "Such as (3 + 4) * sqrt(2)."
    ),
    "python": schema(
        "python", "Run a Python program and see what it prints. Each begins anew.", "code",
        "Such as print(sum(range(10))).",
    ),
}  # fmt: skip


class Tools:
    """The tools of a conversation. seconds: of a turn's programs, together. mib: of a program's memory."""

    remembers = False  # an answer is of its turn alone

    def __init__(self, names: Sequence[str], seconds: float, mib: int) -> None:
        self._run: dict[str, Callable[[dict[str, Any]], str]] = {
            "calculator": lambda given: calculate(given["expression"]),
            "python": lambda given: self._program(given["code"]),
        }
        self._names, self._seconds, self._mib = tuple(names), seconds, mib
        self._until = 0.0

    def reset(self, prompt: Prompt, seed: int) -> None:
        """The prompt's own messages, with the tools' schemas (stages/conversations.py)."""

    def step(self, turn: str) -> Step:
        """The results of the turn's calls; without a call the task's verifier reads the turn."""
        found = calls(turn)
        if not found:
            return Step(done=True)
        self._until = time.monotonic() + self._seconds
        results = [self._result(call) for call in found[:MOST_CALLS]]
        if len(found) > MOST_CALLS:
            results.append(f"error: {len(found)} calls in a turn: the first {MOST_CALLS} are answered")
        return Step([{"role": "tool", "content": result} for result in results])

    def _result(self, call: Any) -> str:
        if isinstance(call, str):
            return f"error: {call}"
        name, given = call
        if name not in self._names:
            return f"error: there is no tool {name!r:.60}; there is {', '.join(self._names)}"
        try:
            return self._run[name](given)
        except (KeyError, TypeError) as error:
            return f"error: the arguments of {name} lack {error}"

    def _program(self, code: Any) -> str:
        left = self._until - time.monotonic()
        if not isinstance(code, str) or not code.strip():
            return "error: code is the text of a program"
        if left <= 0.0:
            return f"error: the programs of a turn have {self._seconds:g} s together, and they are over"
        return run_python(code, left, self._mib)


def calls(turn: str) -> list[tuple[str, dict[str, Any]] | str]:
    """A turn's tool calls, (name, arguments) each, or what is wrong with one."""
    texts = [text.strip() for text in CALL.findall(turn)]
    if not texts and turn.strip().startswith("{") and '"name"' in turn:
        texts = _objects(turn.strip())
    return [_call(text) for text in texts]


def _objects(text: str) -> list[str]:
    """JSON objects one behind the other, as text; what follows them is no call."""
    found, at, decoder = list[str](), 0, json.JSONDecoder()
    while text.startswith("{", at):
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError):
            return [*found, text[at:]]  # which is told
        found.append(text[at:end])
        at = end + len(text[end:]) - len(text[end:].lstrip("; \n"))
    return found


def _call(text: str) -> tuple[str, dict[str, Any]] | str:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the call is not JSON: {str(error)[:80]}"
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return 'a call is {"name": ..., "arguments": {...}}'
    arguments = given.get("arguments", given.get("parameters", {}))
    if isinstance(arguments, str):  # some write them as JSON once more
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return 'a call is {"name": ..., "arguments": {...}}'
    if not isinstance(arguments, dict):
        return 'a call is {"name": ..., "arguments": {...}}'
    return given["name"], arguments


# --- the calculator ------------------------------------------------------------------------------

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt, "abs": abs, "min": min, "max": max, "log": math.log, "exp": math.exp,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "floor": math.floor, "ceil": math.ceil,
    "gcd": math.gcd, "round": lambda x, digits=0: _round(x, digits),
}  # fmt: skip
_NAMES = {"pi": math.pi, "e": math.e}


def calculate(expression: Any) -> str:
    """An arithmetic expression's value as text, or what is wrong with it. Nothing else is evaluated."""
    if not isinstance(expression, str) or len(expression) > LONGEST:
        return f"error: an expression is text of at most {LONGEST} characters"
    try:
        value = _value(ast.parse(expression.replace("^", "**"), mode="eval").body)
        return str(value)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"error: {str(error)[:120] or type(error).__name__}"


def _value(node: ast.expr) -> int | float:
    found: Any
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("only numbers are worked with")
        case ast.Constant(value=int() | float() as found):
            pass
        case ast.Name(id=name) if name in _NAMES:
            found = _NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            found = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            found = _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            found = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            found = _BINARY[type(op)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            found = _FUNCTIONS[name](*map(_value, args))
        case _:
            raise ValueError("only numbers, + - * / // % ^, parentheses and functions are worked with")
    if isinstance(found, complex) or abs(found) > LARGEST:
        raise ValueError("the value is no real number below 1e300")
    return found  # type: ignore[no-any-return]


def _round(x: int | float, digits: int | float) -> int | float:
    """To a place that numbers below LARGEST can have: Python's own writes 10 ** -digits out."""
    places = max(-400, min(400, int(digits)))
    return round(x, places) if places else round(x)


def _power(base: int | float, exponent: int | float) -> Any:
    if base and exponent * math.log10(abs(base)) > math.log10(LARGEST):
        raise ValueError("the value is no real number below 1e300")
    return base**exponent
