from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from agentrun.adapters.tools import Tool, toolset
from agentrun.agent import Context
from agentrun.errors import InvalidInput


class Place(msgspec.Struct):
    city: str
    zip: int = 0


def search(
    query: str,
    *,
    near: Place | None = None,
    limit: Annotated[int, msgspec.Meta(ge=1, description="how many")] = 5,
    kind: Literal["web", "news"] = "web",
    tags: list[str] = ["a"],  # noqa: B006 - what is tested is that it is not shared
) -> dict[str, Any]:
    """Search the web.

    Second paragraph.

    Args:
        query: What to look for,
            in a few words.
        limit (int): Not this: the annotation says it.
        kind: Where.

    Returns:
        What was found.
    """
    tags.append("b")
    return {"query": query, "near": near, "limit": limit, "kind": kind, "tags": tags}


def test_a_tool_is_described_by_signature_and_docstring() -> None:
    function = Tool(search).spec["function"]
    assert function["name"] == "search"
    assert function["description"] == "Search the web.\n\nSecond paragraph."
    parameters = function["parameters"]
    assert parameters["required"] == ["query"]
    assert parameters["properties"]["query"] == {"type": "string", "description": "What to look for, in a few words."}
    assert parameters["properties"]["limit"]["description"] == "how many"
    assert parameters["properties"]["kind"]["enum"] == ["news", "web"]
    assert parameters["$defs"]["Place"]["required"] == ["city"]


async def test_arguments_are_converted_and_defaults_not_shared() -> None:
    tool = Tool(search)
    for _ in range(2):
        result = await tool.run(tool.bind({"query": "x", "near": {"city": "Rome"}, "limit": "3"}, None))
        assert result == {
            "query": "x",
            "near": {"city": "Rome", "zip": 0},
            "limit": 3,
            "kind": "web",
            "tags": ["a", "b"],
        }


@pytest.mark.parametrize("arguments", [{}, {"query": 1}, {"query": "x", "limit": 0}, {"query": "x", "no": 1}, [], "x"])
def test_arguments_that_do_not_fit_are_refused(arguments: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        Tool(search).bind(arguments, None)


def test_the_context_is_not_shown_to_the_model_and_must_be_there() -> None:
    async def tool(ctx: Context, a: int) -> None: ...

    described = Tool(tool)
    assert list(described.parameters["properties"]) == ["a"]
    with pytest.raises(InvalidInput, match="takes a Context"):
        described.bind({"a": 1}, None)


async def test_objects_with_a_call_are_tools() -> None:
    class Answering:
        """What it does."""

        async def __call__(self, a: int) -> int:
            return a + 1

    tool = Tool(Answering(), name="answering")
    assert await tool.run(tool.bind({"a": 1}, None)) == 2


def test_what_cannot_be_described_is_refused_when_declared() -> None:
    def many(*args: int) -> None: ...

    def strange(a: threading.Lock) -> None: ...  # noqa: F821

    for fn in (many, strange):
        with pytest.raises(InvalidInput, match=fn.__name__):
            Tool(fn)
    with pytest.raises(InvalidInput, match="two tools"):
        toolset([search, Tool(search)])
