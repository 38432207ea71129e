"""Step 602 for a served volume: the permission table in effect.

A ruling is kept for as long as the wall clock shows a time in [made, made + VERDICT_AGE_S), and no longer than the
verdict lasts. So a window closes on the second for open connections, and a clock that jumps either way, or a
machine that slept, leaves no stale permission: the time lies outside, and the decision is made afresh.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from lockstep.registry import access
from lockstep.registry.access import Grant, Verdict
from lockstep.registry.store import OnDenied
from lockstep.volume.gate import Ruling

VERDICT_AGE_S: Final = 1.0

_HELD: Final = {"outside-window": Ruling.UNTIL_WINDOW, "no-right": Ruling.UNTIL_RELEASED}


class VolumeGate:
    """Decides from the grants that it was last given; see `lockstep.volume.gate.Gate`. Calls come from one thread."""

    def __init__(self, volume_name: str, on_denied: OnDenied, grants: Sequence[Grant]) -> None:
        self.on_denied_update: Callable[[str, Ruling, int], None] = lambda _user, _ruling, _length: None
        self._volume_name = volume_name
        self._on_denied: OnDenied = on_denied
        self._grants = tuple(grants)
        self._suspended = False
        self._rulings: dict[str, tuple[float, float, Ruling]] = {}  # user -> from, until (s since 1970), ruling

    def __call__(self, user: str) -> Ruling:
        """Whether `user` may update the mirrors now, and if not, what becomes of the update."""
        now_s = time.time()
        known = self._rulings.get(user)
        if known is None or not known[0] <= now_s < known[1]:
            known = self._rulings[user] = self._rule(user, now_s)
        return known[2]

    def anyone(self) -> bool:
        """Whether anybody may update the mirrors now."""
        now_s = time.time()
        return not self._suspended and any(grant.is_open(now_s) for grant in self._grants)

    def denied(self, user: str, ruling: Ruling, length: int) -> None:
        """Note that an update of `length` bytes did not reach the mirrors."""
        self.on_denied_update(user, ruling, length)

    def verdict(self, user: str) -> Verdict:
        """Decide afresh, with the reason."""
        return access.decide(user, self._volume_name, self._grants, time.time())

    def update(self, on_denied: OnDenied, grants: Sequence[Grant]) -> None:
        """Go by what the registry says now."""
        if (on_denied, tuple(grants)) != (self._on_denied, self._grants):
            self._on_denied, self._grants = on_denied, tuple(grants)
            self._rulings.clear()

    def suspend(self, suspended: bool) -> None:
        """Let no update reach a mirror while no record of it could be kept."""
        if suspended != self._suspended:
            self._suspended = suspended
            self._rulings.clear()

    def _rule(self, user: str, now_s: float) -> tuple[float, float, Ruling]:
        verdict = access.decide(user, self._volume_name, self._grants, now_s)
        until_s = now_s + VERDICT_AGE_S
        if verdict.until_s is not None:
            until_s = min(until_s, verdict.until_s)
        if not verdict.allowed:
            ruling = Ruling.REFUSE if self._on_denied == "refuse" else _HELD[verdict.kind]
        else:
            ruling = Ruling.FALL_BEHIND if self._suspended else Ruling.UPDATE
        return now_s, until_s, ruling
