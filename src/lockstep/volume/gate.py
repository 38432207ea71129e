"""Step 602 as the write path asks it. Who answers, and from what, is not the write path's business."""

from enum import Enum
from typing import Final, Protocol


class Ruling(Enum):
    """What becomes of one user's updates now. The first goes to both disks, the next three to the target alone."""

    UPDATE = "the mirror is updated"
    UNTIL_WINDOW = "held until the user's window opens"
    UNTIL_RELEASED = "held until a permitted user releases it"
    FALL_BEHIND = "recorded as different, and copied as soon as may be"
    REFUSE = "refused"


UPDATE: Final = Ruling.UPDATE


class Gate(Protocol):
    """The permission table, in effect. Every answer holds for the moment in which it is given."""

    def __call__(self, user: str) -> Ruling:
        """Whether `user` has the right to update the mirrors, and has it now."""

    def anyone(self) -> bool:
        """Whether anybody has it now: while nobody has, nothing is copied either."""

    def denied(self, user: str, ruling: Ruling, length: int) -> None:
        """Note that an update of `length` bytes did not reach the mirrors."""
