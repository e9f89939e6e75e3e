// checkpoint.h: defines Progress, checkpoint_write, checkpoint_read, checkpoint_options,
// checkpoint_step, newest_checkpoint, resumes_in_out, gradients_write.
//
// The format is safetensors: the length of the header in 8 bytes, the header as JSON, then the
// numbers as they lie in memory. The tensors in the header follow from the options. So the reader
// needs no JSON parser: it reads the options at the beginning of the header, writes the header that
// a file with these options must have, and compares.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H
#include "utils.h"
#include <dirent.h>
#include <inttypes.h>
#include "model.h"

// The state of a run besides its network.
typedef struct {
    int step;            // updates done
    int64_t position;    // sequences trained on
    uint64_t rng_state;  // of the stories' generator
    uint32_t tokenizer;  // the checksum of its tokenizer.bin; 0: not known, and not stored
} Progress;

// Returns STEP if a file's name is "ckpt_STEP" followed by the ending, else -1.
static inline int checkpoint_step(const char *name, const char *ending) {
    int step = -1;
    char right[64];
    if (sscanf(name, "ckpt_%9d", &step) != 1) return -1;
    snprintf(right, sizeof right, "ckpt_%06d%s", step, ending);
    return strcmp(name, right) == 0 ? step : -1;
}

// Returns the step of the newest checkpoint in a folder, or -1 if there is none.
static inline int newest_checkpoint(const char *path) {
    int newest = -1;
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        newest = imax(newest, checkpoint_step(entry->d_name, ".safetensors"));
    if (folder) closedir(folder);
    return newest;
}

// Does the run continue in the folder of the checkpoint that it resumes from?
static inline int resumes_in_out(const Options *o) {
    char folder[TEXT_SIZE];
    struct stat from, out;
    snprintf(folder, sizeof folder, "%s", o->resume);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    return *o->resume && stat(slash ? folder : ".", &from) == 0 && stat(o->out, &out) == 0 &&
           from.st_dev == out.st_dev && from.st_ino == out.st_ino;
}

static inline void print_tensor(FILE *file, const char *prefix, const char *name, const char *type,
                                int rows, int cols, size_t *offset) {
    size_t begin = *offset;
    *offset += 4 * (size_t)rows * imax(cols, 1);
    fprintf(file, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[%d", prefix, name, type, rows);
    if (cols) fprintf(file, ",%d", cols);
    fprintf(file, "],\"data_offsets\":[%zu,%zu]}", begin, *offset);
}

// Returns the header of a checkpoint, which holds the parameters and Adam's moments, or of a file
// of gradients. Writes the size of the numbers that follow the header to *bytes. The caller frees
// the header.
static inline char *make_header(const Snapshot *s, const Progress *p, int gradients,
                                size_t *bytes) {
    const char *prefixes[] = {"", gradients ? "grad." : "adam_m.", gradients ? NULL : "adam_v.",
                              NULL};
    char *text, value[TEXT_SIZE];
    size_t length;
    FILE *file = open_memstream(&text, &length);
    if (!file) die("not enough memory");
    fprintf(file, "{\"__metadata__\":{\"format\":\"pt\",\"kind\":\"%s\",\"step\":\"%d\"",
            gradients ? "gradients" : "checkpoint", p->step);
    fprintf(file, ",\"position\":\"%" PRId64 "\",\"random\":\"%" PRIu64 "\"", p->position,
            p->rng_state);
    if (p->tokenizer) fprintf(file, ",\"tokenizer\":\"%" PRIu32 "\"", p->tokenizer);
    for (const OptionRow *row = option_rows; row < option_rows + NUM_ROWS; row++) {
        if (row->group == NOT_STORED) continue;
        option_text(s->o, row, value);
        fprintf(file, ",\"%s\":\"%s\"", row->name, value);
    }
    fputs("}", file);
    *bytes = 0;
    for (const char **prefix = prefixes; *prefix; prefix++)
        for (const Tensor *t = s->list.tensors; t < s->list.tensors + s->list.count; t++)
            print_tensor(file, *prefix, t->name, "F32", t->rows, t->cols, bytes);
    if (gradients) {
        print_tensor(file, "", "tokens", "I32", s->o->batch, s->o->seq_len, bytes);
        print_tensor(file, "", "targets", "I32", s->o->batch, s->o->seq_len, bytes);
        print_tensor(file, "", "loss", "F32", 1, 0, bytes);
    }
    fprintf(file, "}%*s", (int)(7 - ftell(file) % 8), "");  // pads to a multiple of 8
    if (fclose(file) != 0) die("not enough memory");
    return text;
}

typedef struct {
    const void *data;
    size_t bytes;
} Part;

// Writes header and parts to a temporary file, syncs it, renames it, and syncs the folder. So at
// any moment `path` is either the old file or the new one, and complete. If it is a link, the file
// that it points to is written. Frees the header.
static inline void write_safetensors(const char *path, char *header, const Part *parts,
                                     int num_parts) {
    char target[PATH_MAX], temporary[PATH_MAX + 4];
    uint64_t length = strlen(header);
    check_target(path);
    if (!realpath(path, target)) snprintf(target, sizeof target, "%s", path);
    snprintf(temporary, sizeof temporary, "%s.tmp", target);
    FILE *file = fopen(temporary, "wbx");  // x: fails if there is such a file; it is not ours
    if (!file) die("cannot write %s: %s", temporary, strerror(errno));
    int good = fwrite(&length, 8, 1, file) == 1 && fwrite(header, length, 1, file) == 1;
    for (int i = 0; i < num_parts; i++)
        good = good && fwrite(parts[i].data, parts[i].bytes, 1, file) == 1;
    good = good && fflush(file) == 0 && sync_file(fileno(file));
    good = fclose(file) == 0 && good;
    if (!good || rename(temporary, target) != 0 || !sync_folder(target)) {
        int error = errno;
        unlink(temporary);
        die("cannot write %s: %s", path, strerror(error));
    }
    free(header);
}

static inline void checkpoint_write(const char *path, const Snapshot *s, const Progress *p) {
    size_t bytes, n = s->list.size * sizeof(float);
    Part parts[] = {{s->parameters, n}, {s->adam_m, n}, {s->adam_v, n}};
    write_safetensors(path, make_header(s, p, 0, &bytes), parts, 3);
}

// Writes the parameters, the gradients of one batch, its tokens and targets (B,T), and its loss.
static inline void gradients_write(const char *path, const Snapshot *s, const Progress *p,
                                   const int *tokens, const int *targets, float loss) {
    size_t bytes, n = s->list.size * sizeof(float);
    size_t N = (size_t)s->o->batch * s->o->seq_len * sizeof(int);
    Part parts[] = {{s->parameters, n}, {s->gradients, n}, {tokens, N}, {targets, N}, {&loss, 4}};
    write_safetensors(path, make_header(s, p, 1, &bytes), parts, 5);
}

// Opens a checkpoint and reads its header and, from that, the progress. Sets *options to the start
// of the options, and *bytes to the size of the numbers. The caller closes the file and frees the
// header.
static inline FILE *checkpoint_open(const char *path, char **header, char **options, Progress *p,
                                    uint64_t *bytes) {
    size_t size;
    uint64_t length;
    int64_t step = -1;
    int used = 0;
    FILE *file = open_file(path, &size);
    if (fread(&length, 8, 1, file) != 1 || length > 1 << 27 || length + 8 > size)
        die("%s is not a checkpoint: it does not begin with a safetensors header", path);
    *bytes = size - 8 - length;
    *header = (char *)allocate(length + 1, 1);
    if (fread(*header, 1, length, file) != length) die("cannot read %s: %s", path, strerror(errno));
    sscanf(*header, "{\"__metadata__\":{\"format\":\"pt\",\"kind\":\"checkpoint\","
           "\"step\":\"%18" SCNd64 "\",\"position\":\"%18" SCNd64 "\",\"random\":\"%20" SCNu64
           "\"%n", &step, &p->position, &p->rng_state, &used);
    if (!used || step < 0 || step > MOST_STEPS || p->position < 0 ||
        p->position > step * MOST_BATCH)
        die("%s is not a checkpoint written by this program, or another program has changed it",
            path);
    p->step = (int)step;
    *options = *header + used;
    p->tokenizer = 0;
    used = 0;
    sscanf(*options, ",\"tokenizer\":\"%10" SCNu32 "\"%n", &p->tokenizer, &used);
    *options += used;
    return file;
}

// Reads the options stored in a checkpoint into o: all of them with `resume`, else those that
// describe the network and its data. given[r]: the text given for option r on the command line, or
// NULL.
static inline void checkpoint_options(const char *path, Options *o, int resume,
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
            die("%s is not a checkpoint of this version: it lacks --%s", path, row->name);
        *end = 0;
        if (set_option(&stored, row, rest + n))
            die("%s is damaged: its --%s is %s", path, row->name, rest + n);
        option_text(&stored, row, theirs);
        option_text(o, row, ours);
        if (given[r] && row->group == NETWORK && strcmp(theirs, ours) != 0)
            die("--%s %s contradicts %s, which has %s", row->name, ours, path, theirs);
        if (resume || row->group <= NETWORK_DATA) set_option(o, row, rest + n);
        rest = end + 1;
    }
    free(header);
}

// Fills the parameters of a network that has the checkpoint's options; with `resume` also Adam's
// moments and the progress. If s has no arrays yet, it only checks that the file holds what it
// should, so that a damaged one cannot make us allocate what it claims. Exits if the network was
// trained with another tokenizer than p->tokenizer.
static inline void checkpoint_read(const char *path, const Snapshot *s, Progress *p, int resume) {
    Progress progress;
    char *header, *rest, *expected;
    uint64_t bytes;
    size_t right_bytes;
    FILE *file = checkpoint_open(path, &header, &rest, &progress, &bytes);
    expected = make_header(s, &progress, 0, &right_bytes);
    const char *theirs = strstr(rest, "\"},\""), *ours = strstr(expected, "\"},\"");
    if (strncmp(header, expected, rest - header) != 0 || !theirs ||
        strncmp(ours, theirs, strcspn(ours, " ")) != 0)
        die("%s is damaged, or another program has changed it: its tensors do not match its "
            "options", path);
    if (p->tokenizer && progress.tokenizer && p->tokenizer != progress.tokenizer)
        die("%s was not trained with %s/tokenizer.bin; give the --data that it was trained with",
            path, s->o->data);
    if (bytes != right_bytes)
        die("%s is damaged: it has %zu bytes of numbers, expected %zu", path, (size_t)bytes,
            right_bytes);
    float *arrays[] = {s->parameters, s->adam_m, s->adam_v};
    for (int i = 0; s->parameters && i < (resume ? 3 : 1); i++)
        if (fread(arrays[i], sizeof(float), s->list.size, file) != s->list.size)
            die("cannot read %s: %s", path, strerror(errno));
    if (!progress.tokenizer) progress.tokenizer = p->tokenizer;
    p->tokenizer = progress.tokenizer;
    if (resume) *p = progress;
    fclose(file);
    free(header);
    free(expected);
}
#endif
