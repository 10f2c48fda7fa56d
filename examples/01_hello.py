"""An agent, a worker and a client, in one process on the broker in memory.

On a fleet the three live in different processes and the URL is ``nats://…``; nothing else changes.
"""

import anyio

import agentrun
from agentrun import Context, Worker, agent, brokers


@agent
async def hello(ctx: Context):
    """Yield text; each piece is appended to the session's log and reaches every reader."""
    for word in ("Hello", " ", ctx.text, "!"):
        yield word
        await anyio.sleep(0.01)


async def main() -> None:
    async with brokers.connect("memory://hello") as broker, anyio.create_task_group() as group:
        worker = Worker(broker, [hello])
        await group.start(worker.run)

        async with agentrun.connect("memory://hello") as client:
            turn = await client.session("s-42").send("world", agent="hello", id="request-1")
            async for event in turn.events():
                print(event.offset, event.type, getattr(event.data, "text", ""))
            print((await turn.result()).text)

        worker.drain()


anyio.run(main)

# Output:
# 1 turn.requested
# 2 turn.started
# 3 text.delta Hello
# 4 text.delta
# 5 text.delta world
# 6 text.delta !
# 7 turn.completed
# Hello world!
