/*
grade.c: is a pass of a layer right, and if not, what is wrong with it?

    grade LAYER forward|backward SEED VARIANT

calls the submission for a list of cases, in a process of its own, and writes lines for feedback.py,
with tabs between: of each result of the pass its points, and what explains it if it is wrong.

No derivative is written down here. A definition f is evaluated at x + ih with h = 1e-30: the
imaginary part of the result is h f'(x), exact to the last digit, since nothing is subtracted (the
complex step). Where a derivative must not look, hold() drops the imaginary part: so GPAS's
stop-gradient is one word in its definition.

Mistakes are found in the same way. A definition marks where one can be made: slip("what is wrong")
is 0, or 1 while we compute what this mistake would give; factor(), term() and pick() stand
for several. One is named only if it gives the submission's numbers, in all cases, or at least where
they are wrong. A mistake in a derivative is hold(y) + slope * (x - hold(x)): y with whatever slope.
*/
#include <complex.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "grade.h"

// ---- 1. Cases -----------------------------------------------------------------------------------

typedef double complex number;

enum { SILU, IDENTITY, RELU, LEAKY_RELU, TANH };
enum { GUARD = 1024, MAX_CASES = 24, MAX_RESULTS = 4, MAX_INPUTS = 4, HINT = 4000 };
enum { ARENA_BYTES = 256 << 20, MEGABYTES = 512, CPU_SECONDS = 4, WALL_SECONDS = 120 };
enum { MAX_SLIPS = 400, OUTPUT = -1 };  // OUTPUT: of a Result that is no gradient

// The arrays of a call: inputs, the output's gradient, outputs (in a backward pass those of the
// right forward pass), gradients, and what belongs to one layer alone.
enum { IN = 1, DOUT = IN + MAX_INPUTS, OUT, GRAD = OUT + MAX_RESULTS, TOKENS = GRAD + MAX_RESULTS,
       DFINP, DX, MAX_ARRAYS };

// An array that a submission gets, between guards that hold NaN.
typedef struct {
    const char *name;
    float *x, *before;  // before: what it held
    size_t n;
    int may_change;
} Array;

// An input of a layer's definition.
typedef struct {
    const char *name;
    double *x;
    int rows, columns;
} Input;

typedef struct {
    const char *name;
    int points, of;           // of: OUTPUT, or the input whose gradient it is
    int adds;                 // it is added to what the array holds
    float *array;
    size_t offset;            // where it begins in the output or gradient that is computed here
    int rows, columns, pitch; // element (i,j) is at i * pitch + j, here as well as in the array
    int inner;                // row i stands for the indices [i / inner][i % inner]
    double scale, tolerance;
    double *got, *old, *expected;
    double *all;              // all that is computed here, of which the result is a part
    char *wrong;
    int num_wrong;
} Result;

// One call of a submission.
typedef struct {
    char name[200];
    const char *special;          // what this case is about; a hint says "only where ..."
    int B, T, C, NH, V, first;    // where there are only rows, there are T; V is also H or OC
    int stride, act, stop_grad, alias, no_gate, norm_last, sum_in_dx;
    double factor;                // A, scale
    AdamWNumbers adam;
    int *tokens;
    Input in[MAX_INPUTS], dout;   // dout: of the first output
    int num_inputs;
    size_t out_size;
    double *out_weight;           // backward: the gradient of each output
    int rotates_dout;             // backward is the forward pass with in[0] = dout and a factor -1
    int elementwise;              // element i of in[0] reaches element i of the output alone
    int large;                    // too large to try mistakes
    char *sampled;                // if not NULL: the elements of in[0] whose gradient is compared
    double scale, tolerance;      // of results that are outputs or gradients of in[0], if not 0
    float *a[MAX_ARRAYS];
    Array arrays[MAX_ARRAYS];     // the same, watched
    int num_arrays;
    Result results[MAX_RESULTS];
    int num_results;
    char complaint[300];          // about memory
} Case;

static uint64_t seed;
static int backward, variant;
static char *arena, *arena_end;  // memory that the submission's process shares
static Case cases[MAX_CASES];

static void *room(size_t count, size_t size) {
    void *p = calloc(count + 1, size);
    if (!p) exit(2);
    return p;
}

// Uniform in [-1, 1).
static double uniform(void) {
    uint64_t z = (seed += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return ((z ^ (z >> 31)) >> 11) / 0x1p52 - 1;
}

static int below(int n) { return (int)((uniform() + 1) / 2 * n); }

// Numbers that float can hold, none of them near 0, where a mistake would not show.
static double *numbers(size_t n, double size) {
    double *x = room(n, sizeof *x);
    for (size_t i = 0; i < n; i++) {
        double u = uniform();
        x[i] = (float)(size * (u + (u < 0 ? -0.2 : 0.2)));
    }
    return x;
}

static size_t input_size(const Input *in) { return (size_t)in->rows * in->columns; }

// An array with the numbers x; with x NULL, some other numbers: it is to be written or added to.
static float *array(Case *c, const char *name, const double *x, size_t n, int may_change) {
    float *base = (float *)arena;
    arena += ((n + 2 * GUARD) * sizeof(float) / 64 + 1) * 64;
    if (arena > arena_end) exit(2);
    uint32_t bits = 0x7FC5A500 + c->num_arrays;  // a NaN of the array's own
    for (size_t i = 0; i < n + 2 * GUARD; i++) memcpy(base + i, &bits, sizeof bits);
    for (size_t i = 0; i < n; i++) base[GUARD + i] = x ? (float)x[i] : (float)(uniform() + 1.2);
    c->arrays[c->num_arrays++] = (Array){name, base + GUARD, NULL, n, may_change};
    return base + GUARD;
}

// A random gradient of the first output; that of the others is 0. Without a name, `factor`.
static void add_dout(Case *c, const char *name, int rows, int columns) {
    double *x = numbers((size_t)rows * columns, 1);
    for (int i = 0; i < rows * columns; i++) {
        if (!name) x[i] = c->factor;
        else if (c->elementwise) x[i] = (float)(0.4 * x[i] + 0.5 * c->in[0].x[i]);  // no small sum
    }
    c->out_weight = room(c->out_size, sizeof *x);
    memcpy(c->out_weight, x, (size_t)rows * columns * sizeof *x);
    if (name) c->dout = (Input){name, x, rows, columns};
}

// What was written that should not have been? Writes it to c->complaint.
static void check_arrays(Case *c) {
    for (int k = 0; k < c->num_arrays; k++) {
        const Array *a = &c->arrays[k];
        uint32_t bits = 0x7FC5A500 + k;
        for (long i = -GUARD; i < (long)a->n + GUARD && !*c->complaint; i++) {
            int inside = i >= 0 && i < (long)a->n;
            if (!inside && memcmp(a->x + i, &bits, sizeof bits))
                snprintf(c->complaint, sizeof c->complaint, "writes outside an array: to %s[%ld], "
                         "but it has %zu elements; check bounds, row lengths", a->name, i, a->n);
            if (inside && !a->may_change && memcmp(a->x + i, a->before + i, sizeof(float)))
                snprintf(c->complaint, sizeof c->complaint, "%s is only to be read, but %s[%ld] "
                         "was changed", a->name, a->name, i);
        }
    }
}

// ---- 2. Definitions -----------------------------------------------------------------------------

// out = f(in).
typedef void (*Definition)(number *out, number *const *in, const Case *c);

// Mistakes that a definition knows. slip(): its text says what is wrong. factor() and term() mark a
// part of a formula by its name, which stands for all that can go wrong with any factor, or term.
// pick("right|other|...", x, y, ...) is x, or what somebody gets who takes y in its place.
enum { SLIP, NO_FACTOR, SQUARED, DIVIDES, NEGATIVE, NO_TERM, TWICE, SUBTRACTED, PICKED };
static const char *const kinds[PICKED] = {
    "%s", "the factor %s is missing", "the factor %s is there twice",
    "the factor %s divides; it must multiply", "the sign of the factor %s is wrong",
    "the term %s is missing", "the term %s is there twice", "the sign of the term %s is wrong"};

typedef struct {
    const char *name;  // or text
    int kind;          // PICKED + i: y is the one after the i-th |
} Mistake;

static const Mistake no_mistake = {NULL, SLIP};
static Mistake mistakes[MAX_SLIPS], chosen;  // all of a definition; the one that is made
static int num_mistakes, collecting;
static double kept_factor = 1;  // by which a mistake multiplies what an array held

static int is_chosen(const char *name, int kind) {
    if (collecting) {
        int i = 0;
        while (i < num_mistakes && (mistakes[i].name != name || mistakes[i].kind != kind)) i++;
        mistakes[i] = (Mistake){name, kind};
        num_mistakes += i == num_mistakes;
    }
    return chosen.name == name && chosen.kind == kind;
}

static int slip(const char *text) { return is_chosen(text, SLIP); }

static number factor(const char *name, number x) {
    if (is_chosen(name, NO_FACTOR)) return 1;
    if (is_chosen(name, SQUARED)) return x * x;
    if (is_chosen(name, DIVIDES)) return 1 / x;
    return is_chosen(name, NEGATIVE) ? -x : x;
}

static number term(const char *name, number x) {
    if (is_chosen(name, NO_TERM)) return 0;
    return is_chosen(name, TWICE) ? 2 * x : is_chosen(name, SUBTRACTED) ? -x : x;
}

static number picked(const char *names, const number *x) {
    int i = 0, found = 0;
    if (!collecting && chosen.name != names) return x[0];
    for (const char *p = names; *p; p++)
        found = *p == '|' && is_chosen(names, PICKED + ++i) ? i : found;
    return x[found];
}
#define pick(names, ...) picked(names, (const number[]){__VA_ARGS__})

static void tell_mistake(char *text, const Mistake *m) {
    const char *wrong = m->name, *right = m->name;
    for (int i = PICKED; i < m->kind; i++) wrong = strchr(wrong, '|') + 1;
    if (m->kind < PICKED) sprintf(text, kinds[m->kind], right);
    else sprintf(text, "%.*s is used; it must be %.*s", (int)strcspn(wrong, "|"), wrong,
                 (int)strcspn(right, "|"), right);
}

static int forward_slip(const char *text) { return !backward && slip(text); }
static int backward_slip(const char *text) { return backward && slip(text); }

static number hold(number x) { return creal(x); }
static number logistic(number x) { return 1 / (1 + cexp(-x)); }

static number at_or_nan(const number *x, long i, size_t n) {
    return i < 0 || i >= (long)n ? NAN : x[i];
}

// The output, or the gradient of sum(out * out_weight) with respect to input `of`. What it does not
// compute is NaN.
static double *evaluate(Definition f, const Case *c, int of) {
    const double h = 1e-30;
    number *in[MAX_INPUTS] = {NULL}, *out = room(c->out_size, sizeof *out);
    size_t n = of == OUTPUT ? c->out_size : input_size(&c->in[of]);
    double *result = room(n, sizeof *result);
    int all = of == 0 && c->elementwise;
    for (int k = 0; k < c->num_inputs; k++) {
        in[k] = room(input_size(&c->in[k]), sizeof(number));
        for (size_t i = 0; i < input_size(&c->in[k]); i++)
            in[k][i] = c->in[k].x[i] + (all && k == 0 ? I * h : 0);
    }
    if (of == OUTPUT || all) f(out, in, c);
    for (size_t i = 0; i < n; i++) {
        if (of == OUTPUT) result[i] = creal(out[i]);
        else if (all) result[i] = c->out_weight[i] * (cimag(out[i]) / h);
        else if (of == 0 && c->sampled && !c->sampled[i]) result[i] = NAN;
        else {
            number x = in[of][i];
            in[of][i] = x + I * h;
            f(out, in, c);
            for (size_t j = 0; j < c->out_size; j++) {  // where there is none, NaN does not matter
                if (cimag(out[j]) != 0) result[i] += c->out_weight[j] * (cimag(out[j]) / h);
            }
            in[of][i] = x;
        }
    }
    for (int k = 0; k < c->num_inputs; k++) free(in[k]);
    free(out);
    return result;
}

// The part of all numbers that belongs to a result.
static double *part_of(const double *all, const Result *r) {
    double *x = room((size_t)r->rows * r->columns, sizeof *x);
    for (int i = 0; i < r->rows * r->columns; i++)
        x[i] = all[r->offset + (size_t)(i / r->columns) * r->pitch + i % r->columns];
    return x;
}

// Compares a result with the definition.
static void compare(Result *r, const Case *c, Definition f) {
    int n = r->rows * r->columns;
    const Array *a = c->arrays;
    while (r->array < a->x || r->array >= a->x + a->n) a++;
    r->got = room(n, sizeof(double));
    r->old = room(n, sizeof(double));
    r->wrong = room(n, 1);
    r->all = evaluate(f, c, r->of);
    r->expected = part_of(r->all, r);
    double sum = 0;
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)(i / r->columns) * r->pitch + i % r->columns;
        r->old[i] = a->before[r->array - a->x + at];
        r->got[i] = r->array[at] - (r->adds ? r->old[i] : 0);
        sum += isnan(r->expected[i]) ? 0 : pow(r->expected[i], 2);
    }
    if (!r->scale) r->scale = sum > 0 ? sqrt(sum / n) : 1e-3;
    for (int i = 0; i < n; i++) {
        double allowed = r->tolerance * (r->scale + fabs(r->expected[i]));
        double error = fabs(r->got[i] - r->expected[i]);
        r->wrong[i] = !isnan(r->expected[i]) && !(error <= allowed + (r->adds ? 1e-6 : 0));
        r->num_wrong += r->wrong[i];
    }
}

// ---- 3. Explaining ------------------------------------------------------------------------------
// Of a result in all cases, tries one hypothesis after another: a mistake of the definition; a
// number by which it is multiplied; right numbers in wrong places; an input, or dout, that is read
// wrongly, as can happen in any loop; and that it is added where it must be written, or the other
// way round. If none explains all elements, one may still explain all that are wrong.

// How an input is read wrongly: along its rows or columns; as a whole; or another in its place.
enum { LAST, FIRST, ONLY_LAST, SAME, AFTER, BEFORE, BLOCKS_4, BLOCKS_32, ONLY_32, REVERSED, ALONG,
       TRANSPOSED = ALONG, STEP_1, STEP_ROWS, NOT_READ, READINGS };
static const char *const axes[] = {"row", "column"}, *const readings[READINGS + 1] = {
    "the last %s of %s is left out", "the first %s of %s is left out",
    "only the last %s of %s counts: is a sum set (=) in the loop instead of added to (+=)?",
    "the first %s of %s is read for every one", "the %s after the right one is read from %s",
    "the %s before the right one is read from %s",
    "the %ss of %s after the last full group of 4 are left out",
    "the %ss of %s after the last full group of 32 are left out",
    "only 32 %ss of %s are read", "the %ss of %s are read in reverse order",
    "%s is read transposed: rows and columns are exchanged",
    "row n of %s is read from element n on; it must be n * the row's length",
    "row n of %s is read from element n * rows on; it must be n * the row's length",
    "%s is missing: 1 is used in its place", "%s is read in place of %s"};

// How right numbers are written.
enum { WRITTEN_TRANSPOSED = 1, EXCHANGED, PART_BY_PART, SUMS_IN_ROW, SUMS_OF_ROWS, SUMS, WRITINGS };
static const char *const writings[WRITINGS] = {
    NULL, "it is written transposed", "the parts of a row are exchanged",
    "its array holds all rows of one part, then of the next; each row must hold all parts",
    "an element contains those before it in its row: a sum is not set to 0 for each one",
    "a row contains the rows before it: a sum is not set to 0 for each row",
    "an element contains all before it: a sum is not set to 0 for each one"};

typedef struct {
    Mistake mistake;         // of the definition
    const char *reading;     // a text, or NULL
    int view, how, axis;     // the input that is read wrongly: -1 is dout, or in[view]
    int writing;
    double factor;
    int other_mode;          // it is added where it must be set, or set where it must be added
} Hypothesis;
static const Hypothesis nothing_wrong = {.factor = 1};

static double read_wrongly(const Input *in, int how, int axis, int row, int column) {
    int *at = axis ? &column : &row, size = axis ? in->columns : in->rows, i = *at;
    int block = how == BLOCKS_4 ? 4 : how == BLOCKS_32 ? 32 : 1;
    if ((how == LAST && i == size - 1) || (how == FIRST && i == 0) || i >= size - size % block ||
        (how == ONLY_LAST && i < size - 1) || (how == ONLY_32 && i >= 32)) return 0;
    if (how == SAME) *at = 0;
    if (how == REVERSED) *at = size - 1 - i;
    *at += (how == AFTER) - (how == BEFORE);
    long p = (long)row * in->columns + column;
    if (how == TRANSPOSED) p = (long)column * in->rows + row;
    if (how == STEP_1) p = row + column;
    if (how == STEP_ROWS) p = (long)row * in->rows + column;
    return how == NOT_READ ? 1 : p < 0 || p >= (long)input_size(in) ? NAN : in->x[p];
}

static Input *view_of(Case *c, int view) { return view < 0 ? &c->dout : &c->in[view]; }

// Puts what is read in the place of what should be, if it has the same shape.
static int misread(Case *c, const Hypothesis *h) {
    Input *in = view_of(c, h->view), *from = h->how < READINGS ? in : view_of(c, h->axis);
    size_t n = input_size(in);
    if (!in->x || !from->x || from->rows != in->rows || from->columns != in->columns) return 0;
    double *x = room(h->view < 0 ? c->out_size : n, sizeof *x);
    for (size_t i = 0; i < n; i++) {
        int row = (int)(i / in->columns), column = (int)(i % in->columns);
        x[i] = h->how < READINGS ? read_wrongly(in, h->how, h->axis, row, column) : from->x[i];
    }
    in->x = x;
    if (h->view < 0) c->out_weight = x;
    return 1;
}

// Number i of a result if the right ones are written so. x: those before it.
static double written(const Result *r, int how, const double *x, int i) {
    int w = r->columns, row = i / w, start = r->pitch > w ? (int)r->offset : 0;
    int back = how == SUMS_IN_ROW ? i % w > 0 : how == SUMS ? i > 0 : row > 0 ? w : 0;
    long p = (long)row * r->pitch + start + i % w, rows = r->rows;
    if (how == WRITTEN_TRANSPOSED) p = p % rows * r->pitch + p / rows;
    else if (how == EXCHANGED) p += r->pitch - w - 2 * start;
    else if (how == PART_BY_PART) p = p / w % rows * r->pitch + p / (w * rows) * w + p % w;
    else return r->expected[i] + (back ? x[i - back] : 0);
    return r->all[r->offset - start + p];
}

// What the hypothesis predicts for r->got. NULL: nothing but what is right.
static double *predict(Definition f, const Case *original, const Result *r, const Hypothesis *h) {
    Case c = *original;
    int plain = !h->mistake.name && !h->reading, n = r->rows * r->columns;
    if (h->reading && !misread(&c, h) && !h->other_mode) return NULL;
    if (c.rotates_dout && !plain) {
        c.in[0].x = c.dout.x;
        c.factor = -1;
    }
    chosen = h->mistake;
    kept_factor = 1;
    double *all = plain ? r->all : evaluate(f, &c, c.rotates_dout ? OUTPUT : r->of);
    double *x = part_of(all, r);
    if (!plain) free(all);
    chosen = no_mistake;
    for (int i = 0; i < n; i++) {
        double y = h->writing ? written(r, h->writing, x, i) : x[i];
        x[i] = h->factor * y + (kept_factor - 1) * r->old[i];
        if (h->other_mode) x[i] += !r->adds ? r->old[i] : y != 0 || r->rows == 1 ? -r->old[i] : 0;
    }
    return x;
}

// The result k of n cases that is explained. first: a case that is wrong and small enough. partly:
// the first text that explains all that is wrong, but contradicts what is right.
typedef struct {
    Definition f;
    int n, k, first;
    char partly[HINT];
} Search;

typedef struct {
    int seen, different;  // wrong elements that are explained; numbers among them that differ
    int sure, guessed;    // elements with a prediction; wrong ones without (NaN: read from outside)
    int contradicted;     // right elements for which the prediction is another number
} Evidence;

// Do the numbers x explain what is wrong in this result?
static int explains(const Result *r, const double *x, Evidence *e) {
    double last = NAN;
    for (int i = 0; i < r->rows * r->columns; i++) {
        double allowed = 5e-4 * (fabs(x[i]) + (r->columns * r->rows > 1 ? 0.5 * r->scale : 0));
        if (isnan(r->expected[i])) continue;
        int known = fabs(x[i]) < 1e30, wrong = r->wrong[i];  // neither NaN nor larger than a float
        int good = fabs(r->got[i] - x[i]) <= allowed + 1e-7 * r->scale + 1e-6 * r->adds;
        if (known && wrong && !good) return 0;
        e->contradicted += known && !good;
        e->seen += wrong && known == (isfinite(r->got[i]) != 0);
        e->different += wrong && known && !(fabs(x[i] - last) <= 2 * allowed);
        e->guessed += wrong && !known && isfinite(r->got[i]);
        e->sure += known;
        if (wrong) last = x[i];
    }
    return 1;
}

// Is this hypothesis true of the result in all cases? 2: yes; 1: where it is wrong. The fused layer
// has a kernel for each place of the norm, of which the other may be right.
static int is_true(const Search *s, const Hypothesis *h) {
    Evidence e = {0};
    for (int i = 0; i < s->n; i++) {
        const Case *c = &cases[(s->first + i) % s->n];
        const Result *r = &c->results[s->k];
        int other = c->norm_last != cases[s->first].norm_last;
        if (c->large || (!r->num_wrong && (other || e.contradicted))) continue;
        double *x = predict(s->f, c, r, h);
        int good = x ? explains(r, x, &e) : !r->num_wrong;
        free(x);
        if (!good || (e.contradicted && *s->partly)) return 0;
    }
    if (!e.contradicted) return e.seen > e.guessed && e.sure ? 2 : 0;
    return e.different >= 4 && !e.guessed;
}

// Tries a hypothesis. Returns whether all of it is true; then `hint` says it.
static int holds(Search *s, const Hypothesis *h, char *hint, const char *format, const char *name,
                 const char *other) {
    const char *mode = !h->other_mode ? "" : cases[0].results[s->k].adds
        ? "it is set (=); a parameter's gradient must be added (+=) to what the array holds"
        : "it adds to what was there (+=); it must write (=)";
    int truth = is_true(s, h);
    if (!truth) return 0;
    char *text = truth == 2 ? hint : s->partly;
    sprintf(text, format, name, other);
    strcat(strcat(text, *text && *mode ? "; and " : ""), mode);
    return truth == 2;
}

// Is it multiplied by the same number in all cases? Of a single number any factor would be true.
static int explain_factor(Search *s, char *hint) {
    const Result *r = &cases[s->first].results[s->k];
    Hypothesis h = nothing_wrong;
    char text[60] = "it has the wrong sign";
    int at = 0, num_wrong = 0;
    while (!r->wrong[at]) at++;
    h.factor = r->got[at] / r->expected[at];
    for (int i = 0; i < s->n; i++) num_wrong += cases[i].results[s->k].num_wrong;
    if (!isfinite(h.factor) || (h.factor == 0 && r->adds)) return 0;
    if (fabs(h.factor + 1) < 1e-3) return holds(s, &h, hint, text, "", "");
    sprintf(text, h.factor == 0 ? "it is all zeros" : "it is multiplied by %.4g", h.factor);
    return (num_wrong > 2 || h.factor == 0) && holds(s, &h, hint, text, "", "");
}

// Does result k hold what it held before: where it is wrong (or, if not only_wrong, everywhere)?
static int is_untouched(int n, int k, int only_wrong) {
    for (int i = 0; i < n; i++) {
        const Result *r = &cases[i].results[k];
        for (int j = 0; j < r->rows * r->columns && r->num_wrong >= only_wrong; j++)
            if (r->got[j] != (r->adds ? 0 : r->old[j])) return 0;
    }
    return 1;
}

// Is it one of the definition's mistakes? Those that have a text of their own come first.
static int explain_mistake(Search *s, char *hint) {
    Hypothesis h = nothing_wrong;
    char text[HINT / 2];
    for (int pass = 0; pass < 4; pass++) {
        for (int i = 0; i < num_mistakes; i++) {
            h.mistake = mistakes[i];
            h.other_mode = pass > 1;
            if ((h.mistake.kind == SLIP || h.mistake.kind >= PICKED) == pass % 2) continue;
            tell_mistake(text, &h.mistake);
            if (holds(s, &h, hint, "%s", text, "")) return 1;
        }
    }
    return 0;
}

static int explain_reading(Search *s, char *hint) {
    Hypothesis h = nothing_wrong;
    for (h.view = -1; h.view < cases[0].num_inputs; h.view++) {
        const Input *in = view_of(&cases[0], h.view);
        for (h.how = input_size(in) > 1 ? 0 : NOT_READ; h.how <= READINGS; h.how++) {
            int end = h.how < ALONG ? 2 : h.how < READINGS ? 1 : cases[0].num_inputs;
            h.reading = readings[h.how];
            for (h.axis = h.how < READINGS ? 0 : -1; h.axis < end; h.axis++) {
                const char *other = h.how < READINGS ? in->name : view_of(&cases[0], h.axis)->name;
                if (holds(s, &h, hint, h.reading, h.how < ALONG ? axes[h.axis] : other, in->name))
                    return 1;
            }
        }
    }
    return 0;
}

// Tries what is known to go wrong. Returns how much it explains: "all" cases, "partly", where it is
// wrong, or "nothing".
static const char *explain(Search *s, char *hint) {
    const Result *r = &cases[0].results[s->k];
    Hypothesis h = nothing_wrong, only_last = {{NULL, SLIP}, "", -1, ONLY_LAST, 0, 0, 1, 1};
    int untouched = is_untouched(s->n, s->k, 1);
    while (s->first < s->n && (cases[s->first].large || !cases[s->first].results[s->k].num_wrong))
        s->first++;
    if (s->first < s->n) {
        h.other_mode = 1;
        if (holds(s, &h, hint, "", "", "")) return "all";
        Search alone = *s;  // one that explains only a part is told last
        if (explain_factor(&alone, hint)) return "all";
        h.factor = -1;
        if (holds(s, &h, hint, "it has the wrong sign", "", "") || explain_mistake(s, hint) ||
            (r->adds && holds(s, &only_last, hint, "only the last row counts", "", "")) ||
            (!untouched && explain_reading(s, hint))) return "all";
        for (h = nothing_wrong; h.writing < WRITINGS; h.writing++)
            if (h.writing && holds(s, &h, hint, writings[h.writing], "", "")) return "all";
        if (!*s->partly && !untouched) explain_factor(s, hint);
    }
    if (untouched) sprintf(hint, "%s is not written", r->name);
    else strcpy(hint, s->partly);
    return untouched ? "all" : *hint ? "partly" : "nothing";
}

static void print_numbers(const char *name, const double *x, int n) {
    printf("numbers\t%s\t", name);
    for (int i = 0; i < n; i++) printf("%.9g ", x[i]);
    puts("");
}

// Writes what feedback.py needs to say where result k is wrong; of the first such case also the
// numbers, or, if it is large, only those of the first element that is wrong.
static void print_facts(const Case *c, int k, int is_first) {
    const Result *r = &c->results[k];
    int n = r->rows * r->columns, from = 0;
    printf("wrong\t%d\t%d %d %d %d\t", (int)(c - cases), r->rows, r->columns, r->inner, r->adds);
    for (int i = 0; i < n; i++) putchar(isnan(r->expected[i]) ? '-' : r->wrong[i] ? '1' : '0');
    puts("");
    if (!is_first) return;
    while (n > 1500 && !r->wrong[from]) from++;
    n = n > 1500 ? 1 : n;
    print_numbers("got", r->got + from, n);
    print_numbers("expected", r->expected + from, n);
    print_numbers("old", r->old + from, n);
    for (int i = 0; i <= c->num_inputs && n > 1; i++) {
        const Input *in = i < c->num_inputs ? &c->in[i] : &c->dout;
        if (in->x && in->columns == r->columns && (in->rows == r->rows || in->rows == 1))
            print_numbers(in->name, in->x, in->rows * in->columns);
    }
}

// ---- 4. Layers ----------------------------------------------------------------------------------
// For each one its definition, and what is special in its cases, which differ in what can go wrong.
// Each backward pass gets what the right forward pass would have left.

// ---- gpas: in[0] x (n), in[1] the gate.
static number activation(number g, int act) {
    if (act == RELU) return creal(g) > 0 ? g : 0;
    if (act == LEAKY_RELU) return creal(g) > 0 ? g : 0.01 * g;
    return act == SILU ? g * logistic(g) : act == TANH ? ctanh(g) : g;
}

static void gpas(number *out, number *const *in, const Case *c) {
    int act = pick("the given activation|SiLU", c->act, SILU), own = 1;
    number g = hold(in[1][0]), a = activation(g, act), of_g;  // of_g: multiplies dgate
    number slope = cimag(activation(g + I * 1e-30, act)) * 1e30, used = a;
    if (!backward) used = pick("a(g)|a'(g)|g", a, slope, g);
    else slope = pick("a'(g) in dgate|a(g)", slope, a);
    number scale = pick("1 - a(g)|a(g)|1 - a'(g)", factor("1 - a(g)", 1 - term("a(g)", used)),
                        a, 1 - slope);
    int stop = pick("stop_grad as given|stop_grad 1|the opposite", c->stop_grad, 1, !c->stop_grad);
    if (backward_slip("it is scaled; with the stop-gradient dinp is dout itself")) stop = 0;
    if (stop && backward_slip("dinp is 0; sg(x) is a constant, but x itself is not")) own = 0;
    number late = c->stop_grad ? 1 : scale, in_place = c->alias ? late : 1;
    of_g = pick("their sum|the mean of x_i dy_i", 1, 1.0 / c->C);
    if (backward_slip("dout is read for dgate after dinp was written over it")) of_g = in_place;
    if (backward_slip("1 - a(g) does not belong in dgate, even with stop_grad 0")) of_g = late;
    if (backward_slip("only where stop_grad is 1: dgate is not written; the stop-gradient is on x, "
                      "not on g, so dgate is needed in both cases")) of_g = !c->stop_grad;
    if (backward_slip("-a'(g) multiplies what dgate held, too")) kept_factor = -creal(slope);
    of_g *= factor("a'(g)", slope) * (in[1][0] - g);
    for (int i = 0; i < c->C; i++) {
        number x = hold(in[0][i]), dx = own * (in[0][i] - x);
        number in_dgate = pick("inp in dgate|the output", factor("inp in dgate", x), scale * x);
        out[i] = scale * x + (stop ? dx : scale * dx) - of_g * in_dgate;
    }
}

static void adjust_gpas(Case *c, int k) {
    static const struct { int act, sign, stop_grad, alias, no_gate; } list[] = {
        {SILU, 1, 1, 0, 0}, {SILU, -1, 1, 0, 0}, {SILU, 1, 1, 0, 0}, {SILU, 1, 1, 0, 0},
        {SILU, 0, 1, 0, 0}, {IDENTITY, 1, 1, 0, 0}, {RELU, 1, 1, 0, 0}, {RELU, -1, 1, 0, 0},
        {RELU, 0, 1, 0, 0}, {LEAKY_RELU, 1, 1, 0, 0}, {LEAKY_RELU, -1, 1, 0, 0},
        {TANH, 1, 1, 0, 0}, {TANH, -1, 1, 0, 0},  // from here on backward alone
        {SILU, 1, 1, 1, 0}, {SILU, 1, 0, 0, 0}, {TANH, -1, 0, 0, 0}, {SILU, 1, 0, 1, 0},
        {SILU, 1, 1, 0, 1}, {SILU, -1, 0, 1, 1}};
    static const char *const acts[] = {"silu", "identity", "relu", "leaky_relu", "tanh"};
    double gate = (float)(list[k].sign * (0.45 + 0.15 * uniform()));
    c->act = list[k].act;
    c->stop_grad = list[k].stop_grad;
    c->alias = list[k].alias;
    c->no_gate = list[k].no_gate;
    c->elementwise = 1;
    c->tolerance = backward && c->stop_grad ? 1e-12 : 1e-4;  // dinp is dout, to the last bit
    c->in[1].x[0] = gate;
    sprintf(c->name + strlen(c->name), ", %s, gate %.2f, stop_grad %d%s%s", acts[c->act], gate,
            c->stop_grad, c->alias ? ", dinp is dout" : "", c->no_gate ? ", dgate is NULL" : "");
}

// ---- residual: in[0] the shortcut, in[1] the branch (n).
static void residual(number *out, number *const *in, const Case *c) {
    number A = factor("A", c->factor);
    for (int i = 0; i < c->C; i++) {
        number x = in[0][i], b = in[1][i];
        number sum = term("A shortcut", A * x) + term("branch", b);
        if (!backward) sum = pick("A shortcut + branch|shortcut + A branch|A (shortcut + branch)",
                                  sum, x + A * b, A * (x + b));
        if (forward_slip("out is written before shortcut is read")) sum += A * c->alias * (b - x);
        if (backward_slip("dout itself is added; it is the branch's gradient")) sum += x;
        out[i] = sum;
    }
}

static void adjust_residual(Case *c, int k) {
    c->alias = k >= 4;
    c->factor = k == 3 || k == 5 ? 1 : (float)(1.5 + 0.3 * uniform());
    c->elementwise = 1;
    sprintf(c->name + strlen(c->name), ", A = %.2f%s", c->factor, c->alias ? ", in place" : "");
}

// ---- embedding: in[0] the table (V,C). The variant multiplies by sqrt(C), as Gemma does.
static void embedding(number *out, number *const *in, const Case *c) {
    int V = c->V, C = c->C, T = c->T;
    number scale = variant ? factor("sqrt(C)", sqrt(C)) : 1;
    for (int n = 0; n < T; n++) {
        int before = 0, later = 0;
        for (int m = 0; m < T; m++) {
            before += m < n && c->tokens[m] == c->tokens[n];
            later += m > n && c->tokens[m] == c->tokens[n];
        }
        double share = pick("the sum over all places of a token|only its last place|only its first|"
                            "the mean", 1, !later, !before, 1.0 / (1 + before + later));
        for (int i = n * C; i < n * C + C; i++) {
            int v = pick("row tokens[n] of the table|row n|row tokens[i % N] for element i",
                         c->tokens[n], n % V, c->tokens[i % T]);
            number x = v < V ? in[0][v * C + i % C] : NAN;
            out[i] = scale * (backward ? share * x : x);
        }
    }
}

static void adjust_embedding(Case *c, int k) {
    int first = below(9);
    for (int n = 0; n < c->T; n++) c->tokens[n] = k == 0 ? (first + 2 * n) % 9 : below(c->V - 1);
    if (k > 1) c->tokens[1] = c->tokens[0];
    if (k == 4) c->special = "a token occurs more than 32 times";
    if (k == 0) strcat(c->name, ", no token twice");
}

// ---- rmsnorm: in[0] x (N,C), in[1] the weight (C). After out (N,C) comes rstd (N).
static number norm_r(const number *x, int n, int N, int C) {
    int row = pick("r of row n|r of row 0|r of row n - 1", n, 0, n > 0 ? n - 1 : N);
    int first = slip("the sum of squares is not set to 0 for each row") ? 0 : row;
    int end = pick("C channels in the mean|C - 1|C + 1", C, C - 1, C + 1);
    double eps = pick("the eps of the comment|another eps", variant ? 1e-5 : 1e-6,
                      variant ? 1e-6 : 1e-5);
    number sum = 0, mean = 0, over = pick("1 / C|1 / N", factor("1 / C", 1.0 / C), 1.0 / N);
    for (int i = 0; i < C && slip("the mean is subtracted: that is LayerNorm, not RMSNorm"); i++)
        mean += x[n * C + i] / C;
    for (; first <= row; first++) {
        for (int i = 0; i < end; i++) {
            number v = at_or_nan(x, (long)first * C + i, (size_t)N * C) - mean;
            sum += pick("x^2 in the mean|x", v * v, v);
        }
    }
    number m = sum * over + term("eps", eps), r = creal(m) < 0 ? NAN : 1 / csqrt(m);
    return pick("r = 1 / sqrt(mean + eps)|1 / (sqrt(mean) + eps)|1 / (mean + eps)|sqrt(mean + eps)|"
                "mean + eps", r, 1 / (csqrt(sum / C) + eps), 1 / m, csqrt(m), m);
}

// Row y, with the slopes that a mistake in the backward pass would give. through:
// the slope of 1 / r^3; a sum that is not set to 0 keeps that of later rows. seen: taken for x.
static void norm_sloped(number *y, number *through, const number *x, const number *seen,
                        const number *w, number r, int C) {
    number moved = 0, h = hold(r);
    if (!slip("the sum in the term through r is not set to 0 for each row")) *through = 0;
    for (int i = 0; i < C; i++) {
        moved += x[i] - hold(x[i]);
        *through -= factor("x, outside its sum, in the term through r", hold(seen[i])) *
                    (x[i] - hold(x[i])) * factor("1 / C in the term through r", 1.0 / C) *
                    h * factor("r^2 in the term through r", h * h);
    }
    number d = *through * factor("r in the term through r", h) / h;
    if (slip("1 / C is 0 in integer division: the term through r is 0 unless C is 1")) d *= C == 1;
    moved *= slip("the mean of w dy is subtracted: that is LayerNorm, not RMSNorm");
    for (int i = 0; i < C; i++) {
        number a = hold(seen[i]), b = hold(w[i]), direct = x[i] - hold(x[i]);
        direct *= factor("weight in the direct term", b) * factor("r in the direct term", h);
        y[i] = term("with r held (the direct term)", direct) +
               (w[i] - b) * factor("x in dweight", a) * factor("r in dweight", h) +
               term("through r (r depends on every x of its row)",
                    factor("x in the sum of the term through r", a) *
                    factor("weight in the sum of the term through r", b) * d) - b * h * moved / C;
    }
}

static void norm(number *out, number *rstd, const number *x, const number *seen, const number *w,
                 int N, int C) {
    number through = 0;
    for (int n = N - 1; n >= 0; n--) {
        number r = rstd[n] = norm_r(x, n, N, C), *y = out + n * C;
        for (int i = 0; i < C; i++)
            y[i] = factor("inp", x[n * C + i]) * factor("r", r) *
                   pick("weight|1 + weight", factor("weight", w[i]), 1 + w[i]);
        if (backward && (chosen.name || collecting))
            norm_sloped(y, &through, x + n * C, seen + n * C, w, r, C);
    }
}

static void rmsnorm(number *out, number *const *in, const Case *c) {
    norm(out, out + c->T * c->C, in[0], in[0], in[1], c->T, c->C);
}

static void adjust_rmsnorm(Case *c, int k) {
    for (int i = 0; i < c->T * c->C; i++)  // rows of different size
        c->in[0].x[i] = (float)(c->in[0].x[i] * (1 + 0.6 * (i / c->C % 6)) * (k == 4 ? 1e-3 : 1));
    c->scale = backward && c->C == 1;  // where dinp is next to 0
    if (k == 4) c->special = "the inputs are small";
}

// ---- rope: in[0] qkv (B,T,3C), in[1] the table (T,hs). factor -1: rotates the other way.
static void rope_pair(number *out, long first, long second, int j, int t, number *const *in,
                      const Case *c) {
    size_t n = c->out_size, size = input_size(&c->in[1]);
    int hs = c->C / c->NH, k = j / 2;
    long row = (long)t * pick("hs, the length of a table row|hs / 2", hs, hs / 2);
    int layout = pick("(cos, sin) at 2 k in the table's row|(sin, cos)|all cos before all sin|"
                      "the first pair|cos twice|sin twice|the pair at k", 0, 1, 2, 3, 4, 5, 6);
    const int cos_at[] = {j, j + 1, k, 0, j, j + 1, k};
    const int sin_at[] = {j + 1, j, hs / 2 + k, 1, j, j + 1, k + 1};
    number cosine = at_or_nan(in[1], row + cos_at[layout], size);
    number sine = at_or_nan(in[1], row + sin_at[layout], size) * c->factor;
    if (backward_slip("it is rotated the same way as in the forward pass")) sine /= c->factor;
    if (forward_slip("it is rotated the wrong way: the sign of the sine")) sine = -sine;
    long read = second + slip("the second of the pair is read one place too far");
    number x0 = out[first], x1 = at_or_nan(out, read, n), y1 = x0 * sine + x1 * cosine;
    if (slip("x1 is overwritten before the other line of the rotation reads it")) x1 = y1;
    number y0 = term("x0 cos", x0 * cosine) - term("x1 sin", x1 * sine);
    if (slip("x0 is overwritten before the second line of the rotation reads it")) x0 = y0;
    out[first] = y0;
    if (second < (long)n) out[second] = term("x0 sin", x0 * sine) + term("x1 cos", x1 * cosine);
}

// In place, as the layer does it, so a pair read too late has its new values.
static void rope(number *out, number *const *in, const Case *c) {
    int C = c->C, B = c->B, T = c->T, hs = C / c->NH;
    int step = pick("3 C, the length of a row of qkv|C|2 C", 3 * C, C, 2 * C);
    int begin = slip("only the keys are rotated; the queries must be, too") ? C : 0;
    int end = pick("the end 2 C (queries and keys)|C (queries alone)|3 C (values, too)",
                   2 * C, C, 3 * C);
    int next = pick("j += 2 to the next pair|j += 4|j += 1", 2, 4, 1);
    int halves = slip("channel j is paired with j + hs/2; it must be with j + 1");
    int through = slip("the table's columns continue from head to head; each head begins with 0");
    int heads = pick("every head|the first head alone", hs, C);
    for (size_t i = 0; i < c->out_size; i++) out[i] = in[0][i];
    for (int n = 0; n < B * T; n++) {
        int t = pick("n % T for the position|n|n / T|n / B|n % B|n % T + 1|n % T - 1",
                     n % T, n, n / T, n / B, n % B, n % T + 1, n % T - 1);
        for (int head = begin; head < end; head += heads) {
            for (int j = 0; j < hs; j += next) {
                long at = (long)n * step + head + (halves ? j / 2 : j), to = halves ? hs / 2 : 1;
                if (at + to < (long)c->out_size)
                    rope_pair(out, at, at + to, through ? head % C + j : j, t, in, c);
            }
        }
    }
}

static void adjust_rope(Case *c, int k) {
    int hs = c->C / c->NH;
    c->factor = 1;
    c->rotates_dout = backward;
    if (k == 4) c->special = "heads have more than two pairs and rows are long";
    for (int i = 0; i < c->T * hs; i++) {
        double angle = i / hs * pow(10000, -2.0 * (i % hs / 2) / hs);
        c->in[1].x[i] = (float)(i % 2 ? sin(angle) : cos(angle));
    }
}

// ---- swiglu: in[0] (N,2H), a row holds h1, then h3; in the code here they are a and b. The
// variant has sigmoid(1.702 h1), which is close to GELU.
static number swiglu_element(number a, number b) {
    double k = pick("the comment's sigmoid|a sigmoid of another multiple of h1",
                    variant ? 1.702 : 1, variant ? 1 : 1.702);
    number s = pick("sigmoid(h1)|sigmoid(-h1)|sigmoid(h3)", logistic(k * a), logistic(-k * a),
                    logistic(k * b));
    if (!backward) {
        s = pick("sigmoid(h1)|sigmoid(h1 h3)|tanh(h1)|e^h1 (without 1 +)|ReLU", s,
                 logistic(k * a * b), ctanh(a), cexp(k * a), creal(a) > 0);
        return factor("h1", a) * factor("sigmoid(h1)", s) * factor("h3", b);
    }
    number h1 = hold(a), h3 = hold(b);
    s = hold(s);
    number slope = factor("sigmoid(h1) in the sigmoid's slope", s);
    slope *= k * factor("1 - sigmoid(h1) in the sigmoid's slope", 1 - s);
    slope = pick("s (1 - s), the sigmoid's slope|1 - s^2 (the slope of tanh)", slope, 1 - s * s);
    number first = term("through the factor h1 (silu(h1) is a product)", s);
    number second = term("through the sigmoid (silu(h1) is a product)", slope *
                         pick("h1 in silu's slope|h3", factor("h1 in silu's slope", h1), h3));
    if (slip("1 - s multiplies both terms of silu's slope; it must multiply one")) first *= 1 - s;
    number silu = factor("h1 in dh3", h1) * factor("the sigmoid in dh3", s);
    number of_h3 = pick("silu(h1) in dh3|silu's slope|silu(h3)|h3 sigmoid(h1)", silu,
                        first + second, h3 * logistic(k * h3), h3 * s);
    number of_h1 = pick("silu's slope in dh1|silu(h1)", first + second, h1 * s);
    of_h1 *= pick("h3 in dh1|h1", factor("h3 in dh1", h3), h1);
    return of_h1 * (a - h1) + of_h3 * (b - h3);
}

static void swiglu(number *out, number *const *in, const Case *c) {
    int H = c->C;
    for (int i = 0; i < c->T * H; i++) {
        int n = i / H, j = i % H;
        const number *row = in[0] + n * (int)pick("2 H, the length of a row of inp|H", 2 * H, H);
        number a = row[j];
        number b = pick("row[H + j] for h3|row[j + 1]", row[H + j], row[j + 1]);
        if (slip("h1 and h3 alternate; a row is h1, then h3")) a = row[2 * j], b = row[2 * j + 1];
        if (slip("inp is read as all rows of h1, then all rows of h3; each row holds both"))
            a = in[0][i], b = in[0][c->T * H + i];
        out[i] = swiglu_element(a, b);
    }
}

// ---- matmul: in[0] x (N,C), in[1] the weight (OC,C).
static void matmul(number *out, number *const *in, const Case *c) {
    int C = c->C, OC = c->V;
    for (int n = 0; n < c->T; n++) {
        for (int o = 0; o < OC; o++) {
            int end = C + slip("one channel too many in the sum: c < C");
            number sum = 0;
            for (int i = 0; i < end; i++)
                sum += at_or_nan(in[0], n * C + i, input_size(&c->in[0])) *
                       at_or_nan(in[1], o * C + i, input_size(&c->in[1]));
            out[n * OC + o] = sum;
        }
    }
}

// ---- attention: in[0] qkv (B,T,3C). After out (B,T-first,C) comes lse (B,NH,T-first). first is 0
// in all backward passes. The variant divides the scores by hs, as muP does.
#define LARGE(what) what " are large (is the largest one subtracted before the exponential, and " \
                    "is it right if all are negative?)"

// Where head h of part 0, 1 or 2 (q, k, v) of a row begins.
static const number *head_of(number *const *in, const Case *c, int b, int t, int part, int h) {
    int C = c->C, T = c->T, hs = C / c->NH, begin = part * C + h * hs;
    if (slip("all heads use what belongs to the first head")) begin = part * C;
    if (part && slip("all heads use the keys and values of the first head")) begin = part * C;
    if (slip("all sequences use what belongs to the first one")) b = 0;
    if (part && slip("all sequences use the keys and values of the first one")) b = 0;
    if (part == 0) begin += pick("q|k", 0, C);
    if (part == 1) begin += pick("k|q|v", 0, -C, C);
    if (part == 2) begin += pick("v|k", 0, -C);
    if (slip("qkv is read head by head; a row is all q, all k, all v")) begin = (3 * h + part) * hs;
    if (c->first && slip("sequence b begins at row b (T - first); it must be b T")) T -= c->first;
    return in[0] + (size_t)(b * T + t) * 3 * C + begin;
}

static number score(number *const *in, const Case *c, int b, int h, int t, int s) {
    int hs = c->C / c->NH, row = t;
    if (slip("row i has the query of position i; it must be that of first + i")) row -= c->first;
    const number *q = head_of(in, c, b, row, 0, h), *k = head_of(in, c, b, s, 1, h);
    number right = variant ? 1.0 / hs : 1 / sqrt(hs), scale = factor("scale of the scores", right);
    number sum = 0, slope = backward ? factor("scale, in dq and dk,", right) : right;
    for (int i = 0; i < hs; i++) {
        number of_q = k[i], of_k = q[i];  // the slopes of the product
        if (backward_slip("dq is made of the queries; it must be dS K")) of_q = q[i];
        if (backward_slip("dk is made of the keys; it must be dS^T Q")) of_k = k[i];
        sum += hold(q[i] * k[i]) + I * (creal(of_q) * cimag(q[i]) + creal(of_k) * cimag(k[i]));
    }
    scale = pick("the comment's scale|1 / hs|1 / sqrt(hs)|1 / sqrt(C)", scale, 1.0 / hs,
                 1 / sqrt(hs), 1 / sqrt(c->C));
    return backward ? scale * hold(sum) + slope * (sum - hold(sum)) : scale * sum;
}

static int sees(const Case *c, int t, int s) {
    if (slip("the causal mask is missing: a query sees later keys (future tokens)")) return 1;
    if (slip("first is missing in the mask; it must be s <= first + i")) return s <= t - c->first;
    return pick("the mask s <= t|s <= t + 1|s < t|s >= t|first <= s <= t", s <= t, s <= t + 1,
                s < t, s >= t, s >= c->first && s <= t);
}

// Computes the weights P of a row. Returns lse.
static number softmax_row(number *P, number *const *in, const Case *c, int b, int h, int t) {
    int late = forward_slip("the mask comes after the softmax, so its sum contains later keys");
    int zero = slip("a masked score is 0, and e^0 counts; it must be -infinity");
    number sum = 0, lse;
    double m = -INFINITY;
    for (int s = 0; s < c->T; s++) {
        P[s] = zero && !sees(c, t, s) ? 0 : score(in, c, b, h, t, s);
        if (sees(c, t, s) || late || zero) m = fmax(m, creal(P[s]));
    }
    for (int s = 0; s < c->T; s++) {
        P[s] = cexp(P[s] - m);
        if (sees(c, t, s) || late || zero) sum += P[s];
        if (!sees(c, t, s) && !zero) P[s] = 0;
    }
    lse = term("of the largest score in lse", m) + term("log(sum) in lse", clog(sum));
    if (!backward) lse = pick("lse = m + log(sum)|m + sum|sum|m", lse, m + sum, sum, m);
    sum = factor("1 / sum of the softmax", 1 / sum);
    for (int s = 0; s < c->T; s++) P[s] *= sum;
    return lse;
}

// P from the right lse, with the slopes that a mistake in the gradient would give. total:
// the slope of the sum over the row, of which a sum that is not set to 0 keeps that of later rows.
static void softmax_sloped(number *P, number *total, number *const *in, const Case *c, int b,
                           int h, int t) {
    number lse = 0, sum = 0, right = 0, *S = room(c->T, sizeof *S);
    int no_P = slip("the factor P is missing in dS");
    int inside = slip("in dS, P must multiply the sum over the row, too (parentheses)");
    int own = slip("dS is P (1 - P) dP, as if a score acted on its own P alone, not on its row's");
    int T = c->T, NH = c->NH, at = (b * NH + h) * T + t;
    at = pick("lse[(b NH + h) T + t]|lse[h T + t]|lse[b T + t]|lse[(b T + t) NH + h]|lse[0]|lse[(b "
              "NH + h) T]", at, h * T + t, b * T + t, (b * T + t) * NH + h, 0, at - t);
    Mistake made = chosen;
    for (int s = 0; s < T; s++) S[s] = score(in, c, b, h, t, s);
    chosen = no_mistake;
    for (int s = 0; s <= at % T; s++)
        lse += cexp(hold(score(in, c, at / T / NH, at / T % NH, at % T, s)));
    for (int s = 0; s <= t; s++) right += cexp(hold(score(in, c, b, h, t, s)));
    for (int s = 0; s < T; s++) P[s] = s <= t ? hold(cexp(score(in, c, b, h, t, s)) / right) : 0;
    chosen = made;
    lse = term("-lse in P = e^(S - lse)", clog(lse));
    *total = t < T - 1 && slip("the sum in dS is not set to 0 for each position") ? *total : 0;
    for (int s = 0; s < T; s++) {
        number dS = I * cimag(S[s]), M = sees(c, t, s) ? hold(cexp(S[s] - lse)) : 0;
        sum += (no_P || inside ? sees(c, t, s) : M) * dS;
        S[s] = M + (no_P ? sees(c, t, s) : factor("P in dS", M)) * dS;
    }
    *total += sum;
    sum = term("with the sum over the row in dS (a score acts on each P of its row)", *total);
    for (int s = 0; s < T; s++) P[s] = S[s] - P[s] * (own ? I * cimag(S[s]) : sum);
    free(S);
}

static void attention(number *out, number *const *in, const Case *c) {
    int C = c->C, hs = C / c->NH, rows = c->T - c->first;
    number *P = room(c->T, sizeof *P), total = 0;
    for (size_t i = 0; i < c->out_size; i++) out[i] = 0;
    for (int i = c->B * c->NH * rows - 1; i >= 0; i--) {
        int row = i % rows, h = i / rows % c->NH, b = i / rows / c->NH, t = c->first + row;
        if (c->first && slip("first is ignored: row i belongs to position first + i")) t = row;
        out[(size_t)c->B * rows * C + i] = softmax_row(P, in, c, b, h, t);
        if (backward && (chosen.name || collecting)) softmax_sloped(P, &total, in, c, b, h, t);
        number *y = out + (size_t)(b * rows + row) * C + h * hs;
        if (forward_slip("out is (B,NH,T,hs); it must be (B,T,C)")) y = out + (size_t)i * hs;
        int lost = t < c->T - 1 && backward_slip("only the last query counts: = is used, not +=");
        int last = forward_slip("only the last key counts: = where += is needed");
        for (int s = 0; s < c->T; s++) {
            const number *v = head_of(in, c, b, s, 2, h);
            for (int j = 0; j < hs && P[s] != 0; j++) {
                number product = P[s] * v[j];
                y[j] = (last ? 0 : y[j]) + (lost ? hold(product) : product);
            }
        }
    }
    free(P);
}

static void adjust_attention(Case *c, int k) {
    int hs = c->C / c->NH, n = c->T * 3 * c->C;
    double *x = c->in[0].x;
    c->tolerance = k == 5 || k == 6 ? 1e-3 : backward ? 2e-4 : 1e-4;
    c->scale = backward && (k == 0 || k == 5);  // where gradients are next to 0
    if (k == 5) c->special = LARGE("scores");
    for (int i = 0; i < n && k == 5; i++)  // large queries and keys
        if (i / c->C % 3 < 2) x[i] = (float)(x[i] * 10);
    for (int i = 0; i < c->C && k == 5; i++)  // the first score, all that its query sees: -200
        x[c->C + i] = (float)(-200 * (variant ? hs : sqrt(hs)) / c->C / x[i]);
    if (!backward || k != 6) return;
    c->sampled = room(n, 1);  // the gradient of each number would take long
    for (int i = 0; i < 36; i++) {
        int t = (int)((i % 12 + (uniform() + 1) / 2) * c->T / 12);
        c->sampled[t * 3 * c->C + i / 12 * c->C + below(c->C)] = 1;
    }
}

// ---- crossentropy: in[0] the logits (N,stride), of which V are read. After losses (N) comes lse.
static number cross_lse(const number *x, long rest, const Case *c) {
    int begin = slip("the first logit is left out"), padding = c->stride > c->V ? -c->V & 3 : 0;
    int end = pick("the sum over V logits|the sum over V - 1|the sum with the padding", c->V,
                   c->V - 1, c->V + padding);
    double m = creal(x[0]);
    number sum = 0;
    for (int v = 0; v < c->V; v++) m = fmax(m, creal(x[v]));
    for (int v = begin; v < end; v++) sum += cexp(at_or_nan(x, v, rest) - m);
    if (slip("logits from V on count as 0; they must be -infinity")) sum += padding * exp(-m);
    number lse = term("of the largest logit in lse", m) + term("log(sum) in lse", clog(sum));
    return pick("lse = largest + log(sum)|largest + sum|sum|largest", lse, m + sum, sum, m);
}

// What a mistake in the gradient adds to the slopes of the loss of row n. lse: that of the row.
static number cross_sloped(const number *x, double lse, int n, const Case *c) {
    int everywhere = slip("scale is subtracted at every logit; it belongs to the target's alone");
    int early = slip("the target's logit is changed before the exponential reads it");
    number s = c->factor, loss = 0;
    number at_p = factor("scale of the softmax", s) / s;
    number at_target = factor("scale at the target", s) / s;
    for (int v = 0; v < c->V; v++) {
        int target = v == c->tokens[n];
        number y = hold(x[v]), p = cexp(y - lse);
        if (target && early) p = cexp(y - s - lse) + 1;
        p = pick("e^(logit - lse)|e^logit|logit - lse|logit", p, cexp(y), y - lse, y);
        if (target) p = pick("softmax - 1 at the target|-1", p, 0);
        number slope = p * at_p;
        if (target || everywhere) slope -= term("of the target", at_target);
        loss += (slope - (exp(creal(x[v]) - lse) - target)) * (x[v] - hold(x[v]));
    }
    return loss;
}

static void crossentropy(number *out, number *const *in, const Case *c) {
    int N = c->T, stride = c->stride;
    for (int n = 0; n < N; n++) {
        const number *x = in[0] + n * stride;
        int right = c->tokens[n], row = pick("row n for the target's logit|row 0", n, 0);
        int target = pick("targets[n]|targets[n] + 1|targets[n] - 1|n|targets[0]", right, right + 1,
                          right - 1, n, c->tokens[0]);
        number lse = cross_lse(x, (long)(N - n) * stride, c), of_row = lse;
        number logit = at_or_nan(in[0], target + row * stride, (size_t)N * stride);
        if (backward_slip("lse of row 0 is used for every row"))
            of_row = lse * cexp(hold(lse - cross_lse(in[0], (long)N * stride, c)));
        out[n] = term("lse, whose gradient is the softmax,", of_row) -
                 term("of the target's logit", logit);
        out[N + n] = lse;
        if (forward_slip("each row has a loss of its own: no division by N")) out[n] /= N;
        if (backward) out[n] += cross_sloped(x, creal(lse), n, c);
    }
}

static void adjust_crossentropy(Case *c, int k) {
    double *x = c->in[0].x;
    c->factor = backward ? (float)(0.3 + 0.1 * uniform()) : 1;
    c->tolerance = k == 4 ? 3e-4 : 1e-4;
    if (k == 4) c->special = LARGE("logits");
    for (int i = 0; i < c->T * c->stride && k == 4; i++)
        x[i] = (float)(x[i] + (i / c->stride % 2 ? -130 : 130));
    c->sampled = k == 6 ? room((size_t)c->T * c->stride, 1) : NULL;
    for (int i = 0; i < c->T * c->stride && k == 6; i += 601) c->sampled[i] = 1;
    for (int n = 0; n < c->T; n++)  // the first row's target is never the last logit
        c->tokens[n] = below(c->V - (n == 0 && c->V > 2));
    if (k == 4) x[c->tokens[2] + 2 * c->stride] -= 120;  // and far below the row's largest
}

// ---- adamw: no derivative here. in: p, m, v, grad (n). After p come m, v, and the copy of p.
static void adam_moments(number *m, number *v, number g, number unclipped, double b1, double b2) {
    number keep_m = factor("beta1", b1), to_m = factor("1 - beta1", 1 - b1), of_v = g;
    number keep_v = factor("beta2", b2), to_v = factor("1 - beta2", 1 - b2);
    keep_m = pick("beta1 for the old m|beta2|1 - beta1", keep_m, b2, 1 - b1);
    keep_v = pick("beta2 for the old v|beta1|1 - beta2", keep_v, b1, 1 - b2);
    to_m = pick("1 - beta1 for the gradient in m|1 - beta2|beta1", to_m, 1 - b2, b1);
    to_v = pick("1 - beta2 for the square in v|1 - beta1|beta2", to_v, 1 - b1, b2);
    if (slip("beta and 1 - beta are swapped"))
        keep_m = 1 - b1, to_m = b1, keep_v = 1 - b2, to_v = b2;
    g = pick("the clipped gradient in m|the gradient before clipping", g, unclipped);
    number new_m = term("with the old m", keep_m * *m) + term("with the gradient in m", to_m * g);
    of_v = pick("the clipped gradient in v|the gradient before clipping|m", of_v, unclipped, new_m);
    number square = pick("the gradient squared in v|the gradient", of_v * of_v, of_v);
    *v = term("with the old v", keep_v * *v) + term("with the square in v", to_v * square);
    *m = new_m;
}

static void adam_element(number *p, number *m, number *v, number grad, const AdamWNumbers *a) {
    double b1 = a->beta1, b2 = a->beta2, t = a->t;
    number x = *p, decay = a->kind == MATRIX ? a->weight_decay : 0, m0 = *m, v0 = *v;
    number clip = factor("clip", a->clip), lr = factor("lr", a->lr), eps = term("eps", a->eps);
    if (a->kind != MATRIX && slip("norms and gates decay; only matrices may (chunk.decays)"))
        decay = a->weight_decay;
    if (a->kind == LEARNED_GATE && slip("clip is used for gates; it must be gate_clip")) clip = -7;
    if (a->kind == FIXED_GATE && !slip("gates that are not trained must not change")) return;
    int l2 = slip("the decay is in the gradient (Adam with L2); AdamW's is separate from it");
    number g = grad * clip + (l2 ? decay * x : 0);
    int swapped = slip("beta1 and beta2 are swapped");
    adam_moments(m, v, g, grad, swapped ? b2 : b1, swapped ? b1 : b2);
    int both = slip("p uses m and v as they were before the update");
    number mi = pick("the new m|the old m|the gradient", both ? m0 : *m, m0, g);
    number vi = pick("the new v|the old v", both ? v0 : *v, v0);
    t = pick("t in beta^t|t - 1|t + 1", t, t - 1, t + 1);
    number right_m = 1 - cpow(b1, t), right_v = 1 - cpow(b2, t);
    number cm = pick("1 - beta1^t|1 - beta2^t|1 - beta1 t|1 - beta1|1 - beta1^(t + 1)", right_m,
                     right_v, 1 - b1 * t, 1 - b1, 1 - cpow(b1, t + 1));
    number cv = pick("1 - beta2^t|1 - beta1^t|1 - beta2 t|1 - beta2", right_v, right_m, 1 - b2 * t,
                     1 - b2);
    if (slip("m and v are used without their corrections 1 / (1 - beta^t)")) cm = cv = 1;
    if (slip("the corrections are 1 - beta, without the power t")) cm = 1 - b1, cv = 1 - b2;
    number mhat = mi * factor("1 / (1 - beta1^t), the correction of m,", 1 / cm);
    number vhat = vi * factor("1 / (1 - beta2^t), the correction of v,", 1 / cv);
    if (slip("the corrected moments are stored as m and v")) *m = mhat, *v = vhat;
    number root = csqrt(vhat) + eps, decayed = !l2 * decay;
    decayed *= pick("p in the weight decay|the gradient", x, g);
    root = pick("sqrt(vhat) + eps|sqrt(vhat + eps)|sqrt((v + eps) / (1 - beta2^t))|vhat + eps|"
                "sqrt(v) / (1 - beta2^t) + eps|1 / (sqrt(vhat) + eps)", root, csqrt(vhat + eps),
                csqrt((vi + eps) / cv), vhat + eps, csqrt(vi) / cv + eps, 1 / root);
    number step = mhat / root * factor("lr of the step", lr) / lr;
    if (slip("weight decay uses p after the step, not before")) decayed = decay * (x - lr * step);
    decayed *= factor("lr of the weight decay", lr) / lr;
    if (slip("wrong signs: p must go down the gradient, and decay (p -= ...)")) lr = -lr;
    *p = x - lr * (term("of Adam's step", step) + term("of the weight decay", decayed));
}

static void adamw(number *out, number *const *in, const Case *c) {
    int n = c->C;
    for (int i = 0; i < n; i++) {
        number p = in[0][i], m = in[1][i], v = in[2][i];
        adam_element(&p, &m, &v, in[3][i], &c->adam);
        out[i] = out[3 * n + i] = p;
        out[n + i] = m;
        out[2 * n + i] = v;
    }
}

static void adjust_adamw(Case *c, int k) {
    static const char *const specials[] = {
        NULL, "t is 1", NULL, "gradients are tiny", NULL, "the parameters are those of a norm",
        "the parameter is a gate", "the parameter is a gate that is not trained"};
    static const int steps[] = {3, 1, 12, 2, 40, 3, 3, 3};
    double tiny = k == 3 ? 1e-8 : 1;
    c->adam = (AdamWNumbers){(float)(0.3 + 0.1 * uniform()), (float)(0.8 + 0.1 * uniform()),
                             (float)(0.95 + 0.03 * uniform()), k == 3 ? 1e-8f : 1e-3f,
                             (float)(0.4 + 0.1 * uniform()), (float)(0.6 + 0.2 * uniform()),
                             steps[k], k > 4 ? k - 4 : MATRIX};
    c->tolerance = 3e-5;
    c->special = specials[k];
    sprintf(c->name + strlen(c->name), ", t = %d", steps[k]);
    for (int i = 0; i < c->C; i++) {
        c->in[1].x[i] = (float)(c->in[1].x[i] * tiny / 2);
        c->in[2].x[i] = (float)(fabs(c->in[2].x[i]) * tiny * tiny);
        c->in[3].x[i] = (float)(c->in[3].x[i] * tiny);
    }
}

// ---- residual, gpas and rmsnorm in one kernel, train_gpas.cu alone: in[0] inp, in[1] branch
// (N,C), in[2] the weight (C), in[3] the gate that has a gradient, and the other. factor: A. After
// the sum (N,C) come what is normalized, the norm's output (N,C), and rstd (N).
static void fused(number *out, number *const *in, const Case *c) {
    int C = c->C, n = c->T * C, last = c->norm_last, stop = c->stop_grad;
    number gate = hold(in[3][0]), inp_a = activation(hold(in[3][!last]), SILU);
    number sum_a = last ? 0 : activation(gate, SILU), *seen = room(n, sizeof *seen);
    if (c->no_gate) inp_a = sum_a = 0;
    number inp_scale = factor("1 - a(g) of inp_gate", 1 - inp_a), own = 1 - (last ? inp_a : sum_a);
    number sum_scale = factor("1 - a(g) of sum_gate, before the norm,", 1 - sum_a);
    number slope = cimag(activation(gate + I * 1e-30, SILU)) * 1e30, A = c->factor, of_dz = A;
    number of_g = factor("a'(g) in dgate", slope) * (in[3][0] - gate) * !c->no_gate;
    of_g *= pick("dgate from GPAS's input|dgate from its output|dgate from a gradient already "
                 "multiplied by 1 - a(g)", 1, own, stop ? 1 : own);
    if (backward_slip("it is scaled by 1 - a(g); the stop-gradient forbids that")) stop = 0;
    if (backward_slip("it is not scaled by 1 - a(g), though stop_grad is 0")) stop = 1;
    if (!backward) A = factor("A of the shortcut", A);
    else of_dz = factor("A in dz, the gradient of what A multiplies,", A);
    if (forward_slip("inp lacks both factors, A and 1 - a(g) of inp_gate")) inp_scale = 1 / A;
    int stored = forward_slip("sum is stored after the GPAS of sum_gate; it must be before");
    int of_s = backward_slip("the norm's backward pass gets s, but its input was (1 - a(g)) s");
    for (int i = 0; i < n; i++) {
        number x = hold(in[0][i]), b = hold(in[1][i]), z = inp_scale * x, dx = in[0][i] - x;
        number dz = (stop ? 1 : inp_scale) * dx - (last ? of_g * factor("inp in dgate", x) : 0);
        number s = A * z + term("branch", b), ds = of_dz * dz + in[1][i] - b;
        number y = sum_scale * s + (stop ? 1 : sum_scale) * ds;
        if (!last) y -= of_g * factor("sum in dgate", s);
        out[i] = stored ? y : s + ds;
        out[n + i] = y;
        seen[i] = of_s ? s : y;
    }
    norm(out + 2 * n, out + 3 * n, out + n, seen, in[2], c->T, C);
    for (int i = n; i < 2 * n; i++) out[i] = term("with dx, along the shortcut,", out[i]);
    free(seen);
}

static void adjust_fused(Case *c, int k) {
    int n = c->T * c->C;
    c->norm_last = k % 2;
    c->sum_in_dx = backward && !c->norm_last;
    c->no_gate = k / 2 == 3;
    c->stop_grad = k / 2 != 2;
    c->factor = c->norm_last ? (float)(1.5 + uniform() / 4) : 1;
    sprintf(c->name + strlen(c->name), ", norm %s%s%s", c->norm_last ? "last" : "first",
            c->stop_grad ? "" : ", stop_grad 0", c->no_gate ? ", no gates" : "");
    for (int i = 0; i < 2; i++)
        c->in[3].x[i] = (float)(((i + k) % 2 ? 0.5 : -0.5) + 0.1 * uniform());
    for (int i = 0; i < 2 * n && k / 2 == 1; i++) c->in[i / n].x[i % n] *= 0x1p-10;  // for eps
    if (!backward) return;
    double *sum = evaluate(fused, c, OUTPUT), *dx = numbers(n, 1), *dfinp = numbers(n, 1);
    c->out_weight = room(c->out_size, sizeof *dx);
    for (int i = 0; i < n; i++) {  // norm last, both are gradients of the norm's output
        dx[i] = (float)(0.4 * dx[i] + 0.5 * sum[i]);
        c->out_weight[2 * n + i] += dfinp[i];
        c->out_weight[(c->norm_last ? 2 : 1) * n + i] += dx[i];
    }
    c->a[DFINP] = array(c, "dfinp", dfinp, n, 0);
    c->a[DX] = array(c, "dx", dx, n, 1);
}

// ---- 5. Running ---------------------------------------------------------------------------------

// A result of a layer. sizes: rows, columns, and, if it is a part of an array, how far rows are
// apart and where it begins, as letters: see size_of_letter(). Without points it is in no array.
typedef struct {
    const char *name, *sizes;
    int points, of, adds;
    int in_place_of;  // an array that it overwrites
    int only;         // 1: train_gpas.c alone has it; 2: train_gpas.cu
} ResultSpec;

static const struct {
    const char *name;
    Definition f;
    void (*adjust)(Case *c, int k);  // what is special in case k, or NULL
    int count[4];                    // of cases: forward, backward; the same in train_gpas.cu
    const char *labels;              // of the sizes that a case's name tells
    int shapes[24][6];               // B, T, C, NH, V, first; {0}: those of case 0
    struct { const char *name, *sizes; } in[MAX_INPUTS];
    const char *dout;                // NULL: the gradient of the first output is `factor`
    ResultSpec out[MAX_RESULTS], grad[MAX_RESULTS];
} layers[LAYERS] = {
    {"gpas", gpas, adjust_gpas, {13, 19, 13, 19}, "n", {{1, 1, 7}, {0}, {1, 1, 1}, {1, 1, 600003}},
     {{"inp", "1C"}, {"gate", "11"}}, "dout", {{"out", "1C", 4, OUTPUT}},
     {{"dinp", "1C", 3, 0}, {"dgate", "11", 3, 1, 1}}},
    {"residual", residual, adjust_residual, {6, 6, 6, 6}, "n",
     {{1, 1, 7}, {1, 1, 1}, {1, 1, 1003}}, {{"shortcut", "1C"}, {"branch", "1C"}}, "dout",
     {{"out", "1C", 4, OUTPUT}}, {{"dshortcut", "1C", 6, 0}}},
    {"embedding", embedding, adjust_embedding, {5, 5, 5, 5}, "TCV",
     {{1, 5, 7, 1, 9}, {1, 1, 7, 1, 3}, {1, 6, 1, 1, 4}, {1, 9, 301, 1, 5}, {1, 80, 8, 1, 3}},
     {{"weight", "VC"}}, "dout", {{"out", "NC", 4, OUTPUT}}, {{"dweight", "VC", 6, 0, 1}}},
    {"rmsnorm", rmsnorm, adjust_rmsnorm, {7, 7, 8, 8}, "TC",
     {{1, 5, 7}, {1, 1, 7}, {1, 4, 1}, {1, 2, 301}, {1, 4, 8}, {1, 1, 1}, {1, 3, 40}, {1, 2100, 2}},
     {{"inp", "NC"}, {"weight", "1C"}}, "dout", {{"out", "NC", 3, OUTPUT},
      {"rstd", "N1", 1, OUTPUT}}, {{"dinp", "NC", 4, 0}, {"dweight", "1C", 2, 1, 1}}},
    {"rope", rope, adjust_rope, {5, 5, 5, 5}, "BTCN",
     {{1, 5, 4, 1}, {1, 1, 4, 1}, {1, 5, 12, 2}, {2, 5, 4, 1}, {2, 3, 258, 43}},
     {{"qkv", "Q3"}, {"table", "Th"}}, "dqkv", {{"qkv", "Q3", 4, OUTPUT, 0, IN}},
     {{"dqkv", "Q3", 6, 0, 0, DOUT}}},
    {"swiglu", swiglu, NULL, {5, 5, 5, 5}, "TC",
     {{1, 5, 7}, {1, 1, 7}, {1, 4, 1}, {1, 5, 64}, {1, 2, 301}}, {{"inp", "N2"}}, "dout",
     {{"out", "NC", 4, OUTPUT}}, {{"dh1", "NC2", 4, 0}, {"dh3", "NC2C", 2, 0}}},
    {"matmul", matmul, NULL, {7, 7, 7, 7}, "TCV",
     {{1, 5, 7, 1, 3}, {1, 1, 7, 1, 5}, {1, 4, 4, 1, 4}, {1, 3, 1, 1, 5}, {1, 5, 4, 1, 1},
      {1, 13, 37, 1, 19}, {1, 70, 9, 1, 6}},
     {{"inp", "NC"}, {"weight", "VC"}}, "dout", {{"out", "NV", 4, OUTPUT}},
     {{"dinp", "NC", 3, 0}, {"dweight", "VC", 3, 1, 1}}},
    {"attention", attention, adjust_attention, {10, 7, 10, 7}, "BTCNf",
     {{1, 1, 3, 1}, {1, 5, 3, 1}, {1, 5, 12, 3}, {2, 4, 6, 2}, {1, 17, 6, 1}, {1, 6, 4, 1},
      {1, 300, 4, 1}, {1, 7, 6, 2, 0, 4}, {2, 6, 6, 2, 0, 2}, {1, 90, 4, 1, 0, 70}},
     {{"qkv", "Q3"}}, "dout", {{"out", "NC", 3, OUTPUT}, {"lse", "Bt", 1, OUTPUT}},
     {{"dq", "QC3", 2, 0}, {"dk", "QC3C", 2, 0}, {"dv", "QC32", 2, 0}}},
    {"crossentropy", crossentropy, adjust_crossentropy, {6, 6, 7, 7}, "TV",
     {{1, 5, 1, 1, 7}, {1, 1, 1, 1, 7}, {1, 2, 1, 1, 301}, {1, 4, 1, 1, 4}, {1, 4, 1, 1, 7},
      {1, 3, 1, 1, 8}, {1, 2, 1, 1, 8200}},
     {{"logits", "NS"}}, NULL, {{"losses", "N1", 2, OUTPUT}, {"lse", "N1", 2, OUTPUT, .only = 1}},
     {{"logits", "NVS", 5, 0, 0, IN}, {"padding", "NPSV", 1, 0}}},
    {"adamw", adamw, adjust_adamw, {5, 5, 8, 8}, "n", {{1, 1, 7}, {0}, {1, 1, 1003}, {0},
     {1, 1, 1}}, {{"p", "1C"}, {"m", "1C"}, {"v", "1C"}, {"grad", "1C"}}, NULL,
     {{"p", "1C", 3, OUTPUT, 0, IN}, {"m", "1C", 3, OUTPUT, 0, IN + 1},
      {"v", "1C", 3, OUTPUT, 0, IN + 2}, {"weights", "1C", 1, OUTPUT, .only = 2}}, {{0}}},
    {"residual_gpas_rmsnorm", fused, adjust_fused, {8, 10, 8, 10}, "TC",
     {{1, 5, 7}, {0}, {1, 4, 8}, {1, 4, 8}, [8] = {1, 2100, 2}, {1, 2100, 2}},
     {{"inp", "NC"}, {"branch", "NC"}, {"weight", "1C"}, {"the gates", "1G"}}, NULL,
     {{"sum", "NC", 1, OUTPUT}, {NULL, "NC", 0, OUTPUT}, {"normed", "NC", 2, OUTPUT},
      {"rstd", "N1", 1, OUTPUT}},
     {{"dx", "NC", 2, 0, 0, DX}, {"dsum", "NC", 1, 1}, {"dweight", "1C", 1, 2, 1},
      {"dgate", "11", 2, 3, 1}}}};

static int size_of_letter(const Case *c, char letter) {
    static const char letters[] = "1NQBTtC23hVSPG";
    int rows = c->T - c->first, hs = c->C / c->NH;
    int sizes[] = {1, c->B * rows, c->B * c->T, c->B * c->NH, c->T, rows, c->C, 2 * c->C, 3 * c->C,
                   hs, c->V, c->stride, c->stride - c->V, 2};
    return letter ? sizes[strchr(letters, letter) - letters] : 0;
}

// Makes the array of a result, if it has one of its own, and the result, if this pass computes it.
// The points of those that this submission does not have go to the first one. kept: what the
// forward pass has computed; offset: where the result begins in it.
static void add_result(Case *c, const ResultSpec *s, int i, const double *kept, size_t offset) {
    int is_kept = backward && s->of == OUTPUT, of = s->of, sizes[4] = {0};
    for (int k = 0; k < 4 && s->sizes[k]; k++) sizes[k] = size_of_letter(c, s->sizes[k]);
    int rows = sizes[0], columns = sizes[1], pitch = sizes[2] ? sizes[2] : columns;
    float **a = &c->a[(of == OUTPUT ? OUT : GRAD) + i];
    if (c->alias && i == 0 && !is_kept) *a = c->a[of == OUTPUT ? IN : DOUT];
    else if (s->in_place_of && !is_kept) *a = c->a[s->in_place_of];
    else if (sizes[3]) *a = a[-1];
    else *a = array(c, s->name, is_kept ? kept + offset : NULL, (size_t)rows * pitch, !is_kept);
    if (is_kept || !s->points || (s->adds && columns == 1 && c->no_gate)) return;
    if (!columns || (s->only && s->only != 1 + submission.cuda)) {
        c->results[0].points += s->points;
        return;
    }
    Result *r = &c->results[c->num_results++];
    *r = (Result){.name = s->name, .points = s->points, .of = of, .adds = s->adds,
                  .array = *a + sizes[3], .offset = of == OUTPUT ? offset : (size_t)sizes[3],
                  .rows = rows, .columns = columns, .pitch = pitch, .scale = of < 1 ? c->scale : 0,
                  .tolerance = of < 1 && c->tolerance ? c->tolerance : 1e-4,
                  .inner = c->B > 1 && columns > 1 ? rows / c->B : 0};
    if (c->sum_in_dx && of < 2) {  // fused, norm first: the gradient of the sum is in dx
        r->of = 1;
        r->array = c->a[DX];
    }
}

// Makes case k of a layer. Returns whether there is one.
static int make_case(Case *c, int layer, int k) {
    const char *last = *layers[layer].labels == 'n' ? "n" : "C";  // the length of a row
    const char *const names[] = {"B", "T", last, "NH", "V", "first"};
    const int *shape = layers[layer].shapes[layers[layer].shapes[k][0] ? k : 0];
    const ResultSpec *out = layers[layer].out, *grad = layers[layer].grad;
    size_t offsets[MAX_RESULTS + 1] = {0};
    if (k >= layers[layer].count[2 * submission.cuda + backward]) return 0;
    memcpy(&c->B, shape, 6 * sizeof(int));
    c->NH += !c->NH;
    if (submission.cuda && c->C / c->NH % 2 && out[1].sizes) c->C += c->NH * (*out[1].sizes == 'B');
    c->stride = submission.cuda ? (c->V + 7) / 8 * 8 : c->V;
    c->stop_grad = 1;
    for (int i = 0; i < 6; i++) {
        const char *comma = *c->name ? ", " : "";
        if (shape[i] && strchr(layers[layer].labels, *names[i]))
            sprintf(c->name + strlen(c->name), "%s%s = %d", comma, names[i], (&c->B)[i]);
    }
    for (int i = 0; i < MAX_INPUTS && layers[layer].in[i].name; i++) {
        int rows = size_of_letter(c, layers[layer].in[i].sizes[0]);
        int columns = size_of_letter(c, layers[layer].in[i].sizes[1]);
        double *x = numbers((size_t)rows * columns, 1.2);
        c->in[c->num_inputs++] = (Input){layers[layer].in[i].name, x, rows, columns};
    }
    for (int i = 0; i < MAX_RESULTS; i++) {
        const char *sizes = out[i].sizes ? out[i].sizes : "PP";
        size_t size = (size_t)size_of_letter(c, sizes[0]) * size_of_letter(c, sizes[1]);
        offsets[i + 1] = offsets[i] + (out[i].sizes ? size : 0);
    }
    c->out_size = offsets[MAX_RESULTS];
    c->tokens = room(c->T, sizeof(int));
    c->large = c->out_size > 1100 || c->T >= 90 || c->V > 1000;
    if (layers[layer].adjust) layers[layer].adjust(c, k);
    int *tokens = (int *)array(c, "tokens", NULL, c->T + 64, 0);  // after them, one too large
    for (int i = 0; i < c->T + 64; i++) tokens[i] = i < c->T ? c->tokens[i] : c->V;
    c->a[TOKENS] = (float *)tokens;
    int columns = size_of_letter(c, out[0].sizes[1]), rows = (int)offsets[1] / columns;
    double *kept = backward ? evaluate(layers[layer].f, c, OUTPUT) : NULL;
    if (backward && !c->out_weight) add_dout(c, layers[layer].dout, rows, columns);
    for (int i = -1; i < c->num_inputs; i++) {
        const Input *in = i < 0 ? &c->dout : &c->in[i];
        int which = i < 0 ? DOUT : IN + i, changes = c->alias && which == (backward ? DOUT : IN);
        for (int j = 0; j < MAX_RESULTS; j++)
            changes |= (backward ? grad : out)[j].in_place_of == which;
        if (in->x) c->a[which] = array(c, in->name, in->x, input_size(in), changes);
    }
    for (int i = 0; i < MAX_RESULTS; i++)
        if (out[i].sizes) add_result(c, &out[i], i, kept, offsets[i]);
    for (int i = 0; i < MAX_RESULTS && backward; i++)
        if (grad[i].sizes) add_result(c, &grad[i], i, NULL, 0);
    if (c->adam.t) memcpy(c->a[OUT + 3], c->a[IN], c->C * sizeof(float));  // the copy of p
    return 1;
}

static void call_layer(int layer, const Case *c) {
    const double *gate = c->in[1].x, *gates = c->in[3].x;
    Arguments all = {c->a + IN, c->a + OUT, c->a + GRAD, c->a[DOUT], c->a[DFINP], c->a[DX],
                     (int *)c->a[TOKENS], c->B, c->T, c->C, c->NH, c->V, c->first, c->stride,
                     c->act, c->stop_grad, c->norm_last, !c->no_gate, (float)c->factor,
                     gate ? (float)gate[0] : 0, {0}, c->adam};
    for (int i = 0; i < 2 && gates; i++) all.gates[i] = (float)gates[i % c->in[3].columns];
    (backward ? submission.backward : submission.forward)[layer](&all);
}

// So much may be allocated from now on: addresses that a program reserves at its start, as
// dev/gpu/cuda_on_cpu.h does by the terabyte, do not count. Linux counts in pages in this file.
static void limit_process(void) {
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file && fscanf(file, "%*u %*u %*u %*u %*u %lu", &pages) != 1) pages = 0;
    if (file) fclose(file);
    rlim_t most = (rlim_t)pages * sysconf(_SC_PAGESIZE) + ((rlim_t)MEGABYTES << 20);
    rlim_t seconds = submission.cuda ? 2 * CPU_SECONDS : CPU_SECONDS;
    setrlimit(RLIMIT_DATA, &(struct rlimit){most, most});
    setrlimit(RLIMIT_CPU, &(struct rlimit){seconds, seconds + 1});
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){1 << 20, 1 << 20});
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
}

// Calls the submission for n cases, in a process of its own. Returns how many calls returned, and
// prints how it ended, if not well: the status that waitpid() gives, and the seconds it computed.
static int call_cases(int layer, int n) {
    volatile int *returned = (int *)arena, *complete = returned + 1;
    *returned = *complete = 0;
    struct rusage usage;
    int status;
    pid_t child = fork();
    if (child < 0) exit(2);
    if (child == 0) {
        dup2(open("/dev/null", O_WRONLY), 1);  // the submission may print what it likes
        limit_process();
        alarm(WALL_SECONDS);  // far more than the limit of CPU time
        for (int k = 0; k < n; k++) {
            call_layer(layer, &cases[k]);
            ++*returned;
        }
        *complete = 1;
        _exit(0);
    }
    wait4(child, &status, 0, &usage);
    double cpu = (double)usage.ru_utime.tv_sec + 1e-6 * (double)usage.ru_utime.tv_usec;
    if (!*complete && n > 1) printf("ended\t%d\t%.1f\t%s\n", status, cpu, cases[*returned].name);
    return *returned;
}

// Is case i right if called first? Then the submission keeps something between calls.
static int is_right_alone(int layer, int i, int k) {
    Case saved = cases[0];
    cases[0] = cases[i];
    for (const Array *a = cases[i].arrays; a < cases[i].arrays + cases[i].num_arrays; a++)
        memcpy(a->x, a->before, a->n * sizeof(float));
    Result again = cases[i].results[k];
    again.num_wrong = 0;
    int returned = call_cases(layer, 1);
    if (returned) compare(&again, &cases[i], layers[layer].f);
    cases[0] = saved;
    return returned && !again.num_wrong;
}

// Writes the lines of result k of n cases, and what explains it.
static void report(int layer, int n, int k) {
    char hint[HINT] = "", bad[MAX_CASES + 1] = "";
    const char *kind = "nothing";
    const Result *r = &cases[0].results[k];
    int num_bad = 0, first = 0;
    for (int i = n - 1; i >= 0; i--) {
        const Result *s = &cases[i].results[k];
        bad[i] = !s->points ? '-' : s->num_wrong > 0 ? '1' : '0';
        num_bad += bad[i] == '1';
        if (bad[i] == '1') first = i;
    }
    if (num_bad && !is_untouched(n, k, 0)) {
        Search s = {layers[layer].f, n, k, 0, ""};
        kind = explain(&s, hint);
        if (!*hint && first > 0 && is_right_alone(layer, first, k)) kind = "static";
        for (int i = first; i < n; i++) if (bad[i] == '1') print_facts(&cases[i], k, i == first);
    }
    printf("result\t%s\t%d\t%d\t%s\t%s\t%s\n", r->name, r->points, num_bad ? 0 : r->points, bad,
           num_bad ? kind : "", hint);
}

// Complaints about memory cost all points, for then the process is no longer what it should be.
static int report_complaints(int n) {
    char bad[MAX_CASES + 1] = "";
    const Case *c = NULL;
    for (int i = 0; i < n; i++) {
        check_arrays(&cases[i]);
        bad[i] = *cases[i].complaint ? '1' : '0';
        if (bad[i] == '1' && !c) c = &cases[i];
    }
    if (c) printf("memory\t%s\t%s\t%s\n", bad, c->complaint, c->name);
    return c != NULL;
}

// What distinguishes the cases, from which feedback.py says where something is wrong.
static void print_case(const Case *c) {
    printf("case\t%s\t%s\t%d %d %d %d %d %d %d %d %d %d %d %d %d %d %g\t", c->name,
           c->special ? c->special : "", c->alias, c->first, c->stop_grad, c->no_gate, c->norm_last,
           c->act, c->large, c->stride, c->V, c->adam.t, c->NH, c->B, c->T, c->C, c->factor);
    for (int i = 0; i < c->T; i++) printf("%d ", c->tokens[i]);
    puts("");
}

int main(int argc, char **argv) {
    int layer = 0, n = 0;
    if (argc != 5) return 2;
    while (layer < LAYERS && strcmp(layers[layer].name, argv[1])) layer++;
    if (layer == LAYERS) return 2;
    Definition f = layers[layer].f;
    backward = !strcmp(argv[2], "backward");
    seed = strtoull(argv[3], NULL, 10);
    variant = atoi(argv[4]);
    arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED) return 2;
    arena_end = arena + ARENA_BYTES - 64;
    while (make_case(&cases[n], layer, n)) n++;
    for (int i = 0; i < n; i++) {
        for (Array *a = cases[i].arrays; a < cases[i].arrays + cases[i].num_arrays; a++)
            a->before = memcpy(room(a->n, sizeof(float)), a->x, a->n * sizeof(float));
        collecting = 1;
        if (!cases[i].large) free(evaluate(f, &cases[i], OUTPUT));
        collecting = 0;
    }
    for (int i = 0; i < n; i++) print_case(&cases[i]);
    int returned = call_cases(layer, n), broken = report_complaints(returned);
    for (int i = 0; i < returned; i++) {
        for (int k = 0; k < cases[i].num_results; k++) compare(&cases[i].results[k], &cases[i], f);
    }
    for (int k = 0; k < cases[0].num_results; k++) {
        const Result *r = &cases[0].results[k];
        if (returned && !broken) report(layer, returned, k);
        else printf("result\t%s\t%d\t0\t\t\t\n", r->name, r->points);
    }
    puts("done");
    return 0;
}
