# cython: language_level=3
"""Inner loops over runs of small writes; `runs.py` has the same in Python, says what they do, and is tested against them.

The GIL is given up round the system calls of a whole run, once: a disk may take its time.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint64_t

from lockstep.run cimport Write


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev2(int fd, const iovec *parts, int count, int64_t offset, int flags)
    ssize_t preadv2(int fd, const iovec *parts, int count, int64_t offset, int flags)


cdef Py_ssize_t _checked(Py_buffer *run, Py_ssize_t count) except -1:
    if count < 0 or <size_t> count * sizeof(Write) > <size_t> run.len:
        raise ValueError("the run is shorter than that")
    return count


def aligned(run, Py_ssize_t count, uint64_t mask):
    """See `runs.py`."""
    cdef Py_buffer writes
    cdef Py_ssize_t at = 0
    cdef Write *write
    PyObject_GetBuffer(run, &writes, PyBUF_SIMPLE)
    try:
        count = _checked(&writes, count)
        write = <Write *> writes.buf
        while at < count and (write[at].offset | write[at].length) & mask == 0:
            at += 1
        return at
    finally:
        PyBuffer_Release(&writes)


def covered(run, Py_ssize_t count, bytearray marks, bytearray touched, int region_shift, int group_shift):
    """See `runs.py`."""
    cdef Py_buffer writes
    cdef Py_ssize_t at = 0, regions = len(marks), groups = len(touched)
    cdef unsigned char *marked = marks
    cdef unsigned char *wanted = touched
    cdef uint64_t region, last
    cdef bint whole = True
    cdef Write *write
    PyObject_GetBuffer(run, &writes, PyBUF_SIMPLE)
    try:
        count = _checked(&writes, count)
        write = <Write *> writes.buf
        while at < count:
            region = write[at].offset >> region_shift
            last = (write[at].offset + write[at].length - 1) >> region_shift
            if last >= <uint64_t> regions or last >> group_shift >= <uint64_t> groups:
                raise ValueError("the write lies outside of the disk")
            while region <= last:
                wanted[region >> group_shift] = 1
                whole = whole and marked[region] == 1
                region += 1
            if not whole:
                break
            at += 1
        return at
    finally:
        PyBuffer_Release(&writes)


def write_run(int fd, int flags, data, run, Py_ssize_t count):
    """See `runs.py`."""
    cdef Py_buffer source, writes
    cdef Py_ssize_t at = 0
    cdef ssize_t written
    cdef Write *write
    cdef iovec part
    PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(run, &writes, PyBUF_SIMPLE)
        try:
            count = _checked(&writes, count)
            write = <Write *> writes.buf
            with nogil:
                while at < count:
                    if write[at].position + write[at].length > <uint64_t> source.len:
                        break
                    part.iov_base = <char *> source.buf + write[at].position
                    part.iov_len = write[at].length
                    written = pwritev2(fd, &part, 1, write[at].offset, flags)
                    if written < 0 or <uint64_t> written != write[at].length:
                        break
                    at += 1
            return at
        finally:
            PyBuffer_Release(&writes)
    finally:
        PyBuffer_Release(&source)


def read_run(int fd, int flags, into, run, Py_ssize_t count):
    """See `runs.py`."""
    cdef Py_buffer target, reads
    cdef Py_ssize_t at = 0
    cdef ssize_t got
    cdef Write *read
    cdef iovec part
    PyObject_GetBuffer(into, &target, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(run, &reads, PyBUF_SIMPLE)
        try:
            count = _checked(&reads, count)
            read = <Write *> reads.buf
            with nogil:
                while at < count:
                    if read[at].position + read[at].length > <uint64_t> target.len:
                        break
                    part.iov_base = <char *> target.buf + read[at].position
                    part.iov_len = read[at].length
                    got = preadv2(fd, &part, 1, read[at].offset, flags)
                    if got < 0 or <uint64_t> got != read[at].length:
                        break
                    at += 1
            return at
        finally:
            PyBuffer_Release(&reads)
    finally:
        PyBuffer_Release(&target)
