"""restore: getting data back."""

import time
from typing import Annotated

import typer

from lockstep.cli.options import Credential, Header, Json, KeyFile, TokenOnly, unlock_from
from lockstep.cli.output import human_bytes, print_json, progress_bar
from lockstep.cli.state import state_of
from lockstep.service.recovery import note_restore
from lockstep.service.recovery import restore as restore_mirror


def restore(
    context: typer.Context,
    mirror: Annotated[str, typer.Argument(metavar="MIRROR", help="The mirror: a block device or an image file.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where the data goes: a device, or a new file.")],
    header: Header = None,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what the output holds.")] = False,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Restore even if the mirror was never, or is no more, complete.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore a target from its mirror alone; what unlocks it is all that is needed besides."""
    began_s: float | None = None

    def note(done_bytes: int, total_bytes: int) -> None:
        nonlocal began_s
        began_s = began_s or time.monotonic()  # the copy begins here: what came before was the passphrase
        show(done_bytes, total_bytes)

    unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror {mirror}")
    with progress_bar("Restoring", as_json=as_json) as show:
        done = restore_mirror(
            mirror,
            output,
            unlock,
            header_path=header,
            force=force,
            incomplete=incomplete,
            on_progress=note,
        )
    note_restore(state_of(context, None), mirror, done)
    elapsed_s = time.monotonic() - (began_s or 0)
    if as_json:
        print_json(
            {
                "restored_bytes": done.size_bytes,
                "volume": done.volume_name,
                "output": done.output,
                "frozen": done.frozen,
            }
        )
        return
    rate = human_bytes(done.size_bytes / elapsed_s)
    typer.echo(f"Restored {human_bytes(done.size_bytes)} of {done.volume_name} to {done.output} ({rate}/s).")
    if done.frozen:
        typer.echo(
            "It is the disk as it was when the mirror froze: what was written since, without permission, is not in it."
        )


COMMANDS = {"restore": restore}
