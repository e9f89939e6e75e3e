// dataloader.h: defines DataLoader, dataloader_add, dataloader_open, dataloader_close,
// dataloader_batch.
//
// Token files are llm.c's: 256 int32 (magic 20240520, version 1, the number of tokens), then the
// tokens as uint16. They are mapped into memory.
#ifndef DATALOADER_H
#define DATALOADER_H
#include "utils.h"
#include "random.h"

// The data of one split, cut into windows of T + 1 tokens that do not overlap: T inputs, and the
// same shifted by one as their targets.
typedef struct {
    const char *split;         // "train" or "val", for messages
    const uint16_t **windows;  // (num_windows) pointers into the files
    size_t num_windows;
    size_t *order;             // (num_windows) of the windows in this epoch
    int T, V;
    int64_t epoch;             // the epoch of `order`; -1: none yet
    uint64_t rng_state;        // at the start of epoch 0; 0: the windows come in order
} DataLoader;

// Adds the windows of one token file.
static inline void dataloader_add(DataLoader *loader, const char *path) {
    size_t bytes, stride = loader->T + 1, old = loader->num_windows;
    const int32_t *header = map_file(path, "token", 20240520, &bytes);
    if (header[2] < 0 || bytes != 1024 + 2 * (size_t)header[2])
        die("%s should hold %d tokens but is %zu bytes long", path, header[2], bytes);
    loader->num_windows += header[2] / stride;
    size_t room = loader->num_windows + 1;
    loader->windows =
        (const uint16_t **)realloc(loader->windows, room * sizeof *loader->windows);
    loader->order = (size_t *)realloc(loader->order, room * sizeof *loader->order);
    if (!loader->windows || !loader->order) die("not enough memory for the index of %s", path);
    for (size_t i = old; i < loader->num_windows; i++)
        loader->windows[i] = (const uint16_t *)(header + 256) + (i - old) * stride;
}

// Opens DIR/SPLIT.bin and DIR/SPLIT_000.bin, DIR/SPLIT_001.bin, ..., whichever exist.
static inline void dataloader_open(DataLoader *loader, const char *dir, const char *split, int T,
                                   int V, uint64_t rng_state) {
    char path[2048];
    memset(loader, 0, sizeof *loader);
    loader->split = split;
    loader->T = T;
    loader->V = V;
    loader->rng_state = rng_state;
    loader->epoch = -1;
    snprintf(path, sizeof path, "%s/%s.bin", dir, split);
    if (access(path, F_OK) == 0) dataloader_add(loader, path);
    for (int i = 0; i < 1000; i++) {
        snprintf(path, sizeof path, "%s/%s_%03d.bin", dir, split, i);
        if (access(path, F_OK) != 0) break;
        dataloader_add(loader, path);
    }
    if (!loader->num_windows)
        die("%s has no %s.bin of %d tokens or more; prepro_tinystories.py --out %s writes one", dir,
            split, T + 1, dir);
}

static inline void dataloader_close(DataLoader *loader) {
    free(loader->windows);
    free(loader->order);
}

// Puts the windows in the order of an epoch (Fisher and Yates). The random numbers depend only on
// the seed and the epoch, so a run can continue in any epoch without the ones before.
static inline void dataloader_shuffle(DataLoader *loader, int64_t epoch) {
    uint64_t state = loader->rng_state + ((uint64_t)epoch << 32);
    size_t *order = loader->order;
    for (size_t i = 0; i < loader->num_windows; i++) order[i] = i;
    for (size_t i = loader->num_windows - 1; loader->rng_state && i > 0; i--) {
        size_t j = (size_t)(random_uniform(&state) * (i + 1)), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    loader->epoch = epoch;
}

// Writes sequences position, position + 1, ... of the endless stream of epochs to tokens and
// targets (B,T).
static inline void dataloader_batch(DataLoader *loader, int64_t position, int B, int *tokens,
                                    int *targets) {
    int T = loader->T;
    for (int64_t i = 0; i < B; i++) {
        int64_t epoch = (position + i) / (int64_t)loader->num_windows;
        if (loader->epoch != epoch) dataloader_shuffle(loader, epoch);
        size_t number = loader->order[(position + i) % loader->num_windows];
        const uint16_t *window = loader->windows[number];
        for (int t = 0; t < T; t++) {
            tokens[i * T + t] = window[t];
            targets[i * T + t] = window[t + 1];
        }
    }
    for (int i = 0; i < B * T; i++)
        if (imax(tokens[i], targets[i]) >= loader->V)
            die("%s holds token %d, but the vocabulary has only %d", loader->split,
                imax(tokens[i], targets[i]), loader->V);
}
#endif
