"""An agent asks for approval. While nobody answers, the turn holds no slot and no lease; any worker goes on with it."""

import anyio

import agentrun
from agentrun import Context, Worker, WorkerSettings, agent, brokers


@agent(resume=True)
async def deploy(ctx: Context):
    if not ctx.resumes:
        yield "Ready to deploy. "
    if await ctx.approve("Deploy to production?", id="go"):
        yield "Deployed."
    else:
        yield "Left alone."


async def main() -> None:
    async with brokers.connect("memory://ask") as broker, anyio.create_task_group() as group:
        worker = Worker(broker, [deploy], settings=WorkerSettings(ask_hold=0.05))
        await group.start(worker.run)

        async with agentrun.connect("memory://ask", agent="deploy") as client:
            session = client.session("s-1")
            turn = await session.send("deploy it")
            async for event in turn.events():
                print(event.offset, event.type)
                if event.type == "turn.suspended":
                    await turn.answer("go", True)
            print((await turn.result()).text)

        worker.drain()


anyio.run(main)

# Output:
# 1 turn.requested
# 2 turn.started
# 3 text.delta
# 4 input.required
# 5 turn.suspended
# 6 turn.answer
# 7 turn.started
# 8 turn.resumed
# 9 text.delta
# 10 turn.completed
# Ready to deploy. Deployed.
