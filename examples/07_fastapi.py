"""The gateway mounted in a FastAPI app, which gives each of its users a token for their own sessions."""

import json
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import httpx
from fastapi import Depends, FastAPI, Header, HTTPException

from agentrun import Context, Worker, agent, brokers
from agentrun.gateway import Auth, Gateway, Keys, mint
from agentrun.gateway.server import serving

SECRET = "what the app and its gateway share: 32 bytes at least"
URL = "memory://fastapi"


@agent(name="echo")
async def echo(ctx: Context):
    for word in ("You said: ", ctx.text):
        yield word
        await anyio.sleep(0.01)


gateway = Gateway(URL, auth=Auth(Keys.secret(SECRET)), agent="echo")
app = FastAPI(lifespan=gateway.lifespan)
app.mount("/agents", gateway)


def logged_in(x_user: Annotated[str | None, Header()] = None) -> str:
    """Who asks: your session cookie, say. This example takes the browser's word for it; do not."""
    if x_user is None:
        raise HTTPException(401)
    return x_user


@app.post("/token")
def token(user: Annotated[str, Depends(logged_in)]) -> dict[str, str]:
    rights = ["read", "send", "cancel", "answer"]
    return {"token": mint(SECRET, user=user, sessions=[f"{user}-*"], rights=rights, ttl=300)}


async def events(response: httpx.Response) -> AsyncIterator[dict]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


async def use(http: httpx.AsyncClient) -> None:
    made = await http.post("/token", headers={"x-user": "ada"})
    http.headers["authorization"] = f"Bearer {made.json()['token']}"

    sent = await http.post("/agents/v1/sessions/ada-1/turns", json={"input": "hello", "id": "t-1"})
    print(sent.status_code, sent.json())

    path = "/agents/v1/sessions/ada-1/turns/t-1/events"
    async with http.stream("GET", path, headers={"accept": "text/event-stream"}) as response:
        async for item in events(response):
            event = item["event"]
            print(item["offset"], event["type"], event.get("text") or event.get("user") or "")

    refused = await http.get("/agents/v1/sessions/bob-1/events")
    print(refused.status_code, refused.json()["detail"])


async def main() -> None:
    async with brokers.connect(URL) as broker, anyio.create_task_group() as group:
        worker = Worker(broker, [echo])
        await group.start(worker.run)

        async with serving(app) as url, httpx.AsyncClient(base_url=url) as http:  # in production: uvicorn module:app
            await use(http)

        worker.drain()


anyio.run(main)

# Output:
# 202 {'session': 'ada-1', 'turn': 't-1', 'offset': 1}
# 1 turn.requested ada
# 2 turn.started
# 3 text.delta You said:
# 4 text.delta hello
# 5 turn.completed
# 403 the token does not give the right read in this session
