"""A volume and its key commands, for the tests of keys and headers."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.lab import MIB, Lab, Result, Volume

CHANGES = ("key-added", "key-removed", "key-changed")
NEW = b"a second passphrase\nof two lines"


def opens(header: Path, passphrase: bytes) -> bool:
    """Whether stock cryptsetup takes the passphrase, without help from a token."""
    command = ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--key-file=-", str(header)]
    return subprocess.run(command, input=passphrase, capture_output=True, check=False).returncode == 0


class Keys:
    """A volume, and its key commands at the smallest cost of a passphrase."""

    def __init__(self, lab: Lab, *, header: bool = False) -> None:
        self._use(lab.volume(size_bytes=MIB, header=header))

    @classmethod
    def of(cls, volume: Volume) -> "Keys":
        """The keys of a volume that is there."""
        keys = cls.__new__(cls)
        keys._use(volume)
        return keys

    def _use(self, volume: Volume) -> None:
        self.lab, self.volume = volume.lab, volume
        self.header = self.volume.header or self.volume.mirror
        self.new = self.lab.home / "new"
        self.new.write_bytes(NEW)

    def __call__(self, command: str, *options: object, stdin: bytes | None = None) -> Result:
        return self.lab.lockstep("key", command, "vol", *options, stdin=stdin, environment=self.lab.quick_format())

    def slots(self) -> list[dict[str, Any]]:
        (mirror,) = json.loads(self("list", "--json").ok())["mirrors"]
        assert mirror["path"] == str(self.volume.mirror)
        slots = mirror["slots"]
        assert isinstance(slots, list)
        return slots

    def events(self) -> list[tuple[str, Any]]:
        lines = self.lab.lockstep("audit", "vol", "--json").ok().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["event"], row["details"].get("slot")) for row in rows if row["event"] in CHANGES]
