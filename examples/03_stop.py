"""A stop reaches whichever worker runs the turn, and comes back with a receipt."""

import anyio

import agentrun
from agentrun import Context, TurnFailed, Worker, agent, brokers


@agent
async def endless(ctx: Context):
    try:
        while True:
            yield "… "
            await anyio.sleep(0.01)
    finally:
        print("agent: stopped")


async def main() -> None:
    async with brokers.connect("memory://stop") as broker, anyio.create_task_group() as group:
        worker = Worker(broker, [endless])
        await group.start(worker.run)

        async with agentrun.connect("memory://stop", agent="endless") as client:
            turn = await client.session("s-1").send("go on for ever")
            async for event in turn.events():
                if event.type == "text.delta":
                    break

            print("receipt:", (await turn.cancel(by="ada", reason="enough")).status)
            print("again:  ", (await turn.cancel()).status)
            print("unknown:", (await client.turn("s-1", "t-0").cancel()).status)
            try:
                await turn.result()
            except TurnFailed as error:
                print("result: ", error.state)

        worker.drain()


anyio.run(main)

# Output:
# agent: stopped
# receipt: cancelled
# again:   already_ended
# unknown: not_found
# result:  cancelled
