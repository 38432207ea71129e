"""Every failure that a user can meet: class -> exit code -> what happened, likely cause, next step.

    LockstepError                 1  failed
    ├── UsageError                2  the command line asks for something that cannot be
    ├── DifferencesFound          3  two disks that should be equal are not
    ├── NotPermitted              4  the caller may not do this
    ├── RegistryError             1  names, states, the registry itself
    ├── DiskError                 1  targets, mirrors, outputs as disks
    ├── LuksError                 1  the mirror as an encrypted volume
    ├── ServiceError              1  serving, attaching, the control socket
    └── Defect                    5  Lockstep itself is wrong

An error class is a row of the catalogue: three format strings over the data that the raiser
passes by keyword. The data stays on the error (`error.data`) for JSON output and for tests.
No secret may ever be passed as data.
"""

import functools
from collections.abc import Callable
from typing import ClassVar


class LockstepError(Exception):
    """The root. Subclasses fill the three sentences; `data` fills their placeholders."""

    exit_code: ClassVar[int] = 1
    happened: ClassVar[str] = ""
    cause: ClassVar[str] = ""
    next_step: ClassVar[str] = ""

    def __init__(self, **data: object) -> None:
        self.data = data
        super().__init__(self._filled(self.happened))

    def __reduce__(self) -> tuple[Callable[[], "LockstepError"], tuple[()]]:
        """How one process tells another of it."""
        return functools.partial(type(self), **self.data), ()

    @property
    def likely_cause(self) -> str:
        """The cause, with this error's data filled in."""
        return self._filled(self.cause)

    @property
    def advice(self) -> str:
        """The next step, with this error's data filled in."""
        return self._filled(self.next_step)

    def _filled(self, sentence: str) -> str:
        """Fill in the data; a reason that is a sentence itself, as another error's, ends where this one goes on."""
        reason = self.data.get("reason")
        shown = {"reason": reason.removesuffix(".")} if isinstance(reason, str) else {}
        return sentence.format(**self.data | shown)


class UsageError(LockstepError):
    """Exit code 2."""

    exit_code = 2


class AddressInvalid(UsageError):
    """Data: address, reason."""

    happened = "The address {address} cannot be served: {reason}."
    cause = "It is misspelt; an IPv6 address stands in brackets."
    next_step = "Give --tcp 127.0.0.1:10809, --tcp [::1]:10809, or with --tls-dir any address of this machine."


class ValueEmpty(UsageError):
    """Data: option."""

    happened = "The value of {option} is empty."
    cause = "It comes from a variable that is not set; to guess what it stands for could open what shall be closed."
    next_step = "Give a value. To go without an option, leave out its name as well."


class WindowInvalid(UsageError):
    """Data: window, reason."""

    happened = "The window {window!r} cannot be read: {reason}."
    cause = "A window is days and two times of the day."
    next_step = "Write it like one of these: 'mon-fri 22:00-06:00', 'sat,sun 00:00-24:00', 'daily 01:30-03:00'."


class TimezoneUnknown(UsageError):
    """Data: timezone."""

    happened = "There is no time zone {timezone!r}."
    cause = "It is misspelt, or not an IANA name."
    next_step = "Give one like Europe/Berlin, America/New_York or UTC."


class TimezoneNameless(UsageError):
    """Data: none."""

    happened = "On whose clock the window is read is not known: this machine's time zone has no name that holds."
    cause = "Its /etc/localtime is a copy instead of a link, or that, /etc/timezone and $TZ say different things."
    next_step = "Name the zone, like --timezone Europe/Berlin."


class UserInvalid(UsageError):
    """Data: user."""

    happened = "{user!r} cannot be the name of a user."
    cause = "It has 1 to 64 printable characters, and no space at either end."
    next_step = "Give an account's name, the name in a client's certificate, or '*' for everybody."


class SettingInvalid(UsageError):
    """Data: setting."""

    happened = "There is no setting {setting!r}."
    cause = "It is misspelt: on-denied is hold or refuse, scrub is a weekly window or off, and target is a path."
    next_step = "Write for example `lockstep set NAME on-denied=refuse` or `lockstep set NAME 'scrub=sun 03:00-06:00'`."


class TimeInvalid(UsageError):
    """Data: time."""

    happened = "{time!r} is not a time."
    cause = "It is misspelt, or lies at an end of the calendar."
    next_step = "Write it like 2026-12-24T18:00, or with a zone, 2026-12-24T18:00+01:00."


class TlsRequired(UsageError):
    """Data: address."""

    happened = "The address {address} is not served without TLS."
    cause = "Plain NBD carries the plaintext of the disk, for everybody who reaches the address to read and to write."
    next_step = (
        "Run `lockstep tls init DIR --host HOST`, HOST being how clients reach this machine, and for each client "
        "`lockstep tls client DIR NAME`; then serve with --tls-dir DIR. For this machine alone, --tcp 127.0.0.1:10809 "
        "or the unix socket will do."
    )


class TcpMissing(UsageError):
    """--tls-dir without an address."""

    happened = "The TLS directory (--tls-dir) is for TCP, and there is no --tcp."
    cause = "The unix socket needs no TLS: the kernel knows who connects."
    next_step = "Add --tcp HOST:PORT, or leave --tls-dir out."


class GroupUnknown(UsageError):
    """Data: group."""

    happened = "There is no group {group}."
    cause = "The name is misspelt, or the group was not created on this machine."
    next_step = "See `getent group`, or create it (`groupadd {group}`), then run this again."


class UserNameInvalid(UsageError):
    """Data: user."""

    happened = "{user!r} cannot be the name of a user."
    cause = (
        "A name has 1 to 64 printable characters, in a certificate bytes of UTF-8, no space at its ends, and is not *, "
        "which means everybody."
    )
    next_step = "Choose another name."


class HostInvalid(UsageError):
    """Data: host."""

    happened = "{host!r} is neither a host name nor an IP address."
    cause = "It has a port, a space or another character that no host name has."
    next_step = "Give --host the name or address alone by which clients reach the server."


class SectorSizeInvalid(UsageError):
    """Data: sector_bytes, allowed."""

    happened = "{sector_bytes} is not an encryption sector size."
    cause = "LUKS2 knows {allowed} bytes."
    next_step = "Leave --sector-size out: Lockstep then takes the target's own sector size."


class TimezoneUnwanted(UsageError):
    """Data: setting."""

    happened = "The setting {setting} has no time zone."
    cause = "The option --timezone says on whose clock a window is read, and this is not a window."
    next_step = "Leave --timezone out."


class HeadUseless(UsageError):
    """Data: head, reason."""

    happened = "The hash {head!r} is not looked for: {reason}."
    cause = "A hash that proves anything is the last one that an earlier check printed, and a check that looks for it."
    next_step = "Give it as it was printed, 64 hexadecimal digits: `lockstep audit --check --head HASH`."


class PassphraseMissing(UsageError):
    """Data: what."""

    happened = "A passphrase is needed for {what}, and there is no way to ask for one."
    cause = "No --key-file was given, and this is not run on a terminal."
    next_step = "Give --key-file FILE, or --key-file - to read it from standard input."


class KeyFileUnreadable(UsageError):
    """Data: path, reason."""

    happened = "The key file {path} cannot be read: {reason}."
    cause = "The path is misspelt, the file belongs to another user, or it is no key file."
    next_step = "Check the path, what it leads to, and its permissions."


class KeySourcesConflict(UsageError):
    """Data: options."""

    happened = "{options} cannot be given together."
    cause = "Each says where one and the same passphrase comes from, or both would read it from standard input."
    next_step = "Give one of them; of two passphrases one may come from standard input, the other from a file."


class PassphraseNotText(UsageError):
    """Data: what."""

    happened = "What was typed as the passphrase for {what} is no text."
    cause = "The terminal sent bytes that are not of the character encoding of this session (LANG, LC_ALL)."
    next_step = "Correct the terminal's encoding, or give --key-file FILE, which takes any bytes."


class CredentialMissing(UsageError):
    """Data: name, reason."""

    happened = "The credential {name} cannot be read: {reason}."
    cause = "This was not started by systemd with that credential, or the unit gives it another name."
    next_step = "Add LoadCredentialEncrypted={name}:PATH to the unit, or give --key-file FILE."


class MirrorAmbiguous(UsageError):
    """Data: volume, mirrors."""

    happened = "The volume {volume} has several mirrors: {mirrors}."
    cause = "Each has a header and passphrases of its own."
    next_step = "Say with --mirror PATH which one is meant."


class RangeInvalid(UsageError):
    """Data: offset, length, size_bytes."""

    happened = "There is no range of {length} bytes at {offset}: the mirror holds a disk of {size_bytes} bytes."
    cause = "The range (--offset, --length) was meant for another disk, or is empty."
    next_step = "Leave --length out to restore everything from --offset on, and both for the whole disk."


class StreamCannot(UsageError):
    """Data: option."""

    happened = "{option} is impossible when the output is - (standard output)."
    cause = "What was written to a pipe cannot be read again, and takes no record of how far it came."
    next_step = "Give a file or a device as the output, or leave {option} out."


class StreamIsTerminal(UsageError):
    """The data would go to a terminal."""

    happened = "Standard output is a terminal, and a disk's data is nothing to look at."
    cause = "The output - is meant for a pipe."
    next_step = "Write it into a pipe (`lockstep restore MIRROR - | ssh ...`), or name a file or a device."


class MirrorMissing(UsageError):
    """Data: option."""

    happened = "{option} says how to make a mirror, and there is no --mirror."
    cause = "Without --mirror the volume serves its target alone."
    next_step = "Add --mirror PATH, or leave {option} out."


class OverlayUnwanted(UsageError):
    """Data: overlay."""

    happened = "The overlay {overlay} is for writing, and there is no --writable."
    cause = "Without --writable the mirror is opened as it is, and nothing can be written."
    next_step = "Add --writable, or leave --overlay out."


class AdoptFormatsNothing(UsageError):
    """Data: option."""

    happened = "{option} says how to format a mirror, and --adopt formats nothing."
    cause = "With --adopt the disk stays what it is, a LUKS2 volume that may hold a copy already."
    next_step = "Leave out {option}; or leave out --adopt, and what the disk holds is lost."


class DifferencesFound(LockstepError):
    """Exit code 3."""

    exit_code = 3


class AuditDamaged(DifferencesFound):
    """Data: reason, rows."""

    happened = "The audit trail is not whole: {reason}."
    cause = (
        "Somebody who can write the registry changed it, or put it back from a backup. The {rows} rows before are good."
    )
    next_step = "Compare it with what was shipped elsewhere (lockstep audit --json), and find out who could write it."


class OutputDiffers(DifferencesFound):
    """Data: path, mirror, count_bytes, offset."""

    happened = (
        "{path} does not give back what was written to it: {count_bytes} bytes differ from the mirror {mirror}, "
        "the first at byte {offset} of the disk."
    )
    cause = "The output's disk, its cable or the memory is faulty, or something else wrote to it meanwhile."
    next_step = "Do not use this output. Restore to another disk, and check this one (`dmesg`, `smartctl -a`)."


class StillBehind(DifferencesFound):
    """Data: mirror, state, reason, volume."""

    happened = "The mirror {mirror} is {state}: {reason}."
    cause = "What is held waits for its writer's window or for --include-held; a failed mirror, for its return."
    next_step = "See lockstep status {volume} and lockstep grants {volume}; repeat the command when the cause is gone."


class MirrorsDiffer(DifferencesFound):
    """Data: mirror, places, bytes, volume."""

    happened = "The mirror {mirror} differs from its target in {places} places, {bytes} bytes in all."
    cause = "One of the two disks lost or changed data by itself, or somebody wrote to it while it was not served."
    next_step = "Find out which disk is right; if the target is, run `lockstep verify {volume} --repair`."


class NotPermitted(LockstepError):
    """Exit code 4."""

    exit_code = 4


class NotManager(NotPermitted):
    """Data: user, action, path (of the state directory, or of a server's control socket in it)."""

    happened = "{user} may not {action}."
    cause = "{path} belongs to somebody else: it takes its owner, or root, to manage volumes."
    next_step = "Run the command with sudo, or use a state directory of your own with --state-dir."


class MayNotRelease(NotPermitted):
    """Data: user, volume, reason."""

    happened = "What is held from the mirrors of {volume} was not released: {reason}."
    cause = "Releasing writes it to the mirrors, and {user} may not update them now."
    next_step = (
        "Have somebody do it who may (`lockstep whocan {volume}`), or grant it (`lockstep grant {volume} {user}`)."
    )


class ActingNeedsRoot(NotPermitted):
    """Data: user."""

    happened = "Only root may attach a volume on behalf of {user}."
    cause = "Whoever does so updates the mirrors with the rights of {user}."
    next_step = "Run this with `sudo`."


class RegistryError(LockstepError):
    """Names, states, the registry itself."""


class VolumeNameInvalid(UsageError, RegistryError):
    """Data: volume."""

    happened = "{volume!r} cannot be the name of a volume."
    cause = "A name has 1 to 64 letters, digits, dots, hyphens and underscores, and begins with a letter or a digit."
    next_step = "Choose another name."


class RegistryPathInvalid(UsageError, RegistryError):
    """Data: path, reason."""

    happened = "The path {path!r} cannot be registered: {reason}."
    cause = "The registry keeps absolute paths of printable text, each for one purpose."
    next_step = "Give another path to the disk, a symbolic link to it for example."


class RegistryUrlInvalid(UsageError, RegistryError):
    """Data: reason. Not the URL, which may hold a password."""

    happened = "The registry's URL is not understood: {reason}."
    cause = "It is misspelt: a registry is a PostgreSQL database, or a file in the state directory, which needs no URL."
    next_step = "Write postgresql://USER@HOST/DATABASE; without --url-file the registry moves into the state directory."


class UrlFileUnreadable(UsageError, RegistryError):
    """Data: path, reason."""

    happened = "The file {path}, which should hold the registry's URL, cannot be read: {reason}."
    cause = "The path is misspelt, or the file belongs to another user."
    next_step = "Check the path and its permissions."


class VolumeUnknown(RegistryError):
    """Data: volume, near (similar names), hint (these as a sentence, or nothing)."""

    happened = "There is no volume {volume}.{hint}"
    cause = "It was never created, was removed, or is in another state directory's registry."
    next_step = "See `lockstep list`."


class VolumeExists(RegistryError):
    """Data: volume."""

    happened = "There already is a volume {volume}."
    cause = "It was created before, perhaps for another target."
    next_step = "See `lockstep list`; choose another name, or `lockstep remove {volume}` first."


class TargetTaken(RegistryError):
    """Data: path, volume."""

    happened = "{path} already is the target of the volume {volume}."
    cause = "One disk has one role: two volumes on one target, or a target that is a mirror, would destroy it."
    next_step = "Use the volume {volume}, give another disk, or `lockstep remove {volume}` first."


class MirrorTaken(RegistryError):
    """Data: path, volume."""

    happened = "{path} already is a mirror of the volume {volume}."
    cause = "One disk has one role: a mirror holds the ciphertext of one volume, and nothing else may write to it."
    next_step = "Give another disk, or `lockstep mirror remove {volume} {path}` first; that leaves the disk as it is."


class HeaderTaken(RegistryError):
    """Data: path, volume."""

    happened = "{path} already is the header of a mirror of the volume {volume}."
    cause = "A detached header belongs to one mirror; overwritten, that mirror cannot be opened any more."
    next_step = (
        "Give another path, or `lockstep mirror remove {volume} MIRROR` first, with the mirror's path; that leaves the "
        "disk and the header as they are."
    )


class LuksUuidTaken(RegistryError):
    """Data: path, luks_uuid, registered."""

    happened = "{path} has the LUKS UUID {luks_uuid}, which {registered} is registered with."
    cause = "It is the same disk under another name, or a copy of it."
    next_step = "Use {registered}; a copy needs its own UUID (`cryptsetup luksUUID --uuid`) or a new format."


class MirrorUnknown(RegistryError):
    """Data: mirror (path or id), where (of which volume, or nothing)."""

    happened = "No mirror {mirror} is registered{where}."
    cause = "It was removed, belongs to another volume, or was registered under another path."
    next_step = "See `lockstep list`."


class NoMirror(RegistryError):
    """Data: volume."""

    happened = "The volume {volume} has no mirror."
    cause = "It was created without one, or the last one was removed; so there is no header and no passphrase."
    next_step = "Give it one: `lockstep mirror add {volume} PATH`."


class MirrorsHoldBack(RegistryError):
    """Data: volume, mirror."""

    happened = "The volume {volume} is not given another mirror: something is held from {mirror}."
    cause = "What users wrote without permission would reach the new mirror, which gets all of the target."
    next_step = (
        "Have it copied or looked into first (`lockstep sync {volume} --include-held`), then run this again. If that "
        "mirror is lost, `lockstep mirror remove {volume} {mirror}`: the new one then gets what it was not given."
    )


class TargetUnfinished(RegistryError):
    """Data: path, volume, mirror."""

    happened = "The new target {path} of {volume} is still being filled from the mirror {mirror}."
    cause = "The target was replaced (`lockstep replace-target`), and no server has finished the work since."
    next_step = (
        "Serve the volume until `lockstep status {volume}` shows no restore any more, then run this again. If that "
        "cannot be: `lockstep replace-target {volume} NEWDISK` begins anew."
    )


class GrantUnknown(RegistryError):
    """Data: user, volume."""

    happened = "{user} has no grant for the volume {volume}."
    cause = "The name is misspelt, or the grant was revoked already; `*` is everybody's."
    next_step = "Look at `lockstep grants {volume}`."


class RegistryUnreadable(RegistryError):
    """Data: registry, reason."""

    happened = "The registry {registry} cannot be used: {reason}."
    cause = "Its directory does not exist, this user may not write there, or the disk below is full or failing."
    next_step = "Make room there, create the directory, or run as the user who owns it; --state-dir names another one."


class RegistryLost(RegistryError):
    """Data: registry, path, found (a file that was made after it)."""

    happened = "The registry {registry} is gone or empty, but {path} was used before: {found} is there."
    cause = (
        "Somebody deleted, moved or emptied it; servers that still run go on writing to their targets, with the grants "
        "that they know, and leave the mirrors alone once the audit trail cannot be written."
    )
    next_step = (
        "Put it back from a backup; without one, stop the servers, move {path} away, and make each volume anew: "
        "`lockstep create NAME --target PATH`, then `lockstep mirror add NAME PATH --adopt`, which keeps its copy. If "
        "a target is lost as well, first `lockstep restore MIRROR PATH`: an empty one would be copied over its mirror."
    )


class RegistryNotMoved(RegistryError):
    """Data: registry, path (of the state directory), url_path."""

    happened = "The registry {registry} is empty, and {path}/registry.db is not."
    cause = "{url_path} was written by hand, where volumes are registered in the file already."
    next_step = "Remove {url_path} and run `lockstep registry move --url-file FILE`, which takes everything along."


class RegistryElsewhere(RegistryError):
    """Data: registry, place."""

    happened = "The registry {registry} does not belong to this state directory: it belongs to {place}."
    cause = (
        "Each state directory needs a database, or a schema, of its own, because paths and locks are those of one "
        "machine; or the registry was moved; or the file `id` of this state directory was lost."
    )
    next_step = "Give it another database (docs/operations.md), or put the file `id` back from a backup."


class RegistryNotEmpty(RegistryError):
    """Data: registry."""

    happened = "The registry {registry} has volumes, or an audit trail, and a registry cannot be moved to it."
    cause = "It is another state directory's, or is left over from one that was moved before."
    next_step = "Name an empty database or schema, or empty this one: DROP SCHEMA public CASCADE; CREATE SCHEMA public."


class RegistryUnreachable(RegistryError):
    """Data: registry, reason."""

    happened = "The registry {registry} does not serve us: {reason}."
    cause = "The server is down or out of reach, or it does not know this user, password or database."
    next_step = "Try the same URL with psql. Volumes that are being served go on meanwhile."


class RegistryBusy(RegistryError):
    """Data: registry, reason."""

    happened = "The registry {registry} is locked by another process: {reason}."
    cause = "Another Lockstep command hangs in the middle of a change, or a tool holds the database open for writing."
    next_step = "Try again; if it lasts, find the holder (`fuser -v` on the file, pg_locks on a server) and end it."


class RegistryDamaged(RegistryError):
    """Data: registry, reason."""

    happened = "The registry {registry} is not a sound registry: {reason}."
    cause = "The file was damaged, changed by hand, or is not Lockstep's."
    next_step = (
        "Put it back from a backup, or name another with --state-dir. "
        "The mirrors need no registry: `lockstep restore` takes a mirror and its passphrase."
    )


class RegistryNotUnicode(RegistryError):
    """Data: registry, encoding."""

    happened = "The database {registry} keeps text as {encoding}, and cannot hold every name and path."
    cause = "It was made with the encoding of the server's locale."
    next_step = "Make one for UTF-8, and use that: CREATE DATABASE NAME ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0."


class RegistryTooNew(RegistryError):
    """Data: registry, found, known."""

    happened = "The registry {registry} has the schema {found}; this Lockstep knows those up to {known}."
    cause = "A newer Lockstep has used this registry."
    next_step = "Upgrade Lockstep on this machine."


class RegistryDriverMissing(RegistryError):
    """Data: reason."""

    happened = "A PostgreSQL registry needs the driver psycopg, which cannot be loaded: {reason}."
    cause = "Lockstep was installed without its PostgreSQL extra."
    next_step = "Install it: pip install 'lockstep[postgresql]'."


class DiskError(LockstepError):
    """Targets, mirrors and outputs, as disks."""


class DiskMissing(DiskError):
    """The path names nothing."""

    happened = "There is no disk at {path}."
    cause = "The path is misspelt, or the device is not connected."
    next_step = (
        "Look for the disk with `lsblk`, then retry. For a new, empty one, make an image file: "
        "`truncate -s 10G {path}`; a target that was lost comes back from its mirror: `lockstep restore MIRROR {path}`."
    )


class NotADisk(DiskError):
    """The path names something that has no sectors."""

    happened = "{path} is a {kind}; a disk is a block device or a regular file."
    cause = "The path leads to the place where the disk is kept, or to another kind of device."
    next_step = "Give the block device (`lsblk` lists them) or the image file itself."


class DiskForbidden(DiskError):
    """The operating system does not let this user open the disk."""

    happened = "{path} may not be opened for {access}: {reason}."
    cause = "The disk belongs to another user, or it is protected by an attribute or a security policy."
    next_step = "Run this as root, or give the disk to the user that Lockstep runs as."


class DiskReadOnly(DiskError):
    """The disk, or the file system that it lies on, takes no writes."""

    happened = "{path} is read-only."
    cause = "The device is switched to read-only, or its file system is mounted read-only."
    next_step = "Make the device (`blockdev --setrw`) or file system (`mount -o remount,rw`) writable, then retry."


class DirectImpossible(DiskError):
    """The disk cannot be used without the page cache."""

    happened = "{path} cannot be used with direct I/O: {reason}."
    cause = "With --direct, disks must take whole blocks past the page cache; some file systems and sizes do not."
    next_step = "Serve the volume without --direct, or move it to a block device. Nothing was changed."


class DiskBusy(DiskError):
    """The kernel does not give the block device to a second owner."""

    happened = "{path} is in use: {users}."
    cause = "It is mounted, held by another block device, or opened exclusively by another program."
    next_step = "End that use (umount, swapoff, or stop the program), then run this again."


class DiskLocked(DiskError):
    """Another program holds the lock of the disk."""

    happened = "{path} is locked by {holder}."
    cause = "Another Lockstep server serves this disk, or a QEMU uses it."
    next_step = "Stop that server or virtual machine, then run this again."


class DiskChanged(DiskError):
    """Between looking at the disk and opening it, the path came to mean another disk."""

    happened = "{path} is not the disk that it was a moment ago."
    cause = "The file was replaced, or the device was disconnected and its name given to another one."
    next_step = "Make sure that {path} is the disk that you mean, then run this again."


class DiskUnreadable(DiskError):
    """The disk is there and permitted, but does not answer."""

    happened = "{path} cannot be read: {reason}."
    cause = "The disk is failing, has no medium, or was disconnected."
    next_step = "Look into the kernel's messages (`dmesg`) for this disk, and check its cables and its health."


class DiskSilent(DiskError):
    """Data: path, patience_s."""

    happened = "{path} does not answer: it was waited for {patience_s} s."
    cause = "The disk, or the server of the file system that it lies on, hangs or cannot be reached."
    next_step = "Look into the kernel's messages (`dmesg`) for it; when it is back, run this again."


class DiskToolMissing(DiskError):
    """A program that looks at disks is not installed."""

    happened = "The program {tool} is not installed."
    cause = "It belongs to the package {package}."
    next_step = "Install {package} with the system's package manager, then run this again."


class MirrorIsTarget(DiskError):
    """Data: path, target, how."""

    happened = "{path} cannot be the mirror of {target}: they are the same storage ({how})."
    cause = "Two names lead to one disk: a link, a partition, or a loop device."
    next_step = "Give a different disk; a mirror on the disk that it protects protects nothing."


class MirrorTooSmall(DiskError):
    """Data: path, size_bytes, needed_bytes, short_bytes, advice."""

    happened = (
        "{path} is too small for a mirror: it holds {size_bytes} bytes and {needed_bytes} are needed, "
        "{short_bytes} more."
    )
    cause = "A mirror holds as much as its target, rounded up to whole sectors, and 16 MiB for an inline LUKS2 header."
    next_step = "{advice}"


class MirrorTruncated(DiskError):
    """Data: path, size_bytes, needed_bytes."""

    happened = "The mirror {path} is truncated: it has {size_bytes} bytes, and its data needs {needed_bytes}."
    cause = "It was cut short, or copied incompletely to this place."
    next_step = "Put the whole mirror back if there is a copy; else `lockstep mirror remove` it, and add a new one."


class MirrorHoldsData(DiskError):
    """Data: path, found."""

    happened = "{path} is not empty: it holds {found}."
    cause = "The disk is, or was, used for something else."
    next_step = "If what it holds may be destroyed, repeat the command with --force; otherwise give another disk."


class HeaderExists(DiskError):
    """Data: path."""

    happened = "{path} exists already."
    cause = "It may be the header of another mirror, which nothing can open without it."
    next_step = "Give a file that does not exist; or, if its content may be destroyed, repeat with --force."


class HeaderIsDisk(DiskError):
    """Data: path, disk, how."""

    happened = "The header cannot be kept in {path}: it is the storage of {disk} ({how})."
    cause = "The header would be overwritten by the data, or the data by the header."
    next_step = "Give a file of its own, on another disk."


class HeaderIsCopy(DiskError):
    """Data: path, header."""

    happened = "{header} is a copy of the header that {path} has itself."
    cause = "It is a backup of it. The two would tell different things of the mirror from now on."
    next_step = "Leave --header out: the header on the mirror is sound."


class MirrorOfAnotherVolume(DiskError):
    """Data: path, volume, owner."""

    happened = "{path} is not the mirror of {volume}: its LUKS2 header says that it belongs to {owner}."
    cause = "Two mirrors were swapped, another disk has taken this one's name, or another state directory adopted it."
    next_step = (
        "Connect the right disk under this path (`cryptsetup luksDump` shows what a mirror belongs to). One that was "
        "adopted: `lockstep mirror remove NAME {path}`, and add it again with --adopt, where it is to be from now on."
    )


class TargetEmpty(DiskError):
    """Data: path."""

    happened = "The target {path} has no bytes."
    cause = "The file was just created, or the device has no medium."
    next_step = "Give it a size (`truncate -s 10G {path}`), or insert the medium."


class TargetResized(DiskError):
    """Data: path, volume, size_bytes, expected_bytes."""

    happened = "The target {path} has {size_bytes} bytes; the volume {volume} was created with {expected_bytes}."
    cause = "The file was truncated or extended, or another disk has taken its name."
    next_step = (
        "Put the right disk back; if the target is lost, give the volume a new one (`lockstep replace-target {volume} "
        "NEWDISK`); for a disk of a new size, `lockstep remove {volume}` and create it anew."
    )


class MirrorUnlike(DiskError):
    """Data: path, target, volume."""

    happened = (
        "The mirror {path} says that it is a whole disk, and has nothing in common with {target}, {volume}'s target."
    )
    cause = (
        "The target is new, empty or another disk, or this is another disk's mirror. All of it would be overwritten."
    )
    next_step = (
        "To have what the mirror holds: `lockstep restore {path} OUTPUT`. If it may be overwritten, repeat the command "
        "with --force."
    )


class TargetUnlike(DiskError):
    """Data: path, volume, differing, telling."""

    happened = (
        "The target {path} does not seem to be the disk that {volume} was: in {differing} of {telling} places where it "
        "was equal to a mirror it differs. Nothing was changed."
    )
    cause = (
        "The name leads to another disk by now (those in /dev/disk/by-id do not), or the target was overwritten while "
        "nobody served it. Or the mirror was damaged, or exchanged: for another copy of itself, or, where its header "
        "is in a file of its own, for any disk that has its name by now."
    )
    next_step = (
        "Say where the right disk is: `lockstep set {volume} target=PATH`. If its content is lost, and `lockstep drill "
        "{volume}` finds the mirror whole, `lockstep replace-target {volume} NEWDISK` gives it back. If the target is "
        "right as it is, `lockstep sync {volume} --all` has the next server copy all of it to the mirrors."
    )


class TargetGone(DiskError):
    """Data: path, volume."""

    happened = "The target {path} of {volume} is not there."
    cause = "The disk is not connected, its file was moved or removed, or it died."
    next_step = (
        "Connect it and run this again. If it has another name by now: `lockstep set {volume} target=PATH`. If it is "
        "lost, give the volume a new one, which is restored from the mirror while the volume is served: `lockstep "
        "replace-target {volume} NEWDISK`; where the mirror was opened and written over since, `lockstep commit` that "
        "instead, or it is lost. Without a mirror on record, restore a former one (`lockstep restore MIRROR NEWDISK`), "
        "`lockstep remove {volume}`, and create it anew."
    )


class TargetStillThere(DiskError):
    """Data: path, volume, mirror."""

    happened = "The target {path} of {volume} is there, and may have what the mirror {mirror} misses."
    cause = (
        "The last server was killed, or stopped before the mirror was in sync, updates are held from it, or what is "
        "under the target's name was written since, or is another disk by now."
    )
    next_step = (
        "Serve the volume until its mirror is in sync, and run this again; if the mirror is right where the two "
        "differ, or the server refuses that disk as another one, repeat with --incomplete."
    )


class TargetUnprepared(DiskError):
    """Data: path, volume."""

    happened = "What the new target {path} of {volume} lacks is not on record."
    cause = "Replacing the target was interrupted, or the record in the state directory was removed or damaged."
    next_step = (
        "Run `lockstep replace-target {volume} {path} --force` again: the target is then restored from the start."
    )


class TargetHalfRestored(DiskError):
    """Data: path, volume, record."""

    happened = "The target {path} of {volume} is an unfinished restore, or commit: its record {record} is there."
    cause = "That was interrupted. What the target does not have yet would be missing on the mirror, too."
    next_step = (
        "Repeat the `lockstep restore` with --resume, or the `lockstep commit`, and serve then. If the target has "
        "everything, remove the record."
    )


class FillingImpossible(DiskError):
    """Data: path, volume, mirror, reason."""

    happened = "The new target {path} of {volume} cannot be filled from the mirror {mirror}: {reason}."
    cause = "What the target lacks is on this mirror alone, as it was when the volume was served last."
    next_step = (
        "Connect that mirror as it was left, and serve again. Else, `lockstep replace-target {volume} NEWDISK` "
        "takes another mirror that has everything, and begins anew."
    )


class OutputExists(DiskError):
    """Data: path, found."""

    happened = "{path} is not empty: {found}."
    cause = "All of the output is overwritten. What ends in .committing was left by a commit that was killed."
    next_step = "Give another output, or repeat the command with --force if this one may be overwritten."


class RestoreUnfinished(DiskError):
    """Data: path, record, done_bytes, length."""

    happened = "{path} is an unfinished restore: {done_bytes} of {length} bytes (its record is {record})."
    cause = "That restore was interrupted, or is still running."
    next_step = "Repeat the command with --resume to go on with it, or with --force to start again from the beginning."


class RestoreStopped(DiskError):
    """Data: path, mirror, done_bytes, length, reason."""

    happened = "Restoring {mirror} to {path} stopped after {done_bytes} of {length} bytes: {reason}."
    cause = "A disk is failing or full, or it was disconnected."
    next_step = (
        "What was restored is kept. Make room or repair the disk (`dmesg` has the kernel's messages), then repeat the "
        "command with --resume: it goes on there. If it is the mirror that cannot be read, copy what can be read of it "
        "to another disk (`ddrescue`), and give that in its place: only what is missing there comes out as noise."
    )


class StreamStopped(DiskError):
    """Data: mirror, reason."""

    happened = "Restoring {mirror} to standard output stopped: {reason}."
    cause = (
        "What reads it has ended (a connection that was lost, a disk there that is full), or a disk here is failing or "
        "full; what was written is no whole disk."
    )
    next_step = "See what the other program says, and the kernel's messages (`dmesg`), then run both again."


class NothingToResume(DiskError):
    """Data: path, record."""

    happened = "There is no record {record}, so what {path} holds is not known to be an unfinished restore."
    cause = "That restore ended, was never begun, or has its record elsewhere."
    next_step = "Leave --resume out, or say with --record where the record is."


class ResumeUnfit(DiskError):
    """Data: path, record, reason."""

    happened = "The restore to {path} cannot be resumed: {reason}."
    cause = "The record {record} is of another restore, or the mirror or the output changed since."
    next_step = "Give the same mirror, output and range as before, or start again from the beginning with --force."


class RestoreRecordInvalid(DiskError):
    """Data: path, reason."""

    happened = "{path} cannot be used as the record of a restore: {reason}."
    cause = "Its directory takes no more files, another file has this name, or it was damaged."
    next_step = "Give another name with --record, or take the file away if nobody needs it."


class OutputTooSmall(DiskError):
    """Data: path, size_bytes, needed_bytes."""

    happened = "{path} is too small for what is to be restored: it has {size_bytes} bytes of {needed_bytes}."
    cause = "The target was larger than this disk."
    next_step = "Give a disk of at least {needed_bytes} bytes, or the name of a file that does not exist yet."


class OutputIsMirror(DiskError):
    """Data: path, mirror, how."""

    happened = "{path} cannot be the output: it is the storage of {mirror} ({how})."
    cause = "Two names lead to one disk: a link, a partition, or a loop device."
    next_step = "Give a different output; nothing was changed."


class OutputInState(DiskError):
    """Data: path, state."""

    happened = "{path} cannot be the output: it lies in the state directory {state}."
    cause = "What is there is Lockstep's own: the registry, the records of what differs, the locks."
    next_step = "Give an output elsewhere, best on another disk; nothing was changed."


class MirrorIncomplete(DiskError):
    """Data: path, state."""

    happened = "The mirror {path} was last closed in the state {state}: parts of it do not hold the target's data."
    cause = "Its first copy, or a later one, was never finished, or the mirror failed meanwhile."
    next_step = "Use another mirror if there is one; to rescue what this one holds, repeat with --incomplete."


class MirrorNotDrilled(DiskError):
    """Data: path, state."""

    happened = "The mirror {path} is {state} and not drilled: parts of it do not hold the target's data."
    cause = "It is being copied, it failed meanwhile, or something that was written is held from it."
    next_step = "Bring it in sync (`lockstep status` says what it lacks), then run this again."


class OverlayMissing(DiskError):
    """Data: path."""

    happened = "There is no overlay {path}."
    cause = "The path is misspelt, or the mirror was opened with another overlay."
    next_step = "Give the file that `lockstep open --writable` named when it began; without one, restore the mirror."


class OverlayUnfit(DiskError):
    """Data: path, reason."""

    happened = "{path} cannot be the overlay: {reason}."
    cause = "The name is that of another file, or making the overlay was interrupted."
    next_step = "Give another name with --overlay; an overlay that does not exist yet is made."


class OverlayOfAnother(DiskError):
    """Data: path, reason."""

    happened = "The overlay {path} does not fit this mirror: {reason}."
    cause = "An overlay belongs to one mirror, as it was when the overlay was made; over anything else it is noise."
    next_step = (
        "Open the mirror, or the copy of it, that the overlay was made over; or begin anew with another --overlay."
    )


class OverlayDamaged(DiskError):
    """Data: path, reason."""

    happened = "The overlay {path} is damaged: {reason}."
    cause = "Something else was written into the file, or the disk below it returns wrong data."
    next_step = "Put it back from a copy, or begin anew with another --overlay; the mirror was never written."


class MirrorStale(DiskError):
    """Data: path, generation, seen."""

    happened = (
        "The mirror {path} is an older copy of itself: its generation is {generation}, and {seen} was seen before."
    )
    cause = "It was put back from a backup or a snapshot, and misses what was written since."
    next_step = "Connect the newest copy, or use another mirror; to go on with this one, repeat with --incomplete."


class MirrorMissed(DiskError):
    """Data: path, volume, other, reason."""

    happened = "The mirror {path} of {volume} has what {other} lacks, and cannot be used: {reason}."
    cause = "{other} failed, or was away, while {path} was followed; or updates were held from it."
    next_step = (
        "Connect or repair {path}, and run this again. If it is lost, name the other with --mirror {other}: what that "
        "one lacks is lost then."
    )


class MirrorsAlike(DiskError):
    """Data: volume, mirrors."""

    happened = "Which of these mirrors of {volume} has everything is not on record: {mirrors}."
    cause = (
        "The last server was killed, and a mirror that it had lost before may say of itself that it is in sync still. "
        "Or the state directory is of an earlier day than the mirrors, or one was set aside, since it was unlike the "
        "target."
    )
    next_step = (
        "Name one that was followed to the end with --mirror: `lockstep audit {volume}` says which was degraded when, "
        "and `lockstep open MIRROR --attach` shows what one holds."
    )


class NoToken(DiskError):
    """Data: path."""

    happened = "{path} is a LUKS2 volume, but not a mirror of Lockstep: its header has no lockstep token."
    cause = (
        "It was made by another program, its header was restored from before Lockstep used it, or `lockstep create` or "
        "`lockstep mirror add` was killed while it made it."
    )
    next_step = (
        "Check the path. One that was being made: `lockstep mirror remove NAME {path}`, and add it again with --force. "
        "As a LUKS2 volume it opens with `cryptsetup open {path} NAME`."
    )


class DirectoryMissing(DiskError):
    """Data: path, directory."""

    happened = "{path} cannot be made: there is no directory {directory}."
    cause = "The path is misspelt, or a file system is not mounted."
    next_step = "Make the directory, or mount what belongs there, then run this again."


class DiskFailed(DiskError):
    """Data: path, doing, reason."""

    happened = "{doing} {path} failed: {reason}."
    cause = "The disk is failing or full, or it was disconnected."
    next_step = "Look into the kernel's messages (`dmesg`) and at the free space, then run this again."


class LuksError(LockstepError):
    """The mirror, as an encrypted volume."""


class CipherSelfTestFailed(LuksError):
    """The cipher gives wrong answers on this machine."""

    happened = "The encryption self-test failed: {kernel} gave a wrong answer for {case}."
    cause = "The library that encrypts or the processor does not compute AES-XTS correctly, or the memory is faulty."
    next_step = "Do not write mirrors on this machine. Update that library, test the memory, then run this again."


class CryptsetupMissing(LuksError):
    """The program that keeps LUKS2 headers is not installed."""

    happened = "The program cryptsetup is not installed."
    cause = "Lockstep leaves headers, key slots and passphrases to cryptsetup, which is a package of its own."
    next_step = "Debian, Ubuntu: `apt install cryptsetup-bin`. Fedora: `dnf install cryptsetup`. Then run this again."


class CryptsetupNotStarted(LuksError):
    """The system did not start cryptsetup. Data: action, path, reason."""

    happened = "cryptsetup could not be started to {action} {path}: {reason}."
    cause = "The machine is short of memory or processes, or the program was being replaced at this moment."
    next_step = "See to the memory and to the limits (`ulimit -u`, `TasksMax=` of systemd), then run this again."


class CryptsetupFailed(LuksError):
    """Cryptsetup failed in a way that has no class of its own."""

    happened = "cryptsetup could not {action} {path} (its exit code was {exit_code}): {reason}."
    cause = "The disk or file cannot be opened or written, is in use, or cryptsetup does not support what was asked."
    next_step = "Correct what cryptsetup reports, then run this again."


class CryptsetupHung(LuksError):
    """Cryptsetup did not end in its time, and was killed."""

    happened = "cryptsetup did not {action} {path} within {timeout_s} seconds."
    cause = "The disk does not answer, another program keeps its header locked, or the machine is very slow."
    next_step = "Check the disk (`dmesg`) and whether another cryptsetup is running, then run this again."


class HeaderUnreadable(LuksError):
    """The header could not even be read."""

    happened = "The LUKS2 header in {path} cannot be read: {reason}."
    cause = "The path is wrong, the disk is gone or fails, or this account may not read it."
    next_step = (
        "Check the path and its permissions, then run this again. A header file that is lost comes back from a backup "
        "(`lockstep header restore NAME BACKUP`)."
    )


class HeaderNotCreated(LuksError):
    """The file for a detached header could not be made."""

    happened = "The header file {path} cannot be created: {reason}."
    cause = "The directory does not exist or is full, or this account may not write to it."
    next_step = "Choose another place for the header. It must not lie on the mirror itself."


class NotLuks2(LuksError):
    """There is no LUKS2 header where one was expected."""

    happened = "{path} has no LUKS2 header."
    cause = (
        "It is not a mirror, its header was overwritten, the header is in a file of its own, or `lockstep create` or "
        "`lockstep mirror add` was killed before it was made."
    )
    next_step = (
        "Check the path. For a mirror with a detached header, give the header file with --header. A header that was "
        "overwritten comes back from a backup (`lockstep header restore NAME BACKUP`). One that was being made: "
        "`lockstep mirror remove NAME MIRROR`, and add the mirror again with --force."
    )


class HeaderDamaged(LuksError):
    """Both copies of the header are damaged, or its content makes no sense."""

    happened = "The LUKS2 header in {path} is damaged: {reason}."
    cause = "Something else was written over the start of the disk, or the disk returns wrong data."
    next_step = (
        "Put a backup of it back (`lockstep header restore NAME BACKUP`), or restore the data with the backup as the "
        "header (`lockstep restore --header BACKUP`); without a backup, make the mirror anew."
    )


class SegmentUnsupported(LuksError):
    """A sound LUKS2 header, but its data is not stored in the way that mirrors are."""

    happened = "The LUKS2 volume {path} cannot serve as a mirror: {reason}."
    cause = "It was not made by Lockstep, or another program has changed it since, for example to re-encrypt it."
    next_step = "Finish a re-encryption (`cryptsetup reencrypt`). Otherwise `cryptsetup open` it, or make a new mirror."


class WrongPassphrase(LuksError):
    """No key slot opens with this passphrase."""

    happened = "No key slot of {path} opens with this passphrase."
    cause = (
        "The passphrase is wrong (a key file counts whole, with a newline at its end), it was removed or changed, "
        "or its key slot is damaged."
    )
    next_step = "Try again, or use another passphrase of this mirror (`lockstep key list`) or a backup of its header."


class MirrorKeysDiffer(LuksError):
    """Data: path, other, volume."""

    happened = "The passphrase given for {path} does not open {other}, another mirror of {volume}."
    cause = "All mirrors of a volume are unlocked together, by one passphrase (`lockstep serve --key-file`)."
    next_step = (
        "Give the passphrase of {other}, or add this one there first: `lockstep key add {volume} --mirror {other}`."
    )


class RecoveryKeyMistyped(LuksError):
    """Data: path, reason."""

    happened = "What was given for {path} looks like a recovery key, but is not exactly one: {reason}."
    cause = "A letter was misread or left out, or a key file has a new line at its end."
    next_step = "Type it as it was printed: 8 groups of 6 small letters of bcdefghjknprstvx, with hyphens between them."


class RecoveryKeyUnknown(LuksError):
    """Data: path."""

    happened = "This recovery key is typed right, but opens no key slot of {path}."
    cause = "It belongs to another mirror, or it was removed."
    next_step = "Look for the one of this mirror, or use a passphrase; `lockstep key list` shows which slots are left."


class NoTokenUnlocks(LuksError):
    """Data: path, reason."""

    happened = "No token of this machine unlocks {path}: {reason}."
    cause = (
        "The header was enrolled on another machine or not at all, what the token needs (TPM2, key, network) is "
        "missing, or it wants a PIN."
    )
    next_step = "Give a passphrase (--key-file FILE); see `lockstep key list`, and enrol with `systemd-cryptenroll`."


class LastKeySlot(LuksError):
    """Data: path."""

    happened = "The last key slot of {path} that a passphrase or a recovery key opens is not removed."
    cause = "Without it nobody could open the mirror any more, or only the one machine whose token opens another slot."
    next_step = "Add another passphrase first (`lockstep key add`), or replace it (`lockstep key change`)."


class KeySlotUnknown(LuksError):
    """Data: path, slot."""

    happened = "{path} has no key slot {slot}."
    cause = "It was removed already, or the number is another mirror's."
    next_step = "See `lockstep key list`."


class KeySlotNotRemoved(LuksError):
    """Data: path, slot."""

    happened = "Key slot {slot} of {path} is not removed: the passphrase opens no other slot."
    cause = (
        "The passphrase is wrong, or it is the one of that slot: who removes a slot must be able to open another one."
    )
    next_step = (
        "Give the passphrase of a slot that stays; or, to remove the passphrase that is given, leave --slot out."
    )


class RekeyUnfinished(LuksError):
    """Data: path."""

    happened = "The re-keying of {path} is not finished."
    cause = "It was interrupted, or is under way. Nothing is lost: it goes on where it is, and no place is in doubt."
    next_step = (
        "Repeat the `lockstep key rekey` that began it. Where Lockstep knows nothing of the mirror any more, "
        "`lockstep restore` reads it as it is, and `cryptsetup repair` and `cryptsetup reencrypt` finish it."
    )


class MirrorBorrowed(LuksError):
    """Data: path."""

    happened = "{path} is being re-keyed, or drilled, at this moment."
    cause = "A `lockstep key rekey` or `lockstep drill` has it, or what it started goes on for a second after a kill."
    next_step = "Wait for it; a served volume takes the mirror back by itself."


class RekeyDropsKeys(LuksError):
    """Data: path, slots (those that would be lost, as a phrase)."""

    happened = "Re-keying {path} would take {slots} away."
    cause = "A new volume key is put under the passphrase that is given alone: nobody can put it under the others."
    next_step = (
        "Repeat with --drop-other-keys, and add afterwards what shall open the mirror besides (`lockstep key add`)."
    )


class KeySlotsFull(LuksError):
    """Data: path, count."""

    happened = "All {count} key slots of {path} are in use."
    cause = "Passphrases were added and never removed."
    next_step = "Remove one that nobody needs (`lockstep key list`, `lockstep key remove`), then run this again."


class BackupMissing(LuksError):
    """Data: path, reason."""

    happened = "There is no header backup in {path}: {reason}."
    cause = "The path is misspelt, or the file is something else, or is damaged."
    next_step = "Give a file that `lockstep header backup` or `cryptsetup luksHeaderBackup` made; nothing was changed."


class BackupOfAnother(LuksError):
    """Data: backup, path, reason."""

    happened = "{backup} is not a backup of the header of {path}: {reason}."
    cause = "It was made of another mirror, or before this mirror was made anew or re-keyed."
    next_step = (
        "Give the backup of this mirror (`cryptsetup luksDump` shows a backup's UUID); none is needed where the header "
        "of {path} is sound. Nothing was changed."
    )


class BackupExists(LuksError):
    """Data: path."""

    happened = "{path} exists already."
    cause = "It may be the only copy of a header that nothing can be opened without."
    next_step = "Give a file that does not exist; or, if its content may be overwritten, repeat with --force."


class BackupNotWritten(LuksError):
    """Data: path, reason."""

    happened = "The header backup {path} cannot be written: {reason}."
    cause = "The directory does not exist or is full, this account may not write to it, or the name is in use."
    next_step = "Choose another place, on another disk. With --force, an earlier one of the same mirror is overwritten."


class BackupKeysDiffer(LuksError):
    """Data: backup, path, back, gone."""

    happened = "{backup} has other key slots than {path} has now: {back} would come back, {gone} would be lost."
    cause = "Passphrases were added, removed or changed since; one that was removed would open the mirror again."
    next_step = (
        "If that is what you want, repeat with --force, and remove what shall not open it (`lockstep key remove`); "
        "otherwise nothing needs to be done: the header that is there is sound."
    )


class BackupNotComparable(LuksError):
    """Data: backup, path, reason."""

    happened = "The header in {path} cannot be read, and {backup} not be compared with it: {reason}."
    cause = "The disk fails, or did for this moment; the header may be sound, and have other passphrases."
    next_step = (
        "Run this again. If it stays so, repeat with --force; passphrases that were removed may open the mirror again "
        "then (`lockstep key list`)."
    )


class BackupKeyFormer(LuksError):
    """Data: backup, path."""

    happened = "{backup} has the volume key that {path} had before a re-keying, and the header in use cannot be read."
    cause = "It was made before `lockstep key rekey`; what has the new key by now is noise under the old one."
    next_step = (
        "Give a backup that was made since. If the disk only fails to read (`dmesg`), see to that: the header may be "
        "sound. If the target is whole, repeat with --force: the next start copies all of it."
    )


class EmptyPassphrase(LuksError):
    """An empty passphrase protects nothing."""

    happened = "The passphrase is empty."
    cause = "The key file is empty, or nothing arrived on standard input."
    next_step = "Give a passphrase of at least one byte."


class NoKeySlots(LuksError):
    """The header has no key slot left."""

    happened = "The LUKS2 header in {path} has no key slot left."
    cause = "Its keys were erased (`cryptsetup erase`), which makes the data unreadable on purpose."
    next_step = "Put a backup of it back (`lockstep header restore NAME BACKUP`); else make the mirror anew."


class TokenMalformed(LuksError):
    """The record that makes a mirror self-describing makes no sense."""

    happened = "The Lockstep token in the header of {path} is malformed: {reason}."
    cause = "Another program changed it, or it was imported by hand."
    next_step = "Look at it with `cryptsetup luksDump`. The data can still be read with `cryptsetup open`."


class TokenTooNew(LuksError):
    """The mirror was last written by a newer Lockstep."""

    happened = "The Lockstep token in the header of {path} has version {version}; this Lockstep knows up to {known}."
    cause = "A newer Lockstep has used this mirror."
    next_step = "Use that version or a later one. The data can still be read with `cryptsetup open`."


class ServiceError(LockstepError):
    """Serving, attaching, the control socket."""


class AttachNeedsRoot(NotPermitted, ServiceError):
    """Only root makes block devices."""

    happened = "Attaching and detaching a volume needs root."
    cause = "Only root may set up a block device of the operating system."
    next_step = "Run this with `sudo`, or give the volume's NBD address to a program that speaks NBD, such as QEMU."


class AttachToolMissing(ServiceError):
    """A program that attaches is not installed."""

    happened = "The program {tool} is not installed."
    cause = "It belongs to the package {package}."
    next_step = "Install {package} with the system's package manager, then run this again."


class FuseMissing(ServiceError):
    """Neither of the two ways to a block device exists here."""

    happened = "This system has neither the nbd driver nor /dev/fuse."
    cause = "The kernel modules are not installed, or this is a container without these devices."
    next_step = "Load one of them (`modprobe nbd` or `modprobe fuse`), or pass /dev/fuse to the container."


class AttachFailed(ServiceError):
    """A step of attaching failed; the steps before were undone."""

    happened = "{export} was not attached: {step} failed: {reason}."
    cause = "Most often the volume is not being served, or the server refused the connection."
    next_step = "Check with `lockstep status {export}` that it is served, then run this again."


class AttachedForAnother(ServiceError):
    """Data: export, device, user (on whose behalf it is attached, in words)."""

    happened = "{export} is attached already, as {device}, on behalf of {user}."
    cause = "A device has one user, from attaching to detaching."
    next_step = "Run `lockstep detach {export}` first."


class NotAttached(ServiceError):
    """There is no device to take away."""

    happened = "{export} is not attached."
    cause = "It was never attached, or was detached already."
    next_step = "Nothing needs to be done; `lockstep attach {export}` attaches it."


class DetachRefused(ServiceError):
    """Somebody still uses the device."""

    happened = "{device} of {export} is in use: {users}."
    cause = "Taking a device away under a file system or a program loses what it has not written yet."
    next_step = "End that use first (umount, swapoff, or stop the program), then run this again."


class DetachStuck(ServiceError):
    """A step of detaching did not end in its time."""

    happened = "{export} could not be detached: {step}: {reason}."
    cause = "The server does not answer, or a program keeps the device or the directory open."
    next_step = "See with `lockstep status {export}` whether it answers, end what keeps it open, then detach again."


class DetachUnflushed(ServiceError):
    """The device is gone, and its last writes may be as well."""

    happened = "{device} of {export} is detached, but the server did not confirm its last writes: {reason}."
    cause = "The server ended, or failed to write, while the device was still attached."
    next_step = "Serve and attach {export} again, and check the file system on it (`fsck`) before using it."


class DrillBusy(ServiceError):
    """Data: volume."""

    happened = "A drill of {volume} is under way already."
    cause = "Another `lockstep drill {volume}` runs on this state directory, perhaps started by a timer."
    next_step = "Wait for its end."


class DrillOverlayFailed(ServiceError):
    """Data: volume, overlay, reason."""

    happened = "The drill of {volume} proves nothing: its overlay {overlay} did not take what was written: {reason}."
    cause = "The file system of the state directory is full or failing; the mirror may be as good as ever."
    next_step = "Make room there for what journals and commands write, then run the drill again."


class DrillStuck(ServiceError):
    """Data: volume, directory, reason."""

    happened = "What the drill of {volume} has in {directory} could not be taken away: {reason}."
    cause = "A program has something open there, or a command of yours left it in use."
    next_step = "End that use, then run the drill again: it begins by taking away what is left."


class DrillFailed(ServiceError):
    """Data: volume, step, reason."""

    happened = "The drill of {volume} failed at {step}: {reason}."
    cause = "What the mirror holds is not whole, or a program that checks it is missing or failed."
    next_step = (
        "Open the mirror (`lockstep open --writable --attach`) and look; if it is bad, make a new mirror from the "
        "target, while there still is one."
    )


class AlreadyServed(ServiceError):
    """Data: volume."""

    happened = "The volume {volume} is being served already, or another command is at work on it."
    cause = "A `lockstep serve {volume}` runs on this state directory, or a command such as `lockstep verify {volume}`."
    next_step = "See `lockstep status {volume}`: use that server, or stop it; if there is none, wait for the command."


class VerifyIncomplete(ServiceError):
    """Data: mirror, reason, volume."""

    happened = "The mirror {mirror} was not compared to the end: {reason}."
    cause = "It is away or failed meanwhile, the target cannot be read, or somebody stopped the comparison."
    next_step = "See `lockstep status {volume}`, and run this again when the cause is gone."


class AlreadyVerifying(ServiceError):
    """Data: volume."""

    happened = "The mirrors of {volume} are being compared already."
    cause = "Somebody runs `lockstep verify {volume}`, or its weekly scrub is under way."
    next_step = "Wait until that is over; `lockstep verify {volume} --history` shows what it found."


class MemoryNotLockable(ServiceError):
    """Data: reason."""

    happened = "The server's memory cannot be locked: {reason}."
    cause = "This account may not lock that much memory (RLIMIT_MEMLOCK), or there is too little."
    next_step = "Serve as root, raise the limit (LimitMEMLOCK=infinity in the unit), or leave --mlock away."


class StillServed(ServiceError):
    """Data: volume, action."""

    happened = "The volume {volume} is being served, or another command is at work on it, and it cannot be {action}."
    cause = "A `lockstep serve {volume}` is running, or a command such as `lockstep verify {volume}`."
    next_step = "Stop it first (SIGTERM, or Ctrl-C where it runs), or wait for the command's end."


class NotServed(ServiceError):
    """Data: volume."""

    happened = "The volume {volume} is not being served."
    cause = "It was not started, or its server has ended."
    next_step = "Start it with `lockstep serve {volume}`."


class ServerSilent(ServiceError):
    """Data: volume, reason."""

    happened = "The server of {volume} runs but does not answer: {reason}."
    cause = "It is starting or stopping, or one of its disks hangs."
    next_step = "Try again in a moment; the kernel's messages (`dmesg`) tell of a hanging disk."


class SocketUnusable(ServiceError):
    """Data: path, reason."""

    happened = "The socket {path} cannot be used: {reason}."
    cause = "Its directory is missing or not writable, something else has that name, or the path is over 107 bytes."
    next_step = "Take away what nobody uses, give another one with --socket, or a shorter --state-dir."


class AddressUnusable(ServiceError):
    """Data: address, reason."""

    happened = "The server cannot listen on {address}: {reason}."
    cause = "Another program listens there, or the address is not this machine's."
    next_step = "Give another address with --tcp, or stop the other program."


class TlsDirUnusable(ServiceError):
    """Data: path, reason."""

    happened = "The TLS directory {path} cannot be used: {reason}."
    cause = "It was not made by `lockstep tls init`, files were moved or have expired, or this account may not read it."
    next_step = "Look at it with `lockstep tls show {path}`; `lockstep tls init` makes what is missing, or a new one."


class TlsAuthorityAway(ServiceError):
    """Data: path."""

    happened = "No certificate can be made: the authority's key {path} is not there."
    cause = "It was moved to a safe place, as it should be."
    next_step = "Put it back for as long as this takes. If it is lost, make a new directory, and all certificates anew."


class TlsFilesExist(ServiceError):
    """Data: path."""

    happened = "{path} exists already, and certificates and keys are never overwritten."
    cause = "They were made before; whoever uses them would lose access."
    next_step = "Use them, give another directory, or move the old files away first."


class StateDirUnusable(ServiceError):
    """Data: path, reason."""

    happened = "The state directory {path} cannot be used: {reason}."
    cause = "It belongs to another user, or its disk is full or read-only."
    next_step = "Make room there, or run this as its owner; --state-dir names another one."


class StillAttached(ServiceError):
    """Data: volume, device."""

    happened = "The volume {volume} is still attached, as {device}."
    cause = "The operating system may be using the device."
    next_step = "Run `lockstep detach {volume}` first."


class DemoFailed(ServiceError):
    """Data: step, reason."""

    happened = "The demo failed at: {step}. {reason}"
    cause = "A program that it uses failed, or this machine lacks something that it needs (root, loop devices, FUSE)."
    next_step = "Run that step by hand; if it is Lockstep's own, please report it with this message."


class StdoutFailed(ServiceError):
    """Data: reason."""

    happened = "Standard output cannot be written: {reason}."
    cause = "The file that it goes to lies on a disk that is full or failing, or it was closed."
    next_step = "Send it elsewhere, then run this again."


class Defect(LockstepError):
    """Exit code 5."""

    exit_code = 5


class Unforeseen(Defect):
    """Data: error (the kind of exception, and not what it says)."""

    happened = "Something went wrong that Lockstep did not foresee ({error})."
    cause = "This is a defect in Lockstep; what is wrong with your disks or your input, it says otherwise."
    next_step = "Report it, with the server's log, or with what this prints where -v stands before the command's name."
