# The agent and the backend of the README.
import agentrun
from agentrun import Context, agent
from agentrun.adapters.litellm import litellm_stream


@agent
async def support(ctx: Context):
    async for chunk in litellm_stream(ctx, model="gpt-4.1-mini"):
        yield chunk


async def backend(request_id: str, saved: int) -> None:
    async with agentrun.connect("nats://localhost:4222", agent="support") as client:
        session = client.session("s-42")
        turn = await session.send("hello", id=request_id)  # idempotent
        async for event in session.events(after=saved):  # from any offset, live
            saved = event.offset
        receipt = await turn.cancel()  # from any process
        print(receipt.status, receipt.offset, receipt.took)
