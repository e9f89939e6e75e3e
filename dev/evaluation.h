// evaluation.h: defines evaluate, which is --eval and --eval-choice.
//
//     --eval FILE         the perplexity of a text, e^loss
//     --eval-choice FILE  how often the right one of several endings is the likeliest
//
// The files are llm.c's: 256 int32 (magic, version 1, a count), then uint16. Those of --eval hold
// tokens. Those of --eval-choice hold questions; a question is a row of numbers: 65535, its size in
// bytes, its number (0, 1, ...), which ending is right, how many endings there are; then the
// context and the endings, each preceded by its length.
#ifndef EVALUATION_H
#define EVALUATION_H
#include "run.h"

// Prints loss and perplexity. Vocabularies differ in how long their tokens are, so the loss per
// byte of text is printed too.
static inline void evaluate_text(Run *run) {
    const Options *o = run->o;
    const Tokenizer *tokenizer = &run->tokenizer;
    DataLoader *loader = &run->val;
    int T = o->seq_len;
    double bytes = 0;
    char byte;
    int length;
    loader->split = o->eval;
    loader->tokenizer = run->progress.tokenizer;
    loader->T = T;
    loader->V = o->vocab_size;
    loader->epoch = -1;
    dataloader_add(loader, o->eval);
    if (!loader->num_windows) die("%s has fewer than %d tokens; lower --seq-len", o->eval, T + 1);
    run->val_windows = (int64_t)loader->num_windows;
    double loss = validate(run), tokens = (double)T * loader->num_windows;
    for (size_t w = 0; tokenizer->V && w < loader->num_windows; w++)
        for (int t = 0; t < T; t++) {
            const uint16_t *at = loader->windows[w] + t;
            tokenizer_text(tokenizer, at[0], at[1], &byte, &length);
            bytes += length;
        }
    printf("%s, %.0f tokens: loss %.6f nats per token, perplexity %.4f", o->eval, tokens, loss,
           exp(loss));
    if (bytes > 0) printf(", %.6f nats per byte of text", loss * tokens / bytes);
    printf("\n");
}

// Returns the list of *n tokens that begins with its length at *p, and moves *p past it.
static inline const uint16_t *read_list(const Options *o, const uint16_t **p, const uint16_t *end,
                                        int *n) {
    const uint16_t *list = *p + 1;
    *n = *p < end ? **p : 0;
    if (*n < 1 || *n > end - list) die("%s is damaged: a text ends too early", o->eval_choice);
    for (int i = 0; i < *n; i++)
        if (list[i] >= o->vocab_size)
            die("%s holds token %d, but the vocabulary has only %d tokens", o->eval_choice, list[i],
                o->vocab_size);
    *p = list + *n;
    return list;
}

// Returns the length of an ending of n tokens without its leading space, in characters: bytes that
// do not continue a UTF-8 character. Without a tokenizer it is n.
static inline int ending_length(const Tokenizer *tokenizer, const uint16_t *ending, int n) {
    char byte;
    int characters = 0, length;
    for (int i = 0; tokenizer->V && i < n; i++) {
        const char *text = tokenizer_text(tokenizer, i ? ending[i - 1] : (int)TOKEN_BOS, ending[i],
                                          &byte, &length);
        for (int j = 0; j < length; j++) characters += (text[j] & 0xC0) != 0x80;
    }
    return tokenizer->V ? imax(characters, 1) : n;
}

// Answers question number q at *p, and moves *p past it. Adds 1 to right[0] if the right ending has
// the smallest loss, and to right[1] if it has the smallest loss divided by ending_length(). These
// are acc and acc_norm of EleutherAI's lm-evaluation-harness. The endings share their context,
// which is computed once. A context that is too long for T loses its beginning; returns 1 if that
// happened.
static inline int answer(Run *run, const uint16_t **p, const uint16_t *end, int q, int right[2]) {
    const Options *o = run->o;
    const uint16_t *question = *p;
    int T = o->seq_len, context_length, n, computed = 0, cut = 0, picked[2] = {0, 0};
    double least[2] = {INFINITY, INFINITY};
    if (end - question < 5 || question[0] != 65535 || question[2] != q ||
        question[3] >= question[4])
        die("%s is damaged at question %d", o->eval_choice, q);
    *p += 5;
    const uint16_t *context = read_list(o, p, end, &context_length);
    for (int e = 0; e < question[4]; e++) {
        const uint16_t *ending = read_list(o, p, end, &n);
        if (n > T) die("question %d has an ending of %d tokens; raise --seq-len", q, n);
        int kept = imin(context_length, T + 1 - n), *text = run->tokens;
        cut |= kept < context_length;
        for (int i = 0; i < kept; i++) text[i] = context[context_length - kept + i];
        for (int i = 0; i < n; i++) text[kept + i] = ending[i];
        if (computed != kept - 1 && kept > 1) model_extend(run->model, text, NULL, 0, kept - 1);
        computed = kept - 1;
        double loss = n * model_extend(run->model, text, text + 1, computed, computed + n);
        if (loss < least[0]) {
            least[0] = loss;
            picked[0] = e;
        }
        double per_length = loss / ending_length(&run->tokenizer, ending, n);
        if (per_length < least[1]) {
            least[1] = per_length;
            picked[1] = e;
        }
    }
    if ((*p - question) * 2 != question[1]) die("%s is damaged at question %d", o->eval_choice, q);
    for (int i = 0; i < 2; i++) right[i] += picked[i] == question[3];
    return cut;
}

static inline void evaluate_choices(Run *run) {
    const char *path = run->o->eval_choice;
    size_t bytes;
    const int32_t *header = map_file(path, "multiple-choice", 20240522, &bytes);
    const uint16_t *p = (const uint16_t *)(header + 256), *end = p + (bytes - 1024) / 2;
    check_tokenizer(path, header, run->progress.tokenizer);
    int questions = header[2], right[2] = {0, 0}, cut = 0;
    for (int q = 0; q < questions; q++) cut += answer(run, &p, end, q, right);
    if (questions < 1 || p != end || bytes % 2) die("%s is damaged: its length is wrong", path);
    printf("%s, %d questions: accuracy %.4f, with losses per %s %.4f\n", path, questions,
           (double)right[0] / questions, run->tokenizer.V ? "character" : "token",
           (double)right[1] / questions);
    if (cut)
        printf("the beginning of %d questions was cut off to fit --seq-len %d\n", cut,
               run->o->seq_len);
}

static inline void evaluate(Run *run) {
    if (*run->o->eval) evaluate_text(run);
    if (*run->o->eval_choice) evaluate_choices(run);
}
#endif
