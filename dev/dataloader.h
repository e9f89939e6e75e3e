// dataloader.h: defines DataLoader, check_tokenizer, dataloader_add, dataloader_open,
// dataloader_close, dataloader_batch.
//
// Token files are llm.c's: 256 int32 (magic 20240520, version 1, the number of tokens), then the
// tokens as uint16. They are mapped into memory. Our files use three more numbers of the header,
// which are 0 in llm.c's own: number 4 is the checksum of tokenizer.bin, number 5 how many files
// the split has, and number 6 which of them this is.
#ifndef DATALOADER_H
#define DATALOADER_H
#include "utils.h"
#include <dirent.h>
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
    uint32_t tokenizer;        // the checksum of the network's tokenizer.bin; 0: not known
} DataLoader;

// Exits if the file with this header was made with another tokenizer than the network's.
static inline void check_tokenizer(const char *path, const int32_t *header, uint32_t tokenizer) {
    if (header[4] && tokenizer && (uint32_t)header[4] != tokenizer)
        die("%s was made with a different tokenizer from the network's", path);
}

// Adds the windows of one token file, and returns its header.
static inline const int32_t *dataloader_add(DataLoader *loader, const char *path) {
    size_t bytes, stride = loader->T + 1, old = loader->num_windows;
    const int32_t *header = map_file(path, "token", 20240520, &bytes);
    if (header[2] < 0 || bytes != 1024 + 2 * (size_t)header[2])
        die("%s should hold %d tokens but is %zu bytes long", path, header[2], bytes);
    check_tokenizer(path, header, loader->tokenizer);
    loader->num_windows += header[2] / stride;
    size_t room = loader->num_windows + 1;
    loader->windows =
        (const uint16_t **)realloc(loader->windows, room * sizeof *loader->windows);
    loader->order = (size_t *)realloc(loader->order, room * sizeof *loader->order);
    if (!loader->windows || !loader->order) die("not enough memory for the index of %s", path);
    for (size_t i = old; i < loader->num_windows; i++)
        loader->windows[i] = (const uint16_t *)(header + 256) + (i - old) * stride;
    return header;
}

// Returns how many files DIR/SPLIT_000.bin, DIR/SPLIT_001.bin, ... there should be: the highest
// number found, plus 1.
static inline int count_shards(const char *dir, const char *split) {
    int shards = 0;
    size_t n = strlen(split);
    DIR *folder = opendir(dir);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        int number, used = 0;
        if (strncmp(entry->d_name, split, n) != 0 || entry->d_name[n] != '_') continue;
        sscanf(entry->d_name + n + 1, "%6d.bin%n", &number, &used);
        if (used && entry->d_name[n + 1 + used] == 0) shards = imax(shards, number + 1);
    }
    if (folder) closedir(folder);
    return shards;
}

// Opens DIR/SPLIT.bin, or DIR/SPLIT_000.bin, DIR/SPLIT_001.bin, ... and exits if one is missing.
static inline void dataloader_open(DataLoader *loader, const char *dir, const char *split, int T,
                                   int V, uint32_t tokenizer, uint64_t rng_state) {
    char path[2048];
    int shards = count_shards(dir, split), made = 0;
    memset(loader, 0, sizeof *loader);
    loader->split = split;
    loader->T = T;
    loader->V = V;
    loader->rng_state = rng_state;
    loader->epoch = -1;
    loader->tokenizer = tokenizer;
    snprintf(path, sizeof path, "%s/%s.bin", dir, split);
    int whole = access(path, F_OK) == 0 || errno != ENOENT;  // for lack of permission, say
    if (!whole && !shards)
        die("%s has no %s.bin; prepro_tinystories.py --help says how to make it", dir, split);
    if (whole && shards) die("%s has both %s.bin and %s_*.bin; remove one", dir, split, split);
    for (int i = 0; i < imax(shards, 1); i++) {
        if (shards) snprintf(path, sizeof path, "%s/%s_%03d.bin", dir, split, i);
        if (shards && access(path, F_OK) != 0 && errno == ENOENT)
            die("%s is missing; there should be at least %d files", path, shards);
        const int32_t *header = dataloader_add(loader, path);
        if (header[5] && header[6] != i)
            die("%s was made as file number %d; has it been renamed?", path, header[6]);
        made = imax(made, header[5]);
    }
    if (made && made != imax(shards, 1))
        die("%s has %d %s files, but %d were made; copy the missing ones", dir, imax(shards, 1),
            split, made);
    if (!loader->num_windows)
        die("%s: the %s data are shorter than a sequence of %d tokens; lower --seq-len", dir,
            split, T + 1);
}

static inline void dataloader_close(DataLoader *loader) {
    free(loader->windows);
    free(loader->order);
}

// Puts the windows in the order of an epoch (Fisher-Yates shuffle). The random numbers depend only
// on the seed and the epoch, so a run can resume in any epoch without computing those before it.
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
            die("%s holds token %d, but the vocabulary has only %d tokens", loader->split,
                imax(tokens[i], targets[i]), loader->V);
}
#endif
