"""Where and with what a run was made. A figure without these is a rumour."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from lockstep.crypto.cipher import KERNEL


def machine() -> dict[str, object]:
    """Processor, cores, kernel, memory, and how busy the machine already was."""
    models = [line.partition(":")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    return {
        "cpu": models[0].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "memory_bytes": int(memory[0]) * 1024,
        "load_before": round(os.getloadavg()[0], 2),
        "pinned": False,
    }


def versions() -> dict[str, str | None]:
    """The version of everything that has a part in the figures; None where it is not installed."""
    try:
        lockstep = importlib.metadata.version("lockstep")
    except importlib.metadata.PackageNotFoundError:
        lockstep = None
    return {
        "python": platform.python_version(),
        "lockstep": lockstep,
        "encryption": KERNEL,
        "fio": _says("fio"),
        "qemu": _says("qemu-storage-daemon"),
        "nbdkit": _says("nbdkit"),
    }


def _says(program: str) -> str | None:
    if shutil.which(program) is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0] if said else None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
