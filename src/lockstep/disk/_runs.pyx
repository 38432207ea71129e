# cython: language_level=3
"""Inner loops over runs of small writes; `runs.py` has the same in Python, says what they do, and is tested against them.

The GIL is given up round the system calls of a whole run, once: a disk may take its time. So it is round a comparison.
"""

from cython cimport no_gc_clear
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memset

from lockstep._work cimport Job, is_set
from lockstep.run cimport Write, is_inside


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev2(int fd, const iovec *parts, int count, int64_t offset, int flags)
    ssize_t preadv2(int fd, const iovec *parts, int count, int64_t offset, int flags)


cdef extern from "unistd.h" nogil:
    int fdatasync(int fd)


cdef extern from "fcntl.h" nogil:
    int POSIX_FADV_WILLNEED
    unsigned int SYNC_FILE_RANGE_WRITE
    int sync_file_range(int fd, int64_t offset, int64_t length, unsigned int flags)
    int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)


cdef extern from "linux/aio_abi.h" nogil:
    ctypedef unsigned long aio_context_t
    enum:
        IOCB_CMD_PREADV
        IOCB_CMD_PWRITEV
    struct iocb:
        uint64_t aio_data, aio_buf, aio_nbytes
        int64_t aio_offset
        int aio_lio_opcode, aio_fildes, aio_rw_flags
    struct io_event:
        uint64_t data
        int64_t res


cdef extern from *:
    """
    #include <linux/aio_abi.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The C library has no names for these. */
    #define io_setup(depth, context) syscall(SYS_io_setup, depth, context)
    #define io_destroy(context) syscall(SYS_io_destroy, context)
    #define io_submit(context, count, requests) syscall(SYS_io_submit, context, count, requests)
    #define io_getevents(context, least, most, events) syscall(SYS_io_getevents, context, least, most, events, NULL)
    """
    long io_setup(unsigned int depth, aio_context_t *context) nogil
    long io_destroy(aio_context_t context) nogil
    long io_submit(aio_context_t context, long count, iocb **requests) nogil
    long io_getevents(aio_context_t context, long least, long most, io_event *events) nogil


cdef Py_ssize_t _checked(Py_buffer *run, Py_ssize_t count) except -1:
    if count < 0 or <size_t> count * sizeof(Write) > <size_t> run.len:
        raise ValueError("the run is shorter than that")
    return count


cdef int _require_inside(Write *request, Py_ssize_t count, Py_buffer *data) except -1:
    cdef Py_ssize_t at
    for at in range(count):
        if not is_inside(request[at].position, request[at].length, data.len):
            raise ValueError("the data lies outside of the buffer")
    return 0


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


def apart(run, Py_ssize_t count, others):
    """See `runs.py`."""
    cdef Py_buffer requests, bounds
    cdef Py_ssize_t at = 0, other, size
    cdef Write *request
    cdef uint64_t *bound
    PyObject_GetBuffer(run, &requests, PyBUF_SIMPLE)
    try:
        count = _checked(&requests, count)
        request = <Write *> requests.buf
        PyObject_GetBuffer(others, &bounds, PyBUF_SIMPLE)
        bound = <uint64_t *> bounds.buf
        size = bounds.len // <Py_ssize_t> sizeof(uint64_t) - 1
        while at < count:
            other = 0
            while other < size and (
                request[at].offset >= bound[other + 1] or bound[other] >= request[at].offset + request[at].length
            ):
                other += 2
            if other < size:
                break
            at += 1
        PyBuffer_Release(&bounds)
        return at
    finally:
        PyBuffer_Release(&requests)


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


ctypedef ssize_t (*Call)(int, const iovec *, int, int64_t, int) noexcept nogil


cdef Py_ssize_t _moved(
    Call call, int fd, int flags, Py_buffer *data, Write *request, Py_ssize_t count, const int *given_up, int *error
) noexcept nogil:
    """Have `call` move each part of the data; how many it moved whole, from the front. `error` is why no more."""
    cdef Py_ssize_t at = 0
    cdef ssize_t moved
    cdef iovec part
    while at < count and not is_set(given_up):
        if not is_inside(request[at].position, request[at].length, data.len):
            break
        part.iov_base = <char *> data.buf + request[at].position
        part.iov_len = request[at].length
        moved = call(fd, &part, 1, request[at].offset, flags)
        if moved < 0 and errno != EINTR:
            error[0] = errno
            break
        if <uint64_t> moved != request[at].length:
            break
        at += 1
    return at


cdef Py_ssize_t _carry(Call call, int fd, int flags, Py_buffer *data, run, Py_ssize_t count) except -1:
    cdef Py_buffer requests
    cdef int never = 0, error
    PyObject_GetBuffer(run, &requests, PyBUF_SIMPLE)
    try:
        count = _checked(&requests, count)
        with nogil:
            return _moved(call, fd, flags, data, <Write *> requests.buf, count, &never, &error)
    finally:
        PyBuffer_Release(&requests)


@no_gc_clear  # it would forget whose the buffers are
cdef class Transfer(Job):
    """A run that a thread is to write, or to fetch; see `write_job` and `fetch_job` in `runs.py`."""

    cdef Call _call
    cdef int _fd
    cdef int _flags
    cdef bint _writes
    cdef Py_buffer _data
    cdef Py_buffer _requests
    cdef Py_ssize_t _count
    cdef Py_ssize_t _done
    cdef object _rest

    def __cinit__(self, bint writes, bint in_turn, int fd, int flags, data, run, Py_ssize_t count, rest):
        self._call = <Call> pwritev2 if writes else <Call> preadv2
        self._writes, self.in_turn = writes, in_turn
        self._fd = fd
        self._flags = flags
        self._rest = rest
        PyObject_GetBuffer(data, &self._data, PyBUF_SIMPLE if writes else PyBUF_WRITABLE)
        PyObject_GetBuffer(run, &self._requests, PyBUF_SIMPLE)
        self._count = _checked(&self._requests, count)
        _require_inside(<Write *> self._requests.buf, count, &self._data)

    def __dealloc__(self):
        self.release()

    cdef int release(self) except -1:
        PyBuffer_Release(&self._data)
        PyBuffer_Release(&self._requests)
        return 0

    cdef bint perform(self, const int *given_up) noexcept nogil:
        cdef Write *request = <Write *> self._requests.buf
        cdef Py_ssize_t at
        if self._count > 1 and not self._writes:  # the medium is asked for all of it before the first is waited for
            for at in range(self._count):
                posix_fadvise(self._fd, request[at].offset, request[at].length, POSIX_FADV_WILLNEED)
        self._done = _moved(self._call, self._fd, self._flags, &self._data, request, self._count, given_up, &self.error)
        return self._done == self._count

    cdef object finish(self):
        return self._rest(self._done)


cdef class Flush(Job):
    """See `flush_job` in `runs.py`."""

    cdef int _fd

    def __cinit__(self, int fd):
        self._fd = fd

    cdef bint perform(self, const int *given_up) noexcept nogil:
        cdef int failed = fdatasync(self._fd)
        while failed and errno == EINTR and not is_set(given_up):
            failed = fdatasync(self._fd)
        if failed:
            self.error = errno
        return not failed


def flush_job(int fd):
    """See `runs.py`."""
    return Flush(fd)


cdef class WriteBack(Job):
    """See `write_back_job` in `runs.py`."""

    cdef int _fd

    def __cinit__(self, int fd):
        self._fd = fd

    cdef bint perform(self, const int *given_up) noexcept nogil:
        sync_file_range(self._fd, 0, 0, SYNC_FILE_RANGE_WRITE)
        return True


def write_back_job(int fd):
    """See `runs.py`."""
    return WriteBack(fd)


def write_job(int fd, int flags, data, run, Py_ssize_t count, rest, bint in_turn):
    """See `runs.py`."""
    return Transfer(True, in_turn, fd, flags, data, run, count, rest)


def fetch_job(int fd, into, run, Py_ssize_t count, rest):
    """See `runs.py`."""
    return Transfer(False, False, fd, 0, into, run, count, rest)


def write_run(int fd, int flags, data, run, Py_ssize_t count):
    """See `runs.py`."""
    cdef Py_buffer source
    PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
    try:
        return _carry(<Call> pwritev2, fd, flags, &source, run, count)
    finally:
        PyBuffer_Release(&source)


cdef enum:
    DEPTH = 64  # requests under way together
    IDLE_MAX = 32

# Contexts that nobody uses: to make or destroy one takes milliseconds. They are the process's, not its child's.
cdef aio_context_t _idle[IDLE_MAX]
cdef int _idle_count = 0


cdef int _submit(
    aio_context_t context, int opcode, int fd, int flags, char *data, Write *request, int count
) noexcept nogil:
    """Have up to DEPTH requests under way together, and wait for all; how many, from the front, were whole."""
    cdef iocb requests[DEPTH]
    cdef iocb *each[DEPTH]
    cdef iovec parts[DEPTH]
    cdef io_event events[DEPTH]
    cdef bint whole[DEPTH]
    cdef long number, begun = 0, ended = 0
    cdef int at
    memset(requests, 0, sizeof(requests))
    memset(whole, 0, sizeof(whole))
    for at in range(count):
        parts[at].iov_base, parts[at].iov_len = data + request[at].position, request[at].length
        requests[at].aio_data = at
        requests[at].aio_lio_opcode = opcode
        requests[at].aio_fildes = fd
        requests[at].aio_buf = <uint64_t> &parts[at]
        requests[at].aio_nbytes = 1
        requests[at].aio_offset = request[at].offset
        requests[at].aio_rw_flags = flags
        each[at] = &requests[at]
    while begun < count:
        number = io_submit(context, count - begun, each + begun)
        if number <= 0:
            break
        begun += number
    while ended < begun:  # however it goes: the memory is the disk's until then
        number = io_getevents(context, 1, begun - ended, events)
        for at in range(number):
            whole[events[at].data] = events[at].res == <int64_t> request[events[at].data].length
        if number > 0:
            ended += number
    at = 0
    while at < begun and whole[at]:
        at += 1
    return at


cdef Py_ssize_t _together(int opcode, int fd, int flags, Py_buffer *data, run, Py_ssize_t count) except -1:
    global _idle_count
    cdef Py_buffer requests
    cdef aio_context_t context = 0
    cdef Py_ssize_t at = 0, taken, part
    cdef Write *request
    PyObject_GetBuffer(run, &requests, PyBUF_SIMPLE)
    try:
        count = _checked(&requests, count)
        request = <Write *> requests.buf
        _require_inside(request, count, data)
        if _idle_count:
            _idle_count -= 1
            context = _idle[_idle_count]
        elif io_setup(DEPTH, &context):
            return 0
        at = 0
        with nogil:
            while at < count:
                part = min(DEPTH, count - at)
                taken = _submit(context, opcode, fd, flags, <char *> data.buf, request + at, part)
                at += taken
                if taken < part:
                    break
        if _idle_count < IDLE_MAX:
            _idle[_idle_count] = context
            _idle_count += 1
        else:
            io_destroy(context)
        return at
    finally:
        PyBuffer_Release(&requests)


def write_together(int fd, int flags, data, run, Py_ssize_t count):
    """See `runs.py`."""
    cdef Py_buffer source
    PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
    try:
        return _together(IOCB_CMD_PWRITEV, fd, flags, &source, run, count)
    finally:
        PyBuffer_Release(&source)


def read_together(int fd, into, run, Py_ssize_t count):
    """See `runs.py`."""
    cdef Py_buffer target
    PyObject_GetBuffer(into, &target, PyBUF_WRITABLE)
    try:
        return _together(IOCB_CMD_PREADV, fd, 0, &target, run, count)
    finally:
        PyBuffer_Release(&target)


def read_run(int fd, int flags, into, run, Py_ssize_t count):
    """See `runs.py`."""
    cdef Py_buffer target
    PyObject_GetBuffer(into, &target, PyBUF_WRITABLE)
    try:
        return _carry(<Call> preadv2, fd, flags, &target, run, count)
    finally:
        PyBuffer_Release(&target)


def same(one, other):
    """See `runs.py`."""
    cdef Py_buffer ours, theirs
    cdef bint equal
    PyObject_GetBuffer(one, &ours, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(other, &theirs, PyBUF_SIMPLE)
        try:
            if ours.len != theirs.len:
                return False
            with nogil:
                equal = memcmp(ours.buf, theirs.buf, ours.len) == 0
            return equal
        finally:
            PyBuffer_Release(&theirs)
    finally:
        PyBuffer_Release(&ours)
