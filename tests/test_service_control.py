"""What is asked of the control interface: taken as it is meant, or refused."""

import asyncio
import http.client
from pathlib import Path
from typing import Any, cast

import pytest

from lockstep.registry.audit import Actor
from lockstep.service.control import Commands, control_interface
from lockstep.service.control_client import _UnixConnection
from lockstep.volume.workers import Workers

# The library would rather have keys of its own for what a request is given; its older versions have none.
pytestmark = pytest.mark.filterwarnings("ignore::aiohttp.web_exceptions.NotAppKeyWarning")


class Asked:
    """Notes what it was asked to copy."""

    def __init__(self) -> None:
        self.syncs: list[dict[str, bool]] = []

    async def sync(self, _actor: Actor, **how: bool) -> None:
        """Note it."""
        self.syncs.append(how)


def post(path: str, body: bytes) -> int:
    connection = _UnixConnection(path, 60)
    try:
        connection.request("POST", "/v1/sync", body)
        return connection.getresponse().status
    finally:
        connection.close()


async def answers(path: Path, *bodies: bytes) -> tuple[list[int], list[dict[str, Any]]]:
    commands, client = Asked(), Workers("client", 1)
    async with control_interface(str(path), cast("Commands", commands), lambda _uid, _what: None):
        statuses = [await client.run(post, str(path), body) for body in bodies]
    client.close()
    return statuses, commands.syncs


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff"])
def test_what_is_no_object_is_a_bad_request(tmp_path: Path, body: bytes) -> None:
    assert asyncio.run(answers(tmp_path / "control", body)) == ([http.client.BAD_REQUEST], [])


def test_only_true_releases_what_is_held(tmp_path: Path) -> None:
    """Not a word that means no."""
    bodies = b'{"include_held": "false"}', b'{"include_held": true}'
    statuses, syncs = asyncio.run(answers(tmp_path / "control", *bodies))
    assert statuses == [http.client.OK] * 2
    assert [how["include_held"] for how in syncs] == [False, True]
