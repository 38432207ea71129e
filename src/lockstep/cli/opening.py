"""open: working from the mirror while there is no target."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated

import typer

from lockstep import signals
from lockstep.cli.options import Credential, Header, Incomplete, KeyFile, Mirror, TokenOnly, unlock_from
from lockstep.cli.output import EARLIER, report_error
from lockstep.errors import DetachRefused, NotAttached, OverlayUnwanted
from lockstep.service import attach as attaching
from lockstep.service.opening import Opened, exported, opened, place


def open_mirror(
    context: typer.Context,
    mirror: Mirror,
    header: Header = None,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    socket: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Unix socket for NBD clients. Default: one below /run."),
    ] = None,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let clients write, to an overlay; the mirror is only read.")
    ] = False,
    overlay: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The overlay. One that exists is gone on with. Default: VOLUME.overlay in the working directory.",
        ),
    ] = None,
    attach: Annotated[bool, typer.Option("--attach", help="Make it a block device of this machine as well.")] = False,
    incomplete: Incomplete = False,
) -> None:
    """Serve a mirror, decrypted, over NBD, in the foreground, until SIGTERM or Ctrl-C."""
    if overlay and not writable:
        raise OverlayUnwanted(overlay=overlay)
    if attach:
        attaching.require_root()
    unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror {mirror}")
    where = (lambda name: overlay or f"{name}.overlay") if writable else None
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(
            opened(mirror, unlock, header_path=header, overlay_path=where, incomplete=incomplete)
        )
        directory = stack.enter_context(place(view.name))
        path = os.path.abspath(socket) if socket else os.path.join(directory, f"{view.name}.sock")
        uri = stack.enter_context(exported(view, path))
        await_signal = stack.enter_context(_signals())
        typer.echo(f"ready {uri}")
        if view.frozen:
            typer.echo(EARLIER, err=True)
        if view.overlay_path:
            typer.echo(f"overlay {view.overlay_path}")
        if attach:
            device = stack.enter_context(_attached(view, path, directory, await_signal))
            typer.echo(f"device {device}")
        _note(context, view)
        await_signal()


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], object]]:
    """Yield a function that waits for the next SIGTERM or Ctrl-C, or the end of the terminal."""
    reader, writer = os.pipe()

    def told(_number: int, _frame: FrameType | None) -> None:
        os.write(writer, b".")

    before = {number: signal.signal(number, told) for number in signals.ending()}
    try:
        yield lambda: os.read(reader, 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _attached(view: Opened, socket: str, directory: str, await_signal: Callable[[], object]) -> Iterator[str]:
    """Attach it. In the end a device that is in use is not pulled away: each further signal tries again."""
    yield attaching.attach(socket, view.name, directory, view.sector_bytes).device
    while True:
        try:
            attaching.detach(directory, view.name)
        except NotAttached:  # somebody has done it for us
            pass
        except DetachRefused as refused:
            report_error(refused)
            await_signal()
            continue
        return


def _note(context: typer.Context, view: Opened) -> None:
    """Put it into the audit trail, if there is one. Only now: the registry takes longer to import than all before."""
    from lockstep.cli.state import state_of  # noqa: PLC0415
    from lockstep.service.noting import note_if_known  # noqa: PLC0415

    did = f"opened the mirror {os.path.abspath(view.path)}"
    if view.overlay_path:
        did += f" with the overlay {view.overlay_path}"
    note_if_known(state_of(context, None), "open", did, view.path, view.luks_uuid, {"overlay": view.overlay_path})


COMMANDS = {"open": open_mirror}
