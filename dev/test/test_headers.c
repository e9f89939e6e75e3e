/*
test_headers.c: tests headers in dev/ without a network: the data loader, the tokenizer, the
sampler, the evaluation, the logs, the schedule, the memory limit. A stub takes the place of the
network and records how it is called.

    build/test_headers    one line for each check, then `N passed, N failed`
*/
#include "../dataloader.h"
#include "../evaluation.h"
#include "../logs.h"
#include "../sampler.h"
#include "../schedule.h"
#include "../tokenizer.h"
#include "check.h"

const char program[] = "test_headers", default_dtype[] = "fp32";
const int on_gpu = 0;

/* ------------------------------------------------------------------------------------------------
A stub for the network
*/

enum { MOST = 64, BYTES = TOKEN_PIECE };  // calls and positions; the size of the byte vocabulary

typedef struct {
    int first, T, has_targets;
} Call;

struct Model {
    int tokens[MOST], computed;  // the positions that have been computed, and their tokens
    Call calls[MOST];
    int num_calls;
    int broken;                  // a call continued a text that had not been computed, or requested
                                 // other logits than those of the last position
    int end_after, end_token;    // unless 0, after so many calls this token is the likeliest
    int undecided;               // a and b are the likeliest; all others are unlikely
    int batches[MOST], num_batches;  // of model_forward() and layer_state()
    float logits[BYTES];
};

// The loss of each position is a hundredth of its target.
double model_extend(Model *m, const int *tokens, const int *targets, int first, int T) {
    double loss = 0;
    Call call = {first, T, targets != NULL};
    if (m->num_calls == MOST || T > MOST) die("the stub has no room for another call");
    m->calls[m->num_calls++] = call;
    for (int t = 0; t < first; t++) m->broken |= t >= m->computed || m->tokens[t] != tokens[t];
    for (int t = first; t < T; t++) {
        m->tokens[t] = tokens[t];
        if (targets) loss += targets[t] / 100.0 / (T - first);
    }
    m->broken |= first >= T;
    m->computed = T;
    return loss;
}

// The likeliest token is a letter that depends on all tokens up to position n.
const float *model_logits(Model *m, int n) {
    int sum = 0;
    m->broken |= n != m->computed - 1;
    for (int t = 0; t <= n; t++) sum = sum * 7 % 26 + m->tokens[t];
    for (int v = 0; v < BYTES; v++) m->logits[v] = m->undecided ? -3 : 0;
    m->logits[TOKEN_BYTE + 'a' + (m->undecided ? 0 : sum % 26)] = 5;
    if (m->undecided) m->logits[TOKEN_BYTE + 'b'] = 4.5f;
    if (m->end_after && m->num_calls == m->end_after) m->logits[m->end_token] = 9;
    return m->logits;
}

// The mean loss of a batch is its first token.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T) {
    (void)targets;
    (void)T;
    m->batches[m->num_batches++] = B;
    return tokens[0];
}

void layer_state(Model *m, int l, int B, int T, double variances[2], double *gate) {
    (void)T;
    m->batches[m->num_batches++] = B;
    variances[0] = l + 0.25;
    variances[1] = l + 0.5;
    *gate = l ? 0.125 : NAN;
}

// Were these the calls to model_extend()?
static int calls_were(const Model *m, const Call *expected, int n) {
    int same = m->num_calls == n && !m->broken;
    for (int i = 0; i < n; i++) {
        const Call *call = &m->calls[i];
        same = same && call->first == expected[i].first && call->T == expected[i].T &&
               call->has_targets == expected[i].has_targets;
    }
    return same;
}

/* ------------------------------------------------------------------------------------------------
Files
*/

static char folder[64] = "/tmp/test_headers_XXXXXX";

static void remove_folder(void) {
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command) != 0) printf("%s could not be removed\n", folder);
}

static void write_file(const char *name, const void *data, size_t size) {
    char path[200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file)) die("cannot write %s", path);
}

// Writes a token file that holds the numbers 0 .. n-1.
static void write_tokens(const char *name, int n) {
    int32_t header[256] = {20240520, 1, n};
    char *bytes = (char *)allocate(1024 + 2 * n, 1);
    uint16_t *tokens = (uint16_t *)(bytes + 1024);
    memcpy(bytes, header, 1024);
    for (int i = 0; i < n; i++) tokens[i] = (uint16_t)i;
    write_file(name, bytes, 1024 + 2 * n);
    free(bytes);
}

// Writes tokenizer.bin: the byte vocabulary, then the given pieces, the better ones first.
static void write_tokenizer(const char *const *pieces, int num_pieces) {
    char bytes[8192];
    size_t at = 4;
    int32_t longest = 20;
    memcpy(bytes, &longest, 4);
    for (int id = 0; id < TOKEN_PIECE + num_pieces; id++) {
        char byte = (char)(id - TOKEN_BYTE);
        const char *piece = id == 0 ? "<unk>" : id == 1 ? "\n<s>\n" : id == 2 ? "\n</s>\n" : &byte;
        if (id >= TOKEN_PIECE) piece = pieces[id - TOKEN_PIECE];
        int is_byte = id >= TOKEN_BYTE && id < TOKEN_PIECE;
        int32_t length = is_byte ? 1 : (int32_t)strlen(piece);
        float score = id < TOKEN_PIECE ? 0 : (float)(TOKEN_PIECE - 1 - id);
        memcpy(bytes + at, &score, 4);
        memcpy(bytes + at + 4, &length, 4);
        memcpy(bytes + at + 8, piece, length);
        at += 8 + length;
    }
    write_file("tokenizer.bin", bytes, at);
}

/* ------------------------------------------------------------------------------------------------
The data loader
*/

// Writes the first token of each of the n sequences from `position` on to first (n).
static void first_tokens(DataLoader *loader, int64_t position, int n, int *first) {
    int tokens[16], targets[16];
    for (int i = 0; i < n; i++) {
        dataloader_batch(loader, position + i, 1, tokens, targets);
        first[i] = tokens[0];
    }
}

static void open_count(DataLoader *loader, uint64_t rng_state) {
    dataloader_open(loader, folder, "count", 4, 60000, 0, rng_state);
}

// How many of the n numbers are in another place in b?
static int moved(const int *a, const int *b, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] != b[i];
    return sum;
}

static void test_windows(void) {
    DataLoader loader;
    int tokens[10], targets[10], again[40];
    write_tokens("count.bin", 103);  // 20 windows of 5, and 3 tokens that fill none
    open_count(&loader, 0);
    dataloader_batch(&loader, 19, 2, tokens, targets);
    check(loader.num_windows == 20 && tokens[0] == 95 && targets[3] == 99 && tokens[4] == 0 &&
              targets[7] == 4,
          "dataloader: windows do not overlap, come in order, and start over", "%d %d %d",
          tokens[0], targets[3], tokens[4]);
    check(tokens[1] == 96 && targets[0] == 96 && targets[1] == 97,
          "dataloader: the target of a token is the next token", "%d %d", tokens[1], targets[0]);
    first_tokens(&loader, 0, 40, again);
    check(moved(again, again + 20, 20) == 0,
          "dataloader: without a seed every epoch has the same order", "they differ");
    dataloader_close(&loader);
    write_tokens("part_000.bin", 10);
    write_tokens("part_001.bin", 7);
    dataloader_open(&loader, folder, "part", 4, 60000, 0, 0);
    dataloader_batch(&loader, 2, 1, tokens, targets);
    check(loader.num_windows == 3 && tokens[0] == 0 && tokens[3] == 3,
          "dataloader: shards follow one another", "%zu windows", loader.num_windows);
    dataloader_close(&loader);
}

static void test_shuffle(void) {
    DataLoader loader, other;
    int first[80], again[80], seen[3][20] = {{0}}, in_order[20], good = 1, in_place = 0;
    open_count(&loader, 3);
    first_tokens(&loader, 0, 80, first);
    for (int i = 0; i < 60; i++) seen[i / 20][first[i] / 5]++;
    for (int i = 0; i < 60; i++) good = good && seen[i / 20][i % 20] == 1;
    for (int i = 0; i < 20; i++) in_order[i] = 5 * i;
    check(good, "dataloader: each epoch has every window once", "it does not");
    check(moved(first, in_order, 20) > 10, "dataloader: an epoch is shuffled", "%d moved",
          moved(first, in_order, 20));
    check(moved(first, first + 20, 20) > 10 && moved(first + 20, first + 40, 20) > 10 &&
              moved(first, first + 40, 20) > 10,
          "dataloader: every epoch has its own order", "%d %d moved",
          moved(first, first + 20, 20), moved(first + 20, first + 40, 20));
    open_count(&other, 3);
    first_tokens(&other, 47, 33, again + 47);
    check(moved(first + 47, again + 47, 33) == 0,
          "dataloader: a later epoch does not depend on where the run began", "%d, %d", first[47],
          again[47]);
    int64_t far = (int64_t)1000000 * 1000000000 + 7;
    first_tokens(&other, far, 1, again);
    first_tokens(&other, far - 20, 1, again + 1);
    check(again[0] % 5 == 0 && other.epoch == far / 20 - 1, "dataloader: jumps to any epoch", "%d",
          again[0]);
    for (int epoch = 0; epoch < 300; epoch++) {
        first_tokens(&other, 20 * epoch, 20, again);
        in_place += 20 - moved(again, in_order, 20);
    }
    check(in_place > 230 && in_place < 370,
          "dataloader: on average an epoch leaves one window in its place", "%d in 300 epochs",
          in_place);
    dataloader_close(&other);
    open_count(&other, 4);
    first_tokens(&other, 0, 80, again);
    check(moved(first, again, 20) > 10, "dataloader: another seed gives another order", "%d moved",
          moved(first, again, 20));
    dataloader_close(&loader);
    dataloader_close(&other);
}

/* ------------------------------------------------------------------------------------------------
The tokenizer
*/

// Writes the text of the tokens (n) to text (size).
static void decode(const Tokenizer *tokenizer, const int *tokens, int n, char *text, size_t size) {
    FILE *file = fmemopen(text, size, "w");
    for (int i = 1; i < n; i++) tokenizer_print(tokenizer, tokens[i - 1], tokens[i], file);
    fclose(file);
}

// Checks that each text comes back after encoding and decoding, and has as many bytes as
// tokenizer_text() says.
static void test_round_trips(const Tokenizer *tokenizer, const char *kind) {
    static const char *const texts[] = {"Once upon a time", "",
                                        "caf\xc3\xa9 \xe2\x80\x9cquoted\xe2\x80\x9d\n\tnew",
                                        "the thehe", "\xff broken \x80"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char name[100], text[100] = "", byte;
        int tokens[100], n = tokenizer_encode(tokenizer, texts[i], tokens), bytes = 0, length;
        decode(tokenizer, tokens, n, text, sizeof text);
        snprintf(name, sizeof name, "tokenizer: %s, round trip of text %zu", kind, i);
        check(strcmp(text, texts[i]) == 0 && tokens[0] == TOKEN_BOS, name, "it comes back as %s",
              text);
        for (int k = 1; k < n; k++, bytes += length)
            tokenizer_text(tokenizer, tokens[k - 1], tokens[k], &byte, &length);
        snprintf(name, sizeof name, "tokenizer: %s, length of text %zu", kind, i);
        check(bytes == (int)strlen(texts[i]), name, "%d bytes", bytes);
    }
}

static void test_tokenizer(void) {
    static const char *const pieces[] = {"th", "he", " t", "the", " the",
                                         " ",  "t",  "h",  "e",   "\xc3\xa9"};
    Tokenizer tokenizer = {0};
    int tokens[100];
    write_tokenizer(pieces, 0);
    int found = tokenizer_open(&tokenizer, folder);
    check(found && tokenizer.V == 259, "tokenizer: bytes", "V is %d", tokenizer.V);
    test_round_trips(&tokenizer, "bytes");
    tokenizer_close(&tokenizer);
    write_tokenizer(pieces, 10);
    found = tokenizer_open(&tokenizer, folder);
    check(found && tokenizer.V == 269, "tokenizer: pieces", "V is %d", tokenizer.V);
    test_round_trips(&tokenizer, "pieces");
    int n = tokenizer_encode(&tokenizer, "the the", tokens);
    check(n == 3 && tokens[1] == 263 && tokens[2] == 263,
          "tokenizer: joins pieces into longer ones", "%d tokens, %d %d", n, tokens[1], tokens[2]);
    n = tokenizer_encode(&tokenizer, "th", tokens);  // th has a better score than the piece " t"
    check(n == 3 && tokens[1] == 264 && tokens[2] == 259,
          "tokenizer: joins the pair with the best score first", "%d tokens, %d %d", n, tokens[1],
          tokens[2]);
    n = tokenizer_encode(&tokenizer, "he\xc3\xa9\xc3\xa8", tokens);
    check(n == 6 && tokens[2] == 260 && tokens[3] == 268 && tokens[4] == TOKEN_BYTE + 0xc3 &&
              tokens[5] == TOKEN_BYTE + 0xa8,
          "tokenizer: a character without a piece becomes its bytes", "%d tokens", n);
    tokenizer_close(&tokenizer);
    found = tokenizer_open(&tokenizer, "/nonexistent");
    check(!found && tokenizer.V == 0, "tokenizer: a folder may lack one", "V is %d", tokenizer.V);
    write_tokenizer(pieces, 0);
}

/* ------------------------------------------------------------------------------------------------
Stories
*/

static void test_sample_token(void) {
    float logits[] = {1, 3, 2, -1};
    Candidate scratch[4];
    uint64_t state = 7;
    int all[4] = {0}, likely[4] = {0}, cold[4] = {0};
    double total = exp(1) + exp(3) + exp(2) + exp(-1), worst = 0;
    double cold_total = exp(2) + exp(6) + exp(4) + exp(-2), cold_worst = 0;
    check(sample_token(logits, 4, 0, 1, &state, scratch) == 1,
          "sample_token: temperature 0 takes the likeliest", "it does not");
    for (int i = 0; i < 20000; i++) {
        all[sample_token(logits, 4, 1, 1, &state, scratch)]++;
        likely[sample_token(logits, 4, 1, 0.8, &state, scratch)]++;
        cold[sample_token(logits, 4, 0.5, 1, &state, scratch)]++;
    }
    for (int v = 0; v < 4; v++) {
        worst = fmax(worst, fabs(all[v] / 20000.0 - exp(logits[v]) / total));
        cold_worst = fmax(cold_worst, fabs(cold[v] / 20000.0 - exp(2 * logits[v]) / cold_total));
    }
    check(worst < 0.015, "sample_token: draws by the softmax", "off by %.3f", worst);
    check(cold_worst < 0.015, "sample_token: divides the logits by the temperature",
          "off by %.3f", cold_worst);
    check(likely[0] == 0 && likely[3] == 0 && likely[2] > 0,
          "sample_token: top-p keeps the likeliest two", "%d %d %d %d", likely[0], likely[1],
          likely[2], likely[3]);
}

// Lets the stub tell a story; returns what was printed.
static const char *told(Model *m, int T, const char *prompt, int length, double temperature,
                        double top_p) {
    static char text[1000];
    static Options options;
    Tokenizer tokenizer;
    uint64_t state = 5;
    options.seq_len = T;
    options.vocab_size = BYTES;
    options.length = length;
    options.temperature = temperature;
    options.top_p = top_p;
    snprintf(options.prompt, TEXT_SIZE, "%s", prompt);
    if (!tokenizer_open(&tokenizer, folder)) die("the test has lost its tokenizer");
    FILE *file = fmemopen(text, sizeof text, "w");
    tell_story(m, &options, &tokenizer, &state, file);
    fclose(file);
    tokenizer_close(&tokenizer);
    return text;
}

static void test_windows_of_story(void) {
    static const Call calls[] = {{0, 4, 0}, {4, 5, 0}, {5, 6, 0}, {6, 7, 0}, {7, 8, 0}, {0, 4, 0},
                                 {4, 5, 0}, {5, 6, 0}, {6, 7, 0}, {7, 8, 0}, {0, 4, 0}, {4, 5, 0}};
    static const Call late[] = {{0, 4, 0}, {4, 5, 0}}, single[] = {{0, 1, 0}, {0, 1, 0}, {0, 1, 0}};
    Model m = {0}, prompted = {0}, narrow = {0};
    char window[6] = "";
    const char *story = told(&m, 8, "ab", 12, 0, 1);  // BOS, a space and two letters: 4 tokens
    check(strlen(story) == 15 && strncmp(story, "ab", 2) == 0 && story[14] == '\n',
          "tell_story: the prompt, --length tokens, the end of the line", "%s", story);
    check(calls_were(&m, calls, 12),
          "tell_story: computes each position once, and the last half again when T is full",
          "%d calls, the first is %d to %d", m.num_calls, m.calls[0].first, m.calls[0].T);
    for (int i = 0; i < 5; i++) window[i] = (char)(m.tokens[i] - TOKEN_BYTE);
    check(strncmp(window, story + 8, 5) == 0, "tell_story: the window holds the latest tokens",
          "%s of %s", window, story);
    told(&prompted, 8, "a long prompt", 2, 0, 1);
    check(calls_were(&prompted, late, 2), "tell_story: a prompt longer than T loses its beginning",
          "%d calls, the first is %d to %d", prompted.num_calls, prompted.calls[0].first,
          prompted.calls[0].T);
    told(&narrow, 1, "a", 3, 0, 1);
    check(calls_were(&narrow, single, 3), "tell_story: works with T = 1", "%d calls",
          narrow.num_calls);
}

static void test_end_of_story(void) {
    static const int ends[] = {TOKEN_BOS, TOKEN_EOS};
    for (int i = 0; i < 2; i++) {
        Model m = {0};
        m.end_after = 3;
        m.end_token = ends[i];
        const char *story = told(&m, 8, "ab", 12, 0, 1);
        check(m.num_calls == 3 && strlen(story) == 5 && story[4] == '\n',
              i ? "tell_story: stops at EOS" : "tell_story: stops at BOS", "%d calls: %s",
              m.num_calls, story);
    }
    Model m = {0}, free_choice = {0};
    m.undecided = free_choice.undecided = 1;
    const char *story = told(&m, 50, "", 40, 1, 0.6);  // a has 59%, b 36%
    check(strspn(story, "ab") == 40 && strchr(story, 'a') && strchr(story, 'b'),
          "tell_story: --top-p draws from the likeliest", "%s", story);
    story = told(&free_choice, 50, "", 40, 1, 1);
    check(strspn(story, "ab") < 40, "tell_story: --top-p 1 draws from all", "%s", story);
}

/* ------------------------------------------------------------------------------------------------
Evaluation
*/

// Lets the stub answer the question `numbers` (n) with T positions. Returns what answer() returns.
static int answered(Model *m, int T, const uint16_t *numbers, int n, int right[2]) {
    int text[MOST];
    Options options;
    Run run;
    memset(&options, 0, sizeof options);
    memset(&run, 0, sizeof run);
    options.seq_len = T;
    options.vocab_size = 300;
    run.o = &options;
    run.model = m;
    run.tokens = text;
    const uint16_t *p = numbers;
    int cut = answer(&run, &p, numbers + n, 0, right);
    m->broken |= p != numbers + n;
    return cut;
}

// Endings with the losses 2 = 1 + 1, 1.5, and 2.7 = 3 times 0.9: the second one has the smallest
// loss, the third one the smallest loss per token.
static void test_answer(void) {
    uint16_t question[] = {65535, 2 * 20, 0, 2, 3, 5, 10, 20, 30, 40, 50, 2, 100, 100, 1, 150, 3,
                           90, 90, 90};
    static const Call calls[] = {{0, 4, 0}, {4, 6, 1}, {4, 5, 1}, {4, 7, 1}};
    static const Call short_calls[] = {{0, 3, 0}, {3, 5, 1}, {0, 4, 0}, {4, 5, 1}, {0, 2, 0},
                                       {2, 5, 1}};
    Model m = {0}, narrow = {0}, second = {0};
    int right[2] = {0, 0}, cut = answered(&m, 16, question, 20, right);
    check(calls_were(&m, calls, 4) && !cut,
          "answer: a context that the endings share is computed once",
          "%d calls, the second is %d to %d", m.num_calls, m.calls[1].first, m.calls[1].T);
    check(right[0] == 0 && right[1] == 1, "answer: the smallest loss per token", "%d %d", right[0],
          right[1]);
    question[3] = 1;
    answered(&second, 16, question, 20, right);
    check(right[0] == 1 && right[1] == 1, "answer: the smallest loss", "%d %d", right[0], right[1]);
    cut = answered(&narrow, 5, question, 20, right);
    check(calls_were(&narrow, short_calls, 6) && cut,
          "answer: a context that is too long for T loses its beginning",
          "%d calls, the first is %d to %d", narrow.num_calls, narrow.calls[0].first,
          narrow.calls[0].T);
    check(narrow.tokens[0] == 30 && narrow.tokens[1] == 40 && narrow.tokens[2] == 50,
          "answer: it keeps its end", "%d %d %d", narrow.tokens[0], narrow.tokens[1],
          narrow.tokens[2]);
}

// Five windows in batches of two: the last batch has one sequence, and counts half as much.
static void test_validate(void) {
    Model m = {0};
    Options options;
    Run run;
    char line[200] = "";
    int tokens[32], targets[32];
    double norms[2] = {3, 4};
    memset(&options, 0, sizeof options);
    memset(&run, 0, sizeof run);
    options.batch = 2;
    options.seq_len = 4;
    options.layers = 2;
    open_count(&run.val, 0);
    run.o = &options;
    run.model = &m;
    run.tokens = tokens;
    run.targets = targets;
    run.val_windows = 5;
    run.layer_norms = norms;
    double loss = validate(&run);  // the stub's losses are 0, 10 and 20
    check(m.num_batches == 3 && m.batches[0] == 2 && m.batches[2] == 1 && loss == 8,
          "validate: the mean over all windows", "%d batches, loss %g", m.num_batches, loss);
    run.progress.step = 1;
    run.layers = fmemopen(line, sizeof line, "w");
    log_layers(&run);
    fclose(run.layers);
    check(m.num_batches == 5 && m.batches[3] == 1 && m.batches[4] == 1,
          "log_layers: the variances are those of the last batch", "batch %d", m.batches[3]);
    check(strcmp(line, "1,1,0.25,0.5,,3\n1,2,1.25,1.5,0.125,4\n") == 0,
          "log_layers: step, layer, both variances, gate, gradient norm", "%s", line);
    dataloader_close(&run.val);
}

// The length of an ending is the number of characters in its text, without its first space. A
// character of several bytes counts once.
static void test_ending_length(void) {
    static const char *const pieces[] = {" t", "he", "\xc3\xa9"};
    const uint16_t ending[] = {259, 260, 261, TOKEN_BYTE + 0xc3, TOKEN_BYTE + 0xa9};
    Tokenizer tokenizer, none = {0};
    write_tokenizer(pieces, 3);
    tokenizer_open(&tokenizer, folder);
    check(ending_length(&tokenizer, ending, 5) == 5, "ending_length: characters", "%d",
          ending_length(&tokenizer, ending, 5));
    check(ending_length(&none, ending, 4) == 4,
          "ending_length: tokens, if there is no tokenizer", "%d",
          ending_length(&none, ending, 4));
    tokenizer_close(&tokenizer);
    check(crc32("123456789", 9) == 0xCBF43926, "crc32: the check value of CRC-32", "%x",
          (unsigned)crc32("123456789", 9));
}

/* ------------------------------------------------------------------------------------------------
The memory limit
*/

static void write_line(const char *name, const char *line) {
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    *strrchr(path, '/') = 0;
    make_folder(path);
    write_file(name, line, strlen(line));
}

// Containers limit memory through files of the kernel. A folder imitates them here.
static void test_memory_limit(void) {
    const char *list = "proc/self/cgroup", *whole = "9223372036854771712\n";
    double all = memory_limit("/nowhere");
    check(all > 1 << 24, "memory_limit: the memory of the machine", "%g", all);
    write_line(list, "0::/a/b\n");
    write_line("sys/fs/cgroup/a/b/memory.max", "max\n");
    check(memory_limit(folder) == all, "memory_limit: a group without a limit", "%g",
          memory_limit(folder));
    write_line("sys/fs/cgroup/a/memory.max", "3000000\n");
    check(memory_limit(folder) == 3000000, "memory_limit: version 2, the parent group", "%g",
          memory_limit(folder));
    write_line("sys/fs/cgroup/a/b/memory.max", "2000000\n");
    check(memory_limit(folder) == 2000000, "memory_limit: version 2, the smaller limit", "%g",
          memory_limit(folder));
    write_line(list, "0::/host/path\n");
    write_line("sys/fs/cgroup/memory.max", "1000000\n");
    check(memory_limit(folder) == 1000000, "memory_limit: version 2, inside a container", "%g",
          memory_limit(folder));
    write_line(list, "12:cpuset:/x\n4:cpu,memory:/docker/1f\n0::/none\n");
    write_line("sys/fs/cgroup/memory.max", "max\n");
    write_line("sys/fs/cgroup/memory/memory.limit_in_bytes", whole);
    check(memory_limit(folder) == all, "memory_limit: version 1 without a limit", "%g",
          memory_limit(folder));
    write_line("sys/fs/cgroup/memory/docker/1f/memory.limit_in_bytes", "4000000\n");
    check(memory_limit(folder) == 4000000, "memory_limit: version 1", "%g", memory_limit(folder));
}

/* ------------------------------------------------------------------------------------------------
Schedule and clipping
*/

static void test_learning_rate(void) {
    static const struct {
        int steps, warmup, t;
        double expected;
        const char *name;
    } rates[] = {
        {100, 10, 0, 0.05, "the first step of the warm-up"},
        {100, 10, 9, 0.5, "the last step of the warm-up"},
        {100, 10, 10, 0.5, "the first step of the cosine"},
        {100, 10, 55, 0.275, "the middle of the cosine"},
        {100, 10, 100, 0.05, "a tenth at the end"},
        {100, 0, 0, 0.5, "without a warm-up"},
        {10, 10, 9, 0.5, "all steps in the warm-up"},
    };
    Options o;
    memset(&o, 0, sizeof o);
    o.lr = 0.5;
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        char name[100];
        o.steps = rates[i].steps;
        o.warmup = rates[i].warmup;
        double rate = learning_rate(&o, rates[i].t);
        snprintf(name, sizeof name, "learning_rate: %s", rates[i].name);
        check(fabs(rate - rates[i].expected) < 1e-9, name, "%g, expected %g", rate,
              rates[i].expected);
    }
}

static void test_clip_factors(void) {
    static const struct {
        double grad_clip, gate_clip, norm, gate_norm, clip, gate;
        const char *name;
    } clips[] = {
        {0, 0, 10, 5, 1, 1, "no limits"},
        {1, 0, 10, 5, 0.1, 0.1, "a limit for the whole gradient"},
        {1, 0, 0.5, 0.2, 1, 1, "a gradient within its limit"},
        {0, 0.01, 10, 0.5, 1, 0.02, "a limit for the gates alone"},
        {1, 0.01, 10, 0.05, 0.1, 0.1, "gates that the first limit brings below the second"},
        {1, 0.01, 10, 0.5, 0.1, 0.02, "gates above both limits"},
    };
    Options o;
    memset(&o, 0, sizeof o);
    for (size_t i = 0; i < sizeof clips / sizeof *clips; i++) {
        char name[100];
        double clip, gate;
        o.grad_clip = clips[i].grad_clip;
        o.gate_clip = clips[i].gate_clip;
        clip_factors(&o, clips[i].norm, clips[i].gate_norm, &clip, &gate);
        snprintf(name, sizeof name, "clip_factors: %s", clips[i].name);
        check(fabs(clip - clips[i].clip) < 1e-12 && fabs(gate - clips[i].gate) < 1e-12, name,
              "%g and %g for the gates", clip, gate);
    }
}

int main(void) {
    if (!mkdtemp(folder)) die("cannot make a folder in /tmp");
    atexit(remove_folder);
    test_windows();
    test_shuffle();
    test_tokenizer();
    test_sample_token();
    test_windows_of_story();
    test_end_of_story();
    test_answer();
    test_ending_length();
    test_validate();
    test_memory_limit();
    test_learning_rate();
    test_clip_factors();
    return summary();
}
