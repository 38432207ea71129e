"""header backup, header restore: copies of a mirror's LUKS2 header."""

from typing import Annotated

import typer

from lockstep.cli.options import Json, MirrorPath, Name, command_group
from lockstep.cli.output import print_json
from lockstep.cli.state import StateDir, state_of
from lockstep.service.headers import back_up_header, restore_header

app = command_group("Back up and restore the LUKS2 header of a mirror.")


@app.command()
def backup(
    context: typer.Context,
    name: Name,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where the copy goes: a file on another disk.")],
    mirror: MirrorPath = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite OUTPUT, if that is a backup of the same header.")
    ] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Copy the header of a mirror to a file, also while the volume is served."""
    done = back_up_header(state_of(context, state_dir), name, mirror, output, force=force)
    if as_json:
        print_json({"mirror": done.path, "uuid": done.luks_uuid, "output": output})
        return
    typer.echo(f"Copied the header of {done.path} to {output}.")
    typer.echo("It opens the mirror with the passphrases of today, also with those that are removed later.")


@app.command()
def restore(
    context: typer.Context,
    name: Name,
    backup: Annotated[str, typer.Argument(metavar="BACKUP", help="What `lockstep header backup` made.")],
    mirror: MirrorPath = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even if other passphrases come with it, or something else is in its place.")
    ] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Put a copy of the header of a mirror back. The next start copies the whole target."""
    done = restore_header(state_of(context, state_dir), name, mirror, backup, force=force)
    if as_json:
        report = {"mirror": done.mirror.path, "uuid": done.mirror.luks_uuid, "compared": done.compared}
        print_json(report | {"slots_back": done.back, "slots_gone": done.gone, "state": done.state})
        return
    typer.echo(f"The header of {done.mirror.path} is back. The next start of {name} copies the whole target.")
    if not done.compared:
        typer.echo("Passphrases that were removed after the copy was made open the mirror again: lockstep key list")
        typer.echo("If the target is lost, `lockstep restore --incomplete` gives back what the mirror holds.")
        typer.echo("An overlay that was written over the mirror does not fit it any more.")
    elif done.back:
        slots = ", ".join(map(str, done.back))
        typer.echo(
            f"Key slots that came back with it: {slots}. Remove what shall not open the mirror: lockstep key remove"
        )


COMMANDS = {"header": app}
