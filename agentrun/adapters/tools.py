"""Python functions as tools of a model: their schema, and calling them with what the model wrote."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from agentrun.agent import Context
from agentrun.errors import AuthorSignal, InvalidInput, LeaseLost
from agentrun.wire import AskKind, ToolCall, ToolResult

__all__ = ["Tool", "run_calls", "toolset"]

_UNFIT = re.compile(r"[^A-Za-z0-9_-]")


class Tool:
    """A function as a model sees it.

    Parameters are described by their annotations (whatever msgspec decodes: builtins, dataclasses, Structs, Literals,
    ``Annotated[int, msgspec.Meta(ge=0)]``), and by the docstring's first part and its ``Args:`` section. A parameter
    annotated `Context` is given the context and not shown to the model.

    Args:
        fn: A function, or a coroutine function. A function that is not a coroutine runs in a thread; when the turn is
            stopped it is left to end by itself and its result is dropped.
        name: What the model calls it; default is the function's name.

    Raises:
        InvalidInput: The function's parameters cannot be described to a model.
    """

    def __init__(self, fn: Callable[..., Any], *, name: str | None = None) -> None:
        self.fn = fn
        self.name: str = name or getattr(fn, "__name__", type(fn).__name__)
        doc = inspect.getdoc(fn) or ""
        self.description = re.split(r"\n\s*\n\s*Args:|\n\s*Args:\s*\n", doc, maxsplit=1)[0].strip()
        fields, self._context = _fields(self.name, fn)
        self._names = [name for name, *_ in fields]
        try:
            self._input = msgspec.defstruct(self.name, fields, forbid_unknown_fields=True)
            (_,), components = msgspec.json.schema_components([self._input], ref_template="#/$defs/{name}")
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"tool {self.name}: its parameters cannot be described to a model: {error}") from error
        self.parameters: dict[str, Any] = {k: v for k, v in components.pop(self.name).items() if k != "title"}
        for field, text in _described(doc).items():
            if field in self.parameters["properties"]:
                self.parameters["properties"][field].setdefault("description", text)
        if components:
            self.parameters["$defs"] = components

    @property
    def spec(self) -> dict[str, Any]:
        """The tool in the provider's shape."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def bind(self, arguments: Any, ctx: Context | None) -> dict[str, Any]:
        """Return decoded JSON as what the function is called with.

        Raises:
            msgspec.ValidationError: The arguments are not what the function takes.
            InvalidInput: It wants a context and there is none.
        """
        # strict=False: models write "3" for 3 now and then, and mean it.
        value = msgspec.convert(arguments, self._input, strict=False)
        given: dict[str, Any] = {name: getattr(value, name) for name in self._names}
        if self._context:
            if ctx is None:
                raise InvalidInput(f"tool {self.name} takes a Context: give the model the context, not messages")
            given[self._context] = ctx
        return given

    async def run(self, given: dict[str, Any]) -> Any:
        """Call the function and return its result as JSON can hold it."""
        if _is_async(self.fn):
            result = await self.fn(**given)
        else:
            result = await anyio.to_thread.run_sync(functools.partial(self.fn, **given), abandon_on_cancel=True)
        return msgspec.to_builtins(result)


def toolset(tools: Iterable[Callable[..., Any] | Tool]) -> dict[str, Tool]:
    """Return the tools by name.

    Raises:
        InvalidInput: Two have one name, or one cannot be described.
    """
    named: dict[str, Tool] = {}
    for item in tools:
        tool = item if isinstance(item, Tool) else Tool(item)
        if tool.name in named:
            raise InvalidInput(f"two tools are called {tool.name}")
        named[tool.name] = tool
    return named


async def run_calls(
    calls: Sequence[ToolCall], tools: dict[str, Tool], ctx: Context | None
) -> tuple[list[ToolResult], list[ToolResult]]:
    """Run the calls side by side; return all results in order, and those that still have to be appended.

    With a context, a result that is there while other calls still run is appended at once: if one of those suspends
    the turn, or the worker dies, what is settled stays settled and is not run again.

    Raises:
        AuthorSignal: A tool raised it; the other calls are cancelled.
        LeaseLost: The turn is no longer ours.
    """
    results: dict[int, ToolResult] = {}
    appended: set[int] = set()
    raised: list[Exception] = []

    async def one(index: int, call: ToolCall, group: anyio.abc.TaskGroup) -> None:
        try:
            results[index] = await _answer(call, tools, ctx)
            if ctx is not None and len(results) < len(calls):
                appended.add(index)
                await ctx.emit(results[index])
        except (AuthorSignal, LeaseLost) as error:
            # Taken out of the group by hand, or it would come as an ExceptionGroup that nobody expects.
            raised.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for index, call in enumerate(calls):
            group.start_soon(one, index, call, group)
    if raised:
        raise raised[0]
    ordered = [results[index] for index in range(len(calls))]
    return ordered, [result for index, result in enumerate(ordered) if index not in appended]


async def _answer(call: ToolCall, tools: dict[str, Tool], ctx: Context | None) -> ToolResult:
    tool = tools.get(call.name)
    if tool is None:
        known = ", ".join(sorted(tools)) or "none"
        return ToolResult(call=call.call, error=f"there is no tool {call.name!r}; there are: {known}")
    if isinstance(call.input, str):
        return ToolResult(call=call.call, error=f"the arguments are not valid JSON: {call.input[:200]}")
    try:
        given = tool.bind(call.input, None if ctx is None else _CallContext(ctx, call.call))
    except msgspec.ValidationError as error:
        return ToolResult(call=call.call, error=f"invalid arguments: {error}")
    try:
        output = await tool.run(given)
    except (AuthorSignal, LeaseLost):
        raise
    except Exception as error:
        return ToolResult(call=call.call, error=f"{type(error).__name__}: {error}")
    return ToolResult(call=call.call, output=output)


class _CallContext(Context):
    """The turn's context as one tool call sees it: its questions are about the call, and numbered within it.

    Numbered over the whole run they would change when the agent is run again and settled calls are not.
    """

    __slots__ = ("_call", "_questions")

    def __init__(self, ctx: Context, call: str) -> None:
        self.__dict__ = ctx.__dict__  # the same turn: usage or finish_reason set by a tool is the turn's
        self._call = call
        self._questions = 0

    async def ask(
        self,
        prompt: str = "",
        *,
        kind: AskKind = "approval",
        choices: Sequence[str] | None = None,
        id: str | None = None,
        call: str | None = None,
        tool: str | None = None,
        input: Any = None,
        deadline: float | None = None,
        hold: float | None = None,
    ) -> Any:
        self._questions += 1
        self._asked -= 1  # not one of the agent's own numbered questions
        nth = "" if self._questions == 1 else f"-{self._questions}"
        return await super().ask(
            prompt,
            kind=kind,
            choices=choices,
            id=id or _UNFIT.sub("_", self._call)[:120] + nth,
            call=call or self._call,
            tool=tool,
            input=input,
            deadline=deadline,
            hold=hold,
        )


def _is_async(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def _fields(name: str, fn: Callable[..., Any]) -> tuple[list[Any], str | None]:
    """Return the parameters as msgspec fields, and the one that takes the context."""
    try:
        hints = typing.get_type_hints(fn if inspect.isroutine(fn) else type(fn).__call__, include_extras=True)
    except NameError as error:
        raise InvalidInput(f"tool {name}: an annotation cannot be resolved: {error}") from error
    fields: list[Any] = []
    context: str | None = None
    for parameter in inspect.signature(fn).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InvalidInput(f"tool {name}: parameter {parameter} cannot be given by name")
        hint = hints.get(parameter.name, Any)
        if isinstance(hint, type) and issubclass(hint, Context):
            context = parameter.name
        elif parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            fields.append((parameter.name, hint, _default(parameter.default)))
    # A Struct wants its required fields first; a function's keyword-only parameters come in any order.
    return sorted(fields, key=len), context


def _default(value: Any) -> Any:
    if isinstance(value, list | dict | set | bytearray):
        return msgspec.field(default_factory=functools.partial(_copy, value))
    return value


def _copy(value: Any) -> Any:
    return value.copy()


def _described(doc: str) -> dict[str, str]:
    """Return what the ``Args:`` section says of each parameter."""
    section = re.search(r"^Args:\s*\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    indent = re.match(r"[ \t]+", section[1])
    if indent is None:
        return {}
    entries = re.split(rf"^{indent[0]}(?=\S)", section[1], flags=re.MULTILINE)
    found: dict[str, str] = {}
    for entry in entries:
        if match := re.match(r"\*{0,2}(\w+)(?:\s*\([^)]*\))?:\s*(.*)", entry, re.DOTALL):
            found[match[1]] = " ".join(match[2].split())
    return found
