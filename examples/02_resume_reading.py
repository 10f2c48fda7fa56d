"""A reader that goes away comes back with the last offset it has, and misses nothing."""

import anyio

import agentrun
from agentrun import Context, Worker, agent, brokers


@agent
async def count(ctx: Context):
    for number in range(8):
        yield f"{number} "
        await anyio.sleep(0.01)


async def main() -> None:
    async with brokers.connect("memory://reading") as broker, anyio.create_task_group() as group:
        worker = Worker(broker, [count])
        await group.start(worker.run)

        async with agentrun.connect("memory://reading", agent="count") as client:
            session = client.session("s-1")
            turn = await session.send("go")

            saved = 0
            seen: list[str] = []
            async for event in session.events(after=saved):
                saved = event.offset
                seen.append(getattr(event.data, "text", ""))
                if saved == 5:
                    break
            print("first reader:", "".join(seen), "- leaves at offset", saved)

            await turn.result()
            async for event in session.events(after=saved, follow=False):
                seen.append(getattr(event.data, "text", ""))
            print("together:    ", "".join(seen))

            history = await session.history()
            print("history:     ", history.messages()[-1]["content"])

        worker.drain()


anyio.run(main)

# Output:
# first reader: 0 1 2  - leaves at offset 5
# together:     0 1 2 3 4 5 6 7
# history:      0 1 2 3 4 5 6 7
