"""The sector cipher against published answers, against its twin, against AES alone, and under threads."""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from dissect.fve.crypto import create_cipher
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.crypto import cipher
from lockstep.crypto._xts import Xts
from lockstep.crypto.cipher import FallbackXts, XtsCipher, self_test
from lockstep.errors import CipherSelfTestFailed

IMPLEMENTATIONS = [Xts, FallbackXts, XtsCipher]
KEY = bytes(range(64))

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda each: each.__name__)
directions = pytest.mark.parametrize("direction", ["encrypt_into", "decrypt_into"])


def read_vectors() -> list[dict[str, str]]:
    """The blocks of the vector file: its first word on a line names a value, indented lines continue it."""
    vectors: list[dict[str, str]] = []
    name = ""
    for line in (Path(__file__).parent / "vectors" / "ieee1619.txt").read_text().splitlines():
        if line.startswith("vector "):
            vectors.append({})
        if line.startswith("  "):
            vectors[-1][name] += line.strip()
        elif line and not line.startswith("#"):
            name, _, value = line.partition(" ")
            vectors[-1][name] = value
    return vectors


VECTORS = read_vectors()


def textbook_xts(key: bytes, unit: int, plain: bytes) -> bytes:
    """One data unit as IEEE 1619-2007 section 5.3 defines it, from single AES blocks. Whole blocks only."""
    half = len(key) // 2
    encrypt = Cipher(algorithms.AES(key[:half]), modes.ECB()).encryptor().update
    first_tweak = Cipher(algorithms.AES(key[half:]), modes.ECB()).encryptor().update(unit.to_bytes(16, "little"))
    tweak = int.from_bytes(first_tweak, "little")
    out = b""
    for at in range(0, len(plain), 16):
        block = int.from_bytes(plain[at : at + 16], "little") ^ tweak
        out += (int.from_bytes(encrypt(block.to_bytes(16, "little")), "little") ^ tweak).to_bytes(16, "little")
        tweak = (tweak << 1) ^ ((1 << 128) | 0x87 if tweak >> 127 else 0)
    return out


def textbook_sectors(key: bytes, sector_bytes: int, first_iv: int, plain: bytes) -> bytes:
    starts = range(0, len(plain), sector_bytes)
    return b"".join(textbook_xts(key, first_iv + at // 512, plain[at : at + sector_bytes]) for at in starts)


def test_the_native_kernel_is_in_use_here() -> None:
    assert cipher.KERNEL.startswith("libgcrypt 1.")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["vector"])
def test_the_textbook_agrees_with_every_published_answer(vector: dict[str, str]) -> None:
    key, plain = bytes.fromhex(vector["key"]), bytes.fromhex(vector["plaintext"])
    assert textbook_xts(key, int(vector["unit"], 16), plain).hex() == vector["ciphertext"]


@implementations
@pytest.mark.parametrize("number", ["4", "5", "10"])
def test_published_answers_for_512_byte_units(implementation: Any, number: str) -> None:
    (vector,) = [vector for vector in VECTORS if vector["vector"] == number]
    plain, expected = bytes.fromhex(vector["plaintext"]), bytes.fromhex(vector["ciphertext"])
    assert len(plain) == 512
    xts = implementation(bytes.fromhex(vector["key"]), 512)
    out, back = bytearray(512), bytearray(512)
    xts.encrypt_into(int(vector["unit"], 16), plain, out)
    xts.decrypt_into(int(vector["unit"], 16), out, back)
    assert out == expected
    assert back == plain


@implementations
@pytest.mark.parametrize("sector_bytes", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("key", [KEY[:32], KEY], ids=["AES-128", "AES-256"])
def test_positions_count_512_byte_units_whatever_the_sector_size(
    implementation: Any, sector_bytes: int, key: bytes
) -> None:
    plain = random.Random(1).randbytes(3 * sector_bytes)
    out, referee = bytearray(len(plain)), bytearray(len(plain))
    implementation(key, sector_bytes).encrypt_into(0x1_0000_0007, plain, out)
    assert out == textbook_sectors(key, sector_bytes, 0x1_0000_0007, plain)
    create_cipher("aes-xts-plain64", key, 8 * len(key), sector_bytes, 512).encrypt(plain, 0x1_0000_0007, referee)
    assert out == referee


@settings(max_examples=100, deadline=None)
@given(
    key=st.binary(min_size=32, max_size=32) | st.binary(min_size=64, max_size=64),
    sector_bytes=st.sampled_from([512, 4096]),
    sectors=st.integers(0, 20),
    first_iv=st.integers(0, 2**64 - 1),
    seed=st.integers(),
)
def test_kernel_and_twin_agree(key: bytes, sector_bytes: int, sectors: int, first_iv: int, seed: int) -> None:
    plain = random.Random(seed).randbytes(sectors * sector_bytes)
    outcomes = []
    for implementation in (Xts, FallbackXts):
        out, back = bytearray(len(plain)), bytearray(len(plain))
        try:
            xts = implementation(key, sector_bytes)
            xts.encrypt_into(first_iv, plain, out)
            xts.decrypt_into(first_iv, out, back)
        except ValueError as error:
            outcomes.append(str(error))
        else:
            assert back == plain
            outcomes.append(out.hex())
    assert outcomes[0] == outcomes[1]


@implementations
@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_in_place(implementation: Any, size: int) -> None:
    plain = os.urandom(size)
    xts = implementation(KEY, 512)
    data, expected = bytearray(plain), bytearray(size)
    xts.encrypt_into(5, plain, expected)
    xts.encrypt_into(5, data, data)
    assert data == expected
    xts.decrypt_into(5, memoryview(data), memoryview(data))
    assert data == plain


@implementations
@pytest.mark.parametrize("shift", [-1024, -512, -100, -1, 1, 100, 512, 1024])
def test_partly_overlapping_buffers(implementation: Any, shift: int) -> None:
    size = 2048
    memory = memoryview(bytearray(os.urandom(3 * size)))
    src, dst = memory[size : 2 * size], memory[size + shift : 2 * size + shift]
    expected = bytearray(size)
    xts = implementation(KEY, 512)
    xts.encrypt_into(9, bytes(src), expected)
    xts.encrypt_into(9, src, dst)
    assert dst == expected


@implementations
@directions
def test_what_is_refused_writes_nothing(implementation: Any, direction: str) -> None:
    for sector_bytes in (512, 4096):
        crypt: Callable[..., None] = getattr(implementation(KEY, sector_bytes), direction)
        size = 2 * sector_bytes
        dst = bytearray(size)
        last = 2**64 - 1 - sector_bytes // 512
        refused: list[tuple[type[Exception], str | None, tuple[object, ...]]] = [
            (ValueError, "same length", (0, bytes(size - sector_bytes), dst)),
            (ValueError, "multiple of the sector size", (0, bytes(size - 1), memoryview(dst)[:-1])),
            (ValueError, "between 0 and", (-1, bytes(size), dst)),
            (ValueError, "between 0 and", (2**64, bytes(size), dst)),
            (ValueError, "last sector's position", (last + 1, bytes(size), dst)),
            (TypeError, "integer", (1.0, bytes(size), dst)),
            (TypeError, None, (0, "text", dst)),
            (TypeError, None, (0, None, dst)),
            (BufferError, None, (0, bytes(size), bytes(size))),
            (BufferError, None, (0, memoryview(bytes(2 * size))[::2], dst)),
            (BufferError, None, (0, bytes(size // 2), memoryview(dst)[::2])),
        ]
        for error, message, arguments in refused:
            with pytest.raises(error, match=message):
                crypt(*arguments)
            assert dst == bytes(size), (error, message)
        crypt(last, bytes(size), dst)
        assert dst != bytes(size)
        crypt(2**64 - 1, b"", bytearray())


@implementations
@pytest.mark.parametrize("key", [b"", bytes(range(31)), bytes(range(48)), bytes(range(65))])
def test_key_sizes(implementation: Any, key: bytes) -> None:
    with pytest.raises(ValueError, match="32 or 64 bytes"):
        implementation(key, 512)


@implementations
@pytest.mark.parametrize("half", [bytes(16), bytes(range(32))])
def test_equal_key_halves_are_refused(implementation: Any, half: bytes) -> None:
    with pytest.raises(ValueError, match="must differ"):
        implementation(half + half, 512)


@implementations
@pytest.mark.parametrize("sector_bytes", [0, -512, 16, 513, 8192, 2**70])
def test_sector_sizes(implementation: Any, sector_bytes: int) -> None:
    with pytest.raises(ValueError, match="sector_bytes"):
        implementation(KEY, sector_bytes)


@implementations
def test_the_key_may_be_wiped_after_construction(implementation: Any) -> None:
    key = bytearray(KEY)
    xts = implementation(memoryview(key), 512)
    key[:] = bytes(64)
    out = bytearray(512)
    xts.encrypt_into(0, bytes(512), out)
    assert out == textbook_xts(KEY, 0, bytes(512))


def test_threads_share_one_object() -> None:
    """Sizes on both sides of where the GIL is released, more threads than the kernel keeps contexts for."""
    xts = Xts(KEY, 512)
    jobs = []
    for index, size in enumerate([512, 4096, 65536, 262144] * 5):
        plain, out = os.urandom(size), bytearray(size)
        FallbackXts(KEY, 512).encrypt_into(index << 20, plain, out)
        jobs.append((index << 20, plain, bytes(out)))
    start = threading.Barrier(len(jobs))
    wrong: list[int] = []

    def hammer(first_iv: int, plain: bytes, expected: bytes) -> None:
        out = bytearray(len(plain))
        start.wait()
        for _ in range(50):
            xts.encrypt_into(first_iv, plain, out)
            same = out == expected
            xts.decrypt_into(first_iv, out, out)
            if not same or out != plain:
                wrong.append(first_iv)

    threads = [threading.Thread(target=hammer, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("implementation", [Xts, FallbackXts])
def test_the_self_test_passes(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cipher, "_Implementation", implementation)
    self_test()


@pytest.mark.parametrize("broken", ["encrypt_into", "decrypt_into"])
def test_the_self_test_notices_one_wrong_bit(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FallbackXts):
        def _flip(self, method: str, first_iv: int, src: Any, dst: Any) -> None:
            getattr(FallbackXts, method)(self, first_iv, src, dst)
            dst[-1] ^= method == broken

        def encrypt_into(self, first_iv: int, src: Any, dst: Any, /) -> None:
            self._flip("encrypt_into", first_iv, src, dst)

        def decrypt_into(self, first_iv: int, src: Any, dst: Any, /) -> None:
            self._flip("decrypt_into", first_iv, src, dst)

    monkeypatch.setattr(cipher, "_Implementation", Broken)
    with pytest.raises(CipherSelfTestFailed) as caught:
        self_test()
    assert "IEEE 1619 vector 4" in str(caught.value)
    assert caught.value.exit_code == 1
