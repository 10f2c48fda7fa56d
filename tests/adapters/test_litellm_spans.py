"""litellm's own spans below ours: one for each model call, and what it used said once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from agentrun import TurnFailed
from agentrun.adapters.litellm import load, stream
from agentrun.agent import Agent, Context, Item, agent
from agentrun.testing import Settings, memory_environments
from agentrun.testing.openai_server import Call, Drop, FakeOpenAI, Refuse, Stall, Text
from tests.telemetry.conftest import Seen
from tests.telemetry.trees import shape
from tests.worker.fleet import LEASE, Fleet, eventually, fleet_on

# litellm 1.106 reads these from instances of its models, which pydantic 2.11 deprecated; as an error it would be taken
# for one of the provider's.
pytestmark = pytest.mark.filterwarnings(r"ignore:Accessing the 'model_(computed_)?fields' attribute:DeprecationWarning")

_CALLBACKS = (
    "callbacks",
    "input_callback",
    "service_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
)
SECRET = "the-secret-of-the-session"


@pytest.fixture(scope="module")
def litellm() -> Any:
    return load()


@pytest.fixture
def seen(litellm: Any, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What is exported, litellm's callback included."""
    from litellm.integrations.opentelemetry import OpenTelemetry

    seen = Seen()
    for name in _CALLBACKS:
        monkeypatch.setattr(litellm, name, [])
    litellm.callbacks = [OpenTelemetry(tracer_provider=seen.tracers)]
    return seen


@pytest.fixture
async def fleet(seen: Seen) -> AsyncGenerator[Fleet]:
    async with (
        memory_environments(Settings(lease_ttl=LEASE)) as environment,
        fleet_on(environment, seen.telemetry) as fleet,
    ):
        yield fleet


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAI]:
    async with FakeOpenAI() as server:
        yield server


def weather(city: str) -> str:
    """Tell the weather."""
    return f"rain in {city}"


def asking(fake: FakeOpenAI, **options: Any) -> Agent:
    @agent
    async def asks(ctx: Context) -> AsyncIterator[Item]:
        async for item in stream(ctx, model="openai/m", api_base=fake.url, api_key="k", tools=[weather], **options):
            yield item

    return asks


async def until_told(seen: Seen, process: int = 1, litellm_request: int = 1) -> None:
    """Both tell afterwards: a worker when the last word is stored, litellm in a task of its own."""

    def told(name: str) -> int:
        return sum(span.name == name for span in seen.spans.get_finished_spans())

    await eventually(lambda: told("process asks") >= process and told("litellm_request") >= litellm_request)


def usage(span: ReadableSpan) -> dict[str, object]:
    return {key[13:]: value for key, value in (span.attributes or {}).items() if key.startswith("gen_ai.usage.")}


@pytest.mark.parametrize("options", [{}, {"metadata": {"team": "blue"}}], ids=["plain", "with the author's metadata"])
async def test_each_call_has_its_span_with_its_usage(
    seen: Seen, fleet: Fleet, fake: FakeOpenAI, options: dict[str, Any]
) -> None:
    fake.script(Call("weather", {"city": "Ulm"}), usage=(11, 5))
    fake.script(Text("It rains."), usage=(20, 6))
    await fleet.worker(asking(fake, **options))
    turn = await fleet.session("s", "asks").send(SECRET)
    assert (await turn.result(20)).text == "It rains."
    await until_told(seen, litellm_request=2)
    assert seen.tree == shape("""
        send asks
          process asks #1 completed (first_token)
            invoke_agent asks
              litellm_request
              litellm_request
    """)
    spans = seen.spans.get_finished_spans()
    assert {span.name for span in spans if usage(span)} == {"litellm_request"}
    assert [usage(span) for span in spans if span.name == "litellm_request"] == [
        {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16},
        {"input_tokens": 20, "output_tokens": 6, "total_tokens": 26},
    ]
    (invoked,) = [span for span in spans if span.name == "invoke_agent asks"]
    assert dict(invoked.attributes or {}) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "asks",
        "gen_ai.conversation.id": "s",
        "gen_ai.request.model": "openai/m",
        "agentrun.turn": turn.id,
    }
    assert SECRET not in "".join(span.to_json() for span in spans)
    assert options in ({}, {"metadata": {"team": "blue"}}), "the author's own are as they were"


async def test_a_stop_in_mid_stream(seen: Seen, fleet: Fleet, fake: FakeOpenAI) -> None:
    """litellm tells of a call when it is over: of one that is broken off it tells nothing."""
    fake.script(Text("well "), Stall())
    fake.script(Text("yes"))
    await fleet.worker(asking(fake))
    turn = await fleet.session("s", "asks").send("go")
    await fleet.until("text.delta")
    await turn.cancel()
    await (await fleet.session("s", "asks").send("again")).result(20)
    await until_told(seen, process=2)
    assert seen.tree == shape("""
        send asks
          process asks #1 cancelled cancel (first_token) (stopped) [stop: cancel]
            invoke_agent asks
        cancel cancelled
        send asks
          process asks #1 completed (first_token)
            invoke_agent asks
              litellm_request
    """)


async def test_an_error_is_in_the_span_of_its_call(seen: Seen, fleet: Fleet, fake: FakeOpenAI) -> None:
    fake.script(Text("half "), Drop())
    fake.script(Refuse(404, "no such model"))
    await fleet.worker(asking(fake))
    with pytest.raises(TurnFailed):
        await (await fleet.session("s", "asks").send("go")).result(20)
    await until_told(seen, process=2, litellm_request=2)
    assert seen.tree == shape("""
        send asks
          process asks #1 retrying error=retry (first_token)
            invoke_agent asks error=Retry
              litellm_request error=ReadError (exception)
          process asks #2 failed error=not_found [first_attempt: process asks #1]
            invoke_agent asks error=not_found
              litellm_request error=BadRequestError (exception)
    """)
