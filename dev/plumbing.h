/*
plumbing.h: what train_gpas.c needs and no lesson is about.

    1  Errors, memory
    2  Options        what can be chosen on the command line, and the presets; files
    3  Tokenizer      text to tokens and back
    4  Checkpoints    safetensors

Like train_gpas.c it is common to C11 and C++17. Whatever fails ends the program with one line.
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
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------
1. Errors, memory
*/

#ifdef TRAIN_GPAS_CUDA
static const char program[] = "train_gpas_cuda", default_dtype[] = "bf16";
#else
static const char program[] = "train_gpas", default_dtype[] = "fp32";
#endif

// Ends the program with one line on stderr, whatever names and values it quotes, and exit status 1.
// A second thread that fails waits.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
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

// count elements of size bytes, zeroed, aligned for vectors. Ends the program if there is no room.
// Large ones ask for pages of 2 MiB: with fewer pages the processor looks up fewer addresses.
static void *allocate(size_t count, size_t size) {
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

// SIGINT and SIGTERM let the training loop end its step and save; a second one ends the program at
// once.
static volatile sig_atomic_t stop_signal;
static void ask_to_stop(int number) { stop_signal = number; }
static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = ask_to_stop;
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);
}

static int step_now;  // the step that is being computed, for messages; 0: none

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

/* ------------------------------------------------------------------------------------------------
2. Options

One table says everything about every option: its name, the default, where its value lives, what is
allowed, the help text, and what becomes of it when a checkpoint is read. A checkpoint stores the
options as text under the same names.
*/

enum { NORM_PRE, NORM_LNS, NORM_SANDWICH, NORM_POST, NORM_DEEPNORM, NORM_MIX };
enum { GATE_SILU, GATE_IDENTITY, GATE_RELU, GATE_LEAKY_RELU, GATE_TANH };
enum { DTYPE_FP32, DTYPE_BF16 };
enum { TEXT_SIZE = 1024, MOST_STEPS = 1000000000, MOST_BATCH = 1000000 };

typedef struct {
    int norm, gpas, gate_act, gate_train, stop_grad;
    double gate_init;
    int vocab_size, layers, channels, hidden, heads, seq_len;
    int preset, dtype, batch, total_batch, recompute, steps, warmup, seed;
    double lr, weight_decay, grad_clip, gate_clip;
    int val_every, val_batches, sample_every, save_every, keep, print_every, length;
    double temperature, top_p;
    char data[TEXT_SIZE], out[TEXT_SIZE], resume[TEXT_SIZE], load[TEXT_SIZE], prompt[TEXT_SIZE];
    char dump_grads[TEXT_SIZE], eval[TEXT_SIZE], eval_choice[TEXT_SIZE];
    int check_finite;
} Options;

// What an option in a checkpoint is to --load and --resume: NETWORK the law for both, NETWORK_DATA
// the default for both, RUN the default for --resume. NOT_STORED is not in it.
enum { NETWORK, NETWORK_DATA, RUN, NOT_STORED };
enum { INTEGER, REAL, CHOICE, TEXT };

typedef struct {
    const char *name, *value;  // value: the default, as text
    int type;
    size_t offset;             // in Options
    double low, high;          // smallest and largest number allowed
    int group;
    const char *help;          // of a CHOICE it begins with what can be chosen
} OptionRow;

#define INT(field) INTEGER, offsetof(Options, field)
#define NUMBER(field) REAL, offsetof(Options, field)
#define ONE_OF(field) CHOICE, offsetof(Options, field), 0, 0
#define STRING(field) TEXT, offsetof(Options, field), 0, 0
#define HEADING(text) {NULL, text, 0, 0, 0, 0, NOT_STORED, NULL}
static const OptionRow option_rows[] = {
    HEADING("The network"),
    {"norm", "pre", ONE_OF(norm), NETWORK, "pre|lns|sandwich|post|deepnorm|mix: where norms stand"},
    {"gpas", "on", ONE_OF(gpas), NETWORK, "off|on: scale the residual stream by gates"},
    {"gate-act", "silu", ONE_OF(gate_act), NETWORK,
     "silu|identity|relu|leaky_relu|tanh: a in a(g)"},
    {"gate-init", "0", NUMBER(gate_init), -100, 100, NETWORK, "the gates' initial value"},
    {"gate-train", "on", ONE_OF(gate_train), NETWORK_DATA,
     "off|on: with off they keep their initial value"},
    {"stop-grad", "on", ONE_OF(stop_grad), NETWORK_DATA, "off|on: off is a plain scale, not GPAS"},
    {"vocab-size", "0", INT(vocab_size), 0, 65536, NETWORK, "V, where DATA has no tokenizer.bin"},
    {"layers", "12", INT(layers), 1, 1000, NETWORK, "L, number of layers"},
    {"channels", "96", INT(channels), 2, 65536, NETWORK, "C, width of the residual stream"},
    {"hidden", "256", INT(hidden), 1, 262144, NETWORK, "H, width of the feed-forward network"},
    {"heads", "4", INT(heads), 1, 4096, NETWORK, "NH; C/NH must be even"},
    {"seq-len", "128", INT(seq_len), 1, 65536, NETWORK_DATA,
     "T, tokens in a sequence (the context)"},
    HEADING("Training"),
    {"preset", "toy", ONE_OF(preset), NOT_STORED, "toy|71m|130m|250m|350m|1b: sizes, steps, rate"},
    {"dtype", default_dtype, ONE_OF(dtype), RUN, "fp32|bf16: numbers on the GPU; fp32 on the CPU"},
    {"batch", "8", INT(batch), 1, 65536, RUN, "B, sequences computed at once"},
    {"total-batch", "0", INT(total_batch), 0, MOST_BATCH, RUN,
     "sequences in a step, a multiple of B; 0: B"},
    {"recompute", "off", ONE_OF(recompute), NOT_STORED,
     "off|on: keep less for the backward pass, compute it again there"},
    {"steps", "800", INT(steps), 0, MOST_STEPS, RUN, "updates to make; 0: none, only tell a story"},
    {"lr", "0.001", NUMBER(lr), 0, 100, RUN, "peak learning rate"},
    {"warmup", "-1", INT(warmup), -1, 1e9, RUN, "steps to the peak; -1: a tenth of all"},
    {"weight-decay", "0", NUMBER(weight_decay), 0, 100, RUN, "AdamW's decay of the matrices"},
    {"grad-clip", "0", NUMBER(grad_clip), 0, 1e9, RUN, "limit of the gradient's norm; 0: none"},
    {"gate-clip", "0", NUMBER(gate_clip), 0, 1e9, RUN, "the same for the gates alone; 0: none"},
    {"seed", "1", INT(seed), 0, INT_MAX, RUN, "of weights, shuffling and stories"},
    HEADING("Files"),
    {"data", "data/toy", STRING(data), NETWORK_DATA, "folder of train.bin, val.bin, tokenizer.bin"},
    {"out", "out", STRING(out), RUN, "folder for logs, stories and checkpoints"},
    {"val-every", "50", INT(val_every), 0, 1e9, RUN, "steps between validations; 0: last only"},
    {"val-batches", "20", INT(val_batches), 0, 1e9, RUN, "batches in a validation; 0: all"},
    {"sample-every", "0", INT(sample_every), 0, 1e9, RUN, "steps between stories; 0: last only"},
    {"save-every", "0", INT(save_every), 0, 1e9, RUN, "steps between saves; 0: last only"},
    {"keep", "2", INT(keep), 1, 1e6, RUN, "newest of those checkpoints to keep"},
    {"print-every", "10", INT(print_every), 1, 1e9, RUN,
     "steps between lines when not on a terminal"},
    {"resume", "", STRING(resume), NOT_STORED, "go on with the run that wrote this checkpoint"},
    {"load", "", STRING(load), NOT_STORED, "start from the weights in this checkpoint"},
    {"dump-grads", "", STRING(dump_grads), NOT_STORED,
     "write the first batch's gradients here, then end"},
    {"check-finite", "off", ONE_OF(check_finite), NOT_STORED,
     "off|on: find the first operation whose result is not finite (slower)"},
    HEADING("Evaluation of the network that --load names, instead of training"),
    {"eval", "", STRING(eval), NOT_STORED, "loss and perplexity on this token file"},
    {"eval-choice", "", STRING(eval_choice), NOT_STORED,
     "accuracy on this file of multiple-choice questions"},
    HEADING("Stories"),
    {"prompt", "", STRING(prompt), NOT_STORED, "how the story begins"},
    {"length", "512", INT(length), 1, 1e6, RUN, "most tokens in a story"},
    {"temperature", "0.8", NUMBER(temperature), 0, 100, RUN,
     "how daring the story is; 0: always the likeliest"},
    {"top-p", "0.95", NUMBER(top_p), 0.001, 1, RUN,
     "draw among the likeliest that share this probability"},
};
enum { NUM_ROWS = sizeof option_rows / sizeof *option_rows };

// The paper's networks, and toy for `make run`.
static void apply_preset(Options *o, int number) {
    static const struct { int C, H, L, NH, T, batch, total_batch, steps; double lr; } presets[] = {
        {96, 256, 12, 4, 128, 8, 0, 800, 1e-3},
        {512, 1368, 12, 8, 256, 16, 512, 10000, 1e-3},
        {768, 2048, 12, 12, 256, 16, 512, 20000, 1e-3},
        {768, 2560, 24, 16, 256, 8, 512, 40000, 1e-3},
        {1024, 2736, 24, 16, 256, 8, 512, 60000, 5e-4},
        {2048, 5461, 24, 32, 256, 4, 512, 100000, 5e-4},
    };
    o->channels = presets[number].C, o->hidden = presets[number].H, o->layers = presets[number].L;
    o->heads = presets[number].NH, o->seq_len = presets[number].T, o->batch = presets[number].batch;
    o->total_batch = presets[number].total_batch, o->steps = presets[number].steps;
    o->lr = presets[number].lr;
}

// Copies choice number `index` of "a|b|c: help" to word (32); returns 0 when there are fewer.
static int nth_choice(const char *help, int index, char *word) {
    for (; index > 0; index--, help++)
        if (*(help += strcspn(help, "|:")) != '|') return 0;
    return snprintf(word, 32, "%.*s", (int)strcspn(help, "|:"), help) > 0;
}

// Reads the text as the row's value into o. Returns NULL, or what is wrong with it.
static const char *set_option(Options *o, const OptionRow *row, const char *text) {
    static char problem[100];
    void *place = (char *)o + row->offset;
    char *end, word[32];
    if (row->type == TEXT) {
        for (const char *p = text; row->group != NOT_STORED && *p; p++)
            if (*p == '"' || *p == '\\' || (unsigned char)*p < ' ')
                return "must hold no quotation mark, backslash or control character";
        return snprintf((char *)place, TEXT_SIZE, "%s", text) < TEXT_SIZE ? NULL : "is too long";
    }
    if (row->type == CHOICE) {
        for (int i = 0; nth_choice(row->help, i, word); i++)
            if (strcmp(word, text) == 0) return *(int *)place = i, (const char *)NULL;
        int n = (int)strcspn(row->help, ":");
        snprintf(problem, sizeof problem, "must be one of %.*s", n, row->help);
        return problem;
    }
    double number = strtod(text, &end);
    int whole = row->type == INTEGER;
    if (end == text || *end || !(number >= row->low && number <= row->high) ||
        (whole && number != floor(number))) {
        snprintf(problem, sizeof problem, "must be a %snumber from %.10g to %.10g",
                 whole ? "whole " : "", row->low, row->high);
        return problem;
    }
    if (whole) *(int *)place = (int)number;
    else *(double *)place = number;
    return NULL;
}

// The row's value as text (TEXT_SIZE); of a number the shortest that reads back as the same number.
static void option_text(const Options *o, const OptionRow *row, char *text) {
    const void *place = (const char *)o + row->offset;
    if (row->type == TEXT) snprintf(text, TEXT_SIZE, "%s", (const char *)place);
    if (row->type == CHOICE) nth_choice(row->help, *(const int *)place, text);
    if (row->type == INTEGER) snprintf(text, TEXT_SIZE, "%d", *(const int *)place);
    if (row->type != REAL) return;
    int digits = 1;
    do snprintf(text, TEXT_SIZE, "%.*g", digits++, *(const double *)place);
    while (strtod(text, NULL) != *(const double *)place);
}

static void print_help(void) {
    printf("Trains a small LLaMA with GPAS (arXiv 2506.22049) and tells stories with it.\n"
           "usage: ./%s [--option value]...       in brackets: the default\n", program);
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++)
        if (!row->name) printf("\n%s\n", row->value);
        else if (!*row->value) printf("  --%-13s %s\n", row->name, row->help);
        else printf("  --%-13s %s [%s]\n", row->name, row->help, row->value);
    printf("\nExamples\n"
           "  ./%s --norm pre --gpas on --out out/gpas\n"
           "  ./%s --resume out/gpas/ckpt_000800.safetensors --steps 1600\n"
           "  ./%s --steps 0 --load out/gpas/ckpt_000800.safetensors --prompt \"Lily\"\n"
           "  ./%s --load out/gpas/ckpt_000800.safetensors --eval data/toy/val.bin\n"
           "OMP_NUM_THREADS sets the number of threads.\n", program, program, program, program);
}

// Is an evaluation all that is asked for?
static int evaluates(const Options *o) { return *o->eval || *o->eval_choice; }

// All options that a checkpoint stores, several a line.
static void print_options(const Options *o) {
    char value[TEXT_SIZE];
    int column = 0;
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (row->group == NOT_STORED) continue;
        option_text(o, row, value);
        column += printf("%s %s  ", row->name, value);
        if (column > 75) column = 0 * printf("\n");
    }
}

// Ends the program when options, each allowed by itself, cannot mean anything together.
static void check_options(const Options *o, const char *const given[NUM_ROWS]) {
    for (int r = 0; r < NUM_ROWS; r++) {
        const char *name = option_rows[r].name;
        if (given[r] && !o->gpas && (!strncmp(name, "gate-", 5) || !strcmp(name, "stop-grad")))
            die("--%s needs --gpas on", name);
    }
    if (o->channels % o->heads || o->channels / o->heads % 2)
        die("--channels %d over --heads %d must be an even whole number", o->channels, o->heads);
    if ((double)o->batch * o->seq_len > 1 << 24)
        die("--batch %d times --seq-len %d is over 16777216 tokens", o->batch, o->seq_len);
    if (o->total_batch % o->batch)
        die("--total-batch %d is no multiple of --batch %d", o->total_batch, o->batch);
    if (o->warmup > o->steps && o->steps > 0)
        die("--warmup %d is more than --steps %d", o->warmup, o->steps);
    if (o->gpas && o->gate_train && o->gate_act == GATE_RELU && o->gate_init <= 0)
        die("a relu gate that starts at %g never moves; give a positive --gate-init", o->gate_init);
    if (!o->gate_train && o->gate_clip > 0) die("--gate-clip needs --gate-train on");
    if (evaluates(o) && !*o->load) die("--eval and --eval-choice need --load, a checkpoint");
    if (evaluates(o) && *o->dump_grads) die("--dump-grads excludes --eval and --eval-choice");
    if (*o->dump_grads && (*o->resume || o->total_batch != o->batch || o->steps == 0))
        die("--dump-grads takes one batch; it excludes --resume, --total-batch and --steps 0");
}

#ifndef TRAIN_GPAS_CUDA
// Does the command line have this option?
static int is_given(const char *const given[NUM_ROWS], const char *name) {
    for (int r = 0; r < NUM_ROWS; r++)
        if (option_rows[r].name && strcmp(option_rows[r].name, name) == 0) return given[r] != NULL;
    return 0;
}

// Ends the program when the network needs more memory than there is, about, before the system ends
// it. A small checkpoint, perhaps a damaged one, must not fill the memory by what it says of
// --batch and --seq-len either, unless the command line says the same.
static void check_memory(const Options *o, const char *const given[NUM_ROWS]) {
    const char *path = *o->resume ? o->resume : o->load;
    struct stat info;
    double C = o->channels, H = o->hidden, L = o->layers, V = o->vocab_size, GiB = 1 << 30;
    double tokens = (double)o->seq_len * (o->steps || evaluates(o) ? o->batch : 1);
    double parameters = (o->steps ? 16 : 4) * (2 * V * C + L * C * (4 * C + 3 * H));
    int last = o->norm == NORM_POST || o->norm == NORM_DEEPNORM, training = o->steps > 0;
    double outs = 2 + (o->gpas && !last) + (o->norm == NORM_SANDWICH);  // of a sublayer, each C
    double inner = (o->recompute || !training ? 1 : L) * (4 * C + 3 * H);
    double shared = V + 6 * C + fmax(C, H) + fmax(3 * C, 2 * H);
    double activations = 4 * tokens * (shared + inner + L * (2 * C * outs + o->heads));
    double all = (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    if (parameters + activations > all)
        die("about %.1f GiB of memory are needed, of %.1f; lower --batch, --seq-len or the "
            "network's size%s", (parameters + activations) / GiB, all / GiB,
            o->recompute || !training ? "" : ", or try --recompute on");
    if (!*path || (is_given(given, "seq-len") && (*o->load || is_given(given, "batch")))) return;
    if (activations > GiB / 2 && stat(path, &info) == 0 && activations > 64.0 * info.st_size)
        die("%s asks for %.1f GiB by its --batch or --seq-len, a lot for a file so small; give "
            "both options if that is meant", path, activations / GiB);
}
#endif

// Reads the options stored in a checkpoint into o; stands with the checkpoints below.
static void checkpoint_options(const char *path, Options *o, int resume,
                               const char *const given[]);

// The options of a command line: the defaults, over them a preset or checkpoint, over all the
// given.
static void parse_options(Options *o, int argc, char **argv) {
    const char *given[NUM_ROWS] = {NULL};
    int preset = 0;
    memset(o, 0, sizeof *o);
    for (int i = 1; i < argc; i++) {
        int r = 0;
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) print_help(), exit(0);
        while (r < NUM_ROWS && !(option_rows[r].name && strncmp(argv[i], "--", 2) == 0 &&
                                 strcmp(argv[i] + 2, option_rows[r].name) == 0)) r++;
        if (r == NUM_ROWS) die("unknown option %s; --help lists them all", argv[i]);
        if (i + 1 == argc) die("%s needs a value", argv[i]);
        if (given[r]) die("%s is given twice", argv[i]);
        given[r] = argv[++i];
    }
    for (int pass = 0; pass < 3; pass++) {  // the defaults; the given; the same over what it named
        for (int r = 0; r < NUM_ROWS; r++) {
            const OptionRow *row = &option_rows[r];
            const char *text = pass ? given[r] : row->value, *problem;
            if (!row->name || !text) continue;
            if ((problem = set_option(o, row, text))) die("--%s %s: %s", row->name, text, problem);
            if (pass == 1 && row->offset == offsetof(Options, preset))
                apply_preset(o, o->preset), preset = 1;
        }
        if (pass != 1) continue;
        if (*o->load && *o->resume) die("--load and --resume exclude each other");
        if (preset && (*o->load || *o->resume)) die("--preset: the checkpoint has its own sizes");
        if (*o->load) checkpoint_options(o->load, o, 0, given);
        if (*o->resume) checkpoint_options(o->resume, o, 1, given);
    }
#ifdef TRAIN_GPAS_CUDA
    if (o->check_finite)
        die("--check-finite is an option of ./train_gpas, which goes on from the same checkpoint");
#else
    if (is_given(given, "dtype") && o->dtype != DTYPE_FP32)
        die("--dtype bf16 needs a GPU and train_gpas_cuda; the CPU computes in fp32");
    o->dtype = DTYPE_FP32;  // whatever the GPU did that wrote the checkpoint
#endif
    if (evaluates(o)) o->steps = 0;
    if (o->total_batch == 0) o->total_batch = o->batch;
    if (o->warmup < 0) o->warmup = o->steps / 10;
    check_options(o, given);
#ifndef TRAIN_GPAS_CUDA  // which asks the GPU
    check_memory(o, given);
#endif
}

// Opens a file to be read; *bytes gets its size. A pipe, which has none and may never end, or a
// folder is refused.
static FILE *open_file(const char *path, size_t *bytes) {
    struct stat info;
    int file = open(path, O_RDONLY | O_NONBLOCK);
    if (file < 0 || fstat(file, &info) != 0) die("cannot open %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("cannot open %s: it is not a file", path);
    *bytes = (size_t)info.st_size;
    return fdopen(file, "rb");
}

// Maps a file of llm.c's into memory, where it stays until the program ends: 256 int32 (magic,
// version 1, a count), then uint16. *bytes gets its size.
static const int32_t *map_file(const char *path, const char *kind, int magic, size_t *bytes) {
    FILE *file = open_file(path, bytes);
    if (*bytes < 1024) die("%s is no %s file: it is shorter than a header", path, kind);
    const int32_t *header =
        (const int32_t *)mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    if (header == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    fclose(file);
    if (header[0] != magic || header[1] != 1)
        die("%s is no %s file of version 1 (magic %d, version %d)", path, kind, header[0],
            header[1]);
    return header;
}

// Opens OUT/name. A run that goes on from start_step keeps the lines up to that step, a new one
// begins with the header.
static FILE *open_log(const Options *o, const char *name, int start_step, const char *header) {
    char path[2048], line[1024];
    long keep = 0;
    snprintf(path, sizeof path, "%s/%s", o->out, name);
    FILE *file = *o->resume ? fopen(path, "r+") : NULL;
    while (file && fgets(line, sizeof line, file) && strchr(line, '\n') &&
           atoi(line) <= start_step)
        keep = ftell(file);
    if (!file) file = fopen(path, "w");
    if (!file || fseek(file, keep, SEEK_SET) != 0 || ftruncate(fileno(file), keep) != 0)
        die("cannot write %s: %s", path, strerror(errno));
    if (keep == 0) fprintf(file, "%s\n", header);
    if (fflush(file) != 0) {
        int error = errno;
        unlink(path), close(fileno(file));  // or exit() would try once more
        die("cannot write %s: %s", path, strerror(error));
    }
    return file;
}

// Ends the line of OUT/name that began at `begin`: it is in the file whole, or the program ends and
// the file ends with the line before.
static void end_line(const Options *o, FILE *file, long begin, const char *name) {
    if (fflush(file) == 0) return;
    int error = errno, cut = ftruncate(fileno(file), begin);
    close(fileno(file));  // or exit() would try once more
    die("cannot write %s/%s: %s%s", o->out, name, strerror(error),
        cut ? "; its last line is not whole" : "");
}

// Cuts off the stories that OUT/samples.txt has from after start_step.
static void cut_samples(const Options *o, int start_step) {
    char path[2048], line[1024];
    long keep = 0;
    int step = 0;
    snprintf(path, sizeof path, "%s/samples.txt", o->out);
    FILE *file = fopen(path, "r+");
    if (!file && errno == ENOENT) return;
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    while (fgets(line, sizeof line, file)) {
        sscanf(line, "--- step %d ---", &step);
        if (step > start_step) break;
        keep = ftell(file);
    }
    if (ftruncate(fileno(file), keep) != 0 || fclose(file) != 0)
        die("cannot write %s: %s", path, strerror(errno));
}

// Waits until the disk has the names in the folder that holds `path`: a file's own fsync() sees to
// its content only. Returns 0 when that fails.
static int sync_folder(const char *path) {
    char folder[2100];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    int file = open(slash ? folder : ".", O_RDONLY);
    int good = file < 0 || fsync(file) == 0 || errno == EINVAL;  // EINVAL: it has no such thing
    if (file >= 0) close(file);
    return good;
}

// Removes from OUT the checkpoints of every --save-every steps but the newest --keep up to `step`,
// and what a run that was killed left half written.
static void remove_old_checkpoints(const Options *o, int step) {
    char path[2048], name[64];
    int every = imax(1, o->save_every);
    int64_t oldest = step - step % every - (o->keep - 1) * (int64_t)every;
    DIR *folder = opendir(o->out);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        int number = 0, half = 0;
        if (sscanf(entry->d_name, "ckpt_%9d.safetensors.tmp%n", &number, &half) != 1) continue;
        snprintf(name, sizeof name, "ckpt_%06d.safetensors%s", number, half ? ".tmp" : "");
        if (strcmp(name, entry->d_name) != 0 || number > step) continue;
        if (!half && (!o->save_every || number % every || number >= oldest)) continue;
        snprintf(path, sizeof path, "%s/%s", o->out, name);
        unlink(path);
    }
    if (folder) closedir(folder);
}

// Makes the folder and those above it.
static void make_folder(const char *path) {
    char part[TEXT_SIZE];
    for (size_t i = 1; i <= strlen(path); i++)
        if (path[i] == '/' || path[i] == 0) {
            snprintf(part, sizeof part, "%.*s", (int)i, path);
            if (mkdir(part, 0777) == 0) sync_folder(part);
            else if (errno != EEXIST)
                die("cannot make the folder %s: %s", part, strerror(errno));
        }
}

/* ------------------------------------------------------------------------------------------------
3. Tokenizer

The file is llama2.c's tokenizer.bin: the longest piece's length, then each id's score, length,
bytes.
*/

enum { TOKEN_BOS = 1, TOKEN_EOS = 2, TOKEN_BYTE = 3, TOKEN_PIECE = 259 };  // byte b: TOKEN_BYTE + b

// Every array (V); the pieces are not ended by zeros.
typedef struct { char *file; const char **pieces; int *lengths, V; float *scores; } Tokenizer;

// Reads DIR/tokenizer.bin: the longest piece's length, then each id's score, length and bytes.
// Returns 0 when there is no such file, ends the program when it is damaged.
static int tokenizer_open(Tokenizer *k, const char *dir) {
    enum { MOST = 65536, LONGEST = 1 << 16 };  // pieces, bytes of a piece
    char path[2048];
    size_t size, at = 4;
    memset(k, 0, sizeof *k);
    snprintf(path, sizeof path, "%s/tokenizer.bin", dir);
    if (access(path, F_OK) != 0 && errno == ENOENT) return 0;
    FILE *file = open_file(path, &size);
    k->file = (char *)allocate(size, 1);
    if (fread(k->file, 1, size, file) != size) die("cannot read %s: %s", path, strerror(errno));
    fclose(file);
    size_t room = size / 8 < MOST ? size / 8 + 1 : (size_t)MOST;
    k->pieces = (const char **)allocate(room, sizeof *k->pieces);
    k->lengths = (int *)allocate(room, sizeof(int));
    k->scores = (float *)allocate(room, sizeof(float));
    for (; at < size && k->V < MOST; k->V++) {
        int *length = &k->lengths[k->V];
        if (size - at < 8) die("%s: piece %d is damaged", path, k->V);
        memcpy(&k->scores[k->V], k->file + at, 4), memcpy(length, k->file + at + 4, 4);
        k->pieces[k->V] = k->file + (at += 8);
        if (*length < 0 || *length > LONGEST || (size_t)*length > size - at)
            die("%s: piece %d is damaged", path, k->V);
        at += *length;
    }
    if (k->V < TOKEN_PIECE || at < size)
        die("%s has %s%d pieces, not 259 to 65536: is it llama2.c's format?", path,
            at < size ? "more than " : "", k->V);
    return 1;
}

static void tokenizer_close(Tokenizer *k) {
    free(k->file), free(k->pieces), free(k->lengths), free(k->scores);
}

// The id of the piece that is spelled a then b, or -1.
static int tokenizer_find(const Tokenizer *k, const char *a, int a_size, const char *b,
                          int b_size) {
    for (int id = TOKEN_PIECE; id < k->V; id++)
        if (k->lengths[id] == a_size + b_size && memcmp(k->pieces[id], a, a_size) == 0 &&
            memcmp(k->pieces[id] + a_size, b, b_size) == 0) return id;
    return -1;
}

static int tokenizer_join(const Tokenizer *k, int a, int b) {
    if (a < TOKEN_PIECE || b < TOKEN_PIECE) return -1;
    return tokenizer_find(k, k->pieces[a], k->lengths[a], k->pieces[b], k->lengths[b]);
}

// One character of `bytes` bytes becomes its piece, or else its bytes. Returns how many tokens.
static int encode_character(const Tokenizer *k, const char *c, int bytes, int *tokens) {
    int id = tokenizer_find(k, c, bytes, "", 0);
    if (id >= 0) return *tokens = id, 1;
    for (int i = 0; i < bytes; i++) tokens[i] = TOKEN_BYTE + (unsigned char)c[i];
    return bytes;
}

// BOS, a space, the text, as sentencepiece does it: characters first; then the neighbours whose
// joint piece has the best score are joined, until no two can be. No text: BOS alone.
// tokens has room for strlen(text) + 2; returns how many were written.
static int tokenizer_encode(const Tokenizer *k, const char *text, int *tokens) {
    int n = 1, best, bytes;
    int *joint = (int *)allocate(strlen(text) + 2, sizeof(int));  // of tokens i, i + 1, or -1
    tokens[0] = TOKEN_BOS;
    if (*text) n += encode_character(k, " ", 1, tokens + n);
    for (; *text; text += bytes) {
        for (bytes = 1; (text[bytes] & 0xC0) == 0x80 && bytes < 4;) bytes++;  // a UTF-8 character
        n += encode_character(k, text, bytes, tokens + n);
    }
    for (int i = 0; i + 1 < n; i++) joint[i] = tokenizer_join(k, tokens[i], tokens[i + 1]);
    for (;;) {
        best = -1;
        for (int i = 0; i + 1 < n; i++)
            if (joint[i] >= 0 && (best < 0 || k->scores[joint[i]] > k->scores[joint[best]]))
                best = i;
        if (best < 0) break;
        tokens[best] = joint[best];
        n--;
        memmove(tokens + best + 1, tokens + best + 2, (n - best - 1) * sizeof(int));
        memmove(joint + best, joint + best + 1, (n - best - 1) * sizeof(int));
        joint[best - 1] = tokenizer_join(k, tokens[best - 1], tokens[best]);
        if (best + 1 < n) joint[best] = tokenizer_join(k, tokens[best], tokens[best + 1]);
    }
    free(joint);
    return n;
}

// How many bytes of text a token is: none for BOS, one less where it has the space before a story.
static int tokenizer_bytes(const Tokenizer *k, int previous, int token) {
    int length = token < TOKEN_BYTE ? 0 : token < TOKEN_PIECE ? 1 : k->lengths[token];
    char first = token < TOKEN_PIECE ? (char)(token - TOKEN_BYTE) : *k->pieces[token];
    return length - (previous == TOKEN_BOS && length && first == ' ');
}

// Writes a token's text, without the space that begins a story and without terminal control bytes.
static void tokenizer_print(const Tokenizer *k, int previous, int token, FILE *file) {
    char byte = (char)(token - TOKEN_BYTE);
    int length = tokenizer_bytes(k, previous, token);
    const char *piece = token < TOKEN_PIECE ? &byte : k->pieces[token] + k->lengths[token] - length;
    for (int i = 0; i < length; i++)
        if (piece[i] == '\n' || ((unsigned char)piece[i] >= ' ' && piece[i] != 127))
            fputc(piece[i], file);
}

/* ------------------------------------------------------------------------------------------------
4. Checkpoints

safetensors: the header's length in 8 bytes, the header as JSON, then the numbers as they lie in
memory. The tensors in the header are a function of the options. So the reader needs no JSON parser:
it reads the options at the header's beginning, writes the header that they must have, and compares.
*/

typedef struct {
    char name[56];       // as in the checkpoint
    int rows, cols;      // of a matrix; a vector has cols 0
    size_t offset, size; // in floats
    float mean, spread;  // initial values are normal
} Tensor;

// What the files hold of a network: its options, and blocks of num_parameters floats each.
typedef struct {
    const Options *o;
    const Tensor *tensors;
    int num_tensors;
    size_t num_parameters;
    float *parameters, *gradients, *adam_m, *adam_v;
} Holdings;

// What a run has besides its network.
typedef struct {
    int step;          // updates done
    int64_t position;  // sequences trained on
    uint64_t random;   // state of the stories' generator
} Progress;

static void print_tensor(FILE *file, const char *prefix, const char *name, const char *type,
                         int rows, int cols, size_t *offset) {
    size_t begin = *offset;
    *offset += 4 * (size_t)rows * imax(cols, 1);
    fprintf(file, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[%d", prefix, name, type, rows);
    if (cols) fprintf(file, ",%d", cols);
    fprintf(file, "],\"data_offsets\":[%zu,%zu]}", begin, *offset);
}

// The header of a checkpoint, which holds the parameters and Adam's moments, or of a file of
// gradients. *bytes gets the size of the numbers that follow it. The caller frees it.
static char *make_header(const Holdings *h, const Progress *p, int gradients, size_t *bytes) {
    const char *prefixes[] = {"", gradients ? "grad." : "adam_m.", gradients ? NULL : "adam_v.",
                              NULL};
    char *text, value[TEXT_SIZE];
    size_t length;
    FILE *file = open_memstream(&text, &length);
    fprintf(file, "{\"__metadata__\":{\"format\":\"pt\",\"kind\":\"%s\",\"step\":\"%d\"",
            gradients ? "gradients" : "checkpoint", p->step);
    fprintf(file, ",\"position\":\"%" PRId64 "\",\"random\":\"%" PRIu64 "\"", p->position,
            p->random);
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (row->group == NOT_STORED) continue;
        option_text(h->o, row, value);
        fprintf(file, ",\"%s\":\"%s\"", row->name, value);
    }
    fputs("}", file);
    *bytes = 0;
    for (const char **prefix = prefixes; *prefix; prefix++)
        for (const Tensor *t = h->tensors; t < h->tensors + h->num_tensors; t++)
            print_tensor(file, *prefix, t->name, "F32", t->rows, t->cols, bytes);
    if (gradients) {
        print_tensor(file, "", "tokens", "I32", h->o->batch, h->o->seq_len, bytes);
        print_tensor(file, "", "targets", "I32", h->o->batch, h->o->seq_len, bytes);
        print_tensor(file, "", "loss", "F32", 1, 0, bytes);
    }
    fprintf(file, "}%*s", (int)(7 - ftell(file) % 8), "");  // a multiple of eight
    fclose(file);
    return text;
}

typedef struct { const void *data; size_t bytes; } Part;

// Writes header and parts under a temporary name, waits until they are on the disk, renames, and
// waits for that: at any moment the file is the old one or the new one, whole. Frees the header.
static void write_safetensors(const char *path, char *header, const Part *parts, int num_parts) {
    char temporary[2100];
    uint64_t length = strlen(header);
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    FILE *file = fopen(temporary, "wb");
    if (!file) die("cannot write %s: %s", temporary, strerror(errno));
    int good = fwrite(&length, 8, 1, file) == 1 && fwrite(header, length, 1, file) == 1;
    for (int i = 0; i < num_parts; i++)
        good = good && fwrite(parts[i].data, parts[i].bytes, 1, file) == 1;
    good = good && fflush(file) == 0 && fsync(fileno(file)) == 0;
    good = fclose(file) == 0 && good;
    if (!good || rename(temporary, path) != 0 || !sync_folder(path)) {
        int error = errno;
        unlink(temporary);
        die("cannot write %s: %s", path, strerror(error));
    }
    free(header);
}

static void checkpoint_write(const char *path, const Holdings *h, const Progress *p) {
    size_t bytes, n = h->num_parameters * sizeof(float);
    Part parts[] = {{h->parameters, n}, {h->adam_m, n}, {h->adam_v, n}};
    write_safetensors(path, make_header(h, p, 0, &bytes), parts, 3);
}

// The gradients of one batch, whose tokens and targets (B,T) and loss go with them.
static void gradients_write(const char *path, const Holdings *h, const Progress *p,
                            const int *tokens, const int *targets, float loss) {
    size_t bytes, n = h->num_parameters * sizeof(float);
    size_t N = (size_t)h->o->batch * h->o->seq_len * sizeof(int);
    Part parts[] = {{h->parameters, n}, {h->gradients, n}, {tokens, N}, {targets, N}, {&loss, 4}};
    write_safetensors(path, make_header(h, p, 1, &bytes), parts, 5);
}

// Opens a checkpoint, reads its header and from that the progress; *options is where the options
// begin, *bytes how long the numbers are. The caller closes the file and frees the header.
static FILE *checkpoint_open(const char *path, char **header, char **options, Progress *p,
                             uint64_t *bytes) {
    size_t size;
    uint64_t length;
    int64_t step = -1;
    int used = 0;
    FILE *file = open_file(path, &size);
    if (fread(&length, 8, 1, file) != 1 || length > 1 << 27 || length + 8 > size)
        die("%s is no checkpoint: it does not begin with a safetensors header", path);
    *bytes = size - 8 - length;
    *header = (char *)allocate(length + 1, 1);
    if (fread(*header, 1, length, file) != length) die("cannot read %s: %s", path, strerror(errno));
    sscanf(*header, "{\"__metadata__\":{\"format\":\"pt\",\"kind\":\"checkpoint\","
           "\"step\":\"%18" SCNd64 "\",\"position\":\"%18" SCNd64 "\",\"random\":\"%20" SCNu64
           "\"%n", &step, &p->position, &p->random, &used);
    if (!used || step < 0 || step > MOST_STEPS || p->position < 0 ||
        p->position > step * MOST_BATCH)
        die("%s is no checkpoint of this program: it lacks the metadata of one", path);
    p->step = (int)step;
    *options = *header + used;
    return file;
}

static void checkpoint_options(const char *path, Options *o, int resume,
                               const char *const given[]) {
    Options stored = *o;
    Progress progress;
    uint64_t bytes;
    char *header, *rest, *end, key[64], theirs[TEXT_SIZE], ours[TEXT_SIZE];
    fclose(checkpoint_open(path, &header, &rest, &progress, &bytes));
    for (int r = 0; r < NUM_ROWS; r++) {
        const OptionRow *row = &option_rows[r];
        if (row->group == NOT_STORED) continue;
        int n = snprintf(key, sizeof key, ",\"%s\":\"", row->name);
        if (strncmp(rest, key, n) != 0 || !(end = strchr(rest + n, '"')))
            die("%s is no checkpoint of this version: it lacks --%s", path, row->name);
        *end = 0;
        if (set_option(&stored, row, rest + n))
            die("%s is damaged: its --%s is %s", path, row->name, rest + n);
        option_text(&stored, row, theirs), option_text(o, row, ours);
        if (given[r] && row->group == NETWORK && strcmp(theirs, ours) != 0)
            die("--%s %s contradicts %s, which has %s", row->name, ours, path, theirs);
        if (resume || row->group <= NETWORK_DATA) set_option(o, row, rest + n);
        rest = end + 1;
    }
    free(header);
}

// Fills the parameters of a network that already has the checkpoint's options; with `resume` also
// Adam's moments and the progress. Where h has no memory for them yet it only looks whether the
// file holds what it should.
static void checkpoint_read(const char *path, const Holdings *h, Progress *p, int resume) {
    Progress progress;
    char *header, *rest, *expected;
    uint64_t bytes;
    size_t right_bytes, n = h->num_parameters;
    FILE *file = checkpoint_open(path, &header, &rest, &progress, &bytes);
    expected = make_header(h, &progress, 0, &right_bytes);
    const char *theirs = strstr(rest, "\"},\""), *ours = strstr(expected, "\"},\"");
    if (strncmp(header, expected, rest - header) != 0 || !theirs ||
        strncmp(ours, theirs, strcspn(ours, " ")) != 0)
        die("%s is damaged: its tensors are not those of its options", path);
    if (bytes != right_bytes)
        die("%s is damaged: %zu bytes of numbers, not %zu", path, (size_t)bytes, right_bytes);
    float *blocks[] = {h->parameters, h->adam_m, h->adam_v};
    for (int i = 0; h->parameters && i < (resume ? 3 : 1); i++)
        if (fread(blocks[i], sizeof(float), n, file) != n)
            die("cannot read %s: %s", path, strerror(errno));
    if (resume) *p = progress;
    fclose(file), free(header), free(expected);
}
