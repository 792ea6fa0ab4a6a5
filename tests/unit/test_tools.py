"""Tools: how calls are read, what the calculator evaluates."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.environments import make_environment
from genac_megatron.environments.host import Job
from genac_megatron.environments.tools import SCHEMAS, Tools, calculate, calls
from genac_megatron.errors import InputError
from genac_megatron.recipe.environments import EnvironmentConfig
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.stages.conversations import _need_tools, opened
from tests.unit.test_conversations import PROMPT, TINY

TASK = StateTrackingTask(kind="state_tracking")


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_are_read_in_the_families_forms() -> None:
    one, two = call("calculator", expression="1+1"), call("python", code="print(2)")
    wanted = [("calculator", {"expression": "1+1"}), ("python", {"code": "print(2)"})]
    assert calls(f"<think>so</think>\n{one}\n{two}") == wanted
    assert calls('{"name": "calculator", "parameters": {"expression": "1+1"}}') == wanted[:1]
    llama = '{"name": "calculator", "parameters": {"expression": "1+1"}}; {"name": "python", "parameters": '
    assert calls(llama + '"{\\"code\\": \\"print(2)\\"}"}\nand so') == wanted
    assert calls(llama)[0] == wanted[0]
    assert str(calls(llama)[1]).startswith("the call is not JSON: ")
    assert calls('{"name": "x", "arguments": "no"}') == ['a call is {"name": ..., "arguments": {...}}']
    assert calls("The answer is {x}.") == []
    assert calls("<tool_call>{broken") == ["the call is not JSON: Expecting property name enclosed in double "
                                           "quotes: line 1 column 2 (char 1)"]  # fmt: skip
    assert calls("<tool_call>[1]</tool_call>") == ['a call is {"name": ..., "arguments": {...}}']


def test_a_turn_without_a_call_is_the_answer() -> None:
    tools = Tools(["calculator"], 5.0, 256)
    assert tools.step("Answer: 4").done
    shown = tools.step(call("calculator", expression="2^10") + call("python", code="1") + call("calculator"))
    assert [message["content"] for message in shown.observation] == [  # type: ignore[index]
        "1024", "error: there is no tool 'python'; there is calculator",
        "error: the arguments of calculator lack 'expression'",
    ]  # fmt: skip
    assert not shown.done
    shown = tools.step(call("calculator", expression="1") * 10)
    contents = [message["content"] for message in shown.observation]  # type: ignore[index]
    assert contents == ["1"] * 8 + ["error: 10 calls in a turn: the first 8 are answered"]


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("(3 + 4) * 2", "14"), ("7 / 2", "3.5"), ("-2 ** 2", "-4"), ("sqrt(16) + gcd(12, 18)", "10.0"),
        ("round(2.567, 2)", "2.57"), ("round(2.5)", "2"), ("round(5, -100000000)", "0"), ("10 ** -2", "0.01"),
        ("10 ** -400", "0.0"), ("0 ** -1", "error: "),
        ("1 / 0", "error: division by zero"), ("10 ** 400", "error: the value is no real"),
        ("9 ** 9 ** 9 ** 9", "error: the value is no real"), ("(-8) ** 0.5", "error: the value is no real"),
        ("__import__('os')", "error: only numbers"), ("().__class__", "error: only numbers"),
        ("'a' * 10**9", "error: only numbers"), ("True", "error: only numbers"), ("1 +", "error: "),
        ("(" * 400 + "1" + ")" * 400, "error: "), ("1" * 501, "error: an expression is text"),
    ],
)  # fmt: skip
def test_the_calculator_works_out_arithmetic_alone(expression: str, wanted: str) -> None:
    assert calculate(expression).startswith(wanted)


@given(st.text("0123456789+-*/^(). sqrtmaxelogound,", max_size=40))
def test_no_expression_raises(expression: str) -> None:
    assert isinstance(calculate(expression), str)


def test_tools_stand_in_the_prompt_and_answer_in_their_process() -> None:
    given = {"kind": "tools", "tools": ["calculator"], "step_s": 20.0}
    environment = make_environment(EnvironmentConfig.model_validate(given), TASK)
    showing = copy.deepcopy(TINY)
    showing.chat_template = "{{ tools | tojson if tools }}" + str(TINY.chat_template)

    async def play() -> tuple[str, str]:
        prompt = await opened(environment, showing, PROMPT, (1,))
        job = Job("a", prompt, 0, (call("calculator", expression="6*7"),), prompt.opening)
        answer = await environment.ask(job)
        assert answer.step is not None, answer.failure
        return showing.decode(prompt.ids), answer.step.messages[0][1]

    try:
        text, result = asyncio.run(play())
    finally:
        environment.close()
    assert '"name": "calculator"' in text
    assert result == "42"
    with pytest.raises(InputError, match="leaves out what is to be shown: the tool calculator"):
        _need_tools(TINY, [SCHEMAS["calculator"]])
