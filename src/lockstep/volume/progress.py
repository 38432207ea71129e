"""How far a copy or a comparison is, and when it will be over."""

import time
from collections import deque
from typing import Final

WINDOW_S: Final = 10.0
SAMPLE_S: Final = 0.5


class SyncProgress:
    """Bytes done and to do. The estimate is honest: it goes by how fast what is left has become less lately.

    What clients dirty meanwhile counts against it; while they dirty faster than is copied, there is no estimate.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0  # copied, also what had to be copied again
        self.left_bytes = total_bytes
        self._samples = deque([(time.monotonic(), 0, total_bytes)])  # when (s), done, left; of the last WINDOW_S

    def note(self, count: int, left_bytes: int) -> None:
        """`count` more bytes are done, and so many are left."""
        self.done_bytes += count
        self.left_bytes = left_bytes
        self.total_bytes = self.done_bytes + left_bytes
        now_s = time.monotonic()
        if now_s - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now_s, self.done_bytes, left_bytes))
            while now_s - self._samples[0][0] > WINDOW_S:
                self._samples.popleft()

    def rate_bytes_s(self) -> float:
        """How fast it goes, of late."""
        since_s, done_bytes, _ = self._samples[0]
        return (self.done_bytes - done_bytes) / max(time.monotonic() - since_s, 1e-3)

    def eta_s(self) -> float | None:
        """In how many seconds nothing will be left; None when that cannot be said."""
        since_s, _, left_bytes = self._samples[0]
        shrinks = (left_bytes - self.left_bytes) / max(time.monotonic() - since_s, 1e-3)
        return self.left_bytes / shrinks if shrinks > 0 else None
