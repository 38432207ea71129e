"""Step 602 in a version without grants: everybody is allowed, and the reason says why."""

from lockstep.registry.access import decide


def test_everybody_is_allowed_and_the_reason_names_user_and_volume() -> None:
    verdict = decide("ada", "vm1", 0.0)
    assert verdict.allowed
    assert verdict.until is None
    assert "ada" in verdict.reason
    assert "vm1" in verdict.reason
