"""The queue of runs: one worker at a time for each, no work lost, errors wait."""

import asyncio
from collections.abc import Awaitable, Callable

from btx_operator.cluster.workqueue import FIRST_DELAY, LAST_DELAY, WorkQueue

A, B = ("ns", "a"), ("ns", "b")


def play(story: Callable[[WorkQueue], Awaitable[None]]) -> None:
    async def run() -> None:
        await story(WorkQueue())

    asyncio.run(run())


def test_added_twice_is_worked_on_once() -> None:
    """And what is added during the work once more after it, not beside it."""

    async def story(queue: WorkQueue) -> None:
        for key in (A, A, B):
            queue.add(key)
        assert [(await queue.get())[0], (await queue.get())[0]] == [A, B]
        queue.add(A)
        queue.add(A)
        assert len(queue) == 0 and queue.busy == 2
        queue.done(A)
        assert (await queue.get())[0] == A
        queue.done(A)
        assert len(queue) == 0

    play(story)


def test_the_earliest_time_counts() -> None:
    """A later wish does not put off an earlier one."""

    async def story(queue: WorkQueue) -> None:
        queue.add_after(A, 60)
        queue.add_after(A, 0.01)
        queue.add_after(A, 60)
        key, _ = await asyncio.wait_for(queue.get(), 5)
        assert key == A

    play(story)


def test_errors_wait_longer_each_time_and_end_with_success() -> None:
    """Doubled with jitter, bounded; at least what the server asks for; events do not shorten it."""

    async def story(queue: WorkQueue) -> None:
        delays = []
        for _ in range(12):
            queue.add(A)
            assert (await queue.get())[0] == A
            queue.add(A)
            delays.append(queue.failed(A))
            queue.done(A)
            assert len(queue) == 0
            queue.forget(A)
            queue._errors[A] = len(delays)
        assert 0.75 * FIRST_DELAY <= delays[0] <= 1.25 * FIRST_DELAY
        assert 0.75 * LAST_DELAY <= delays[-1] <= 1.25 * LAST_DELAY
        assert queue.failed(A, least=100.0) == 100.0
        queue.worked(A)
        assert queue.failed(A) <= 1.25 * FIRST_DELAY

    play(story)


def test_waiting_is_measured() -> None:
    """For the metric, and for the liveness of the process."""

    async def story(queue: WorkQueue) -> None:
        queue.add(A)
        since = queue._since[A]
        assert queue.oldest(since + 7.0) == 7.0
        _, waited = await queue.get()
        assert waited >= 0.0 and queue.oldest(since) == 0.0

    play(story)
