"""audit: who did what, when and why; and the proof that nothing of it was removed or altered."""

import re
from typing import Annotated

import typer

from lockstep.cli.options import Json, moment
from lockstep.cli.output import human_moment, print_json
from lockstep.cli.screen import Listing, console
from lockstep.cli.state import StateDir, state_of
from lockstep.errors import AuditDamaged, HeadUseless


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
    table = Listing("Time", "Volume", "User", "Event", "What happened", "From")
    for row in rows:
        when = human_moment(row.at_us / 1e6)
        table.add_row(when, row.volume, row.user, row.event, row.reason, row.origin)
    console().print(table)


def _require_useful(head: str, *, check: bool) -> None:
    if re.fullmatch(r"[0-9a-fA-F]{64}", head) is None:
        raise HeadUseless(head=head, reason="it is not 64 hexadecimal digits")
    if not check:
        raise HeadUseless(head=head, reason="there is no --check")


COMMANDS = {"audit": audit}
