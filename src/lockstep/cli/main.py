"""`lockstep`: the commands of all groups, and what becomes of an error."""

import contextlib
import gc
import importlib
import logging
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

import lockstep
from lockstep import signals
from lockstep.cli import streams
from lockstep.cli.options import not_empty
from lockstep.cli.output import report_error, visible
from lockstep.crypto.cipher import KERNEL
from lockstep.errors import LockstepError, StdoutFailed, Unforeseen

log = logging.getLogger(__name__)

# Command -> the file that has it. A file is imported when its command is used: the registry, the web server and the
# rest cost half a second together, and a rescue needs none of them.
_COMMANDS = {
    "create": "volumes",
    "list": "volumes",
    "remove": "volumes",
    "serve": "serving",
    "attach": "serving",
    "detach": "serving",
    "status": "status",
    "mirror": "mirroring",
    "sync": "syncing",
    "verify": "verifying",
    "restore": "restoring",
    "open": "opening",
    "commit": "committing",
    "drill": "drilling",
    "replace-target": "replacing",
    "key": "keys",
    "header": "headers",
    "grant": "granting",
    "revoke": "granting",
    "grants": "granting",
    "whocan": "granting",
    "set": "granting",
    "audit": "auditing",
    "registry": "registry",
    "tls": "tls",
    "demo": "demo",
}


class _Commands(TyperGroup):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx: object) -> list[str]:  # noqa: ARG002 (of the overridden method)
        return list(_COMMANDS)

    def get_command(self, ctx: object, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        with _no_collections():
            found = importlib.import_module(f"lockstep.cli.{_COMMANDS[cmd_name]}").COMMANDS[cmd_name]
            if not isinstance(found, typer.Typer):
                single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
                single.command(cmd_name)(found)
                found = single
            return _refusing_empty_values(get_command(found))


def _refusing_empty_values(command: Any) -> Any:
    """What comes from a variable that is not set is refused, whatever it is for."""
    for parameter in command.params:
        parameter.callback = parameter.callback or not_empty
    for each in getattr(command, "commands", {}).values():
        _refusing_empty_values(each)
    return command


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Exempt what is made meanwhile from garbage collection, now and later.

    Imported code stays until the end, so each collection looks through all of it in vain: during the imports, while a
    server is at work, and at the end. That is a third of the time of a short command.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


app = typer.Typer(
    cls=_Commands,
    help="Continuously encrypted mirrors for disks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO if context.invoked_subcommand == "serve" else logging.WARNING,
        handlers=[handler],
    )
    for noisy in ("asyncio", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Lines(logging.Formatter):
    """Each message is one line, whatever a header or a path has brought into it; a traceback follows as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of the overridden method)
        return visible(super().formatMessage(record))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end a command like Ctrl-C, which cleans up what it has made; `serve` has an end of its own."""
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; an error of the catalogue ends it with its sentences and its exit code."""
    for number in signals.ending():
        if number is not signal.SIGINT:  # that is Python's own, or ignored in the background of a shell
            signal.signal(number, _interrupt)
    streams.prepare()
    try:
        _refusing_empty_values(get_command(app))()
    except LockstepError as error:
        _fail(error)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        streams.end(130)
    except BrokenPipeError:
        streams.discard_output()
        sys.exit(1)
    except Exception as error:
        log.info("the traceback of what follows", exc_info=True)
        _fail(Unforeseen(error=type(error).__name__))


def _fail(error: LockstepError) -> NoReturn:
    if isinstance(error, StdoutFailed):
        streams.discard_output()
    report_error(error)
    sys.exit(error.exit_code)
