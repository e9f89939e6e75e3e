// command_line.h: defines parse_options.
#ifndef COMMAND_LINE_H
#define COMMAND_LINE_H
#include "utils.h"
#include "checkpoint.h"

static inline void print_help(void) {
    printf("Trains a small LLaMA with GPAS (arXiv 2506.22049) and tells stories with it.\n"
           "usage: ./%s [--option value]...       (defaults in brackets)\n", program);
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++)
        if (!row->name) printf("\n%s\n", row->value);
        else if (!*row->value) printf("  --%-13s %s\n", row->name, row->help);
        else printf("  --%-13s %s [%s]\n", row->name, row->help, row->value);
    printf("\nExamples\n"
           "  ./%s --norm pre --gpas on --out out/gpas\n"
           "  ./%s --resume out/gpas --steps 1600\n"
           "  ./%s --load out/gpas --prompt \"Lily\"\n"
           "  ./%s --load out/gpas/ckpt_000800.safetensors --eval data/toy/val.bin\n"
           "OMP_NUM_THREADS sets the number of threads.\n", program, program, program, program);
    finish_output();
}

// Was this option given on the command line?
static inline int is_given(const char *const given[NUM_ROWS], const char *name) {
    for (int r = 0; r < NUM_ROWS; r++)
        if (option_rows[r].name && strcmp(option_rows[r].name, name) == 0) return given[r] != NULL;
    return 0;
}

// Exits if options that are each allowed make no sense together.
static inline void check_options(const Options *o, const char *const given[NUM_ROWS]) {
    for (int r = 0; r < NUM_ROWS; r++) {
        const char *name = option_rows[r].name;
        if (given[r] && !o->gpas && (!strncmp(name, "gate-", 5) || !strcmp(name, "stop-grad")))
            die("--%s needs --gpas on", name);
    }
    if (o->channels % o->heads || o->channels / o->heads % 2)
        die("--channels %d divided by --heads %d must be an even whole number", o->channels,
            o->heads);
    if ((double)o->batch * o->seq_len > 1 << 24)
        die("--batch %d times --seq-len %d is over 16777216 tokens", o->batch, o->seq_len);
    if (o->total_batch % o->batch)
        die("--total-batch %d is not a multiple of --batch %d", o->total_batch, o->batch);
    if (o->warmup > o->steps && o->steps > 0)
        die("--warmup %d is more than --steps %d", o->warmup, o->steps);
    if (o->gpas && o->gate_train && o->gate_activation == GATE_RELU && o->gate_init <= 0)
        die("a relu gate that starts at %g never moves; give a positive --gate-init", o->gate_init);
    if (!o->gate_train && o->gate_clip > 0) die("--gate-clip needs --gate-train on");
    if (evaluates(o) && !*o->load) die("--eval and --eval-choice need --load CHECKPOINT");
    if (evaluates(o) && *o->dump_grads)
        die("--dump-grads cannot be combined with --eval or --eval-choice");
    if (*o->dump_grads && (*o->resume || o->total_batch != o->batch || o->steps == 0))
        die("--dump-grads takes one batch; it cannot be combined with --resume, --total-batch or "
            "--steps 0");
}

// Exits if the network needs more memory than the machine has, before the system kills the program.
// Also rejects a small checkpoint, possibly damaged, whose stored --batch and --seq-len ask for a
// lot, unless the command line gives them too.
static inline void check_memory(const Options *o, const char *const given[NUM_ROWS]) {
    const char *path = *o->resume ? o->resume : o->load;
    struct stat info;
    int training = o->steps > 0, last = o->norm == NORM_POST || o->norm == NORM_DEEPNORM;
    double C = o->channels, H = o->hidden, L = o->layers, V = o->vocab_size, GiB = 1 << 30;
    double batch = training || evaluates(o) ? o->batch : 1, tokens = o->seq_len * batch;
    double parameters = (training ? 16 : 4) * (2 * V * C + L * C * (4 * C + 3 * H));
    double outputs = 2 + (o->gpas && !last) + (o->norm == NORM_SANDWICH);  // of a sublayer, each C
    double inside = (o->recompute || !training ? 1 : L) * (4 * C + 3 * H);
    if (!training && batch == 1) inside += (L - 1) * 3 * C;  // queries, keys and values
    double shared = V + 7 * C + C + H + 3 * C + 2 * H;
    double activations = 4 * tokens * (shared + inside + L * (2 * C * outputs + o->heads));
    double all = memory_limit("");
    if (parameters + activations > all)
        die("needs about %.1f GiB of memory, but only %.1f GiB are available; lower --batch, "
            "--seq-len or the network's size%s", (parameters + activations) / GiB, all / GiB,
            o->recompute || !training ? "" : ", or try --recompute on");
    if (!*path || (is_given(given, "seq-len") && (*o->load || is_given(given, "batch")))) return;
    if (activations > GiB / 2 && stat(path, &info) == 0 && activations > 64.0 * info.st_size)
        die("%s: its --batch and --seq-len need %.1f GiB, suspiciously much for so small a file; "
            "give both options to confirm", path, activations / GiB);
}

// If the path of --load or --resume is a folder, replaces it by that of its newest checkpoint.
static inline void find_checkpoint(char *path) {
    char folder[TEXT_SIZE];
    if (!is_folder(path)) return;
    snprintf(folder, sizeof folder, "%s", path);
    int step = newest_checkpoint(folder);
    if (step < 0) die("%s contains no checkpoint (ckpt_*.safetensors)", folder);
    if (snprintf(path, TEXT_SIZE, "%s/ckpt_%06d.safetensors", folder, step) >= TEXT_SIZE)
        die("%s: the path is too long", folder);
}

// Returns how many characters must be changed, added or removed to turn b into a (Levenshtein).
static inline int edit_distance(const char *a, const char *b) {
    int row[64], n = imin((int)strlen(b), 63);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = imin(replaced, 1 + imin(row[j], row[j - 1]));
        }
    }
    return row[n];
}

// Exits with a message that suggests the most similar option, if one is similar enough.
__attribute__((noreturn))
static inline void unknown_option(const char *text) {
    const char *name = text + strspn(text, "-"), *best = NULL;
    int least = imin(3, 1 + (int)strlen(name) / 3);  // a distance that is too large
    for (int r = 0; r < NUM_ROWS; r++)
        if (option_rows[r].name && edit_distance(name, option_rows[r].name) < least) {
            best = option_rows[r].name;
            least = edit_distance(name, best);
        }
    if (best) die("unknown option %s; did you mean --%s?", text, best);
    die("unknown option %s; --help lists them all", text);
}

// Finds the options on the command line, --name value or --name=value: given[r] becomes the text
// given for option r.
static inline void find_options(const char *given[NUM_ROWS], int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int r = 0;
        char *option = argv[i], *equals = strncmp(option, "--", 2) ? NULL : strchr(option, '=');
        if (!strcmp(option, "--help") || !strcmp(option, "-h")) {
            print_help();
            exit(0);
        }
        if (equals) *equals = 0;
        while (r < NUM_ROWS && !(option_rows[r].name && strncmp(option, "--", 2) == 0 &&
                                 strcmp(option + 2, option_rows[r].name) == 0)) r++;
        if (r == NUM_ROWS) unknown_option(option);
        if (!equals && i + 1 == argc) die("%s needs a value", option);
        if (given[r]) die("%s was given twice", option);
        given[r] = equals ? equals + 1 : argv[++i];
        // Most likely an unset shell variable. Only a prompt may be empty.
        if (!*given[r] && option_rows[r].offset != offsetof(Options, prompt))
            die("%s is empty; it needs a value", option);
    }
}

// Fills o from the command line: the defaults, overridden by a preset or a checkpoint, overridden
// by the options that are given.
static inline void parse_options(Options *o, int argc, char **argv) {
    const char *given[NUM_ROWS] = {NULL};
    int preset = 0;
    memset(o, 0, sizeof *o);
    find_options(given, argc, argv);
    for (int pass = 0; pass < 3; pass++) {  // the defaults; the options given; the same again
        for (int r = 0; r < NUM_ROWS; r++) {
            const OptionRow *row = &option_rows[r];
            const char *text = pass ? given[r] : row->value, *problem;
            if (!row->name || !text) continue;
            if ((problem = set_option(o, row, text))) die("--%s %s: %s", row->name, text, problem);
            if (pass == 1 && row->offset == offsetof(Options, preset)) {
                apply_preset(o, o->preset);
                preset = 1;
            }
        }
        find_checkpoint(o->load);
        find_checkpoint(o->resume);
        if (pass != 1) continue;
        if (*o->load && *o->resume) die("--load and --resume cannot be used together");
        if (preset && (*o->load || *o->resume)) 
            die("--preset cannot be used with --load or --resume; the checkpoint has its sizes");
        if (*o->load) checkpoint_options(o->load, o, 0, given);
        if (*o->resume) checkpoint_options(o->resume, o, 1, given);
    }
    if (on_gpu && o->check_finite)
        die("--check-finite is an option of ./train_gpas, which can resume this run");
    if (!on_gpu && is_given(given, "dtype") && o->dtype != DTYPE_FP32)
        die("--dtype bf16 needs a GPU and train_gpas_cuda; the CPU computes in fp32");
    if (!on_gpu && is_given(given, "fused"))
        die("--fused is an option of ./train_gpas_cuda; the CPU computes one operation at a time");
    if (!on_gpu) o->dtype = DTYPE_FP32;  // even if the checkpoint was written on a GPU in bf16
    if (evaluates(o) || (*o->load && *o->prompt && !is_given(given, "steps"))) o->steps = 0;
    if (o->total_batch == 0) o->total_batch = o->batch;
    if (o->warmup < 0) o->warmup = o->steps / 10;
    check_options(o, given);
    if (!on_gpu) check_memory(o, given);
}
#endif
