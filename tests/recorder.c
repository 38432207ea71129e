/* A recording disk: whoever preloads this has every change to the files below $LAB_RECORD_ROOT, and every sync of them,
 * appended to $LAB_RECORD_LOG, in order, by all threads and by the programs that they start. The registry and the sockets
 * are left out. Syncs are recorded and not carried out, but take $LAB_RECORD_SYNC_US: what would be durable is for the
 * reader of the log to say, who knows when the power is cut.
 *
 * A change has two records, one before and one after: until the second it is under way, and a sync that began meanwhile
 * need not cover it. A sync has two as well. One record is one write to a file opened for appending, so they never mix.
 *
 * Each bit that is set in the byte of the file $LAB_RECORD_FAULTS makes changes and syncs of one kind of file fail with
 * EIO, after the first record: something of it may be on the medium all the same.
 *
 * tests/recording.py reads the log. Not seen: writes through mmap, sendfile, copy_file_range and io_uring. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct record {
    uint32_t bytes; /* of all of it: this, the path, the data */
    uint16_t path_bytes;
    uint8_t kind;    /* see recording.py */
    uint8_t durable; /* of a write: it is synced by itself */
    uint64_t id;     /* the same in the records before and after */
    uint64_t inode;
    int64_t offset; /* of a record after: what the call returned */
    uint64_t length;
};

struct file {
    struct stat stat;
    char path[PATH_MAX];
};

enum { PARTS_MAX = 64 };

static int log_fd = -1;
static const char *root;
static size_t root_bytes;
static volatile uint8_t *faults;
static long sync_us;
static atomic_uint_fast32_t last_id;

__attribute__((constructor)) static void start(void)
{
    const char *log = getenv("LAB_RECORD_LOG"), *switches = getenv("LAB_RECORD_FAULTS");
    int fd = switches ? syscall(SYS_openat, AT_FDCWD, switches, O_RDONLY | O_CLOEXEC) : -1;
    void *map = fd >= 0 ? mmap(NULL, 1, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;

    faults = map == MAP_FAILED ? NULL : map;
    sync_us = getenv("LAB_RECORD_SYNC_US") ? atol(getenv("LAB_RECORD_SYNC_US")) : 0;
    root = getenv("LAB_RECORD_ROOT");
    root_bytes = root ? strlen(root) : 0;
    if (root && log)
        log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static int recorded(const char *path)
{
    return log_fd >= 0 && !strncmp(path, root, root_bytes) && (path[root_bytes] == '/' || !path[root_bytes])
        && !strstr(path, "/registry.db") && !strstr(path, "/run/");
}

/* Whether an open file is recorded; errno is left alone. */
static int find(int fd, struct file *file)
{
    char link[64] = "/proc/self/fd/", digits[16];
    int before = errno, count = 0, at = strlen(link);
    ssize_t length = -1;

    if (log_fd < 0 || fd < 0)
        return 0;
    for (int rest = fd; count == 0 || rest; rest /= 10)
        digits[count++] = '0' + rest % 10;
    while (count)
        link[at++] = digits[--count];
    link[at] = 0;
    if (!fstat(fd, &file->stat) && (S_ISREG(file->stat.st_mode) || S_ISDIR(file->stat.st_mode)))
        length = readlink(link, file->path, PATH_MAX - 1);
    errno = before;
    if (length < 0)
        return 0;
    file->path[length] = 0;
    return recorded(file->path);
}

static uint64_t new_id(void)
{
    return (uint64_t)getpid() << 32 | (uint32_t)++last_id;
}

static void put(struct record record, const char *path, size_t path_bytes, const struct iovec *parts, int count)
{
    struct iovec all[PARTS_MAX + 2] = { { &record, sizeof record }, { (void *)path, path_bytes } };
    int before = errno;
    size_t bytes = sizeof record + path_bytes;

    for (int i = 0; i < count; i++) {
        all[i + 2] = parts[i];
        bytes += parts[i].iov_len;
    }
    record.bytes = bytes;
    record.path_bytes = path_bytes;
    if (syscall(SYS_writev, log_fd, all, count + 2) != (ssize_t)bytes)
        abort(); /* a log with a gap proves nothing */
    errno = before;
}

static int fails(const char *path)
{
    const char *kinds[] = { ".mirror", ".target", ".intent", ".held", ".header" };
    for (unsigned i = 0; faults && *faults && i < sizeof kinds / sizeof *kinds; i++)
        if (*faults >> i & 1 && strstr(path, kinds[i]))
            return 1;
    return 0;
}

#define PUT(kind, durable, id, file, offset, length) \
    put((struct record){ 0, 0, kind, durable, id, (file).stat.st_ino, offset, length }, (file).path, \
        strlen((file).path), NULL, 0)

/* --- content --- */

static ssize_t change(int fd, const struct iovec *parts, int count, int64_t offset, int flags, int positioned)
{
    struct file file;
    uint64_t id = 0, length = 0;
    int durable = 0;
    ssize_t result = -1;
    int found = find(fd, &file) && count <= PARTS_MAX;

    if (found) {
        int opened = fcntl(fd, F_GETFL);
        durable = (flags & (RWF_DSYNC | RWF_SYNC)) || (opened & O_DSYNC);
        flags &= ~(RWF_DSYNC | RWF_SYNC);
        if (!positioned)
            offset = opened & O_APPEND ? file.stat.st_size : lseek(fd, 0, SEEK_CUR);
        for (int i = 0; i < count; i++)
            length += parts[i].iov_len;
        id = new_id();
        put((struct record){ 0, 0, 'W', durable, id, file.stat.st_ino, offset, length }, file.path, strlen(file.path),
            parts, count);
    }
    if (found && fails(file.path))
        errno = EIO;
    else if (positioned)
        result = syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags);
    else
        result = syscall(SYS_writev, fd, parts, count);
    if (found)
        PUT('w', durable, id, file, result, 0);
    return result;
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags)
{
    return change(fd, parts, count, offset, flags, offset != -1);
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    return change(fd, parts, count, offset, flags, offset != -1);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset)
{
    return change(fd, parts, count, offset, 0, 1);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return change(fd, parts, count, offset, 0, 1);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
    return change(fd, &(struct iovec){ (void *)data, length }, 1, offset, 0, 1);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    return change(fd, &(struct iovec){ (void *)data, length }, 1, offset, 0, 1);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return change(fd, parts, count, 0, 0, 0);
}

ssize_t write(int fd, const void *data, size_t length)
{
    return change(fd, &(struct iovec){ (void *)data, length }, 1, 0, 0, 0);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    struct file file;
    int result = -1, found = find(fd, &file);
    uint64_t id = found ? new_id() : 0;

    if (found)
        PUT('Z', 0, id, file, offset, length);
    if (found && fails(file.path))
        errno = EIO;
    else
        result = syscall(SYS_fallocate, fd, mode, offset, length);
    if (found)
        PUT('w', 0, id, file, result, 0);
    return result;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    return fallocate64(fd, mode, offset, length);
}

int ftruncate64(int fd, off64_t length)
{
    struct file file;
    int found = find(fd, &file);
    uint64_t id = found ? new_id() : 0;

    if (found)
        PUT('T', 0, id, file, length, 0);
    int result = syscall(SYS_ftruncate, fd, length);
    if (found)
        PUT('w', 0, id, file, result, 0);
    return result;
}

int ftruncate(int fd, off_t length)
{
    return ftruncate64(fd, length);
}

static int sync_of(int fd, int number)
{
    struct file file;

    if (!find(fd, &file))
        return syscall(number, fd);
    uint64_t id = new_id();
    int failed = fails(file.path);
    PUT('S', 0, id, file, 0, 0);
    usleep(sync_us);
    PUT('s', 0, id, file, failed ? -1 : 0, 0);
    if (failed)
        errno = EIO;
    return failed ? -1 : 0;
}

int fsync(int fd)
{
    return sync_of(fd, SYS_fsync);
}

int fdatasync(int fd)
{
    return sync_of(fd, SYS_fdatasync);
}

/* --- names --- */

/* The whole path of a name, as far as the directory goes; 0 if it cannot be told. */
static int whole(int directory, const char *name, char *path)
{
    char given[PATH_MAX];
    const char *last = strrchr(name, '/');
    struct file file;

    if (log_fd < 0 || strlen(name) >= PATH_MAX)
        return 0;
    if (name[0] != '/' && directory != AT_FDCWD) {
        if (last || !find(directory, &file) || strlen(file.path) + strlen(name) + 2 > PATH_MAX)
            return 0;
        stpcpy(stpcpy(stpcpy(path, file.path), "/"), name);
        return 1;
    }
    stpcpy(given, last ? name : ".");
    if (last)
        given[last == name ? 1 : last - name] = 0;
    if (!realpath(given, path) || strlen(path) + strlen(last ? last : name) + 2 > PATH_MAX)
        return 0;
    strcat(strcat(path, "/"), last ? last + 1 : name);
    return 1;
}

static int opened(int directory, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    int before = errno, made = 0;
    struct file file;

    if (flags & (O_CREAT | O_TRUNC) && whole(directory, name, path) && recorded(path))
        made = faccessat(directory, name, F_OK, AT_SYMLINK_NOFOLLOW) ? 'C' : flags & O_TRUNC ? 'T' : 0;
    errno = before;
    int fd = syscall(SYS_openat, directory, name, flags, mode);
    if (fd >= 0 && made && find(fd, &file)) {
        uint64_t id = new_id();
        PUT(made, 0, id, file, 0, 0);
        PUT('w', 0, id, file, 0, 0);
    }
    return fd;
}

#define MODE(flags, mode) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *name, int flags, ...)
{
    MODE(flags, mode);
    return opened(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    MODE(flags, mode);
    return opened(AT_FDCWD, name, flags, mode);
}

int openat(int directory, const char *name, int flags, ...)
{
    MODE(flags, mode);
    return opened(directory, name, flags, mode);
}

int openat64(int directory, const char *name, int flags, ...)
{
    MODE(flags, mode);
    return opened(directory, name, flags, mode);
}

/* Two paths, or one and nothing, with a zero byte between them. */
static void put_names(char kind, const char *from, const char *to)
{
    char both[2 * PATH_MAX];
    size_t length = stpcpy(both, from) - both + 1;

    length += stpcpy(both + length, to) - (both + length);
    put((struct record){ 0, 0, kind, 0, new_id(), 0, 0, 0 }, both, length, NULL, 0);
}

int renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned flags)
{
    char old[PATH_MAX], new[PATH_MAX];
    int before = errno;
    int found = whole(from_directory, from, old) && whole(to_directory, to, new) && recorded(old);

    errno = before;
    int result = syscall(SYS_renameat2, from_directory, from, to_directory, to, flags);
    if (found && !result)
        put_names('R', old, new);
    return result;
}

int renameat(int from_directory, const char *from, int to_directory, const char *to)
{
    return renameat2(from_directory, from, to_directory, to, 0);
}

int rename(const char *from, const char *to)
{
    return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlinkat(int directory, const char *name, int flags)
{
    char path[PATH_MAX];
    int before = errno, found = whole(directory, name, path) && recorded(path);

    errno = before;
    int result = syscall(SYS_unlinkat, directory, name, flags);
    if (found && !result)
        put_names('U', path, "");
    return result;
}

int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}

int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags)
{
    char old[PATH_MAX], new[PATH_MAX];
    int before = errno;
    int found = whole(from_directory, from, old) && whole(to_directory, to, new) && recorded(old);

    errno = before;
    int result = syscall(SYS_linkat, from_directory, from, to_directory, to, flags);
    if (found && !result)
        put_names('L', old, new);
    return result;
}

int link(const char *from, const char *to)
{
    return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
}
