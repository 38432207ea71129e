"""tls init, tls client, tls show: certificates for clients on other machines."""

from typing import Annotated, Any

import typer

from lockstep.cli.options import Json, command_group
from lockstep.cli.output import print_json
from lockstep.cli.screen import Listing, console
from lockstep.service.certificates import (
    LEAF_DAYS,
    Certificate,
    client_directory,
    list_certificates,
    make_authority,
    make_client,
)

Directory = Annotated[str, typer.Argument(metavar="DIR", help="The TLS directory.")]
Days = Annotated[
    int, typer.Option(metavar="N", min=1, max=36500, help="Lifetime of the certificate; none outlives its authority.")
]

app = command_group("Make and list certificates for clients on other machines.")


@app.command()
def init(
    directory: Directory,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME_OR_IP", help="A name or address by which clients reach the server; repeatable."),
    ] = None,
    days: Days = LEAF_DAYS,
) -> None:
    """Make a certificate authority and the server's certificate; with an authority there, the latter alone."""
    for path in make_authority(directory, host or (), days):
        typer.echo(f"Made {path}")
    typer.echo("Whoever has ca-key.pem can let anybody in. The server does not need it: keep it elsewhere if you can.")
    typer.echo(f"Next: lockstep tls client {directory} NAME, then lockstep serve with --tcp and --tls-dir {directory}")


@app.command()
def client(
    directory: Directory,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The user that the client will be.")],
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR2", help="Where its files go. Default: DIR/clients/NAME."),
    ] = None,
    days: Days = LEAF_DAYS,
) -> None:
    """Make what a client needs to connect as the user NAME: its certificate, its key, the authority's certificate."""
    for path in make_client(directory, name, out, days):
        typer.echo(f"Made {path}")
    typer.echo(f"Next: copy {out or client_directory(directory, name)} to the client, for {name} alone to read.")


@app.command()
def show(directory: Directory, as_json: Json = False) -> None:
    """List the certificates of a TLS directory, and when they expire."""
    certificates = list_certificates(directory)
    if as_json:
        print_json({"certificates": [_as_json(each) for each in certificates]})
        return
    table = Listing("Kind", "Name", "Expires", "Days left", "Hosts", "File")
    for each in certificates:
        left = str(each.days_left()) if each.days_left() >= 0 else "expired"
        table.add_row(each.kind, each.name, f"{each.expires:%Y-%m-%d}", left, " ".join(each.hosts), each.path)
    console().print(table)


def _as_json(certificate: Certificate) -> dict[str, Any]:
    return {
        "kind": certificate.kind,
        "name": certificate.name,
        "hosts": list(certificate.hosts),
        "expires": certificate.expires.isoformat(),
        "expired": certificate.days_left() < 0,
        "path": certificate.path,
    }


COMMANDS = {"tls": app}
