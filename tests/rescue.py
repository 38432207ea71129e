"""docs/rescue.md, typed literally into a machine that has never heard of Lockstep: `make rescue-test`.

Mirrors are made by the real commands: a volume is served and attached, and file systems are made and written on its
device. Then QEMU boots Debian's kernel, taken from its package, with an initramfs of this machine's stock tools
(cryptsetup, losetup, mount, kpartx, dd) and a script of the blocks of docs/rescue.md, in its order. The mirrors are the
machine's disks, read-only. What it finds is compared with what was written; each case ends in a line on the console.

Needs root, FUSE and loop devices; no KVM: the processor is emulated, so this takes minutes, and is not in the suite.
"""

import contextlib
import hashlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lockstep.crypto import reencryption
from tests.lab import MIB, Lab, Volume, run, wait_until
from tests.test_rekey import Rekey

PAGE: Final = Path(__file__).parent.parent / "docs" / "rescue.md"
SIZE_BYTES: Final = 32 * MIB
PARTITION_OFFSET_BYTES: Final = MIB
PARTITION_BYTES: Final = 24 * MIB
MODULES: Final = (
    "virtio_pci",
    "virtio_blk",
    "loop",
    "dm-mod",
    "dm-crypt",
    "crc32c_generic",
    "ext4",
    "xts",
    "aesni_intel",
)
PROGRAMS: Final = (
    *("sh", "cryptsetup", "losetup", "mount", "umount", "lsblk", "kpartx", "dd", "cmp"),
    *("grep", "sed", "mkdir", "basename", "sha256sum", "cat"),
)
BOOT_S: Final = 1200


@dataclass(frozen=True)
class Case:
    """One kind of mirror."""

    detached: bool
    sector_bytes: int
    partitioned: bool
    half_rekeyed: bool = False

    @property
    def name(self) -> str:
        header, disk = ("inline", "detached")[self.detached], ("plain", "partitioned")[self.partitioned]
        return f"{header}-{self.sector_bytes}-{disk}{'-half-rekeyed' * self.half_rekeyed}"


CASES: Final = [
    *(Case(*each) for each in itertools.product((False, True), (512, 4096), (False, True))),
    *(Case(detached, 512, partitioned=False, half_rekeyed=True) for detached in (False, True)),
]


def blocks(section: str) -> list[str]:
    """The shell blocks of a section of the page, as they stand there."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the page has no section {section!r}"
    return re.findall(r"^```sh\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)


def script(case: Case, disk: str, digest: str, marker: str) -> str:
    """The page's commands for a case, in its order; what is ours begins with `expect`."""
    _, inline, detached, token = ("", *blocks("Look at the header"))
    open_inline, open_detached, loop = blocks("Open it")
    mount, umount = blocks("Mount a plain file system")
    mount_partition, umount_partition, mount_kpartx, umount_kpartx = blocks("Mount a partition")
    (copy,) = blocks("Copy the whole disk")
    (close,) = blocks("Close it")
    look = f"expect {marker} /mnt/rescue/marker\n"
    if case.partitioned:
        mounts = [mount_partition, look, umount_partition, mount_kpartx, look, umount_kpartx]
    else:
        mounts = [mount, look, umount]
    return "".join(
        [
            f"MIRROR={disk}\nHEADER=/headers/{case.name}\nKEY=/key\nOUTPUT=/tmp/output\n",
            detached if case.detached else inline,
            token,
            open_detached if case.detached else open_inline,
            loop,
            *mounts,
            copy,
            f"expect {digest} /tmp/output\nrm /tmp/output\n",
            close,
        ]
    )


# --- the mirrors ------------------------------------------------------------------------------------------


def make(lab: Lab, case: Case) -> tuple[Volume, str, str]:
    """A mirror, the digest of its target, and that of a file in the file system on it."""
    volume = lab.volume(case.name, SIZE_BYTES, "--sector-size", case.sector_bytes, header=case.detached)
    content = random.Random(case.name).randbytes(3 * MIB)
    with volume.served():
        device = lab.lockstep("attach", case.name).ok().strip()
        try:
            with _file_system(device, partitioned=case.partitioned) as place, _mounted(lab, place) as point:
                (point / "marker").write_bytes(content)
        finally:
            lab.lockstep("detach", case.name).ok()
    if case.half_rekeyed:
        _rekey_half(volume)
    with volume.target.open("rb") as target:
        digest = hashlib.file_digest(target, "sha256").hexdigest()
    return volume, digest, hashlib.sha256(content).hexdigest()


def _rekey_half(volume: Volume) -> None:
    """Interrupt a re-keying when some of the data has the new volume key, and some has not."""
    header = str(volume.header or volume.mirror)

    def half_done() -> bool:
        if not reencryption.under_way(header):
            return False
        found = reencryption.read(header)
        return bool(found.renewed) and not found.is_over(SIZE_BYTES)

    while not half_done():
        rekey = Rekey(volume, environment=volume.lab.quick_format())
        wait_until(rekey.at_work, "cryptsetup to work")
        time.sleep(random.random() / 5)
        rekey.interrupt()


@contextlib.contextmanager
def _file_system(device: str, *, partitioned: bool) -> Iterator[str]:
    """Make an ext4 on the device, or in its first partition; yield where."""
    if not partitioned:
        run("mkfs.ext4", "-q", device)
        yield device
        return
    start, size = PARTITION_OFFSET_BYTES // 512, PARTITION_BYTES // 512
    run("sfdisk", "--no-reread", "--no-tell-kernel", device, stdin=f"label: gpt\nstart={start}, size={size}\n".encode())
    window = ["--offset", str(PARTITION_OFFSET_BYTES), "--sizelimit", str(PARTITION_BYTES)]
    place = run("losetup", "--find", "--show", *window, device).strip()
    try:
        run("mkfs.ext4", "-q", place)
        yield place
    finally:
        run("losetup", "-d", place)


@contextlib.contextmanager
def _mounted(lab: Lab, place: str) -> Iterator[Path]:
    point = lab.home / "point"
    point.mkdir(exist_ok=True)
    run("mount", place, str(point))
    try:
        yield point
    finally:
        run("umount", str(point))


# --- the machine ------------------------------------------------------------------------------------------


def kernel(home: Path) -> tuple[Path, Path]:
    """Debian's kernel for amd64 and the directory of its modules, unpacked from the package and not installed."""
    depends = run("apt-cache", "depends", "linux-image-amd64")
    package = re.search(r"Depends: (linux-image-\S+-amd64)", depends)
    assert package is not None, depends
    subprocess.run(["apt-get", "download", "-q", package[1]], cwd=home, check=True, stdout=subprocess.DEVNULL)
    (deb,) = home.glob("linux-image-*.deb")
    run("dpkg-deb", "-x", str(deb), str(home / "kernel"))
    (image,) = (home / "kernel" / "boot").glob("vmlinuz-*")
    version = image.name.removeprefix("vmlinuz-")
    run("depmod", "-b", str(home / "kernel"), version)
    return image, home / "kernel" / "lib" / "modules" / version


def modules(directory: Path) -> list[Path]:
    """The modules that are needed, each after those that it needs itself."""
    needs: dict[str, list[str]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    ordered: list[str] = []

    def add(path: str) -> None:
        for other in needs[path]:
            add(other)
        if path not in ordered:
            ordered.append(path)

    for name in MODULES:
        if name.replace("-", "_") in by_name:  # others are built in
            add(by_name[name.replace("-", "_")])
    return [directory / path for path in ordered]


def initramfs(home: Path, directory: Path, scripts: dict[str, str], headers: dict[str, Path], key: Path) -> Path:
    """A root file system of stock tools, the scripts, the detached headers and the passphrase."""
    root = home / "root"
    for name in (
        "bin",
        "sbin",
        "lib",
        "lib64",
        "proc",
        "sys",
        "dev",
        "tmp",
        "run",
        "mnt",
        "headers",
        "modules",
        "cases",
    ):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for program in PROGRAMS:
        _copy_program(program, root)
    loaded = []
    for number, module in enumerate(modules(directory)):
        shutil.copy(module, root / "modules" / module.name)
        loaded.append(f"insmod /modules/{module.name} || echo cannot load {number} {module.name}")
    for name, text in scripts.items():
        (root / "cases" / name).write_text(text)
    for name, header in headers.items():
        shutil.copy(header, root / "headers" / name)
    shutil.copy(key, root / "key")
    checker = root / "stock" / "expect"
    checker.write_text(_EXPECT)
    init = root / "init"
    init.write_text(_INIT.format(load="\n".join(loaded)))
    for path in (checker, init):
        path.chmod(0o755)
    image = home / "initramfs"
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with image.open("wb") as file:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=file, cwd=root, check=True)
    return image


# dash runs it: busybox's shell would take its own applets for whatever the page names, wherever PATH leads.
_INIT: Final = """#!/stock/sh
/bin/busybox --install -s /bin
export PATH=/stock:/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mkdir -p /run/cryptsetup
{load}
for case in /cases/*; do
    if sh -ex "$case"; then echo "RESCUE PASS ${{case##*/}}"; else echo "RESCUE FAIL ${{case##*/}}"; fi
    umount /mnt/rescue 2>/dev/null
    losetup -D
    cryptsetup close rescue 2>/dev/null
done
echo RESCUE END
poweroff -f
"""


_EXPECT: Final = """#!/stock/sh
found=$(sha256sum "$2")
[ "${found%% *}" = "$1" ] || { echo "$2 is not what was written"; exit 1; }
"""


def _copy_program(name: str, root: Path) -> None:
    """Copy a program of this machine with its libraries; it comes before busybox's of the same name."""
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert found is not None, f"{name} is not installed"
    (root / "stock").mkdir(exist_ok=True)
    shutil.copy(found, root / "stock" / name)
    for library in re.findall(r"(/\S+\.so\S*)", run("ldd", found)):
        goal = root / library.lstrip("/")
        if not goal.exists():
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, goal)


def boot(home: Path, image: Path, ramdisk: Path, disks: list[Path]) -> str:
    """Run the machine to its end; what it said on its console, which is shown as it comes."""
    drives = [f"file={disk},format=raw,if=virtio,readonly=on" for disk in disks]
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-nographic", "-no-reboot"),
        *("-net", "none", "-kernel", str(image), "-initrd", str(ramdisk)),
        *("-append", "console=ttyS0 panic=-1 quiet"),
        *itertools.chain.from_iterable(("-drive", drive) for drive in drives),
    ]
    log = home / "console"
    with log.open("wb") as console:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, check=False, timeout=BOOT_S)
    return log.read_text(errors="replace")


def main(names: list[str]) -> int:
    """Make the mirrors, boot, report; 0 when every case passed. `names` chooses among the cases."""
    cases = [case for case in CASES if not names or case.name in names]
    if os.geteuid() != 0:
        print("This needs root: it attaches volumes and mounts file systems.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="lockstep-rescue-", dir="/var/tmp") as scratch:
        home = Path(scratch)
        image, directory = kernel(home)
        lab = Lab(home)
        scripts, headers, disks = {}, {}, []
        for number, case in enumerate(cases):
            volume, digest, marker = make(lab, case)
            disks.append(volume.mirror)
            scripts[case.name] = script(case, f"/dev/vd{chr(ord('a') + number)}", digest, marker)
            if volume.header is not None:
                headers[case.name] = volume.header
            print(f"made {case.name}", flush=True)
        said = boot(home, image, initramfs(home, directory, scripts, headers, lab.key), disks)
    print(said)
    passed = set(re.findall(r"RESCUE PASS (\S+)", said))
    for case in cases:
        print(f"{case.name}: {'PASS' if case.name in passed else 'FAIL'}")
    return 0 if passed == {case.name for case in cases} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
