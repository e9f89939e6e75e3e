// occurrences.h: defines Occurrences, Segment, sort_by_token, upload_occurrences: where each token
// occurs, for the gradient of the embedding.
#ifndef OCCURRENCES_H
#define OCCURRENCES_H
#include "device.h"

enum { SEGMENT = 32 };  // the most positions in a segment

// Some positions of one token: positions[begin] to positions[end - 1].
typedef struct {
    int token, begin, end;
    int count;  // in a token's first segment: how many segments the token has; in others 0
} Segment;

// The segments of tokens that have several are the first num_partial segments, those of a token one
// after another. All others are the only one of their token.
typedef struct {
    int *positions;              // (N)
    Segment *segments;           // (num_segments); room for N
    int num_segments, num_partial;
} Occurrences;

// Sorts the positions 0 .. N-1 by token, with a counting sort; those of one token stay in order.
// Cuts those of each token into segments. tokens (N), each less than V.
static inline void sort_by_token(Occurrences *o, const int *tokens, int N, int V) {
    int *starts = (int *)allocate(V + 1, sizeof(int));
    for (int n = 0; n < N; n++) starts[tokens[n]]++;
    for (int v = 0; v < V; v++) starts[v + 1] += starts[v];  // now starts[v] is the end of token v
    for (int n = N - 1; n >= 0; n--) o->positions[--starts[tokens[n]]] = n;
    o->num_segments = 0;
    for (int several = 1; several >= 0; several--) {
        for (int v = 0; v < V; v++) {
            int first = starts[v], end = starts[v + 1];
            int count = (end - first + SEGMENT - 1) / SEGMENT;
            if ((count > 1) != several) continue;
            for (int begin = first; begin < end; begin += SEGMENT) {
                Segment s = {v, begin, imin(begin + SEGMENT, end), begin == first ? count : 0};
                o->segments[o->num_segments++] = s;
            }
        }
        if (several) o->num_partial = o->num_segments;
    }
    free(starts);
}

// Copies what sort_by_token() has computed for N positions to the GPU.
static inline void upload_occurrences(Occurrences *to, const Occurrences *from, int N) {
    upload(to->positions, from->positions, N);
    upload(to->segments, from->segments, from->num_segments);
    to->num_segments = from->num_segments;
    to->num_partial = from->num_partial;
}
#endif
