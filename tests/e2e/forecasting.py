"""An agent with a model and a tool, in a process that has litellm tell of its calls."""

import os

from opentelemetry import trace

from agentrun import Context, agent
from agentrun.adapters.litellm import load, stream

load().callbacks = ["otel"]


@agent
async def forecast(ctx: Context):
    """Asks a model at ``MODEL_URL``, which may call the tool."""
    async for item in stream(ctx, model="openai/m", api_base=os.environ["MODEL_URL"], api_key="k", tools=[weather]):
        yield item


def weather(city: str) -> str:
    """Tell the weather."""
    with trace.get_tracer("mine").start_as_current_span("weather station"):
        return f"rain in {city}"
