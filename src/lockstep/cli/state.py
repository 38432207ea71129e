"""The option that says where the state directory is: before the command, after it, or from the environment."""

from typing import Annotated

import typer

from lockstep.service.state import State

StateDir = Annotated[str | None, typer.Option("--state-dir", help="State directory.", show_default=False)]


def state_of(context: typer.Context, state_dir: str | None) -> State:
    """Return the state directory that the command, or the program before it, was given."""
    return State.locate(state_dir or context.find_root().obj)
