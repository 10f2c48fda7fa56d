"""The commands: each once as a process of its own, what else there is to see of it within this one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner

from agentrun.cli import admin, main
from tests.e2e.processes import ROOT, Cli, environment, new_cli, one_line, within

# ------------------------------------------------------------------------------------------------------- send


def test_send_streams_the_answer_to_stdout_alone(shared: Cli, session: str) -> None:
    began = time.monotonic()
    sending = shared.start("send", session, "count 10 150")
    sending.until("w0 ")
    seen_first = time.monotonic() - began
    result = sending.wait()
    assert result.code == 0, result
    assert result.out.split() == [f"w{i}" for i in range(10)]
    assert result.err == ""
    assert time.monotonic() - began - seen_first > 0.9, "the first word came with the last"


def test_send_json_is_the_log(shared: Cli, session: str) -> None:
    sent = shared.run("send", session, "count 3 1", "--json").events
    tailed = shared.run("tail", session, "--json", "--no-follow").events
    assert sent == tailed
    assert [e["offset"] for e in tailed] == list(range(1, len(tailed) + 1))
    assert tailed[-1]["event"]["type"] == "turn.completed"


def test_send_takes_json_stdin_metadata_and_a_deadline(cli: Cli, session: str) -> None:
    body = json.dumps({"role": "user", "content": "hallo"})
    sent = cli.run(
        *("send", session, "-", "--json-input", "--agent", "echo", "--no-follow", "--json", "--deadline", "2m"),
        *("--metadata", "a=1", "--metadata", "b=x=y", "--user", "ann"),
        stdin=body,
    ).json
    assert (sent["session"], sent["offset"]) == (session, 1)
    (event,) = cli.log(session)
    request = json.loads(event.raw)
    assert request["input"] == json.loads(body)
    assert request["metadata"] == {"a": "1", "b": "x=y"}
    assert request["user"] == "ann"
    assert 100 < request["deadline"] - time.time() < 121


def test_a_turn_that_fails_is_an_exit_code(shared: Cli, session: str) -> None:
    result = shared.run("send", session, "fail", code=1)
    assert result.out.strip() == "I fail."
    assert "failed: as you asked" in result.err


def test_interrupting_send_leaves_the_turn_alone(shared: Cli, session: str) -> None:
    sending = shared.start("send", session, "count 30 100", "--id", "t1")
    sending.until("w2 ")
    sending.signal(signal.SIGINT)
    result = sending.wait()
    assert result.code == 130
    assert f"agentrun cancel {session} t1" in result.err
    assert shared.result(session, "t1").text.split()[-1] == "w29"


# ------------------------------------------------------------------------------------------------------- tail


def test_tail_goes_on_from_the_middle_and_follows(shared: Cli, session: str) -> None:
    shared.send(session, "count 40 50", "t1")
    shared.events_until(session, "text.delta", 5)
    tailing = shared.start("tail", session, "--after", "4", "--json")
    tailing.until(r"turn\.completed")
    tailing.signal(signal.SIGINT)
    result = tailing.wait()
    assert result.code == 130
    assert result.err == ""
    stored = [event for event in shared.log(session) if event.offset > 4]
    assert [e["offset"] for e in result.events] == [event.offset for event in stored]
    assert [e["event"] for e in result.events] == [json.loads(event.raw) for event in stored]


def test_tail_ends_quietly_when_nobody_reads(shared: Cli, session: str) -> None:
    shared.send(session, "count 300 1", "t1")
    shared.result(session, "t1")
    shell = subprocess.run(
        f"{sys.executable} -m agentrun tail {session} | head -2",
        shell=True,
        env=environment(shared.url, shared.namespace),
        cwd=ROOT,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert len(shell.stdout.splitlines()) == 2
    assert shell.stderr == b""


# ------------------------------------------------------------------------------------------------------- cancel


def test_cancel_from_another_process_gives_a_receipt(shared: Cli, session: str) -> None:
    sending = shared.start("send", session, "count 1000 20", "--id", "t1")
    sending.until("w3 ")
    receipt = shared.run("cancel", session, "t1", "--by", "ann", "--reason", "enough", "--json").json
    assert receipt["status"] == "cancelled"
    assert 0 < receipt["took"] < 2
    result = sending.wait()
    assert result.code == 1
    assert "stopped by ann: enough" in result.err
    last = shared.log(session)[-1]
    assert (last.type, last.offset) == ("turn.cancelled", receipt["offset"])
    again = shared.within("cancel", session, "t1")
    assert again.out.startswith(f"already_ended at offset {receipt['offset']}, ")
    assert shared.within("cancel", session, "t2", code=1).out.startswith("not_found")


def test_cancel_of_a_session_stops_all_that_waits(cli: Cli, session: str) -> None:
    cli.worker("w")
    for turn in ("t1", "t2", "t3"):
        cli.send(session, "count 1000 20", turn)
    cli.events_until(session, "text.delta", 2)
    assert cli.within("cancel", session, "--json").json["status"] == "cancelled"
    turns = cli.run("history", session, "--json").json["turns"]
    assert [turn["state"] for turn in turns] == ["cancelled"] * 3


# ------------------------------------------------------------------------------------------------------- answer


def test_answer_approves_and_refuses(shared: Cli, session: str) -> None:
    sending = shared.start("send", session, "approve 3 1", "--id", "t1")
    sending.until(r"agentrun answer \S+ t1 deploy", err=True)
    assert shared.run("answer", session, "t1", "maybe", code=1).err.startswith("agentrun: answer yes or no")
    assert "deploy is answered" in shared.within("answer", session, "t1", "yes", "--user", "ann").out
    assert sending.wait().out.split()[-1] == "w2"

    sending = shared.start("send", session, "approve 3 1", "--id", "t2")
    sending.until(r"agentrun answer \S+ t2 deploy", err=True)
    shared.within("answer", session, "t2", "deploy", "no")
    assert "left undone" in sending.wait().out
    assert "answered" in shared.within("answer", session, "t2", "deploy", "yes", code=1).err


# ------------------------------------------------------------------------------------------------------- looking


def test_status_tells_queues_workers_and_turns(shared: Cli, session: str) -> None:
    shared.send(session, "count 1000 20", "t1")
    shared.events_until(session, "text.delta")
    found = shared.run("status", "--json").json
    (queue,) = found["agents"]
    (worker,) = found["workers"]
    assert (queue["agent"], queue["lease_ttl"], queue["leased"]) == ("echo", 2.0, 1)
    assert (worker["worker"], worker["agents"], worker["slots"]) == ("shared", ["echo"], 50)
    (running,) = worker["running"]
    assert (running["session"], running["turn"], running["attempt"]) == (session, "t1", 1)
    assert (running["tokens"] > 0, running["stopping"]) == (True, False)
    assert worker["load"] == [{"agent": "echo", "slots": 50, "running": 1}]
    assert (worker["uptime"] > 0, worker["version"]) == (True, version("agentrun"))
    assert found["dead"] == 0
    shown = shared.within("status").out
    assert session in shown
    assert "1/50" in shown
    shared.within("cancel", session)


def test_history_shows_the_conversation(shared: Cli, session: str) -> None:
    shared.ended(session, "hello you", "t1")
    shared.ended(session, "fail", "t2")
    shown = shared.within("history", session).out
    assert shown.splitlines() == ["› hello you", "hello you", "› fail", "I fail. ", "■ failed: as you asked"]
    found = shared.within("history", session, "--json").json
    assert [turn["state"] for turn in found["turns"]] == ["completed", "failed"]
    assert found["messages"][0] == {"role": "user", "content": "hello you"}
    assert found["offset"] == shared.log(session)[-1].offset


def test_replacing_send_leaves_the_first_answer_out(shared: Cli, session: str) -> None:
    shared.ended(session, "hello", "t1")
    shared.run("send", session, "hello again", "--id", "t2", "--replaces", "t1")
    assert shared.within("history", session).out.splitlines() == [
        *("(replaced) › hello", "hello"),
        *("› hello again", "hello again"),
    ]
    found = shared.within("history", session, "--json").json
    assert [turn["replaced_by"] for turn in found["turns"]] == ["t2", None]
    assert [message["content"].strip() for message in found["messages"]] == ["hello again", "hello again"]
    assert "t2 to echo instead of t1: hello again" in shared.run("tail", session, "--no-follow").out


def test_sessions_are_listed_newest_first(cli: Cli) -> None:
    assert cli.run("sessions").out == "none\n"
    for n, name in enumerate(("a", "b", "c", "a")):
        cli.send(name, "hi", f"t{n}")
    found = cli.within("sessions", "--json").json
    assert found["namespace"] == cli.namespace
    assert [(s["session"], s["offset"], s["busy"]) for s in found["sessions"]] == [
        *(("a", 2, True), ("c", 1, True), ("b", 1, True)),
    ]
    assert found["sessions"][0]["time"] == cli.log("a")[-1].time
    cli.worker("w")
    cli.ended("b", "hi", "t4")
    for name, turns in (("a", 2), ("c", 1)):
        cli.events_until(name, "turn.completed", turns)
    cli.ended("b", "hi", "t5")
    assert not any(s["busy"] for s in cli.within("sessions", "--json").json["sessions"])
    shown = cli.within("sessions", "--limit", "1").out.splitlines()
    assert [line.split()[0] for line in shown] == ["session", "b"]


def test_that_there_are_more_sessions_than_are_looked_at_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        cli.run("send", name, "hi", "--agent", "echo", "--no-follow")
    where = {"AGENTRUN_URL": cli.url, "AGENTRUN_NAMESPACE": cli.namespace}
    whole = within("sessions", "--json", env=where)
    assert (len(whole.json["sessions"]), whole.json["cut"], whole.err) == (3, False, "")
    monkeypatch.setattr(admin, "LOOKED_AT", 2)
    part = within("sessions", "--json", env=where)
    assert (len(part.json["sessions"]), part.json["cut"]) == (2, True)
    assert part.err == "2 sessions were looked at, there may be more\n"


def test_delete_wants_to_be_sure(shared: Cli, session: str) -> None:
    shared.ended(session, "hello", "t1")
    assert "--yes" in shared.run("delete", session, code=2).err
    shared.within("delete", session, "--yes")
    assert shared.run("tail", session, "--no-follow").out == ""
    assert "no turns" in shared.within("history", session, code=1).err


# ------------------------------------------------------------------------------------------------------- workers


def test_sigterm_hands_the_turn_over_uncharged(cli: Cli, session: str) -> None:
    first = cli.worker("first", "--drain", "0.5")
    sending = cli.start("send", session, "count 160 50", "--id", "t1")
    sending.until("w5 ")
    cli.worker("second", "--max-attempts", "1")
    first.signal(signal.SIGTERM)
    assert first.wait().code == 0
    result = sending.wait()
    assert result.code == 0, result
    assert result.out.split() == [f"w{i}" for i in range(160)]
    assert "second goes on (attempt 2)" in result.err
    types = [event.type for event in cli.log(session)]
    assert types.count("turn.released") == 1
    assert types.count("turn.started") == 2


def test_a_second_sigterm_does_not_wait(cli: Cli, session: str) -> None:
    worker = cli.worker("w", "--drain", "60")
    cli.send(session, "count 1000 50", "t1")
    cli.events_until(session, "text.delta")
    worker.signal(signal.SIGTERM)
    worker.until("draining, 1 turns", err=True)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    result = worker.wait()
    assert result.code == 0
    assert time.monotonic() - began < 5
    assert cli.log(session)[-1].type == "turn.released"


def test_an_agent_that_never_ends_does_not_keep_the_process(cli: Cli, session: str) -> None:
    worker = cli.worker("w", "--drain", "60", "--cancel-grace", "0.2")
    cli.send(session, "stubborn 600000", "t1")
    cli.events_until(session, "text.delta")
    worker.signal(signal.SIGTERM)
    worker.until("draining, 1 turns", err=True)
    worker.signal(signal.SIGTERM)
    assert worker.wait().code == 1
    assert cli.log(session)[-1].type == "turn.released"


def test_a_worker_with_nothing_to_do_ends_at_once(cli: Cli) -> None:
    worker = cli.worker("w")
    worker.signal(signal.SIGINT)
    assert worker.wait(5).code == 0


# ------------------------------------------------------------------------------------------------------- settings


def test_every_option_is_an_environment_variable(broker: str, session: str) -> None:
    cli = new_cli(broker)
    try:
        worker = cli.start(
            "worker",
            env={
                "AGENTRUN_AGENTS": "workers.echo:echo",
                "AGENTRUN_NAME": "from-env",
                "AGENTRUN_CONCURRENCY": "7",
                "AGENTRUN_LEASE": "3s",
            },
        )
        worker.until("worker from-env runs echo", err=True)
        found = cli.run("status", env={"AGENTRUN_JSON": "1"}).json
        assert (found["workers"][0]["slots"], found["agents"][0]["lease_ttl"]) == (7, 3.0)
        cli.run("send", session, "hi", env={"AGENTRUN_AGENT": "echo"})
        assert "hi" in cli.within("history", env={"AGENTRUN_SESSION": session}).out
        elsewhere = cli.within("history", session, "--namespace", "elsewhere", code=1)
        assert "elsewhere" in elsewhere.err, "an option after the command wins over the environment"
    finally:
        cli.end()


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere:x", "there is no module nowhere"),
        ("workers.echo:nope", "its agents: echo"),
        ("workers.echo:_count", "decorate it with @agent"),
        ("workers.echo", "module:name"),
    ],
)
def test_an_agent_that_cannot_be_had_is_told_in_a_line(shared: Cli, spec: str, says: str) -> None:
    assert says in one_line(shared.within("worker", spec, code=2).err)


def test_errors_are_a_line_that_says_what_to_do(shared: Cli, session: str) -> None:
    unreachable = shared.start("send", session, "hi", "--agent", "echo", "--url", "nats://127.0.0.1:1")
    not_set_up = shared.within("status", "--namespace", "nothing-here", code=1)
    assert "agentrun setup" in one_line(not_set_up.err)
    assert "session's id" in one_line(shared.within("tail", "no/such id", code=1).err)
    assert "turn's id" in one_line(shared.within("send", session, "hi", "--id", "a b", code=1).err)
    assert "no turn t9" in one_line(shared.within("answer", session, "t9", "yes", code=1).err)
    beyond = shared.run("tail", session, "--after", "7", code=1)
    assert "after=0" in one_line(beyond.err)
    result = unreachable.wait()
    assert result.code == 1
    assert "agentrun dev" in one_line(result.err)


def test_two_agents_leave_send_with_a_question(cli: Cli, session: str) -> None:
    nobody = cli.within("send", session, "hi", code=2)
    assert "--agent" in one_line(nobody.err)


def test_setup_says_what_it_does(broker: str) -> None:
    cli = Cli(broker, "setup-test")
    try:
        dry = cli.run("setup", "--dry-run", "--partitions", "2").out
        assert dry.count("would create stream") == 2
        assert cli.within("setup", "--partitions", "2", "--delta-ttl", "2h", "--json").json["dry_run"] is False
        assert "nothing to do" in cli.within("setup").out
        assert "partitions" in one_line(cli.within("setup", "--partitions", "3", code=1).err)
    finally:
        cli.end()


def test_help_names_every_command_and_the_document_does_too() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    text = (ROOT / "docs" / "cli.md").read_text()
    for name in main.list_commands(click.Context(main)):
        assert f"\n  {name} " in result.output
        assert f"agentrun {name}" in text
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.name == name
        assert command.help
