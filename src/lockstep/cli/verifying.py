"""verify: whether target and mirrors hold the same."""

import contextlib
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from lockstep.cli.options import Credential, Json, KeyFile, Name, TokenOnly, unlock_from
from lockstep.cli.output import human_bytes, human_moment, print_json, visible
from lockstep.cli.screen import progress_bar
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import LockstepError, MirrorsDiffer, NoMirror, NotServed, StillBehind, VerifyIncomplete
from lockstep.service.control_client import ask, ask_status
from lockstep.service.managing import manager
from lockstep.service.state import State

POLL_S: Final = 0.2
MOST_LINES: Final = 20


def verify(
    context: typer.Context,
    name: Name,
    repair: Annotated[
        bool, typer.Option("--repair", help="Have what differs copied from the target to the mirror.")
    ] = False,
    history: Annotated[bool, typer.Option("--history", help="Show what was found before; compare nothing.")] = False,
    key_file: KeyFile = None,
    credential: Credential = None,
    token_only: TokenOnly = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Compare the mirrors of a volume with its target, while it is served or not; exit code 3 if they differ.

    What unlocks the mirrors is needed only while the volume is not served.
    """
    state = state_of(context, state_dir)
    if history:
        _show_history(state, name, as_json=as_json)
        return
    manager(state, f"verify {name}")
    control = state.control(name)
    with progress_bar("Comparing") as show:
        try:
            ask(control, name, "POST", "/v1/verify", repair=repair)
        except NotServed:
            from lockstep.service.maintenance import verify_at_rest  # noqa: PLC0415 (half a second, for this case only)

            unlock = unlock_from(key_file, credential, token_only=token_only, what=f"the mirror of {name}")
            results = verify_at_rest(state, name, unlock, repair=repair, on_progress=show)
        else:
            results = _while_served(control, name, repair=repair, on_progress=show)
    _report(results, as_json=as_json)
    _judge(name, results)


def _while_served(
    control: str, name: str, *, repair: bool, on_progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Wait for the server, which has begun to compare; if this is interrupted, it stops. NotServed when it ends."""
    try:
        while (answer := ask(control, name, "GET", "/v1/verify"))["running"]:
            on_progress(
                sum(mirror["done_bytes"] for mirror in answer["mirrors"]),
                sum(mirror["total_bytes"] for mirror in answer["mirrors"]),
            )
        status = ask_status(control, name)["mirrors"]
        while repair and any(each["state"] == "syncing" for each in status):
            time.sleep(POLL_S)
            status = ask_status(control, name)["mirrors"]
    except KeyboardInterrupt:
        with contextlib.suppress(LockstepError):
            ask(control, name, "DELETE", "/v1/verify")
        raise
    stands = {each["path"]: {"state": each["state"], "dirty_bytes": each["dirty_bytes"]} for each in status}
    return [mirror | stands[mirror["path"]] for mirror in answer["mirrors"]]


def _report(results: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "compared_bytes": sum(result["compared_bytes"] for result in results),
                "left_out_bytes": sum(result["left_out_bytes"] for result in results),
                "mismatches": [mismatch for result in results for mismatch in result["mismatches"]],
                "repaired_bytes": sum(result["repaired_bytes"] for result in results),
                "mirrors": results,
            }
        )
        return
    for result in results:
        typer.echo(f"{result['path']}: compared {human_bytes(result['compared_bytes'])}, {_finding(result)}")
        for mismatch in result["mismatches"][:MOST_LINES]:
            typer.echo(f"  offset {mismatch['offset']}, {mismatch['length']} bytes")
        if len(result["mismatches"]) > MOST_LINES:
            typer.echo(f"  ... and {len(result['mismatches']) - MOST_LINES} more; --json lists them all")
        if result["left_out_bytes"] and not result["error"]:
            left_out = human_bytes(result["left_out_bytes"])
            typer.echo(f"  {left_out} were left out: they are known to differ, and not copied yet")


def _finding(result: dict[str, Any]) -> str:
    if not result["mismatches"]:
        if result["error"]:
            return "and not to the end; no difference so far"
        return "no difference" if result["compared_bytes"] else "for there is nothing to compare yet"
    finding = f"{result['differing_bytes']} bytes differ in {len(result['mismatches'])} places"
    if not result["repaired_bytes"]:
        return finding
    return finding + (", and are marked to be copied" if result["dirty_bytes"] else ", and were copied")


def _judge(name: str, results: list[dict[str, Any]]) -> None:
    if not results:
        raise NoMirror(volume=name)
    for result in results:  # what differs first: another mirror that is away must not hide it
        if result["repaired_bytes"] < result["differing_bytes"]:
            count = len(result["mismatches"])
            raise MirrorsDiffer(mirror=result["path"], places=count, volume=name, bytes=result["differing_bytes"])
    for result in results:
        if result["error"] or not result["compared_bytes"]:
            reason = result["error"] or "all of it is known to differ, and not copied yet"
            raise VerifyIncomplete(mirror=result["path"], reason=reason, volume=name)
        if result["repaired_bytes"] and result["dirty_bytes"]:
            reason = "what differs is marked, and could not be copied yet"
            raise StillBehind(mirror=result["path"], state=result["state"], reason=reason, volume=name)


def _show_history(state: State, name: str, *, as_json: bool) -> None:
    with state.registry() as registry:
        registry.volume(name)
        rows = registry.audit_rows(volume=name, events=("verify", "scrub"))
    for row in rows:
        if as_json:
            print_json(row.to_json())
        else:
            typer.echo(visible(f"{human_moment(row.at_us / 1e6)}  {row.event} by {row.user}: {row.reason}"))
    if not rows and not as_json:
        typer.echo(f"The mirrors of {name} were never compared. `lockstep verify {name}` does so.")


COMMANDS = {"verify": verify}
