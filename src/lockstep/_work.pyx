# cython: language_level=3
"""Threads that carry out jobs without the interpreter, as far as they can; `work.py` has the same in Python.

Whoever needs the GIL waits until another thread gives it up, and is then woken up a second time. So a thread that is
handed system calls to make would be woken twice to begin, and its caller twice to learn of the end. Here neither the
queue nor a native job has anything to do with the GIL.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t
from libc.string cimport strerror


cdef extern from "errno.h" nogil:
    int ECANCELED


cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)


cdef extern from "semaphore.h" nogil:
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t *semaphore, int shared, unsigned int value)
    int sem_wait(sem_t *semaphore)
    int sem_post(sem_t *semaphore)
    int sem_destroy(sem_t *semaphore)


cdef extern from "sys/eventfd.h" nogil:
    int EFD_NONBLOCK
    int EFD_CLOEXEC
    int eventfd(unsigned int value, int flags)
    int eventfd_read(int fd, uint64_t *value)
    int eventfd_write(int fd, uint64_t value)


cdef extern from "unistd.h" nogil:
    int close(int fd)
    int pause()


cdef extern from "Python.h" nogil:
    bint Py_IsInitialized()


cdef class Job:
    """See `work.py`."""

    cdef bint perform(self, const int *given_up) noexcept nogil:
        """Do what needs no interpreter, as long as `given_up` is not set; return whether that was all."""
        return False

    cdef object finish(self):
        """Do what is left where no system call failed, and return what the job returns."""
        raise NotImplementedError

    cdef int release(self) except -1:
        """Let go of what it was about: it has ended. Memory that is lent out must not be what the collector finds."""
        return 0

    cdef object outcome(self):
        """Return or raise what comes of a job of which `perform` did not do all."""
        if self.error:
            raise OSError(self.error, strerror(self.error).decode())
        return self.finish()

    cdef int end(self) noexcept:
        try:
            self.value = self.outcome()
        except BaseException as failure:
            self.failure = failure
        return 0

    def __call__(self):
        """Carry it out here and now."""
        cdef int never = 0
        cdef bint whole
        with nogil:
            whole = self.perform(&never)
        return None if whole else self.outcome()


cdef class Call(Job):
    """See `work.py`."""

    cdef object _work
    cdef tuple _arguments

    def __init__(self, work, *arguments):
        self._work = work
        self._arguments = arguments

    cdef object finish(self):
        return self._work(*self._arguments)


cdef struct Seat:
    # Where a thread that rests is found; each on the stack of its own.
    sem_t called
    void *job
    Seat *below


cdef void _append(void **first, void **last, void *job) noexcept nogil:
    (<Job> job)._next = NULL
    if first[0] == NULL:
        first[0] = job
    else:
        (<Job> last[0])._next = job
    last[0] = job


cdef void *_take(void **first) noexcept nogil:
    """The first of a chain; NULL if there is none."""
    cdef void *job = first[0]
    if job != NULL:
        first[0] = (<Job> job)._next
    return job


cdef list _released(void *job):
    """What became of each of a chain of jobs, which nothing here knows any more from then on."""
    cdef void *after
    cdef Job each
    ended = []
    while job != NULL:
        each = <Job> job
        after = each._next
        ended.append((each.future, each.value, each.failure))
        each.future = each.value = each.failure = None  # a failure knows the frames that it passed, and these the job
        each.release()
        Py_DECREF(each)
        job = after
    return ended


cdef class Queue:
    """See `work.py`."""

    cdef readonly int fd
    cdef pthread_mutex_t _lock
    cdef void *_first
    cdef void *_last
    cdef void *_first_in_turn
    cdef void *_last_in_turn
    cdef bint _taking_turns  # a thread is at such a job
    cdef void *_done
    cdef void *_last_done
    cdef Seat *_idle  # who came to rest last is first: its memory is still in the processor's cache
    cdef int _given_up
    cdef int _closed

    def __cinit__(self):
        pthread_mutex_init(&self._lock, NULL)
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise OSError("the system gives no eventfd: too many files are open")

    def __dealloc__(self):
        _released(self._first)
        _released(self._first_in_turn)
        _released(self._done)
        if self.fd >= 0:
            close(self.fd)
        pthread_mutex_destroy(&self._lock)

    def put(self, Job job):
        """See `work.py`."""
        cdef Seat *seat = NULL
        Py_INCREF(job)  # while the queue and the threads know it only by its address
        pthread_mutex_lock(&self._lock)
        if job.in_turn and self._taking_turns:
            _append(&self._first_in_turn, &self._last_in_turn, <void *> job)
        else:
            self._taking_turns = self._taking_turns or job.in_turn
            seat = self._idle
            if seat != NULL:
                self._idle = seat.below
                seat.job = <void *> job
            else:
                _append(&self._first, &self._last, <void *> job)
        pthread_mutex_unlock(&self._lock)
        if seat != NULL:
            sem_post(&seat.called)

    def done(self):
        """See `work.py`."""
        cdef uint64_t count
        cdef void *jobs
        eventfd_read(self.fd, &count)
        pthread_mutex_lock(&self._lock)
        jobs, self._done = self._done, NULL
        pthread_mutex_unlock(&self._lock)
        return _released(jobs)

    def give_up(self):
        """See `work.py`."""
        cdef void *jobs
        cdef void *in_turn
        pthread_mutex_lock(&self._lock)
        set_flag(&self._given_up)
        jobs, self._first = self._first, NULL
        in_turn, self._first_in_turn = self._first_in_turn, NULL
        pthread_mutex_unlock(&self._lock)
        return len(_released(jobs)) + len(_released(in_turn))

    def close(self):
        """See `work.py`."""
        cdef Seat *seat
        cdef Seat *below
        pthread_mutex_lock(&self._lock)
        self._closed = 1
        seat, self._idle = self._idle, NULL
        pthread_mutex_unlock(&self._lock)
        while seat != NULL:
            below = seat.below
            seat.job = NULL
            sem_post(&seat.called)
            seat = below

    def serve(self):
        """See `work.py`."""
        cdef Seat seat
        cdef void *job
        cdef bint had_turn = False
        sem_init(&seat.called, 0, 0)
        with nogil:
            while True:
                job = self._next_for(&seat, had_turn)
                if job == NULL:
                    break
                had_turn = (<Job> job).in_turn
                self._carry_out(job)
        sem_destroy(&seat.called)

    cdef void *_next_for(self, Seat *seat, bint had_turn) noexcept nogil:
        """Wait for a job; NULL when there will be none. A thread that `had_turn` goes on with those that wait for theirs."""
        cdef void *job
        pthread_mutex_lock(&self._lock)
        job = _take(&self._first_in_turn) if had_turn else NULL
        if job == NULL:
            self._taking_turns = self._taking_turns and not had_turn
            job = _take(&self._first)
        if job == NULL and not self._closed:
            seat.below = self._idle
            self._idle = seat
            pthread_mutex_unlock(&self._lock)
            while sem_wait(&seat.called):
                pass  # a signal
            return seat.job
        pthread_mutex_unlock(&self._lock)
        return job

    cdef void _carry_out(self, void *job) noexcept nogil:
        cdef bint first, whole = not is_set(&self._given_up) and (<Job> job).perform(&self._given_up)
        if not whole:
            while not Py_IsInitialized():
                pause()  # the process ends, and has nobody left who would want to know
            with gil:
                if is_set(&self._given_up) and not (<Job> job).error:
                    (<Job> job).error = ECANCELED
                (<Job> job).end()
        pthread_mutex_lock(&self._lock)
        first = self._done == NULL
        _append(&self._done, &self._last_done, job)
        pthread_mutex_unlock(&self._lock)
        if first:  # whoever looks takes all that is there
            eventfd_write(self.fd, 1)
