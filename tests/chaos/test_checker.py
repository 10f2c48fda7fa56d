"""The checker finds nothing in what is right, and each thing that is wrong, by its name."""

from __future__ import annotations

import msgspec
import pytest

from agentrun import wire
from agentrun.broker import Kind
from tests.chaos import logs
from tests.chaos.checker import Rule, check
from tests.chaos.evidence import (
    Acked,
    Deleted,
    Got,
    Said,
    Steered,
    Stopped,
    Stored,
    Unended,
    digest,
)
from tests.chaos.logs import Log, broken, broken_in, judge, started

# ------------------------------------------------------------------------------------------------------ what is right


@pytest.mark.parametrize("log", logs.correct(), ids=lambda log: log.name)
def test_nothing_is_wrong_with_a_correct_session(log: Log) -> None:
    assert judge(log).violations == []


def test_what_everybody_was_told_rightly() -> None:
    cancelled, steered, answered, plain = logs.cancelled(), logs.steered(), logs.answered(), logs.plain()
    again = cancelled.sent("t1", 1)
    report = judge(
        [cancelled, steered, answered, plain],
        again,
        Stopped(session="cancelled", turn="t1", status="cancelled", offset=10, took=0.2),
        Stopped(session="cancelled", turn="t2", status="cancelled", offset=8, took=0.1),
        Stopped(session="cancelled", turn="", status="cancelled", offset=10, took=0.3),
        Stopped(session="cancelled", turn="", status="not_found", offset=0, took=0.3),
        Stopped(session="cancelled", turn="t3", status="already_ended", offset=15, took=0.1),
        Stopped(session="cancelled", turn="t3", status="pending", offset=3, took=5.0),
        Stopped(session="cancelled", turn="made-up", status="not_found", offset=0, took=0.1),
        # It was stopped before it was sent.
        Stopped(session="plain", turn="t2", status="not_found", offset=0, took=0.1, at=0.3),
        Steered(session="steered", turn="t2", consumed_by="t1"),
        Steered(session="cancelled", turn="t3"),
        Said(reader="x", session="plain", turn="t1", text="w0 w1 w2 "),
        Said(reader="y", session="answered", turn="t1", text="I need approval. "),
        Said(reader="z", session="steered", turn="t2", text=""),
    )
    assert report.violations == []
    assert report.figures.receipts == {"cancelled": 3, "not_found": 3, "already_ended": 1, "pending": 1}
    assert report.figures.cancels.count == 3
    assert (report.figures.cancels.p50, report.figures.cancels.max) == (0.2, 0.3)
    assert report.figures.readers == {"library": 8, "ai sdk": 3}


def test_a_deleted_session_is_left_out_and_counted() -> None:
    log = started("w0 ")
    log.say("w7 ")
    bad = [*log.all_notes(), Got(reader="s-r", offset=99, hash="00"), Unended(session="s", pending="1a")]
    assert broken_in(bad) > {Rule.QUIET, Rule.READER}
    report = check([*bad, Deleted(session="s")])
    assert report.violations == []
    assert (report.figures.sessions, report.figures.deleted, report.figures.events) == (0, 1, 0)


# ------------------------------------------------------------------------------------------------------------ the log


def test_a_record_that_is_lost() -> None:
    def without(log: Log, offset: int) -> set[Rule]:
        stored = [note for note in log.stored() if not (isinstance(note, Stored) and note.offset == offset)]
        return broken_in([*log.notes, *stored])

    assert without(logs.plain(), 8) == {Rule.DENSE, Rule.OWNER, Rule.ENDS}  # the claim of the second turn
    assert without(logs.cancelled(), 7) == {Rule.DENSE}  # the stop
    assert without(logs.plain(), logs.plain().end) == {Rule.ENDS}


def test_an_offset_that_is_given_out_twice() -> None:
    log = logs.cancelled()
    notes = log.stored()
    stop = next(i for i, note in enumerate(notes) if isinstance(note, Stored) and note.kind == Kind.CANCEL)
    assert broken_in([*log.notes, *notes[:stop], notes[stop], *notes[stop:]]) == {Rule.DENSE}


def test_a_record_that_is_no_event() -> None:
    log = logs.plain()
    log.put(b'{"type":"text.delta"}', by=None)
    assert broken(log) == {Rule.READABLE}


def test_an_event_of_a_type_that_is_not_known_and_of_no_attempt() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    log.put(b'{"type":"new.type","turn":"t1","attempt":"first"}')
    log.complete()
    assert broken(log) == {Rule.READABLE}


def test_an_event_of_an_owner_where_anyone_may_append() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    log.put(wire.TextDelta(turn="t1", attempt=1, text="!", index=3), Kind.TURN)
    log.complete()
    assert broken(log) == {Rule.READABLE}


def test_what_no_owner_stores() -> None:
    for event in (wire.TurnCancel(turn="t1"), wire.Gap(from_=1, to=2)):
        log = started("w0 ", "w1 ", "w2 ")
        log.put(event, Kind.EVENT)
        log.complete()
        assert broken(log) == {Rule.READABLE}


def test_an_event_of_a_type_that_is_not_known_is_its_owners() -> None:
    for number, wrong in ((1, set[Rule]()), (2, {Rule.OWNER})):
        log = started("w0 ", "w1 ", "w2 ")
        log.put(b'{"type":"new.type","turn":"t1","attempt":%d}' % number)
        log.complete()
        assert broken(log) == wrong


def test_pieces_without_their_beginning() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    log.out(wire.Chunk(index=1, total=2, data="{}"))
    log.complete()
    assert broken(log) == {Rule.READABLE}


# ---------------------------------------------------------------------------------------------------------- ownership


def test_a_zombies_word_after_a_takeover() -> None:
    log = started("w0 ")
    log.start("t1", "b-1")
    log.put(wire.TextDelta(turn="t1", attempt=1, text="w1 ", index=1), Kind.DELTA, by="a-1")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.OWNER}


def test_a_zombies_last_word_after_a_takeover() -> None:
    log = started("w0 ")
    log.start("t1", "b-1")
    log.terminal(wire.TurnCancelled, attempt=1, by="a-1")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.OWNER}


def test_a_zombies_piece_after_a_takeover() -> None:
    log = started()
    log.start("t1", "b-1")
    log.put(wire.Chunk(turn="t1", attempt=1, index=0, total=2, data="{"), by="a-1")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.OWNER}


def test_an_attempt_that_another_worker_speaks_for() -> None:
    log = started("w0 ")
    log.out(wire.TextDelta(text="w1 ", index=1), by="b-1")
    log.builder = type(log.builder)(wire.Message([wire.TextPart("w0 ")]))
    log.terminal(wire.TurnCancelled)
    assert broken(log) == {Rule.OWNER}


def test_a_claim_that_another_worker_appended() -> None:
    log = Log()
    log.send("t1", "hello")
    log.put(wire.TurnStarted(turn="t1", attempt=1, worker="a-1", lease="x"), by="b-1")
    log.terminal(wire.TurnCancelled, "t1", attempt=1, by="a-1")
    assert broken(log) == {Rule.OWNER}


def test_an_attempt_that_another_worker_completes() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    log.complete(by="b-1")
    assert broken(log) == {Rule.OWNER}


def test_an_owner_that_goes_on_after_another_worker_has_ended_a_turn_behind_it() -> None:
    log = started("w0 ")
    log.send("t2")
    log.terminal(wire.TurnCancelled, "t2", by="b-1")
    before = log.builder.copy()
    log.say("w1 ")
    log.builder = before
    log.terminal(wire.TurnCancelled, by="b-1")
    assert broken(log) == {Rule.OWNER}


def test_an_owner_that_completes_after_another_worker_has_rejected_an_input() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    late = log.put(wire.TurnAnswer(turn="t1", request="q", value=1), Kind.TURN)
    log.put(wire.InputRejected(turn="t1", offset=late, code="not_waiting", reason="no"), by="b-1")
    log.complete(by="a-1")
    assert Rule.OWNER in broken(log)


def test_what_two_workers_took_for_their_own_fences_nobody() -> None:
    """Both had the same to say, and the owner met it where its own was to be."""
    log = started("w0 ", "w1 ")
    log.send("t2")
    offset = log.terminal(wire.TurnCancelled, "t2", by="b-1")
    log.say("w2 ")
    log.complete()
    assert broken(log) == {Rule.OWNER, Rule.ENDS}
    ours = Acked(worker="a-1", session="s", offset=offset, hash=digest(log.records[offset - 1][1]))
    assert broken(log, ours) == set()


@pytest.mark.parametrize(
    "last_word",
    [
        wire.TurnSuspended(requests=[], message=wire.Message([wire.TextPart("w0 ")])),
        wire.TurnRetrying(error=wire.ErrorInfo("c", "m")),
        wire.TurnReleased(),
    ],
    ids=lambda event: event.type,
)
def test_a_word_after_an_attempt_has_ended(last_word: wire.OutputEvent) -> None:
    log = started("w0 ")
    log.out(msgspec.structs.replace(last_word))
    log.put(wire.TextDelta(turn="t1", attempt=1, text="w1 ", index=1), Kind.DELTA)
    log.start("t1", resumes=True)
    log.say("w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.OWNER}


def test_a_word_after_a_worker_was_found_dead() -> None:
    log = started("w0 ")
    log.put(b'{"type":"turn.lost","turn":"t1","attempt":1,"worker":"a-1","by":"c-1"}', by="c-1")
    log.put(wire.TextDelta(turn="t1", attempt=1, text="w1 ", index=1), Kind.DELTA)
    log.start("t1", "b-1", resumes=True)
    log.say("w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.OWNER}


def test_a_word_before_a_claim() -> None:
    log = Log()
    log.send("t1", "hello")
    log.put(wire.TextDelta(turn="t1", attempt=1, text="hello"), Kind.DELTA, by="a-1")
    log.start("t1")
    log.complete()
    assert broken(log) == {Rule.OWNER}


def test_a_turn_that_is_started_after_its_end() -> None:
    log = logs.plain()
    log.start("t1")
    assert broken(log) == {Rule.OWNER}


def test_a_turn_that_is_started_and_was_never_sent() -> None:
    log = logs.plain()
    log.start("t9")
    assert broken(log) == {Rule.OWNER}


def test_a_turn_that_is_completed_by_nobody() -> None:
    log = Log()
    log.send("t1", "hello")
    log.terminal(wire.TurnCompleted, "t1", by="a-1")
    assert broken(log) == {Rule.OWNER, Rule.ENDS}


@pytest.mark.parametrize("number", [1, 3])
def test_attempts_that_are_not_counted(number: int) -> None:
    log = started()
    log.out(wire.TurnReleased())
    log.start("t1", attempt=number)
    log.terminal(wire.TurnCancelled)
    assert Rule.ATTEMPTS in broken(log)
    assert broken(log) <= {Rule.ATTEMPTS, Rule.OWNER, Rule.ENDS}


# -------------------------------------------------------------------------------------------------------------- order


def test_a_turn_that_overtakes_another() -> None:
    log = Log()
    log.send("t1")
    log.whole("t2")
    log.start("t1")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.ORDER}


def test_a_turn_that_runs_while_another_is_suspended() -> None:
    log = started("w0 ")
    log.out(wire.TurnSuspended(requests=[], message=log.builder.message))
    log.whole("t2")
    log.terminal(wire.TurnExpired, "t1", message=wire.Message([wire.TextPart("w0 ")]))
    assert broken(log) == {Rule.ORDER}


def test_two_turns_at_once() -> None:
    log = started()
    log.send("t2")
    log.start("t2", "b-1")
    log.say("w0 ", "w1 ", "w2 ")
    log.complete()
    log.terminal(wire.TurnCancelled, "t1", by="b-1")
    assert broken(log) == {Rule.OWNER}


# --------------------------------------------------------------------------------------------------------------- ends


def test_a_turn_without_an_end() -> None:
    assert broken(started("w0 ")) == {Rule.ENDS}
    log = logs.plain()
    log.send("t3")
    assert broken(log) == {Rule.ENDS}


def test_a_turn_with_two_ends() -> None:
    log = logs.plain()
    log.terminal(wire.TurnCancelled, "t2")
    assert broken(log) == {Rule.ENDS}


def test_an_end_of_a_turn_that_was_never_sent() -> None:
    log = logs.plain()
    log.terminal(wire.TurnExpired, "t9")
    assert broken(log) == {Rule.ENDS}


def test_an_end_that_names_another_request() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    log.complete(turn_offset=2)
    assert broken(log) == {Rule.ENDS}


def test_a_steered_turn_that_ends_twice() -> None:
    log = logs.steered()
    log.terminal(wire.TurnCancelled, "t2")
    assert broken(log) == {Rule.ENDS}


def test_a_turn_that_is_consumed_after_its_end() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    offset = log.send("t2", "hello", on_busy="steer")
    log.terminal(wire.TurnCancelled, "t2")
    log.out(wire.SteerConsumed(steer="t2", offset=offset))
    log.complete()
    assert broken(log) == {Rule.ENDS}


def test_a_turn_that_is_rejected_after_it_ran() -> None:
    log = logs.plain()
    log.put(wire.InputRejected(turn="t1", offset=1, code="not_waiting", reason="no"))
    assert broken(log) == {Rule.ENDS}


def test_a_request_that_is_leased_again_after_its_end_may_be_refused_for_that() -> None:
    log = logs.plain()
    log.put(wire.InputRejected(turn="t1", offset=1, code="already_ended", reason="it has"))
    assert broken(log) == set()


def test_a_rejection_of_no_input() -> None:
    log = logs.plain()
    log.put(wire.InputRejected(offset=3, code="not_an_input", reason="no"))
    assert broken(log) == {Rule.ENDS}


def test_a_session_that_does_not_come_to_rest() -> None:
    assert broken(logs.plain(), Unended(session="plain", pending="13a")) == {Rule.QUIET}


# -------------------------------------------------------------------------------------------------------------- stops


def test_a_stored_stop_that_is_not_obeyed_by_who_starts_the_turn() -> None:
    log = Log()
    log.send("t1", "hello")
    log.stop("t1")
    log.start("t1")
    log.terminal(wire.TurnCancelled)
    assert broken(log) == {Rule.STOP}


def test_a_stop_of_all_that_is_not_obeyed() -> None:
    log = started()
    log.out(wire.TurnReleased())
    log.put(wire.TurnCancel(all=True), Kind.CANCEL)
    log.start("t1")
    log.terminal(wire.TurnCancelled)
    assert broken(log) == {Rule.STOP}


@pytest.mark.parametrize("how", ["interrupt", "rollback"])
def test_an_interrupt_that_is_not_obeyed(how: wire.OnBusy) -> None:
    log = started()
    log.out(wire.TurnReleased())
    log.send("t2", "hello", on_busy=how)
    log.start("t1")
    log.terminal(wire.TurnCancelled)
    log.terminal(wire.TurnExpired, "t2")
    assert broken(log) == {Rule.STOP}


def test_a_stored_stop_that_is_not_obeyed_by_who_pauses() -> None:
    log = started()
    log.stop("t1")
    log.out(wire.TurnReleased())
    log.terminal(wire.TurnCancelled, by="b-1")
    assert broken(log) == {Rule.STOP}


def test_a_stop_that_comes_too_late_changes_nothing() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    log.stop("t1")
    log.complete()
    log.stop("t1")
    log.whole("t2")
    assert broken(log) == set()


# ------------------------------------------------------------------------------------------------ steering and answers


def test_steering_that_was_not_what_its_sender_was_told() -> None:
    steered, plain = logs.steered(), logs.plain()
    assert broken(steered, Steered(session="steered", turn="t2")) == {Rule.STEERED}
    assert broken(steered, Steered(session="steered", turn="t2", consumed_by="t9")) == {Rule.STEERED}
    assert broken(plain, Steered(session="plain", turn="t2", consumed_by="t1")) == {Rule.STEERED}
    assert broken(plain, Steered(session="plain", turn="t9")) == {Rule.STEERED}


def test_a_turn_that_was_not_sent_to_steer_is_consumed() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    offset = log.send("t2", "hello")
    log.out(wire.SteerConsumed(steer="t2", offset=offset))
    log.complete()
    assert broken(log) == {Rule.STEERED}


def test_steering_that_names_another_offset() -> None:
    log = started("w0 ", "w1 ", "w2 ")
    offset = log.send("t2", "hello", on_busy="steer")
    log.out(wire.SteerConsumed(steer="t2", offset=offset + 1))
    log.complete()
    assert broken(log) == {Rule.STEERED}


@pytest.mark.parametrize(("request_id", "answer"), [("q", 5), ("other", 4), ("q", 99)])
def test_an_answer_that_is_taken_and_not_there(request_id: str, answer: int) -> None:
    log = started(text="approve 2 0")
    log.out(wire.InputRequired(request="q", kind="approval"))
    log.put(wire.TurnAnswer(turn="t1", request="q", value=True), Kind.TURN)
    log.put(wire.TurnAnswer(turn="t1", request="other", value=True), Kind.TURN)
    log.out(wire.TurnResumed(request=request_id, answer=answer))
    log.complete()
    assert broken(log) == {Rule.ANSWERS}


def test_an_answer_that_is_taken_twice() -> None:
    log = started(text="approve 2 0")
    log.out(wire.InputRequired(request="q", kind="approval"))
    answer = log.put(wire.TurnAnswer(turn="t1", request="q", value=True), Kind.TURN)
    log.out(wire.TurnResumed(request="q", answer=answer))
    log.out(wire.TurnResumed(request="q", answer=answer))
    log.complete()
    assert broken(log) == {Rule.ANSWERS}


# --------------------------------------------------------------------------------------------------------------- text


def test_tokens_that_are_not_counted() -> None:
    log = started("w0 ")
    log.out(wire.TextDelta(text="w1 ", index=2))
    log.out(wire.TextDelta(text="w2 ", index=3))
    log.complete()
    assert broken(log) == {Rule.TOKENS}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count 3 0", ("w0 ", "w1 ")),  # missing at the end
        ("count 3 0", ("w0 ", "w2 ")),  # in between
        ("count 3 0", ("w0 ", "w1 ", "w1 ", "w2 ")),
        ("count 3 0", ("w0 ", "w1 ", "w2 ", "w3 ")),
        ("count 3 0", ("w0 ", "w1 ", "w2")),  # cut
        ("steer 3 0", ("w0 ", "[steered: w1] ", "w2 ")),
        ("steer 3 0", ("w0 ", "w1 ", "w1 ")),
        ("approve 3 0", ("I need approval. ", "w1 ")),
    ],
)
def test_words_that_are_lost_or_doubled(text: str, words: tuple[str, ...]) -> None:
    log = started(*words, text=text)
    log.complete()
    assert broken(log) == {Rule.TEXT}


@pytest.mark.parametrize("words", [("w1 ",), ("w0 ", "w0 "), ("w0 ", "w2 "), ("w0 ", "w1 ", "w2 ", "w3 ")])
def test_words_that_are_lost_or_doubled_in_what_was_stopped(words: tuple[str, ...]) -> None:
    log = started(*words)
    log.terminal(wire.TurnCancelled)
    assert broken(log) == {Rule.TEXT}


def test_an_echo_may_say_any_words() -> None:
    log = started("w3 ", "w1", text="w3 w1")
    log.complete()
    assert broken(log) == set()


def test_a_word_that_is_doubled_by_a_takeover() -> None:
    log = started("w0 ", "w1 ")
    log.start("t1", "b-1", resumes=True)
    log.say("w1 ", "w2 ")
    log.complete()
    assert broken(log) == {Rule.TEXT}


def test_what_counts_anew_in_each_attempt_may_say_a_word_once_for_each() -> None:
    log = started("w0 ", "w1 ", text="stubborn 0")
    log.start("t1", "b-1", resumes=True)
    log.say("w0 ", "w1 ")
    log.terminal(wire.TurnCancelled)
    assert broken(log) == set()
    for words in (("w0 ", "w1 ", "w0 "), ("w0 ", "w1 ", "w1 "), ("w0 ", "w2 ")):
        once = started(*words, text="stubborn 0")
        once.terminal(wire.TurnCancelled)
        assert broken(once) == {Rule.TEXT}


OTHER = wire.Message([wire.TextPart("w0 w1 w2 ")])


def test_an_end_that_says_more_than_was_said() -> None:
    log = started("w0 ", "w1 ")
    log.complete(message=OTHER)
    assert broken(log) == {Rule.FOLD}


def test_an_end_that_says_nothing_of_what_was_said() -> None:
    log = started("w0 ", "w1 ", text="hello")
    log.complete(message=wire.Message())
    assert broken(log) == {Rule.FOLD}


def test_an_end_that_says_what_only_an_earlier_attempt_said() -> None:
    """A stopped turn keeps it; one that completed has said what its last attempt did."""
    kept, completed = started("w0 ", text="hello"), started("w0 ", text="hello")
    for log in (kept, completed):
        log.start("t1", "b-1")
    kept.terminal(wire.TurnCancelled, message=wire.Message([wire.TextPart("w0 ")]))
    assert broken(kept) == set()
    completed.complete(message=wire.Message([wire.TextPart("w0 ")]))
    assert broken(completed) == {Rule.FOLD}


def test_messages_in_the_middle_that_are_not_what_was_said() -> None:
    checkpoint, suspended, claim = started("w0 "), started("w0 "), started("w0 ")
    checkpoint.out(wire.TurnCheckpoint(message=OTHER))
    checkpoint.terminal(wire.TurnCancelled)
    assert broken(checkpoint) == {Rule.FOLD}
    suspended.out(wire.TurnSuspended(requests=[], message=wire.Message()))
    suspended.terminal(wire.TurnExpired)
    assert broken(suspended) == {Rule.FOLD}
    claim.put(wire.TurnStarted(turn="t1", attempt=2, worker="b-1", lease="x", message=OTHER), by="b-1")
    claim.terminal(wire.TurnCancelled, attempt=2, by="b-1", message=OTHER)
    assert broken(claim) == {Rule.FOLD}
