"""Mutants of the log."""

# ruff: noqa: D102, D106 - what is broken stands in the docstring of each mutant, once

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from msgspec import structs

from agentrun.broker import Kind, Record, Tail
from agentrun.brokers.memory_state import Append, MemoryState, StoredSession
from agentrun.errors import Conflict, Duplicate
from agentrun.testing.environments import LossyLog
from agentrun.testing.mutants_base import Mutant, Parts, mutant

MUTANTS: list[Mutant] = []


@mutant(MUTANTS, "L1_one_of_many_at_the_same_end_wins")
class AppendsWithoutComparing(Parts):
    """Stores whatever comes, at the end as it is."""

    class State(MemoryState):
        def _check_end(self, wanted: Append, end: Tail) -> None:
            pass


@mutant(MUTANTS, "L1_too_large_is_refused")
class StoresTooLarge(Parts):
    """Has a limit and does not keep it."""

    class Log(LossyLog):
        async def append(self, session: str, body: bytes, **options: Any) -> Tail:
            return await super().append(session, body[:10], **options)


@mutant(MUTANTS, "L2_offsets_are_dense_under_concurrent_senders")
class LeavesGaps(Parts):
    """Skips an offset now and then."""

    class State(MemoryState):
        def append(self, wanted: Append, token: object) -> Tail:
            tail = super().append(wanted, token)
            if tail.offset % 7 == 0:
                self.session(wanted.session).given += 1
            return self.session(wanted.session).end


@mutant(MUTANTS, "L2_offsets_are_skipped_on_purpose")
class SkipsNothing(Parts):
    """Counts for itself, whatever an append says is lost."""

    class State(MemoryState):
        def append(self, wanted: Append, token: object) -> Tail:
            end = self.session(wanted.session).end
            if wanted.after.offset == end.offset:
                wanted = wanted._replace(after=structs.replace(wanted.after, lost=min(wanted.after.lost, end.lost)))
            return super().append(wanted, token)


@mutant(MUTANTS, "L2_offsets_are_skipped_on_purpose")
class LetsNobodySkip(Parts):
    """Takes an end with more lost than there is for another end."""

    class State(MemoryState):
        def _check_end(self, wanted: Append, end: Tail) -> None:
            super()._check_end(wanted, end)
            if wanted.after.next != end.next:
                raise Conflict(f"session {wanted.session} goes on at {end.next}, not at {wanted.after.next}", end)


@mutant(MUTANTS, "L3_lost_ack_stores_once")
class SendsAgainWhenTheAckIsLost(Parts):
    """Appends once more, at the new end."""

    class Log(LossyLog):
        async def exchange(self, wanted: Append, token: object) -> Tail:
            try:
                return await super().exchange(wanted, token)
            except TimeoutError:
                after = await self.last(wanted.session)
                return await super().exchange(wanted._replace(after=after, dedupe=None), object())


@mutant(MUTANTS, "L3_lost_ack_with_another_record_behind")
class TakesItsOwnRecordForAnothers(Parts):
    """Answers a lost ack with a Conflict."""

    class Log(LossyLog):
        async def exchange(self, wanted: Append, token: object) -> Tail:
            return await super().exchange(wanted, object())


@mutant(MUTANTS, "L4_concurrent_repeats_store_once")
class IgnoresKeys(Parts):
    """Stores the same input as often as it is sent."""

    class State(MemoryState):
        def _check_key(self, session: StoredSession, key: str | None) -> None:
            pass


@mutant(MUTANTS, "L4_repeated_input_is_a_duplicate")
class NamesTheEndAsTheFirst(Parts):
    """Says of a repeated input that it is stored at the session's end."""

    class State(MemoryState):
        def _check_key(self, session: StoredSession, key: str | None) -> None:
            try:
                super()._check_key(session, key)
            except Duplicate as error:
                raise Duplicate(error.key, session.end.offset) from None


class _OwnFollow(LossyLog):
    """A log whose follow passes each list of records through `alter`."""

    @asynccontextmanager
    async def follow(
        self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
    ) -> AsyncGenerator[AsyncIterator[Sequence[Record]]]:
        async with super().follow(session, after=after, deltas=deltas, cursor=cursor) as records:
            yield _Altered(records, self.alter)

    def alter(self, number: int, records: Sequence[Record]) -> Sequence[Record]:
        return records


class _Altered:
    def __init__(
        self, records: AsyncIterator[Sequence[Record]], alter: Callable[[int, Sequence[Record]], Sequence[Record]]
    ) -> None:
        self._records = records
        self._alter = alter
        self._number = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Record]:
        while True:
            records = self._alter(self._number, await anext(self._records))
            self._number += 1
            if records:
                return records


@mutant(MUTANTS, "L5_many_readers_join_while_it_is_written")
class LosesARecordAtTheSeam(Parts):
    """Loses the first live record behind the history."""

    class Log(_OwnFollow):
        def alter(self, number: int, records: Sequence[Record]) -> Sequence[Record]:
            return records[1:] if number == 1 else records


@mutant(MUTANTS, "L5_follow_joins_history_and_live")
class GivesARecordTwiceAtTheSeam(Parts):
    """Gives the last record of the history again as the first live one."""

    class Log(_OwnFollow):
        kept: Sequence[Record] = ()

        def alter(self, number: int, records: Sequence[Record]) -> Sequence[Record]:
            if number == 0:
                self.kept = records[-1:]
            return [*self.kept, *records] if number == 1 else records


@mutant(MUTANTS, "L5_follow_from_an_offset")
class BeginsAtTheOffset(Parts):
    """Takes ``after`` as the first offset wanted."""

    class Log(LossyLog):
        @asynccontextmanager
        async def follow(
            self, session: str, *, after: int = 0, deltas: bool = True, cursor: int = 0
        ) -> AsyncGenerator[AsyncIterator[Sequence[Record]]]:
            async with super().follow(session, after=max(after - 1, 0), deltas=deltas) as records:
                yield records


@mutant(MUTANTS, "L5_read_pages")
class ReadsMoreThanAskedFor(Parts):
    """Takes no notice of ``limit``."""

    class Log(LossyLog):
        async def read(
            self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000
        ) -> Sequence[Record]:
            return await super().read(session, after=after, deltas=deltas)


@mutant(MUTANTS, "L5_stops_are_remembered")
class LosesStopsWithTheDeltas(Parts):
    """Leaves out CANCEL records with the deltas."""

    class Log(LossyLog):
        async def read(
            self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000
        ) -> Sequence[Record]:
            records = await super().read(session, after=after, deltas=deltas, limit=limit)
            return [r for r in records if deltas or r.kind is not Kind.CANCEL]


@mutant(MUTANTS, "L5_deleted_session_ends_its_followers")
class FollowsIntoTheNextLife(Parts):
    """Gives who followed a deleted session the records of the one that took its name."""

    class State(MemoryState):
        def delete(self, name: str) -> None:
            session = self.session(name)
            self._unqueue(name, session, session.given)
            session.trim(session.given)
            session.given = 0


@mutant(MUTANTS, "L6_expired_deltas_are_a_jump")
class RenumbersWhatIsLeft(Parts):
    """Hides that deltas have expired."""

    class Log(LossyLog):
        async def read(
            self, session: str, *, after: int = 0, deltas: bool = True, limit: int = 1000
        ) -> Sequence[Record]:
            records = await super().read(session, deltas=deltas, limit=limit)
            numbered = [structs.replace(r, offset=n) for n, r in enumerate(records, 1)]
            return [r for r in numbered if r.offset > after]


@mutant(MUTANTS, "L6_offsets_are_never_given_out_twice")
class GivesOffsetsOutAgain(Parts):
    """Forgets the offsets of deltas that have expired."""

    class State(MemoryState):
        def peek(self, name: str) -> StoredSession:
            session = super().peek(name)
            session.given = session.end.offset
            return session


@mutant(MUTANTS, "L6_offsets_are_never_given_out_twice")
class TakesAnOldEndForTheEnd(Parts):
    """Compares what is stored, and knows nothing of deltas that came and went."""

    class State(MemoryState):
        def _check_end(self, wanted: Append, end: Tail) -> None:
            super()._check_end(wanted._replace(after=end if wanted.after.offset == end.offset else wanted.after), end)


@mutant(MUTANTS, "L7_superseded_owner_is_refused")
class LetsZombiesAppend(Parts):
    """Refuses senders that are late, but takes tokens from anyone."""

    class State(MemoryState):
        def _check_end(self, wanted: Append, end: Tail) -> None:
            if wanted.kind is not Kind.DELTA:
                super()._check_end(wanted, end)
