"""The memory of this process: kept from others, and if wanted kept from being swapped out."""

import contextlib
import ctypes
import os
import resource
from typing import Final

from lockstep.errors import MemoryNotLockable

_CORE_LIMIT_BYTES: Final = 1  # fs/coredump.c: "we use cprm.limit of 1 here as a special value"
_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # bits/mman-linux.h

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE_BYTES: Final = 1 << 20
_KEPT_BYTES: Final = 8 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def protect_memory() -> None:
    """Keep what this process will know out of core dumps, and out of other processes' reach.

    A program that it starts can be dumped again, for all that it inherits is the limit. The kernel does not mind a
    limit of 0 where a program takes the dumps (core(5)); but it does mind 1, which is too little for a file as well.
    """
    with contextlib.suppress(ValueError, OSError):  # it is 0, and must not be raised
        resource.setrlimit(resource.RLIMIT_CORE, (_CORE_LIMIT_BYTES, _CORE_LIMIT_BYTES))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def keep_small() -> None:
    """Have the memory of large blocks go back to the system when they are freed (mallopt(3)).

    Left to itself, the C library soon keeps blocks of up to 32 MiB, in an arena for each thread: measured for a volume
    of 1 TiB during a resync, 130 instead of 92 MiB resident.
    """
    _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)  # smaller ones are used again at once


def lock_memory() -> None:
    """Keep all of this process in memory: for a server of the disk to which the kernel writes when memory is short.

    Then it must not wait for memory itself, or both wait for ever (mlockall(2); PR_SET_IO_FLUSHER, prctl(2)). Raises
    MemoryNotLockable.
    """
    with contextlib.suppress(ValueError, OSError):  # root may raise the limit; who may not, may have enough of it
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        raise MemoryNotLockable(reason=os.strerror(ctypes.get_errno()))
    _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)  # root's alone, and only a further precaution
