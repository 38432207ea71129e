"""One mirror for as long as its volume is served: claimed at the start, kept true meanwhile, closed at the end.

The header's token and the local region record carry a generation. It grows whenever a server opens or closes the
mirror, so the two agree only if nothing happened to the mirror since this state directory closed it:

    start   record fits (same generation)?  its regions : everything is dirty
            take the record away, durably
            token: generation + 1, state
    serve   token: state, whenever it changes; "in-sync" only after a flush
    stop    flush; token: generation + 2, state; record: the same generation, dirty regions

A crash leaves no record; a mirror that was swapped, copied back or written elsewhere has another generation.
Either way everything is copied.
"""

import logging
from dataclasses import replace

from lockstep.crypto import luks
from lockstep.disk.mirror import open_mirror
from lockstep.errors import DiskFailed, LockstepError, MirrorOfAnotherVolume, NoToken
from lockstep.registry.store import MirrorRecord, VolumeRecord
from lockstep.service.state import State
from lockstep.volume import record
from lockstep.volume.link import IN_SYNC, MirrorLink
from lockstep.volume.regions import RegionMap

log = logging.getLogger(__name__)


class MirrorSession:
    """A mirror, unlocked and locked against others; `link` is what the write path follows."""

    def __init__(self, state: State, volume: VolumeRecord, mirror: MirrorRecord, passphrase: bytes) -> None:
        """Open the mirror; nothing is changed yet.

        Raises MirrorOfAnotherVolume, NoToken, and whatever `open_mirror` does.
        """
        self.mirror = mirror
        self._volume = volume
        self._record_path = state.regions(mirror.luks_uuid)
        self._header_path = mirror.header_path or mirror.path
        header = luks.read_header(self._header_path)
        self._token = _checked_token(volume, mirror, header)
        self.disk = open_mirror(mirror.path, mirror.header_path, header, passphrase, volume.size_bytes, writable=True)
        self._token_id = header.token_id
        regions = record.load(self._record_path, self._identity())
        if regions is None:
            log.info("mirror %s was not closed in order by this server; all of it will be copied", mirror.path)
            regions = RegionMap(volume.size_bytes, dirty=True)
        self.link = MirrorLink(mirror.path, mirror.luks_uuid, self.disk, regions)

    @property
    def generation(self) -> int:
        """The generation that the token carries now."""
        return self._token.generation

    def claim(self) -> None:
        """From here on the disks may differ: say so durably, on both sides, before anybody writes."""
        record.discard(self._record_path)
        self._write_token(self._token.generation + 1)

    def keep_token_true(self) -> None:
        """Have the token say the link's state, if that has changed; a mirror that cannot be written is left."""
        if self._token.state == self.link.state:
            return
        try:
            if self.link.state == IN_SYNC:
                self.link.flush()
            self._write_token(self._token.generation)
        except LockstepError as error:
            self._token = replace(self._token, state=self.link.state)  # once is enough to say it
            log.warning("the header of mirror %s could not be updated: %s", self.mirror.path, error)

    def retire(self) -> None:
        """Close in order. Both disks have been flushed and nobody writes any more. Raises what the token may."""
        self.link.flush()
        self._write_token(self._token.generation + 1)
        try:
            record.save(self._record_path, self._identity(), self.link.regions)
        except OSError as error:
            raise DiskFailed(path=self._record_path, doing="Writing", reason=error.strerror) from error

    def close(self) -> None:
        """Close the disk, which gives up its lock."""
        self.link.close()

    def _identity(self) -> record.Identity:
        return record.Identity(self._volume.id, self.mirror.luks_uuid, self._token.generation, self._volume.size_bytes)

    def _write_token(self, generation: int) -> None:
        token = replace(self._token, generation=generation, state=self.link.state)
        luks.write_token(self._header_path, token, token_id=self._token_id)
        self._token = token


def _checked_token(volume: VolumeRecord, mirror: MirrorRecord, header: luks.Header) -> luks.Token:
    """Return the token of a mirror that is the one that the registry means."""
    token = header.token
    if token is None:
        raise NoToken(path=mirror.path)
    if token.volume_id != volume.id:
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=f"the volume {token.volume_name}")
    if header.uuid != mirror.luks_uuid:
        owner = f"another mirror of {volume.name} (LUKS UUID {header.uuid})"
        raise MirrorOfAnotherVolume(path=mirror.path, volume=volume.name, owner=owner)
    if token.generation < mirror.generation:
        log.warning(
            "mirror %s is an older copy of itself: its generation is %d, and %d was seen before",
            mirror.path,
            token.generation,
            mirror.generation,
        )
    return token
