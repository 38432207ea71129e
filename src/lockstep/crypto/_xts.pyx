# cython: language_level=3
"""AES-XTS over runs of disk sectors, by libcrypto. The one native part of Lockstep.

Rules
    * One sector is one XTS data unit. Its tweak is dm-crypt's `plain64`: the sector's position as a
      little-endian 64-bit number, zero padded to 16 bytes. The position counts 512-byte units from the
      start of the data segment, whatever the sector size: with 4096-byte sectors it advances by 8.
    * Arguments are checked before the first byte is written. After a RuntimeError (libcrypto refused)
      the destination's content is undefined.
    * Every return code of libcrypto is checked. Its error text is passed on; keys and data never are.

Threads
    The GIL is released round long runs, so several threads may be inside one `Xts`. A libcrypto context
    holds the current tweak and so serves one thread at a time: each call takes one from a list of idle
    contexts (a list changes only under the GIL) and puts it back. When the list is empty, a copy of the
    template is made; the template itself never encrypts.

Secrets
    libcrypto cleanses a context's key schedule when the context is freed. The caller's key is only read.

Writing
    `encrypt_to` goes on to write the ciphertext, which the caller has no other use for: a buffer, a call and a
    view of it less for each write. `encrypt_run` does so for a run of small ones (lockstep/disk/runs.py), and gives
    up the GIL once for all of them.

Speed, for 4 KiB as 8 sectors of 512 bytes
    A new tweak by EVP_CipherInit_ex, EVP_CipherInit_ex2 or EVP_EncryptInit_ex2, and the data through
    EVP_CipherUpdate or the discouraged EVP_Cipher: all the same within 1 %, so the documented current
    pair is used. Building XTS here from bulk ECB (one call for all tweaks, one for all blocks) gained
    12 % with 512-byte sectors and lost 40 % with 4096: not worth a block mode of our own.
"""

from cython cimport no_gc_clear
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_SetFromErrno
from cpython.number cimport PyNumber_Index
from libc.errno cimport EINTR, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memmove, memset

from lockstep._work cimport Job
from lockstep.run cimport Write


cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev2(int fd, const iovec *parts, int count, int64_t offset, int flags)
    ssize_t preadv2(int fd, const iovec *parts, int count, int64_t offset, int flags)

cdef extern from "fcntl.h" nogil:
    int POSIX_FADV_DONTNEED
    int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)

cdef extern from "openssl/err.h" nogil:
    unsigned long ERR_get_error()
    void ERR_clear_error()
    void ERR_error_string_n(unsigned long code, char *text, size_t size)

cdef extern from "openssl/crypto.h" nogil:
    int CRYPTO_memcmp(const void *a, const void *b, size_t size)

cdef extern from "openssl/evp.h" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass
    EVP_CIPHER *EVP_CIPHER_fetch(void *library, const char *name, const char *properties)
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context)
    int EVP_CIPHER_CTX_copy(EVP_CIPHER_CTX *to, const EVP_CIPHER_CTX *source)
    int EVP_CipherInit_ex2(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, const unsigned char *key,
                           const unsigned char *iv, int encrypt, void *params)
    int EVP_CipherUpdate(EVP_CIPHER_CTX *context, unsigned char *out, int *out_bytes,
                         const unsigned char *data, int data_bytes)


cdef enum:
    UNIT_BYTES = 512  # what plain64 counts in
    IDLE_MAX = 16  # contexts kept per direction: as many as there are jobs for one disk, as a rule
    # Shorter runs keep the GIL. Whoever gives it up while another thread runs Python code waits the switch
    # interval (5 ms) to get it back: measured at 32 KiB, 0.01 instead of 1.4 GB/s. What it buys is a second
    # processor (two threads: 5.0 instead of 3.1 GB/s), which counts for the large requests that are
    # encrypted in worker threads, and not for the small ones that the event loop encrypts itself.
    GIL_RELEASE_BYTES = 131072
    PIECE_BYTES = 262144  # what is encrypted before it is written
    DECRYPT = 0  # these two are libcrypto's values, and our indices
    ENCRYPT = 1


cdef object _openssl_error(str what):
    """RuntimeError with the oldest reason in this thread's queue, which is the cause; empties the queue."""
    cdef char text[256]
    cdef unsigned long code = ERR_get_error()
    ERR_clear_error()
    if code == 0:
        return RuntimeError(f"{what}: OpenSSL gives no reason")
    ERR_error_string_n(code, text, sizeof(text))
    return RuntimeError(f"{what}: {(<bytes>text).decode('ascii', 'replace')}")


# Looked up once for the life of the process: a fetch walks the provider's tables under a lock.
cdef EVP_CIPHER *AES_128_XTS = EVP_CIPHER_fetch(NULL, b"AES-128-XTS", NULL)
cdef EVP_CIPHER *AES_256_XTS = EVP_CIPHER_fetch(NULL, b"AES-256-XTS", NULL)
if AES_128_XTS == NULL or AES_256_XTS == NULL:
    # An ImportError, so that the package falls back on its other implementation.
    raise ImportError(str(_openssl_error("libcrypto has no AES-XTS")))


cdef int _crypt_sectors(EVP_CIPHER_CTX *context, uint64_t position, int sector_bytes, const unsigned char *src,
                        unsigned char *dst, Py_ssize_t count) noexcept nogil:
    """Run `count` sectors through the context, in its direction. 1 done, 0 libcrypto failed."""
    cdef unsigned char iv[16]
    cdef int done_bytes, i
    for i in range(8, 16):
        iv[i] = 0
    while count > 0:
        for i in range(8):
            iv[i] = <unsigned char> (position >> (8 * i))
        # -1 and the NULLs: keep cipher, key schedule and direction, take the new tweak only.
        if EVP_CipherInit_ex2(context, NULL, NULL, iv, -1, NULL) != 1:
            return 0
        if EVP_CipherUpdate(context, dst, &done_bytes, src, sector_bytes) != 1 or done_bytes != sector_bytes:
            return 0
        position += sector_bytes // UNIT_BYTES
        src += sector_bytes
        dst += sector_bytes
        count -= 1
    return 1


cdef struct Run:
    # Writes to be encrypted, and what became of them.
    EVP_CIPHER_CTX *context
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
    bint failed  # by libcrypto
    int error  # of the last write


cdef void _write_run(Run *run, const int *given_up) noexcept nogil:
    cdef Write *write = <Write *> run.writes.buf
    cdef unsigned char *encrypted = <unsigned char *> malloc(min(run.longest, <Py_ssize_t> PIECE_BYTES) + 1)
    if encrypted != NULL:
        while run.done < run.count and _write_one(run, &write[run.done], encrypted, given_up):
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
        if given_up[0]:
            return False
        if not _crypt_sectors(
            run.context, run.first_iv + offset // UNIT_BYTES, run.sector_bytes,
            <unsigned char *> run.source.buf + write.position + at, encrypted,
            <Py_ssize_t> part.iov_len // run.sector_bytes
        ):
            run.failed = True
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
    cdef EVP_CIPHER_CTX *_template[2]
    cdef EVP_CIPHER_CTX *_idle[2][IDLE_MAX]
    cdef int _idle_count[2]

    def __cinit__(self, key, sector_bytes):
        cdef Py_buffer view
        if sector_bytes not in (512, 1024, 2048, 4096):
            raise ValueError("sector_bytes must be 512, 1024, 2048 or 4096")
        self._sector_bytes = sector_bytes
        PyObject_GetBuffer(key, &view, PyBUF_SIMPLE)
        try:
            if view.len not in (32, 64):
                raise ValueError("an XTS key has 32 or 64 bytes")
            # Equal halves make XTS insecure (NIST SP 800-38E via FIPS 140 IG C.I). libcrypto's providers
            # disagree on whether they refuse them when decrypting, so it is refused here.
            if CRYPTO_memcmp(view.buf, <unsigned char *> view.buf + view.len // 2, view.len // 2) == 0:
                raise ValueError("the two halves of an XTS key must differ")
            for direction in (DECRYPT, ENCRYPT):
                self._make_template(direction, <unsigned char *> view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    cdef int _make_template(self, int direction, const unsigned char *key, Py_ssize_t key_bytes) except -1:
        cdef EVP_CIPHER *cipher = AES_128_XTS if key_bytes == 32 else AES_256_XTS
        self._template[direction] = EVP_CIPHER_CTX_new()
        if self._template[direction] == NULL:
            raise MemoryError
        if EVP_CipherInit_ex2(self._template[direction], cipher, key, NULL, direction, NULL) != 1:
            raise _openssl_error("cannot set the XTS key")
        return 0

    def __dealloc__(self):
        # Also runs when __cinit__ raised; then some pointers are still NULL, which libcrypto ignores.
        for direction in range(2):
            EVP_CIPHER_CTX_free(self._template[direction])
            for i in range(self._idle_count[direction]):
                EVP_CIPHER_CTX_free(self._idle[direction][i])

    def __reduce__(self):
        raise TypeError("a key does not leave its process")

    cdef EVP_CIPHER_CTX *_borrow(self, int direction) except NULL:
        cdef EVP_CIPHER_CTX *context
        if self._idle_count[direction] > 0:
            self._idle_count[direction] -= 1
            return self._idle[direction][self._idle_count[direction]]
        context = EVP_CIPHER_CTX_new()
        if context == NULL:
            raise MemoryError
        if EVP_CIPHER_CTX_copy(context, self._template[direction]) != 1:
            EVP_CIPHER_CTX_free(context)
            raise _openssl_error("cannot copy the XTS context")
        return context

    cdef void _give_back(self, int direction, EVP_CIPHER_CTX *context) noexcept:
        if self._idle_count[direction] < IDLE_MAX:
            self._idle[direction][self._idle_count[direction]] = context
            self._idle_count[direction] += 1
        else:
            EVP_CIPHER_CTX_free(context)

    cdef int _crypt(self, int direction, first_iv, Py_buffer *src, Py_buffer *dst) except -1:
        cdef const unsigned char *source = <const unsigned char *> src.buf
        cdef unsigned char *target = <unsigned char *> dst.buf
        cdef Py_ssize_t size = src.len
        cdef Py_ssize_t count = size // self._sector_bytes
        cdef uint64_t position
        cdef EVP_CIPHER_CTX *context
        cdef int done = 0

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

        # libcrypto takes identical or disjoint memory, and refuses what lies between.
        if source != target and (<uintptr_t> source) < (<uintptr_t> target) + size \
                and (<uintptr_t> target) < (<uintptr_t> source) + size:
            memmove(target, source, size)
            source = target

        context = self._borrow(direction)
        try:
            if size < GIL_RELEASE_BYTES:
                done = _crypt_sectors(context, position, self._sector_bytes, source, target, count)
            else:
                with nogil:
                    done = _crypt_sectors(context, position, self._sector_bytes, source, target, count)
            if not done:
                raise _openssl_error("XTS failed")
        finally:
            if done:
                self._give_back(direction, context)
            else:
                EVP_CIPHER_CTX_free(context)
        return 0

    cdef int _with_buffers(self, int direction, first_iv, src, dst) except -1:
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
        self._with_buffers(ENCRYPT, first_iv, src, dst)

    def encrypt_to(self, int fd, int64_t offset, first_iv, src, int flags):
        """Encrypt the sectors in `src` and write them to a file. See the stub file for units and errors."""
        cdef Py_buffer source, target
        cdef iovec part
        cdef ssize_t written
        PyObject_GetBuffer(src, &source, PyBUF_SIMPLE)
        target.len = source.len
        target.buf = malloc(source.len + 1)  # + 1: never NULL for want of length
        try:
            if target.buf == NULL:
                raise MemoryError
            self._crypt(ENCRYPT, first_iv, &source, &target)
            part.iov_base, part.iov_len = target.buf, target.len
            with nogil:  # a disk may hang
                written = pwritev2(fd, &part, 1, offset, flags)
            if written < 0:
                PyErr_SetFromErrno(OSError)
            return written
        finally:
            free(target.buf)
            PyBuffer_Release(&source)

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
            if write[at].position + write[at].length > <uint64_t> run.source.len:
                raise ValueError("the data lies outside of the buffer")
            run.longest = max(run.longest, <Py_ssize_t> write[at].length)
        run.sector_bytes = self._sector_bytes
        run.context = self._borrow(ENCRYPT)
        return 0

    cdef void _hand_back(self, int direction, EVP_CIPHER_CTX **borrowed, bint failed) noexcept:
        cdef EVP_CIPHER_CTX *context = borrowed[0]
        borrowed[0] = NULL
        if context != NULL and failed:
            EVP_CIPHER_CTX_free(context)
        elif context != NULL:
            self._give_back(direction, context)

    cdef void _end(self, Run *run) noexcept:
        self._hand_back(ENCRYPT, &run.context, run.failed)
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
            if writes.failed:
                raise _openssl_error("XTS failed")
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
        self._with_buffers(DECRYPT, first_iv, src, dst)


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
        if self._run.failed:
            raise _openssl_error("XTS failed")
        return self._rest(self._run.done)


@no_gc_clear  # it would forget whose the buffer is
cdef class Decryption(Job):
    """Sectors to be read and decrypted; see `Xts.decrypt_job`."""

    cdef Xts _xts
    cdef EVP_CIPHER_CTX *_context
    cdef Py_buffer _into
    cdef int _fd
    cdef int64_t _offset
    cdef uint64_t _first_iv
    cdef bint _from_medium
    cdef bint _failed
    cdef object _rest

    def __cinit__(self, Xts xts, int fd, int64_t offset, uint64_t first_iv, into, bint from_medium, rest):
        self._xts, self._from_medium, self._rest = xts, from_medium, rest
        self._fd, self._offset, self._first_iv = fd, offset, first_iv
        PyObject_GetBuffer(into, &self._into, PyBUF_WRITABLE)
        if self._into.len % xts._sector_bytes:
            raise ValueError("the length must be a multiple of the sector size")
        self._context = xts._borrow(DECRYPT)

    def __dealloc__(self):
        self.release()

    cdef int release(self) except -1:
        if self._xts is not None:
            self._xts._hand_back(DECRYPT, &self._context, self._failed)
        PyBuffer_Release(&self._into)
        return 0

    cdef bint perform(self, const int *given_up) noexcept nogil:
        cdef unsigned char *into = <unsigned char *> self._into.buf
        cdef Py_ssize_t at = 0
        cdef ssize_t got
        cdef iovec part
        if self._from_medium:
            posix_fadvise(self._fd, self._offset, self._into.len, POSIX_FADV_DONTNEED)
        while at < self._into.len and not given_up[0]:
            part.iov_base = into + at
            part.iov_len = min(self._into.len - at, <Py_ssize_t> PIECE_BYTES)
            got = preadv2(self._fd, &part, 1, self._offset + at, 0)
            if got < 0 and errno != EINTR:
                self.error = errno
            if got != <ssize_t> part.iov_len:
                return False
            self._failed = not _crypt_sectors(
                self._context, self._first_iv + at // UNIT_BYTES, self._xts._sector_bytes, into + at, into + at,
                <Py_ssize_t> part.iov_len // self._xts._sector_bytes)
            if self._failed:
                return False
            at += part.iov_len
        return at == self._into.len

    cdef object finish(self):
        if self._failed:
            raise _openssl_error("XTS failed")
        return self._rest()
