/*
fuzz.c: feeds files and options that nobody would write to the readers in dev/, using clang's
libFuzzer. `make fuzz` builds it four times and runs each for ten minutes (SECONDS=60: for one).

    -DFUZZ_checkpoint   a checkpoint, for --load or --resume
    -DFUZZ_tokens       a token file, or a file of multiple-choice questions
    -DFUZZ_tokenizer    a tokenizer.bin
    -DFUZZ_options      a command line, one argument a line

In the first two, the first byte of the input chooses which. A reader must either accept its input,
or say what is wrong with it and exit with status 1. Here exit() jumps back to the fuzzer, and what
was allocated, opened or mapped is released. The folders beside this file hold the first inputs.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MEMORY, NUMBER, OPENED, MAPPED, MOST = 1 << 17 };
static struct { void *p; size_t size; int kind; } held[MOST];
static int num_held;
static jmp_buf back;

static void *hold(void *p, int kind, size_t size) {
    if (num_held == MOST) abort();
    if (p && p != MAP_FAILED) {
        held[num_held].p = p;
        held[num_held].size = size;
        held[num_held++].kind = kind;
    }
    return p;
}

// Called when the program itself releases p.
static void forget(const void *p) {
    int i = num_held - 1;
    while (i >= 0 && held[i].p != p) i--;
    if (i >= 0) held[i] = held[--num_held];
}

static void give_back(void) {
    while (num_held-- > 0) {
        if (held[num_held].kind == MEMORY) free(held[num_held].p);
        else if (held[num_held].kind == NUMBER) close((int)held[num_held].size);
        else if (held[num_held].kind == OPENED) fclose((FILE *)held[num_held].p);
        else munmap(held[num_held].p, held[num_held].size);
    }
    num_held = 0;
}

static void *held_realloc(void *p, size_t size) {
    forget(p);
    return hold(realloc(p, size), MEMORY, 0);
}

// An open file descriptor is held under the address of its element in this array.
static char numbers[1024];

static int open_number(const char *path, int flags) {
    int file = open(path, flags);
    if (file >= 0) hold(numbers + file % 1024, NUMBER, file);
    return file;
}

static FILE *open_held(int file, const char *mode) {
    forget(numbers + file % 1024);
    return (FILE *)hold(fdopen(file, mode), OPENED, 0);
}

static void free_held(void *p) {
    forget(p);
    free(p);
}

static int close_held(FILE *file) {
    forget(file);
    return fclose(file);
}

__attribute__((noreturn)) static void leave(int status) { longjmp(back, status + 1); }

#define exit(status) leave(status)
#define aligned_alloc(alignment, size) hold((aligned_alloc)(alignment, size), MEMORY, 0)
#define realloc(p, size) held_realloc(p, size)
#define free(p) free_held(p)
#define open(path, flags) open_number(path, flags)
#define fdopen(file, mode) open_held(file, mode)
#define fclose(file) close_held(file)
#define mmap(at, size, protection, flags, file, offset) \
    hold((mmap)(at, size, protection, flags, file, offset), MAPPED, size)
#pragma GCC diagnostic ignored "-Wunused-function"
#define TRAIN_GPAS_NO_MAIN
#include "../../../train_gpas.c"

static char folder[100], path[200];

static void write_input(const char *name, const uint8_t *data, size_t size) {
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int file = (open)(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || write(file, data, size) != (ssize_t)size || close(file) != 0) abort();
}

static void parse(Options *o, int argc, const char *const *words) {
    char *argv[100];
    for (int i = 0; i < argc; i++) argv[i] = (char *)(uintptr_t)words[i];
    parse_options(o, argc, argv);
}

#if defined(FUZZ_checkpoint)
static void read_input(const uint8_t *data, size_t size) {
    static Options o;
    static Model m;
    Progress progress = {0, 0, 0, 0};
    write_input("checkpoint", data + 1, size - 1);
    const char *words[] = {"", data[0] % 2 ? "--resume" : "--load", path, "--data", folder};
    parse(&o, 5, words);
    check_checkpoint(path, &o, &progress);
    int training = *o.resume && o.steps > 0;
    model_create(&m, &o, training ? o.batch : 1, training);
    Snapshot snapshot = model_snapshot(&m);
    checkpoint_read(path, &snapshot, &progress, training);
    model_free(&m);
}

#elif defined(FUZZ_tokens)
static void read_input(const uint8_t *data, size_t size) {
    static Options o;
    static Model m;
    static Run run;
    int T = 1 + data[0] / 2 % 16, tokens[17 * 3], targets[17 * 3];
    write_input("train.bin", data + 1, size - 1);
    memset(&run, 0, sizeof run);
    if (data[0] % 2) {
        dataloader_open(&run.train, folder, "train", T, 300, 0, 7);
        for (int i = 0; i < 9; i++)
            dataloader_batch(&run.train, i * (int64_t)data[0] * 1000003, 3, tokens, targets);
        dataloader_close(&run.train);
        return;
    }
    const char *words[] = {"", "--layers", "1", "--channels", "2", "--hidden", "1", "--heads", "1",
                           "--vocab-size", "300", "--batch", "1", "--seq-len", "24"};
    parse(&o, 15, words);
    snprintf(o.eval_choice, sizeof o.eval_choice, "%s", path);
    model_create(&m, &o, 1, 0);
    run.model = &m;
    run.o = &o;
    run.tokens = (int *)allocate(o.seq_len + 1, sizeof(int));
    evaluate_choices(&run);
    free(run.tokens);
    model_free(&m);
}

#elif defined(FUZZ_tokenizer)
static void read_input(const uint8_t *data, size_t size) {
    static const char *const texts[] = {"Once upon a time", "the the", "caf\xc3\xa9 \xff", " "};
    int tokens[100];
    Tokenizer k;
    FILE *null = fopen("/dev/null", "w");
    hold(null, OPENED, 0);
    write_input("tokenizer.bin", data, size);
    if (!tokenizer_open(&k, folder)) abort();
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        int n = tokenizer_encode(&k, texts[i], tokens);
        if (n > (int)strlen(texts[i]) + 2) abort();
        for (int j = 1; j < n; j++) tokenizer_print(&k, tokens[j - 1], tokens[j], null);
    }
    for (int id = 1; id < k.V; id++) tokenizer_print(&k, id - 1, id, null);
    tokenizer_close(&k);
    fclose(null);
}

#elif defined(FUZZ_options)
static void read_input(const uint8_t *data, size_t size) {
    static Options o;
    static char text[5000];
    const char *words[100] = {""};
    int count = 1;
    memcpy(text, data, size = size < sizeof text ? size : sizeof text - 1);
    text[size] = 0;
    for (char *word = text; word && count < 100; count++) {
        words[count] = word;
        if ((word = strchr(word, '\n'))) *word++ = 0;
    }
    parse(&o, count, words);
    print_options(&o);
}
#endif

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    omp_set_num_threads(1);
    snprintf(folder, sizeof folder, "build/fuzz_files_%d", (int)getpid());
    return mkdir(folder, 0700);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    if (setjmp(back) == 0) read_input(data, size);
    give_back();
    memset(thread_buffer, 0, sizeof thread_buffer);  // give_back() released it
    memset(thread_buffer_size, 0, sizeof thread_buffer_size);
    return 0;
}
