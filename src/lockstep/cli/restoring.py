"""restore: getting data back."""

import time
from typing import Annotated

import typer

from lockstep.cli.options import (
    Credential,
    Header,
    Incomplete,
    Json,
    KeyFile,
    Mirror,
    TokenOnly,
    size_bytes,
    unlock_from,
)
from lockstep.cli.output import EARLIER, human_bytes, print_json, visible
from lockstep.cli.screen import ProgressBars
from lockstep.cli.state import state_of
from lockstep.service.recovery import COPYING, STDOUT, VERIFYING, Restored, Wanted, note_restore
from lockstep.service.recovery import restore as restore_mirror

_BARS = {COPYING: "Restoring", VERIFYING: "Verifying"}


def restore(
    context: typer.Context,
    mirror: Mirror,
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Where the data goes: a device, a new file, or - for a pipe.")
    ],
    header: Header = None,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    offset: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size_bytes, help="Leave out what is before this position.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=size_bytes, help="Restore so much only; default: up to the end."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what the output holds.")] = False,
    incomplete: Incomplete = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted restore to this output stopped.")
    ] = False,
    record: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Note here how far the restore is; default: OUTPUT.restoring."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the output back and compare it with the mirror.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore a target from its mirror alone; what unlocks it is all that is needed besides."""
    wanted = Wanted(
        mirror_path=mirror,
        output_path=output,
        header_path=header,
        offset=offset or 0,
        length=length,
        force=force,
        incomplete=incomplete,
        resume=resume,
        verify=verify,
        record_path=record,
    )
    began_s: float | None = None
    done_bytes = 0

    def note(phase: str, done: int, total: int) -> None:
        nonlocal began_s, done_bytes
        began_s = began_s or time.monotonic()  # the copy begins here: what came before was the passphrase
        done_bytes = done if phase == COPYING else total
        bars(phase, done, total)

    state = state_of(context, None)
    unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror {mirror}")
    to_stdout = output == STDOUT
    try:
        with ProgressBars(_BARS, as_json=as_json, err=to_stdout) as bars:
            done = restore_mirror(state, wanted, unlock, on_progress=note)
    except KeyboardInterrupt:
        if began_s is not None and not to_stdout:
            typer.echo(f"Interrupted: {output} is unfinished, with {human_bytes(done_bytes)} restored.", err=True)
            typer.echo("Repeat the command with --resume to go on there, or delete it and its record.", err=True)
        raise
    note_restore(state, mirror, done)
    elapsed_s = time.monotonic() - (began_s or 0)
    if as_json:
        print_json(_as_json(done), err=to_stdout)
    else:
        _tell(done, elapsed_s, err=to_stdout)


def _as_json(done: Restored) -> dict[str, object]:
    return {
        "restored_bytes": done.extent.length,
        "volume": done.volume_name,
        "output": done.output,
        "frozen": done.frozen,
        "offset": done.extent.offset,
        "resumed_bytes": done.resumed_bytes,
        "verified": done.verified,
    }


def _tell(done: Restored, elapsed_s: float, *, err: bool) -> None:
    rate = human_bytes((done.extent.length - done.resumed_bytes) / elapsed_s)
    output = "standard output" if done.output == STDOUT else done.output
    again = f"; {human_bytes(done.resumed_bytes)} of it were there already" if done.resumed_bytes else ""
    what = f"{human_bytes(done.extent.length)} of {visible(done.volume_name)}"
    typer.echo(f"Restored {what} to {output} ({rate}/s){again}.", err=err)
    if done.verified:
        typer.echo("It was read back, and equals the mirror.", err=err)
    if done.frozen:
        typer.echo(EARLIER, err=err)


COMMANDS = {"restore": restore}
