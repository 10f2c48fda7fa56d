"""A backend without an event loop is a normal user: the same nouns, each call waits."""

import threading

import anyio

import agentrun.blocking
from agentrun import Context, Worker, agent, brokers
from agentrun.brokers.server import NatsServer


@agent
async def hello(ctx: Context):
    yield f"Hello {ctx.text}!"


def work(url: str, ready: threading.Event, stop: threading.Event) -> None:
    async def main() -> None:
        async with brokers.connect(url) as broker, anyio.create_task_group() as group:
            worker = Worker(broker, [hello])
            await group.start(worker.run)
            ready.set()
            await anyio.to_thread.run_sync(stop.wait)
            worker.drain()

    anyio.run(main)


async def setup(url: str) -> None:
    async with brokers.connect(url, check=False) as broker:
        await broker.setup()


with NatsServer() as server:
    anyio.run(setup, server.url)
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=work, args=(server.url, ready, stop))
    thread.start()
    ready.wait()

    with agentrun.blocking.connect(server.url, agent="hello") as client:
        turn = client.session("s-1").send("world")
        for event in turn.events():
            print(event.offset, event.type)
        print(turn.result().text)

    stop.set()
    thread.join()

# Output:
# 1 turn.requested
# 2 turn.started
# 3 text.delta
# 4 turn.completed
# Hello world!
