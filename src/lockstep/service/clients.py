"""Who is connected, what they may do, and what of theirs was denied: the volume's clients, as the audit trail has them.

Rows: `connect` and `disconnect` for each connection; `verdict` for each user who is connected, at first and whenever it
changes; `denied` for the first update that did not reach the mirrors, and `denied-total`, with counts, when the verdict
changes or the user's last connection ends, and once more for what was under way then.
"""

import time
from dataclasses import dataclass

from lockstep.registry.audit import Actor
from lockstep.service.gate import VolumeGate
from lockstep.service.trail import Trail
from lockstep.volume.gate import Ruling


@dataclass
class _Denials:
    ruling: Ruling
    first_s: float
    last_s: float = 0.0
    updates: int = 0
    length: int = 0


class Clients:
    """The clients of one served volume. Calls come from the loop's thread."""

    def __init__(self, gate: VolumeGate, trail: Trail) -> None:
        self._gate = gate
        self._trail = trail
        self._open: dict[int, Actor] = {}
        self._kinds: dict[str, str] = {}  # user -> kind of the verdict that was last written down
        self._denials: dict[str, _Denials] = {}
        gate.on_denied_update = self.denied

    def connected(self, connection_id: int, user: str, origin: str) -> None:
        """A client has finished its handshake."""
        actor = self._open[connection_id] = Actor(user, origin)
        self._trail.note("connect", actor, f"{user} connected")
        self._look_at(actor)

    def disconnected(self, connection_id: int) -> None:
        """Such a client is gone."""
        actor = self._open.pop(connection_id)
        self._look_at(actor)
        if not any(other.user == actor.user for other in self._open.values()):
            self._sum_up(actor)
            del self._kinds[actor.user]
        self._trail.note("disconnect", actor, f"{actor.user} disconnected")

    def look(self) -> None:
        """Write down whose verdict has changed; to be called about once a second."""
        present = {actor.user: actor for actor in self._open.values()}
        for actor in present.values():
            self._look_at(actor)
        for user in self._denials.keys() - present.keys():  # of writes that outlived their connection
            self._sum_up(self._actor(user))

    def denied(self, user: str, ruling: Ruling, length: int) -> None:
        """An update of `length` bytes did not reach the mirrors."""
        now_s = time.time()
        known = self._denials.get(user)
        if known is None or known.ruling is not ruling:
            actor = self._actor(user)
            if user in self._kinds:
                self._look_at(actor)  # the verdict comes first in the trail
            self._sum_up(actor)
            known = self._denials[user] = _Denials(ruling, now_s)
            reason = f"{self._gate.verdict(user).reason}; {user}'s updates are {ruling.value}"
            self._trail.note("denied", actor, reason, ruling=ruling.name.lower())
        known.last_s = now_s
        known.updates += 1
        known.length += length

    def _actor(self, user: str) -> Actor:
        """One of the user's connections; a write may outlive the last."""
        return next((actor for actor in self._open.values() if actor.user == user), Actor(user, "a closed connection"))

    def _look_at(self, actor: Actor) -> None:
        verdict = self._gate.verdict(actor.user)
        if self._kinds.get(actor.user) != verdict.kind:
            self._sum_up(actor)
            self._kinds[actor.user] = verdict.kind
            self._trail.note("verdict", actor, verdict.reason, verdict=verdict.kind)

    def _sum_up(self, actor: Actor) -> None:
        denials = self._denials.pop(actor.user, None)
        if denials is not None:
            reason = f"{denials.updates} updates, {denials.length} bytes, were {denials.ruling.value}"
            self._trail.note(
                "denied-total",
                actor,
                reason,
                ruling=denials.ruling.name.lower(),
                updates=denials.updates,
                bytes=denials.length,
                first=denials.first_s,
                last=denials.last_s,
            )
