// options.h: defines Options, the table of all options (option_rows), apply_preset, set_option,
// option_text, print_options, evaluates, config_of.
//
// The table says everything about every option: its name, its default, where its value is stored,
// what is allowed, the help text, and how --load and --resume treat it. A checkpoint stores the
// options as text, under the same names.
#ifndef OPTIONS_H
#define OPTIONS_H
#include "utils.h"
#include <math.h>
#include <stddef.h>
#include "parameters.h"

extern const char default_dtype[];  // "fp32" in train_gpas.c, "bf16" in train_gpas.cu
extern const int on_gpu;            // 0 in train_gpas.c, 1 in train_gpas.cu

enum { DTYPE_FP32, DTYPE_BF16 };
enum { TEXT_SIZE = 1024, MOST_STEPS = 1000000000, MOST_BATCH = 1000000 };

typedef struct {
    int norm, gpas, gate_activation, gate_train, stop_grad;
    double gate_init;
    int vocab_size, layers, channels, hidden, heads, seq_len;
    int preset, dtype, fused, batch, total_batch, recompute, steps, warmup, seed;
    double lr, weight_decay, grad_clip, gate_clip;
    int overwrite, val_every, val_batches, sample_every, save_every, keep, print_every, length;
    double temperature, top_p;
    char data[TEXT_SIZE], out[TEXT_SIZE], resume[TEXT_SIZE], load[TEXT_SIZE], prompt[TEXT_SIZE];
    char dump_grads[TEXT_SIZE], eval[TEXT_SIZE], eval_choice[TEXT_SIZE];
    int check_finite;
} Options;

// How --load and --resume use an option that is stored in the checkpoint. NETWORK: it must match.
// NETWORK_DATA: it is the default for both. RUN: it is the default for --resume. NOT_STORED: it is
// not saved.
enum { NETWORK, NETWORK_DATA, RUN, NOT_STORED };
enum { INTEGER, REAL, CHOICE, TEXT };

typedef struct {
    const char *name, *value;  // value: the default, as text
    int type;
    size_t offset;             // in Options
    double low, high;          // the smallest and the largest number allowed
    int group;
    const char *help;          // for a CHOICE it begins with the words to choose from
} OptionRow;

#define INT(field) INTEGER, offsetof(Options, field)
#define NUMBER(field) REAL, offsetof(Options, field)
#define ONE_OF(field) CHOICE, offsetof(Options, field), 0, 0
#define STRING(field) TEXT, offsetof(Options, field), 0, 0
#define HEADING(text) {NULL, text, 0, 0, 0, 0, NOT_STORED, NULL}
static const OptionRow option_rows[] = {
    HEADING("The network"),
    {"norm", "pre", ONE_OF(norm), NETWORK,
     "pre|lns|sandwich|post|deepnorm|mix: where the norms are"},
    {"gpas", "on", ONE_OF(gpas), NETWORK,
     "off|on: scale the residual stream by a gate in each layer"},
    {"gate-act", "silu", ONE_OF(gate_activation), NETWORK,
     "silu|identity|relu|leaky_relu|tanh: activation a in a(g)"},
    {"gate-init", "0", NUMBER(gate_init), -100, 100, NETWORK, "the gates' initial value"},
    {"gate-train", "on", ONE_OF(gate_train), NETWORK_DATA,
     "off|on: off keeps the gates at their initial value"},
    {"stop-grad", "on", ONE_OF(stop_grad), NETWORK_DATA, "off|on: off makes GPAS a plain scale"},
    {"vocab-size", "0", INT(vocab_size), 0, 65536, NETWORK, "V, if DATA has no tokenizer.bin"},
    {"layers", "12", INT(layers), 1, 1000, NETWORK, "L, number of layers"},
    {"channels", "96", INT(channels), 2, 65536, NETWORK, "C, width of the residual stream"},
    {"hidden", "256", INT(hidden), 1, 262144, NETWORK, "H, width of the feed-forward network"},
    {"heads", "4", INT(heads), 1, 4096, NETWORK, "NH; C/NH must be even"},
    {"seq-len", "128", INT(seq_len), 1, 65536, NETWORK_DATA,
     "T, tokens in a sequence (the context)"},
    HEADING("Training"),
    {"preset", "toy", ONE_OF(preset), NOT_STORED,
     "toy|71m|130m|250m|350m|1b: sizes, steps, learning rate"},
    {"dtype", default_dtype, ONE_OF(dtype), RUN,
     "fp32|bf16: number format on the GPU; the CPU uses fp32"},
    {"fused", "on", ONE_OF(fused), NOT_STORED,
     "off|on: on the GPU, several operations in one kernel"},
    {"batch", "8", INT(batch), 1, 65536, RUN, "B, sequences computed at once"},
    {"total-batch", "0", INT(total_batch), 0, MOST_BATCH, RUN,
     "sequences per step, a multiple of B; 0: B"},
    {"recompute", "off", ONE_OF(recompute), NOT_STORED,
     "off|on: keep fewer activations and compute them again in the backward pass"},
    {"steps", "800", INT(steps), 0, MOST_STEPS, RUN,
     "number of updates; 0: do not train, only tell a story"},
    {"lr", "0.001", NUMBER(lr), 0, 100, RUN, "peak learning rate"},
    {"warmup", "-1", INT(warmup), -1, 1e9, RUN,
     "steps to the peak learning rate; -1: a tenth of all steps"},
    {"weight-decay", "0", NUMBER(weight_decay), 0, 100, RUN,
     "AdamW's weight decay, for matrices only"},
    {"grad-clip", "0", NUMBER(grad_clip), 0, 1e9, RUN,
     "limit on the norm of the gradient; 0: none"},
    {"gate-clip", "0", NUMBER(gate_clip), 0, 1e9, RUN,
     "the same for the gates' gradients alone; 0: none"},
    {"seed", "1", INT(seed), 0, INT_MAX, RUN, "random seed for weights, shuffling and stories"},
    HEADING("Files"),
    {"data", "data/toy", STRING(data), NETWORK_DATA,
     "folder with train.bin, val.bin, tokenizer.bin"},
    {"out", "out", STRING(out), RUN, "folder for logs, stories and checkpoints"},
    {"overwrite", "off", ONE_OF(overwrite), NOT_STORED,
     "off|on: on replaces the run that is in OUT"},
    {"val-every", "50", INT(val_every), 0, 1e9, RUN,
     "steps between validations; 0: first and last only"},
    {"val-batches", "20", INT(val_batches), 0, 1e9, RUN, "batches per validation; 0: all"},
    {"sample-every", "0", INT(sample_every), 0, 1e9, RUN, "steps between stories; 0: last only"},
    {"save-every", "0", INT(save_every), 0, 1e9, RUN, "steps between checkpoints; 0: last only"},
    {"keep", "2", INT(keep), 1, 1e6, RUN, "number of these checkpoints to keep"},
    {"print-every", "10", INT(print_every), 1, 1e9, RUN,
     "steps between printed lines, unless on a terminal"},
    {"resume", "", STRING(resume), NOT_STORED,
     "continue the run of this checkpoint, or of the newest in a folder"},
    {"load", "", STRING(load), NOT_STORED,
     "start from the weights in this checkpoint, or in the newest in a folder"},
    {"dump-grads", "", STRING(dump_grads), NOT_STORED,
     "write the gradients of the first batch to this file and exit"},
    {"check-finite", "off", ONE_OF(check_finite), NOT_STORED,
     "off|on: find the first operation that computes NaN or infinity (slower)"},
    HEADING("Evaluation of the network given by --load, instead of training"),
    {"eval", "", STRING(eval), NOT_STORED, "loss and perplexity on this token file"},
    {"eval-choice", "", STRING(eval_choice), NOT_STORED,
     "accuracy on this file of multiple-choice questions"},
    HEADING("Stories"),
    {"prompt", "", STRING(prompt), NOT_STORED,
     "beginning of the story; with --load but no --steps, nothing is trained"},
    {"length", "512", INT(length), 1, 1e6, RUN, "maximum number of tokens in a story"},
    {"temperature", "0.8", NUMBER(temperature), 0, 100, RUN,
     "how daring the story is; 0: always the likeliest token"},
    {"top-p", "0.95", NUMBER(top_p), 0.001, 1, RUN,
     "draw from the likeliest tokens that make up this probability"},
};
enum { NUM_ROWS = sizeof option_rows / sizeof *option_rows };

// The paper's networks, and toy for `make run`.
static inline void apply_preset(Options *o, int number) {
    static const struct { int C, H, L, NH, T, batch, total_batch, steps; double lr; } presets[] = {
        {96, 256, 12, 4, 128, 8, 0, 800, 1e-3},
        {512, 1368, 12, 8, 256, 16, 512, 10000, 1e-3},
        {768, 2048, 12, 12, 256, 16, 512, 20000, 1e-3},
        {768, 2560, 24, 16, 256, 8, 512, 40000, 1e-3},
        {1024, 2736, 24, 16, 256, 8, 512, 60000, 5e-4},
        {2048, 5461, 24, 32, 256, 4, 512, 100000, 5e-4},
    };
    o->channels = presets[number].C;
    o->hidden = presets[number].H;
    o->layers = presets[number].L;
    o->heads = presets[number].NH;
    o->seq_len = presets[number].T;
    o->batch = presets[number].batch;
    o->total_batch = presets[number].total_batch;
    o->steps = presets[number].steps;
    o->lr = presets[number].lr;
}

// Copies choice number `index` of "a|b|c: help" to word (32). Returns 0 if there are fewer choices.
static inline int nth_choice(const char *help, int index, char *word) {
    for (; index > 0; index--, help++)
        if (*(help += strcspn(help, "|:")) != '|') return 0;
    return snprintf(word, 32, "%.*s", (int)strcspn(help, "|:"), help) > 0;
}

// Is the text valid inside a JSON string without any escapes? It must be UTF-8.
static inline int fits_json(const char *text) {
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        int more = *p < 0xC2 ? 0 : *p < 0xE0 ? 1 : *p < 0xF0 ? 2 : *p < 0xF5 ? 3 : 0;
        if (*p < ' ' || *p == '"' || *p == '\\' || (*p >= 0x80 && !more)) return 0;
        // Overlong forms, surrogates and code points above U+10FFFF show in the second byte.
        if ((*p == 0xE0 && p[1] < 0xA0) || (*p == 0xED && p[1] > 0x9F) ||
            (*p == 0xF0 && p[1] < 0x90) || (*p == 0xF4 && p[1] > 0x8F)) return 0;
        for (; more; more--)
            if ((*++p & 0xC0) != 0x80) return 0;
    }
    return 1;
}

// Stores the text as the value of this row's option in o. Returns NULL, or what is wrong with it.
static inline const char *set_option(Options *o, const OptionRow *row, const char *text) {
    static char problem[100];
    void *place = (char *)o + row->offset;
    char *end, word[32];
    if (row->type == TEXT) {
        if (row->group != NOT_STORED && !fits_json(text))
            return "must be UTF-8 without quotation marks, backslashes and control characters";
        return snprintf((char *)place, TEXT_SIZE, "%s", text) < TEXT_SIZE ? NULL : "is too long";
    }
    if (row->type == CHOICE) {
        for (int i = 0; nth_choice(row->help, i, word); i++)
            if (strcmp(word, text) == 0) {
                *(int *)place = i;
                return NULL;
            }
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

// Writes the option's value to text (TEXT_SIZE). A number gets the fewest digits that read back as
// the same number.
static inline void option_text(const Options *o, const OptionRow *row, char *text) {
    const void *place = (const char *)o + row->offset;
    if (row->type == TEXT) snprintf(text, TEXT_SIZE, "%s", (const char *)place);
    if (row->type == CHOICE) nth_choice(row->help, *(const int *)place, text);
    if (row->type == INTEGER) snprintf(text, TEXT_SIZE, "%d", *(const int *)place);
    if (row->type != REAL) return;
    int digits = 1;
    do snprintf(text, TEXT_SIZE, "%.*g", digits++, *(const double *)place);
    while (strtod(text, NULL) != *(const double *)place);
}

// Do the options ask for an evaluation, instead of training?
static inline int evaluates(const Options *o) { return *o->eval || *o->eval_choice; }

// Prints all options that a checkpoint stores, several to a line.
static inline void print_options(const Options *o) {
    char value[TEXT_SIZE];
    int column = 0;
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (row->group == NOT_STORED) continue;
        option_text(o, row, value);
        column += printf("%s %s  ", row->name, value);
        if (column > 75) column = 0 * printf("\n");
    }
}

// The part of the options that describes the network.
static inline Config config_of(const Options *o) {
    Config c;
    c.V = o->vocab_size;
    c.L = o->layers;
    c.C = o->channels;
    c.H = o->hidden;
    c.NH = o->heads;
    c.T = o->seq_len;
    c.norm = o->norm;
    c.gpas = o->gpas;
    c.gate_activation = o->gate_activation;
    c.gate_train = o->gate_train;
    c.stop_grad = o->stop_grad;
    c.gate_init = o->gate_init;
    return c;
}
#endif
