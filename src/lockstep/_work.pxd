# A job for the threads of `work.py`.

cdef extern from *:
    """
    /* Whoever sees that it is not set has not read anything yet that is written later. */
    #define lockstep_is_set(flag) (__atomic_thread_fence(__ATOMIC_ACQUIRE), __atomic_load_n((flag), __ATOMIC_RELAXED))
    #define lockstep_set(flag) __atomic_store_n((flag), 1, __ATOMIC_RELAXED)
    """
    bint is_set "lockstep_is_set" (const int *flag) nogil
    void set_flag "lockstep_set" (int *flag) nogil


cdef class Job:
    cdef public object future
    cdef object value
    cdef object failure
    cdef bint in_turn  # not beside another that is
    cdef int error  # of the system call that ended it; 0: none
    cdef void *_next  # in the queue

    cdef bint perform(self, const int *given_up) noexcept nogil
    cdef object finish(self)
    cdef object outcome(self)
    cdef int release(self) except -1
    cdef int end(self) noexcept
