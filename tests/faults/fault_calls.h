/* The intercepted calls; a part of fault.c, which explains. */

static ssize_t put(int op, int fd, const void *data, size_t n, off_t at)
{
    struct call c;
    ssize_t result;
#define RAW_WRITE(n) (op == WRITE ? syscall(SYS_write, fd, data, n) : syscall(SYS_pwrite64, fd, data, n, at))
    if (!of_fd(&c, op, fd))
        return RAW_WRITE(n);
    JUDGE(&c, n);
    IN_ORDER(result = RAW_WRITE(allowed(&c, n)),
             at = op == WRITE && result > 0 ? lseek(fd, 0, SEEK_CUR) - result : at,
             result > 0 ? trace(c.mark ? 'a' : 'w', &c, fd, at, data, result) : (void)0);
    return done(&c, result);
}

static ssize_t put_vector(int op, int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    struct call c;
    if (!of_fd(&c, op, fd))
        return op == WRITE ? syscall(SYS_writev, fd, parts, count)
                           : syscall(SYS_pwritev2, fd, parts, count, at, 0L, flags);
    size_t n = 0, filled = 0;
    for (int i = 0; i < count; i++)
        n += parts[i].iov_len;
    char *whole = malloc(n ? n : 1);
    for (int i = 0; i < count; filled += parts[i++].iov_len)
        memcpy(whole + filled, parts[i].iov_base, parts[i].iov_len);
    ssize_t result = put(op, fd, whole, n, at);
    free(whole);
    return result;
}

static ssize_t get(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    struct call c;
    if (of_fd(&c, PREAD, fd)) {
        c.nowait = flags & RWF_NOWAIT;
        if (judge(&c) == FAIL)
            return -1;
    }
    return syscall(SYS_preadv2, fd, parts, count, at, 0L, flags);
}

/* A sync covers what was done before it was called ('b'), and that is durable once it returned ('s'). One that failed
   ('x') leaves what it covered in doubt for good: the kernel takes those pages for clean from then on. */
static int sync_call(long number, int op, int fd)
{
    static atomic_uint calls;
    struct call c;
    if (!of_fd(&c, op, fd))
        return syscall(number, fd);
    int64_t id = (int64_t)getpid() << 32 | atomic_fetch_add(&calls, 1);
    IN_ORDER(trace('b', &c, fd, id, NULL, 0));
    enum verdict verdict = judge(&c);
    if (verdict == LIE)
        return 0;
    int result = verdict == FAIL ? -1 : syscall(number, fd);
    IN_ORDER(trace(result ? 'x' : 's', &c, fd, id, NULL, 0));
    return done(&c, result);
}

static int resize(int op, int fd, int mode, off_t at, off_t length)
{
    struct call c;
    struct stat before, after;
    int result;
#define RAW_RESIZE (op == FTRUNCATE ? syscall(SYS_ftruncate, fd, length) : syscall(SYS_fallocate, fd, mode, at, length))
    if (!of_fd(&c, op, fd))
        return RAW_RESIZE;
    JUDGE(&c, 0);
    IN_ORDER(fstat(fd, &before), result = RAW_RESIZE, fstat(fd, &after),
             before.st_size != after.st_size ? trace('t', &c, fd, after.st_size, NULL, 0) : (void)0);
    return done(&c, result);
}

static int open_at(int directory, const char *path, int flags, mode_t mode)
{
    struct call c;
    struct stat st;
    if (!(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE ||
        !of_path(&c, OPEN, directory, path, 0, NULL))
        return syscall(SYS_openat, directory, path, flags, mode);
    if (judge(&c) == FAIL)
        return -1;
    pthread_mutex_lock(&order);
    bool existed = !fstatat(directory, path, &st, 0);
    int fd = syscall(SYS_openat, directory, path, flags, mode);
    if (fd >= 0 && !existed)
        trace('c', &c, fd, fstat(fd, &st) ? 0600 : st.st_mode & 07777, NULL, 0);
    else if (fd >= 0 && flags & O_TRUNC && st.st_size)
        trace('t', &c, fd, 0, NULL, 0);
    pthread_mutex_unlock(&order);
    return done(&c, fd);
}

#define CHANGE_ENTRY(letter, number, raw)                                                                              \
    int result;                                                                                                        \
    JUDGE(&c, 0);                                                                                                      \
    IN_ORDER(result = (raw), result ? (void)0 : trace(letter, &c, -1, number, NULL, 0));                               \
    return done(&c, result)

static int rename_at(int from, const char *old, int to, const char *new, unsigned flags)
{
    struct call c;
    if (!of_path(&c, RENAME, from, old, to, new))
        return syscall(SYS_renameat2, from, old, to, new, flags);
    CHANGE_ENTRY('r', 0, syscall(SYS_renameat2, from, old, to, new, flags));
}

static int link_at(int from, const char *old, int to, const char *new, int flags)
{
    struct call c;
    if (!of_path(&c, LINK, from, old, to, new))
        return syscall(SYS_linkat, from, old, to, new, flags);
    CHANGE_ENTRY('l', 0, syscall(SYS_linkat, from, old, to, new, flags));
}

static int unlink_at(int directory, const char *path, int flags)
{
    struct call c;
    if (!of_path(&c, UNLINK, directory, path, 0, NULL))
        return syscall(SYS_unlinkat, directory, path, flags);
    CHANGE_ENTRY('u', 0, syscall(SYS_unlinkat, directory, path, flags));
}

static int mkdir_at(int directory, const char *path, mode_t mode)
{
    struct call c;
    if (!of_path(&c, MKDIR, directory, path, 0, NULL))
        return syscall(SYS_mkdirat, directory, path, mode);
    CHANGE_ENTRY('d', mode, syscall(SYS_mkdirat, directory, path, mode));
}

/* --- libc's names; with 64-bit off_t the ...64 ones are the same functions */

#define SAME_AS(name, type, alias_name, ...) type alias_name(__VA_ARGS__) __attribute__((alias(#name)))

ssize_t write(int fd, const void *data, size_t n) { return put(WRITE, fd, data, n, 0); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return put(PWRITE, fd, data, n, at); }
SAME_AS(pwrite, ssize_t, pwrite64, int, const void *, size_t, off64_t);
ssize_t writev(int fd, const struct iovec *v, int n) { return put_vector(WRITE, fd, v, n, 0, 0); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) { return put_vector(PWRITE, fd, v, n, at, 0); }
SAME_AS(pwritev, ssize_t, pwritev64, int, const struct iovec *, int, off64_t);
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int flags)
{
    return put_vector(at == -1 ? WRITE : PWRITE, fd, v, n, at, flags);
}
SAME_AS(pwritev2, ssize_t, pwritev64v2, int, const struct iovec *, int, off64_t, int);

/* Into a file of ours: refused as not supported here, upon which callers copy with read and write. */
ssize_t sendfile(int to, int from, off_t *at, size_t n)
{
    struct call c;
    if (!of_fd(&c, WRITE, to))
        return syscall(SYS_sendfile, to, from, at, n);
    errno = EINVAL;
    return -1;
}
SAME_AS(sendfile, ssize_t, sendfile64, int, int, off64_t *, size_t);

ssize_t pread(int fd, void *data, size_t n, off_t at) { return get(fd, &(struct iovec){data, n}, 1, at, 0); }
SAME_AS(pread, ssize_t, pread64, int, void *, size_t, off64_t);
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { return get(fd, v, n, at, 0); }
SAME_AS(preadv, ssize_t, preadv64, int, const struct iovec *, int, off64_t);
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int flags) { return get(fd, v, n, at, flags); }
SAME_AS(preadv2, ssize_t, preadv64v2, int, const struct iovec *, int, off64_t, int);

int fsync(int fd) { return sync_call(SYS_fsync, FSYNC, fd); }
int fdatasync(int fd) { return sync_call(SYS_fdatasync, FDATASYNC, fd); }
int syncfs(int fd) { return sync_call(SYS_syncfs, SYNCFS, fd); }

int ftruncate(int fd, off_t length) { return resize(FTRUNCATE, fd, 0, 0, length); }
SAME_AS(ftruncate, int, ftruncate64, int, off64_t);
int truncate(const char *path, off_t length)
{
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC);
    int result = fd < 0 ? -1 : ftruncate(fd, length), saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return result;
}
SAME_AS(truncate, int, truncate64, const char *, off64_t);
int fallocate(int fd, int mode, off_t at, off_t length) { return resize(FALLOCATE, fd, mode, at, length); }
SAME_AS(fallocate, int, fallocate64, int, int, off64_t, off64_t);
int posix_fallocate(int fd, off_t at, off_t length) { return resize(FALLOCATE, fd, 0, at, length) ? errno : 0; }
SAME_AS(posix_fallocate, int, posix_fallocate64, int, off64_t, off64_t);

int openat(int directory, const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return open_at(directory, path, flags, mode);
}
SAME_AS(openat, int, openat64, int, const char *, int, ...);
int open(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return open_at(AT_FDCWD, path, flags, mode);
}
SAME_AS(open, int, open64, const char *, int, ...);
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
SAME_AS(creat, int, creat64, const char *, mode_t);
int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
SAME_AS(__open_2, int, __open64_2, const char *, int);
int __openat_2(int directory, const char *path, int flags) { return open_at(directory, path, flags, 0); }
SAME_AS(__openat_2, int, __openat64_2, int, const char *, int);

int rename(const char *old, const char *new) { return rename_at(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return rename_at(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    return rename_at(from, old, to, new, flags);
}
int link(const char *old, const char *new) { return link_at(AT_FDCWD, old, AT_FDCWD, new, 0); }
int linkat(int from, const char *old, int to, const char *new, int flags) { return link_at(from, old, to, new, flags); }
int unlink(const char *path) { return unlink_at(AT_FDCWD, path, 0); }
int unlinkat(int directory, const char *path, int flags) { return unlink_at(directory, path, flags); }
int rmdir(const char *path) { return unlink_at(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdir(const char *path, mode_t mode) { return mkdir_at(AT_FDCWD, path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) { return mkdir_at(directory, path, mode); }
