/* LD_PRELOAD：大块内存放在 DSX_BLOCKS 文件夹的文件里，不是匿名内存：物理内存不够时系统写回磁盘，而不是杀掉进程。
 *
 * TensorRT 建引擎时把全部权重在内存里留一份，几十 GB 的引擎在小机器上因此建不了；这一份换到文件里，只是慢一点，内容一个字节也不变。
 * 文件建好就删名字，进程怎样结束都不留下。磁盘不够是分配失败，不会等到写的时候才出事。
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BIG ((size_t)8 << 20)
#define PAGE ((size_t)4096)
#define MOST 65536

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static struct { void *at; size_t size; } blocks[MOST];
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* 没有设 DSX_BLOCKS、太多块、磁盘不够：分配失败。 */
static void *place(size_t size) {
  const char *folder = getenv("DSX_BLOCKS");
  char path[4096];
  if (folder == NULL || snprintf(path, sizeof path, "%s/XXXXXX", folder) >= (int)sizeof path) return NULL;
  size_t whole = (size + PAGE - 1) / PAGE * PAGE;
  int file = mkostemp(path, O_CLOEXEC);
  if (file < 0) return NULL;
  unlink(path);
  void *at = MAP_FAILED;
  if (posix_fallocate(file, 0, (off_t)whole) == 0)
    at = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) return NULL;
  pthread_mutex_lock(&lock);
  int kept = used < MOST;
  if (kept) blocks[used].at = at, blocks[used++].size = whole;
  pthread_mutex_unlock(&lock);
  if (kept) return at;
  munmap(at, whole);
  return NULL;
}

static void *take(size_t size) {
  void *at = place(size);
  if (at == NULL) errno = ENOMEM;
  return at;
}

/* 是我们的一块就交出它的大小，``drop`` 时还回去；不是为 0。 */
static size_t find(void *at, int drop) {
  if (at == NULL || (uintptr_t)at % PAGE != 0) return 0;
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < used; i++)
    if (blocks[i].at == at) {
      size = blocks[i].size;
      if (drop) blocks[i] = blocks[--used];
      break;
    }
  pthread_mutex_unlock(&lock);
  if (drop && size != 0) munmap(at, size);
  return size;
}

void *malloc(size_t size) { return size >= BIG ? take(size) : __libc_malloc(size); }

void free(void *at) {
  if (find(at, 1) == 0) __libc_free(at);
}

void *calloc(size_t count, size_t size) {
  size_t total;
  if (__builtin_mul_overflow(count, size, &total)) {
    errno = ENOMEM;
    return NULL;
  }
  return total >= BIG ? take(total) : __libc_calloc(count, size); /* 新文件全是零 */
}

size_t malloc_usable_size(void *at) {
  size_t size = find(at, 0);
  if (size != 0 || at == NULL) return size;
  /* glibc 的块头：大小在指针之前，低三位是标志，第二位是单独映射的。 */
  size_t head = ((size_t *)at)[-1];
  return (head & ~(size_t)7) - (head & 2 ? 2 : 1) * sizeof(size_t);
}

void *realloc(void *at, size_t size) {
  size_t old = find(at, 0);
  if (old == 0 && size < BIG) return __libc_realloc(at, size);
  void *made = malloc(size);
  if (made == NULL) return NULL;
  if (at != NULL) {
    if (old == 0) old = malloc_usable_size(at);
    memcpy(made, at, old < size ? old : size);
    free(at);
  }
  return made;
}

void *memalign(size_t alignment, size_t size) {
  return size >= BIG && alignment <= PAGE ? take(size) : __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **out, size_t alignment, size_t size) {
  void *made = memalign(alignment, size);
  if (made == NULL) return ENOMEM;
  *out = made;
  return 0;
}
