"""``agentrun dead``, with real workers that fail, and that are killed."""

from __future__ import annotations

import time

import pytest

from agentrun import dead
from agentrun.broker import Kind
from agentrun.client import Client
from agentrun.errors import TurnFailed
from tests.e2e.processes import Cli

GIVES_UP = ("--max-attempts", "1")


def listed(cli: Cli, *flags: object) -> list[tuple[str, str]]:
    return [(entry["session"], entry["turn"]) for entry in cli.within("dead", "list", "--json", *flags).json["dead"]]


def give_up(cli: Cli, session: str, turn: str) -> None:
    """A turn whose only attempt fails: this agent asks for another."""
    cli.ended(session, "retry 0", turn)


def test_what_gave_up_is_listed_with_its_reason(cli: Cli) -> None:
    assert cli.within("dead", "list").out == "none\n"
    cli.worker("w", *GIVES_UP)
    give_up(cli, "a", "t1")
    cli.ended("a", "fail", "t2")
    cli.ended("b", "hello", "t1")
    found = cli.within("dead", "list", "--json").json
    assert found["namespace"] == cli.namespace
    (entry,) = found["dead"]
    assert list(entry) == ["session", "turn", "agent", "offset", "code", "message", "attempts", "time"]
    assert (entry["session"], entry["turn"], entry["agent"], entry["offset"]) == ("a", "t1", "echo", 1)
    assert (entry["code"], entry["attempts"]) == ("retry", 1)
    assert entry["message"].startswith("gave up after 1 attempts: ")
    assert time.time() - 60 < entry["time"] < time.time() + 5
    assert cli.within("status", "--json").json["dead"] == 1
    assert cli.within("status").out.endswith("1 gave up, see agentrun dead list\n")
    shown = cli.run("dead", "list").out.splitlines()
    assert shown[0].split()[:3] == ["session", "turn", "agent"]
    assert shown[1].split()[:3] == ["a", "t1", "echo"]
    assert "gave up after 1 attempts" in shown[1]
    assert [s["session"] for s in cli.within("sessions", "--json").json["sessions"]] == ["b", "a"]


def test_limit_says_that_there_is_more(cli: Cli) -> None:
    cli.worker("w", *GIVES_UP)
    for n in range(3):
        give_up(cli, f"s{n}", "t")
    result = cli.within("dead", "list", "--limit", "2", "--json")
    assert [entry["session"] for entry in result.json["dead"]] == ["s0", "s1"]
    assert "more than 2" in result.err
    assert cli.within("dead", "list", "--limit", "3").err == ""
    assert listed(cli, "--agent", "other") == []


def test_retry_sends_again_and_a_second_retry_finds_nothing(cli: Cli) -> None:
    worker = cli.worker("w", *GIVES_UP)
    give_up(cli, "a", "t1")
    worker.signal(15)
    worker.wait()
    assert cli.within("dead", "retry", "a", "t1").out == "turn t1 of session a is sent again as t1-retry1\n"
    assert listed(cli) == []
    again = cli.within("dead", "retry", "a", "t1", code=1)
    assert again.err == "agentrun: turn t1 of session a is not among those that gave up (agentrun dead list)\n"
    # "retry" asks for another attempt only once: with two it ends well.
    cli.worker("patient")
    assert cli.result("a", "t1-retry1").text
    assert cli.within("history", "a").out.startswith("(replaced) › retry 0\n")
    assert [event.turn for event in cli.log("a") if event.type == "turn.requested"] == ["t1", "t1-retry1"]


def test_retry_all_of_one_agent_and_what_cannot_be_sent(cli: Cli) -> None:
    cli.worker("w", *GIVES_UP)
    for n in range(20):
        cli.send(f"s{n}", "retry 0", "t")
    junk(cli, "j")
    for n in range(20):
        cli.events_until(f"s{n}", "turn.failed")
    cli.events_until("j", "input.rejected")
    result = cli.within("dead", "retry", "--all", "--agent", "echo", code=1)
    assert {line.split()[4] for line in result.out.splitlines()} == {f"s{n}" for n in range(20)}
    assert result.err == "agentrun: the input at offset 1 of session j is no turn: it can be dropped\n"
    for n in range(20):
        cli.events_until(f"s{n}", "turn.failed", 2)
    assert set(listed(cli, "--limit", "100")) == {("j", "@1"), *((f"s{n}", "t-retry1") for n in range(20))}
    assert cli.within("dead", "drop", "j", "@1").out == "1 dropped\n"
    assert cli.within("dead", "drop", "--all").out == "20 dropped\n"
    assert cli.within("dead", "drop", "--all").out == "0 dropped\n"
    assert listed(cli) == []


def junk(cli: Cli, session: str) -> None:
    async def append(client: Client) -> None:
        log = client.broker.log
        end = await log.last(session)
        pending = end.pending.add(end.next)
        await log.append(session, b"{", kind=Kind.TURN, agent="echo", after=end, pending=pending)

    cli.ask(append)


def test_which_ones_must_be_said(cli: Cli) -> None:
    for arguments in ((), ("a",), ("a", "t", "--all"), ("a", "--all"), ("a", "t", "--agent", "x")):
        for action in ("retry", "drop"):
            result = cli.within("dead", action, *arguments, code=2)
            assert result.err.count("\n") == 1
            assert result.err.startswith("agentrun: ")


def test_a_worker_killed_between_the_entry_and_the_end(cli: Cli) -> None:
    """The entry is there, the end is not: another worker gives the turn up, and the list has it once."""
    crashing = cli.start(
        *("worker", "tests.e2e.crashing:echo", "--name", "crashing", "--lease", "2", *GIVES_UP),
    )
    crashing.until("worker crashing runs", err=True)
    cli.send("a", "retry 0", "t1")
    assert crashing.wait().code == -9
    assert "turn.failed" not in [event.type for event in cli.log("a")]
    assert len(cli.log(dead.SESSION)) == 1
    assert listed(cli) == []
    cli.worker("other", *GIVES_UP)
    cli.events_until("a", "turn.failed")
    assert listed(cli) == [("a", "t1")]
    assert len(cli.log(dead.SESSION)) == 2


async def all_end(client: Client, sessions: list[str]) -> None:
    for name in sessions:
        with pytest.raises(TurnFailed, match="gave up"):
            await client.turn(name, "t").result(30)


def test_200_turns_that_give_up_at_once_in_three_workers(cli: Cli) -> None:
    names = [f"s{n}" for n in range(200)]

    async def send_all(client: Client) -> None:
        for name in names:
            await client.session(name, agent="echo").send("retry 0", id="t")

    cli.ask(send_all)
    workers = [cli.worker(f"w{n}", *GIVES_UP) for n in range(3)]
    cli.ask(lambda client: all_end(client, names))
    assert set(listed(cli, "--limit", "1000")) == {(name, "t") for name in names}
    for worker in workers:
        worker.signal(15)
        result = worker.wait()
        assert "dead turns" not in result.err, result
