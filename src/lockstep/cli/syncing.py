"""sync: bring the mirrors of a served volume in sync, now."""

import os
import time
from typing import Annotated, Any, Final

import typer

from lockstep.cli.options import Json, Name
from lockstep.cli.output import print_json
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import NoMirror, NotServed, StillBehind
from lockstep.service.control_client import ask_patiently, ask_status
from lockstep.service.mirror_set import doubt_mirrors

POLL_S: Final = 0.2


def sync(
    context: typer.Context,
    name: Name,
    include_held: Annotated[
        bool,
        typer.Option(
            "--include-held", help="Also what users wrote who had no right to update the mirror, or not at that time."
        ),
    ] = False,
    checksum: Annotated[
        bool, typer.Option("--checksum", help="Read the mirror first, and write only where it really differs.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also what counts as equal, for the target is right and the mirrors may not be; the volume need not be"
            " served for this.",
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is done.")] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Have copied to the mirrors of a served volume what they lack."""
    state = state_of(context, state_dir)
    state.require_manager(os.geteuid(), f"sync {name}")
    control = state.control(name)
    how = {"include_held": include_held, "compare": checksum, "everything": everything}
    try:
        ask_patiently(control, name, "POST", "/v1/sync", **how)
    except NotServed:
        with state.registry() as registry:
            registry.volume(name)  # or there is no such volume to serve
        if include_held or wait or as_json or not everything:
            raise
        doubt_mirrors(state, name, compare=checksum)
        typer.echo(f"{name} is not being served: the next server copies all of it to its mirrors")
        return
    volume = ask_status(control, name)
    while wait and any(mirror["state"] == "syncing" or mirror["sought"] for mirror in volume["mirrors"]):
        time.sleep(POLL_S)
        volume = ask_status(control, name)
    if as_json:
        print_json(volume)
    else:
        for mirror in volume["mirrors"]:
            typer.echo(f"{mirror['path']}: {mirror['state']}")
        if not (wait or volume["mirrors"]):
            typer.echo(f"{name} has no mirror: nothing is copied. Give it one: lockstep mirror add {name} PATH")
    if wait:
        _require_in_sync(name, volume)


def _require_in_sync(name: str, volume: dict[str, Any]) -> None:
    if not volume["mirrors"]:
        raise NoMirror(volume=name)
    for mirror in volume["mirrors"]:
        if mirror["state"] != "in-sync":
            held = f"{mirror['held_bytes']} bytes of it are held" if mirror["held_bytes"] else None
            reason = mirror["error"] or held or f"nobody may update it now (`lockstep whocan {name}`)"
            raise StillBehind(mirror=mirror["path"], state=mirror["state"], reason=reason, volume=name)


COMMANDS = {"sync": sync}
