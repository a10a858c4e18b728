/* Faults in file calls on demand, and a trace of them: LD_PRELOAD this; shim.py builds it and sets the environment.

   EB_FAULT         rules "op:path:nth:action", separated by ';'. The first rule that fires decides; delays add up.
                      op      write pwrite fsync fdatasync syncfs ftruncate fallocate open rename unlink mkdir link
                              pread; sync (any of the three); * (all but pread). open: only when it may create or cut.
                      path    a part of the path; with a '$' behind it, its end; empty: any
                      nth     N, N+ (every one from N on) or *, counted per rule over matching calls
                      action  an errno name, short=K, torn=K, kill, kill_after, delay=MS, skip
   EB_FAULT_ROOT    only this directory, or paths with these whole last names, are touched, counted and traced
   EB_FAULT_SWITCH  rules are in force, and calls are counted, only while this file exists
   EB_FAULT_COUNT   a line "op path" for each call; "op!action path" when a rule fired
   EB_TRACE         a record for each change that really happened, see crashstates.py; "<dir>/.mark" takes marks

   Calls nobody asked about go straight to the kernel. All of them are made by syscall(), so there is no libc function
   to look up. Not seen: writes through a shared mapping, io_uring, libc's own calls behind stdio. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE, PWRITE, FSYNC, FDATASYNC, SYNCFS, FTRUNCATE, FALLOCATE, OPEN, RENAME, UNLINK, MKDIR, LINK, PREAD, OPS };
static const char *const op_names[OPS] = {"write",     "pwrite", "fsync",  "fdatasync", "syncfs", "ftruncate",
                                          "fallocate", "open",   "rename", "unlink",    "mkdir",  "link", "pread"};
#define BIT(op) (1u << (op))
#define SYNCS (BIT(FSYNC) | BIT(FDATASYNC) | BIT(SYNCFS))
#define CHANGES (BIT(PREAD) - 1)

enum action { NONE, ERROR, SHORT, TORN, KILL, KILL_AFTER, DELAY, SKIP };
static const char *const action_names[] = {"", "", "short", "torn", "kill", "kill_after", "delay", "skip"};
struct rule {
    unsigned ops;
    bool at_end, onward;
    const char *path, *text;
    long first, argument;
    enum action action;
    atomic_long seen;
};
struct call {
    int op;
    bool mark, nowait;
    const struct rule *fired;
    char path[PATH_MAX], other[PATH_MAX];
};
enum verdict { GO, FAIL, LIE };

static struct rule rules[64];
static int rule_count, count_fd = -1, trace_fd = -1;
static unsigned wanted;
static const char *root = "", *switch_file;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER; /* the trace has the order in which things happened */

static void refuse(const char *rule)
{
    dprintf(2, "fault.so: cannot understand the rule '%s'\n", rule);
    _exit(126);
}

static void parse_rule(struct rule *r, char *text)
{
    char *rest = strdup(text), *op = strsep(&rest, ":"), *path = strsep(&rest, ":"), *nth = strsep(&rest, ":");
    if (!rest)
        refuse(text);
    if (!strcmp(op, "*") || !strcmp(op, "sync"))
        r->ops = *op == '*' ? CHANGES : SYNCS;
    for (int i = 0; i < OPS; i++)
        if (!strcmp(op, op_names[i]))
            r->ops = BIT(i);
    size_t length = strlen(path);
    if ((r->at_end = length && path[length - 1] == '$'))
        path[length - 1] = 0;
    r->path = path;
    r->first = *nth == '*' ? 1 : atol(nth);
    r->onward = *nth == '*' || strchr(nth, '+');
    r->text = strdup(rest);
    char *name = strsep(&rest, "=");
    r->argument = rest ? atol(rest) : 0;
    for (int i = SHORT; i <= SKIP; i++)
        if (!strcmp(name, action_names[i]))
            r->action = i;
    for (int e = 1; e < 134 && !r->action; e++)
        if (strerrorname_np(e) && !strcmp(name, strerrorname_np(e)))
            r->action = ERROR, r->argument = e;
    if (!r->ops || r->first < 1 || !r->action)
        refuse(text);
}

static int open_output(const char *variable)
{
    const char *path = getenv(variable);
    return path ? syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
}

__attribute__((constructor)) static void start(void)
{
    char *text = getenv("EB_FAULT") ? strdup(getenv("EB_FAULT")) : NULL;
    for (char *rule; (rule = strsep(&text, ";"));)
        if (*rule && rule_count < (int)(sizeof rules / sizeof *rules))
            parse_rule(&rules[rule_count], rule), wanted |= rules[rule_count++].ops;
    root = getenv("EB_FAULT_ROOT") ?: "";
    switch_file = getenv("EB_FAULT_SWITCH");
    count_fd = open_output("EB_FAULT_COUNT");
    trace_fd = open_output("EB_TRACE");
    if (count_fd >= 0 || trace_fd >= 0)
        wanted |= CHANGES;
}

/* --- which call is this? */

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

static bool within(const char *path)
{
    const char *found = *path == '/' ? strstr(path, root) : NULL;
    return found && (!*root || strchr("/", found[strlen(root)]));
}

static bool ours(struct call *c)
{
    c->mark = ends_with(c->path, "/.mark");
    return within(c->path) || within(c->other);
}

static void clear(struct call *c, int op)
{
    c->op = op;
    c->mark = c->nowait = false;
    c->fired = NULL;
    *c->path = *c->other = 0;
}

static bool of_fd(struct call *c, int op, int fd)
{
    if (!(wanted & BIT(op)))
        return false;
    int saved = errno;
    char link[32];
    clear(c, op);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, c->path, PATH_MAX - 1);
    c->path[n > 0 ? n : 0] = 0;
    errno = saved;
    return ours(c);
}

static void absolute(char *out, int directory, const char *path) /* links resolved in all but the last name */
{
    char joined[2 * PATH_MAX] = "", parent[PATH_MAX], link[32];
    if (*path != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t n = directory == AT_FDCWD ? -1 : readlink(link, joined, PATH_MAX - 1);
        if (n < 0 && !getcwd(joined, PATH_MAX))
            return;
    }
    snprintf(joined + strlen(joined), PATH_MAX, "/%s", path);
    for (size_t n = strlen(joined); n > 1 && joined[n - 1] == '/';)
        joined[--n] = 0;
    char *name = strrchr(joined, '/');
    *name++ = 0;
    if (!realpath(*joined ? joined : "/", parent))
        return;
    snprintf(out, PATH_MAX, "%.*s/%s", PATH_MAX - NAME_MAX - 2, parent, name);
}

static bool of_path(struct call *c, int op, int directory, const char *path, int other_directory, const char *other)
{
    if (!(wanted & BIT(op)))
        return false;
    int saved = errno;
    clear(c, op);
    absolute(c->path, directory, path);
    if (other)
        absolute(c->other, other_directory, other);
    errno = saved;
    return ours(c);
}

/* --- what shall happen to it? */

static void die(void)
{
    for (kill(getpid(), SIGKILL);;)
        pause();
}

static bool path_matches(const struct rule *r, const char *path)
{
    return *path && (r->at_end ? ends_with(path, r->path) : strstr(path, r->path) != NULL);
}

static enum verdict judge(struct call *c)
{
    long delay_ms = 0;
    const struct rule *shown = NULL;
    int saved = errno;
    if (c->mark || (switch_file && access(switch_file, F_OK))) {
        errno = saved;
        return GO;
    }
    for (struct rule *r = rules; r < rules + rule_count; r++) {
        if (!(r->ops & BIT(c->op)) || !(path_matches(r, c->path) || path_matches(r, c->other)))
            continue;
        long nth = atomic_fetch_add(&r->seen, 1) + 1;
        if (nth != r->first && !(r->onward && nth > r->first))
            continue;
        shown = shown ?: r;
        if (r->action == DELAY)
            delay_ms += r->argument;
        else
            c->fired = c->fired ?: r;
    }
    if (count_fd >= 0) {
        char line[PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%s%s%s %s\n", op_names[c->op], shown ? "!" : "", shown ? shown->text : "",
                         *c->other ? c->other : c->path);
        syscall(SYS_write, count_fd, line, n);
    }
    errno = saved;
    if (shown && c->nowait) { /* a read that may not wait never meets the disk */
        errno = EAGAIN;
        return FAIL;
    }
    if (delay_ms) {
        struct timespec left = {delay_ms / 1000, delay_ms % 1000 * 1000000};
        while (nanosleep(&left, &left) && errno == EINTR)
            ;
        errno = saved;
    }
    switch (c->fired ? c->fired->action : NONE) {
    case KILL: die(); /* fall through */
    case ERROR: errno = c->fired->argument; return FAIL;
    case SKIP: return LIE;
    default: return GO;
    }
}

static size_t allowed(const struct call *c, size_t n)
{
    bool cut = c->fired && (c->fired->action == SHORT || c->fired->action == TORN) && (size_t)c->fired->argument < n;
    return cut ? (size_t)c->fired->argument : n;
}

static long done(const struct call *c, long result)
{
    if (c->fired && (c->fired->action == TORN || c->fired->action == KILL_AFTER))
        die();
    return result;
}

static void trace(char op, const struct call *c, int fd, int64_t number, const void *data, size_t n)
{
    if (trace_fd < 0 || (c->mark && op != 'a'))
        return;
    int saved = errno;
    struct stat st = {0};
    if (fd >= 0)
        fstat(fd, &st);
    struct { /* little-endian, "<cBHHxxqQQ" */
        char op;
        uint8_t kind;
        uint16_t path, other, unused;
        int64_t number;
        uint64_t inode, data;
    } head = {op, c->op == SYNCFS ? 2 : S_ISDIR(st.st_mode), strlen(c->path), strlen(c->other), 0, number, st.st_ino, n};
    struct iovec all[] = {{&head, sizeof head}, {(void *)c->path, head.path}, {(void *)c->other, head.other},
                          {(void *)data, n}};
    syscall(SYS_writev, trace_fd, all, 4);
    errno = saved;
}

/* Do a change and trace it in one step, so that no two changes are traced the wrong way round. */
#define IN_ORDER(...) (pthread_mutex_lock(&order), __VA_ARGS__, pthread_mutex_unlock(&order))
/* Leave with -1, or with a success that did not happen, as the rules say. */
#define JUDGE(c, lie)                                                                                                  \
    switch (judge(c)) {                                                                                                \
    case FAIL: return -1;                                                                                              \
    case LIE: return lie;                                                                                              \
    case GO: break;                                                                                                    \
    }

#include "fault_calls.h"
