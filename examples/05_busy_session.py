"""What becomes of a message sent while the session is busy is the sender's choice."""

import anyio

import agentrun
from agentrun import Context, SessionBusy, Worker, agent, brokers


@agent
async def writer(ctx: Context):
    yield f"[{ctx.text}] "
    for _ in range(20):
        await anyio.sleep(0.01)
        for text in await ctx.steering():
            yield f"(steered: {text}) "


async def main() -> None:
    async with brokers.connect("memory://busy") as broker, anyio.create_task_group() as group:
        worker = Worker(broker, [writer])
        await group.start(worker.run)

        async with agentrun.connect("memory://busy", agent="writer") as client:
            session = client.session("s-1")
            first = await session.send("one")
            second = await session.send("two")  # enqueue: waits in line
            try:
                await session.send("three", on_busy="reject")
            except SessionBusy:
                print("three: rejected")
            steer = await first.steer("shorter")
            print("one:  ", (await first.result()).text)
            print("steer:", "taken" if await steer.consumed_by() == first.id else "waits")
            print("two:  ", (await second.result()).text)

            slow = await session.send("four")
            urgent = await session.send("five", on_busy="interrupt")
            print("five: ", (await urgent.result()).text)
            print("four: ", (await session.history()).turns[slow.id].state)

        worker.drain()


anyio.run(main)

# Output:
# three: rejected
# one:   [one] (steered: shorter)
# steer: taken
# two:   [two]
# five:  [five]
# four:  cancelled
