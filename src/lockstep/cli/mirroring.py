"""mirror add, mirror remove, mirror list: the mirrors of a volume."""

from typing import Annotated, Any

import typer

from lockstep.cli.options import Header, IterTime, Json, KeyFile, Name, command_group, passphrase_from, size_bytes
from lockstep.cli.output import human_bytes, print_json
from lockstep.cli.screen import Listing, console
from lockstep.cli.state import StateDir, state_of
from lockstep.cli.status import gather
from lockstep.errors import AdoptFormatsNothing
from lockstep.registry.store import MirrorRecord
from lockstep.service.headers import MISSING, reminder
from lockstep.service.mirror_set import Added, MirrorPlan, add_mirror, remove_mirror
from lockstep.volume.link import DEGRADED

Mirror = Annotated[str, typer.Argument(metavar="PATH", help="The mirror: a block device or an image file.")]

app = command_group("Add, remove and list the mirrors of a volume.")


@app.command()
def add(
    context: typer.Context,
    name: Name,
    path: Mirror,
    header: Header = None,
    sector_size: Annotated[
        int | None,
        typer.Option(metavar="N", parser=size_bytes, help="Encryption sector in bytes. Default: the target's sector."),
    ] = None,
    key_file: KeyFile = None,
    iter_time: IterTime = None,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt", help="Format nothing: PATH is a LUKS2 volume that may hold a copy; only what differs is copied."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what the mirror or the header file holds.")] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Give a volume one more mirror; of a volume that is served, look now for a mirror that is away."""
    if adopt:
        for option, value in {"--sector-size": sector_size, "--iter-time": iter_time}.items():
            if value is not None:
                raise AdoptFormatsNothing(option=option)
    passphrase = passphrase_from(key_file, f"the mirror {path}", confirm=not adopt)
    plan = MirrorPlan(path, passphrase, header, sector_size, iter_time, force, adopt)
    added = add_mirror(state_of(context, state_dir), name, plan)
    if as_json:
        print_json(_as_json(added.mirror) | {"state": added.sought})
    else:
        _say(name, added, adopt=adopt)


def _say(name: str, added: Added, *, adopt: bool) -> None:
    path = added.mirror.path
    if added.sought is not None:
        looked = ", and is looked for now" if added.sought == DEGRADED else ""
        typer.echo(f"{path} is a mirror of {name} already: {added.sought}{looked}.")
        return
    what = "what differs in it" if adopt else "all of the target"
    typer.echo(f"{path} is a mirror of {name} now, LUKS UUID {added.mirror.luks_uuid}.")
    if added.mirror.header_path:
        typer.echo(reminder(name, added.mirror.header_path, MISSING))
    typer.echo(f"Next: lockstep serve {name}, which copies {what}. One passphrase must open all mirrors of a volume.")


@app.command()
def remove(context: typer.Context, name: Name, path: Mirror, as_json: Json = False, state_dir: StateDir = None) -> None:
    """Forget a mirror of a volume. Its disk keeps what is on it."""
    mirror = remove_mirror(state_of(context, state_dir), name, path)
    if as_json:
        print_json(_as_json(mirror))
        return
    typer.echo(f"{mirror.path} is no mirror of {name} any more.")
    typer.echo(
        "It still holds its copy: `lockstep restore` gets it back; `lockstep mirror add --adopt` goes on with it."
    )


@app.command("list")
def list_(context: typer.Context, name: Name, as_json: Json = False, state_dir: StateDir = None) -> None:
    """List the mirrors of a volume, and how they stand."""
    (volume,) = gather(state_of(context, state_dir), name)["volumes"]
    if as_json:
        print_json({"mirrors": volume["mirrors"]})
        return
    if not volume["mirrors"]:
        typer.echo(f"{name} has no mirror. Give it one: lockstep mirror add {name} PATH")
        return
    table = Listing("State", "Differs", "Held", "LUKS UUID", "Mirror")
    for mirror in volume["mirrors"]:
        differs, held = human_bytes(mirror["dirty_bytes"]), human_bytes(mirror["held_bytes"])
        table.add_row(mirror["state"], differs, held, mirror["uuid"], mirror["path"])
    console().print(table)


def _as_json(mirror: MirrorRecord) -> dict[str, Any]:
    return {"mirror": mirror.path, "header": mirror.header_path, "uuid": mirror.luks_uuid}


COMMANDS = {"mirror": app}
