"""audit: who did what, when and why; and the proof that nothing of it was removed or altered."""

import re
from collections.abc import Sequence
from typing import Annotated

import typer

from lockstep.cli.options import Json, moment
from lockstep.cli.output import human_moment, print_json, visible
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import AuditDamaged, HeadUseless
from lockstep.registry.audit import AuditRecord


def audit(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A volume. Default: all.")] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only what USER did.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only from TIME on: 2026-12-24T18:00.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only before TIME.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Prove that no row was removed or altered.")] = False,
    head: Annotated[
        str | None, typer.Option(metavar="HASH", help="With --check: a last hash that was noted earlier.")
    ] = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show the audit trail; with --json a line for each row."""
    if head is not None:
        _require_useful(head, check=check)
    with state_of(context, state_dir).registry() as registry:
        if check:
            found = registry.check_audit(head.lower() if head else None)
            if found.reason is not None:
                raise AuditDamaged(reason=found.reason, rows=found.rows)
            if as_json:
                print_json({"rows": found.rows, "head": found.head})
            else:
                typer.echo(f"{found.rows} rows, none removed or altered. The last hash is {found.head}")
            return
        rows = registry.audit_rows(
            volume=name,
            user=user,
            since_s=moment(since) if since else None,
            until_s=moment(until) if until else None,
        )
        if name is not None and not rows and not registry.audit_rows(volume=name):
            registry.volume(name)  # or there never was such a volume
    if as_json:
        for row in rows:
            print_json(row.to_json())
        return
    _list(rows)


def _list(rows: Sequence[AuditRecord]) -> None:
    """A line for each row. No table: that costs milliseconds and kilobytes a row, and shows nothing before its end."""
    names = ("Time", "Volume", "User", "Event", "From")
    lines = [
        tuple(map(visible, (human_moment(row.at_us / 1e6), row.volume, row.user, row.event, row.origin)))
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
    for line, what in zip([names, *lines], ["What happened", *(visible(row.reason) for row in rows)], strict=True):
        typer.echo("  ".join([*map(str.ljust, line, widths), what]))


def _require_useful(head: str, *, check: bool) -> None:
    if re.fullmatch(r"[0-9a-fA-F]{64}", head) is None:
        raise HeadUseless(head=head, reason="it is not 64 hexadecimal digits")
    if not check:
        raise HeadUseless(head=head, reason="there is no --check")


COMMANDS = {"audit": audit}
