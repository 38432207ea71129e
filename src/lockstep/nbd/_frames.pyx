# cython: language_level=3
"""Inner loops over requests that are counted by the hundred thousand; `frames.py` has the same in Python."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from lockstep.run cimport Write


cdef extern from "endian.h" nogil:
    uint64_t be64toh(uint64_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t htobe64(uint64_t value)
    uint32_t htobe32(uint32_t value)

cdef enum:
    REQUEST_BYTES = 28
    REPLY_BYTES = 16

# The first eight bytes of a request: magic, no flags, NBD_CMD_WRITE.
cdef uint64_t PLAIN_WRITE = (<uint64_t> 0x25609513 << 32) | 1
# The same of a plain read.
cdef uint64_t PLAIN_READ = <uint64_t> 0x25609513 << 32
# The first eight bytes of a simple reply: magic, no error.
cdef uint64_t DONE = <uint64_t> 0x67446698 << 32
# The first eight bytes of a structured reply that is whole: magic, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA.
cdef uint64_t DATA = (<uint64_t> 0x668E33EF << 32) | (1 << 16) | 1


def find_writes(buffer, Py_ssize_t start, Py_ssize_t end, Py_ssize_t enough, uint64_t writable_bytes, run):
    """See `frames.py`."""
    cdef Py_buffer source, writes
    cdef Py_ssize_t at = start, found = 0, room
    cdef uint64_t kind, offset, length
    cdef uint32_t short_length
    cdef const char *request
    cdef Write *write
    PyObject_GetBuffer(buffer, &source, PyBUF_SIMPLE)
    try:
        if start < 0 or end > source.len:
            raise ValueError("the bytes lie outside of the buffer")
        PyObject_GetBuffer(run, &writes, PyBUF_WRITABLE)
        try:
            room = writes.len // sizeof(Write)
            write = <Write *> writes.buf
            while found < room and end - at >= REQUEST_BYTES and at - start < enough:
                request = <const char *> source.buf + at
                memcpy(&kind, request, 8)
                memcpy(&offset, request + 16, 8)
                memcpy(&short_length, request + 24, 4)
                offset, length = be64toh(offset), be32toh(short_length)
                if be64toh(kind) != PLAIN_WRITE or length == 0 or length > <uint64_t> (end - at - REQUEST_BYTES):
                    break
                if offset > writable_bytes or length > writable_bytes - offset:
                    break
                write[found].offset, write[found].length = offset, length
                write[found].position = at + REQUEST_BYTES
                memcpy(&write[found].cookie, request + 8, 8)
                at += REQUEST_BYTES + length
                found += 1
            return found
        finally:
            PyBuffer_Release(&writes)
    finally:
        PyBuffer_Release(&source)


def pack_replies(run, Py_ssize_t count):
    """See `frames.py`."""
    cdef Py_buffer writes
    cdef Write *write
    cdef uint64_t head = htobe64(DONE)
    cdef char *reply
    PyObject_GetBuffer(run, &writes, PyBUF_SIMPLE)
    try:
        if count < 0 or <size_t> count * sizeof(Write) > <size_t> writes.len:
            raise ValueError("the run is shorter than that")
        write = <Write *> writes.buf
        replies = PyBytes_FromStringAndSize(NULL, count * REPLY_BYTES)
        reply = PyBytes_AS_STRING(replies)
        for at in range(count):
            memcpy(reply, &head, 8)
            memcpy(reply + 8, &write[at].cookie, 8)
            reply += REPLY_BYTES
        return replies
    finally:
        PyBuffer_Release(&writes)


def find_reads(buffer, Py_ssize_t start, Py_ssize_t end, Py_ssize_t enough, Py_ssize_t longest, uint64_t size_bytes,
               Py_ssize_t header_bytes, run):
    """See `frames.py`."""
    cdef Py_buffer source, reads
    cdef Py_ssize_t at = start, found = 0, room
    cdef uint64_t kind, offset, length, position = header_bytes
    cdef uint32_t short_length
    cdef const char *request
    cdef Write *read
    PyObject_GetBuffer(buffer, &source, PyBUF_SIMPLE)
    try:
        if start < 0 or end > source.len:
            raise ValueError("the bytes lie outside of the buffer")
        PyObject_GetBuffer(run, &reads, PyBUF_WRITABLE)
        try:
            room = reads.len // sizeof(Write)
            read = <Write *> reads.buf
            while found < room and end - at >= REQUEST_BYTES and <Py_ssize_t> position < enough:
                request = <const char *> source.buf + at
                memcpy(&kind, request, 8)
                memcpy(&offset, request + 16, 8)
                memcpy(&short_length, request + 24, 4)
                offset, length = be64toh(offset), be32toh(short_length)
                if be64toh(kind) != PLAIN_READ or length == 0 or length > <uint64_t> longest:
                    break
                if offset > size_bytes or length > size_bytes - offset:
                    break
                read[found].offset, read[found].length, read[found].position = offset, length, position
                memcpy(&read[found].cookie, request + 8, 8)
                at += REQUEST_BYTES
                position += length + header_bytes
                found += 1
            return found
        finally:
            PyBuffer_Release(&reads)
    finally:
        PyBuffer_Release(&source)


def pack_data_headers(replies, run, Py_ssize_t count, bint structured):
    """See `frames.py`."""
    cdef Py_buffer target, reads
    cdef Write *read
    cdef uint64_t head = htobe64(DATA if structured else DONE), offset
    cdef uint32_t length
    cdef Py_ssize_t header_bytes = 28 if structured else REPLY_BYTES
    cdef char *header
    PyObject_GetBuffer(replies, &target, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(run, &reads, PyBUF_SIMPLE)
        try:
            if count < 0 or <size_t> count * sizeof(Write) > <size_t> reads.len:
                raise ValueError("the run is shorter than that")
            read = <Write *> reads.buf
            for at in range(count):
                if read[at].position < <uint64_t> header_bytes or read[at].position > <uint64_t> target.len:
                    raise ValueError("the reply lies outside of the buffer")
                header = <char *> target.buf + read[at].position - header_bytes
                memcpy(header, &head, 8)
                memcpy(header + 8, &read[at].cookie, 8)
                if structured:
                    length, offset = htobe32(<uint32_t> read[at].length + 8), htobe64(read[at].offset)
                    memcpy(header + 16, &length, 4)
                    memcpy(header + 20, &offset, 8)
        finally:
            PyBuffer_Release(&reads)
    finally:
        PyBuffer_Release(&target)
