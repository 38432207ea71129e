"""How long a server waits for its registry, which may be a database that hangs: it goes on without an answer."""

import asyncio
from typing import Final, TypeVar

Answer = TypeVar("Answer")

ANSWER_S: Final = 15.0  # longer than the registry itself waits for who has locked it


async def in_time(asked: "asyncio.Future[Answer]") -> Answer:
    """Return the registry's answer. Raises TimeoutError where that takes long; what was asked goes on all the same.

    So nothing is to be asked again before it has ended: it would be done twice, and each takes a thread.
    """
    await asyncio.wait([asked], timeout=ANSWER_S)
    if not asked.done():
        asked.add_done_callback(_heed)
        raise TimeoutError("the registry does not answer")
    return asked.result()


def _heed(asked: "asyncio.Future[Answer]") -> None:
    """Have it known that nobody wants to hear of a failure any more."""
    if not asked.cancelled():
        asked.exception()
