"""Options that several commands share, and what they mean."""

import functools
import getpass
import os
import re
import sys
from collections.abc import Callable
from datetime import MAXYEAR, MINYEAR, datetime
from typing import Annotated, Any

import typer

from lockstep.crypto.unlock import BY_TOKEN, Unlock
from lockstep.errors import (
    CredentialMissing,
    KeyFileUnreadable,
    KeySourcesConflict,
    PassphraseMissing,
    PassphraseNotText,
    TimeInvalid,
    ValueEmpty,
)


def command_group(about: str) -> typer.Typer:
    """Return an empty group of commands, which the program shows and ends as it does the others."""
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def not_empty(_context: object, parameter: Any, value: Any) -> Any:
    """Refuse a value that is empty, or blank: it is another thing than none. Raises ValueEmpty."""
    if isinstance(value, str) and not value.strip():
        is_option = parameter.opts[0].startswith("-")
        raise ValueEmpty(option=parameter.opts[0] if is_option else parameter.metavar.strip("[]"))
    return value


# To change a passphrase takes two of them, on a machine that may be busy, and cryptsetup is given six; a server waits
# for three of them when a mirror comes back.
MOST_ITER_TIME_MS = 20_000

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
Credential = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The passphrase is the systemd credential NAME (LoadCredential, LoadCredentialEncrypted)."
    ),
]
TokenOnly = Annotated[
    bool,
    typer.Option(
        "--token-only", help="Unlock by a LUKS2 token that this machine has (TPM2, FIDO2, keyring), unattended."
    ),
]
Mirror = Annotated[str, typer.Argument(metavar="MIRROR", help="The mirror: a block device or an image file.")]
Incomplete = Annotated[
    bool, typer.Option("--incomplete", help="Go on even if the mirror was never, or is no more, complete.")
]
MirrorPath = Annotated[
    str | None, typer.Option("--mirror", metavar="PATH", help="Which mirror, if the volume has several.")
]
IterTime = Annotated[
    int | None,
    typer.Option(
        metavar="MS",
        min=1,
        max=MOST_ITER_TIME_MS,
        help="How long one guess of the passphrase takes. Default: cryptsetup's.",
    ),
]
Header = Annotated[
    str | None, typer.Option(metavar="FILE", help="The LUKS2 header is in this file instead of on the mirror.")
]

SHORTEST_PATIENCE_S, LONGEST_PATIENCE_S = 0.1, 86400.0
MOST_KEY_BYTES = 8 << 20  # cryptsetup reads no more of a key file
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_bytes(text: str) -> int:
    """Read a size such as 512, 64K, 1M or 2G."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write 4096, 64K, 1M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def patience_s(text: str) -> float:
    """Read for how many seconds a disk is waited for: up to a day, and never for ever."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_PATIENCE_S <= seconds <= LONGEST_PATIENCE_S:
        raise typer.BadParameter(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return seconds


def moment(text: str) -> float:
    """Read a time, local unless it says otherwise; seconds since 1970. Raises TimeInvalid."""
    try:
        found = datetime.fromisoformat(text)
        if MINYEAR < found.year < MAXYEAR:  # at either end there is no day before, or after, to look at
            return found.timestamp()
    except (ValueError, OverflowError) as error:
        raise TimeInvalid(time=text) from error
    raise TimeInvalid(time=text)


def unlock_from(key_file: str | None, credential: str | None, *, token_only: bool, what: str) -> Unlock:
    """Return how to unlock mirrors: unattended, or by asking. Raises KeySourcesConflict, CredentialMissing."""
    given = {"--key-file": key_file, "--credential": credential, "--token-only": token_only or None}
    refuse_together(*(option for option, value in given.items() if value is not None))
    if token_only:
        return BY_TOKEN
    return Unlock(passphrase_from(key_file if credential is None else credential_file(credential), what))


def refuse_together(*options: str) -> None:
    """Raise KeySourcesConflict if there is more than one."""
    if len(options) > 1:
        raise KeySourcesConflict(options=" and ".join(options))


def credential_file(name: str) -> str:
    """Return where systemd has put a credential (systemd.exec(5)). Raises CredentialMissing."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise CredentialMissing(name=name, reason="$CREDENTIALS_DIRECTORY is not set")
    path = os.path.join(directory, name)
    if os.path.basename(name) != name or not os.path.isfile(path):
        raise CredentialMissing(name=name, reason=f"there is no such file in {directory}")
    return path


def _content(key_file: str) -> bytes:
    try:
        with open(sys.stdin.fileno() if key_file == "-" else key_file, "rb", closefd=key_file != "-") as file:
            found = file.read(MOST_KEY_BYTES + 1)
    except OSError as error:
        raise KeyFileUnreadable(path=key_file, reason=error.strerror) from error
    if len(found) > MOST_KEY_BYTES:
        raise KeyFileUnreadable(path=key_file, reason=f"it has more than the {MOST_KEY_BYTES} bytes of a key file")
    return found


def passphrase_from(
    key_file: str | None, what: str, *, confirm: bool = False, called: str = "Passphrase"
) -> Callable[[], bytes]:
    """Return a function that gets the passphrase, once, when it is first needed.

    It raises KeyFileUnreadable, or PassphraseMissing when there is neither a key file nor a terminal.
    """

    @functools.cache
    def get() -> bytes:
        if key_file is not None:
            return _content(key_file)
        if not sys.stdin.isatty():
            raise PassphraseMissing(what=what)
        while True:
            try:
                passphrase = getpass.getpass(f"{called} for {what}: ")
                if not confirm or getpass.getpass("Again: ") == passphrase:
                    return passphrase.encode()
            except UnicodeError as error:
                raise PassphraseNotText(what=what) from error
            except EOFError as error:
                raise PassphraseMissing(what=what) from error
            typer.echo("The two differ; try again.", err=True)

    return get
