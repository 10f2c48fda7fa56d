"""What a model says in a test, written down: for agents that are given a model, and for those on a real API client.

::

    answer = Script().say("Let me see. ").call("add", {"a": 1, "b": 2})
    busy = Script().fail(429, retry_after=1)

    model = ScriptedModel(busy, answer)      # a plain async iterator of what an agent yields
    fake.play(busy, answer)                  # `agentrun.testing.openai_server.FakeOpenAI`: over HTTP

One `Script` answers one call of the model.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import anyio
from msgspec import Struct, structs

from agentrun.agent import Item
from agentrun.testing.steps import Call, Drop, Fail, Pause, Refuse, Stall, Step, Text, Thought, words
from agentrun.wire import ReasoningDelta, ToolCall, Usage

__all__ = ["ModelCall", "ModelError", "Script", "ScriptedModel"]


class Script(Struct, frozen=True):
    """One answer, step by step. Each method returns a script with one step more; none changes its own.

    Attributes:
        steps: The steps, as `agentrun.testing.steps` has them.
        usage: Tokens of the prompt and of the answer; None: a `FakeOpenAI` counts words, a `ScriptedModel` says none.
    """

    steps: tuple[Step, ...] = ()
    usage: tuple[int, int] | None = None

    def say(self, text: str, *, delay: float = 0.0) -> Script:
        """Text, word by word, each ``delay`` seconds after the last."""
        return self._and(Text(text, delay))

    def think(self, text: str, *, delay: float = 0.0) -> Script:
        """Reasoning, as `say`."""
        return self._and(Thought(text, delay))

    def call(self, tool: str, arguments: dict[str, Any] | str | None = None, *, id: str = "") -> Script:
        """A tool call. Arguments as text are sent as they are, JSON or not. The default id counts: ``call_0``."""
        return self._and(Call(tool, {} if arguments is None else arguments, id))

    def pause(self, seconds: float) -> Script:
        """Silence for a time."""
        return self._and(Pause(seconds))

    def stall(self) -> Script:
        """Silence until the caller gives up."""
        return self._and(Stall())

    def fail(self, status: int = 500, message: str = "the model failed", *, retry_after: float | None = None) -> Script:
        """An error: an HTTP status where nothing was said before it, else one inside the stream.

        Args:
            status: Such as 429 (too many requests), 401 or 503.
            message: The provider's words.
            retry_after: Seconds the provider asks to wait; sent with an HTTP status only.
        """
        if any(not isinstance(step, Pause) for step in self.steps):
            return self._and(Fail(message, str(status)))
        return self._and(
            Refuse(status, message, None, {} if retry_after is None else {"retry-after": f"{retry_after:g}"})
        )

    def drop(self) -> Script:
        """The connection breaks off."""
        return self._and(Drop())

    def count(self, prompt: int, completion: int) -> Script:
        """Say how many tokens were used."""
        return structs.replace(self, usage=(prompt, completion))

    def _and(self, step: Step) -> Script:
        return structs.replace(self, steps=(*self.steps, step))


class ModelError(Exception):
    """What a `ScriptedModel` raises where its script fails or drops.

    Attributes:
        status: The HTTP status a provider would have sent; None for a connection that broke.
        retry_after: Seconds the provider asks to wait, if it does.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ModelCall(Struct, frozen=True):
    """The arguments of one call of a `ScriptedModel`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ScriptedModel:
    """A model in place of the one an agent is made with: called with anything, it gives what an agent yields.

    Text comes word by word as ``str``, reasoning as `ReasoningDelta`, tool calls as `ToolCall`, counts as `Usage`. A
    failing script raises `ModelError`. One call more than there are scripts raises AssertionError.

    Args:
        scripts: The answers, in the order of the calls.

    Attributes:
        calls: What it was called with, in order.
    """

    def __init__(self, *scripts: Script) -> None:
        self.calls: list[ModelCall] = []
        self._scripts = scripts

    def __call__(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Item]:
        """Answer one call, with the next script."""
        self.calls.append(ModelCall(args, kwargs))
        if len(self.calls) > len(self._scripts):
            raise AssertionError(f"call {len(self.calls)} of the model, and {len(self._scripts)} answers are scripted")
        return self._play(self._scripts[len(self.calls) - 1])

    async def _play(self, script: Script) -> AsyncGenerator[Item]:
        calls = 0
        for step in script.steps:
            match step:
                case Text() | Thought():
                    for word in words(step.text):
                        await anyio.sleep(step.delay)
                        yield word if isinstance(step, Text) else ReasoningDelta(text=word)
                case Call():
                    yield ToolCall(call=step.id or f"call_{calls}", name=step.name, input=_input(step))
                    calls += 1
                case Pause():
                    await anyio.sleep(step.seconds)
                case Stall():
                    await anyio.sleep_forever()
                case Fail():
                    raise ModelError(step.message, int(step.code) if step.code and step.code.isdecimal() else 500)
                case Refuse():
                    after = step.headers.get("retry-after")
                    raise ModelError(step.message, step.status, None if after is None else float(after))
                case Drop():
                    raise ModelError("the connection broke")
        if script.usage is not None:
            yield Usage(input_tokens=script.usage[0], output_tokens=script.usage[1])


def _input(call: Call) -> Any:
    if isinstance(call.arguments, dict):
        return call.arguments
    try:
        return json.loads(call.arguments)
    except ValueError:
        return call.arguments
