"""TLS against the real server: who is let in and who is not, other people's clients, and clients that misbehave inside.

The certificates are those that `lockstep tls` makes. The referee's TLS is OpenSSL's; qemu-io, nbdinfo and nbdcopy bring
GnuTLS.
"""

import asyncio
import contextlib
import datetime
import json
import os
import pwd
import random
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.bodies import Choices, FakeTransport, MemoryExport

from lockstep.nbd.connection import Connection
from lockstep.nbd.identity import common_name
from lockstep.nbd.server import NbdServer
from lockstep.nbd.tls import TlsTransport
from lockstep.service import certificates
from tests import nbd_client as nbd
from tests.forks import ForkLab
from tests.lab import MIB, Lab, Served, Volume, run, wait_until
from tests.nbd_client import Client, TlsSocket, pack_info, pack_option, pack_request

SIZE = 34 * MIB + 512
LARGEST = 32 * MIB
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


class Site:
    """A server with TLS, and its certificates."""

    def __init__(self, served: Served, volume: Volume, tls: Path) -> None:
        self.served = served
        self.volume = volume
        self.tls = tls
        self.uri = served.next_uri()
        self.port = int(self.uri.rpartition(":")[2].partition("/")[0])
        self.alice = tls / "clients" / "alice"

    def knock(self) -> Client:
        """Connect and say nothing."""
        return Client(("127.0.0.1", self.port))

    def client(self) -> Client:
        return self.knock().start_tls(self.context()).go("vol")

    def context(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
        """What alice brings, or whoever else."""
        context = ssl.create_default_context(cafile=str(self.tls / "ca-cert.pem"))
        context.load_cert_chain(certificate or self.alice / "client-cert.pem", key or self.alice / "client-key.pem")
        return context

    def uri_of(self, directory: Path) -> str:
        return f"{self.uri}?tls-certificates={directory}"

    def users(self) -> list[str]:
        return [client["user"] for client in self.served.status()["clients"]]

    def log(self) -> str:
        return self.served.log.read_text()

    def awaits_line(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, self.log()) is not None, f"the log to say {pattern}")

    def is_well(self) -> None:
        with self.client() as client:
            data = os.urandom(8192)
            client.write(SIZE - 9000, data, nbd.FUA)
            assert client.read(SIZE - 9000, 8192) == data
            client.disconnect()
        assert "Traceback" not in self.log()
        assert "did not expect" not in self.log()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    lab = ForkLab(tmp_path_factory.mktemp("tls"))
    tls = lab.home / "certificates"
    lab.lockstep("tls", "init", tls).ok()
    lab.lockstep("tls", "client", tls, "alice").ok()
    shutil.move(tls / "ca-key.pem", lab.home / "ca-key.pem")  # who serves does not need it
    volume = lab.volume("vol", SIZE, content=random.Random(1).randbytes(4 * MIB))
    volume.grant("*")
    with volume.served("--tcp", "127.0.0.1:0", "--tls-dir", tls) as served:
        yield Site(served, volume, tls)
    volume.assert_equal_disks()


@pytest.fixture
def site(running: Site) -> Iterator[Site]:
    yield running
    running.is_well()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Another authority, with a client of the same name."""
    certificates.make_authority(str(tmp_path / "foreign"))
    certificates.make_client(str(tmp_path / "foreign"), "alice")
    return tmp_path / "foreign"


@pytest.fixture
def authority(site: Site, tmp_path: Path) -> str:
    """The server's own authority, with its key."""
    directory = tmp_path / "authority"
    directory.mkdir()
    shutil.copy(site.tls / "ca-cert.pem", directory)
    shutil.copy(site.volume.lab.home / "ca-key.pem", directory)
    return str(directory)


# --- other people's clients -------------------------------------------------------------------------------


def test_the_uri_says_tls(site: Site) -> None:
    assert site.uri == f"nbds://127.0.0.1:{site.port}/vol"


def test_nbdinfo(site: Site) -> None:
    info = json.loads(run("nbdinfo", "--json", site.uri_of(site.alice)))
    assert info["TLS"] is True
    assert info["exports"][0]["export-size"] == SIZE
    listed = json.loads(run("nbdinfo", "--list", "--json", site.uri_of(site.alice)))
    assert [export["export-name"] for export in listed["exports"]] == ["vol"]


def test_qemu_io(site: Site) -> None:
    credentials = f"tls-creds-x509,id=tls,dir={site.alice},endpoint=client"
    disk = f"driver=nbd,host=127.0.0.1,port={site.port},export=vol,tls-creds=tls"
    commands = ("write -P 7 1M 20M", "write -f -P 9 4097 513", "flush", "read -P 7 1M 20M", "read -P 9 4097 513")
    options = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "--object", credentials, "--image-opts", disk, *options)
    assert "failed" not in said
    assert "error" not in said


def test_nbd_client(site: Site) -> None:
    files = {"-certfile": "client-cert.pem", "-keyfile": "client-key.pem", "-cacertfile": "ca-cert.pem"}
    options = [word for option, name in files.items() for word in (option, str(site.alice / name))]
    assert "vol" in run("nbd-client", "-l", "localhost", str(site.port), *options)


def test_nbdcopy_there_and_back_leaves_equal_disks(site: Site, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(random.Random(2).randbytes(SIZE))
    run("nbdcopy", "--flush", str(source), site.uri_of(site.alice))
    run("nbdcopy", site.uri_of(site.alice), str(copy))
    assert copy.read_bytes() == source.read_bytes() == site.volume.target.read_bytes()
    site.volume.assert_equal_disks()


@pytest.mark.skipif(os.geteuid() != 0, reason="as root, libnbd looks for fio's certificates in /etc only")
def test_fio_verifies_what_it_wrote(site: Site) -> None:
    account = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(prefix="lockstep-fio-") as home:
        shutil.copytree(site.alice, f"{home}/.pki/libnbd")
        run("chown", "-R", "nobody:", home)
        job = [
            "--name=job",
            "--ioengine=nbd",
            f"--uri={site.uri}",
            "--rw=randrw",
            "--bsrange=512-300k",
            "--bs_unaligned",
        ]
        load = ["--size=32m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=1"]
        switch = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        run("env", "-C", home, f"HOME={home}", *switch, "fio", *job, *load)
    site.volume.assert_equal_disks()


def test_the_user_is_the_name_in_the_certificate(site: Site, authority: str, tmp_path: Path) -> None:
    name = "Zoë O'Brien <zoe@example.org>"
    made = tmp_path / "zoe"
    certificates.make_client(authority, name, str(made))
    with site.knock().start_tls(site.context(made / "client-cert.pem", made / "client-key.pem")).go("vol"):
        assert name in site.users()
        assert f"{name} connected (tls 127.0.0.1:" in site.log()


def test_a_certificate_that_does_not_say_for_whom_is_good_for_a_client(
    site: Site, authority: str, tmp_path: Path
) -> None:
    """RFC 5280, 4.2.1.12: without extendedKeyUsage it may be used for anything. Ours always say; others' may not."""
    key, asked, made = tmp_path / "key.pem", tmp_path / "asked.pem", tmp_path / "made.pem"
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", str(key))
    run("openssl", "req", *new, "-subj", "/CN=bob", "-out", str(asked))
    signer = ("-CA", f"{authority}/ca-cert.pem", "-CAkey", f"{authority}/ca-key.pem")
    run("openssl", "x509", "-req", "-in", str(asked), *signer, "-days", "2", "-out", str(made))
    assert "Key Usage" not in run("openssl", "x509", "-in", str(made), "-noout", "-text")
    with site.knock().start_tls(site.context(made, key)).go("vol"):
        assert "bob" in site.users()


# --- who is not let in ------------------------------------------------------------------------------------


def refused(site: Site, context: ssl.SSLContext, reason: str) -> None:
    """Refused in the TLS handshake, with a line that says who and why, while another client goes on."""
    with site.client() as other, site.knock() as client:
        port = client.plain.getsockname()[1]
        # With TLS 1.3 the client learns of it by the first thing that it receives.
        with pytest.raises((ssl.SSLError, EOFError, OSError)):
            client.start_tls(context).go("vol")
        site.awaits_line(rf"WARNING .* \(tls 127\.0\.0\.1:{port}\): {reason}")
        other.write(0, b"as ever")
        assert other.read(0, 7) == b"as ever"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_certificate_is_refused(site: Site, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(site.tls / "ca-cert.pem"))
    context.maximum_version = version
    refused(site, context, "it has no certificate")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_of_another_authority_is_refused(site: Site, foreign: Path, version: ssl.TLSVersion) -> None:
    theirs = foreign / "clients" / "alice"
    context = site.context(theirs / "client-cert.pem", theirs / "client-key.pem")
    context.maximum_version = version
    refused(site, context, "its certificate is not signed by the certificate authority of the TLS directory")


def test_an_expired_certificate_is_refused(site: Site, authority: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    certificates.make_client(authority, "alice", str(old), days=30, began=LONG_AGO)
    refused(site, site.context(old / "client-cert.pem", old / "client-key.pem"), "its certificate has expired")


def test_a_certificate_that_is_not_valid_yet_is_refused(site: Site, authority: str, tmp_path: Path) -> None:
    began = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)
    certificates.make_client(authority, "alice", str(tmp_path / "new"), began=began)
    context = site.context(tmp_path / "new" / "client-cert.pem", tmp_path / "new" / "client-key.pem")
    refused(site, context, "its certificate is not valid yet")


def test_a_servers_certificate_is_refused_as_a_clients(site: Site) -> None:
    context = site.context(site.tls / "server-cert.pem", site.tls / "server-key.pem")
    refused(site, context, "its certificate is not one for clients")


def test_nbdinfo_and_qemu_are_refused_without_the_right_certificate(site: Site, foreign: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(foreign / "clients" / "alice", mixed)
    shutil.copy(site.tls / "ca-cert.pem", mixed)  # it believes our server, and is not believed
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(site.tls / "ca-cert.pem", bare)
    for directory in (mixed, bare):
        done = subprocess.run(["nbdinfo", site.uri_of(directory)], capture_output=True, check=False, timeout=30)
        assert done.returncode != 0
        credentials = f"tls-creds-x509,id=tls,dir={directory},endpoint=client"
        disk = f"driver=nbd,host=127.0.0.1,port={site.port},export=vol,tls-creds=tls"
        said = run("qemu-io", "--object", credentials, "--image-opts", disk, "-c", "read 0 512", check=False)
        assert "512/512" not in said
    site.awaits_line("it has no certificate")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
def test_old_tls_is_refused(site: Site) -> None:
    context = site.context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    refused(site, context, r"TLS failed \(unsupported protocol\)")


def test_garbage_instead_of_tls_is_refused(site: Site) -> None:
    with site.knock() as client:
        client.greet()
        assert client.option(nbd.OPT_STARTTLS) == [(nbd.REP_ACK, b"")]
        client.send(pack_option(nbd.OPT_GO, pack_info(b"vol")) * 100)
        client.assert_closed()
        site.awaits_line(r"\(tls 127\.0\.0\.1:\d+\): TLS failed \(")


@pytest.mark.parametrize(
    ("subject", "user"),
    [
        ([("commonName", "alice")], "alice"),
        ([], None),
        ([("organizationName", "alice")], None),
        ([("commonName", "alice"), ("commonName", "bob")], None),
        ([("commonName", "*")], None),
        ([("commonName", "al\nice")], None),
        ([("commonName", "al\0ice")], None),
        ([("commonName", "alice ")], None),
        ([("commonName", "a" * 65)], None),
        ([("commonName", "")], None),
    ],
)
def test_the_name_of_a_certificate(subject: list[tuple[str, str]], user: str | None) -> None:
    assert common_name({"subject": tuple((pair,) for pair in subject)}) == user


# --- before TLS -------------------------------------------------------------------------------------------


def test_a_plain_client_learns_that_tls_is_required(site: Site) -> None:
    with site.knock() as client:
        client.greet()
        for option, data in ((nbd.OPT_LIST, b""), (nbd.OPT_GO, pack_info(b"vol")), (nbd.OPT_STRUCTURED_REPLY, b"")):
            ((kind, _),) = client.option(option, data)
            assert kind == nbd.REP_ERR_TLS_REQD
        ((kind, _),) = client.option(nbd.OPT_STARTTLS, b"x")
        assert kind == nbd.REP_ERR_INVALID
        assert client.option(nbd.OPT_ABORT) == [(nbd.REP_ACK, b"")]
        assert client.assert_closed() == b""
    with site.knock() as client:
        client.greet()
        client.send(pack_option(nbd.OPT_EXPORT_NAME, b"vol"))
        assert client.assert_closed() == b""
    done = subprocess.run(["nbdinfo", site.uri.replace("nbds", "nbd")], capture_output=True, check=False, timeout=30)
    assert done.returncode != 0


def test_what_follows_starttls_in_plain_text_is_never_carried_out(site: Site) -> None:
    """Injected by somebody in the middle, it must not be taken as if the client had said it inside TLS."""
    injected = pack_option(nbd.OPT_SET_META_CONTEXT) + pack_option(nbd.OPT_GO, pack_info(b"vol"))
    for extra in (injected, b"I", b"\x16\x03\x01"):
        with site.knock() as client:
            client.greet()
            client.send(pack_option(nbd.OPT_STARTTLS) + extra)
            rest = client.assert_closed()
            assert len(rest) <= 20, "nothing but the ACK"
    site.awaits_line("it sent more in plain text after STARTTLS")


def test_inside_tls_the_handshake_starts_afresh(site: Site) -> None:
    with site.knock().start_tls(site.context()) as client:
        ((kind, _),) = client.option(nbd.OPT_STARTTLS)
        assert kind == nbd.REP_ERR_INVALID
        ((kind, _),) = client.option(nbd.OPT_GO, pack_info(b"vol@bob"))
        assert kind == nbd.REP_ERR_POLICY
        client.go("vol")
        assert len(client.read(0, 512)) == 512


def test_the_unix_socket_has_no_tls_and_needs_none(site: Site) -> None:
    with Client(site.served.socket) as client:
        client.greet()
        ((kind, _),) = client.option(nbd.OPT_STARTTLS)
        assert kind == nbd.REP_ERR_POLICY
    with Client(site.served.socket).go("vol") as client:
        assert client.size == SIZE


# --- inside TLS -------------------------------------------------------------------------------------------


def test_the_largest_requests(site: Site) -> None:
    data = random.Random(3).randbytes(LARGEST)
    with site.client() as client:
        client.write(5, data)
        assert client.read(5, LARGEST) == data
        assert client.call(nbd.WRITE, 5, payload=bytes(LARGEST + 1)).error == nbd.EINVAL
        assert client.call(nbd.READ, 5, LARGEST + 1).error == nbd.EOVERFLOW
        assert client.read(5, 512) == data[:512]


def test_requests_of_every_size_in_pipelines(site: Site) -> None:
    dice = random.Random(4)
    model = bytearray(site.volume.target.read_bytes())
    with site.client() as client:
        for _ in range(12):
            writes, place = [], 0
            for _ in range(40):
                length = dice.choice([1, 512, 4096, 16_384, 16_385, 70_000, 300_000])
                data = dice.randbytes(length)
                place += dice.choice([0, 1, 511])
                writes.append(client.request(nbd.WRITE, place, payload=data))
                model[place : place + length] = data
                place += length
            client.send(b"".join(each.wire() for each in writes))
            assert not any(reply.error for reply in client.replies().values())
            assert client.read(0, place) == model[:place]
    assert site.volume.target.read_bytes() == model


@pytest.mark.parametrize("how", ["close_notify", "tcp"])
def test_a_half_close_is_answered_first(site: Site, how: str) -> None:
    with site.client() as client:
        requests = [client.request(nbd.READ, n * 100_000, 100_000, nbd.FUA) for n in range(40)]
        requests += [client.request(nbd.WRITE, n * 512, payload=b"h" * 512, flags=nbd.FUA) for n in range(40)]
        client.send(b"".join(each.wire() for each in requests))
        client.tls.end() if how == "close_notify" else client.plain.shutdown(socket.SHUT_WR)
        replies = client.replies()
        assert len(replies) == 80
        assert not any(reply.error for reply in replies.values())
        assert client.assert_closed() == b""


def test_a_half_close_that_comes_with_more_requests_than_are_taken_at_once_is_answered_first(site: Site) -> None:
    with site.client() as client:
        requests = [client.request(nbd.FLUSH) for _ in range(300)]
        client.tls.hold_back(b"".join(each.wire() for each in requests))
        client.tls.end()
        replies = client.replies()
        assert [replies[each.cookie].error for each in requests] == [0] * 300
        assert client.assert_closed() == b""


def test_a_connection_that_is_cut_within_a_write_changes_nothing(site: Site) -> None:
    before = site.volume.target.read_bytes()
    for length, sent in ((4096, 4000), (LARGEST, 20 * MIB)):
        client = site.client()
        client.send(pack_request(nbd.WRITE, 1, 0, length) + b"\xee" * sent)
        client.close()
    wait_until(lambda: not site.users(), "the server to notice")
    assert site.volume.target.read_bytes() == before


def test_ciphertext_that_was_altered_ends_the_connection(site: Site) -> None:
    before = site.volume.target.read_bytes()
    with site.client() as client:
        client.plain.sendall(b"\x17\x03\x03\x00\x40" + bytes(0x40))
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            client.assert_closed()
    site.awaits_line(r"alice \(tls 127\.0\.0\.1:\d+\): TLS failed \(.*mac")
    assert site.volume.target.read_bytes() == before


def test_a_client_that_only_asks_for_new_keys_costs_no_memory(site: Site) -> None:
    """OpenSSL has an answer ready for each, which leaves with the next reply: such a client gets none."""
    with site.client() as client:
        client.tls.ask_for_new_keys(100)
        assert len(client.read(0, 512)) == 512
        with pytest.raises(ConnectionError):
            client.tls.ask_for_new_keys(100_000)
    site.awaits_line(r"alice \(tls 127\.0\.0\.1:\d+\): it asks for new TLS keys again and again")


def test_clients_that_take_no_replies_cost_no_more_than_without_tls(site: Site) -> None:
    """12 times 128 MiB are asked for; what the server holds of it is what the pool allows."""
    before = site.served.resident_bytes()
    with contextlib.ExitStack() as clients:
        for _ in range(12):
            client = clients.enter_context(site.client())
            client.send(b"".join(pack_request(nbd.READ, n, 0, LARGEST) for n in range(4)))
        with site.client() as other:
            for _ in range(300):  # what would grow, grows while others are served
                other.write(0, b"w" * 4096, nbd.FUA)
                grown = site.served.resident_bytes() - before
    assert grown < 330 * MIB, f"{grown >> 20} MiB"


def test_a_slow_reader_gets_everything(site: Site) -> None:
    expected = site.volume.target.read_bytes()[:MIB]
    with site.client() as client:
        requests = [client.request(nbd.READ, 0, MIB) for _ in range(30)]
        client.send(b"".join(each.wire() for each in requests))
        with site.client() as other:
            for _ in range(20):
                other.read(0, 4096)
        replies = client.replies()
        assert all(replies[each.cookie].data == expected for each in requests)


def test_fifty_clients_at_once(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(site.client()) for _ in range(50)]
        writes = [c.request(nbd.WRITE, n * 65_536, payload=bytes([n]) * 65_536) for n, c in enumerate(clients)]
        for client, request in zip(clients, writes, strict=True):
            client.send(request.wire())
        for client, request in zip(clients, writes, strict=True):
            assert client.reply(request).error == 0
        assert site.users() == ["alice"] * 50
        for n, client in enumerate(clients):
            assert client.read((n + 1) % 50 * 65_536, 65_536) == bytes([(n + 1) % 50]) * 65_536
    wait_until(lambda: not site.users(), "the server to notice that all are gone")


def test_bytes_one_by_one(site: Site) -> None:
    """Of each TLS record one byte at a time: whatever waits for a whole one, waits."""
    pieces: list[bytes] = []
    with site.client() as client:
        original = client.tls._socket

        class Dripping:
            def sendall(self, data: bytes) -> None:
                pieces.extend(bytes([each]) for each in data)
                for each in data:
                    original.sendall(bytes([each]))

            def __getattr__(self, name: str) -> object:
                return getattr(original, name)

        client.plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.tls._socket = Dripping()  # type: ignore[assignment]
        client.write(77, b"drip" * 200)
        assert client.read(77, 800) == b"drip" * 200
        client.tls._socket = original
    assert len(pieces) > 800


def test_resumed_sessions_show_their_certificate_again(site: Site) -> None:
    """There are none: nobody gets in by a session whose certificate was valid once."""
    context = site.context()
    with site.knock() as client:
        client.start_tls(context)
        assert isinstance(client.tls, TlsSocket)
        session = client.tls._tls.session
        assert session is None or not session.has_ticket


def test_connections_that_come_and_go_leave_no_memory_behind(site: Site) -> None:
    def come_and_go() -> None:
        with site.knock() as client:
            client.greet()
            client.send(pack_option(77, bytes(60_000)) * 4)  # so that memory is not just claimed, but used
            for _ in range(4):
                client.option_reply(77)
            client.option(nbd.OPT_STARTTLS)
            client.send(b"\x16\x03\x01\x40\x00" + bytes(10_000))

    for _ in range(100):
        come_and_go()
    before = site.served.resident_bytes()
    for _ in range(500):
        come_and_go()
    assert site.served.resident_bytes() - before < 30 * MIB


class Stubborn(FakeTransport):
    """A transport that TLS can take over, and whose other end takes nothing unless told."""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, TlsTransport)
        self.above = protocol

    def get_write_buffer_size(self) -> int:
        return 1

    def write(self, data: object) -> None:
        pass


def test_a_client_that_does_not_take_the_answer_to_starttls_gets_tls_once(site: Site) -> None:
    async def talk() -> None:
        nbd_server = NbdServer(MemoryExport(MIB, Choices(b"")))
        with site.knock() as client:
            connection = Connection(nbd_server, certificates.load_terms(str(site.tls)).context)
            transport = Stubborn(connection, client.plain, Choices(b""))
            connection.connection_made(transport)
            connection.pause_writing()
            words = b"\0\0\0\3" + pack_option(nbd.OPT_STARTTLS)
            connection.get_buffer(-1)[: len(words)] = words
            connection.buffer_updated(len(words))
            taken_over = transport.above
            transport.above.resume_writing()
            assert transport.above is taken_over
            assert connection.negotiating
            transport.above.connection_lost(None)
            await nbd_server.drain()

    asyncio.run(talk())


# --- addresses --------------------------------------------------------------------------------------------


def test_every_address_can_be_served_with_tls_and_none_without(lab: Lab) -> None:
    tls = lab.home / "tls"
    lab.lockstep("tls", "init", tls).ok()
    lab.lockstep("tls", "client", tls, "bob").ok()
    volume = lab.volume()
    refusal = lab.lockstep("serve", "vol", "--key-file", lab.key, "--tcp", "0.0.0.0:0")
    refusal.failed(2, "not served without TLS", "lockstep tls init DIR", "lockstep tls client DIR NAME", "--tls-dir")
    with volume.served("--tcp", "0.0.0.0:0", "--tls-dir", tls) as served:
        uri = served.next_uri()
        assert re.fullmatch(r"nbds://0\.0\.0\.0:\d+/vol", uri)
        address = uri.replace("0.0.0.0", "localhost")
        assert run("nbdinfo", "--size", f"{address}?tls-certificates={tls}/clients/bob").strip() == str(16 * MIB)


def test_localhost_is_one_address_with_one_port(lab: Lab) -> None:
    volume = lab.volume()
    with volume.served("--tcp", "localhost:0") as served:
        uri = served.next_uri()
        assert uri.startswith("nbd://127.0.0.1:")
        assert run("nbdinfo", "--size", uri).strip() == str(16 * MIB)
        listening = run("ss", "-Htlnp").splitlines()
        assert len([line for line in listening if f"pid={served.process.pid}," in line]) == 1


def test_a_certificate_that_expires_soon_is_announced_in_the_log(lab: Lab) -> None:
    tls = lab.home / "tls"
    lab.lockstep("tls", "init", tls, "--days", "20").ok()
    with lab.volume().served("--tcp", "127.0.0.1:0", "--tls-dir", tls) as served:
        wait_until(lambda: "server-cert.pem expires on" in served.log.read_text(), "the warning")
        assert "Move it and its key away" in served.log.read_text()
        assert "ca-cert.pem expires" not in served.log.read_text()


def test_an_authority_that_expires_soon_needs_more_than_a_new_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "CA_DAYS", 20)
    certificates.make_authority(str(tmp_path / "tls"))
    server, authority = certificates.load_terms(str(tmp_path / "tls")).warnings()
    assert "server-cert.pem expires on" in server
    assert "ca-cert.pem expires on" in authority
    assert "new certificates for all clients" in authority
