/*
logs.h: what a run tells and writes, for train_gpas.c, which includes it before the training loop:
OUT/log.csv, OUT/layers.csv, OUT/samples.txt, checkpoints, gradients, the lines on the terminal.
*/

// A line of log.csv. Before the first step there is a validation loss only; later it may be absent.
static void log_step(Run *run, double loss, double val, double lr, double norm, double ms) {
    const Options *o = run->model.o;
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

// A line of layers.csv per layer, after validate(): the activations are those of its last batch.
static void log_layers(Run *run) {
    Model *m = &run->model;
    int B = (int)((run->val_windows - 1) % m->o->batch) + 1, step = run->progress.step;
    long begin = ftell(run->layers);
    for (int l = 0; l < m->o->layers; l++) {
        double variances[2], gate;
        layer_state(m, l, B, m->o->seq_len, variances, &gate);
        fprintf(run->layers, "%d,%d,%.6g,%.6g,", step, l + 1, variances[0], variances[1]);
        if (!isnan(gate)) fprintf(run->layers, "%.6g", gate);
        if (step > run->start_step) fprintf(run->layers, ",%.6g\n", run->layer_norms[l]);
        else fprintf(run->layers, ",\n");
    }
    end_line(m->o, run->layers, begin, "layers.csv");
}

// Saves OUT/ckpt_STEP.safetensors; of those from --save-every the last --keep stay. The logs' lines
// up to this step are on the disk before it.
static void save(Run *run) {
    const Options *o = run->model.o;
    char path[2048];
    Holdings h = holdings(&run->model);
    if (fsync(fileno(run->log)) != 0 || fsync(fileno(run->layers)) != 0)
        die("cannot write the logs in %s: %s", o->out, strerror(errno));
    snprintf(path, sizeof path, "%s/ckpt_%06d.safetensors", o->out, run->progress.step);
    checkpoint_write(path, &h, &run->progress);
    remove_old_checkpoints(o, run->progress.step);
}

// Adds a story to OUT/samples.txt, if there is a tokenizer to spell it.
static void sample(Run *run) {
    char path[2048];
    snprintf(path, sizeof path, "%s/samples.txt", run->model.o->out);
    FILE *file = run->tokenizer.V ? fopen(path, "a") : NULL;
    if (!run->tokenizer.V) return;
    if (!file) die("cannot write %s: %s", path, strerror(errno));
    fprintf(file, "--- step %d ---\n", run->progress.step);
    tell_story(&run->model, &run->tokenizer, &run->progress.random, file);
    int good = fflush(file) == 0 && fsync(fileno(file)) == 0;
    if (fclose(file) != 0 || !good) die("cannot write %s: %s", path, strerror(errno));
}

// Writes the first batch, its loss and gradients before any clipping, and the weights they are of.
static void dump_gradients(Run *run) {
    Model *m = &run->model;
    int B = m->o->batch, T = m->o->seq_len, *tokens = run->tokens, *targets = run->targets;
    loader_batch(&run->train, 0, B, tokens, targets);
    float loss = (float)model_forward(m, tokens, targets, B, T);
    model_backward(m, tokens, targets, B, T, 1.0 / ((double)B * T));
    Holdings h = holdings(m);
    gradients_write(m->o->dump_grads, &h, &run->progress, tokens, targets, loss);
    printf("loss %.6f; wrote %s\n", loss, m->o->dump_grads);
}

// Ends the program before numbers that are not finite get into the parameters or a checkpoint.
// Names the first layer whose output is not finite, or else the last whose gradient is not: the
// first on the way back.
static void stop_not_finite(Run *run, double loss) {
    Model *m = &run->model;
    const Options *o = m->o;
    char where[64] = "the logits";
    double variances[2] = {0, 0}, gate;
    int l = 0;
    for (; l < o->layers && isfinite(variances[0] + variances[1]); l++)
        layer_state(m, l, o->batch, o->seq_len, variances, &gate);
    if (!isfinite(variances[0] + variances[1]))
        snprintf(where, sizeof where, "layer %d, %s", l,
                 isfinite(variances[0]) ? "feed-forward" : "attention");
    else if (isfinite(loss)) {
        for (l = o->layers; l > 0 && isfinite(run->layer_norms[l - 1]);) l--;
        snprintf(where, sizeof where, l ? "the gradient of layer %d" : "the gradient", l);
    }
    die("step %d: not finite (loss %g), first in %s; no checkpoint has it. Lower --lr or set "
        "--grad-clip 1, and go on from an earlier checkpoint; --check-finite on finds the "
        "operation", step_now, loss, where);
}

// Once: what is trained, on what, how.
static void print_configuration(const Run *run) {
    char device[TEXT_SIZE];
    model_device(&run->model, device);
    print_options(run->model.o);
    printf("\n%zu parameters, %zu training and %zu validation sequences, %s\n",
           run->model.num_parameters, run->train.num_windows, run->val.num_windows, device);
    fflush(stdout);
}

// A step's line. On a terminal the next one overwrites it; in a pipe one comes every --print-every.
static void report(const Run *run, double loss, double val, double lr, double norm, double ms) {
    const Options *o = run->model.o;
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
