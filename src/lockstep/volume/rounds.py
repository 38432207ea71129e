"""Group commit: whoever asks while a round is under way shares the next one.

A round that began before somebody asked may have missed what they need, so they wait for the one after it; however
many they are, it is one round. All calls come from the loop's thread.
"""

import asyncio
from collections.abc import Awaitable, Callable


class Rounds:
    """Runs `work`, never twice at a time."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Wait for a round that begins after this call; raises what its work raises."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._run_after(self._running))
        await asyncio.shield(self._next)

    async def _run_after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        await self._work()
