"""registry show, registry move: where the volumes, the grants and the audit trail are kept."""

import sys
from typing import Annotated

import typer

from lockstep.cli.options import Json, command_group
from lockstep.cli.output import print_json
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import UrlFileUnreadable
from lockstep.service.moving import move_registry

MOST_URL_BYTES = 64 << 10

app = command_group("Keep volumes, grants and the audit trail in the state directory, or in a PostgreSQL database.")


@app.command()
def show(context: typer.Context, as_json: Json = False, state_dir: StateDir = None) -> None:
    """Say where the registry is."""
    with state_of(context, state_dir).registry() as registry:
        volumes = [volume.name for volume in registry.volumes()]
        if as_json:
            print_json({"registry": registry.label, "volumes": volumes})
            return
        typer.echo(f"{registry.label} has {len(volumes)} {'volume' if len(volumes) == 1 else 'volumes'}.")


@app.command()
def move(
    context: typer.Context,
    url_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Move it to the PostgreSQL database whose URL is in FILE, or on standard input if FILE is '-'. "
            "Without this option it moves into the state directory.",
        ),
    ] = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Move the registry to a PostgreSQL database of its own, or back. No volume may be served meanwhile."""
    moved = move_registry(state_of(context, state_dir), None if url_file is None else _url_in(url_file))
    if as_json:
        print_json({"registry": moved.registry, "moved": moved.moved})
    elif moved.moved:
        typer.echo(f"The registry is {moved.registry} now.")
    else:
        typer.echo(f"The registry is {moved.registry} already.")


def _url_in(path: str) -> str:
    try:
        with open(sys.stdin.fileno() if path == "-" else path, encoding="utf-8", closefd=path != "-") as file:
            return file.read(MOST_URL_BYTES).strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UrlFileUnreadable(path=path, reason=reason) from error


COMMANDS = {"registry": app}
