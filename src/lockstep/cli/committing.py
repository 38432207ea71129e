"""commit: a mirror, and what was written over it, become the new target."""

import functools
import time
from typing import Annotated

import typer

from lockstep.cli.options import Credential, Header, Incomplete, Json, KeyFile, Mirror, TokenOnly, unlock_from
from lockstep.cli.output import human_bytes, human_seconds, print_json, visible
from lockstep.cli.screen import ProgressBars
from lockstep.cli.state import state_of
from lockstep.service.committing import commit as commit_overlay
from lockstep.service.committing import note_commit


def commit(
    context: typer.Context,
    mirror: Mirror,
    overlay: Annotated[str, typer.Argument(metavar="OVERLAY", help="The overlay that was written over it.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where the data goes: a device, or a new file.")],
    header: Header = None,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what the output holds.")] = False,
    incomplete: Incomplete = False,
    as_json: Json = False,
) -> None:
    """Make a disk of a mirror and what was written over it with `open --writable`: the new target."""
    state = state_of(context, None)
    unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror {mirror}")
    began_s = time.monotonic()
    with ProgressBars({"commit": "Committing"}, as_json=as_json) as bars:
        done = commit_overlay(
            state,
            mirror,
            overlay,
            output,
            unlock,
            header_path=header,
            force=force,
            incomplete=incomplete,
            on_progress=functools.partial(bars, "commit"),
        )
    note_commit(state, mirror, overlay, done)
    if as_json:
        print_json({"committed_bytes": done.size_bytes, "volume": done.volume_name, "output": done.output})
        return
    took = human_seconds(time.monotonic() - began_s)
    what = f"{human_bytes(done.size_bytes)} of {visible(done.volume_name)}"
    typer.echo(f"Wrote {what}, as changed, to {done.output} in {took}.")


COMMANDS = {"commit": commit}
