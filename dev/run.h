// run.h: defines Run, open_run, close_run, validate.
#ifndef RUN_H
#define RUN_H
#include "checkpoint.h"
#include "dataloader.h"
#include "tokenizer.h"

// A training run, or whatever else the options ask for.
typedef struct {
    Model *model;
    const Options *o;
    Tokenizer tokenizer;
    DataLoader train, val;
    Progress progress;
    int *tokens, *targets;  // (B,T); tokens has room for one more
    double *layer_norms;    // (L) of the last gradient
    FILE *log, *layers;     // log.csv, layers.csv; opened by open_logs()
    int64_t val_windows;    // how many windows a validation uses
    int start_step;         // the step at which this process began
    int on_terminal;
    double start_time;
} Run;

// Exits if the checkpoint does not match the options. This comes before any large allocation, so
// that a damaged header cannot make us allocate absurd sizes.
static inline void check_checkpoint(const char *path, const Options *o, Progress *progress) {
    Config config = config_of(o);
    Snapshot expected = {o, tensor_list(&config), NULL, NULL, NULL, NULL};
    checkpoint_read(path, &expected, progress, 0);
    free(expected.list.tensors);
}

// Opens the tokenizer, which decides the size of the vocabulary.
static inline void open_tokenizer(Run *run, Options *o) {
    int needed = o->steps == 0 && !evaluates(o);
    const char *checkpoint = *o->load ? o->load : o->resume;
    if (tokenizer_open(&run->tokenizer, o->data)) {
        if (o->vocab_size && o->vocab_size != run->tokenizer.V)
            die("%s has %d tokens, but %s/tokenizer.bin has %d", *checkpoint ? checkpoint :
                "--vocab-size", o->vocab_size, o->data, run->tokenizer.V);
        o->vocab_size = run->tokenizer.V;
        run->progress.tokenizer = run->tokenizer.checksum;
    } else if (needed || !o->vocab_size) {
        die("%s/tokenizer.bin is missing; prepro_tinystories.py --help says how to make it",
            o->data);
    }
}

// Opens the data for training and validation.
static inline void open_data(Run *run, const Options *o) {
    uint64_t rng_state = (uint64_t)o->seed + 1;
    uint32_t tokenizer = run->progress.tokenizer;
    dataloader_open(&run->train, o->data, "train", o->seq_len, o->vocab_size, tokenizer, rng_state);
    dataloader_open(&run->val, o->data, "val", o->seq_len, o->vocab_size, tokenizer, 0);
    if (o->total_batch / 16 > (int64_t)run->train.num_windows)
        die("--total-batch %d would use each of the %zu sequences in %s more than 16 times per "
            "step", o->total_batch, run->train.num_windows, o->data);
    int64_t windows = run->val.num_windows, limit = (int64_t)o->val_batches * o->batch;
    run->val_windows = limit && windows > limit ? limit : windows;
}

// Exits if a new run would replace another one in OUT (its checkpoints, its stories, or logs that
// go beyond step 0), or files of the same names that no run has written.
static inline void check_out(const Options *o) {
    const char *names[] = {"options.txt", "log.csv", "layers.csv", "samples.txt"};
    char path[2048], line[TEXT_SIZE + 64];
    int used = newest_checkpoint(o->out) >= 0;
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", o->out, names[i]);
        check_target(path);
        FILE *file = fopen(path, "r");
        if (i == 0 && file && fgets(line, sizeof line, file))
            used |= strncmp(line, "norm ", 5) != 0;
        while (i > 0 && file && fgets(line, sizeof line, file))
            used |= strncmp(line, "step,", 5) != 0 && strncmp(line, "0,", 2) != 0;
        if (file) fclose(file);
    }
    if (used && !o->overwrite && !resumes_in_out(o))
        die("%s holds a run; --resume continues it, another --out keeps it, --overwrite on "
            "replaces it", o->out);
}

// Prepares everything that the options ask for: tokenizer, data, network, checkpoint. Sets
// --vocab-size from the tokenizer.
static inline void open_run(Run *run, Model *model, Options *o) {
    int training = o->steps > 0;
    size_t N = (size_t)o->batch * o->seq_len;
    const char *checkpoint = *o->load ? o->load : o->resume;
    memset(run, 0, sizeof *run);
    run->model = model;
    run->o = o;
    signal(SIGXFSZ, SIG_IGN);  // reaching the file size limit is then an error like a full disk
    open_tokenizer(run, o);
    if (*checkpoint) check_checkpoint(checkpoint, o, &run->progress);
    if (training) open_data(run, o);
    if (training && !*o->dump_grads) check_out(o);
    model_create(model, o, training || *o->eval ? o->batch : 1, training);
    run->progress.rng_state = o->seed;
    if (*checkpoint) {
        Snapshot snapshot = model_snapshot(model);
        checkpoint_read(checkpoint, &snapshot, &run->progress, *o->resume && training);
        model_restore(model);
    }
    if (training && run->progress.step >= o->steps)
        die("%s is at step %d; give a larger --steps to continue", o->resume, run->progress.step);
    run->start_step = run->progress.step;
    run->tokens = (int *)allocate(N + 1, sizeof(int));
    run->targets = (int *)allocate(N, sizeof(int));
    run->layer_norms = (double *)allocate(o->layers, sizeof(double));
    run->on_terminal = isatty(1);
}

static inline void close_run(Run *run) {
    model_free(run->model);
    tokenizer_close(&run->tokenizer);
    if (run->log) fclose(run->log);
    if (run->layers) fclose(run->layers);
    dataloader_close(&run->train);
    dataloader_close(&run->val);
    free(run->tokens);
    free(run->targets);
    free(run->layer_norms);
}

// Returns the mean loss over the first val_windows windows of run->val.
static inline double validate(Run *run) {
    int B = run->o->batch, T = run->o->seq_len;
    double sum = 0;
    for (int64_t w = 0; w < run->val_windows; w += B) {
        int b = run->val_windows - w < B ? (int)(run->val_windows - w) : B;
        dataloader_batch(&run->val, w, b, run->tokens, run->targets);
        sum += b * model_forward(run->model, run->tokens, run->targets, b, T);
    }
    return sum / run->val_windows;
}
#endif
