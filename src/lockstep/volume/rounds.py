"""Group commit: whoever asks while a round is under way shares the next one.

A round that began before somebody asked may have missed what they need, so they wait for the one after it; however
many they are, it is one round. All calls come from the loop's thread.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any


class Rounds:
    """Runs `work`, never twice at a time."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], *, at_once: bool = False) -> None:
        """A round begins a moment later, with all who ask by then; or `at_once`, if none is under way.

        What `work` does before it returns its coroutine is done then.
        """
        self._work = work
        self._at_once = at_once
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    def join(self) -> Awaitable[None]:
        """Return what to wait for: a round that begins no earlier than this call. It raises what its work raises."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            if self._at_once and (self._running is None or self._running.done()):
                self._running = loop.create_task(self._work())
                return asyncio.shield(self._running)
            self._next = loop.create_task(self._run_after(self._running))
        return asyncio.shield(self._next)

    async def _run_after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        await self._work()
