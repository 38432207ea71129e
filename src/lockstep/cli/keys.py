"""key add, key remove, key change, key list: the passphrases of a mirror."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lockstep.cli.options import (
    IterTime,
    Json,
    KeyFile,
    MirrorPath,
    Name,
    command_group,
    passphrase_from,
    refuse_together,
)
from lockstep.cli.output import print_json
from lockstep.cli.screen import Listing, ProgressBars, console
from lockstep.cli.state import StateDir, state_of
from lockstep.crypto.keyslots import KeySlot
from lockstep.registry.store import MirrorRecord
from lockstep.service import keys
from lockstep.service.rekey import Rekeyed, rekey

NewKeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="The new passphrase; as with --key-file, '-' is standard input.")
]

_REKEYING = "Re-keying"

app = command_group("Add, remove, change and list the passphrases of a mirror.")


@app.command()
def add(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    new_key_file: NewKeyFile = None,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="Make a recovery key for paper, and print it, this once.")
    ] = False,
    mirror: MirrorPath = None,
    iter_time: IterTime = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Add a passphrase, a key file, or with --recovery a recovery key."""
    state = state_of(context, state_dir)
    if recovery:
        refuse_together("--recovery", *(["--new-key-file"] if new_key_file else []))
        tell = functools.partial(_print_recovery_key, name, as_json=as_json)
        keys.add_recovery_key(state, name, mirror, _existing(key_file, name), iter_time, tell=tell)
        return
    old, new = _both(key_file, new_key_file, name)
    done = keys.add_key(state, name, mirror, old, new, iter_time)
    if as_json:
        print_json(_done_as_json(done))
    else:
        typer.echo(f"Added a passphrase of {done.mirror.path}, in key slot {done.slot}.")


@app.command()
def remove(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    slot: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="This key slot, whoever knows it; the passphrase is that of another one."
        ),
    ] = None,
    mirror: MirrorPath = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Remove the passphrase that is given, or a key slot."""
    done = keys.remove_key(state_of(context, state_dir), name, mirror, _existing(key_file, name), slot)
    if as_json:
        print_json(_done_as_json(done) | {"still_opens": done.still_opens})
        return
    typer.echo(f"Removed key slot {done.slot} of {done.mirror.path}.")
    if done.still_opens:
        typer.echo("This passphrase opens another key slot too, which is still there. Remove it again for that one.")
    typer.echo("A copy of the header from before still opens with it, and a server that runs goes on.")


@app.command()
def change(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    new_key_file: NewKeyFile = None,
    mirror: MirrorPath = None,
    iter_time: IterTime = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Replace a passphrase by a new one; at every moment one of them opens the mirror."""
    old, new = _both(key_file, new_key_file, name)
    done = keys.change_key(state_of(context, state_dir), name, mirror, old, new, iter_time)
    if as_json:
        print_json(_done_as_json(done) | {"old_slot": done.old_slot, "still_opens": done.still_opens})
        return
    typer.echo(f"Changed a passphrase of {done.mirror.path}: key slot {done.old_slot} is now key slot {done.slot}.")
    if done.still_opens:
        typer.echo("The old one opens another key slot too, which is still there: lockstep key remove")
    typer.echo("A copy of the header from before still opens with the old one.")


@app.command("rekey")
def rekey_(
    context: typer.Context,
    name: Name,
    key_file: KeyFile = None,
    new_key_file: NewKeyFile = None,
    drop_other_keys: Annotated[
        bool, typer.Option("--drop-other-keys", help="Even if other key slots are lost, which hold the old volume key.")
    ] = False,
    mirror: MirrorPath = None,
    iter_time: IterTime = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Encrypt a mirror anew, with a new volume key, while the volume is served or not; again to go on with it.

    With --new-key-file under another passphrase, too. The mirror misses what is written meanwhile, and then gets it.
    """
    old = _existing(key_file, name)
    new = None
    if new_key_file is not None:
        old, new = _both(key_file, new_key_file, name)
    with ProgressBars({_REKEYING: _REKEYING}, as_json=as_json) as bars:
        done = rekey(
            state_of(context, state_dir),
            name,
            mirror,
            old,
            new,
            iter_time,
            drop_others=drop_other_keys,
            on_progress=functools.partial(bars, _REKEYING),
        )
    if as_json:
        print_json(_done_as_json(done) | {"resumed": done.resumed, "behind": done.behind})
        return
    typer.echo(f"{done.mirror.path} has a new volume key, in key slot {done.slot}. Headers from before open nothing.")
    if done.resumed:
        typer.echo("That was begun before, and has come to its end. For another key than that one run this again.")
    typer.echo(f"Make a copy of the header of today: lockstep header backup {name} OUTPUT")
    if done.behind:
        typer.echo(f"The server has not taken the mirror back, and does so when it is started anew: {done.behind}")


@app.command("list")
def list_(
    context: typer.Context,
    name: Name,
    mirror: MirrorPath = None,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """List the key slots of a volume's mirrors: what opens them, and what a guess costs."""
    found = keys.list_keys(state_of(context, state_dir), name, mirror)
    if as_json:
        print_json({"mirrors": [_mirror_as_json(*each) for each in found]})
        return
    for record, slots in found:
        table = Listing("Slot", "Opened by", "Key derivation", "Tokens")
        for slot in slots:
            table.add_row(str(slot.number), slot.kind, f"{slot.kdf}, {_cost(slot)}", ", ".join(slot.tokens))
        typer.echo(record.path)
        console().print(table)


def _cost(slot: KeySlot) -> str:
    units = {"memory_kib": "memory {} KiB"}
    return ", ".join(units.get(what, f"{what} {{}}").format(count) for what, count in slot.cost.items())


def _existing(key_file: str | None, name: str) -> Callable[[], bytes]:
    return passphrase_from(key_file, f"the mirror of {name}")


def _both(key_file: str | None, new_key_file: str | None, name: str) -> tuple[Callable[[], bytes], Callable[[], bytes]]:
    """Return the passphrase that is there and the new one, of which one may come from standard input."""
    if key_file == new_key_file == "-":
        refuse_together("--key-file -", "--new-key-file -")
    new = passphrase_from(new_key_file, f"the mirror of {name}", confirm=True, called="New passphrase")
    return _existing(key_file, name), new


def _print_recovery_key(name: str, done: keys.Done, *, as_json: bool) -> None:
    if as_json:
        print_json(_done_as_json(done) | {"recovery_key": done.recovery_key})
        return
    typer.echo(f"Recovery key of the Lockstep volume {name}")
    typer.echo(f"mirror {done.mirror.path}, LUKS UUID {done.mirror.luks_uuid}, key slot {done.slot}")
    typer.echo("")
    typer.echo(f"    {done.recovery_key}")
    typer.echo("")
    typer.echo("Whoever has it can read the mirror. It is not kept anywhere: print it, or write it down, now.")
    typer.echo("It is a passphrase like any other: type it exactly so, hyphens included, where")
    typer.echo("`lockstep restore` or `cryptsetup open` asks for one.")


def _done_as_json(done: keys.Done | Rekeyed) -> dict[str, Any]:
    return {"mirror": done.mirror.path, "uuid": done.mirror.luks_uuid, "slot": done.slot}


def _mirror_as_json(mirror: MirrorRecord, slots: tuple[KeySlot, ...]) -> dict[str, Any]:
    return {
        "path": mirror.path,
        "uuid": mirror.luks_uuid,
        "header": mirror.header_path,
        "slots": [
            {"slot": each.number, "kind": each.kind, "tokens": each.tokens, "kdf": each.kdf, "cost": each.cost}
            for each in slots
        ],
    }


COMMANDS = {"key": app}
