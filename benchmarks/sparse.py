"""Volumes that are not copied, for nobody waits for a terabyte: what is on record of them says that they were."""

import asyncio

from lockstep.crypto.luks import Header
from lockstep.service.state import State
from lockstep.volume.held import HeldRecord
from lockstep.volume.intent import Identity, IntentBitmap

# `lockstep` as `python -c` runs it, without what each start does to see whether target and mirror belong together.
UNCHECKED = """
from lockstep.cli.main import main
from lockstep.service import mirror_session
from lockstep.volume.spot_check import SpotCheck
mirror_session.spot_check = lambda *_, **__: SpotCheck(0, ())
main()
"""


def write_records(state: State, header: Header, marked: bytes) -> None:
    """Leave the records as the mirror's server would: these regions, a byte each, are marked, and nothing is held."""
    token = header.token
    assert token is not None
    identity = Identity(token.volume_id, header.uuid, token.target_size_bytes)
    bitmap = IntentBitmap(state.intent(header.uuid), identity, asyncio.to_thread)
    bitmap.claim(token.generation, token.generation, marked)
    bitmap.close()
    held = HeldRecord(state.held(header.uuid), identity, asyncio.to_thread, expected=False)
    held.claim()
    held.close()
