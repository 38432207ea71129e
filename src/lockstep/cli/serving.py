"""serve, attach, detach: a volume in use."""

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote_to_bytes

import typer

from lockstep.cli import streams
from lockstep.cli.options import Credential, KeyFile, Name, TokenOnly, patience_s, unlock_from
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import NotAttached, RegistryLost, ServerSilent, StdoutFailed, TcpMissing
from lockstep.registry.store import check_name
from lockstep.service import attach as attaching
from lockstep.service.control_client import ask_status
from lockstep.service.serve import Listen, Options, group_id, parse_tcp
from lockstep.service.serve import serve as serve_volume
from lockstep.service.volume_session import PATIENCE_S

if TYPE_CHECKING:
    from lockstep.service.certificates import Terms

log = logging.getLogger(__name__)


def serve(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    socket: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Unix socket for NBD clients. Default: STATE/run/NAME.sock."),
    ] = None,
    socket_group: Annotated[
        str | None,
        typer.Option(metavar="GROUP", help="Members of GROUP may connect to the unix socket as well."),
    ] = None,
    tcp: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve on this address as well: a loopback address, or with --tls-dir.",
        ),
    ] = None,
    tls_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Over TCP, serve only clients that have a certificate of this TLS directory (`lockstep tls init`).",
        ),
    ] = None,
    mirror_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            parser=patience_s,
            help="A mirror that does not answer for so long is dropped until it is back.",
        ),
    ] = PATIENCE_S,
    mlock: Annotated[
        bool, typer.Option("--mlock", help="Keep the server in memory: for a device that this machine itself mounts.")
    ] = False,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct", help="Leave the page cache out: for block devices whose users have a cache themselves."
        ),
    ] = False,
    state_dir: StateDir = None,
) -> None:
    """Serve a volume over NBD, in the foreground, until SIGTERM or Ctrl-C."""
    state = state_of(context, state_dir)
    if tls_dir is not None and tcp is None:
        raise TcpMissing
    listen = Listen(
        state.socket(name) if socket is None else os.path.abspath(socket),
        None if tcp is None else parse_tcp(tcp, tls=tls_dir is not None),
        None if tls_dir is None else _terms_of(tls_dir),
        None if socket_group is None else group_id(socket_group),
    )
    unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror of {name}")
    options = Options(mirror_patience_s=mirror_timeout, lock_memory=mlock, direct=direct)
    serve_volume(state, name, unlock, listen, _announce, options)


def _terms_of(tls_dir: str) -> "Terms":
    from lockstep.service.certificates import load_terms  # noqa: PLC0415 - a while to import, and few servers need it

    return load_terms(tls_dir)


def _announce(uris: list[str]) -> None:
    try:
        for uri in uris:
            typer.echo(f"ready {uri}")
    except (StdoutFailed, BrokenPipeError) as error:
        streams.discard_output()
        log.warning("nobody could be told that the server is ready: %s", error)  # who connects finds out


def attach(
    context: typer.Context,
    name: Name,
    user: Annotated[
        str | None, typer.Option(metavar="USER", help="Attach on behalf of USER, whose rights then count; root only.")
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Make a served volume a block device of this machine, and print the device."""
    state = state_of(context, state_dir)
    if user is not None:
        attaching.require_right_to_act_for(user)
    with state.registry() as registry:
        volume = registry.volume(name)
    uri = ask_status(state.control(name), name)["uri"]
    if uri is None:
        raise ServerSilent(volume=name, reason="it lets nobody in, yet or any more")
    socket = os.fsdecode(unquote_to_bytes(uri.partition("?socket=")[2]))
    typer.echo(attaching.attach(socket, name, state.run_dir, volume.sector_bytes, user).device)


def detach(context: typer.Context, name: Name, state_dir: StateDir = None) -> None:
    """Take the block device of a volume away again."""
    state = state_of(context, state_dir)
    try:
        device = attaching.detach(state.run_dir, check_name(name)).device
    except NotAttached as nothing_to_do:
        with contextlib.suppress(RegistryLost), state.registry() as registry:
            registry.volume(name)
        typer.echo(str(nothing_to_do))
    else:
        typer.echo(f"Detached {device or f'what was left of {name}'}.")


COMMANDS = {"serve": serve, "attach": attach, "detach": detach}
