// utils.h: defines die, allocate, imin, imax; open_file, map_file, make_folder, sync_folder;
// catch_signals, let_waiting_threads_sleep.
//
// Like all headers in this folder it compiles as C11 and as C++17, because both programs include
// it.
#ifndef UTILS_H
#define UTILS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

extern const char program[];  // the program's name; train_gpas.c and train_gpas.cu define it

static int current_step;  // the training step that is being computed, for messages; 0: none

static inline int imin(int a, int b) { return a < b ? a : b; }
static inline int imax(int a, int b) { return a > b ? a : b; }

// Prints exactly one line on stderr (control characters become '?') and exits with status 1. If two
// threads fail at once, the second one waits here until the program has ended.
__attribute__((noreturn, format(printf, 1, 2)))
static inline void die(const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    flockfile(stderr);
    fflush(stdout);
    fprintf(stderr, "%s: %s\n", program, text);
    exit(1);
}

// Returns zeroed memory for `count` elements of `size` bytes, aligned for vectors; exits if there
// is not enough. Large blocks ask for 2 MiB pages, so that the processor translates fewer
// addresses.
static inline void *allocate(size_t count, size_t size) {
    size_t bytes = count * size, page = 64;
#ifdef MADV_HUGEPAGE
    if (bytes >= 2 << 20) page = 2 << 20;
#endif
    size_t room = bytes ? (bytes + page - 1) / page * page : page;
    void *p = count > SIZE_MAX / 2 / size ? NULL : aligned_alloc(page, room);
    if (!p)
        die("not enough memory for %.0f MiB; lower --batch, --seq-len or the network's size",
            (double)count * size / (1 << 20));
#ifdef MADV_HUGEPAGE
    if (page > 64) madvise(p, bytes / page * page, MADV_HUGEPAGE);
#endif
    return memset(p, 0, bytes);
}

/* ------------------------------------------------------------------------------------------------
Files
*/

// Opens a file for reading and writes its size to *bytes. Only regular files are accepted: a pipe
// has no size and might never end.
static inline FILE *open_file(const char *path, size_t *bytes) {
    struct stat info;
    int file = open(path, O_RDONLY | O_NONBLOCK);
    if (file < 0 || fstat(file, &info) != 0) die("cannot open %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("cannot open %s: it is not a file", path);
    *bytes = (size_t)info.st_size;
    return fdopen(file, "rb");
}

// Maps a file in one of llm.c's formats into memory, where it stays until the program ends: 256
// int32 (magic, version 1, a count), then uint16. Writes its size to *bytes.
static inline const int32_t *map_file(const char *path, const char *kind, int magic,
                                      size_t *bytes) {
    FILE *file = open_file(path, bytes);
    if (*bytes < 1024) die("%s is not a %s file: it is shorter than a header", path, kind);
    const int32_t *header =
        (const int32_t *)mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    if (header == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    fclose(file);
    if (header[0] != magic || header[1] != 1)
        die("%s is not a %s file of version 1 (magic %d, version %d)", path, kind, header[0],
            header[1]);
    return header;
}

// Makes sure that the name `path` is on the disk by an fsync() of the folder that contains it: the
// file's own fsync() only covers its content. Returns 0 if the fsync() fails.
static inline int sync_folder(const char *path) {
    char folder[2100];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    int file = open(slash ? folder : ".", O_RDONLY);
    int good = file < 0 || fsync(file) == 0 || errno == EINVAL;  // EINVAL: it cannot be synced
    if (file >= 0) close(file);
    return good;
}

// Creates the folder `path` and its parents where they do not exist.
static inline void make_folder(const char *path) {
    char part[2048];
    for (size_t i = 1; i <= strlen(path); i++)
        if (path[i] == '/' || path[i] == 0) {
            snprintf(part, sizeof part, "%.*s", (int)i, path);
            if (mkdir(part, 0777) == 0) sync_folder(part);
            else if (errno != EEXIST)
                die("cannot create the folder %s: %s", part, strerror(errno));
        }
}

/* ------------------------------------------------------------------------------------------------
Signals and threads
*/

// After SIGINT or SIGTERM the training loop finishes its step, saves and stops; a second signal
// kills the program at once.
static volatile sig_atomic_t stop_signal;
static inline void remember_signal(int number) { stop_signal = number; }
static inline void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = remember_signal;
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

// OpenMP threads that wait for others spin by default. That is fast as long as each has a core of
// its own; but where another program takes a core, the thread that all others wait for may not run
// for a long time, and a step of 30 ms takes seconds. Unless the user has chosen otherwise, we let
// waiting threads sleep after some microseconds, which costs nothing measurable on an idle machine.
// libgomp (gcc) reads its environment before main(), so the program starts itself again, once.
static inline void let_waiting_threads_sleep(char **argv) {
    char path[4096];
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    setenv("KMP_BLOCKTIME", "0", 1);  // libomp (clang) reads this one, and later
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    execv(path, argv);  // returns only if it fails; then the threads spin
}
#endif
