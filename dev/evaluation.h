/*
evaluation.h: figures by which others compare networks, for train_gpas.c, which includes it last.

    --eval FILE         the perplexity of a text, e^loss
    --eval-choice FILE  how often the right one of several endings is the likeliest

The files are llm.c's: 256 int32 (magic, version 1, a count), then uint16. Those of --eval hold
tokens. Those of --eval-choice hold questions, each a row of numbers: 65535, its bytes, its number
(0, 1, ...), which ending is right, how many endings there are; then the context and the endings,
before each its length.
*/

// Tokens are longer in one vocabulary than in another, bytes are not: so also per byte.
static void evaluate_text(Run *run) {
    const Options *o = run->model.o;
    const Tokenizer *k = &run->tokenizer;
    Loader *loader = &run->val;
    int T = o->seq_len;
    double bytes = 0;
    loader->split = o->eval, loader->T = T, loader->V = o->vocab_size, loader->epoch = -1;
    loader_add(loader, o->eval);
    if (!loader->num_windows) die("%s has fewer than %d tokens; lower --seq-len", o->eval, T + 1);
    run->val_windows = (int64_t)loader->num_windows;
    double loss = validate(run), tokens = (double)T * loader->num_windows;
    for (size_t w = 0; k->V && w < loader->num_windows; w++)
        for (int t = 0; t < T; t++)
            bytes += tokenizer_bytes(k, loader->windows[w][t], loader->windows[w][t + 1]);
    printf("%s, %.0f tokens: loss %.6f nats per token, perplexity %.4f", o->eval, tokens, loss,
           exp(loss));
    if (bytes > 0) printf(", %.6f nats per byte of text", loss * tokens / bytes);
    printf("\n");
}

// The sum of the losses of tokens 1 ... n - 1 of the text (n).
static double text_loss(Model *m, const int *text, int n) {
    return n > 1 ? model_forward(m, text, text + 1, 1, n - 1) * (n - 1) : 0;
}

// The list of *n tokens that begins with its length at *p; moves *p behind it.
static const uint16_t *read_list(const Options *o, const uint16_t **p, const uint16_t *end,
                                 int *n) {
    const uint16_t *list = *p + 1;
    *n = *p < end ? **p : 0;
    if (*n < 1 || *n > end - list) die("%s is damaged: a text ends too early", o->eval_choice);
    for (int i = 0; i < *n; i++)
        if (list[i] >= o->vocab_size)
            die("%s holds token %d, but the vocabulary has only %d", o->eval_choice, list[i],
                o->vocab_size);
    *p = list + *n;
    return list;
}

// Answers the question at *p, number q: adds to right[0] if the right ending's loss is the least,
// to right[1] if its loss per token is. An ending's loss is that of context and ending together
// less the context's. A context too long for T loses its beginning; returns whether that happened.
static int ask(Run *run, const uint16_t **p, const uint16_t *end, int q, int right[2]) {
    const Options *o = run->model.o;
    const uint16_t *question = *p;
    int T = o->seq_len, context_length, n, kept, known = 0, cut = 0, picked[2] = {0, 0};
    double context_loss = 0, least[2] = {INFINITY, INFINITY};
    if (end - question < 5 || question[0] != 65535 || question[2] != q ||
        question[3] >= question[4])
        die("%s is damaged at question %d", o->eval_choice, q);
    *p += 5;
    const uint16_t *context = read_list(o, p, end, &context_length);
    for (int e = 0; e < question[4]; e++) {
        const uint16_t *ending = read_list(o, p, end, &n);
        if (n > T) die("question %d has an ending of %d tokens; raise --seq-len", q, n);
        kept = imin(context_length, T + 1 - n), cut |= kept < context_length;
        int *text = run->tokens;  // (kept + n): the context's end, then the ending
        for (int i = 0; i < kept; i++) text[i] = context[context_length - kept + i];
        for (int i = 0; i < n; i++) text[kept + i] = ending[i];
        if (kept != known) context_loss = text_loss(&run->model, text, known = kept);
        double loss = text_loss(&run->model, text, kept + n) - context_loss;
        if (loss < least[0]) least[0] = loss, picked[0] = e;
        if (loss / n < least[1]) least[1] = loss / n, picked[1] = e;
    }
    if ((*p - question) * 2 != question[1]) die("%s is damaged at question %d", o->eval_choice, q);
    for (int i = 0; i < 2; i++) right[i] += picked[i] == question[3];
    return cut;
}

static void evaluate_choices(Run *run) {
    const char *path = run->model.o->eval_choice;
    size_t bytes;
    const int32_t *header = map_file(path, "multiple-choice", 20240522, &bytes);
    const uint16_t *p = (const uint16_t *)(header + 256), *end = p + (bytes - 1024) / 2;
    int questions = header[2], right[2] = {0, 0}, cut = 0;
    for (int q = 0; q < questions; q++) cut += ask(run, &p, end, q, right);
    if (questions < 1 || p != end || bytes % 2) die("%s is damaged: it has another length", path);
    printf("%s, %d questions: accuracy %.4f, with losses per token %.4f\n", path, questions,
           (double)right[0] / questions, (double)right[1] / questions);
    if (cut)
        printf("of %d questions the beginning was cut off to fit --seq-len %d\n", cut,
               run->model.o->seq_len);
}

static void evaluate(Run *run) {
    if (*run->model.o->eval) evaluate_text(run);
    if (*run->model.o->eval_choice) evaluate_choices(run);
}
