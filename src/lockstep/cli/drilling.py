"""drill: whether the backup can be used, tried."""

from typing import Annotated

import typer

from lockstep.cli.options import Credential, Json, KeyFile, Name, TokenOnly, unlock_from
from lockstep.cli.output import print_json, visible
from lockstep.cli.state import StateDir, state_of
from lockstep.service.drill import Step, described, require_passed
from lockstep.service.drill import drill as drill_volume


def drill(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this in the shell, with the device in $LOCKSTEP_DEVICE, instead of checking file systems.",
        ),
    ] = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Try to use what the mirrors of a volume hold, on a temporary overlay; exit code 1 if it cannot be used."""
    reports = drill_volume(
        state_of(context, state_dir),
        name,
        unlock_from(key_file, credential, token_only=token_only, what=f"the mirror of {name}"),
        command=command,
        on_step=(lambda _: None) if as_json else _show,
    )
    if as_json:
        passed = all(report.passed for report in reports)
        print_json({"volume": name, "passed": passed, "mirrors": [described(report) for report in reports]})
    for report in reports:
        require_passed(report)


def _show(step: Step) -> None:
    outcome = "ok" if step.passed else "FAILED"
    what = visible(" ".join(filter(None, (step.what, step.detail))))  # a label or a file's name may be anything
    typer.echo(f"{step.name:8} {outcome:6} {step.seconds:7.2f} s  {what}")


COMMANDS = {"drill": drill}
