"""serve, attach, detach: a volume in use."""

import os
from typing import Annotated
from urllib.parse import unquote

import typer

from lockstep.cli.options import KeyFile, Name, passphrase_from
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import NotAttached
from lockstep.service import attach as attaching
from lockstep.service.control_client import ask_status
from lockstep.service.serve import Listen, parse_tcp
from lockstep.service.serve import serve as serve_volume


def serve(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="Unix socket for NBD clients. Default: STATE/run/NAME.sock.")
    ] = None,
    tcp: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve on this loopback address as well.")
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Serve a volume over NBD, in the foreground, until SIGTERM or Ctrl-C."""
    state = state_of(context, state_dir)
    listen = Listen(os.path.abspath(socket) if socket else state.socket(name), parse_tcp(tcp) if tcp else None)
    passphrase = passphrase_from(key_file, f"the mirror of {name}")
    serve_volume(state, name, passphrase, listen, _announce)


def _announce(uris: list[str]) -> None:
    for uri in uris:
        typer.echo(f"ready {uri}")


def attach(context: typer.Context, name: Name, state_dir: StateDir = None) -> None:
    """Make a served volume a block device of this machine, and print the device."""
    state = state_of(context, state_dir)
    with state.registry() as registry:
        volume = registry.volume(name)
    uri = ask_status(state.control(name), name)["uri"]
    socket = unquote(uri.partition("?socket=")[2])
    typer.echo(attaching.attach(socket, name, state.run_dir, volume.sector_bytes).device)


def detach(context: typer.Context, name: Name, state_dir: StateDir = None) -> None:
    """Take the block device of a volume away again."""
    state = state_of(context, state_dir)
    with state.registry() as registry:
        registry.volume(name)
    try:
        device = attaching.detach(state.run_dir, name).device
    except NotAttached as nothing_to_do:
        typer.echo(str(nothing_to_do))
    else:
        typer.echo(f"Detached {device}.")


COMMANDS = {"serve": serve, "attach": attach, "detach": detach}
