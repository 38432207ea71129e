"""status: what the volumes are doing."""

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lockstep.cli.options import Json
from lockstep.cli.output import human_bytes, human_moment, human_seconds, print_json
from lockstep.cli.screen import Listing, console, plain
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import NotManager, NotServed, ServerSilent
from lockstep.service import headers
from lockstep.service.control_client import ask_status
from lockstep.service.state import State
from lockstep.service.status import add_headers, at_rest, look_at
from lockstep.volume.held import OUTSIDE_WINDOW

WATCH_INTERVAL_S: Final = 1.0
_STYLES: Final = {"in-sync": "green", "syncing": "cyan", "behind": "yellow", "degraded": "red"}


def status(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One volume; otherwise all of them.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, once a second, until Ctrl-C.")] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show volumes, their clients, and how far their mirrors are."""
    state = state_of(context, state_dir)
    screen = console()
    drawn = screen.is_terminal and not screen.is_dumb_terminal  # else Live shows nothing before its end
    if as_json or not (watch and drawn):
        _print(screen, gather(state, name), as_json=as_json)
        while watch:
            sys.stdout.flush()
            time.sleep(WATCH_INTERVAL_S)
            _print(screen, gather(state, name), as_json=as_json)
        return
    with Live(_render(gather(state, name)), console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_INTERVAL_S)
            live.update(_render(gather(state, name)), refresh=True)


def _print(screen: Console, gathered: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(gathered)
    else:
        screen.print(_render(gathered))


def gather(state: State, name: str | None) -> dict[str, Any]:
    """Return one volume, or all, as `status --json` prints them."""
    with state.registry() as registry:
        volumes = (registry.volume(name),) if name is not None else registry.volumes()
        backups = {volume.name: headers.backups(registry, volume) for volume in volumes}
    described: dict[str, dict[str, Any]] = {}
    resting: dict[str, str | None] = {}
    for volume in volumes:
        try:
            described[volume.name] = ask_status(state.control(volume.name), volume.name)
        except NotServed:
            resting[volume.name] = None
        except (NotManager, ServerSilent) as unanswered:
            if name is not None:
                raise
            resting[volume.name] = str(unanswered)
    seen = look_at(volume for volume in volumes if volume.name in resting)
    for volume in volumes:
        if volume.name in resting:
            described[volume.name] = at_rest(state, volume, seen, resting[volume.name])
        add_headers(described[volume.name], volume, backups[volume.name])
    return {"volumes": [described[volume.name] for volume in volumes]}


def _render(gathered: dict[str, Any]) -> RenderableType:
    volumes = gathered["volumes"]
    if not volumes:
        return "There are no volumes. Make one: lockstep create NAME --target PATH --mirror PATH"
    return Group(*(_render_volume(volume) for volume in volumes))


def _render_target(target: dict[str, Any]) -> Iterator[RenderableType]:
    if target["error"]:
        yield plain(target["error"], "red")
    if restore := target["restore"]:
        yield Text("being restored from a mirror", "cyan")
        yield _render_progress(restore)
        if restore["error"]:
            yield plain(restore["error"], "red")


def _render_volume(volume: dict[str, Any]) -> RenderableType:
    table = Listing("", "", show_header=False)
    table.add_row(Text(volume["name"], "bold"), human_bytes(volume["size_bytes"]))
    past_cache = " (direct I/O)" if volume["target"]["direct"] else ""
    table.add_row("  target", volume["target"]["path"] + past_cache)
    for row in _render_target(volume["target"]):
        table.add_row("", row)
    table.add_row("  serving", volume["uri"] or "no")
    for client in volume["clients"]:
        table.add_row("  client", f"{client['user']} ({client['verdict']}): {client['reason']}")
    if not volume["mirrors"]:
        table.add_row("  mirror", "none: writes go to the target alone")
    for mirror in volume["mirrors"]:
        table.add_row("  mirror", mirror["path"])
        table.add_row("", _render_state(mirror))
        for row in _render_held(mirror):
            table.add_row("", row)
        if mirror["sync"]:
            table.add_row("", _render_progress(mirror["sync"]))
        if mirror["header"] and (
            sentence := headers.reminder(volume["name"], mirror["header"], mirror["header_backup"])
        ):
            table.add_row("", plain(sentence, "bold red"))
        if mirror["error"]:
            table.add_row("", plain(mirror["error"], "red"))
    return table


def _render_state(mirror: dict[str, Any]) -> Text:
    text = Text(mirror["state"], _STYLES[mirror["state"]])
    if mirror["dirty_bytes"]:
        text.append(f", {human_bytes(mirror['dirty_bytes'])} differ or may differ", "default")
    if mirror["held_bytes"]:
        text.append(f", {human_bytes(mirror['held_bytes'])} held", "default")
    return text


def _render_held(mirror: dict[str, Any]) -> Iterator[Text]:
    """Who holds back what, and of which moment the mirror is."""
    for each in mirror["held"]:
        until = "until the window opens" if each["kind"] == OUTSIDE_WINDOW else "until sync --include-held"
        yield plain(f"held {until}: what {each['user']} wrote since {human_moment(each['since'])} ({each['kind']})")
    if mirror["frozen_since"] is not None:
        yield Text(f"frozen: the disk as it was at {human_moment(mirror['frozen_since'])}")
    elif not mirror["consistent"]:
        verb = "may not be" if mirror["error"] else "is not"  # what is not followed may be as it was left
        yield Text(f"{verb} the whole disk of any one moment")


def _render_progress(sync: dict[str, Any]) -> RenderableType:
    total, done = sync["total_bytes"], sync["done_bytes"]
    figures = f"{100 * done // total if total else 100} %, {human_bytes(sync['rate_bytes_s'])}/s"
    if sync["eta_s"] is not None:
        figures += f", {human_seconds(sync['eta_s'])} left"
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=total, completed=done, width=30), figures)
    return row


COMMANDS = {"status": status}
