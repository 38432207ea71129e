"""`lockstep`: the commands of all groups, and what becomes of an error."""

import logging
import sys
from typing import Annotated

import typer

import lockstep
from lockstep.cli import demo, restoring, serving, status, volumes
from lockstep.cli.output import report_error
from lockstep.crypto.cipher import KERNEL
from lockstep.errors import LockstepError

app = typer.Typer(
    help="Continuously encrypted mirrors for disks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for group in (volumes, serving, status, restoring, demo):
    for command in group.COMMANDS:
        app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lockstep {lockstep.__version__} (AES-XTS by {KERNEL})")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    state_dir: Annotated[
        str | None, typer.Option(help="State directory. Default: $LOCKSTEP_STATE_DIR, or /var/lib/lockstep for root.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to standard error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
    context.obj = state_dir
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO if context.invoked_subcommand == "serve" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("asyncio", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Run a command; an error of the catalogue ends it with its sentences and its exit code."""
    try:
        app()
    except LockstepError as error:
        report_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
