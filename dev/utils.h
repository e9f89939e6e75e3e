// utils.h: defines die, allocate, memory_limit, imin, imax; open_file, map_file, check_target,
// is_folder, make_folder, sync_file, sync_folder; open_standard_files, finish_output;
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

// With these options the loss differs in the second digit, and no NaN is detected any more.
#if defined __FAST_MATH__ || __FINITE_MATH_ONLY__ + 0 || defined __ASSOCIATIVE_MATH__ || \
    defined __RECIPROCAL_MATH__
#error "compile without -Ofast and -ffast-math: they give wrong losses and hide NaN"
#endif

extern const char program[];  // the program's name; train_gpas.c and train_gpas.cu define it

static int current_step;  // the training step that is being computed, for messages; 0: none

static inline int imin(int a, int b) { return a < b ? a : b; }
static inline int imax(int a, int b) { return a > b ? a : b; }

// Prints exactly one line on stderr and exits with status 1. Control characters become '?'. A
// message longer than two lines of a terminal, because of what it quotes, loses its middle. If two
// threads fail at once, the second one waits here until the program has ended.
__attribute__((noreturn, format(printf, 1, 2)))
static inline void die(const char *format, ...) {
    enum { LONGEST = 158 };
    char text[8192];
    va_list args;
    va_start(args, format);
    int n = snprintf(text, sizeof text, "%s: ", program);
    vsnprintf(text + n, sizeof text - n, format, args);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    size_t length = strlen(text), half = length > LONGEST ? LONGEST / 2 : length;
    flockfile(stderr);
    fflush(stdout);
    fprintf(stderr, "%.*s%s%s\n", (int)half, text, half < length ? "..." : "",
            half < length ? text + length - LONGEST / 2 + 3 : "");
    exit(1);
}

// Returns zeroed memory for `count` elements of `size` bytes, aligned for vectors; exits if there
// is not enough. Large blocks get pages of 2 MiB if possible, so that the processor translates
// fewer addresses.
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

// Returns how many bytes of memory the program may use: what the machine has, or less if a cgroup
// (version 1 or 2), for example that of a container, has a limit. root: "", or in tests the folder
// that replaces /.
static inline double memory_limit(const char *root) {
    char path[2 * PATH_MAX], line[PATH_MAX];
    double limit = (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE), bytes;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file, *groups = fopen(path, "r");
    while (groups && fgets(line, sizeof line, groups)) {  // "0::/group" or "5:cpu,memory:/group"
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL, *slash;
        if (!group) continue;
        *group++ = 0;
        group[strcspn(group, "\n")] = 0;
        int version2 = strcmp(controllers, ":") == 0;
        if (!version2 && !strstr(controllers, "memory")) continue;
        do {  // the limits of the enclosing groups count too
            snprintf(path, sizeof path, version2 ? "%s/sys/fs/cgroup%s/memory.max"
                     : "%s/sys/fs/cgroup/memory%s/memory.limit_in_bytes", root, group);
            if ((file = fopen(path, "r"))) {
                if (fscanf(file, "%lf", &bytes) == 1 && bytes < limit) limit = bytes;
                fclose(file);
            }
            slash = strrchr(group, '/');
            if (slash) *slash = 0;
        } while (slash);
    }
    if (groups) fclose(groups);
    return limit;
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
    if (!S_ISREG(info.st_mode)) die("cannot open %s: it is not a regular file", path);
    *bytes = (size_t)info.st_size;
    FILE *stream = fdopen(file, "rb");
    if (!stream) die("cannot open %s: %s", path, strerror(errno));
    return stream;
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

// Waits until what was written to a file is on the disk. Returns 0 if the disk failed or is full,
// but not if this kind of file or file system does not support fsync().
static inline int sync_file(int file) {
    return fsync(file) == 0 || (errno != EIO && errno != ENOSPC && errno != EDQUOT);
}

// Makes sure that the name `path` is on the disk by an fsync() of the folder that contains it: the
// file's own fsync() only covers its content. Returns 0 if the disk failed.
static inline int sync_folder(const char *path) {
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    int file = open(slash ? folder : ".", O_RDONLY);
    int good = file < 0 || sync_file(file);
    if (file >= 0) close(file);
    return good;
}

static inline int is_folder(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

// Creates the folder `path` and its parents where they do not exist.
static inline void make_folder(const char *path) {
    char part[2048];
    for (size_t i = 1; i <= strlen(path); i++)
        if (path[i] == '/' || path[i] == 0) {
            snprintf(part, sizeof part, "%.*s", (int)i, path);
            if (mkdir(part, 0777) == 0) sync_folder(part);
            else if (!is_folder(part))
                die("cannot create the folder %s: %s", part, strerror(errno));
        }
}

// Exits if `path` exists and is not a regular file, or a link to one. Opening a pipe for writing
// might block forever, and renaming a file onto a device would replace the device.
static inline void check_target(const char *path) {
    struct stat info;
    if (lstat(path, &info) != 0) return;
    if (stat(path, &info) != 0) die("cannot write %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("cannot write %s: it is not a regular file", path);
}

// Opens /dev/null in place of standard files that are closed. Otherwise the next file that we open
// would get one of their numbers, and what the program prints would go into it.
static inline void open_standard_files(void) {
    int file;
    while ((file = open("/dev/null", O_RDWR)) >= 0 && file <= 2) {}
    close(file);
}

// Exits with an error if some of the output could not be written.
static inline void finish_output(void) {
    if (fflush(stdout) != 0) die("cannot write to standard output: %s", strerror(errno));
    if (ferror(stdout)) die("not all of the output could be written");
}

/* ------------------------------------------------------------------------------------------------
Signals and threads
*/

// After one of these signals the training loop finishes its step, saves and stops. SIGHUP comes
// when the terminal is closed; under nohup it is ignored. SIGPIPE comes when nobody reads the
// output any more, as in `| head`. A second SIGINT (Ctrl-C), or a second SIGTERM, stops the program
// at once.
static volatile sig_atomic_t stop_signal;

static inline void print_in_handler(const char *text) {
    if (write(2, text, strlen(text)) < 0) return;  // nobody can be told
}

static inline void handle_signal(int number) {
    int again = number == stop_signal && (number == SIGINT || number == SIGTERM), error = errno;
    if (number == SIGPIPE && stop_signal) return;
    stop_signal = number;
    if (again) {
        print_in_handler("\nstopped at once; progress since the last checkpoint is lost\n");
        _exit(128 + number);
    }
    if (number == SIGINT)
        print_in_handler("\nfinishing this step, then saving; a second Ctrl-C stops at once\n");
    else if (number == SIGTERM)
        print_in_handler("\nfinishing this step, then saving; a second SIGTERM stops at once\n");
    else if (number == SIGHUP)
        print_in_handler("\nfinishing this step, then saving\n");
    errno = error;
}

static inline void catch_signals(void) {
    const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = handle_signal;
    action.sa_flags = SA_RESTART;
    for (int i = 0; i < 4; i++) {
        int catch_always = numbers[i] == SIGINT || numbers[i] == SIGTERM;
        if (sigaction(numbers[i], NULL, &old) == 0 && (catch_always || old.sa_handler != SIG_IGN))
            sigaction(numbers[i], &action, NULL);
    }
}

// OpenMP threads that wait for others spin by default. That is fast as long as each has a core of
// its own; but where another program takes a core, the thread that all others wait for may not run
// for a long time, and a step of 30 ms takes seconds. Unless the user has chosen otherwise, we let
// waiting threads sleep after a tenth of a millisecond; most waits within a step are shorter.
// libgomp (gcc) reads its environment before main(), so the program starts itself again, once.
static inline void let_waiting_threads_sleep(char **argv) {
    const char *names[] = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}, *value;
    char path[PATH_MAX];
    for (int i = 0; i < 3; i++)
        if ((value = getenv(names[i])) && *value) return;
    unsetenv("OMP_WAIT_POLICY");  // empty, it would keep the others from being read
    setenv("GOMP_SPINCOUNT", "3000", 1);
    setenv("KMP_BLOCKTIME", "0", 1);  // libomp (clang) reads this one, and later
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    execv(path, argv);  // returns only if it fails; then the threads spin
}
#endif
