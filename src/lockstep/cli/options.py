"""Options that several commands share, and what they mean."""

import functools
import getpass
import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Annotated

import typer

from lockstep.errors import KeyFileUnreadable, PassphraseMissing, TimeInvalid

Name = Annotated[str, typer.Argument(metavar="NAME", help="The volume's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Read the passphrase from FILE, or from standard input if FILE is '-'. The whole file counts, as with "
        "cryptsetup. Without this option it is asked for on the terminal.",
    ),
]
Header = Annotated[
    str | None, typer.Option(metavar="FILE", help="The LUKS2 header is in this file instead of on the mirror.")
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_bytes(text: str) -> int:
    """Read a size such as 512, 64K, 1M or 2G."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write 4096, 64K, 1M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def moment(text: str) -> float:
    """Read a time, local unless it says otherwise; seconds since 1970. Raises TimeInvalid."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise TimeInvalid(time=text) from error


def passphrase_from(key_file: str | None, what: str, *, confirm: bool = False) -> Callable[[], bytes]:
    """Return a function that gets the passphrase, once, when it is first needed.

    It raises KeyFileUnreadable, or PassphraseMissing when there is neither a key file nor a terminal.
    """

    @functools.cache
    def get() -> bytes:
        if key_file == "-":
            return sys.stdin.buffer.read()
        if key_file is not None:
            try:
                with open(key_file, "rb") as file:
                    return file.read()
            except OSError as error:
                raise KeyFileUnreadable(path=key_file, reason=error.strerror) from error
        if not sys.stdin.isatty():
            raise PassphraseMissing(what=what)
        while True:
            passphrase = getpass.getpass(f"Passphrase for {what}: ")
            if not confirm or getpass.getpass("Again: ") == passphrase:
                return passphrase.encode()
            typer.echo("The two differ; try again.", err=True)

    return get
