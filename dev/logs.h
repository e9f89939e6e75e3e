// logs.h: defines open_logs, log_step, log_layers, save, sample, dump_gradients, stop_not_finite,
// print_configuration, report: what a run prints and writes to OUT.
#ifndef LOGS_H
#define LOGS_H
#include "utils.h"
#include "run.h"
#include "sampler.h"

/* ------------------------------------------------------------------------------------------------
OUT/log.csv and OUT/layers.csv
*/

// Opens OUT/name, and keeps its lines up to step `last`, or none if that is -1. Writes the header
// if no line is kept.
static inline FILE *open_log(const Options *o, const char *name, int last, const char *header) {
    char path[2048], line[1024];
    long keep = 0;
    snprintf(path, sizeof path, "%s/%s", o->out, name);
    check_target(path);
    FILE *file = last >= 0 ? fopen(path, "r+") : NULL;
    while (file && fgets(line, sizeof line, file) && strchr(line, '\n') && atoi(line) <= last)
        keep = ftell(file);
    if (!file) file = fopen(path, "w");
    if (!file || fseek(file, keep, SEEK_SET) != 0 || ftruncate(fileno(file), keep) != 0)
        die("cannot write %s: %s", path, strerror(errno));
    if (keep == 0) fprintf(file, "%s\n", header);
    if (fflush(file) != 0) {
        int error = errno;
        unlink(path);
        close(fileno(file));  // or exit() would try to write once more
        die("cannot write %s: %s", path, strerror(error));
    }
    return file;
}

// Removes the stories that were told after start_step from OUT/samples.txt.
static inline void cut_samples(const Options *o, int start_step) {
    char path[2048], line[1024];
    long keep = 0;
    int step = 0;
    snprintf(path, sizeof path, "%s/samples.txt", o->out);
    check_target(path);
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

// Removes from OUT the checkpoints up to step `last` whose steps are multiples of `every`, and what
// a killed run left half-written.
static inline void remove_checkpoints(const Options *o, int every, int64_t last) {
    char path[2048];
    DIR *folder = opendir(o->out);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        int step = checkpoint_step(entry->d_name, ".safetensors");
        int old = step >= 0 && step <= last && step % every == 0;
        if (!old && checkpoint_step(entry->d_name, ".safetensors.tmp") < 0) continue;
        snprintf(path, sizeof path, "%s/%s", o->out, entry->d_name);
        unlink(path);
    }
    if (folder) closedir(folder);
}

// Writes OUT/options.txt, a line `name value` for each option that a checkpoint stores.
static inline void write_options(const Options *o) {
    char path[2048], value[TEXT_SIZE];
    snprintf(path, sizeof path, "%s/options.txt", o->out);
    check_target(path);
    FILE *file = fopen(path, "w");
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (row->group == NOT_STORED) continue;
        option_text(o, row, value);
        fprintf(file, "%s %s\n", row->name, value);
    }
    if (fclose(file) != 0) {
        int error = errno;
        unlink(path);
        die("cannot write %s: %s", path, strerror(error));
    }
}

// Opens the logs of a run that continues the one in OUT, or of a new one, which may replace it.
static inline void open_logs(Run *run) {
    const Options *o = run->o;
    int continues = resumes_in_out(o);
    make_folder(o->out);
    write_options(o);
    remove_checkpoints(o, 1, continues ? -1 : INT_MAX);
    cut_samples(o, continues ? run->start_step : -1);
    run->log = open_log(o, "log.csv", continues ? run->start_step : -1,
                        "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s");
    run->layers = open_log(o, "layers.csv", continues ? run->start_step : -1,
                           "step,layer,attention_variance,mlp_variance,gate,grad_norm");
}

// Ends the line of OUT/name that began at `begin`. Either the whole line gets into the file, or the
// program exits and the file ends with the line before.
static inline void end_line(const Options *o, FILE *file, long begin, const char *name) {
    if (fflush(file) == 0) return;
    int error = errno, cut = ftruncate(fileno(file), begin);
    close(fileno(file));  // or exit() would try to write once more
    die("cannot write %s/%s: %s%s", o->out, name, strerror(error),
        cut ? "; its last line is incomplete" : "");
}

// Writes a line of log.csv. Arguments that are NAN leave their columns empty: before the first step
// there is only a validation loss, and later not every step has one.
static inline void log_step(Run *run, double loss, double val, double lr, double norm, double ms) {
    const Options *o = run->o;
    FILE *file = run->log;
    long begin = ftell(file);
    fprintf(file, "%d,", run->progress.step);
    if (!isnan(loss)) fprintf(file, "%.6f", loss);
    fprintf(file, isnan(val) ? "," : ",%.6f", val);
    if (isnan(loss)) fprintf(file, ",,,,\n");
    else
        fprintf(file, ",%.6g,%.6g,%.2f,%.0f\n", lr, norm, ms,
                1000.0 * o->total_batch * o->seq_len / ms);
    end_line(o, file, begin, "log.csv");
}

// Writes a line of layers.csv for each layer. Called after validate(), whose last batch is still in
// the activations.
static inline void log_layers(Run *run) {
    const Options *o = run->o;
    int B = (int)((run->val_windows - 1) % o->batch) + 1, step = run->progress.step;
    long begin = ftell(run->layers);
    for (int l = 0; l < o->layers; l++) {
        double variances[2], gate;
        layer_state(run->model, l, B, o->seq_len, variances, &gate);
        fprintf(run->layers, "%d,%d,%.6g,%.6g,", step, l + 1, variances[0], variances[1]);
        if (!isnan(gate)) fprintf(run->layers, "%.6g", gate);
        if (step > run->start_step) fprintf(run->layers, ",%.6g\n", run->layer_norms[l]);
        else fprintf(run->layers, ",\n");
    }
    end_line(o, run->layers, begin, "layers.csv");
}

/* ------------------------------------------------------------------------------------------------
Checkpoints, stories, gradients
*/

// Saves OUT/ckpt_STEP.safetensors, after making sure that the logs are on the disk up to this step.
// Of the checkpoints that --save-every asks for, only the newest --keep are kept.
static inline void save(Run *run) {
    const Options *o = run->o;
    char path[2048];
    int step = run->progress.step, every = o->save_every;
    Snapshot snapshot = model_snapshot(run->model);
    if (!sync_file(fileno(run->log)) || !sync_file(fileno(run->layers)))
        die("cannot write the logs in %s: %s", o->out, strerror(errno));
    snprintf(path, sizeof path, "%s/ckpt_%06d.safetensors", o->out, step);
    checkpoint_write(path, &snapshot, &run->progress);
    if (every) remove_checkpoints(o, every, step - step % every - o->keep * (int64_t)every);
}

// Adds a story to OUT/samples.txt if there is a tokenizer.
static inline void sample(Run *run) {
    char path[2048];
    if (!run->tokenizer.V) return;
    snprintf(path, sizeof path, "%s/samples.txt", run->o->out);
    FILE *file = fopen(path, "a");
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    fprintf(file, "--- step %d ---\n", run->progress.step);
    tell_story(run->model, run->o, &run->tokenizer, &run->progress.rng_state, file);
    int good = fflush(file) == 0 && sync_file(fileno(file));
    if (fclose(file) != 0 || !good) die("cannot write %s: %s", path, strerror(errno));
}

// Writes the first batch, its loss, its gradients before any clipping, and the weights.
static inline void dump_gradients(Run *run) {
    const Options *o = run->o;
    Model *m = run->model;
    int B = o->batch, T = o->seq_len, *tokens = run->tokens, *targets = run->targets;
    dataloader_batch(&run->train, 0, B, tokens, targets);
    float loss = (float)model_forward(m, tokens, targets, B, T);
    model_backward(m, tokens, targets, B, T, 1.0 / ((double)B * T));
    Snapshot snapshot = model_snapshot(m);
    gradients_write(o->dump_grads, &snapshot, &run->progress, tokens, targets, loss);
    printf("loss %.6f; wrote %s\n", loss, o->dump_grads);
}

/* ------------------------------------------------------------------------------------------------
Messages
*/

// Exits before NaN or infinity gets into the parameters or a checkpoint. Names the first layer
// whose output is bad, or else the last one whose gradient is bad, because the backward pass begins
// with the last layer.
static inline void stop_not_finite(Run *run, double loss) {
    const Options *o = run->o;
    char where[64] = "the logits";
    double variances[2] = {0, 0}, gate;
    int l = 0;
    for (; l < o->layers && isfinite(variances[0] + variances[1]); l++)
        layer_state(run->model, l, o->batch, o->seq_len, variances, &gate);
    if (!isfinite(variances[0] + variances[1]))
        snprintf(where, sizeof where, "layer %d, %s", l,
                 isfinite(variances[0]) ? "feed-forward" : "attention");
    else if (isfinite(loss)) {
        for (l = o->layers; l > 0 && isfinite(run->layer_norms[l - 1]);) l--;
        snprintf(where, sizeof where, l ? "the gradient of layer %d" : "the gradient", l);
    }
    die("step %d: NaN or infinity, first in %s; nothing was saved. Try a lower --lr or "
        "--grad-clip 1; --check-finite on says more", current_step, where);
}

// Prints once what is trained, on what, and how.
static inline void print_configuration(const Run *run) {
    char device[TEXT_SIZE];
    Config config = config_of(run->o);
    TensorList list = tensor_list(&config);
    model_device(run->model, device);
    print_options(run->o);
    printf("\n%zu parameters, %zu training and %zu validation sequences, %s\n", list.size,
           run->train.num_windows, run->val.num_windows, device);
    fflush(stdout);
    free(list.tensors);
}

// Prints the line of a step. On a terminal the next line overwrites it; in a pipe only every
// --print-every-th step gets one.
static inline void report(const Run *run, double loss, double val, double lr, double norm,
                          double ms) {
    const Options *o = run->o;
    int step = run->progress.step;
    double elapsed = omp_get_wtime() - run->start_time;
    double left = floor(elapsed / (step - run->start_step) * (o->steps - step) + 0.5);
    if (!run->on_terminal && isnan(val) && step % o->print_every) return;
    printf("%sstep %d/%d  train %.4f", run->on_terminal ? "\r\033[K" : "", step, o->steps, loss);
    if (!isnan(val)) printf("  val %.4f", val);
    printf("  lr %.2e  norm %.2f  %.0f ms  %.0f tok/s  %.0f:%02.0f left", lr, norm, ms,
           1000.0 * o->total_batch * o->seq_len / ms, floor(left / 60), fmod(left, 60));
    if (!run->on_terminal || !isnan(val)) printf("\n");
    fflush(stdout);
}
#endif
