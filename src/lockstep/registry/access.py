"""Step 602: may this user update this volume's mirrors, and may they now? A pure decision."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer, a sentence that says why, and when the answer ends (seconds since 1970; None: it does not)."""

    allowed: bool
    reason: str
    until: float | None


def decide(user: str, volume_name: str, now_s: float) -> Verdict:  # noqa: ARG001 - the moment is part of step 602
    """Decide for the moment `now_s` (seconds since 1970). This version keeps no grants: everybody is allowed."""
    reason = f"every user, so {user} too, may update the mirrors of {volume_name}: this version keeps no grants"
    return Verdict(allowed=True, reason=reason, until=None)
