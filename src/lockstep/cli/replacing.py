"""replace-target: a new disk in the place of a target that died."""

from typing import Annotated

import typer

from lockstep.cli.options import Credential, Incomplete, Json, KeyFile, MirrorPath, Name, TokenOnly, unlock_from
from lockstep.cli.output import human_bytes, print_json
from lockstep.cli.state import StateDir, state_of
from lockstep.service.replacing import replace_target as replace


def replace_target(
    context: typer.Context,
    name: Name,
    new_disk: Annotated[
        str, typer.Argument(metavar="NEWDISK", help="The new target: a device, or a file; a missing file is made.")
    ],
    mirror: MirrorPath = None,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what the new disk holds.")] = False,
    incomplete: Incomplete = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Give a volume a new target, which is filled from a mirror while the volume is served."""
    unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror of {name}")
    done = replace(
        state_of(context, state_dir),
        name,
        new_disk,
        unlock,
        mirror_path=mirror,
        force=force,
        incomplete=incomplete,
    )
    if as_json:
        print_json({"target": done.path, "size_bytes": done.size_bytes, "mirror": done.mirror, "frozen": done.frozen})
        return
    typer.echo(
        f"The target of {name} is {done.path} now: {human_bytes(done.size_bytes)}, all of it still on {done.mirror}."
    )
    if done.frozen:
        typer.echo(
            "The mirror is the disk as it was when it froze, or its server let it go: what was written since was on "
            "the old target alone, and is lost."
        )
    typer.echo(f"Next: lockstep serve {name}, which copies it back while clients work. Keep that mirror connected.")


COMMANDS = {"replace-target": replace_target}
