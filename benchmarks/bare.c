/* The bare work of an encrypted mirror, as a plugin of nbdkit: each write goes to the target, and encrypted to the
 * mirror; a flush flushes both. Nothing else: no record of what is under way, no right that is asked for, no order of
 * writes that overlap, no patience with a mirror that fails. No data should depend on it. It is what a server would
 * cost that did without all of that, beside which the benchmark puts one that does not.
 *
 *     nbdkit ... bare.so target=FILE mirror=FILE key=FILE sector-size=512|4096
 *
 * Both files are there. The mirror has its data at DATA_OFFSET, as Lockstep's has. `key` has the 64 bytes of an
 * aes-xts-plain64 key. Writes are whole sectors; others fail. Threads are nbdkit's own.
 */
#define NBDKIT_API_VERSION 2
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <gcrypt.h>
#include <nbdkit-plugin.h>

enum { DATA_OFFSET = 16 << 20, KEY_BYTES = 64, PIECE_BYTES = 256 << 10 };

static char *target_path, *mirror_path, *key_path;
static int target = -1, mirror = -1;
static int64_t sector_bytes = 512, size_bytes;
static unsigned char key[KEY_BYTES];

static _Thread_local gcry_cipher_hd_t cipher;  /* it holds the tweak of one sector at a time */
static _Thread_local unsigned char *encrypted;

static int configure(const char *name, const char *value) {
  char **path = !strcmp(name, "target") ? &target_path
              : !strcmp(name, "mirror") ? &mirror_path
              : !strcmp(name, "key") ? &key_path : NULL;
  if (path) {
    *path = nbdkit_absolute_path(value);
    return *path ? 0 : -1;
  }
  if (!strcmp(name, "sector-size")) {
    sector_bytes = nbdkit_parse_size(value);
    return sector_bytes > 0 ? 0 : -1;
  }
  nbdkit_error("unknown: %s", name);
  return -1;
}

static int get_ready(void) {
  struct stat found;
  int fd = key_path ? open(key_path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0 || read(fd, key, KEY_BYTES) != KEY_BYTES || close(fd)) {
    nbdkit_error("no key of %d bytes: %m", KEY_BYTES);
    return -1;
  }
  target = target_path ? open(target_path, O_RDWR | O_CLOEXEC) : -1;
  mirror = mirror_path ? open(mirror_path, O_RDWR | O_CLOEXEC) : -1;
  if (target < 0 || mirror < 0 || fstat(target, &found)) {
    nbdkit_error("cannot open target and mirror: %m");
    return -1;
  }
  size_bytes = found.st_size;
  gcry_check_version(NULL);
  gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
  gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
  return 0;
}

static void *open_export(int read_only) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t get_size(void *handle) { return size_bytes; }
static int can_multi_conn(void *handle) { return 1; }
static int can_fua(void *handle) { return NBDKIT_FUA_NATIVE; }

static int failed(const char *what) {
  int error = errno ? errno : EIO;
  nbdkit_error("%s: %m", what);
  nbdkit_set_error(error);
  return -1;
}

static int read_target(void *handle, void *into, uint32_t count, uint64_t offset, uint32_t flags) {
  errno = 0;
  return pread(target, into, count, offset) == (ssize_t)count ? 0 : failed("reading");
}

static int write_whole(int fd, const void *data, size_t count, uint64_t offset, uint32_t flags) {
  struct iovec part = {(void *)data, count};
  errno = 0;
  ssize_t written = pwritev2(fd, &part, 1, offset, flags & NBDKIT_FLAG_FUA ? RWF_DSYNC : 0);
  return written == (ssize_t)count ? 0 : failed("writing");
}

static int be_ready(void) {
  if (cipher) return 0;
  if (posix_memalign((void **)&encrypted, 64, PIECE_BYTES)) return -1;
  if (gcry_cipher_open(&cipher, GCRY_CIPHER_AES256, GCRY_CIPHER_MODE_XTS, 0)) return -1;
  return gcry_cipher_setkey(cipher, key, KEY_BYTES) ? -1 : 0;
}

static int encrypt(const unsigned char *data, size_t count, uint64_t offset) {
  for (size_t at = 0; at < count; at += sector_bytes) {
    unsigned char tweak[16] = {0};
    uint64_t position = (offset + at) / 512;
    for (int i = 0; i < 8; i++) tweak[i] = position >> (8 * i);
    if (gcry_cipher_setiv(cipher, tweak, sizeof tweak)
        || gcry_cipher_encrypt(cipher, encrypted + at, sector_bytes, data + at, sector_bytes))
      return -1;
  }
  return 0;
}

static int write_both(void *handle, const void *data, uint32_t count, uint64_t offset, uint32_t flags) {
  errno = EINVAL;
  if (count % sector_bytes || offset % sector_bytes) return failed("no whole sectors");
  if (be_ready()) return failed("setting the key");
  for (uint32_t at = 0; at < count; at += PIECE_BYTES) {
    uint32_t piece = count - at < PIECE_BYTES ? count - at : PIECE_BYTES;
    if (encrypt((const unsigned char *)data + at, piece, offset + at)) return failed("encrypting");
    if (write_whole(mirror, encrypted, piece, DATA_OFFSET + offset + at, flags)) return -1;
  }
  return write_whole(target, data, count, offset, flags);
}

static void *flush_mirror(void *result) {
  *(int *)result = fdatasync(mirror);
  return NULL;
}

static int flush_both(void *handle, uint32_t flags) {
  pthread_t other;
  int of_mirror = -1;
  errno = pthread_create(&other, NULL, flush_mirror, &of_mirror);
  if (errno) return failed("starting a thread");
  int of_target = fdatasync(target);
  pthread_join(other, NULL);
  return of_target || of_mirror ? failed("flushing") : 0;
}

static struct nbdkit_plugin plugin = {
  .name = "bare",
  .config = configure,
  .get_ready = get_ready,
  .open = open_export,
  .get_size = get_size,
  .can_multi_conn = can_multi_conn,
  .can_fua = can_fua,
  .pread = read_target,
  .pwrite = write_both,
  .flush = flush_both,
};

NBDKIT_REGISTER_PLUGIN(plugin)
