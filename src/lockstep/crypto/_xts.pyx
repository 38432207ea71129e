# cython: language_level=3
"""AES-XTS over runs of disk sectors, by libgcrypt.

Rules
    * One sector is one XTS data unit. Its tweak is dm-crypt's `plain64`: the sector's position as a
      little-endian 64-bit number, zero padded to 16 bytes. The position counts 512-byte units from the
      start of the data segment, whatever the sector size: with 4096-byte sectors it advances by 8.
    * Arguments are checked before the first byte is written. After an OSError (libgcrypt refused) the destination's
      content is undefined.
    * Every return code of libgcrypt is checked. Its error text is passed on; keys and data never are.

Threads
    The GIL is released round long runs, so several threads may be inside one `Xts`. A libgcrypt context
    holds the current tweak and so serves one thread at a time: each call takes one from a list of idle
    contexts (the list changes only under the GIL) and puts it back. When the list is empty, another is made.

Secrets
    libgcrypt wipes a context when it is closed. The caller's key is only read; a copy of it, for further contexts, is
    wiped with the object.

Writing
    `encrypt_run` goes on to write the ciphertext of a run (lockstep/disk/runs.py), which the caller has no other use
    for: a buffer, a call and a view of it less for each write. It gives up the GIL once for all of them.

Speed
    Sectors are short, so what counts beside AES is the cost of a new tweak. On a processor that has VAES, libgcrypt 1.10
    encrypts 512-byte sectors at twice the rate of libcrypto 3.0, and 4096-byte ones at one and a half times; without,
    1.5 times and the same.
"""

from cython cimport no_gc_clear
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from libc.errno cimport EINTR, EIO, ENOMEM, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, memset

from lockstep._work cimport Job, is_set
from lockstep.run cimport Write, is_inside


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev2(int fd, const iovec *parts, int count, int64_t offset, int flags)
    ssize_t preadv2(int fd, const iovec *parts, int count, int64_t offset, int flags)

cdef extern from "fcntl.h" nogil:
    int POSIX_FADV_DONTNEED
    int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)

cdef extern from "string.h" nogil:
    void explicit_bzero(void *memory, size_t size)

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef extern from "gcrypt.h" nogil:
    ctypedef unsigned int gcry_error_t
    ctypedef struct gcry_cipher_handle:
        pass
    ctypedef gcry_cipher_handle *gcry_cipher_hd_t
    enum:
        GCRY_CIPHER_AES128
        GCRY_CIPHER_AES256
        GCRY_CIPHER_MODE_XTS
        GCRYCTL_DISABLE_SECMEM
        GCRYCTL_INITIALIZATION_FINISHED
        GCRYCTL_INITIALIZATION_FINISHED_P
    const char *gcry_check_version(const char *least)
    gcry_error_t gcry_control(int command, ...)
    const char *gcry_strerror(gcry_error_t error)
    gcry_error_t gcry_cipher_open(gcry_cipher_hd_t *context, int algorithm, int mode, unsigned int flags)
    void gcry_cipher_close(gcry_cipher_hd_t context)
    gcry_error_t gcry_cipher_setkey(gcry_cipher_hd_t context, const void *key, size_t key_bytes)
    gcry_error_t gcry_cipher_setiv(gcry_cipher_hd_t context, const void *iv, size_t iv_bytes)
    gcry_error_t gcry_cipher_encrypt(gcry_cipher_hd_t context, void *out, size_t out_bytes, const void *data, size_t bytes)
    gcry_error_t gcry_cipher_decrypt(gcry_cipher_hd_t context, void *out, size_t out_bytes, const void *data, size_t bytes)


cdef enum:
    UNIT_BYTES = 512  # what plain64 counts in
    IDLE_MAX = 16  # contexts kept: as many as there are jobs for one disk, as a rule
    # Shorter runs keep the GIL. Whoever gives it up while another thread runs Python code waits the switch
    # interval (5 ms) to get it back: measured at 32 KiB, 0.01 instead of 1.4 GB/s. What it buys is a second
    # processor (two threads: 5.0 instead of 3.1 GB/s), which counts for the large requests that are
    # encrypted in worker threads, and not for the small ones that the event loop encrypts itself.
    GIL_RELEASE_BYTES = 131072
    PIECE_BYTES = 262144  # what is encrypted before it is written
    CACHE_LINE_BYTES = 64  # what begins with one is copied to the page cache faster than what does not (by 6 %)


cdef object _failure(str what, gcry_error_t error):
    return OSError(EIO, f"{what}: {gcry_strerror(error).decode('ascii', 'replace')}")


# Keys are in ordinary memory, as they are everywhere else in the process: `serve --mlock` locks all of it.
if gcry_check_version(b"1.8.0") == NULL:
    # An ImportError, so that the package falls back on its other implementation.
    raise ImportError("this libgcrypt is too old for AES-XTS")
if not gcry_control(GCRYCTL_INITIALIZATION_FINISHED_P):
    gcry_control(GCRYCTL_DISABLE_SECMEM, 0)
    gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0)

LIBRARY = f"libgcrypt {gcry_check_version(NULL).decode()}"


ctypedef gcry_error_t (*Direction)(gcry_cipher_hd_t, void *, size_t, const void *, size_t) noexcept nogil


cdef gcry_error_t _crypt_sectors(
    Direction direction, gcry_cipher_hd_t context, uint64_t position, int sector_bytes, const unsigned char *src,
    unsigned char *dst, Py_ssize_t count
) noexcept nogil:
    """Run `count` sectors through the context; 0, or why libgcrypt failed."""
    cdef unsigned char iv[16]
    cdef gcry_error_t error = 0
    cdef int i
    for i in range(8, 16):
        iv[i] = 0
    while count > 0 and not error:
        for i in range(8):
            iv[i] = <unsigned char> (position >> (8 * i))
        error = gcry_cipher_setiv(context, iv, sizeof(iv)) or direction(context, dst, sector_bytes, src, sector_bytes)
        position += sector_bytes // UNIT_BYTES
        src += sector_bytes
        dst += sector_bytes
        count -= 1
    return error


cdef struct Run:
    # Writes to be encrypted, and what became of them.
    gcry_cipher_hd_t context
    int sector_bytes
    int fd
    int flags
    int64_t data_offset
    uint64_t first_iv
    Py_buffer source
    Py_buffer writes
    Py_ssize_t count
    Py_ssize_t longest
    Py_ssize_t done
    gcry_error_t failure  # libgcrypt's
    int error  # of the last write


cdef void _write_run(Run *run, const int *given_up) noexcept nogil:
    cdef Write *write = <Write *> run.writes.buf
    cdef void *encrypted = NULL
    if posix_memalign(&encrypted, CACHE_LINE_BYTES, min(run.longest, <Py_ssize_t> PIECE_BYTES) + 1):
        run.error = ENOMEM
        return
    while run.done < run.count and _write_one(run, &write[run.done], <unsigned char *> encrypted, given_up):
        run.done += 1
    free(encrypted)


cdef bint _write_one(Run *run, Write *write, unsigned char *encrypted, const int *given_up) noexcept nogil:
    """Encrypt and write, a piece at a time, each while it is in the processor's cache; return whether that was all."""
    cdef uint64_t at = 0, offset
    cdef ssize_t written
    cdef iovec part
    part.iov_base = encrypted
    while at < write.length:
        offset = write.offset + at
        part.iov_len = min(write.length - at, <uint64_t> PIECE_BYTES)
        if is_set(given_up):
            return False
        run.failure = _crypt_sectors(
            <Direction> gcry_cipher_encrypt, run.context, run.first_iv + offset // UNIT_BYTES, run.sector_bytes,
            <unsigned char *> run.source.buf + write.position + at, encrypted,
            <Py_ssize_t> part.iov_len // run.sector_bytes
        )
        if run.failure or is_set(given_up):  # then the data may have been another's already
            return False
        written = pwritev2(run.fd, &part, 1, run.data_offset + <int64_t> offset, run.flags)
        if written < 0 and errno != EINTR:
            run.error = errno
        if written != <ssize_t> part.iov_len:
            return False
        at += part.iov_len
    return True


cdef class Xts:
    """AES-XTS with one key and one sector size. Safe to share between threads."""

    cdef int _sector_bytes
    cdef unsigned char _key[64]
    cdef Py_ssize_t _key_bytes
    cdef gcry_cipher_hd_t _idle[IDLE_MAX]
    cdef int _idle_count

    def __cinit__(self, key, sector_bytes):
        cdef Py_buffer view
        if sector_bytes not in (512, 1024, 2048, 4096):
            raise ValueError("sector_bytes must be 512, 1024, 2048 or 4096")
        self._sector_bytes = sector_bytes
        PyObject_GetBuffer(key, &view, PyBUF_SIMPLE)
        try:
            if view.len not in (32, 64):
                raise ValueError("an XTS key has 32 or 64 bytes")
            memcpy(self._key, view.buf, view.len)
            self._key_bytes = view.len
        finally:
            PyBuffer_Release(&view)
        # Equal halves make XTS insecure (NIST SP 800-38E via FIPS 140 IG C.I); libgcrypt refuses them in FIPS mode only.
        if self._halves_are_equal():
            raise ValueError("the two halves of an XTS key must differ")
        self._give_back(self._borrow(), 0)  # what it refuses, it refuses now

    cdef bint _halves_are_equal(self) noexcept:
        """Look at every byte, however many differ: the time it takes says nothing of them."""
        cdef Py_ssize_t half = self._key_bytes // 2, i
        cdef unsigned char different = 0
        for i in range(half):
            different |= self._key[i] ^ self._key[half + i]
        return different == 0

    def __dealloc__(self):
        explicit_bzero(self._key, sizeof(self._key))
        for i in range(self._idle_count):
            gcry_cipher_close(self._idle[i])

    def __reduce__(self):
        raise TypeError("a key does not leave its process")

    cdef gcry_cipher_hd_t _borrow(self) except NULL:
        cdef gcry_cipher_hd_t context = NULL
        cdef int algorithm = GCRY_CIPHER_AES128 if self._key_bytes == 32 else GCRY_CIPHER_AES256
        cdef gcry_error_t error
        if self._idle_count > 0:
            self._idle_count -= 1
            return self._idle[self._idle_count]
        error = gcry_cipher_open(&context, algorithm, GCRY_CIPHER_MODE_XTS, 0)
        if not error:
            error = gcry_cipher_setkey(context, self._key, self._key_bytes)
        if error:
            gcry_cipher_close(context)
            raise _failure("cannot set the XTS key", error)
        return context

    cdef void _give_back(self, gcry_cipher_hd_t context, gcry_error_t failure) noexcept:
        """Keep a context for the next one, or close it: when it failed, or is one of too many. NULL is none."""
        if context != NULL and not failure and self._idle_count < IDLE_MAX:
            self._idle[self._idle_count] = context
            self._idle_count += 1
        else:
            gcry_cipher_close(context)

    cdef int _crypt(self, Direction direction, first_iv, Py_buffer *src, Py_buffer *dst) except -1:
        cdef const unsigned char *source = <const unsigned char *> src.buf
        cdef unsigned char *target = <unsigned char *> dst.buf
        cdef Py_ssize_t size = src.len
        cdef Py_ssize_t count = size // self._sector_bytes
        cdef uint64_t position
        cdef gcry_cipher_hd_t context
        cdef gcry_error_t error

        if size != dst.len:
            raise ValueError("src and dst must have the same length")
        if size % self._sector_bytes:
            raise ValueError("the length must be a multiple of the sector size")
        try:
            position = PyNumber_Index(first_iv)  # without it, C would truncate a float
        except OverflowError:
            raise ValueError("first_iv must be between 0 and 2**64 - 1") from None
        if count == 0:
            return 0
        if <uint64_t> (count - 1) > (UINT64_MAX - position) // (self._sector_bytes // UNIT_BYTES):
            raise ValueError("the last sector's position does not fit in 64 bits")

        # libgcrypt takes identical or disjoint memory, and nothing between.
        if source != target and (<uintptr_t> source) < (<uintptr_t> target) + size \
                and (<uintptr_t> target) < (<uintptr_t> source) + size:
            memmove(target, source, size)
            source = target

        context = self._borrow()
        if size < GIL_RELEASE_BYTES:
            error = _crypt_sectors(direction, context, position, self._sector_bytes, source, target, count)
        else:
            with nogil:
                error = _crypt_sectors(direction, context, position, self._sector_bytes, source, target, count)
        self._give_back(context, error)
        if error:
            raise _failure("XTS failed", error)
        return 0

    cdef int _with_buffers(self, Direction direction, first_iv, src, dst) except -1:
        # Plain buffer requests: a typed memoryview would cost more than a 512-byte sector's encryption.
        cdef Py_buffer source, target
        PyObject_GetBuffer(src, &source, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(dst, &target, PyBUF_WRITABLE)
            try:
                self._crypt(direction, first_iv, &source, &target)
            finally:
                PyBuffer_Release(&target)
        finally:
            PyBuffer_Release(&source)
        return 0

    def encrypt_into(self, first_iv, src, dst):
        """Encrypt the sectors in `src` into `dst`. See the stub file for units and errors."""
        self._with_buffers(<Direction> gcry_cipher_encrypt, first_iv, src, dst)

    cdef int _begin(self, Run *run, data, writes) except -1:
        """Check a run, and take what it needs until `_end`."""
        cdef Write *write
        cdef Py_ssize_t at
        PyObject_GetBuffer(data, &run.source, PyBUF_SIMPLE)
        PyObject_GetBuffer(writes, &run.writes, PyBUF_SIMPLE)
        if run.count < 0 or <size_t> run.count * sizeof(Write) > <size_t> run.writes.len:
            raise ValueError("the run is shorter than that")
        write = <Write *> run.writes.buf
        for at in range(run.count):
            if (write[at].length | write[at].offset) % self._sector_bytes:
                raise ValueError("the length must be a multiple of the sector size")
            if not is_inside(write[at].position, write[at].length, run.source.len):
                raise ValueError("the data lies outside of the buffer")
            run.longest = max(run.longest, <Py_ssize_t> write[at].length)
        run.sector_bytes = self._sector_bytes
        run.context = self._borrow()
        return 0

    cdef void _end(self, Run *run) noexcept:
        self._give_back(run.context, run.failure)
        run.context = NULL
        PyBuffer_Release(&run.source)
        PyBuffer_Release(&run.writes)

    def encrypt_run(self, int fd, int64_t data_offset, uint64_t first_iv, data, run, Py_ssize_t count, int flags):
        """Encrypt and write the writes of a run, each. See the stub file for units and errors."""
        cdef Run writes
        cdef int never = 0
        memset(&writes, 0, sizeof(writes))
        writes.fd, writes.flags, writes.count = fd, flags, count
        writes.data_offset, writes.first_iv = data_offset, first_iv
        try:
            self._begin(&writes, data, run)
            with nogil:
                _write_run(&writes, &never)
            return writes.done
        finally:
            self._end(&writes)

    def encrypt_job(
        self, int fd, int64_t data_offset, uint64_t first_iv, data, run, Py_ssize_t count, int flags, rest, bint in_turn
    ):
        """Return `encrypt_run` as a job for a thread. See the stub file."""
        return Encryption(self, fd, data_offset, first_iv, data, run, count, flags, rest, in_turn)

    def decrypt_job(self, int fd, int64_t offset, uint64_t first_iv, into, bint from_medium, rest):
        """Return what reads and decrypts sectors as a job for a thread. See the stub file."""
        return Decryption(self, fd, offset, first_iv, into, from_medium, rest)

    def decrypt_into(self, first_iv, src, dst):
        """Decrypt the sectors in `src` into `dst`. See the stub file for units and errors."""
        self._with_buffers(<Direction> gcry_cipher_decrypt, first_iv, src, dst)


@no_gc_clear  # it would forget whose the buffers are
cdef class Encryption(Job):
    """A run of writes to be encrypted and written; see `Xts.encrypt_job`."""

    cdef Xts _xts
    cdef Run _run
    cdef object _rest

    def __cinit__(
        self, Xts xts, int fd, int64_t data_offset, uint64_t first_iv, data, run, Py_ssize_t count, int flags, rest,
        bint in_turn
    ):
        self._xts, self._rest, self.in_turn = xts, rest, in_turn
        self._run.fd, self._run.flags, self._run.count = fd, flags, count
        self._run.data_offset, self._run.first_iv = data_offset, first_iv
        xts._begin(&self._run, data, run)

    def __dealloc__(self):
        self.release()

    cdef int release(self) except -1:
        if self._xts is not None:
            self._xts._end(&self._run)
        return 0

    cdef bint perform(self, const int *given_up) noexcept nogil:
        _write_run(&self._run, given_up)
        self.error = self._run.error
        return self._run.done == self._run.count

    cdef object finish(self):
        if self._run.failure:
            raise _failure("XTS failed", self._run.failure)
        return self._rest(self._run.done)


@no_gc_clear  # it would forget whose the buffer is
cdef class Decryption(Job):
    """Sectors to be read and decrypted; see `Xts.decrypt_job`."""

    cdef Xts _xts
    cdef gcry_cipher_hd_t _context
    cdef Py_buffer _into
    cdef int _fd
    cdef int64_t _offset
    cdef uint64_t _first_iv
    cdef bint _from_medium
    cdef gcry_error_t _failure
    cdef object _rest

    def __cinit__(self, Xts xts, int fd, int64_t offset, uint64_t first_iv, into, bint from_medium, rest):
        self._xts, self._from_medium, self._rest = xts, from_medium, rest
        self._fd, self._offset, self._first_iv = fd, offset, first_iv
        PyObject_GetBuffer(into, &self._into, PyBUF_WRITABLE)
        if self._into.len % xts._sector_bytes:
            raise ValueError("the length must be a multiple of the sector size")
        self._context = xts._borrow()

    def __dealloc__(self):
        self.release()

    cdef int release(self) except -1:
        if self._xts is not None:
            self._xts._give_back(self._context, self._failure)
            self._context = NULL
        PyBuffer_Release(&self._into)
        return 0

    cdef bint perform(self, const int *given_up) noexcept nogil:
        cdef unsigned char *into = <unsigned char *> self._into.buf
        cdef Py_ssize_t at = 0
        cdef ssize_t got
        cdef iovec part
        if self._from_medium:
            posix_fadvise(self._fd, self._offset, self._into.len, POSIX_FADV_DONTNEED)
        while at < self._into.len and not is_set(given_up):
            part.iov_base = into + at
            part.iov_len = min(self._into.len - at, <Py_ssize_t> PIECE_BYTES)
            got = preadv2(self._fd, &part, 1, self._offset + at, 0)
            if got < 0 and errno != EINTR:
                self.error = errno
            if got != <ssize_t> part.iov_len:
                return False
            self._failure = _crypt_sectors(
                <Direction> gcry_cipher_decrypt, self._context, self._first_iv + at // UNIT_BYTES,
                self._xts._sector_bytes, into + at, into + at, <Py_ssize_t> part.iov_len // self._xts._sector_bytes)
            if self._failure:
                return False
            at += part.iov_len
        return at == self._into.len

    cdef object finish(self):
        if self._failure:
            raise _failure("XTS failed", self._failure)
        return self._rest()
