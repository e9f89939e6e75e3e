// sampler.h: defines sample_token, tell_story.
#ifndef SAMPLER_H
#define SAMPLER_H
#include "model.h"
#include "random.h"
#include "tokenizer.h"

typedef struct {
    float probability;
    int id;
} Candidate;

static inline int compare_candidates(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->probability != y->probability) return x->probability < y->probability ? 1 : -1;
    return x->id - y->id;
}

// Draws the next token from logits (V). They are divided by the temperature: below 1 the likely
// tokens gain, and at 0 the likeliest is taken. Top-p (arXiv 1904.09751) keeps the likeliest tokens
// whose probabilities add up to top_p. candidates (V) is scratch.
static inline int sample_token(const float *logits, int V, double temperature, double top_p,
                               uint64_t *rng_state, Candidate *candidates) {
    int likeliest = 0, kept = 0;
    double total = 0, sum = 0, all = 0;
    for (int v = 0; v < V; v++) {
        if (logits[v] > logits[likeliest]) likeliest = v;
        all += logits[v];  // finite only if every logit is
    }
    if (!isfinite(all)) die("cannot tell a story: the network computes NaN or infinite logits");
    if (temperature == 0) return likeliest;
    for (int v = 0; v < V; v++) {
        candidates[v].id = v;
        candidates[v].probability = (float)exp((logits[v] - logits[likeliest]) / temperature);
        total += candidates[v].probability;
    }
    qsort(candidates, V, sizeof *candidates, compare_candidates);
    while (kept < V && sum < top_p * total) sum += candidates[kept++].probability;
    double draw = random_uniform(rng_state) * sum;
    for (int i = 0; i < kept - 1; i++) {
        draw -= candidates[i].probability;
        if (draw < 0) return candidates[i].id;
    }
    return candidates[kept - 1].id;
}

// Writes the prompt and a continuation of at most --length tokens to file. Each position is
// computed once, until all T are taken: then the last T/2 tokens become the new beginning.
static inline void tell_story(Model *m, const Options *o, const Tokenizer *tokenizer,
                              uint64_t *rng_state, FILE *file) {
    int T = o->seq_len, V = o->vocab_size, start = 0, computed = 0;
    int *tokens = (int *)allocate(strlen(o->prompt) + 2 + o->length, sizeof(int));
    Candidate *candidates = (Candidate *)allocate(V, sizeof(Candidate));
    int n = tokenizer_encode(tokenizer, o->prompt, tokens), end = n + o->length;
    for (int i = 1; i < n; i++) tokenizer_print(tokenizer, tokens[i - 1], tokens[i], file);
    for (; n < end; n++) {
        if (n - start > T) {
            start = n - imax(1, T / 2);
            computed = 0;
        }
        model_extend(m, tokens + start, NULL, computed, n - start);
        computed = n - start;
        const float *logits = model_logits(m, computed - 1);
        tokens[n] = sample_token(logits, V, o->temperature, o->top_p, rng_state, candidates);
        if (tokens[n] == TOKEN_BOS || tokens[n] == TOKEN_EOS) break;
        tokenizer_print(tokenizer, tokens[n - 1], tokens[n], file);
        fflush(file);
    }
    fputc('\n', file);
    free(tokens);
    free(candidates);
}
#endif
