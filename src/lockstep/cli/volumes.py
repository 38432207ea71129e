"""create, list, remove: what is registered."""

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text

from lockstep.cli.options import Header, IterTime, Json, KeyFile, Name, passphrase_from, size_bytes
from lockstep.cli.output import human_bytes, print_json
from lockstep.cli.screen import Listing, console, plain
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import MirrorMissing
from lockstep.registry.store import VolumeRecord
from lockstep.service.headers import MISSING, reminder
from lockstep.service.mirror_set import MirrorPlan
from lockstep.service.volumes import create_volume, remove_volume


class OnDenied(StrEnum):
    """What becomes of a write whose mirror update is denied."""

    hold = "hold"
    refuse = "refuse"


def create(
    context: typer.Context,
    name: Name,
    target: Annotated[str, typer.Option(metavar="PATH", help="The disk to protect: a block device or an image file.")],
    mirror: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where its encrypted copy goes; a missing file is made.")
    ] = None,
    header: Header = None,
    sector_size: Annotated[
        int | None,
        typer.Option(metavar="N", parser=size_bytes, help="Encryption sector in bytes. Default: the target's sector."),
    ] = None,
    key_file: KeyFile = None,
    iter_time: IterTime = None,
    on_denied: Annotated[
        OnDenied, typer.Option(help="What becomes of a write whose user may not update the mirror.")
    ] = OnDenied.hold,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what the mirror or the header file holds.")] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Register a volume, and format its mirror as a LUKS2 volume."""
    state = state_of(context, state_dir)
    plan = None
    if mirror is not None:
        passphrase = passphrase_from(key_file, f"the mirror {mirror}", confirm=True)
        plan = MirrorPlan(mirror, passphrase, header, sector_size, iter_time, force)
    else:
        given = {"--header": header, "--sector-size": sector_size, "--key-file": key_file, "--iter-time": iter_time}
        for option, value in {**given, "--force": force or None}.items():
            if value is not None:
                raise MirrorMissing(option=option)
    volume = create_volume(state, name, target, plan, on_denied.value)
    if as_json:
        print_json(_as_json(volume))
        return
    typer.echo(f"Created the volume {volume.name}: target {volume.target_path}, {human_bytes(volume.size_bytes)}.")
    for each in volume.mirrors:
        typer.echo(f"Mirror {each.path} is a LUKS2 volume, UUID {each.luks_uuid}.")
        if each.header_path:
            typer.echo(reminder(volume.name, each.header_path, MISSING))
        else:
            typer.echo(f"A copy of its header is worth having: lockstep header backup {volume.name} OUTPUT")
    typer.echo(f"Next: lockstep serve {volume.name}")


def list_(context: typer.Context, as_json: Json = False, state_dir: StateDir = None) -> None:
    """List the registered volumes."""
    with state_of(context, state_dir).registry() as registry:
        volumes = registry.volumes()
    if as_json:
        print_json({"volumes": [_as_json(volume) for volume in volumes]})
        return
    if not volumes:
        typer.echo("There are no volumes. Make one: lockstep create NAME --target PATH --mirror PATH")
        return
    table = Listing("Volume", "Size", "Target", "Mirrors")
    for volume in volumes:
        mirrors = Text("\n").join(plain(mirror.path) for mirror in volume.mirrors) or "none"
        table.add_row(volume.name, human_bytes(volume.size_bytes), volume.target_path, mirrors)
    console().print(table)


def remove(context: typer.Context, name: Name, state_dir: StateDir = None) -> None:
    """Forget a volume. Its target and its mirrors are not touched."""
    volume = remove_volume(state_of(context, state_dir), name)
    if volume.source is None:
        typer.echo(f"Removed the volume {name}. {volume.target_path} is as it was.")
    else:
        what = f"does not have everything: what it lacks is on {volume.source.path} alone."
        typer.echo(f"Removed the volume {name}. {volume.target_path} {what}")
    for mirror in volume.mirrors:
        typer.echo(f"The mirror {mirror.path} still holds its copy: `lockstep restore` gets it back.")


def _as_json(volume: VolumeRecord) -> dict[str, Any]:
    return {
        "name": volume.name,
        "id": volume.id,
        "size_bytes": volume.size_bytes,
        "target": {"path": volume.target_path},
        "on_denied": volume.on_denied,
        "mirrors": [
            {"path": mirror.path, "header": mirror.header_path, "uuid": mirror.luks_uuid} for mirror in volume.mirrors
        ],
    }


COMMANDS = {"create": create, "list": list_, "remove": remove}
