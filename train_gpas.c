/*
train_gpas.c: a LLaMA-like Transformer with GPAS, trained on the CPU. One file, no framework.

GPAS (Gradient-Preserving Activation Scaling, arXiv 2506.22049) is one learnable number per layer:

    y = x - a(g) * stop_gradient(x)         a = SiLU, g the layer's gate, 0 at the start

In a Pre-LN Transformer every layer adds to the residual stream, whose variance therefore grows with
depth until the last layers hardly change it. GPAS scales the stream down after each sum. The
stop-gradient lets the gradient through as if nothing had been scaled, so the early layers lose none.

The file is a lesson, to be read from top to bottom:

     1  Tools            errors, memory, random numbers, a reproducible sum, exp
     2  Options          what can be chosen, and the presets
     3  Layers           gpas, residual, embedding, rmsnorm, rope, swiglu, matmul, attention,
                         crossentropy: each a forward and a backward pass with its derivation
     4  Model            parameters, activations, and one block that is all twelve networks
     5  Optimizer        AdamW, clipping, the learning rate
     6  Data             token files and the tokenizer
     7  Checkpoints      safetensors
     8  Sampling         telling a story
     9  Training         validation, logs, the loop, main

Conventions. B batch, T sequence length, C channels, H feed-forward width, L layers, NH heads,
hs = C/NH, V vocabulary. Matrices are row-major; a shape (B,T,C) stands in the comment of each pointer.
A backward pass is given dout = dLoss/dout. It WRITES the gradient of its input, dinp, and ADDS to the
gradients of its parameters, because those are summed over micro-batches.
No sum depends on how many threads compute it: the results are the same bit for bit.

Common to C11 and C++17, so that train_gpas.cu can include it.
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
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* ------------------------------------------------------------------------------------------------
1. Tools
*/

// Ends the program with one line on stderr and exit status 1.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("train_gpas: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

// count elements of the given size in bytes, zeroed and aligned for vectors; ends the program when
// there is not enough memory.
static void *allocate(size_t count, size_t size) {
    size_t bytes = (count * size / 64 + 1) * 64;
    void *p = count > SIZE_MAX / 2 / size ? NULL : aligned_alloc(64, bytes);
    if (!p)
        die("not enough memory for %.0f MiB; lower --batch, --seq-len or the network's size",
            (double)count * size / (1 << 20));
    return memset(p, 0, bytes);
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

// SplitMix64 (Steele, Lea and Flood 2014): the next 64 random bits. The state only counts, so number
// i of a stream can be had without the numbers before it: threads can share one stream.
#define RANDOM_STEP 0x9E3779B97F4A7C15u
static uint64_t random_bits(uint64_t *state) {
    uint64_t z = (*state += RANDOM_STEP);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Uniform in [0, 1).
static double random_uniform(uint64_t *state) { return (random_bits(state) >> 11) / 9007199254740992.0; }

// Sum over i of a[i] * b[i], in double; b may be NULL for the plain sum. The chunks are the same for
// any number of threads, and are added in order: so is the result.
static double dot(const float *a, const float *b, size_t n) {
    enum { CHUNKS = 64 };
    double part[CHUNKS], sum = 0;
    #pragma omp parallel for
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        size_t begin = n / CHUNKS * chunk, end = chunk == CHUNKS - 1 ? n : n / CHUNKS * (chunk + 1);
        double s = 0;
        #pragma omp simd reduction(+ : s)
        for (size_t i = begin; i < end; i++) s += (double)a[i] * (b ? b[i] : 1);
        part[chunk] = s;
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) sum += part[chunk];
    return sum;
}

// e^x to about 1e-7 relative, written so that the compiler turns a loop over it into vector code:
// x = n ln2 + r with |r| <= ln2 / 2, e^r by its series, 2^n by writing n into the exponent's bits.
// x is held to [-87, 88]. (The tests' finite differences build this file with float as double.)
static inline float exp_fast(float x) {
#ifdef float
    return exp(x);
#else
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts keeps r exact
    float e = 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return e * power;
#endif
}

static inline float sigmoid(float x) { return 1 / (1 + exp_fast(-x)); }

/* ------------------------------------------------------------------------------------------------
2. Options

One table says everything about every option: its name, where its value lives, the default, what is
allowed, the help text, and what becomes of it when a checkpoint is read. A checkpoint stores the
options as text under the same names.
*/

enum { NORM_PRE, NORM_LNS, NORM_SANDWICH, NORM_POST, NORM_DEEPNORM, NORM_MIX };
enum { GATE_SILU, GATE_IDENTITY, GATE_RELU, GATE_LEAKY_RELU, GATE_TANH };

typedef struct {
    int norm, gpas, gate_act, gate_train, stop_grad;
    double gate_init;
    int vocab_size, layers, channels, hidden, heads, seq_len;
    int preset, batch, total_batch, steps, warmup, seed;
    double lr, weight_decay, grad_clip, gate_clip;
    char data[1024], out[1024], resume[1024], load[1024], dump_grads[1024], prompt[1024];
    int val_every, val_batches, sample_every, save_every, keep, print_every;
    int length;
    double temperature, top_p;
} Options;

enum { INTEGER, REAL, CHOICE, TEXT };
// What a checkpoint's value means for --load and for --resume: nothing, the default, or the law.
enum { LOAD_KEEPS = 1, LOAD_FIXES = 2, RESUME_KEEPS = 4, RESUME_FIXES = 8 };
#define STORED (LOAD_KEEPS | LOAD_FIXES | RESUME_KEEPS | RESUME_FIXES)
#define NETWORK (LOAD_FIXES | RESUME_FIXES)

typedef struct {
    const char *name, *value;  // value: the default, as text
    int type;
    size_t offset;             // in Options
    double low, high;          // smallest and largest number allowed
    int stored;
    const char *choices;       // of a CHOICE, separated by blanks
    const char *help;
} OptionRow;

#define AT(field) offsetof(Options, field)
static const OptionRow option_rows[] = {
    {NULL, "The network", 0, 0, 0, 0, 0, NULL, NULL},
    {"norm", "pre", CHOICE, AT(norm), 0, 0, NETWORK, "pre lns sandwich post deepnorm mix",
     "where the RMSNorms stand"},
    {"gpas", "on", CHOICE, AT(gpas), 0, 0, NETWORK, "off on", "scale the residual stream by gates"},
    {"gate-act", "silu", CHOICE, AT(gate_act), 0, 0, NETWORK, "silu identity relu leaky_relu tanh",
     "the gate's activation a"},
    {"gate-init", "0", REAL, AT(gate_init), -100, 100, NETWORK, NULL, "the gates' initial value"},
    {"gate-train", "on", CHOICE, AT(gate_train), 0, 0, LOAD_KEEPS | RESUME_FIXES, "off on",
     "off: the gates keep their value"},
    {"stop-grad", "on", CHOICE, AT(stop_grad), 0, 0, LOAD_KEEPS | RESUME_FIXES, "off on",
     "off: a plain learned scale, not GPAS"},
    {"vocab-size", "0", INTEGER, AT(vocab_size), 0, 65536, NETWORK, NULL,
     "V, only needed where DATA has no tokenizer.bin"},
    {"layers", "12", INTEGER, AT(layers), 1, 1000, NETWORK, NULL, "L"},
    {"channels", "96", INTEGER, AT(channels), 2, 65536, NETWORK, NULL, "C, width of the stream"},
    {"hidden", "256", INTEGER, AT(hidden), 1, 262144, NETWORK, NULL, "H, width of the feed-forward"},
    {"heads", "4", INTEGER, AT(heads), 1, 1024, NETWORK, NULL, "NH; C/NH must be even"},
    {"seq-len", "128", INTEGER, AT(seq_len), 1, 65536, LOAD_KEEPS | RESUME_FIXES, NULL,
     "T, tokens in a sequence"},
    {NULL, "Training", 0, 0, 0, 0, 0, NULL, NULL},
    {"preset", "toy", CHOICE, AT(preset), 0, 0, 0, "toy 71m 130m 250m 350m 1b",
     "sizes, learning rate and steps in one word"},
    {"batch", "8", INTEGER, AT(batch), 1, 65536, RESUME_KEEPS, NULL, "B, sequences computed at once"},
    {"total-batch", "0", INTEGER, AT(total_batch), 0, 1 << 20, RESUME_FIXES, NULL,
     "sequences in a step, a multiple of B; 0: B"},
    {"steps", "800", INTEGER, AT(steps), 0, 1e9, RESUME_KEEPS, NULL, "0: train nothing, tell a story"},
    {"lr", "0.001", REAL, AT(lr), 0, 100, RESUME_KEEPS, NULL, "peak learning rate"},
    {"warmup", "-1", INTEGER, AT(warmup), -1, 1e9, RESUME_KEEPS, NULL,
     "steps until the peak; -1: a tenth of all"},
    {"weight-decay", "0", REAL, AT(weight_decay), 0, 100, RESUME_KEEPS, NULL, "of the matrices"},
    {"grad-clip", "0", REAL, AT(grad_clip), 0, 1e9, RESUME_KEEPS, NULL,
     "largest norm of the whole gradient; 0: no limit"},
    {"gate-clip", "0", REAL, AT(gate_clip), 0, 1e9, RESUME_KEEPS, NULL,
     "largest norm of the gates' gradient; 0: no limit"},
    {"seed", "1", INTEGER, AT(seed), 0, INT_MAX, RESUME_FIXES, NULL, "of weights, shuffling, stories"},
    {NULL, "Files", 0, 0, 0, 0, 0, NULL, NULL},
    {"data", "data/toy", TEXT, AT(data), 0, 0, LOAD_KEEPS | RESUME_KEEPS, NULL,
     "folder of train*.bin, val*.bin, tokenizer.bin"},
    {"out", "out", TEXT, AT(out), 0, 0, RESUME_KEEPS, NULL, "folder for logs, stories, checkpoints"},
    {"val-every", "50", INTEGER, AT(val_every), 0, 1e9, RESUME_KEEPS, NULL,
     "steps between validations; 0: only at the end"},
    {"val-batches", "20", INTEGER, AT(val_batches), 0, 1e9, RESUME_KEEPS, NULL,
     "batches in a validation; 0: all there are"},
    {"sample-every", "0", INTEGER, AT(sample_every), 0, 1e9, RESUME_KEEPS, NULL,
     "steps between stories; 0: only at the end"},
    {"save-every", "0", INTEGER, AT(save_every), 0, 1e9, RESUME_KEEPS, NULL,
     "steps between checkpoints; 0: only at the end"},
    {"keep", "2", INTEGER, AT(keep), 1, 1e9, RESUME_KEEPS, NULL, "newest checkpoints kept of those"},
    {"print-every", "10", INTEGER, AT(print_every), 1, 1e9, RESUME_KEEPS, NULL,
     "steps between lines where the output is no terminal"},
    {"resume", "", TEXT, AT(resume), 0, 0, 0, NULL, "go on with the run that wrote this checkpoint"},
    {"load", "", TEXT, AT(load), 0, 0, 0, NULL, "start from the weights in this checkpoint"},
    {"dump-grads", "", TEXT, AT(dump_grads), 0, 0, 0, NULL,
     "write the first batch, its loss and gradients, and end"},
    {NULL, "Stories", 0, 0, 0, 0, 0, NULL, NULL},
    {"prompt", "", TEXT, AT(prompt), 0, 0, 0, NULL, "how the story begins"},
    {"length", "512", INTEGER, AT(length), 1, 1e6, RESUME_KEEPS, NULL, "most tokens in a story"},
    {"temperature", "0.8", REAL, AT(temperature), 0, 100, RESUME_KEEPS, NULL,
     "0: always the likeliest token"},
    {"top-p", "0.95", REAL, AT(top_p), 0, 1, RESUME_KEEPS, NULL,
     "draw from the likeliest tokens of this total probability"},
};
enum { NUM_ROWS = sizeof option_rows / sizeof *option_rows };

// The sizes of the paper's networks (Table 1 and appendix), and toy for `make run`.
typedef struct { int C, H, L, NH, T, batch, total_batch, steps; double lr; } Preset;
static const Preset presets[] = {
    {96, 256, 12, 4, 128, 8, 0, 800, 1e-3},
    {512, 1368, 12, 8, 256, 16, 512, 10000, 1e-3},
    {768, 2048, 12, 12, 256, 16, 512, 20000, 1e-3},
    {768, 2560, 24, 16, 256, 8, 512, 40000, 1e-3},
    {1024, 2736, 24, 16, 256, 8, 512, 60000, 5e-4},
    {2048, 5461, 24, 32, 256, 4, 512, 100000, 5e-4},
};

static void apply_preset(Options *o, int number) {
    const Preset *p = &presets[number];
    o->preset = number;
    o->channels = p->C, o->hidden = p->H, o->layers = p->L, o->heads = p->NH, o->seq_len = p->T;
    o->batch = p->batch, o->total_batch = p->total_batch, o->steps = p->steps, o->lr = p->lr;
}

// Copies word number `index` of a list separated by blanks; returns 0 when there are fewer.
static int nth_word(const char *list, int index, char *word, size_t size) {
    while (index-- > 0) {
        list = strchr(list, ' ');
        if (!list) return 0;
        list++;
    }
    size_t n = strcspn(list, " ");
    if (n >= size) n = size - 1;
    memcpy(word, list, n);
    word[n] = 0;
    return 1;
}

// Reads the text as the row's value into o. Returns NULL, or what is wrong with it.
static const char *set_option(Options *o, const OptionRow *row, const char *text) {
    static char problem[300];
    void *place = (char *)o + row->offset;
    char *end, word[32];
    if (row->type == TEXT) {
        if (snprintf((char *)place, 1024, "%s", text) >= 1024) return "is too long";
        for (const char *p = text; row->stored && *p; p++)
            if (*p == '"' || *p == '\\' || (unsigned char)*p < ' ')
                return "must hold no quotation mark, backslash or control character";
        return NULL;
    }
    if (row->type == CHOICE) {
        for (int i = 0; nth_word(row->choices, i, word, sizeof word); i++)
            if (strcmp(word, text) == 0) return *(int *)place = i, (const char *)NULL;
        snprintf(problem, sizeof problem, "must be one of: %s", row->choices);
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

// The row's value as text; of a number the shortest text that reads back as the same number.
static void option_text(const Options *o, const OptionRow *row, char *text, size_t size) {
    const void *place = (const char *)o + row->offset;
    if (row->type == TEXT) snprintf(text, size, "%s", (const char *)place);
    if (row->type == CHOICE) nth_word(row->choices, *(const int *)place, text, size);
    if (row->type == INTEGER) snprintf(text, size, "%d", *(const int *)place);
    if (row->type == REAL)
        for (int digits = 1; digits <= 17; digits++) {
            snprintf(text, size, "%.*g", digits, *(const double *)place);
            if (strtod(text, NULL) == *(const double *)place) break;
        }
}

static void print_help(void) {
    printf("train_gpas: trains a small LLaMA with GPAS (arXiv 2506.22049) and tells stories with it.\n"
           "usage: ./train_gpas [--option value]...\n");
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (!row->name) printf("\n%s\n", row->value);
        else {
            printf("  --%-13s %s", row->name, row->help);
            if (row->choices) printf(" (%s)", row->choices);
            if (*row->value) printf(" [%s]", row->value);
            printf("\n");
        }
    }
    printf("\nIn brackets: the default, that of --preset toy. Examples:\n"
           "  ./train_gpas --norm pre --gpas on --out out/pre_gpas\n"
           "  ./train_gpas --resume out/pre_gpas/ckpt_000800.safetensors --steps 1600\n"
           "  ./train_gpas --steps 0 --load out/pre_gpas/ckpt_000800.safetensors --prompt \"Lily\"\n"
           "OMP_NUM_THREADS sets the number of threads.\n");
}

// Combinations that cannot mean anything. given[i] says that option row i was on the command line.
static void check_options(Options *o, const char *given[NUM_ROWS]) {
    for (int i = 0; i < NUM_ROWS; i++) {
        const char *name = option_rows[i].name;
        if (given[i] && !o->gpas && (strncmp(name, "gate-", 5) == 0 || strcmp(name, "stop-grad") == 0))
            die("--%s needs --gpas on", name);
    }
    if (o->channels % o->heads) die("--channels %d is no multiple of --heads %d", o->channels, o->heads);
    if (o->channels / o->heads % 2) die("--channels / --heads must be even for the rotary embedding");
    if (o->total_batch % o->batch)
        die("--total-batch %d is no multiple of --batch %d", o->total_batch, o->batch);
    if (o->warmup > o->steps) die("--warmup %d is more than --steps %d", o->warmup, o->steps);
    if (o->gpas && o->gate_train && o->gate_act == GATE_RELU && o->gate_init <= 0 && !*o->load)
        die("a relu gate that starts at %g never moves; give --gate-init a positive value", o->gate_init);
    if (!o->gate_train && o->gate_clip > 0) die("--gate-clip needs --gate-train on");
    if (*o->dump_grads && (*o->resume || o->total_batch != o->batch))
        die("--dump-grads takes one batch of --batch sequences, without --resume or --total-batch");
    if (o->top_p == 0) die("--top-p must be more than 0");
}

// Reads the stored options of a checkpoint into o; defined with the checkpoints below.
static void checkpoint_options(const char *path, Options *o, int kept, int fixed, const char **given);

// The options of this command line: the defaults, then the preset, the checkpoint, what is given.
static void parse_options(Options *o, int argc, char **argv) {
    const char *given[NUM_ROWS] = {NULL};
    int preset = 0;
    memset(o, 0, sizeof *o);
    for (int i = 1; i < argc; i++) {
        int r = 0;
        if (strcmp(argv[i], "--help") == 0) print_help(), exit(0);
        while (r < NUM_ROWS && !(option_rows[r].name && strncmp(argv[i], "--", 2) == 0 &&
                                 strcmp(argv[i] + 2, option_rows[r].name) == 0)) r++;
        if (r == NUM_ROWS) die("unknown option %s; --help lists them all", argv[i]);
        if (i + 1 == argc) die("%s needs a value", argv[i]);
        if (given[r]) die("%s is given twice", argv[i]);
        given[r] = argv[++i];
    }
    for (int pass = 0; pass < 3; pass++) {  // 0: defaults, 1: given, 2: given again, over the rest
        for (int r = 0; r < NUM_ROWS; r++) {
            const char *text = pass ? given[r] : option_rows[r].value;
            if (!option_rows[r].name || !text) continue;
            const char *problem = set_option(o, &option_rows[r], text);
            if (problem) die("--%s %s: %s", option_rows[r].name, text, problem);
            if (pass == 1 && option_rows[r].offset == AT(preset)) apply_preset(o, o->preset), preset = 1;
        }
        if (pass == 1) {
            if (*o->load && *o->resume) die("--load and --resume exclude each other");
            if (preset && (*o->load || *o->resume)) die("--preset: the checkpoint has its own sizes");
            if (*o->load) checkpoint_options(o->load, o, LOAD_KEEPS, LOAD_FIXES, given);
            if (*o->resume) checkpoint_options(o->resume, o, RESUME_KEEPS, RESUME_FIXES, given);
        }
    }
    if (o->total_batch == 0) o->total_batch = o->batch;
    if (o->warmup < 0) o->warmup = o->steps / 10;
    check_options(o, given);
}

/* ------------------------------------------------------------------------------------------------
3. Layers

GPAS first. The layers are plain loops; whatever is a product of matrices goes to gemm(), the one place
that is written for speed.
*/

// The gate's activation a(g) and its slope a'(g). SiLU: a = g s with s = sigmoid(g), so that
// a' = s + g s (1 - s); a(0) = 0 and a'(0) = 1/2: a new gate does nothing, but it can learn.
static float gate_value(float g, int act) {
    switch (act) {
    case GATE_SILU: return g / (1 + expf(-g));
    case GATE_RELU: return g > 0 ? g : 0;
    case GATE_LEAKY_RELU: return g > 0 ? g : 0.01f * g;
    case GATE_TANH: return tanhf(g);
    default: return g;
    }
}

static float gate_slope(float g, int act) {
    float s = 1 / (1 + expf(-g));
    switch (act) {
    case GATE_SILU: return s + g * s * (1 - s);
    case GATE_RELU: return g > 0 ? 1 : 0;
    case GATE_LEAKY_RELU: return g > 0 ? 1 : 0.01f;
    case GATE_TANH: return 1 - tanhf(g) * tanhf(g);
    default: return 1;
    }
}

// GPAS, paper section 3:  y = x - a(g) sg(x), where sg() is the stop-gradient.
// Forward, sg(x) is x: the activation shrinks to (1 - a(g)) x.
// out and inp (n); gate: one number; act: GATE_*.
static void gpas_forward(float *out, const float *inp, float gate, int act, size_t n) {
    float scale = 1 - gate_value(gate, act);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = scale * inp[i];
}

// Given dy, wanted dx and dg.
//   dx: sg(x) is a constant to the derivative, so dy/dx = 1:    dx = dy
//       The gradient passes unscaled. With a plain scale y = (1 - a(g)) x it would be (1 - a(g)) dy,
//       and after L layers of shrinking little of it would be left: this is the whole idea.
//   dg: dy_i/dg = -a'(g) x_i for each element i, therefore      dg = -a'(g) sum_i x_i dy_i
// dinp, dout, inp (n), dinp may be dout; dgate: one number, added to, or NULL if the gate is fixed.
static void gpas_backward(float *dinp, float *dgate, const float *dout, const float *inp, float gate,
                          int act, int stop_grad, size_t n) {
    if (dgate) *dgate -= gate_slope(gate, act) * (float)dot(inp, dout, n);
    if (stop_grad && dinp == dout) return;
    float scale = stop_grad ? 1 : 1 - gate_value(gate, act);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dinp[i] = scale * dout[i];
}

// The residual sum: out = alpha shortcut + branch. alpha is 1 but for DeepNorm. All (n).
static void residual_forward(float *out, const float *shortcut, const float *branch, float alpha,
                             size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = alpha * shortcut[i] + branch[i];
}

// d(out)/d(shortcut) = alpha and d(out)/d(branch) = 1: dshortcut = alpha dout, and the gradient of the
// branch is dout itself, the same array. dshortcut, dout (n), dshortcut may be dout.
static void residual_backward(float *dshortcut, const float *dout, float alpha, size_t n) {
    if (alpha == 1 && dshortcut == dout) return;
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dshortcut[i] = alpha * dout[i];
}

// Each token's row of the table: out[n,:] = weight[tokens[n],:]. out (N,C), weight (V,C), tokens (N).
static void embedding_forward(float *out, const int *tokens, const float *weight, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        memcpy(out + (size_t)n * C, weight + (size_t)tokens[n] * C, C * sizeof(float));
}

// A row of the table was copied to every place its token stands at, so its gradient is the sum over
// those places. Each thread owns some channels: no two threads add to the same number.
// dweight (V,C), added to; dout (N,C).
static void embedding_backward(float *dweight, const float *dout, const int *tokens, int N, int C) {
    enum { BLOCK = 32 };
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK)
        for (int n = 0; n < N; n++) {
            float *dw = dweight + (size_t)tokens[n] * C;
            const float *dy = dout + (size_t)n * C;
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dw[c] += dy[c];
        }
}

// RMSNorm (arXiv 1910.07467): y = w x r with r = 1 / sqrt(mean(x^2) + 1e-6), over each row's channels.
// out, inp (N,C); weight (C); rstd (N) keeps r for the backward pass. eps is the design's 1e-6.
static void rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int N,
                            int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = inp + (size_t)n * C;
        float *y = out + (size_t)n * C, sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += x[c] * x[c];
        float r = 1 / sqrtf(sum / C + 1e-6f);
        #pragma omp simd
        for (int c = 0; c < C; c++) y[c] = weight[c] * x[c] * r;
        rstd[n] = r;
    }
}

// Given dy, wanted dx and dw. Row by row, with u = w dy (the gradient of x r) and m = mean(x^2) + eps:
//   y_c = w_c x_c r,  and r = m^(-1/2) depends on every x_c:  dr/dx_c = -1/2 m^(-3/2) 2 x_c / C
//                                                                     = -r^3 x_c / C
//   dx_c = u_c r + (sum_k u_k x_k) dr/dx_c = r (u_c - x_c r^2 mean_k(u_k x_k))
//   dw_c = sum over rows of dy_c x_c r
// dinp, dout, inp (N,C), dinp may be dout only if dweight is not wanted; weight (C); rstd (N);
// dweight (C), added to.
static void rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight, const float *rstd, int N, int C) {
    enum { BLOCK = 32 };
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
        float *dx = dinp + (size_t)n * C, r = rstd[n], sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += weight[c] * dy[c] * x[c];
        float pull = r * r * sum / C;
        #pragma omp simd
        for (int c = 0; c < C; c++) dx[c] = r * (weight[c] * dy[c] - x[c] * pull);
    }
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK)  // each thread owns some channels, as in embedding_backward
        for (int n = 0; n < N; n++) {
            const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dweight[c] += dy[c] * x[c] * rstd[n];
        }
}

// The angles of RoPE (arXiv 2104.09864): pair j of a head turns by t * 10000^(-2j/hs) at position t.
// table (T,hs/2,2): the cosine and sine.
static void rope_angles(float *table, int T, int hs) {
    for (int t = 0; t < T; t++)
        for (int j = 0; j < hs / 2; j++) {
            double angle = t * pow(10000, -2.0 * j / hs);
            *table++ = (float)cos(angle);
            *table++ = (float)sin(angle);
        }
}

// RoPE, in place: turns the pairs (x0, x1) of adjacent channels of every query and key by their
// position's angle: (x0 cos - x1 sin, x0 sin + x1 cos). The product of a query and a key then depends
// on how far apart they stand. Values are left alone.
// qkv (N,3C), the rows being positions from, from + 1, ... of sequences of length T (from > 0 only if
// there is but one sequence); direction 1 turns forward, -1 back.
static void rope_turn(float *qkv, const float *table, int N, int T, int from, int C, int hs,
                      int direction) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *angles = table + (size_t)((from + n) % T) * hs;
        float *row = qkv + (size_t)n * 3 * C;
        for (int head = 0; head < 2 * C; head += hs)  // all heads of the queries, then of the keys
            for (int j = 0; j < hs; j += 2) {
                float cosine = angles[j], sine = direction * angles[j + 1];
                float x0 = row[head + j], x1 = row[head + j + 1];
                row[head + j] = x0 * cosine - x1 * sine;
                row[head + j + 1] = x0 * sine + x1 * cosine;
            }
    }
}

static void rope_forward(float *qkv, const float *table, int N, int T, int from, int C, int hs) {
    rope_turn(qkv, table, N, T, from, C, hs, 1);
}

// y = R x with R a rotation, so dx = R^T dy, and the transpose of a rotation is the rotation back.
// dqkv (N,3C), in place.
static void rope_backward(float *dqkv, const float *table, int N, int T, int C, int hs) {
    rope_turn(dqkv, table, N, T, 0, C, hs, -1);
}

// SwiGLU (arXiv 2002.05202): out = silu(a) * b, silu(a) = a sigmoid(a).
// out (N,H); inp (N,2H): a row holds its H values of a = w1 x, then those of b = w3 x.
static void swiglu_forward(float *out, const float *inp, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *a = inp + (size_t)n * 2 * H, *b = a + H;
        float *y = out + (size_t)n * H;
        #pragma omp simd
        for (int i = 0; i < H; i++) y[i] = a[i] * sigmoid(a[i]) * b[i];
    }
}

// With s = sigmoid(a):  db = dy silu(a) = dy a s
//                       da = dy b silu'(a) = dy b (s + a s (1 - s))
// dinp, inp (N,2H); dout (N,H).
static void swiglu_backward(float *dinp, const float *dout, const float *inp, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *a = inp + (size_t)n * 2 * H, *b = a + H, *dy = dout + (size_t)n * H;
        float *da = dinp + (size_t)n * 2 * H, *db = da + H;
        #pragma omp simd
        for (int i = 0; i < H; i++) {
            float s = sigmoid(a[i]);
            da[i] = dy[i] * b[i] * (s + a[i] * s * (1 - s));
            db[i] = dy[i] * a[i] * s;
        }
    }
}

/*
Matrix multiplication. Nine tenths of a training step are spent here, so this is the one place that is
written for the machine. A core can do 16 multiply-adds an instruction (AVX-512), but only if its
operands are in registers; memory is a hundred times too slow. Each level below makes one move of data
serve many multiply-adds:

  registers  multiply_tile() keeps a tile of MR x NR results in registers over the whole depth k. Each
             step loads NR numbers of B and MR of A and does MR * NR multiply-adds.
  L1, L2     pack() copies A and B into panels that lie in memory in the very order in which the tile
             reads them, so every load is the next one. Depth is cut to KC: an MC x KC block of A stays
             in the L2 cache while all panels of B pass by it.
  L3         B is cut to NC columns, A to AC rows, so that the packed copies stay in the L3 cache.
  cores      panels and blocks are shared out. Every result is summed by one thread, in the order of k:
             who computes it changes nothing.

The vectors are the compiler's own extension: the same lines become AVX-512, AVX2, SSE or NEON.
*/
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 12 };  // 24 of the 32 registers hold the tile
#elif defined(__AVX2__)
enum { VECTOR_BYTES = 32, MR = 6 };   // 12 of 16
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 12 };  // 24 of 32
#else
enum { VECTOR_BYTES = 16, MR = 6 };   // 12 of 16
#endif
enum { LANES = VECTOR_BYTES / sizeof(float), NR = 2 * LANES };
enum { KC = 512, MC = 8 * MR, NC = 4096, AC = 340 * MR };
typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(float)), may_alias));

// Memory for packed panels, one pair per thread that calls gemm(), kept from call to call.
static float *packed[2];
static size_t packed_size[2];
#pragma omp threadprivate(packed, packed_size)

static float *packing_space(int which, size_t size) {
    if (packed_size[which] < size) {
        free(packed[which]);
        packed[which] = (float *)allocate(size, sizeof(float));
        packed_size[which] = size;
    }
    return packed[which];
}

static void free_packing_space(void) {
    #pragma omp parallel
    for (int which = 0; which < 2; which++) {
        free(packed[which]);
        packed[which] = NULL, packed_size[which] = 0;
    }
}

// One panel: for each k the `lines` numbers src[line * line_step + k * k_step], filled up with zeros
// to `width`. dst (depth,width). Sixteen k at a time: a cache line that is touched is used up.
static void pack(float *dst, const float *src, size_t line_step, size_t k_step, int lines, int width,
                 int depth) {
    if (line_step == 1 && lines == width) {
        for (int k = 0; k < depth; k++) memcpy(dst + k * width, src + k * k_step, width * sizeof(float));
        return;
    }
    for (int k0 = 0; k0 < depth; k0 += 16)
        for (int line = 0; line < width; line++)
            for (int k = k0; k < imin(depth, k0 + 16); k++)
                dst[k * width + line] = line < lines ? src[line * line_step + k * k_step] : 0;
}

// C (rows,columns), with rows <= MR and columns <= NR, = or += a panel of A times a panel of B.
static void multiply_tile(float *c, size_t ldc, const float *a, const float *b, int depth, int rows,
                          int columns, int accumulate) {
    Vector tile[MR][2];
    memset(tile, 0, sizeof tile);
    for (int k = 0; k < depth; k++, a += MR, b += NR) {
        Vector b0 = *(const Vector *)b, b1 = *(const Vector *)(b + LANES);
        for (int i = 0; i < MR; i++) {
            tile[i][0] += a[i] * b0;
            tile[i][1] += a[i] * b1;
        }
    }
    if (rows == MR && columns == NR) {
        for (int i = 0; i < MR; i++, c += ldc) {
            Vector *c0 = (Vector *)c, *c1 = (Vector *)(c + LANES);
            if (accumulate) tile[i][0] += *c0, tile[i][1] += *c1;
            *c0 = tile[i][0], *c1 = tile[i][1];
        }
        return;
    }
    float edge[MR][NR];
    memcpy(edge, tile, sizeof edge);
    for (int i = 0; i < rows; i++, c += ldc)
        for (int j = 0; j < columns; j++) c[j] = (accumulate ? c[j] : 0) + edge[i][j];
}

// One block of A, B and C at a depth of at most KC: pack both, then multiply panel by panel.
static void multiply_block(float *c, size_t ldc, const float *a, size_t a_row, size_t a_k,
                           const float *b, size_t b_column, size_t b_k, int M, int N, int depth,
                           int accumulate) {
    int panels_a = (M + MR - 1) / MR, panels_b = (N + NR - 1) / NR;
    float *pa = packing_space(0, (size_t)panels_a * MR * depth);
    float *pb = packing_space(1, (size_t)panels_b * NR * depth);
    #pragma omp parallel if ((double)M * N * depth > 1e5)
    {
        #pragma omp for nowait
        for (int p = 0; p < panels_b; p++)
            pack(pb + (size_t)p * NR * depth, b + p * NR * b_column, b_column, b_k,
                 imin(NR, N - p * NR), NR, depth);
        #pragma omp for
        for (int p = 0; p < panels_a; p++)
            pack(pa + (size_t)p * MR * depth, a + p * MR * a_row, a_row, a_k,
                 imin(MR, M - p * MR), MR, depth);
        #pragma omp for schedule(dynamic)
        for (int i0 = 0; i0 < M; i0 += MC)
            for (int j = 0; j < N; j += NR)
                for (int i = i0; i < imin(M, i0 + MC); i += MR)
                    multiply_tile(c + i * ldc + j, ldc, pa + (size_t)i * depth, pb + (size_t)j * depth,
                                  depth, imin(MR, M - i), imin(NR, N - j), accumulate);
    }
}

// C = A B, or C += A B with accumulate. C (M,N) with rows ldc apart; A (M,K): element (i,k) is
// a[i * a_row + k * a_k]; B (K,N): element (k,j) is b[j * b_column + k * b_k]. So a transposed matrix
// is only a change of strides. M, N and K at least 1.
static void gemm(float *c, size_t ldc, const float *a, size_t a_row, size_t a_k, const float *b,
                 size_t b_column, size_t b_k, int M, int N, int K, int accumulate) {
    int depth = (K - 1) / ((K + KC - 1) / KC) + 1;  // equal parts of at most KC
    for (int j = 0; j < N; j += NC)
        for (int i = 0; i < M; i += AC)
            for (int k = 0; k < K; k += depth)
                multiply_block(c + i * ldc + j, ldc, a + i * a_row + k * a_k, a_row, a_k,
                               b + j * b_column + k * b_k, b_column, b_k, imin(AC, M - i),
                               imin(NC, N - j), imin(depth, K - k), accumulate || k > 0);
}

// A linear layer without bias: out = inp weight^T. out (N,OC), inp (N,C), weight (OC,C).
static void matmul_forward(float *out, const float *inp, const float *weight, int N, int C, int OC) {
    gemm(out, OC, inp, C, 1, weight, C, 1, N, OC, C, 0);
}

// out_no = sum_c inp_nc w_oc. Each inp_nc feeds all outputs of its row, each w_oc all rows:
//   dinp_nc = sum_o dout_no w_oc        dinp = dout weight          (N,OC) (OC,C)
//   dw_oc   = sum_n dout_no inp_nc      dweight = dout^T inp        (OC,N) (N,C)
// dinp, inp (N,C); dout (N,OC); weight, dweight (OC,C), dweight added to.
static void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC) {
    gemm(dinp, C, dout, OC, 1, weight, 1, C, N, C, OC, 0);
    gemm(dweight, C, dout, 1, OC, inp, 1, C, OC, C, N, 1);
}

/*
Causal attention, each head by itself. With q_t, k_s, v_s (hs numbers each) of one head:

    S_ts = q_t . k_s / sqrt(hs)  for s <= t        P_t = softmax over s of S_t        o_t = sum_s P_ts v_s

P has T x T numbers per head: too many to keep. As in FlashAttention (arXiv 2205.14135) it exists only
in blocks of QUERIES x KEYS. The softmax is carried along: after each block of keys a row knows the
largest score so far, m, and the sum of e^(S - m). When a larger score turns up, what has been summed is
corrected by e^(m_old - m_new). At the end only lse_t = m + log(sum) is kept, one number per row, from
which the backward pass gets any P_ts = e^(S_ts - lse_t) again.
*/
enum { QUERIES = 96, KEYS = 256 };

// The scores of a block become P times its rows' sums: masks, exponentiates, and carries along m and
// sum. score (queries,keys) with rows KEYS apart; query i stands at position t0 + i, key j at s0 + j;
// m, sum (queries); out (queries,hs) with rows C apart: what has been summed so far, corrected here.
static void softmax_block(float *score, float *m, float *sum, float *out, int queries, int keys, int t0,
                          int s0, float scale, int hs, int C) {
    for (int i = 0; i < queries; i++, score += KEYS, out += C) {
        int seen = imax(0, imin(keys, t0 + i - s0 + 1));  // keys at or before the query
        float largest = m[i], block = 0;
        #pragma omp simd reduction(max : largest)
        for (int j = 0; j < seen; j++) largest = score[j] * scale > largest ? score[j] * scale : largest;
        #pragma omp simd reduction(+ : block)
        for (int j = 0; j < seen; j++) {
            score[j] = exp_fast(score[j] * scale - largest);
            block += score[j];
        }
        for (int j = seen; j < keys; j++) score[j] = 0;
        float correction = s0 ? exp_fast(m[i] - largest) : 0;
        sum[i] = sum[i] * correction + block;
        m[i] = largest;
        if (correction != 1)
            for (int c = 0; c < hs; c++) out[c] *= correction;
    }
}

// out (B,T,C); lse (B,NH,T); qkv (B,T,3C): a row holds the queries of all heads, then keys, values.
// Computes the rows from, from + 1, ... of out; from > 0 only for B = 1.
static void attention_forward(float *out, float *lse, const float *qkv, int B, int T, int from, int C,
                              int NH) {
    int hs = C / NH, blocks = (T - from + QUERIES - 1) / QUERIES;
    float scale = 1 / sqrtf((float)hs);
    #pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * NH * blocks; task++) {
        int b = task / blocks / NH, h = task / blocks % NH, t0 = from + task % blocks * QUERIES;
        int queries = imin(QUERIES, T - t0);
        const float *q = qkv + ((size_t)b * T + t0) * 3 * C + h * hs;
        const float *k = qkv + (size_t)b * T * 3 * C + C + h * hs, *v = k + C;
        float *o = out + ((size_t)b * T + t0) * C + h * hs;
        float score[QUERIES * KEYS], m[QUERIES], sum[QUERIES];
        for (int i = 0; i < queries; i++) m[i] = -1e30f, sum[i] = 0;
        for (int i = 0; i < queries; i++) memset(o + (size_t)i * C, 0, hs * sizeof(float));
        for (int s0 = 0; s0 < t0 + queries; s0 += KEYS) {
            int keys = imin(KEYS, t0 + queries - s0);
            size_t skip = (size_t)s0 * 3 * C;
            gemm(score, KEYS, q, 3 * C, 1, k + skip, 3 * C, 1, queries, keys, hs, 0);
            softmax_block(score, m, sum, o, queries, keys, t0, s0, scale, hs, C);
            gemm(o, C, score, KEYS, 1, v + skip, 1, 3 * C, queries, hs, keys, 1);
        }
        for (int i = 0; i < queries; i++) {
            for (int c = 0; c < hs; c++) o[(size_t)i * C + c] /= sum[i];
            lse[((size_t)b * NH + h) * T + t0 + i] = m[i] + logf(sum[i]);
        }
    }
}

// From the scores S of a block, without their scale, and the gradient dP of P:
//   P_ts = e^(scale S_ts - lse_t), 0 for a key after the query
//   dS_ts = scale P_ts (dP_ts - sum_r P_tr dP_tr)       (the derivative of softmax)
// and that last sum needs no row of P: dP_tr = do_t . v_r, so it is do_t . sum_r P_tr v_r = do_t . o_t,
// called delta_t. p: S in, P out; ds: dP in, dS out, both (queries,keys) with rows KEYS apart;
// lse, delta (queries).
static void softmax_block_backward(float *p, float *ds, const float *lse, const float *delta,
                                   int queries, int keys, int t0, int s0, float scale) {
    for (int i = 0; i < queries; i++, p += KEYS, ds += KEYS) {
        int seen = imax(0, imin(keys, t0 + i - s0 + 1));
        #pragma omp simd
        for (int j = 0; j < seen; j++) {
            p[j] = exp_fast(p[j] * scale - lse[i]);
            ds[j] = scale * p[j] * (ds[j] - delta[i]);
        }
        for (int j = seen; j < keys; j++) p[j] = ds[j] = 0;
    }
}

// Given do, wanted dq, dk, dv, by the chain rule backwards through o = P v and S = q k^T / sqrt(hs):
//   dv_s = sum_t P_ts do_t      dP_ts = do_t . v_s      dS as above
//   dq_t = sum_s dS_ts k_s      dk_s = sum_t dS_ts q_t
// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse (B,NH,T). Every block of P is computed again.
static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH) {
    int hs = C / NH, row = 3 * C;
    float scale = 1 / sqrtf((float)hs);
    memset(dqkv, 0, (size_t)B * T * row * sizeof(float));
    #pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * NH; task++) {
        int b = task / NH, h = task % NH;
        float p[QUERIES * KEYS], ds[QUERIES * KEYS], delta[QUERIES];
        for (int t0 = 0; t0 < T; t0 += QUERIES) {
            int queries = imin(QUERIES, T - t0);
            size_t here = (size_t)b * T + t0;
            const float *q = qkv + here * row + h * hs;
            const float *o = out + here * C + h * hs, *dy = dout + here * C + h * hs;
            float *dq = dqkv + here * row + h * hs;
            for (int i = 0; i < queries; i++) {
                delta[i] = 0;
                for (int c = 0; c < hs; c++) delta[i] += o[(size_t)i * C + c] * dy[(size_t)i * C + c];
            }
            for (int s0 = 0; s0 < t0 + queries; s0 += KEYS) {
                int keys = imin(KEYS, t0 + queries - s0);
                size_t there = ((size_t)b * T + s0) * row + C + h * hs;
                const float *k = qkv + there, *v = k + C;
                float *dk = dqkv + there, *dv = dk + C;
                gemm(p, KEYS, q, row, 1, k, row, 1, queries, keys, hs, 0);
                gemm(ds, KEYS, dy, C, 1, v, row, 1, queries, keys, hs, 0);
                softmax_block_backward(p, ds, lse + ((size_t)b * NH + h) * T + t0, delta, queries, keys,
                                       t0, s0, scale);
                gemm(dv, row, p, 1, KEYS, dy, 1, C, keys, hs, queries, 1);
                gemm(dq, row, ds, KEYS, 1, k, 1, row, queries, hs, keys, 1);
                gemm(dk, row, ds, 1, KEYS, q, 1, row, keys, hs, queries, 1);
            }
        }
    }
}

// Softmax and cross-entropy in one: loss_n = -log softmax(logits_n)[target_n] = lse_n - logit_target
// with lse_n = log sum_v e^logit_v. In nats. losses, lse (N); logits (N,V), only read; targets (N).
static void crossentropy_forward(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = logits + (size_t)n * V;
        float largest = x[0], sum = 0;
        #pragma omp simd reduction(max : largest)
        for (int v = 0; v < V; v++) largest = x[v] > largest ? x[v] : largest;
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exp_fast(x[v] - largest);
        lse[n] = largest + logf(sum);
        losses[n] = lse[n] - x[targets[n]];
    }
}

// d(lse)/d(logit_v) = e^logit_v / sum = e^(logit_v - lse), the probability p_v, so
//   dlogit_v = (p_v - [v is the target]) * scale
// where scale is the gradient of each loss: 1/N for their mean. In place: logits (N,V) become their
// gradients.
static void crossentropy_backward(float *logits, const float *lse, const int *targets, float scale,
                                  int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        float *x = logits + (size_t)n * V;
        #pragma omp simd
        for (int v = 0; v < V; v++) x[v] = exp_fast(x[v] - lse[n]) * scale;
        x[targets[n]] -= scale;
    }
}

/* ------------------------------------------------------------------------------------------------
4. Model

All parameters lie in one block of memory, their gradients in a second one of the same layout, Adam's
moments in two more. Each layer takes the same room, so a layer's parameters are found by arithmetic.
*/

typedef struct {
    char name[56];      // as in the checkpoint
    int rows, cols;     // of a matrix; a vector has cols 0
    size_t offset;      // in floats
    float mean, spread; // initial values are normal
} Tensor;

// Where the parameters of one layer, or their gradients, lie.
typedef struct {
    float *wqkv;           // (3C,C): wq, wk, wv
    float *wo;             // (C,C)
    float *w13;            // (2H,C): w1, w3
    float *w2;             // (C,H)
    float *norm[2];        // (C): the sublayer's RMSNorm, 0 attention, 1 feed-forward
    float *branch_norm[2]; // (C): sandwich only, the norm at the end of the branch
    float *gate;           // (1): with GPAS only
} LayerParameters;

// What the backward pass of one sublayer needs from its forward pass. Sampling uses the same memory as
// its key-value cache.
typedef struct {
    float *inp;           // (B,T,C) x, the output of the sublayer before
    float *normed;        // (B,T,C) the branch's input N(x); x itself where no norm stands before it
    float *qkv;           // (B,T,3C) queries and keys after RoPE, values
    float *lse;           // (B,NH,T) attention's log-sum-exp
    float *pre_act;       // (B,T,2H) w1 x, w3 x
    float *inner;         // (B,T,C) attention's, or (B,T,H) SwiGLU's output: input of wo or w2
    float *branch;        // (B,T,C) f(x), the branch's output
    float *sum;           // (B,T,C) shortcut + branch
    float *out;           // (B,T,C) the sublayer's output
    float *rstd, *branch_rstd;  // (B,T) of norm and branch_norm
} Sublayer;

typedef struct {
    const Options *o;
    Tensor *tensors;
    int num_tensors;
    size_t num_parameters, layer_size;
    float *parameters, *gradients, *adam_m, *adam_v;
    float *activations;   // the block that all of the following point into
    Sublayer *sublayers;  // 2L: attention and feed-forward of each layer
    float *embedded, *final_normed, *final_rstd;  // (B,T,C), (B,T,C), (B,T)
    float *logits, *logits_lse, *losses;          // (B,T,V), (B,T), (B,T)
    float *dx, *dbranch, *dinp, *dinner, *dwide;  // gradients: 3 x (B,T,C), (B,T,max(C,H)), (.. 3C,2H)
    float *rope_table;                            // (T,hs/2,2)
} Model;

// Where the norms of layer l (0, 1, ...) stand.
static int norm_comes_last(const Options *o, int l) {  // x = N(shortcut + f(x)): post, deepnorm
    return o->norm == NORM_POST || o->norm == NORM_DEEPNORM || (o->norm == NORM_MIX && l < o->layers / 4);
}

static int has_branch_norm(const Options *o) { return o->norm == NORM_SANDWICH; }

static float shortcut_scale(const Options *o) {  // DeepNorm's A (arXiv 2203.00555)
    return o->norm == NORM_DEEPNORM ? powf(2.0f * o->layers, 0.25f) : 1;
}

__attribute__((format(printf, 6, 7)))
static void add_tensor(Model *m, int rows, int cols, double mean, double spread, const char *name, ...) {
    Tensor *t = &m->tensors[m->num_tensors++];
    va_list args;
    va_start(args, name);
    vsnprintf(t->name, sizeof t->name, name, args);
    va_end(args);
    t->rows = rows, t->cols = cols, t->mean = (float)mean, t->spread = (float)spread;
    t->offset = m->num_parameters;
    m->num_parameters += (size_t)rows * (cols ? cols : 1);
}

// Names, shapes, order in memory and initial values of one layer's parameters.
static void add_layer(Model *m, int l) {
    const Options *o = m->o;
    int C = o->channels, H = o->hidden, deep = o->norm == NORM_DEEPNORM;
    // DeepNorm draws from Xavier's normal, std = gain sqrt(2 / (fan in + fan out)), with a small gain
    // for all that feeds the residual sum; with GPAS too, where the authors' code leaves it out.
    double gain = pow(8.0 * o->layers, -0.25), square = sqrt(1.0 / C), wide = sqrt(2.0 / (C + H));
    double norm = o->norm == NORM_LNS ? 1 / sqrt(l + 1.0) : 1;  // LayerNorm Scaling (arXiv 2502.05795)
    add_tensor(m, C, C, 0, deep ? square : 0.02, "layers.%d.attention.wq.weight", l);
    add_tensor(m, C, C, 0, deep ? square : 0.02, "layers.%d.attention.wk.weight", l);
    add_tensor(m, C, C, 0, deep ? gain * square : 0.02, "layers.%d.attention.wv.weight", l);
    add_tensor(m, C, C, 0, deep ? gain * square : 0.02, "layers.%d.attention.wo.weight", l);
    add_tensor(m, H, C, 0, deep ? gain * wide : 0.02, "layers.%d.feed_forward.w1.weight", l);
    add_tensor(m, H, C, 0, deep ? gain * wide : 0.02, "layers.%d.feed_forward.w3.weight", l);
    add_tensor(m, C, H, 0, deep ? gain * wide : 0.02, "layers.%d.feed_forward.w2.weight", l);
    add_tensor(m, C, 0, norm, 0, "layers.%d.attention_norm.weight", l);
    if (has_branch_norm(o)) add_tensor(m, C, 0, norm, 0, "layers.%d.attention_post_norm.weight", l);
    add_tensor(m, C, 0, norm, 0, "layers.%d.ffn_norm.weight", l);
    if (has_branch_norm(o)) add_tensor(m, C, 0, norm, 0, "layers.%d.ffn_post_norm.weight", l);
    if (o->gpas) add_tensor(m, 1, 0, o->gate_init, 0, "layers.%d.gate", l);
}

static LayerParameters layer_parameters(const Model *m, float *block, int l) {
    size_t C = m->o->channels, H = m->o->hidden;
    float *p = block + m->o->vocab_size * C + l * m->layer_size;
    LayerParameters w;
    memset(&w, 0, sizeof w);
    w.wqkv = p, p += 3 * C * C;
    w.wo = p, p += C * C;
    w.w13 = p, p += 2 * H * C;
    w.w2 = p, p += C * H;
    for (int s = 0; s < 2; s++) {
        w.norm[s] = p, p += C;
        if (has_branch_norm(m->o)) w.branch_norm[s] = p, p += C;
    }
    if (m->o->gpas) w.gate = p;
    return w;
}

// Draws the initial values. Each tensor has a stream of its own, keyed by its name, so a network with
// gates starts from the same weights as the one without.
static void initialize(Model *m) {
    for (int i = 0; i < m->num_tensors; i++) {
        Tensor *t = &m->tensors[i];
        uint64_t key = m->o->seed;
        for (const char *c = t->name; *c; c++) key ^= (unsigned char)*c, random_bits(&key);
        float *p = m->parameters + t->offset;
        size_t n = (size_t)t->rows * (t->cols ? t->cols : 1);
        #pragma omp parallel for
        for (size_t j = 0; j < n; j++) {
            uint64_t state = key + 2 * j * RANDOM_STEP;  // Box and Muller turn two numbers into one
            double radius = sqrt(-2 * log(1 - random_uniform(&state)));
            p[j] = t->mean + t->spread * (float)(radius * cos(2 * 3.14159265358979 * random_uniform(&state)));
        }
    }
}

// Gives *tensor n floats of the block; with block NULL only counts them.
static void carve(float **tensor, float *block, size_t *used, size_t n) {
    *tensor = block ? block + *used : NULL;
    *used += (n + 15) / 16 * 16;
}

static size_t lay_out_activations(Model *m, float *block, size_t N, int training) {
    const Options *o = m->o;
    size_t C = o->channels, H = o->hidden, used = 0;
    float *x, *branch;
    carve(&m->embedded, block, &used, N * C);
    carve(&branch, block, &used, N * C);  // shared by all sublayers whose backward pass needs none
    x = m->embedded;
    for (int s = 0; s < 2 * o->layers; s++) {
        Sublayer *a = &m->sublayers[s];
        int last = norm_comes_last(o, s / 2), ffn = s % 2;
        a->inp = a->normed = x;
        a->branch = branch;
        carve(&a->rstd, block, &used, N);
        if (!last) carve(&a->normed, block, &used, N * C);
        if (!ffn) carve(&a->qkv, block, &used, 3 * N * C), carve(&a->lse, block, &used, N * o->heads);
        if (ffn) carve(&a->pre_act, block, &used, 2 * N * H);
        carve(&a->inner, block, &used, N * (ffn ? H : C));
        if (has_branch_norm(o)) carve(&a->branch, block, &used, N * C);
        if (has_branch_norm(o)) carve(&a->branch_rstd, block, &used, N);
        carve(&a->sum, block, &used, N * C);
        a->out = a->sum;  // a sum that nothing follows is the output itself
        if (last || o->gpas) carve(&a->out, block, &used, N * C);
        x = a->out;
    }
    carve(&m->final_normed, block, &used, N * C);
    carve(&m->final_rstd, block, &used, N);
    carve(&m->logits, block, &used, N * o->vocab_size);
    carve(&m->logits_lse, block, &used, N);
    carve(&m->losses, block, &used, N);
    carve(&m->dbranch, block, &used, N * C);
    if (training) {
        carve(&m->dx, block, &used, N * C);
        carve(&m->dinp, block, &used, N * C);
        carve(&m->dinner, block, &used, N * (C > H ? C : H));
        carve(&m->dwide, block, &used, N * (3 * C > 2 * H ? 3 * C : 2 * H));
    }
    return used;
}

// A network of these options with fresh parameters, for B sequences of T tokens at once. Without
// training it has no room for gradients.
static void model_create(Model *m, const Options *o, int B, int training) {
    int T = o->seq_len, C = o->channels, V = o->vocab_size;
    memset(m, 0, sizeof *m);
    m->o = o;
    m->tensors = (Tensor *)allocate(3 + 12 * o->layers, sizeof(Tensor));
    add_tensor(m, V, C, 0, sqrt(2.0 / 5), "tok_embeddings.weight");
    for (int l = 0; l < o->layers; l++) add_layer(m, l);
    m->layer_size = (m->num_parameters - (size_t)V * C) / o->layers;
    add_tensor(m, C, 0, 1, 0, "norm.weight");
    add_tensor(m, V, C, 0, 0.02, "output.weight");
    float **blocks[] = {&m->parameters, &m->gradients, &m->adam_m, &m->adam_v};
    for (int i = 0; i < (training ? 4 : 1); i++)
        *blocks[i] = (float *)allocate(m->num_parameters, sizeof(float));
    m->sublayers = (Sublayer *)allocate(2 * o->layers, sizeof(Sublayer));
    size_t size = lay_out_activations(m, NULL, (size_t)B * T, training);
    m->activations = (float *)allocate(size, sizeof(float));
    lay_out_activations(m, m->activations, (size_t)B * T, training);
    m->rope_table = (float *)allocate((size_t)T * (C / o->heads), sizeof(float));
    rope_angles(m->rope_table, T, C / o->heads);
    initialize(m);
}

static void model_free(Model *m) {
    void *blocks[] = {m->tensors, m->parameters, m->gradients, m->adam_m, m->adam_v, m->sublayers,
                      m->activations, m->rope_table};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) free(blocks[i]);
    free_packing_space();
}

// The branch f of a sublayer, attention (s = 0) or feed-forward (s = 1): a->branch = f(a->normed).
// N rows, the first being row `from` of its sequence.
static void branch_forward(const Model *m, Sublayer *a, LayerParameters w, int s, int B, int T, int from) {
    int C = m->o->channels, H = m->o->hidden, NH = m->o->heads, N = B * T - from;
    size_t skip = from;
    if (s == 0) {
        float *qkv = a->qkv + skip * 3 * C;
        matmul_forward(qkv, a->normed + skip * C, w.wqkv, N, C, 3 * C);
        rope_forward(qkv, m->rope_table, N, T, from, C, C / NH);
        attention_forward(a->inner, a->lse, a->qkv, B, T, from, C, NH);
        matmul_forward(a->branch + skip * C, a->inner + skip * C, w.wo, N, C, C);
    } else {
        float *pre_act = a->pre_act + skip * 2 * H, *inner = a->inner + skip * H;
        matmul_forward(pre_act, a->normed + skip * C, w.w13, N, C, 2 * H);
        swiglu_forward(inner, pre_act, N, H);
        matmul_forward(a->branch + skip * C, inner, w.w2, N, H, C);
    }
}

// Given the gradient of the branch's output in m->dbranch, leaves that of its input in m->dinp.
static void branch_backward(const Model *m, const Sublayer *a, LayerParameters w, LayerParameters d, int s,
                            int B, int T) {
    int C = m->o->channels, H = m->o->hidden, NH = m->o->heads, N = B * T;
    if (s == 0) {
        matmul_backward(m->dinner, d.wo, m->dbranch, a->inner, w.wo, N, C, C);
        attention_backward(m->dwide, m->dinner, a->inner, a->lse, a->qkv, B, T, C, NH);
        rope_backward(m->dwide, m->rope_table, N, T, C, C / NH);
        matmul_backward(m->dinp, d.wqkv, m->dwide, a->normed, w.wqkv, N, C, 3 * C);
    } else {
        matmul_backward(m->dinner, d.w2, m->dbranch, a->inner, w.w2, N, H, C);
        swiglu_backward(m->dwide, m->dinner, a->pre_act, N, H);
        matmul_backward(m->dinp, d.w13, m->dwide, a->normed, w.w13, N, C, 2 * H);
    }
}

/*
One sublayer of any of the twelve networks. [G] is GPAS when it is on, f the branch, N a norm:

    pre, lns    x = [G](x + f(N x))
    sandwich    x = [G](x + N' f(N x))         N' is branch_norm
    post        x = N([G] x + f(x))
    deepnorm    x = N(A [G] x + f(x))
    mix         the first L/4 layers are post, the others pre

So there are two orders, norm first and norm last, and everything else is a step that may be absent.
*/
static void sublayer_forward(const Model *m, int l, int s, int B, int T, int from) {
    const Options *o = m->o;
    LayerParameters w = layer_parameters(m, m->parameters, l);
    Sublayer *a = &m->sublayers[2 * l + s];
    int C = o->channels, N = B * T - from;
    size_t skip = (size_t)from * C, n = (size_t)N * C;
    float *x = a->inp + skip, *branch = a->branch + skip, *sum = a->sum + skip, *out = a->out + skip;
    float *scratch = m->dbranch + skip, *rstd = a->rstd + from;

    if (!norm_comes_last(o, l)) {
        rmsnorm_forward(a->normed + skip, rstd, x, w.norm[s], N, C);
        branch_forward(m, a, w, s, B, T, from);
        if (has_branch_norm(o)) {
            rmsnorm_forward(scratch, a->branch_rstd + from, branch, w.branch_norm[s], N, C);
            branch = scratch;
        }
        residual_forward(sum, x, branch, 1, n);
        if (o->gpas) gpas_forward(out, sum, *w.gate, o->gate_act, n);
    } else {
        branch_forward(m, a, w, s, B, T, from);
        if (o->gpas) gpas_forward(scratch, x, *w.gate, o->gate_act, n);
        residual_forward(sum, o->gpas ? scratch : x, branch, shortcut_scale(o), n);
        rmsnorm_forward(out, rstd, sum, w.norm[s], N, C);
    }
}

// The same steps backwards. m->dx holds the gradient of the sublayer's output on entry, that of its
// input on return. x goes two ways, into the shortcut and into the branch: its gradients are added.
static void sublayer_backward(const Model *m, int l, int s, int B, int T) {
    const Options *o = m->o;
    LayerParameters w = layer_parameters(m, m->parameters, l);
    LayerParameters d = layer_parameters(m, m->gradients, l);
    const Sublayer *a = &m->sublayers[2 * l + s];
    int C = o->channels, N = B * T;
    size_t n = (size_t)N * C;
    float *dgate = o->gate_train ? d.gate : NULL, *dx = m->dx, *dbranch = m->dbranch;

    if (!norm_comes_last(o, l)) {
        if (o->gpas) gpas_backward(dx, dgate, dx, a->sum, *w.gate, o->gate_act, o->stop_grad, n);
        if (has_branch_norm(o))
            rmsnorm_backward(dbranch, d.branch_norm[s], dx, a->branch, w.branch_norm[s], a->branch_rstd, N, C);
        else
            memcpy(dbranch, dx, n * sizeof(float));
        branch_backward(m, a, w, d, s, B, T);
        rmsnorm_backward(dbranch, d.norm[s], m->dinp, a->inp, w.norm[s], a->rstd, N, C);
        residual_backward(dx, dx, 1, n);
        residual_forward(dx, dx, dbranch, 1, n);
    } else {
        rmsnorm_backward(dbranch, d.norm[s], dx, a->sum, w.norm[s], a->rstd, N, C);
        residual_backward(dx, dbranch, shortcut_scale(o), n);
        if (o->gpas) gpas_backward(dx, dgate, dx, a->inp, *w.gate, o->gate_act, o->stop_grad, n);
        branch_backward(m, a, w, d, s, B, T);
        residual_forward(dx, dx, m->dinp, 1, n);
    }
}

// Logits of tokens (B,T), and with targets (B,T) the mean loss in nats. With from > 0, for B = 1, only
// rows from, from + 1, ... are computed: the others are still there from the last call.
static double model_forward(Model *m, const int *tokens, const int *targets, int B, int T, int from) {
    int C = m->o->channels, V = m->o->vocab_size, L = m->o->layers, N = B * T - from;
    size_t skip = (size_t)from * C;
    double sum = 0;
    embedding_forward(m->embedded + skip, tokens + from, m->parameters, N, C);
    for (int l = 0; l < L; l++)
        for (int s = 0; s < 2; s++) sublayer_forward(m, l, s, B, T, from);
    const float *norm = m->parameters + m->tensors[m->num_tensors - 2].offset, *output = norm + C;
    float *x = m->sublayers[2 * L - 1].out + skip;
    rmsnorm_forward(m->final_normed + skip, m->final_rstd + from, x, norm, N, C);
    matmul_forward(m->logits + (size_t)from * V, m->final_normed + skip, output, N, C, V);
    if (!targets) return 0;
    crossentropy_forward(m->losses, m->logits_lse, m->logits, targets, N, V);
    for (int n = 0; n < N; n++) sum += m->losses[n];
    return sum / N;
}

// Adds to m->gradients those of scale times the sum of the losses of the last model_forward().
static void model_backward(Model *m, const int *tokens, const int *targets, int B, int T, double scale) {
    int C = m->o->channels, V = m->o->vocab_size, L = m->o->layers, N = B * T;
    size_t norm = m->tensors[m->num_tensors - 2].offset, output = norm + C;
    crossentropy_backward(m->logits, m->logits_lse, targets, (float)scale, N, V);
    matmul_backward(m->dinp, m->gradients + output, m->logits, m->final_normed, m->parameters + output, N, C, V);
    rmsnorm_backward(m->dx, m->gradients + norm, m->dinp, m->sublayers[2 * L - 1].out, m->parameters + norm,
                     m->final_rstd, N, C);
    for (int l = L - 1; l >= 0; l--)
        for (int s = 1; s >= 0; s--) sublayer_backward(m, l, s, B, T);
    embedding_backward(m->gradients, m->dx, tokens, N, C);
}

/* ------------------------------------------------------------------------------------------------
5. Optimizer
*/

// AdamW (arXiv 1711.05101), step t = 1, 2, ...: with g the gradient times grad_scale (clipping),
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   p -= lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
// mhat = m / (1 - beta1^t) and vhat likewise undo that m and v started at 0. All arrays (n).
static void adamw_update(float *p, const float *grad, float *m, float *v, size_t n, float lr, float beta1,
                         float beta2, float eps, float weight_decay, float grad_scale, int t) {
    float unbias_m = (float)(1 / (1 - pow(beta1, t))), unbias_v = (float)(1 / (1 - pow(beta2, t)));
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) {
        float g = grad[i] * grad_scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        p[i] -= lr * (m[i] * unbias_m / (sqrtf(v[i] * unbias_v) + eps) + weight_decay * p[i]);
    }
}

// Step t = 0, 1, ...: linear warm-up to the peak, then a cosine down to a tenth of it.
static double learning_rate(const Options *o, int t) {
    if (t < o->warmup) return o->lr * (t + 1) / o->warmup;
    double progress = o->steps > o->warmup ? (double)(t - o->warmup) / (o->steps - o->warmup) : 1;
    return o->lr * (0.1 + 0.9 * 0.5 * (1 + cos(3.14159265358979 * progress)));
}

// Norms of the gradient: returns that of the whole, layers (L) gets each layer's, *gates that of all gates.
static double gradient_norms(const Model *m, double *layers, double *gates) {
    const Options *o = m->o;
    size_t embedding = (size_t)o->vocab_size * o->channels, rest = embedding + m->layer_size * o->layers;
    const float *g = m->gradients;
    double sum = dot(g, g, embedding) + dot(g + rest, g + rest, m->num_parameters - rest);
    *gates = 0;
    for (int l = 0; l < o->layers; l++) {
        LayerParameters d = layer_parameters(m, m->gradients, l);
        double square = dot(d.wqkv, d.wqkv, m->layer_size);
        if (d.gate) *gates += (double)*d.gate * *d.gate;
        layers[l] = sqrt(square);
        sum += square;
    }
    *gates = sqrt(*gates);
    return sqrt(sum);
}

// One step of AdamW at step t = 0, 1, ... First the global clip, gates included, then the gates' own.
static void model_update(Model *m, int t, double norm, double gate_norm) {
    const Options *o = m->o;
    double clip = o->grad_clip > 0 && norm > o->grad_clip ? o->grad_clip / norm : 1;
    double gate_clip = o->gate_clip > 0 && gate_norm * clip > o->gate_clip ? o->gate_clip / gate_norm : clip;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        int gate = w->rows == 1 && w->cols == 0 && o->gpas;
        size_t n = (size_t)w->rows * (w->cols ? w->cols : 1), at = w->offset;
        if (gate && !o->gate_train) continue;
        adamw_update(m->parameters + at, m->gradients + at, m->adam_m + at, m->adam_v + at, n,
                     (float)learning_rate(o, t), 0.9f, 0.999f, 1e-8f, w->cols ? (float)o->weight_decay : 0,
                     (float)(gate ? gate_clip : clip), t + 1);
    }
}

/* ------------------------------------------------------------------------------------------------
6. Data

Token files are llm.c's: 256 int32 (magic 20240520, version 1, number of tokens), then uint16 tokens.
They are mapped into memory, not read. The tokenizer file is llama2.c's.
*/

typedef struct { const uint16_t *tokens; void *map; size_t bytes, windows; } Shard;

// The files of one split as windows of T + 1 tokens that do not overlap: T inputs, and as targets the
// same shifted by one. order: the epoch's permutation of the windows, NULL for file order.
typedef struct {
    Shard *shards;
    int num_shards, T, V;
    size_t windows;
    uint32_t *order;
    int64_t epoch;
    uint64_t seed;
    char name[16];
} Loader;

static Shard open_shard(const char *path, int T) {
    Shard s;
    struct stat info;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &info) != 0) die("cannot open %s: %s", path, strerror(errno));
    s.bytes = (size_t)info.st_size;
    if (s.bytes < 1024) die("%s is no token file: it is shorter than the header", path);
    s.map = mmap(NULL, s.bytes, PROT_READ, MAP_PRIVATE, file, 0);
    if (s.map == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    close(file);
    const int32_t *header = (const int32_t *)s.map;
    if (header[0] != 20240520 || header[1] != 1)
        die("%s is no token file of version 1 (magic %d, version %d)", path, header[0], header[1]);
    if (header[2] < 0 || s.bytes != 1024 + 2 * (size_t)header[2])
        die("%s should hold %d tokens but is %zu bytes long", path, header[2], s.bytes);
    s.tokens = (const uint16_t *)(header + 256);
    s.windows = (size_t)header[2] / (T + 1);
    return s;
}

// Opens all files DIR/*split*.bin in the order of their names.
static void loader_open(Loader *loader, const char *dir, const char *split, int T, int V, int shuffle,
                        int seed) {
    struct dirent **names;
    int n = scandir(dir, &names, NULL, alphasort);
    if (n < 0) die("cannot open the folder %s: %s; run: python3 prepro_tinystories.py --out %s", dir,
                   strerror(errno), dir);
    memset(loader, 0, sizeof *loader);
    loader->shards = (Shard *)allocate(n, sizeof(Shard));
    loader->T = T, loader->V = V, loader->seed = seed, loader->epoch = -1;
    snprintf(loader->name, sizeof loader->name, "%s", split);
    for (int i = 0; i < n; i++) {
        const char *name = names[i]->d_name, *end = strrchr(name, '.');
        char path[2048];
        if (strstr(name, split) && end && strcmp(end, ".bin") == 0) {
            snprintf(path, sizeof path, "%s/%s", dir, name);
            Shard s = loader->shards[loader->num_shards++] = open_shard(path, T);
            loader->windows += s.windows;
        }
        free(names[i]);
    }
    free(names);
    if (!loader->num_shards) die("%s has no file %s*.bin", dir, split);
    if (!loader->windows) die("the %s files in %s have no sequence of %d tokens", split, dir, T + 1);
    if (loader->windows > UINT32_MAX) die("the %s files in %s have too many tokens", split, dir);
    if (shuffle) loader->order = (uint32_t *)allocate(loader->windows, sizeof(uint32_t));
}

static void loader_close(Loader *loader) {
    for (int i = 0; i < loader->num_shards; i++) munmap(loader->shards[i].map, loader->shards[i].bytes);
    free(loader->shards);
    free(loader->order);
}

// A new epoch, a new order: Fisher and Yates' shuffle, drawn from the seed and the epoch's number only.
static void loader_shuffle(Loader *loader, int64_t epoch) {
    uint64_t state = loader->seed * 1000003 + epoch;
    for (size_t i = 0; i < loader->windows; i++) loader->order[i] = (uint32_t)i;
    for (size_t i = loader->windows - 1; i > 0; i--) {
        size_t j = (size_t)(random_uniform(&state) * (i + 1));
        uint32_t swap = loader->order[i];
        loader->order[i] = loader->order[j], loader->order[j] = swap;
    }
    loader->epoch = epoch;
}

// Sequences position, position + 1, ... of the endless stream of epochs: tokens, targets (B,T).
static void loader_batch(Loader *loader, int64_t position, int B, int *tokens, int *targets) {
    int T = loader->T;
    for (int b = 0; b < B; b++, position++) {
        size_t window = position % loader->windows;
        int64_t epoch = position / loader->windows;
        if (loader->order && loader->epoch != epoch) loader_shuffle(loader, epoch);
        if (loader->order) window = loader->order[window];
        const Shard *s = loader->shards;
        while (window >= s->windows) window -= s++->windows;
        for (int t = 0; t <= T; t++) {
            int token = s->tokens[window * (T + 1) + t];
            if (token >= loader->V)
                die("the %s files hold token %d, but the vocabulary has %d", loader->name, token, loader->V);
            if (t < T) tokens[b * T + t] = token;
            if (t > 0) targets[b * T + t - 1] = token;
        }
    }
}

enum { TOKEN_BOS = 1, TOKEN_EOS = 2, TOKEN_BYTE = 3 };  // byte b is token TOKEN_BYTE + b

typedef struct {
    char *text;     // the file, to which the pieces point
    const char **pieces;
    int *lengths, *sorted;
    float *scores;
    int V;
} Tokenizer;

static int compare_pieces(const char *a, int a_length, const char *b, int b_length) {
    int order = memcmp(a, b, imin(a_length, b_length));
    return order ? order : a_length - b_length;
}

static const Tokenizer *sorting;  // qsort passes no argument through
static int compare_ids(const void *a, const void *b) {
    int i = *(const int *)a, j = *(const int *)b;
    int order = compare_pieces(sorting->pieces[i], sorting->lengths[i], sorting->pieces[j], sorting->lengths[j]);
    return order ? order : i - j;
}

// A whole file as one block of memory, ended by a zero byte. Ends the program when it cannot be read.
static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    struct stat info;
    if (!file || fstat(fileno(file), &info) != 0) die("cannot open %s: %s", path, strerror(errno));
    *size = (size_t)info.st_size;
    char *text = (char *)allocate(*size + 1, 1);
    if (fread(text, 1, *size, file) != *size) die("cannot read %s: %s", path, strerror(errno));
    fclose(file);
    return text;
}

// Reads DIR/tokenizer.bin: the longest piece's length, then for each id its score, length and bytes.
// Returns 0 when there is no such file.
static int tokenizer_open(Tokenizer *k, const char *dir) {
    char path[2048];
    size_t size, at = 4;
    memset(k, 0, sizeof *k);
    snprintf(path, sizeof path, "%s/tokenizer.bin", dir);
    if (access(path, F_OK) != 0) return 0;
    k->text = read_file(path, &size);
    k->pieces = (const char **)allocate(size / 8, sizeof *k->pieces);
    k->lengths = (int *)allocate(size / 8, sizeof(int));
    k->sorted = (int *)allocate(size / 8, sizeof(int));
    k->scores = (float *)allocate(size / 8, sizeof(float));
    while (at < size) {
        int32_t length = -1;
        if (size - at >= 8) memcpy(&k->scores[k->V], k->text + at, 4), memcpy(&length, k->text + at + 4, 4);
        at += 8;
        if (length < 0 || (size_t)length > size - at) die("%s is damaged at piece %d", path, k->V);
        k->pieces[k->V] = k->text + at;
        k->lengths[k->V] = length;
        k->sorted[k->V] = k->V;
        at += length, k->V++;
    }
    if (k->V < TOKEN_BYTE + 256 || k->V > 65536)
        die("%s has %d pieces, not 259 to 65536: is it a tokenizer.bin of llama2.c's kind?", path, k->V);
    sorting = k;
    qsort(k->sorted, k->V, sizeof(int), compare_ids);
    return 1;
}

static void tokenizer_close(Tokenizer *k) {
    free(k->text), free(k->pieces), free(k->lengths), free(k->sorted), free(k->scores);
}

// The id of a piece, the smallest if several are spelled alike, or -1.
static int tokenizer_find(const Tokenizer *k, const char *piece, int length) {
    int low = 0, high = k->V;
    while (low < high) {
        int middle = (low + high) / 2, id = k->sorted[middle];
        if (compare_pieces(k->pieces[id], k->lengths[id], piece, length) < 0) low = middle + 1;
        else high = middle;
    }
    if (low == k->V) return -1;
    int id = k->sorted[low];
    return compare_pieces(k->pieces[id], k->lengths[id], piece, length) == 0 ? id : -1;
}

// BOS, a space, the text, as sentencepiece does it: each character is its piece, or else its bytes; then
// the neighbours whose joint piece has the best score are joined, until no joint piece exists.
// tokens has room for strlen(text) + 2; returns how many were written. No text: BOS alone.
static int tokenizer_encode(const Tokenizer *k, const char *text, int *tokens) {
    size_t length = strlen(text), n = 0;
    char *spaced = (char *)allocate(length + 2, 1), *join = (char *)allocate(k->text ? length + 2 : 2, 1);
    tokens[n++] = TOKEN_BOS;
    if (length) spaced[0] = ' ', memcpy(spaced + 1, text, length);
    for (const char *c = spaced; *c;) {
        int bytes = 1;
        while (((unsigned char)c[bytes] & 0xC0) == 0x80 && bytes < 4) bytes++;
        int id = tokenizer_find(k, c, bytes);
        if (id >= 0) tokens[n++] = id;
        else for (int i = 0; i < bytes; i++) tokens[n++] = TOKEN_BYTE + (unsigned char)c[i];
        c += bytes;
    }
    for (;;) {
        float best = -1e30f;
        int best_id = -1;
        size_t best_at = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            int a = tokens[i], b = tokens[i + 1], sum = k->lengths[a] + k->lengths[b];
            if ((size_t)sum > length + 1) continue;
            memcpy(join, k->pieces[a], k->lengths[a]);
            memcpy(join + k->lengths[a], k->pieces[b], k->lengths[b]);
            int id = tokenizer_find(k, join, sum);
            if (id >= 0 && k->scores[id] > best) best = k->scores[id], best_id = id, best_at = i;
        }
        if (best_id < 0) break;
        tokens[best_at] = best_id;
        memmove(tokens + best_at + 1, tokens + best_at + 2, (n - best_at - 2) * sizeof(int));
        n--;
    }
    free(spaced), free(join);
    return (int)n;
}

// Writes a token's text. The space that begins every story is left out; bytes that would steer a
// terminal are too.
static void tokenizer_print(const Tokenizer *k, int previous, int token, FILE *file) {
    const char *piece = k->pieces[token];
    int length = k->lengths[token];
    char byte = (char)(token - TOKEN_BYTE);
    if (token < TOKEN_BYTE) return;
    if (token < TOKEN_BYTE + 256) piece = &byte, length = 1;
    if (previous == TOKEN_BOS && length && *piece == ' ') piece++, length--;
    for (int i = 0; i < length; i++)
        if ((unsigned char)piece[i] >= ' ' ? piece[i] != 127 : piece[i] == '\n' || piece[i] == '\t')
            fputc(piece[i], file);
}

/* ------------------------------------------------------------------------------------------------
7. Checkpoints

safetensors: the header's length as 8 bytes, the header as JSON, the numbers as they lie in memory. The
header is a function of the configuration alone. So the reader needs no JSON parser: it reads the options
from the beginning of the header, builds the header that they must give, and compares the bytes.
*/

// What a run is besides its network.
typedef struct {
    int step;          // updates done
    int64_t position;  // sequences trained on
    uint64_t random;   // generator of the stories
} Progress;

typedef struct { char *text; size_t length, room; } String;

__attribute__((format(printf, 2, 3)))
static void append(String *s, const char *format, ...) {
    va_list args;
    if (s->room - s->length < 8192) {
        s->room = 2 * s->room + 16384;
        s->text = (char *)realloc(s->text, s->room);
        if (!s->text) die("not enough memory for a header");
    }
    va_start(args, format);
    s->length += vsnprintf(s->text + s->length, 8192, format, args);
    va_end(args);
}

enum { HOLDS_WEIGHTS, HOLDS_ADAM, HOLDS_GRADIENTS };
static const char *const contents_names[] = {"weights", "adam", "gradients"};
#define METADATA "{\"__metadata__\":{\"format\":\"pt\",\"contents\":\"%s\",\"step\":\"%d\"," \
                 "\"position\":\"%" PRId64 "\",\"random\":\"%" PRIu64 "\""
#define METADATA_SCAN "{\"__metadata__\":{\"format\":\"pt\",\"contents\":\"%15[a-z]\",\"step\":\"%d\"," \
                      "\"position\":\"%" SCNd64 "\",\"random\":\"%" SCNu64 "\"%n"

static void append_tensor(String *s, const char *prefix, const char *name, const char *type, int rows, int cols,
                          size_t *offset) {
    size_t bytes = 4 * (size_t)rows * (cols ? cols : 1);
    append(s, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[%d", prefix, name, type, rows);
    if (cols) append(s, ",%d", cols);
    append(s, "],\"data_offsets\":[%zu,%zu]}", *offset, *offset + bytes);
    *offset += bytes;
}

// The whole header; *bytes gets the size of the numbers that follow it.
static String checkpoint_header(const Model *m, const Progress *p, int contents, size_t *bytes) {
    const char *prefixes[3][3] = {{""}, {"", "adam_m.", "adam_v."}, {"", "grad."}};
    String s = {NULL, 0, 0};
    char value[4096];
    *bytes = 0;
    append(&s, METADATA, contents_names[contents], p->step, p->position, p->random);
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (!row->name || !(row->stored & STORED)) continue;
        option_text(m->o, row, value, sizeof value);
        append(&s, ",\"%s\":\"%s\"", row->name, value);
    }
    append(&s, "}");
    for (int k = 0; k < 3 && prefixes[contents][k]; k++)
        for (const Tensor *t = m->tensors; t < m->tensors + m->num_tensors; t++)
            append_tensor(&s, prefixes[contents][k], t->name, "F32", t->rows, t->cols, bytes);
    if (contents == HOLDS_GRADIENTS) {
        append_tensor(&s, "", "tokens", "I32", m->o->batch, m->o->seq_len, bytes);
        append_tensor(&s, "", "targets", "I32", m->o->batch, m->o->seq_len, bytes);
        append_tensor(&s, "", "loss", "F32", 1, 0, bytes);
    }
    append(&s, "}");
    while (s.length % 8) append(&s, " ");
    return s;
}

typedef struct { const void *data; size_t bytes; } Part;

// Writes header and parts under a temporary name, waits until they are on the disk, then renames: at
// any moment the file is either the old one or the new one, whole.
static void write_safetensors(const char *path, String header, const Part *parts, int num_parts) {
    char temporary[2100];
    uint64_t length = header.length;
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    FILE *file = fopen(temporary, "wb");
    if (!file) die("cannot write %s: %s", temporary, strerror(errno));
    int good = fwrite(&length, 8, 1, file) == 1 && fwrite(header.text, 1, length, file) == length;
    for (int i = 0; i < num_parts; i++)
        good = good && fwrite(parts[i].data, 1, parts[i].bytes, file) == parts[i].bytes;
    good = good && fflush(file) == 0 && fsync(fileno(file)) == 0;
    good = fclose(file) == 0 && good;
    if (!good || rename(temporary, path) != 0) {
        int error = errno;
        unlink(temporary);
        die("cannot write %s: %s", path, strerror(error));
    }
    free(header.text);
}

static void checkpoint_write(const char *path, const Model *m, const Progress *p) {
    size_t bytes, n = m->num_parameters * sizeof(float);
    Part parts[] = {{m->parameters, n}, {m->adam_m, n}, {m->adam_v, n}};
    write_safetensors(path, checkpoint_header(m, p, HOLDS_ADAM, &bytes), parts, 3);
}

// Opens a checkpoint and reads its header, ended by a zero byte, and the beginning of its metadata.
// *rest gets the metadata that follows.
static FILE *checkpoint_open(const char *path, String *header, char **rest, Progress *p, int *contents) {
    struct stat info;
    uint64_t length;
    char name[16];
    int used = 0;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &info) != 0) die("cannot open %s: %s", path, strerror(errno));
    if (fread(&length, 8, 1, file) != 1 || length > (uint64_t)info.st_size - 8 || length > 100000000)
        die("%s is no checkpoint: no safetensors header at its beginning", path);
    header->length = header->room = (size_t)length;
    header->text = (char *)allocate(length + 1, 1);
    if (fread(header->text, 1, length, file) != length) die("cannot read %s: %s", path, strerror(errno));
    if (sscanf(header->text, METADATA_SCAN, name, &p->step, &p->position, &p->random, &used) != 4 || !used)
        die("%s is no checkpoint of this program: it lacks the program's metadata", path);
    for (*contents = 0; *contents < 3 && strcmp(name, contents_names[*contents]); ++*contents) {}
    if (*contents == HOLDS_GRADIENTS || *contents == 3)
        die("%s holds %s: not a checkpoint to go on from", path, name);
    *rest = header->text + used;
    return file;
}

static void checkpoint_options(const char *path, Options *o, int kept, int fixed, const char **given) {
    String header;
    Progress p;
    Options read = *o;
    int contents;
    char *rest, pattern[64], value[1024], name[1024];
    FILE *file = checkpoint_open(path, &header, &rest, &p, &contents);
    fclose(file);
    for (int r = 0; r < NUM_ROWS; r++) {
        const OptionRow *row = &option_rows[r];
        if (!row->name || !(row->stored & STORED)) continue;
        snprintf(pattern, sizeof pattern, ",\"%s\":\"", row->name);
        char *end = NULL, *start = rest + strlen(pattern);
        if (strncmp(rest, pattern, strlen(pattern)) == 0) end = strchr(start, '"');
        if (!end) die("%s is no checkpoint of this version: it lacks the option %s", path, row->name);
        *end = 0;
        rest = end + 1;
        if (!(row->stored & (kept | fixed))) continue;
        const char *problem = set_option(&read, row, start);
        if (problem) die("%s is damaged: its %s is %s", path, row->name, start);
        option_text(&read, row, value, sizeof value);
        option_text(o, row, name, sizeof name);
        if (given[r] && (row->stored & fixed) && strcmp(value, name))
            die("--%s %s contradicts %s, which has %s", row->name, name, path, value);
        set_option(o, row, start);
    }
    free(header.text);
}

// Fills the model from a checkpoint whose options it already has, and the progress; with `resume` also
// Adam's moments, which must be there.
static void checkpoint_read(const char *path, Model *m, Progress *p, int resume) {
    String header, expected;
    Progress q;
    int contents;
    char *rest;
    size_t bytes, n = m->num_parameters;
    struct stat info;
    FILE *file = checkpoint_open(path, &header, &rest, &q, &contents);
    if (resume && contents != HOLDS_ADAM) die("%s has no Adam moments to resume from; use --load", path);
    expected = checkpoint_header(m, &q, contents, &bytes);
    const char *ours = strstr(expected.text, "},\""), *theirs = strstr(rest, "},\"");
    if (!theirs || strcmp(ours, theirs)) die("%s is damaged: its header is not that of its options", path);
    if (fstat(fileno(file), &info) != 0 || (size_t)info.st_size != 8 + header.length + bytes)
        die("%s is damaged: %lld bytes instead of %zu", path, (long long)info.st_size, 8 + header.length + bytes);
    if (fread(m->parameters, sizeof(float), n, file) != n ||
        (resume && (fread(m->adam_m, sizeof(float), n, file) != n || fread(m->adam_v, sizeof(float), n, file) != n)))
        die("cannot read %s: %s", path, strerror(errno));
    if (resume) *p = q;
    fclose(file);
    free(header.text), free(expected.text);
}

/* ------------------------------------------------------------------------------------------------
8. Sampling
*/

typedef struct { float probability; int id; } Choice;

static int compare_choices(const void *a, const void *b) {
    const Choice *x = (const Choice *)a, *y = (const Choice *)b;
    return x->probability != y->probability ? (x->probability < y->probability ? 1 : -1) : x->id - y->id;
}

// Draws the next token from logits (V). Temperature divides the logits: below 1 the likely tokens gain, at
// 0 the likeliest is taken. Top-p (arXiv 1904.09751) keeps the likeliest tokens that together reach top_p.
static int sample_token(const float *logits, int V, double temperature, double top_p, uint64_t *random,
                        Choice *choices) {
    int likeliest = 0, kept = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[likeliest]) likeliest = v;
    if (temperature == 0) return likeliest;
    double total = 0, sum = 0;
    for (int v = 0; v < V; v++) {
        choices[v].id = v;
        choices[v].probability = (float)exp((logits[v] - logits[likeliest]) / temperature);
        total += choices[v].probability;
    }
    qsort(choices, V, sizeof *choices, compare_choices);
    while (kept < V && sum < top_p * total) sum += choices[kept++].probability;
    double draw = random_uniform(random) * sum;
    for (int i = 0; i < kept; i++)
        if ((draw -= choices[i].probability) < 0) return choices[i].id;
    return choices[kept - 1].id;
}

// Tells a story that begins with the prompt, of at most `length` tokens, into the file. What has been
// computed for earlier tokens is still in the activations, so each token costs one row. When the network's
// T positions are full, the story goes on with its last T/2 tokens as the new beginning.
static void tell_story(Model *m, const Tokenizer *k, const Options *o, uint64_t *random, FILE *file) {
    int T = o->seq_len, V = o->vocab_size, filled = 0;
    int *tokens = (int *)allocate(strlen(o->prompt) + 2 + o->length, sizeof(int));
    Choice *choices = (Choice *)allocate(V, sizeof(Choice));
    int n = tokenizer_encode(k, o->prompt, tokens), start = 0, end = n + o->length;
    for (int i = 1; i < n; i++) tokenizer_print(k, tokens[i - 1], tokens[i], file);
    for (; n < end; n++) {
        if (n - start > T) start = n - imax(1, T / 2), filled = 0;
        model_forward(m, tokens + start, NULL, 1, n - start, filled);
        filled = n - start;
        tokens[n] = sample_token(m->logits + (size_t)(filled - 1) * V, V, o->temperature, o->top_p, random, choices);
        if (tokens[n] == TOKEN_BOS || tokens[n] == TOKEN_EOS) break;
        tokenizer_print(k, tokens[n - 1], tokens[n], file);
        fflush(file);
    }
    fputc('\n', file);
    free(tokens), free(choices);
}

/* ------------------------------------------------------------------------------------------------
9. Training
*/

typedef struct {
    Model model;
    Loader train, val;
    Tokenizer tokenizer;
    Progress progress;
    int *tokens, *targets;        // (B,T)
    double *layer_norms;          // (L) of the last gradient
    FILE *log, *layers;
    double start_time;
    int start_step, on_terminal;
} Run;

// Population variance of x (n).
static double variance(const float *x, size_t n) {
    double mean = dot(x, NULL, n) / n;
    return dot(x, x, n) / n - mean * mean;
}

// Mean loss over the validation windows in file order, at most --val-batches batches of them.
static double validate(Run *run) {
    const Options *o = run->model.o;
    int64_t windows = run->val.windows, limit = (int64_t)o->val_batches * o->batch;
    double sum = 0;
    if (o->val_batches && windows > limit) windows = limit;
    for (int64_t w = 0; w < windows; w += o->batch) {
        int B = windows - w < o->batch ? (int)(windows - w) : o->batch;
        loader_batch(&run->val, w, B, run->tokens, run->targets);
        sum += B * model_forward(&run->model, run->tokens, run->targets, B, o->seq_len, 0);
    }
    return sum / windows;
}

// A line per layer in layers.csv. The activations are those of the last validation batch.
static void log_layers(Run *run) {
    const Model *m = &run->model;
    int64_t windows = run->val.windows, limit = (int64_t)m->o->val_batches * m->o->batch;
    if (limit && windows > limit) windows = limit;
    size_t n = ((windows - 1) % m->o->batch + 1) * m->o->seq_len * m->o->channels;
    for (int l = 0; l < m->o->layers; l++) {
        LayerParameters w = layer_parameters(m, m->parameters, l);
        fprintf(run->layers, "%d,%d,%.6g,%.6g,", run->progress.step, l + 1,
                variance(m->sublayers[2 * l].out, n), variance(m->sublayers[2 * l + 1].out, n));
        if (w.gate) fprintf(run->layers, "%.6g", *w.gate);
        if (run->progress.step > run->start_step) fprintf(run->layers, ",%.6g\n", run->layer_norms[l]);
        else fprintf(run->layers, ",\n");
    }
    fflush(run->layers);
}

// Opens OUT/name for appending. A resumed run's file loses the lines of later steps first.
static FILE *open_log(const Options *o, const char *name, const char *header, int step) {
    char path[2048], line[1024];
    snprintf(path, sizeof path, "%s/%s", o->out, name);
    FILE *file = fopen(path, *o->resume ? "r+" : "w");
    if (!file && *o->resume) file = fopen(path, "w");
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    long keep = 0;
    while (*o->resume && fgets(line, sizeof line, file) && strchr(line, '\n') && atoi(line) <= step)
        keep = ftell(file);
    if (fseek(file, keep, SEEK_SET) != 0 || ftruncate(fileno(file), keep) != 0)
        die("cannot write %s: %s", path, strerror(errno));
    if (keep == 0) fprintf(file, "%s\n", header);
    return file;
}

static void make_folder(const char *path) {
    char part[4096];
    for (size_t i = 1; i <= strlen(path); i++)
        if (path[i] == '/' || path[i] == 0) {
            snprintf(part, sizeof part, "%.*s", (int)i, path);
            if (mkdir(part, 0777) != 0 && errno != EEXIST)
                die("cannot make the folder %s: %s", part, strerror(errno));
        }
}

static void checkpoint_path(const Options *o, int step, char *path, size_t size) {
    snprintf(path, size, "%s/ckpt_%06d.safetensors", o->out, step);
}

// Saves OUT/ckpt_STEP.safetensors and removes the one that is --keep saves older.
static void save(Run *run) {
    const Options *o = run->model.o;
    char path[2048];
    int step = run->progress.step;
    checkpoint_path(o, step, path, sizeof path);
    checkpoint_write(path, &run->model, &run->progress);
    if (!o->save_every || step % o->save_every) return;
    checkpoint_path(o, step - o->keep * o->save_every, path, sizeof path);
    if (step > o->keep * o->save_every) unlink(path);
}

static void sample(Run *run) {
    if (!run->tokenizer.V) return;
    char path[2048];
    snprintf(path, sizeof path, "%s/samples.txt", run->model.o->out);
    FILE *file = fopen(path, "a");
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    fprintf(file, "--- step %d ---\n", run->progress.step);
    tell_story(&run->model, &run->tokenizer, run->model.o, &run->progress.random, file);
    fclose(file);
}

// The batch, its loss and its gradients, before any clipping, with the weights they belong to.
static void dump_gradients(Run *run) {
    Model *m = &run->model;
    const Options *o = m->o;
    size_t N = (size_t)o->batch * o->seq_len, n = m->num_parameters * sizeof(float), bytes;
    loader_batch(&run->train, 0, o->batch, run->tokens, run->targets);
    float loss = (float)model_forward(m, run->tokens, run->targets, o->batch, o->seq_len, 0);
    model_backward(m, run->tokens, run->targets, o->batch, o->seq_len, 1.0 / N);
    Part parts[] = {{m->parameters, n}, {m->gradients, n}, {run->tokens, N * sizeof(int)},
                    {run->targets, N * sizeof(int)}, {&loss, sizeof loss}};
    write_safetensors(o->dump_grads, checkpoint_header(m, &run->progress, HOLDS_GRADIENTS, &bytes), parts, 5);
    printf("loss %.6f; wrote %s\n", loss, o->dump_grads);
}

// One training step: the gradient of the mean loss over --total-batch sequences, then AdamW.
// Returns that loss; *norm gets the gradient's norm before clipping.
static double train_step(Run *run, double *norm) {
    Model *m = &run->model;
    const Options *o = m->o;
    int B = o->batch, T = o->seq_len, micro_batches = o->total_batch / B;
    double loss = 0, gate_norm;
    memset(m->gradients, 0, m->num_parameters * sizeof(float));
    for (int i = 0; i < micro_batches; i++, run->progress.position += B) {
        loader_batch(&run->train, run->progress.position, B, run->tokens, run->targets);
        loss += model_forward(m, run->tokens, run->targets, B, T, 0) / micro_batches;
        model_backward(m, run->tokens, run->targets, B, T, 1.0 / ((double)o->total_batch * T));
    }
    *norm = gradient_norms(m, run->layer_norms, &gate_norm);
    model_update(m, run->progress.step++, *norm, gate_norm);
    return loss;
}

// A step's line: on a terminal it is overwritten by the next, in a pipe it comes every --print-every steps.
static void report(const Run *run, double loss, double val, double lr, double norm, double ms) {
    const Options *o = run->model.o;
    int step = run->progress.step;
    if (!run->on_terminal && isnan(val) && step % o->print_every) return;
    double per_step = (seconds_now() - run->start_time) / (step - run->start_step);
    int left = (int)(per_step * (o->steps - step) + 0.5);
    printf("%sstep %d/%d  train %.4f", run->on_terminal ? "\r\033[K" : "", step, o->steps, loss);
    if (!isnan(val)) printf("  val %.4f", val);
    printf("  lr %.2e  norm %.2f  %.0f ms  %.0f tok/s  %d:%02d left", lr, norm, ms,
           1000.0 * o->total_batch * o->seq_len / ms, left / 60, left % 60);
    if (!run->on_terminal || !isnan(val)) printf("\n");
    fflush(stdout);
}

static void train(Run *run) {
    Model *m = &run->model;
    const Options *o = m->o;
    run->start_time = seconds_now();
    if (run->progress.step == 0) {
        double val = validate(run);
        fprintf(run->log, "0,,%.6f,,,,\n", val);
        log_layers(run);
        printf("step 0/%d  val %.4f\n", o->steps, val);
    }
    while (run->progress.step < o->steps) {
        double norm, val = NAN, lr = learning_rate(o, run->progress.step), start = seconds_now();
        double loss = train_step(run, &norm), ms = 1000 * (seconds_now() - start);
        int step = run->progress.step, last = step == o->steps;
        fprintf(run->log, "%d,%.6f,", step, loss);
        if (last || (o->val_every && step % o->val_every == 0)) {
            val = validate(run);
            fprintf(run->log, "%.6f", val);
            log_layers(run);
        }
        fprintf(run->log, ",%.6g,%.6g,%.2f,%.0f\n", lr, norm, ms, 1000.0 * o->total_batch * o->seq_len / ms);
        fflush(run->log);
        report(run, loss, val, lr, norm, ms);
        if (last || (o->sample_every && step % o->sample_every == 0)) sample(run);
        if (last || (o->save_every && step % o->save_every == 0)) save(run);
    }
}

static void print_configuration(const Run *run, Options *o) {
    static const char *const keys[] = {"norm", "gpas", "gate-act", "gate-init", "gate-train", "stop-grad",
        "layers", "channels", "hidden", "heads", "vocab-size", "seq-len", "batch", "total-batch", "steps",
        "lr", "warmup", "grad-clip", "gate-clip", "seed", "data", "out"};
    char value[4096];
    int threads = 1, column = 0;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++)
            if (row->name && strcmp(row->name, keys[i]) == 0) {
                option_text(o, row, value, sizeof value);
                column += printf("%s %s  ", row->name, value);
                if (column > 80) printf("\n"), column = 0;
            }
    #ifdef _OPENMP
    threads = omp_get_max_threads();
    #endif
    printf("\n%zu parameters, %zu training and %zu validation sequences, %d threads\n",
           run->model.num_parameters, run->train.windows, run->val.windows, threads);
}

static void open_run(Run *run, Options *o) {
    memset(run, 0, sizeof *run);
    int has_tokenizer = tokenizer_open(&run->tokenizer, o->data), V = run->tokenizer.V;
    if (has_tokenizer && o->vocab_size && o->vocab_size != V)
        die("the vocabulary is %d, but %s/tokenizer.bin has %d pieces", o->vocab_size, o->data, V);
    if (has_tokenizer) o->vocab_size = V;
    if (!o->vocab_size)
        die("%s has no tokenizer.bin; run: python3 prepro_tinystories.py --out %s (or give --vocab-size)",
            o->data, o->data);
    int training = o->steps > 0 || *o->dump_grads;
    if (!training && !has_tokenizer) die("telling a story needs %s/tokenizer.bin", o->data);
    model_create(&run->model, o, training ? o->batch : 1, training);
    run->progress.random = o->seed;
    if (*o->load) checkpoint_read(o->load, &run->model, &run->progress, 0);
    if (*o->resume) checkpoint_read(o->resume, &run->model, &run->progress, 1);
    if (!training) return;
    loader_open(&run->train, o->data, "train", o->seq_len, o->vocab_size, 1, o->seed);
    loader_open(&run->val, o->data, "val", o->seq_len, o->vocab_size, 0, 0);
    size_t N = (size_t)o->batch * o->seq_len;
    run->tokens = (int *)allocate(N, sizeof(int));
    run->targets = (int *)allocate(N, sizeof(int));
    run->layer_norms = (double *)allocate(o->layers, sizeof(double));
    run->on_terminal = isatty(1);
    run->start_step = run->progress.step;
}

static void close_run(Run *run) {
    model_free(&run->model);
    tokenizer_close(&run->tokenizer);
    if (run->train.shards) loader_close(&run->train), loader_close(&run->val);
    if (run->log) fclose(run->log), fclose(run->layers);
    free(run->tokens), free(run->targets), free(run->layer_norms);
}

#ifndef TRAIN_GPAS_NO_MAIN
int main(int argc, char **argv) {
    Options o;
    Run run;
    parse_options(&o, argc, argv);
    open_run(&run, &o);
    if (*o.dump_grads) dump_gradients(&run);
    else if (o.steps == 0) tell_story(&run.model, &run.tokenizer, &o, &run.progress.random, stdout);
    else {
        make_folder(o.out);
        run.log = open_log(&o, "log.csv", "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s", run.start_step);
        run.layers = open_log(&o, "layers.csv", "step,layer,attention_variance,mlp_variance,gate,grad_norm",
                              run.start_step);
        print_configuration(&run, &o);
        train(&run);
        printf("\nLogs, stories and checkpoints are in %s.\n", o.out);
    }
    close_run(&run);
    return 0;
}
#endif
