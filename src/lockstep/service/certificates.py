"""The certificates of TLS: a certificate authority, the server's certificate, and one for each client.

    DIR/ca-cert.pem           the authority; whoever it has signed for is believed
    DIR/ca-key.pem            its key: needed to sign, never to serve; keep it elsewhere if you can
    DIR/server-cert.pem       what the server shows
    DIR/server-key.pem
    DIR/clients/NAME/         what one client needs: client-cert.pem, client-key.pem, ca-cert.pem

These are the names that QEMU's `tls-creds-x509` and libnbd's `tls-certificates` expect. All keys are ECDSA on P-256,
which OpenSSL and GnuTLS both take.

Rules. A key file is readable by its owner alone from its first moment on. Files appear all together and complete, or
not at all: they are written in a directory beside, which then gets its name; where there are other files already,
each is linked into their directory, which cannot replace anything. A lifetime begins an hour early, for clocks that
differ, and none outlives its authority.
"""

import contextlib
import datetime
import ipaddress
import os
import re
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lockstep.errors import HostInvalid, TlsAuthorityAway, TlsDirUnusable, TlsFilesExist, UserNameInvalid
from lockstep.nbd.identity import is_user_name
from lockstep.nbd.tls import server_context
from lockstep.volume.files import sync_directory

CA_DAYS: Final = 3652
LEAF_DAYS: Final = 730
WARN_DAYS: Final = 30

CA_CERT: Final = "ca-cert.pem"
CA_KEY: Final = "ca-key.pem"
SERVER_CERT: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"
CLIENT_CERT: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"

_MOST_NAME_BYTES: Final = 64  # of a common name, as the library counts
_SKEW: Final = datetime.timedelta(hours=1)
_HOST_NAME: Final = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ALWAYS: Final = ("localhost", "127.0.0.1", "::1")

# What it means that a certificate expires, and what to do, by its kind.
_EXPIRY: Final = {
    "server": "clients then refuse this server. Move it and its key away, make new ones with `lockstep tls init`",
    "ca": "nobody gets in then. Make a new TLS directory with `lockstep tls init`, new certificates for all clients",
}


@dataclass(frozen=True)
class Certificate:
    """One certificate of a TLS directory, for people."""

    path: str
    kind: str  # ca, server or client
    name: str
    hosts: tuple[str, ...]
    expires: datetime.datetime

    def days_left(self) -> int:
        """Whole days until it expires; negative when it has."""
        return (self.expires - _now()).days


@dataclass(frozen=True)
class Terms:
    """On which clients are let in over TCP, and the certificates that this rests on."""

    context: ssl.SSLContext
    certificates: tuple[Certificate, ...]

    def warnings(self) -> list[str]:
        """Return a sentence for each certificate that expires within WARN_DAYS."""
        return [
            f"{each.path} {'has expired' if each.days_left() < 0 else 'expires'} on {each.expires:%Y-%m-%d}; "
            f"{_EXPIRY[each.kind]}, and restart the server"
            for each in self.certificates
            if each.days_left() < WARN_DAYS
        ]


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


# --- making -----------------------------------------------------------------------------------------------


def make_authority(directory: str, hosts: Sequence[str] = (), days: int = LEAF_DAYS) -> list[str]:
    """Make the authority and the server's certificate; return the files made.

    Where the directory has an authority already, and no server certificate, that alone is made: so a server gets
    a new one, and the clients keep theirs. `hosts` are the names and addresses by which clients reach the server,
    besides this machine's own name and localhost. Raises HostInvalid, TlsFilesExist, TlsDirUnusable, TlsAuthorityAway.
    """
    alternatives = [_general_name(host) for host in dict.fromkeys([*hosts, socket.gethostname(), *_ALWAYS])]
    _require_absent(directory, SERVER_CERT, SERVER_KEY)
    files: dict[str, bytes] = {}
    if os.path.exists(f"{directory}/{CA_CERT}"):
        authority = _load_authority(directory)
    else:
        _require_absent(directory, CA_CERT, CA_KEY)
        authority = _new_authority()
        files |= {CA_CERT: _pem(authority.certificate), CA_KEY: _pem_of_key(authority.key)}
    name = _fitting(hosts[0] if hosts else socket.gethostname())
    certificate, key = _signed(authority, name, ExtendedKeyUsageOID.SERVER_AUTH, days, alternatives)
    files |= {SERVER_CERT: _pem(certificate), SERVER_KEY: _pem_of_key(key)}
    return _publish(directory, files)


def make_client(
    directory: str, user: str, out: str | None = None, days: int = LEAF_DAYS, began: datetime.datetime | None = None
) -> list[str]:
    """Make what the client of `user` needs, in `out`, by default in the directory's clients/; return the files made.

    `began` is when its lifetime begins, by default now. Raises UserNameInvalid, TlsFilesExist, TlsDirUnusable,
    TlsAuthorityAway.
    """
    if not is_user_name(user) or len(user.encode()) > _MOST_NAME_BYTES:
        raise UserNameInvalid(user=user)
    authority = _load_authority(directory)
    out = out or client_directory(directory, user)
    _require_absent(out, CA_CERT, CLIENT_CERT, CLIENT_KEY)
    certificate, key = _signed(authority, user, ExtendedKeyUsageOID.CLIENT_AUTH, days, began=began)
    files = {CA_CERT: _pem(authority.certificate), CLIENT_CERT: _pem(certificate), CLIENT_KEY: _pem_of_key(key)}
    return _publish(out, files)


def client_directory(directory: str, user: str) -> str:
    """Return where the files of a client go by default; whatever the name, it is one directory below clients/."""
    name = quote(user, safe="@ +")
    return f"{directory}/clients/{f'%2E{name[1:]}' if name.startswith('.') else name}"


# --- looking and using ------------------------------------------------------------------------------------


def list_certificates(directory: str) -> list[Certificate]:
    """Return the certificates of a TLS directory: authority, server, clients. Raises TlsDirUnusable."""
    own = [f"{directory}/{name}" for name in (CA_CERT, SERVER_CERT, CLIENT_CERT)]
    clients = sorted(map(str, Path(directory).glob(f"clients/*/{CLIENT_CERT}")))
    found = [_described(path) for path in (*own, *clients) if os.path.exists(path)]
    if not found:
        raise TlsDirUnusable(path=directory, reason="it has no certificate")
    return found


def load_terms(directory: str) -> Terms:
    """Return what the server needs to let clients in; the authority's key is not read. Raises TlsDirUnusable."""
    paths = [f"{directory}/{name}" for name in (SERVER_CERT, SERVER_KEY, CA_CERT)]
    for path in paths:
        if not os.access(path, os.R_OK):
            raise TlsDirUnusable(path=directory, reason=f"{os.path.basename(path)} is missing or cannot be read")
    try:
        context = server_context(*paths)
    except OSError as error:
        raise TlsDirUnusable(path=directory, reason=_plain(error)) from error
    return Terms(context, (_described(paths[0]), _described(paths[2])))


# --- certificates -----------------------------------------------------------------------------------------


def _new_authority() -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    now = _now()
    name = _name(_fitting(f"Lockstep CA of {socket.gethostname()}"))
    usage = _key_usage(signs_certificates=True)
    builder = (
        _builder(name, name, key, now, now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return _Authority(builder.sign(key, hashes.SHA256()), key)


def _signed(
    authority: _Authority,
    name: str,
    purpose: x509.ObjectIdentifier,
    days: int,
    alternatives: Sequence[x509.GeneralName] = (),
    began: datetime.datetime | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    began = began or _now()
    ends = min(began + datetime.timedelta(days=days), authority.certificate.not_valid_after_utc)
    issuer = authority.certificate
    builder = (
        _builder(_name(name), issuer.subject, key, began, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(authority.key, hashes.SHA256()), key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    began: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began - _SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _fitting(text: str) -> str:
    """As much of it as a common name has room for."""
    return text.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        encoded = host.encode("idna").decode()
    except UnicodeError as error:
        raise HostInvalid(host=host) from error
    if not _HOST_NAME.fullmatch(encoded):
        raise HostInvalid(host=host)
    return x509.DNSName(encoded)


def _load_authority(directory: str) -> _Authority:
    if os.path.exists(f"{directory}/{CA_CERT}") and not os.path.lexists(f"{directory}/{CA_KEY}"):
        raise TlsAuthorityAway(path=f"{directory}/{CA_KEY}")
    try:
        certificate = x509.load_pem_x509_certificate(Path(directory, CA_CERT).read_bytes())
        key = serialization.load_pem_private_key(Path(directory, CA_KEY).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise TlsDirUnusable(path=directory, reason=_plain(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise TlsDirUnusable(path=directory, reason=f"{CA_KEY} is not the key of {CA_CERT}")
    if certificate.not_valid_after_utc < _now():
        raise TlsDirUnusable(path=directory, reason=f"{CA_CERT} has expired")
    return _Authority(certificate, key)


def _described(path: str) -> Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise TlsDirUnusable(path=os.path.dirname(path), reason=f"{path}: {_plain(error)}") from error
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    hosts: tuple[str, ...] = ()
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        hosts = tuple(str(each.value) for each in extension.value)
    kind = os.path.basename(path).partition("-")[0]
    return Certificate(path, kind, str(names[0].value) if names else "", hosts, certificate.not_valid_after_utc)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


# --- files ------------------------------------------------------------------------------------------------


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _require_absent(directory: str, *names: str) -> None:
    for name in names:
        if os.path.lexists(f"{directory}/{name}"):
            raise TlsFilesExist(path=f"{directory}/{name}")


def _publish(directory: str, files: dict[str, bytes]) -> list[str]:
    """Make all of these files, and their directory if need be, or nothing. Raises TlsFilesExist, TlsDirUnusable."""
    directory = os.path.realpath(directory)
    try:
        made = [each for each in (Path(directory), *Path(directory).parents) if not each.exists()]
        os.makedirs(os.path.dirname(directory), mode=0o700, exist_ok=True)
        with _staged(os.path.dirname(directory), files) as staged:
            try:
                os.rename(staged, directory)  # replaces an empty directory at most
            except OSError:
                _link_all(staged, directory, files)
            for path in (f"{directory}/{CA_CERT}", *map(str, made)):  # their names are to survive a power cut as well
                sync_directory(path)
    except FileExistsError as error:
        raise TlsFilesExist(path=error.filename2 or directory) from error
    except OSError as error:
        raise TlsDirUnusable(path=directory, reason=error.strerror) from error
    return [f"{directory}/{name}" for name in files]


@contextlib.contextmanager
def _staged(parent: str, files: dict[str, bytes]) -> Iterator[str]:
    """A directory with these files, all of them on the disk; what is left of it at the end is removed."""
    staged = tempfile.mkdtemp(prefix=".lockstep-tls-", dir=parent)
    try:
        for name, content in files.items():
            mode = 0o600 if name.endswith("-key.pem") else 0o644
            descriptor = os.open(f"{staged}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _link_all(staged: str, directory: str, names: dict[str, bytes]) -> None:
    """Give the files their names in a directory that exists; a name that is taken undoes those before."""
    linked: list[str] = []
    try:
        for name in names:
            os.link(f"{staged}/{name}", f"{directory}/{name}")
            linked.append(f"{directory}/{name}")
    except BaseException:
        for path in linked:
            os.unlink(path)
        raise


def _plain(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "its files are not understood").lower().replace("_", " ")
    if isinstance(error, OSError):
        return f"{os.path.basename(error.filename or '')}: {error.strerror}".removeprefix(": ")
    return "its files are not certificates and keys in PEM"
