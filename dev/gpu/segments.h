// segments.h: defines Segment, Occurrences, most_partial, sort_by_token, upload_occurrences: where
// each token occurs, for the gradient of the embedding.
#ifndef SEGMENTS_H
#define SEGMENTS_H
#include "device.h"

enum { SEGMENT = 32 };  // the most positions in a segment

// At most SEGMENT positions of one token: positions[begin] to positions[end - 1] of Occurrences.
typedef struct {
    int token, begin, end;
    int count;  // in a token's first segment, how many segments the token has; in the others 0
} Segment;

// Tokens that have several segments come first: theirs are segments 0 to num_partial - 1. Each
// later segment is its token's only one. The arrays are on the host or on the GPU.
typedef struct {
    int *positions;     // (num_positions) all positions, sorted by token
    Segment *segments;  // (num_segments), with room for num_positions
    int num_positions, num_segments, num_partial;
} Occurrences;

// Returns the most that num_partial can be for N positions: at worst 33 of them make 2 segments.
static inline int most_partial(int N) { return (int)(2 * (size_t)N / (SEGMENT + 1)); }

// Sorts the positions 0 .. N-1 by token, with a counting sort that keeps the order of a token's
// positions, and cuts each token's positions into segments. tokens (N), each less than V.
static inline void sort_by_token(Occurrences *o, const int *tokens, int N, int V) {
    int *starts = (int *)allocate(V + 1, sizeof(int));
    for (int n = 0; n < N; n++) starts[tokens[n]]++;
    for (int v = 0; v < V; v++) starts[v + 1] += starts[v];  // now starts[v] is the end of token v
    for (int n = N - 1; n >= 0; n--) o->positions[--starts[tokens[n]]] = n;
    o->num_positions = N;
    o->num_segments = 0;
    for (int several = 1; several >= 0; several--) {  // first the tokens with several segments
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

// Copies what sort_by_token() has computed to the GPU.
static inline void upload_occurrences(Occurrences *to, const Occurrences *from) {
    upload(to->positions, from->positions, from->num_positions);
    upload(to->segments, from->segments, from->num_segments);
    to->num_positions = from->num_positions;
    to->num_segments = from->num_segments;
    to->num_partial = from->num_partial;
}
#endif
