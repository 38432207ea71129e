# A run: writes that follow each other in one buffer, as the inner loops of the wire and of the disks share it.
# In Python it is an array('Q') of four numbers for each write.
from libc.stdint cimport uint64_t

cdef struct Write:
    uint64_t offset  # bytes, on the disk
    uint64_t length  # bytes
    uint64_t position  # where its data begins in the buffer
    uint64_t cookie  # what the client calls it, in the byte order of the wire


cdef inline bint is_inside(uint64_t position, uint64_t length, uint64_t size) noexcept nogil:
    """Whether so many bytes from there lie within a buffer of `size`; no sum that could overflow."""
    return length <= size and position <= size - length
