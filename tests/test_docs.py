"""The documents say what the code does, as far as a machine can tell.

Commands, options, constants, layouts and tables in docs/ and README.md are compared with the code that they describe,
in both directions where a document claims to be complete. Sentences are for their readers to check.
"""

import ast
import errno
import functools
import json
import os
import re
import shlex
import tomllib
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from typer.main import get_command

from lockstep import errors
from lockstep.cli.main import app
from lockstep.crypto import keyslots, luks, recovery_key
from lockstep.disk.probe import FILE_SECTOR_BYTES
from lockstep.nbd import connection, deferred, identity, negotiation, payload, replies, server, tls, transmission, wire
from lockstep.registry import models, schema
from lockstep.registry.store import VolumeRecord
from lockstep.service import background, serve, status
from lockstep.service.state import ENVIRONMENT, SYSTEM_DIRECTORY, State
from lockstep.volume import intent, link, missing, overlay, pages, regions, restore_record, write_path
from lockstep.volume.held import HeldRecord
from lockstep.volume.progress import SyncProgress
from lockstep.volume.regions import RegionMap

ROOT: Final = Path(__file__).parent.parent
SOURCES: Final = ROOT / "src" / "lockstep"
DOCS: Final = tuple(sorted((ROOT / "docs").glob("*.md")))
PAGES: Final = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS)
UNITS: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def doc(name: str) -> str:
    return text_of(ROOT / "docs" / name)


def fences(text: str, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a language, or all of them."""
    return [found[1] for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_of(text: str) -> Iterator[str]:
    """Everything that is typed as code: fenced blocks and spans, continued lines joined."""
    for block in fences(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (found[1].replace("\n", " ") for found in re.finditer(r"`([^`]+)`", prose(text)))


def table(text: str, *heads: str) -> list[list[str]]:
    """The rows of the table whose columns are called so."""
    lines = iter(text.splitlines())
    for line in lines:
        if cells(line) == list(heads):
            next(lines)
            rows: list[list[str]] = []
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append(cells(row))
            return rows
    raise AssertionError(f"there is no table with the columns {heads}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- commands and options ---------------------------------------------------------------------------------


@functools.cache
def commands() -> dict[str, Any]:
    """Name -> the parser's command; those of a group as "group command", in the place of the group."""
    root: Any = get_command(app)
    found: dict[str, Any] = {}
    with root.make_context("lockstep", ["list"]) as context:
        for name in root.list_commands(context):
            command = root.get_command(context, name)
            own = getattr(command, "commands", None)
            found |= {f"{name} {each}": own[each] for each in own} if own else {name: command}
    return found


def groups() -> set[str]:
    return {name.partition(" ")[0] for name in commands() if " " in name}


def options(command: Any) -> dict[str, bool]:
    """Spelling -> does it take a value."""
    found = {}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                found[spelling] = not parameter.is_flag
    return found


def arguments(command: Any) -> list[str]:
    return [each.metavar for each in command.params if each.param_type_name == "argument"]


def named(text: str) -> Iterator[list[str]]:
    """Each use of `lockstep ...` in a document's code, in words."""
    for line in code_of(text):
        for found in re.finditer(r"(?:^|[\s(]|bin/)lockstep[ \t]+([a-z-][^|;&)\"']*)", line.partition("  #")[0]):
            yield shlex.split(found[1], comments=True)


def complaint(words: list[str]) -> str | None:
    """Why `lockstep WORDS` cannot be typed; None when it can."""
    known = options(get_command(app)) | {"--help": False}
    waiting = iter(words)
    for word in waiting:
        spelling = word.partition("=")[0]
        if not spelling.startswith("-") or spelling == "-":
            if word in groups():
                word = f"{word} {next(waiting, '')}".rstrip()
                if word in groups():
                    return None
            if word not in commands():
                return f"there is no command {word}"
            own = options(commands()[word]) | {"--help": False}
            given = [each.partition("=")[0] for each in waiting if re.match(r"--?[a-z]", each)]
            return next((f"{word} has no option {each}" for each in given if each not in own), None)
        if spelling not in known:
            return f"there is no option {spelling}"
        if known[spelling] and spelling == word:
            next(waiting, None)
    return None


@every_page
def test_every_command_line_can_be_typed(page: Path) -> None:
    wrong = [f"lockstep {' '.join(words)}: {why}" for words in named(text_of(page)) if (why := complaint(words))]
    assert not wrong


def test_the_command_lines_are_found() -> None:
    assert sum(1 for page in PAGES for _ in named(text_of(page))) > 40
    assert complaint(["serve", "web", "--no-such"]) == "serve has no option --no-such"
    assert complaint(["--no-such", "serve"]) == "there is no option --no-such"
    assert complaint(["verfy", "web"]) == "there is no command verfy"
    assert complaint(["tls", "init", "DIR", "--no-such"]) == "tls init has no option --no-such"
    assert complaint(["tls", "verify"]) == "there is no command tls verify"
    assert complaint(["tls", "init", "DIR", "--host", "h"]) is None
    assert complaint(["--state-dir", "DIR", "status", "--json"]) is None


def test_operations_has_every_command_and_option_and_no_other() -> None:
    documented: set[tuple[str, str, bool]] = set()
    for command, given, _meaning in table(doc("operations.md"), "command", "option", "meaning"):
        (words,) = spans(command)
        name, *metavars = words.split()
        if name in groups():
            name = f"{name} {metavars.pop(0)}"
        if name != "lockstep":
            assert metavars == arguments(commands()[name]), command
        for span in spans(given):
            spelling, _, value = span.partition(" ")
            documented.add((name, spelling, bool(value)))
        if not given:
            documented.add((name, "", False))
    every = {"lockstep": get_command(app), **commands()}
    real = {(name, *item) for name, command in every.items() for item in options(command).items()}
    real |= {(name, "", False) for name in commands()}
    assert documented == real


def test_operations_has_the_exit_codes_of_the_catalogue() -> None:
    rows = table(doc("operations.md"), "code", "meaning")
    codes = {each.exit_code for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")}
    assert {int(code) for code, _ in rows} == codes | {0, 130}


def test_the_environment_variable_and_the_state_directory() -> None:
    for name in ("operations.md", "formats.md"):
        assert ENVIRONMENT in doc(name)
        assert SYSTEM_DIRECTORY in doc(name)
    rows = table(doc("formats.md"), "path", "what", "survives")
    listed = {span for path, *_ in rows for span in spans(path)}
    state = State("")
    places = (state.socket("NAME"), state.control("NAME"), state.intent("UUID"))
    assert {place.lstrip("/") for place in places} <= listed


# --- names, paths and links -------------------------------------------------------------------------------

_PLACE: Final = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:pyx|pyi|py))(?::([A-Za-z_][\w.]*))?`")


def resolve(page: Path, path: str) -> Path | None:
    """A path as the documents write it: from the root, or in architecture.md from the package."""
    bases = [ROOT, SOURCES] if page.name == "architecture.md" else [ROOT]
    return next((base / path for base in bases if (base / path).is_file()), None)


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, methods as Class.method, and constants."""
    if path.suffix == ".pyx":
        return frozenset(re.findall(r"(?:def|class|cdef \w+|enum) +(\w+)", path.read_text()))
    found: set[str] = set()

    def collect(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(prefix + each.id for each in node.targets if isinstance(each, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    collect(ast.parse(path.read_text()).body, "")
    return frozenset(found)


@every_page
def test_every_file_and_name_exists(page: Path) -> None:
    wrong = []
    for path, name in _PLACE.findall(prose(text_of(page))):
        file = resolve(page, path)
        if file is None or (name and name not in names_in(file)):
            wrong.append(f"{path}:{name}")
    assert not wrong


def test_the_names_are_found() -> None:
    assert len(_PLACE.findall(prose(doc("architecture.md")))) > 60
    assert "WritePath._prepare" in names_in(SOURCES / "volume" / "write_path.py")


def slugs(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    wrong = []
    for link_text, address in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", prose(text_of(page))):
        if "://" in address:
            continue
        path, _, anchor = address.partition("#")
        goal = Path(os.path.normpath(page.parent / path)) if path else page
        if not goal.exists() or (anchor and anchor not in slugs(text_of(goal))):
            wrong.append(f"[{link_text}]({address})")
    assert not wrong


@every_page
def test_boxes_and_headings_are_shown_as_such(page: Path) -> None:
    before = ""
    for line in re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL).splitlines():
        assert line.startswith("|") or not re.search(r"\S > ", line), "a quotation that was run together: " + line
        assert not line.startswith("#") or not before, "a heading that text runs into: " + line
        before = line


def test_every_document_is_reached_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/[\w.]+)\)", text_of(ROOT / "README.md"))
    assert {f"docs/{page.name}" for page in DOCS} <= set(linked)


# --- architecture -----------------------------------------------------------------------------------------


def test_the_folders_are_those_of_the_package() -> None:
    rows = table(doc("architecture.md"), "folder", "reason", "knows")
    folders = {f"{path.parent.name}/" for path in SOURCES.glob("*/__init__.py")}
    assert {spans(row[0])[0] for row in rows} == folders | {"buffers.py", "errors.py"}


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each["type"] == "layers")
    drawn = " -> ".join(layer.removeprefix("lockstep.") for layer in layers)
    for page in (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        assert f"`{drawn}`" in text_of(page)


def test_every_step_of_the_method_is_found_in_the_code() -> None:
    rows = table(doc("architecture.md"), "step", "what", "where")
    source = (SOURCES / "volume" / "write_path.py").read_text()
    assert [row[0] for row in rows] == ["101/501/601", "502", "602", "102/503", "103/504", "103/505"]
    assert all(row[0] in source for row in rows)


def drawn_transitions() -> dict[str, set[str]]:
    """State -> the states that follow, from the table at the head of link.py."""
    found: dict[str, set[str]] = {}
    state = ""
    for line in (link.__doc__ or "").splitlines():
        if started := re.match(r"    ([a-z-]+)  +\S.*  +", line):
            state = started[1]
        if state and (goal := re.search(r"-> *([a-z-]+),?$", line)):
            found.setdefault(state, set()).add(goal[1])
    return found


def test_the_states_and_their_transitions_are_those_of_the_link() -> None:
    rows = table(doc("architecture.md"), "state", "means", "left by")
    assert {spans(state)[0]: set(spans(left)) for state, _, left in rows} == drawn_transitions()


def test_operations_and_formats_know_the_same_states() -> None:
    states = {link.IN_SYNC, link.SYNCING, link.BEHIND, link.DEGRADED}
    assert set(drawn_transitions()) == states
    in_operations = table(doc("operations.md"), "state", "meaning", "what to do")
    assert {spans(row[0])[0] for row in in_operations} == states
    in_formats = table(doc("formats.md"), "state", "what `lockstep restore` gives back")
    assert {spans(row[0])[0] for row in in_formats} == states | {link.FROZEN, link.ASIDE}


# --- formats ----------------------------------------------------------------------------------------------


def test_the_token_example_is_a_token() -> None:
    (example,) = [block for block in fences(doc("formats.md"), "json") if '"keyslots"' in block]
    token = luks.Token.from_json(example)
    assert json.loads(token.to_json()) == json.loads(example)
    members = {spans(row[0])[0] for row in table(doc("formats.md"), "member", "type", "meaning")}
    assert members == set(json.loads(example))


def test_the_recovery_key_is_made_as_described() -> None:
    (example,) = [
        block.strip() for block in fences(doc("formats.md"), "text") if block.count("-") == 7 and "{" not in block
    ]
    assert isinstance(recovery_key.wrong_passphrase("/mirror", example.encode()), errors.RecoveryKeyUnknown)
    assert f"`{recovery_key.ALPHABET}`" in doc("formats.md")
    (token,) = [
        json.loads(block) for block in fences(doc("formats.md"), "text") if keyslots.RECOVERY_TOKEN_TYPE in block
    ]
    assert (token["type"], token["version"]) == (keyslots.RECOVERY_TOKEN_TYPE, keyslots.RECOVERY_TOKEN_VERSION)


def test_the_mirror_is_made_as_described() -> None:
    rows = {row[0]: row[1] for row in table(doc("formats.md"), "property", "value")}
    assert spans(rows["cipher"]) == [luks.CIPHER]
    assert f"{luks.KEY_BITS} bits" in rows["volume key"]
    headers = table(doc("formats.md"), "header", "where the header is", "where the data begins")
    assert f"({luks.INLINE_DATA_OFFSET_BYTES})" in headers[0][2]
    assert luks.HEADER_FILE_BYTES == 16 << 20
    assert f"{FILE_SECTOR_BYTES} for an image file" in rows["sector size"]
    assert headers[1][1:] == ["a file of 16 MiB, mode 0600", "0"]


def test_the_record_of_a_restore_is_as_described(tmp_path: Path) -> None:
    (example,) = [block for block in fences(doc("formats.md"), "json") if restore_record.TYPE in block]
    written = tmp_path / "record"
    written.write_text(example)
    record = restore_record.RestoreRecord.load(str(written))
    assert record is not None
    record.save(str(written))
    assert json.loads(written.read_text()) == json.loads(example)
    rows = table(doc("formats.md"), "restore record", "meaning")
    assert {span for names, *_ in rows for span in spans(names)} == set(json.loads(example))
    for name in ("formats.md", "operations.md"):
        assert f"`OUTPUT{restore_record.SUFFIX}`" in doc(name)


def test_the_versions_are_those_that_are_written() -> None:
    versions = {row[0]: row[2] for row in table(doc("formats.md"), "what", "where", "version")}
    assert versions["token"] == str(luks.TOKEN_VERSION)
    assert versions["record of a restore"] == str(restore_record.VERSION)
    assert versions["intent bitmap"] == str(intent.VERSION)
    assert versions["record of what a new target lacks"] == str(missing.VERSION)
    assert versions["overlay"] == str(overlay.VERSION)
    assert versions["registry"] == schema.REVISION


def slices(rows: list[list[str]], page: bytes) -> list[bytes]:
    """A page, cut as a table of the document says; the table leaves nothing out."""
    fields, end = [], 0
    for offset, length, _ in rows:
        assert int(offset) == end
        end += int(length)
        fields.append(page[int(offset) : end])
    assert end == len(page)
    return fields


async def in_worker(work: Any, *arguments: Any) -> None:
    work(*arguments)


def test_an_intent_bitmap_can_be_read_by_its_description(tmp_path: Path) -> None:
    identity = intent.Identity(str(uuid.uuid4()), str(uuid.uuid4()), (300 << 20) + 1)
    marked = bytearray(4801)
    marked[3] = marked[4064] = marked[4800] = 1
    bitmap = intent.IntentBitmap(str(tmp_path / "bitmap"), identity, in_worker)
    bitmap.claim(7, 8, marked)
    bitmap.close()
    content = (tmp_path / "bitmap").read_bytes()
    head, *rest = (content[at : at + 512] for at in range(0, len(content), 512))

    rows = table(doc("formats.md"), "offset", "bytes", "content")
    checksum, version, magic, volume_id, luks_uuid, generation, following, written, size, region, zeroes = slices(
        rows, head
    )
    assert int.from_bytes(checksum, "little") == zlib.crc32(head[4:])
    assert magic == spans(rows[2][2])[0].encode() + b"\0"
    assert f"version, {int.from_bytes(version, 'little')}" == rows[1][2]
    assert str(uuid.UUID(bytes=volume_id)) == identity.volume_id
    assert str(uuid.UUID(bytes=luks_uuid)) == identity.luks_uuid
    numbers = [int.from_bytes(each, "little") for each in (generation, following, size, region)]
    assert numbers == [7, 8, identity.size_bytes, 1 << 16]
    assert not any(written + zeroes)

    rows = table(doc("formats.md"), "offset in the page", "bytes", "content")
    bits = b""
    for page in rest:
        checksum, part = slices(rows, page)
        assert int.from_bytes(checksum, "little") == zlib.crc32(page[4:])
        bits += part
    assert [at for at in range(8 * len(bits)) if bits[at // 8] >> at % 8 & 1] == [3, 4064, 4800]
    assert len(rest) == 2
    assert f"{pages.PAGE_BITS} regions" in doc("formats.md")


def test_the_record_of_a_new_target_can_be_read_by_its_description(tmp_path: Path) -> None:
    pair = missing.Pair(str(uuid.uuid4()), str(uuid.uuid4()), (300 << 20) + 1)
    path, states = str(tmp_path / "record"), bytearray(4801)
    states[3] = states[4064] = states[4800] = 1
    missing.record(path, pair, states, in_worker).close()
    assert missing.load(path, pair) == states
    content = (tmp_path / "record").read_bytes()
    rows = table(doc("formats.md"), "offset", "bytes", "field")
    checksum, version, magic, volume_id, mirror_id, size, region, zeroes = slices(rows, content[:512])
    assert int.from_bytes(checksum, "little") == zlib.crc32(content[4:512])
    assert f"version, {int.from_bytes(version, 'little')}" == rows[1][2]
    assert magic.decode() == spans(rows[2][2])[0]
    assert [str(uuid.UUID(bytes=each)) for each in (volume_id, mirror_id)] == [pair.volume_id, pair.mirror_id]
    assert [int.from_bytes(each, "little") for each in (size, region)] == [pair.size_bytes, 1 << 16]
    assert not any(zeroes)
    bits = content[516:1024] + content[1028:1536]
    assert [at for at in range(8 * len(bits)) if bits[at // 8] >> at % 8 & 1] == [3, 4064, 4800]


def test_an_overlay_can_be_read_by_its_description(tmp_path: Path) -> None:
    """With nothing of Lockstep's but the words of the document."""
    rows = table(doc("formats.md"), "offset", "bytes", "part")
    mirror_uuid, volume_key, size_bytes = uuid.uuid4(), os.urandom(64), 600 * 4096
    path, base = tmp_path / "overlay", overlay.Base(str(mirror_uuid), 77, size_bytes)
    overlay.OverlayFile.make(str(path), base)
    file = overlay.OverlayFile.claim(str(path), base)
    file.unlock(bytearray(volume_key))
    nothing: Any = SimpleNamespace(size_bytes=size_bytes, sector_bytes=512)
    disk = overlay.Overlay(nothing, file)
    disk.write(599 * 4096, memoryview(b"!" * 4096))
    disk.zero(4096, 8192, allocate=False)
    disk.close()

    content = path.read_bytes()
    checksum, version, magic, luks_uuid, generation, size, cluster, data, salt, zeroes = slices(rows, content[:512])
    assert int.from_bytes(checksum, "little") == zlib.crc32(content[4:512])
    assert rows[1][2] == f"version, {int.from_bytes(version, 'little')}"
    assert magic.decode() == spans(rows[2][2])[0]
    assert luks_uuid == mirror_uuid.bytes
    numbers = [int.from_bytes(each, "little") for each in (generation, size, cluster, data)]
    assert numbers == [77, size_bytes, 4096, 1 << 20]
    assert not any(zeroes)
    states = content[516:1024] + content[1028:1536]
    assert [int.from_bytes(content[at : at + 4], "little") for at in (512, 1024)] == [
        zlib.crc32(content[at + 4 : at + 512]) for at in (512, 1024)
    ]
    assert {at: state for at, state in enumerate(states) if state} == {1: 2, 2: 2, 599: 1}
    meanings = [spans(row[0]) or row[0] for row in table(doc("formats.md"), "byte", "the cluster is")]
    assert meanings == [str(each) for each in (overlay.MIRROR, overlay.HERE, overlay.ZERO)]
    key = HKDF(SHA256(), 64, salt, b"lockstep overlay 1").derive(volume_key)
    sector = (1 << 20) + 599 * 4096
    context = Cipher(algorithms.AES(key), modes.XTS((599 * 8).to_bytes(16, "little"))).decryptor()
    assert context.update(content[sector : sector + 512]) == b"!" * 512
    limits = (overlay.SMALLEST_CLUSTER_BYTES, overlay.LARGEST_CLUSTER_BYTES, overlay.CLUSTERS_WANTED)
    assert all(f"{limit}" in doc("formats.md") for limit in limits)


def test_the_region_sizes_are_those_of_the_code() -> None:
    numbers = (regions.SMALLEST_REGION_BYTES, regions.LARGEST_REGION_BYTES, regions.REGIONS_WANTED)
    assert all(f"{number}" in doc("formats.md") for number in numbers)
    assert regions.LARGEST_REGION_BYTES * regions.REGIONS_WANTED == 16 << 40


@pytest.mark.parametrize("name", ["volumes", "mirrors", "grants", "audit", "owner"])
def test_the_columns_are_those_of_the_registry(name: str) -> None:
    (section,) = re.findall(rf"^Table `{name}`[^|]*:\n(.*?)(?=^Table|\Z)", doc("formats.md"), re.MULTILINE | re.DOTALL)
    columns = [spans(row[0])[0] for row in table(section, "column", "type", "meaning")]
    assert columns == list(models.METADATA.tables[name].columns.keys())


# --- the wire ---------------------------------------------------------------------------------------------


def quantity(text: str) -> float:
    found = re.fullmatch(r"(\d+) ?(\w*)", text)
    assert found, text
    return int(found[1]) * UNITS[found[2]]


def test_the_constants_are_those_of_the_code() -> None:
    rows = table(doc("nbd.md"), "constant", "value", "what it bounds")
    for name, value, _ in rows:
        places = (wire, payload, identity, negotiation, connection, deferred, replies, tls, server, write_path, serve)
        holders = [each for each in places if hasattr(each, spans(name)[0])]
        assert holders, name
        assert {getattr(each, spans(name)[0]) for each in holders} == {quantity(value)}, name
    assert {"MAX_PAYLOAD_BYTES", "MAX_CONNECTIONS", "MAX_PENDING"} <= {spans(row[0])[0] for row in rows}


def test_the_intervals_are_those_of_the_code() -> None:
    assert f"every {background.TIDY_INTERVAL_S:.0f} s" in doc("architecture.md")
    assert f"for {intent.GROUP_REGIONS} regions at a time" in doc("architecture.md")
    assert f"{serve.WORKERS} worker threads" in doc("architecture.md")


def test_the_memory_formula_names_constants_of_the_table() -> None:
    (formula,) = [block for block in fences(doc("nbd.md"), "text") if "MAX_CONNECTIONS" in block]
    constants = {spans(row[0])[0] for row in table(doc("nbd.md"), "constant", "value", "what it bounds")}
    assert set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", formula)) <= constants
    busy = connection.RECEIVE_BYTES + replies.REPLY_BATCH_BYTES + connection.INLINE_READ_BYTES
    assert f"at most {busy >> 10} KiB" in doc("nbd.md")
    assert wire.STATUS_EXTENT.size == 8


def test_every_option_of_the_wire_is_in_the_table() -> None:
    answered: dict[str, str] = {}
    for names, answer in table(doc("nbd.md"), "option", "answer"):
        answered |= dict.fromkeys(spans(names), answer)
    assert set(answered) == {each.name for each in wire.Option}
    refused = {name for name, answer in answered.items() if answer == "ERR_UNSUP"}
    assert refused == {each.name for each in wire.Option if each not in negotiation._ANSWERS}


def test_every_command_of_the_wire_is_in_the_table() -> None:
    rows = {
        spans(row[0])[0]: row for row in table(doc("nbd.md"), "command", "flags", "range beyond the end", "behaviour")
    }
    names = ("FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO")
    flags = {name: getattr(wire, f"FLAG_{name}") for name in names}
    errors_of = {wire.EINVAL: "EINVAL", wire.ENOSPC: "ENOSPC"}
    assert set(rows) == {command.name.upper().replace("-", "_") for command in wire.COMMANDS.values()}
    for command in wire.COMMANDS.values():
        _, given, beyond, _ = rows[command.name.upper().replace("-", "_")]
        if command.name == "disc":
            assert (given, beyond) == ("all", "never checked")
            continue
        assert sum(flags[name] for name in given.split(", ")) == command.flags, command.name
        assert beyond == errors_of[command.beyond_end], command.name


def test_the_errors_are_mapped_as_described() -> None:
    for numbers, sent in table(doc("nbd.md"), "errno of the disk", "on the wire"):
        if numbers == "everything else":
            assert transmission.wire_error(errno.ENODEV) == getattr(wire, sent)
            continue
        for name in numbers.split(", "):
            expected = name if sent == "itself" else sent
            assert transmission.wire_error(getattr(errno, name)) == getattr(wire, expected), name
    first = table(doc("nbd.md"), "errno of the disk", "on the wire")[0][0].split(", ")
    assert {getattr(wire, name) for name in first} == wire.WIRE_ERRORS


# --- JSON -------------------------------------------------------------------------------------------------


def test_the_status_example_has_the_members_of_the_status() -> None:
    (example,) = [json.loads(block) for block in fences(doc("operations.md"), "json")]
    (volume,) = example["volumes"]
    (mirror,) = volume["mirrors"]
    nothing: Any = None
    held = HeldRecord(
        "/nowhere/record", intent.Identity(str(uuid.uuid4()), str(uuid.uuid4()), 1 << 20), in_worker, expected=False
    )
    followed = link.MirrorLink("/mirror", "uuid", RegionMap(1 << 20, b"\1" * 16), nothing, held, nothing)
    followed.sync = SyncProgress(1 << 20)
    real = VolumeRecord("id", "web", "/target", 1 << 20, 512, "hold", None, nothing, ())
    described = status.of_link(followed)
    status.add_headers({"mirrors": [described]}, real, {})
    assert list(described) == list(mirror)
    assert list(described["sync"]) == list(mirror["sync"])
    assert list(status.of_volume(real, [described])) == list(volume)
    assert list(status.of_volume(real, [described])["target"]) == list(volume["target"])
    documented = {span for row in table(doc("operations.md"), "member", "meaning") for span in spans(row[0])}
    assert {"serving", "uri", "clients"} <= documented
    assert set(mirror) - {"path", "uuid"} <= documented
