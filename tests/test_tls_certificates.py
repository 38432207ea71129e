"""`lockstep tls`: what it makes, with which rights, and that it overwrites nothing and leaves no half of anything."""

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from lockstep.errors import HostInvalid, TlsAuthorityAway, TlsDirUnusable, TlsFilesExist, UserNameInvalid
from lockstep.service.certificates import client_directory, list_certificates, load_terms, make_authority, make_client
from tests.lab import Lab, run


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()}


def test_what_was_made_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files' content is of no use where their names are gone."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    tls = tmp_path / "etc" / "tls"
    make_authority(str(tls))
    assert {str(tls), str(tls.parent), str(tmp_path)} <= set(synced)
    synced.clear()
    (tls / "server-cert.pem").unlink()
    (tls / "server-key.pem").unlink()
    make_authority(str(tls))
    assert str(tls) in synced
    synced.clear()
    make_client(str(tls), "alice")
    assert {str(tls / "clients" / "alice"), str(tls / "clients"), str(tls)} <= set(synced)


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    make_authority(str(tmp_path / "tls"), ["storage.example.org", "192.0.2.7"])
    return tmp_path / "tls"


def test_the_commands(lab: Lab) -> None:
    tls = lab.home / "tls"
    said = lab.lockstep("tls", "init", tls, "--host", "storage.example.org", "--host", "2001:db8::7").ok()
    assert "ca-key.pem can let anybody in" in said
    assert names(tls) == {"ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem"}
    lab.lockstep("tls", "client", tls, "alice").ok()
    lab.lockstep("tls", "client", tls, "bob", "--out", lab.home / "bob", "--days", "7").ok()
    for directory in (tls / "clients" / "alice", lab.home / "bob"):
        assert names(directory) == {"ca-cert.pem", "client-cert.pem", "client-key.pem"}
    listed = json.loads(lab.lockstep("tls", "show", tls, "--json").ok())["certificates"]
    assert [(each["kind"], each["name"]) for each in listed][1:] == [
        ("server", "storage.example.org"),
        ("client", "alice"),
    ]
    assert "2001:db8::7" in listed[1]["hosts"]
    assert not any(each["expired"] for each in listed)
    table = lab.lockstep("tls", "show", tls).ok()
    assert "alice" in table
    assert f"{listed[0]['expires'][:10]}" in table
    (bob,) = json.loads(lab.lockstep("tls", "show", lab.home / "bob", "--json").ok())["certificates"][1:]
    expires = datetime.datetime.fromisoformat(bob["expires"])
    assert abs(expires - datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=7)).total_seconds() < 60
    lab.lockstep("tls", "init", tls).failed(1, "server-cert.pem exists already")
    lab.lockstep("tls", "client", tls, "alice").failed(1, "exists already")
    lab.lockstep("tls", "client", tls, "*").failed(2, "cannot be the name of a user")
    lab.lockstep("tls", "show", lab.home).failed(1, "it has no certificate")
    assert "init" in lab.lockstep("tls", "--help").ok()


def test_openssl_agrees(tls: Path) -> None:
    make_client(str(tls), "alice")
    ca = str(tls / "ca-cert.pem")
    server, client = str(tls / "server-cert.pem"), str(tls / "clients" / "alice" / "client-cert.pem")
    strictly = ("openssl", "verify", "-x509_strict", "-CAfile", ca, "-purpose")
    assert "OK" in run(*strictly, "sslserver", "-verify_hostname", "storage.example.org", server)
    assert "OK" in run(*strictly, "sslserver", "-verify_ip", "192.0.2.7", server)
    assert "OK" in run(*strictly, "sslclient", client)
    assert "OK" not in run(*strictly, "sslserver", client, check=False)
    assert "OK" not in run(*strictly, "sslclient", server, check=False)


def test_rights_and_lifetimes(tls: Path) -> None:
    make_client(str(tls), "alice")
    ca, server = certificate(tls / "ca-cert.pem"), certificate(tls / "server-cert.pem")
    client = certificate(tls / "clients" / "alice" / "client-cert.pem")
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    for leaf, purpose in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (client, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.digital_signature, usage.key_cert_sign) == (True, False)
        assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days == 730
    assert (ca.not_valid_after_utc - ca.not_valid_before_utc).days == 3652
    hosts = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"storage.example.org", "localhost"} <= set(hosts.get_values_for_type(x509.DNSName))
    assert {"192.0.2.7", "127.0.0.1", "::1"} <= {str(ip) for ip in hosts.get_values_for_type(x509.IPAddress)}


def test_no_certificate_outlives_its_authority(tls: Path) -> None:
    make_client(str(tls), "alice", days=36500)
    leaf = certificate(tls / "clients" / "alice" / "client-cert.pem")
    assert leaf.not_valid_after_utc == certificate(tls / "ca-cert.pem").not_valid_after_utc


def test_keys_are_their_owners_alone_from_the_first_moment(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: dict[str, int] = {}
    opened = os.open

    def open_(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        descriptor = opened(path, flags, mode, **more)
        if "-key.pem" in str(path):
            modes[path] = os.fstat(descriptor).st_mode & 0o777
        return descriptor

    previous = os.umask(0)
    try:
        monkeypatch.setattr(os, "open", open_)
        make_client(str(tls), "alice")
    finally:
        os.umask(previous)
    assert list(modes.values()) == [0o600]
    for path in (tls / "ca-key.pem", tls / "server-key.pem", tls / "clients" / "alice" / "client-key.pem"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert tls.stat().st_mode & 0o777 == 0o700


def test_a_new_server_certificate_keeps_the_authority_and_the_clients(tls: Path) -> None:
    before = (tls / "ca-cert.pem").read_bytes()
    for name in ("server-cert.pem", "server-key.pem"):
        (tls / name).rename(tls / f"{name}.old")
    made = make_authority(str(tls), ["elsewhere.example.org"])
    assert [os.path.basename(path) for path in made] == ["server-cert.pem", "server-key.pem"]
    assert (tls / "ca-cert.pem").read_bytes() == before
    load_terms(str(tls))


def test_an_authority_whose_key_is_kept_elsewhere(tls: Path) -> None:
    for name in ("ca-key.pem", "server-cert.pem", "server-key.pem"):
        (tls / name).rename(tls.parent / name)
    with pytest.raises(TlsAuthorityAway, match=r"ca-key\.pem is not there"):
        make_authority(str(tls))
    with pytest.raises(TlsAuthorityAway, match=r"ca-key\.pem is not there"):
        make_client(str(tls), "alice")
    (tls.parent / "ca-key.pem").rename(tls / "ca-key.pem")
    make_authority(str(tls))
    make_client(str(tls), "alice")


@pytest.mark.parametrize("name", ["ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem"])
def test_one_file_that_exists_leaves_everything_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / name).write_text("mine")
    with pytest.raises((TlsFilesExist, TlsAuthorityAway)):
        make_authority(str(tmp_path / "tls"))
    assert names(tmp_path / "tls") == {name}
    assert (tmp_path / "tls" / name).read_text() == "mine"
    assert names(tmp_path) == {"tls"}


def test_a_directory_with_other_files_gets_all_or_nothing(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tls.parent / "out"
    out.mkdir()
    (out / "README").write_text("mine")
    linked = os.link

    def fails_at_the_third(source: str, goal: str) -> None:
        if goal.endswith("client-key.pem"):
            raise OSError(28, "No space left on device")
        linked(source, goal)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fails_at_the_third)
        with pytest.raises(TlsDirUnusable):
            make_client(str(tls), "alice", str(out))
    assert names(out) == {"README"}
    make_client(str(tls), "alice", str(out))
    assert names(out) == {"README", "ca-cert.pem", "client-cert.pem", "client-key.pem"}
    assert names(tls.parent) == {"tls", "out"}


def test_a_write_that_fails_leaves_nothing(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(TlsDirUnusable):
        make_client(str(tls), "alice")
    assert names(tls) == {"ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", "clients"}
    assert names(tls / "clients") == set()


@pytest.mark.parametrize(
    "user", ["alice", "..", ".", "a/b", "../../etc", "alice@example.org", "größe", "a b", "ü" * 32]
)
def test_whatever_the_name_it_is_one_directory_below_clients(tls: Path, user: str) -> None:
    path = Path(client_directory(str(tls), user))
    assert path.parent == tls / "clients"
    assert path.name not in (".", "..")
    make_client(str(tls), user)
    assert [each.name for each in list_certificates(str(tls)) if each.kind == "client"] == [user]


@pytest.mark.parametrize("user", ["", "*", " alice", "a" * 65, "ü" * 33, "al\nice", "al\0ice", "\u202ealice"])
def test_what_cannot_be_a_user(tls: Path, user: str) -> None:
    with pytest.raises(UserNameInvalid):
        make_client(str(tls), user)


def test_a_host_whose_name_is_long(tmp_path: Path) -> None:
    host = f"{'ü' * 30}.{'a' * 60}.example.org"
    make_authority(str(tmp_path / "tls"), [host])
    (server,) = (each for each in list_certificates(str(tmp_path / "tls")) if each.kind == "server")
    assert host.startswith(server.name)
    assert host.encode("idna").decode() in server.hosts


@pytest.mark.parametrize("host", ["", "a b", "host:10809", "a/b", "-\n", "x" * 300])
def test_what_cannot_be_a_host(tmp_path: Path, host: str) -> None:
    with pytest.raises(HostInvalid):
        make_authority(str(tmp_path / "tls"), [host])
    assert names(tmp_path) == set()


def test_directories_that_cannot_be_used(tls: Path, tmp_path: Path) -> None:
    with pytest.raises(TlsDirUnusable):
        make_client(str(tmp_path / "nothing"), "alice")
    other = tmp_path / "other"
    make_authority(str(other))
    shutil.copy(other / "ca-key.pem", tls / "ca-key.pem")
    with pytest.raises(TlsDirUnusable, match="not the key of"):
        make_client(str(tls), "alice")
    shutil.copy(other / "server-key.pem", tls / "server-key.pem")
    with pytest.raises(TlsDirUnusable, match="key values mismatch"):
        load_terms(str(tls))
    run(
        "openssl",
        "ec",
        "-aes128",
        "-passout",
        "pass:x",
        "-in",
        f"{other}/server-key.pem",
        "-out",
        f"{tls}/server-key.pem",
    )
    with pytest.raises(TlsDirUnusable):
        load_terms(str(tls))
    (tls / "server-key.pem").write_text("no key")
    with pytest.raises(TlsDirUnusable):
        load_terms(str(tls))
    (tls / "server-key.pem").unlink()
    with pytest.raises(TlsDirUnusable, match=r"server-key\.pem is missing"):
        load_terms(str(tls))
    (tls / "server-cert.pem").write_text("no certificate")
    with pytest.raises(TlsDirUnusable):
        list_certificates(str(tls))
