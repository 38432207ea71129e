"""grant, revoke, grants, whocan, set: who may update a volume's mirrors, when, and what becomes of the rest."""

import contextlib
import os
import time
from datetime import datetime
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
import tzlocal
from rich.text import Text

from lockstep.cli.options import Json, Name, moment
from lockstep.cli.output import human_moment, print_json
from lockstep.cli.screen import Listing, console, plain
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import SettingInvalid, TimezoneNameless, TimezoneUnknown, TimezoneUnwanted, UserInvalid
from lockstep.nbd.identity import is_user_name
from lockstep.registry import windows
from lockstep.registry.access import ANYBODY, Grant, decide
from lockstep.registry.windows import Schedule
from lockstep.service.managing import manager
from lockstep.service.volumes import move_target

HALF_A_YEAR_S: Final = 182 * 86400

User = Annotated[str, typer.Argument(metavar="USER", help="An account, a certificate's name, or '*' for everybody.")]


def grant(
    context: typer.Context,
    name: Name,
    user: User,
    window: Annotated[
        list[str] | None,
        typer.Option(metavar="WINDOW", help="When: 'mon-fri 22:00-06:00', 'daily 01:30-03:00'. Default: always."),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="Whose clock the windows are read on. Default: this machine's."),
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Give a user the right to update the mirrors of a volume. It replaces what the user had."""
    state = state_of(context, state_dir)
    actor = manager(state, f"grant the mirrors of {name}")
    if user != ANYBODY and not is_user_name(user):
        raise UserInvalid(user=user)
    granted = Grant(user, tuple(map(windows.parse, window or [])), _zone(timezone) if timezone or window else "UTC")
    with state.registry() as registry:
        registry.grant(name, granted, actor=actor)
    typer.echo(f"Granted. {_verdict_of(granted, name).reason}.")


def revoke(context: typer.Context, name: Name, user: User, state_dir: StateDir = None) -> None:
    """Take a user's right to update the mirrors of a volume away."""
    state = state_of(context, state_dir)
    actor = manager(state, f"revoke the mirrors of {name}")
    with state.registry() as registry:
        registry.revoke(name, user, actor=actor)
        left = registry.grants(name)
    typer.echo(f"Revoked. {decide(user, name, left, time.time()).reason}.")
    if any(each.user == ANYBODY for each in left):
        typer.echo(f"Everybody has a right there, {user} too. To take it away: lockstep revoke {name} '{ANYBODY}'")


def grants(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A volume. Default: all.")] = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """List who may update which mirrors, when, and whether they may now."""
    with state_of(context, state_dir).registry() as registry:
        volumes = [registry.volume(name)] if name is not None else registry.volumes()
        found = [(volume.name, grant) for volume in volumes for grant in registry.grants(volume.name)]
    if as_json:
        print_json({"grants": [_as_json(volume, grant) for volume, grant in found]})
        return
    table = Listing("Volume", "User", "Windows", "Time zone", "Now", "Changes")
    for volume, grant in found:
        verdict = _verdict_of(grant, volume)
        table.add_row(
            volume,
            grant.user,
            ", ".join(map(str, grant.windows)) or "always",
            (grant.timezone if grant.windows else "") + ("" if grant.timezone_known else " (unknown here)"),
            Text("yes", "green") if verdict.allowed else Text("no", "yellow"),
            human_moment(verdict.until_s, grant.timezone) if verdict.until_s else "never",
        )
    console().print(table if found else "Nobody may update any mirror. Let somebody: lockstep grant NAME USER")


def whocan(
    context: typer.Context,
    name: Name,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="As if it were TIME: 2026-12-24T18:00, local time. Default: now.")
    ] = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Explain who may update the mirrors of a volume, and why."""
    at_s = moment(at) if at else time.time()
    with state_of(context, state_dir).registry() as registry:
        found = registry.grants(name)
    named = [grant.user for grant in found if grant.user != ANYBODY]
    verdicts = [(user, decide(user, name, found, at_s)) for user in [*named, "anybody else"]]
    if as_json:
        rows = [
            {
                "user": user,
                "allowed": verdict.allowed,
                "kind": verdict.kind,
                "reason": verdict.reason,
                "until": verdict.until_s,
            }
            for user, verdict in verdicts
        ]
        print_json({"volume": name, "at": at_s, "users": rows})
        return
    for _user, verdict in verdicts:
        mark = ("yes  ", "green") if verdict.allowed else ("no   ", "yellow")
        console().print(Text.assemble(mark, plain(verdict.reason)))


def set_(
    context: typer.Context,
    name: Name,
    setting: Annotated[
        str,
        typer.Argument(
            metavar="SETTING",
            help="on-denied=hold or on-denied=refuse: what becomes of denied updates. scrub='sun 03:00-06:00': compare "
            "the mirrors with the target in this window of each week; scrub=off. target=PATH: where the target is by "
            "now, of a volume that is not served.",
        ),
    ],
    timezone: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="Whose clock the window is read on. Default: this machine's."),
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Change a setting of a volume; while it is served, too, but for the target."""
    state = state_of(context, state_dir)
    actor = manager(state, f"change the settings of {name}")
    key, _, value = setting.partition("=")
    if key in ("on-denied", "target") and timezone is not None:
        raise TimezoneUnwanted(setting=key)
    if key == "target" and value:
        move_target(state, name, value)
        typer.echo(f"{name}: target={os.path.abspath(value)}")
        typer.echo("The next server sees in some hundred places whether it is the disk that it was. If it is not, but")
        typer.echo(f"restored, or a copy, have all of it compared: lockstep sync {name} --all --checksum")
        return
    with state.registry() as registry:
        if key == "on-denied" and value in ("hold", "refuse"):
            registry.set_on_denied(name, "hold" if value == "hold" else "refuse", actor=actor)
        elif key == "scrub":
            schedule = None if value == "off" else Schedule(windows.parse(value), _zone(timezone))
            registry.set_scrub(name, schedule, actor=actor)
            value = str(schedule or "off")
        else:
            raise SettingInvalid(setting=setting)
    typer.echo(f"{name}: {key}={value}")


def _zone(given: str | None) -> str:
    """The time zone of that name, or this machine's. Raises TimezoneUnknown, TimezoneNameless."""
    if given is not None:
        windows.zone(given)
        return given
    with contextlib.suppress(ZoneInfoNotFoundError, TimezoneUnknown):
        name = tzlocal.get_localzone_name()
        if name is not None and _shows_local_time(windows.zone(name)):
            return name
    raise TimezoneNameless


def _shows_local_time(zone: ZoneInfo) -> bool:
    """Whether its clock and this process's agree, in summer and in winter."""
    now_s = time.time()
    moments = (datetime.fromtimestamp(at_s, zone) for at_s in (now_s, now_s + HALF_A_YEAR_S))
    return all(moment.utcoffset() == moment.astimezone().utcoffset() for moment in moments)


def _verdict_of(grant: Grant, volume: str) -> Any:
    user = "everybody" if grant.user == ANYBODY else grant.user
    return decide(user, volume, (Grant(user, grant.windows, grant.timezone),), time.time())


def _as_json(volume: str, grant: Grant) -> dict[str, Any]:
    verdict = _verdict_of(grant, volume)
    return {
        "volume": volume,
        "user": grant.user,
        "windows": [str(window) for window in grant.windows],
        "timezone": grant.timezone,
        "allowed_now": verdict.allowed,
        "next_change": verdict.until_s,
    }


COMMANDS = {"grant": grant, "revoke": revoke, "grants": grants, "whocan": whocan, "set": set_}
