/*
grade.c: is a pass of a layer right, and if not, what is wrong with it?

    grade LAYER forward|backward SEED VARIANT

calls the submission for a list of cases, in a process of its own, and writes a line for each result
of the pass, `result NAME MAX_POINTS POINTS HINT`, with tabs between. grade.py runs it.

No derivative is written down here. A definition f is evaluated at x + ih with h = 1e-30: the
imaginary part of the result is h f'(x), exact to the last digit, since nothing is subtracted (the
complex step). Where a derivative must not look, hold() drops the imaginary part: so GPAS's
stop-gradient is one word in its definition.

Mistakes are found in the same way. In a definition, slip("what is wrong") is 0, and 1 when we ask
what somebody gets who makes this mistake. It is named only if it gives the submission's numbers in
all cases, in those that are right as well as in those that are wrong. A mistake in a derivative is
written as hold(y) + slope * (x - hold(x)): the value y, with whatever slope.
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
enum { OUTPUT = -1, ABSENT = 2 };  // a Result that is no gradient; of a case: without the result

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
                snprintf(c->complaint, sizeof c->complaint, "writes outside of an array: to "
                         "%s[%ld], which has %zu elements; check loop bounds and row lengths",
                         a->name, i, a->n);
            if (inside && !a->may_change && memcmp(a->x + i, a->before + i, sizeof(float)))
                snprintf(c->complaint, sizeof c->complaint, "%s is only to be read, but %s[%ld] "
                         "was changed", a->name, a->name, i);
        }
    }
}

// ---- 2. Definitions -----------------------------------------------------------------------------

// out = f(in).
typedef void (*Definition)(number *out, number *const *in, const Case *c);

enum { MAX_SLIPS = 100 };
static const char *slips[MAX_SLIPS], *chosen;  // all mistakes of a definition; the one that is made
static int num_slips, collecting;

static int slip(const char *text) {
    if (collecting) {
        int i = 0;
        while (i < num_slips && slips[i] != text) i++;
        slips[i] = text;
        num_slips += i == num_slips;
    }
    return chosen == text;
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

static double *evaluate_result(Definition f, const Case *c, const Result *r, int direct) {
    double *all = evaluate(f, c, direct ? OUTPUT : r->of);
    double *x = room((size_t)r->rows * r->columns, sizeof *x);
    for (int i = 0; i < r->rows * r->columns; i++)
        x[i] = all[r->offset + (size_t)(i / r->columns) * r->pitch + i % r->columns];
    free(all);
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
    r->expected = evaluate_result(f, c, r, 0);
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
// Of a result in all cases, tries one hypothesis after another: a slip of the layer's definition; a
// factor; an input, or dout, that is read wrongly, the mistakes of indices that any loop can have;
// and that it is added where it must be written, or written where it must be added.

enum { LAST_ROW, FIRST_ROW, ONLY_LAST, SAME_ROW, TRANSPOSED, STEP_1, LAST_COLUMN, FIRST_COLUMN,
       ONLY_LAST_COLUMN, SAME_COLUMN, REVERSED, NOT_READ, TOO_FAR, TOO_EARLY,
       READINGS };  // from here on: dout or an input in its place
static const char *const readings[READINGS] = {
    "the last row of %s is left out", "the first row of %s is left out",
    "only the last row of %s counts: is a sum set (=) in the loop instead of added to (+=)?",
    "row 0 of %s is read for every row", "%s is read transposed: rows and columns are exchanged",
    "row n of %s is read from element n on: n must be multiplied by the row's length",
    "the last column of %s is left out", "the first column of %s is left out",
    "only the last column of %s counts: is a sum set (=) in the loop instead of added to (+=)?",
    "%s is read at [0] for every index", "%s is read in reverse order",
    "%s is missing: 1 is used in its place", "%s is read one place too far",
    "%s is read one place too early"};

typedef struct {
    const char *slip, *text;  // text: of a reading; or NULL
    int view, how;            // the input that is read wrongly: -1 is dout, or in[view]
    double factor;
    int other_mode;
} Hypothesis;
static const Hypothesis nothing_wrong = {NULL, NULL, 0, 0, 1, 0};

static double read_wrongly(const Input *in, int how, int row, int column) {
    int last_row = in->rows - 1, last = in->columns - 1;
    if ((how == LAST_ROW && row == last_row) || (how == FIRST_ROW && row == 0) ||
        (how == ONLY_LAST && row < last_row) || (how == LAST_COLUMN && column == last) ||
        (how == FIRST_COLUMN && column == 0) || (how == ONLY_LAST_COLUMN && column < last))
        return 0;
    if (how == SAME_ROW) row = 0;
    if (how == SAME_COLUMN) column = 0;
    if (how == REVERSED) column = last - column;
    long at = (long)row * in->columns + column + (how == TOO_FAR) - (how == TOO_EARLY);
    if (how == TRANSPOSED) at = (long)column * in->rows + row;
    if (how == STEP_1) at = row + column;
    return how == NOT_READ ? 1 : at < 0 || at >= (long)input_size(in) ? NAN : in->x[at];
}

static Input *view_of(Case *c, int view) { return view < 0 ? &c->dout : &c->in[view]; }

// Puts what is read in the place of what should be. Returns whether there is a difference.
static int misread(Case *c, int view, int how) {
    Input *in = view_of(c, view), *from = how < READINGS ? in : view_of(c, how - READINGS - 1);
    size_t n = input_size(in), changed = 0;
    if (!in->x || !from->x || from->rows != in->rows || from->columns != in->columns) return 0;
    double *x = room(view < 0 ? c->out_size : n, sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = read_wrongly(from, how, (int)(i / in->columns), (int)(i % in->columns));
        changed += !(x[i] == in->x[i]);
    }
    in->x = x;
    if (view < 0) c->out_weight = x;
    return changed > 0;
}

// What the hypothesis predicts for r->got. NULL: nothing but what is right.
static double *predict(Definition f, const Case *original, const Result *r, const Hypothesis *h) {
    Case c = *original;
    int plain = !h->slip && !h->text;
    if (h->text && !misread(&c, h->view, h->how) && !h->other_mode) return NULL;
    if (c.rotates_dout && !plain) {
        c.in[0].x = c.dout.x;
        c.factor = -1;
    }
    chosen = h->slip;
    double *x = evaluate_result(f, &c, r, c.rotates_dout && !plain);
    chosen = NULL;
    for (int i = 0; i < r->rows * r->columns; i++) {
        double y = x[i];
        x[i] = h->factor * y;
        if (h->other_mode) x[i] += !r->adds ? r->old[i] : y != 0 || r->rows == 1 ? -r->old[i] : 0;
    }
    return x;
}

// Do the numbers x explain this result? *seen counts the wrong elements that they do explain,
// *sure the elements of which they say anything: NaN has been read from outside.
static int explains(const Result *r, const double *x, int *seen, int *sure) {
    for (int i = 0; i < r->rows * r->columns; i++) {
        double allowed = 5e-4 * (fabs(x[i]) + (r->columns * r->rows > 1 ? 0.5 * r->scale : 0));
        if (isnan(r->expected[i])) continue;
        double error = fabs(r->got[i] - x[i]);
        int known = fabs(x[i]) < 1e30;  // that is, neither NaN nor larger than a float
        if (known && !(error <= allowed + 1e-7 * r->scale + 1e-6 * r->adds)) return 0;
        *seen += r->wrong[i] && known == (isfinite(r->got[i]) != 0);
        *sure += known;
    }
    return 1;
}

// Is this hypothesis true of result k in all of n cases? first: one that is wrong. The fused layer
// has a kernel for each place of the norm, of which the other may be right.
static int is_true(Definition f, int n, int k, int first, const Hypothesis *h) {
    int seen = 0, sure = 0;
    for (int i = 0; i < n; i++) {
        const Result *r = &cases[i].results[k];
        int other = cases[i].norm_last != cases[first].norm_last;
        if (cases[i].large || (other && !r->num_wrong)) continue;
        double *x = predict(f, &cases[i], r, h);
        int good = x ? explains(r, x, &seen, &sure) : !r->num_wrong;
        free(x);
        if (!good) return 0;
    }
    return seen && sure;
}

// Is it multiplied by the same number in all cases? first: a case that is wrong. Of a single number
// any factor would be true.
static int explain_factor(Definition f, int n, int k, int first, char *hint) {
    const Result *r = &cases[first].results[k];
    int at = (int)((char *)memchr(r->wrong, 1, r->rows * r->columns) - r->wrong), num_wrong = 0;
    Hypothesis h = nothing_wrong;
    h.factor = r->got[at] / r->expected[at];
    for (int i = 0; i < n; i++) num_wrong += cases[i].results[k].num_wrong;
    if (!isfinite(h.factor) || (h.factor == 0 && r->adds) || !is_true(f, n, k, first, &h)) return 0;
    if (fabs(h.factor + 1) < 1e-3) return sprintf(hint, "it has the wrong sign");
    if (h.factor == 0) return sprintf(hint, "it is all zeros");
    return num_wrong > 2 ? sprintf(hint, "it is multiplied by %.4g", h.factor) : 0;
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

// Tries what is known to go wrong. Returns whether something explains result k in all cases.
static int explain(Definition f, int n, int k, int first, char *hint) {
    const char *mode = cases[0].results[k].adds
        ? "it is set (=); a parameter's gradient must be added (+=) to what the array holds"
        : "it adds to what was there (+=); it must write (=)";
    Hypothesis h = nothing_wrong;
    h.other_mode = 1;
    if (is_true(f, n, k, first, &h)) return sprintf(hint, "%s", mode);
    if (explain_factor(f, n, k, first, hint)) return 1;
    h.factor = -1;
    if (is_true(f, n, k, first, &h)) return sprintf(hint, "it has the wrong sign; and %s", mode);
    for (h = nothing_wrong; h.other_mode < 2; h.other_mode++) {
        for (int i = 0; i < num_slips; i++) {
            h.slip = slips[i];
            if (is_true(f, n, k, first, &h))
                return sprintf(hint, h.other_mode ? "%s; and %s" : "%s", h.slip, mode);
        }
    }
    h = (Hypothesis){NULL, readings[ONLY_LAST], -1, ONLY_LAST, 1, 1};  // of dout, in a loop
    if (cases[0].results[k].adds && is_true(f, n, k, first, &h))
        return sprintf(hint, "only the last row counts: = where += is needed");
    if (is_untouched(n, k, 1)) return sprintf(hint, "%s is not written", cases[0].results[k].name);
    h = nothing_wrong;
    for (h.view = -1; h.view < cases[0].num_inputs; h.view++) {
        const Input *in = view_of(&cases[0], h.view);
        for (h.how = 0; h.how < READINGS + 1 + cases[0].num_inputs; h.how++) {
            const Input *other = h.how < READINGS ? in : view_of(&cases[0], h.how - READINGS - 1);
            h.text = h.how < READINGS ? readings[h.how] : "%s is read in place of %s";
            int possible = h.how >= NOT_READ && h.how != TOO_FAR && h.how != TOO_EARLY;
            if (input_size(in) == 1 && !possible) continue;  // of a number that is no array
            if (is_true(f, n, k, first, &h)) return sprintf(hint, h.text, other->name, in->name);
        }
    }
    return 0;
}

// The first wrong element of a case, where the wrong ones are, and what they have in common.
static void describe_elements(char *text, const Result *r, const Case *c) {
    int first = -1, nans = 0, n = r->rows * r->columns, last_row = 0;
    int kept = 1, minus = 1, known = 0, turned = r->rows > 1 && r->columns > 1;
    char index[60];
    for (int i = 0; i < n; i++) {
        int at = i % r->columns * r->rows + i / r->columns;
        turned &= fabs(r->got[at] - r->expected[i]) < 1e-3 * r->scale;
        known += !isnan(r->expected[i]);
        if (!r->wrong[i]) continue;
        if (first < 0) first = i;
        nans += !isfinite(r->got[i]);
        kept &= r->got[i] == (r->adds ? 0 : r->old[i]);
        minus &= fabs(r->got[i] + r->expected[i]) < 1e-3 * fabs(r->expected[i]);
        last_row = i / r->columns;
    }
    int row = first / r->columns, column = first % r->columns;
    if (r->inner) sprintf(index, "[%d][%d][%d]", row / r->inner, row % r->inner, column);
    else if (r->columns == 1 || r->rows == 1) sprintf(index, "[%d]", first);
    else sprintf(index, "[%d][%d]", row, column);
    double old = r->adds ? r->old[first] : 0;
    text += sprintf(text, "%s%s is %.6g, should be %.6g (%s; %d of %d wrong", r->name, index,
                    r->got[first] + old, r->expected[first] + old, c->name, r->num_wrong, known);
    if (r->adds) text += sprintf(text, "; it held %.6g before", old);
    if (last_row - row + 1 < r->rows && !c->sampled)
        text += sprintf(text, ", rows %d to %d of %d", row, last_row, r->rows);
    sprintf(text, ")%s", kept ? "; the wrong elements hold what they held before" : minus
            ? "; the wrong elements have the wrong sign" : turned ? "; it is written transposed"
            : !nans ? "" : "; NaN or infinity comes from what is read outside of an input, from an "
            "exponential that overflows, a negative root or log, or 0 / 0");
}

// Says in which cases something is wrong, if it is not so in all: what is special in them; or, at
// length, their names.
static void describe_cases(char *text, int n, const char *bad, int at_length) {
    const char *const features[] = {
        "output and input are the same array", "first is not 0", "stop_grad is 0",
        "stop_grad is 1", backward ? "dgate is NULL" : "the gates are NULL",
        "sizes are large (look at what happens between blocks)",
        "V is not a multiple of 8: rows are padded", "the norm comes last", "the norm comes first",
        "the activation is not silu", "there are several heads", "there are several sequences",
        "there are several rows", "there are several columns", "there are more than 32 columns"};
    int num_bad = 0, num_good = 0, named = 0, all = ~0, none = 0, feature = 0;
    const char *special = cases[(char *)memchr(bad, 1, n) - bad].special;
    for (int i = 0; i < n; i++) {
        const Case *c = &cases[i];
        int has[] = {c->alias, c->first > 0, !c->stop_grad, c->stop_grad, c->no_gate, c->large,
                     c->stride > c->V, c->norm_last, !c->norm_last, c->act > 0, c->NH > 1, c->B > 1,
                     c->T > 1, c->C > 1, c->C > 32}, mask = 0;
        for (int k = 0; k < 15; k++) mask |= (has[k] != 0) << k;
        if (bad[i] == ABSENT) continue;
        if (special && (c->special == special) != bad[i]) special = NULL;
        if (bad[i]) all &= mask;
        else none |= mask;
        num_bad += bad[i];
        num_good += !bad[i];
    }
    while (feature < 15 && !((all & ~none) >> feature & 1)) feature++;
    *text = 0;
    if (!num_good) return;
    if ((feature == 12 || feature == 13) && num_good < 2) feature = 15;  // a single case is luck
    if (special || feature < 15)
        sprintf(text, "only where %s: ", special ? special : features[feature]);
    else if (at_length) {
        int tells_right = num_bad > num_good;
        strcpy(text, tells_right ? "right in the cases: " : "wrong only in the cases: ");
        for (int i = 0; i < n; i++) {
            if (bad[i] == !tells_right && ++named <= 4)
                sprintf(text + strlen(text), "%s\"%s\"", named > 1 ? "; " : "", cases[i].name);
        }
        strcat(text, named > 4 ? "; ...; " : "; ");
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
    number g = in[1][0], a = activation(g, c->act), x;
    double factor = 1;  // of what dgate is the sum of
    int stop = c->stop_grad;
    if (forward_slip("a'(g) is used; it must be a(g)"))
        a = cimag(activation(g + I * 1e-30, c->act)) * 1e30;
    if (slip("the activation is always SiLU: `activation` is not used")) a = activation(g, SILU);
    number da = a - hold(a);
    a = hold(a);
    if (backward_slip("a(g) is used in place of a'(g) in dgate")) da = a * (g - hold(g));
    if (backward_slip("a'(g) is missing in dgate")) da = g - hold(g);
    if (slip("a(g) is missing (the gate is used as it is)")) a = hold(g);
    if (slip("the sign of a(g): the scale is 1 - a(g), not 1 + a(g)")) a = -a;
    double scale = 1 - creal(a);
    if (backward_slip("it is scaled by 1 - a(g): with the stop-gradient (stop_grad 1) it must be "
                      "dout itself, because sg(x) is a constant to the derivative")) stop = 0;
    if (backward_slip("with stop_grad 0, too, dinp is dout; there it must be (1 - a(g)) dout"))
        stop = 1;
    if (backward_slip("stop_grad is taken the wrong way round")) stop = !stop;
    if (backward_slip("inp is multiplied by 1 - a(g) in dgate; it must not be")) factor = scale;
    if (backward_slip("dout is read for dgate after dinp was written; the two may be the same "
                      "array")) factor = c->alias && !c->stop_grad ? scale : 1;
    if (backward_slip("the factor 1 - a(g) does not belong in dgate, even with stop_grad 0"))
        factor = c->stop_grad ? 1 : scale;
    if (backward_slip("only where stop_grad is 1: dgate is not written; the stop-gradient is on x, "
                      "not on g, so dgate is needed in both cases")) factor = !c->stop_grad;
    if (backward_slip("it is the mean of x_i dy_i; it must be their sum")) factor = 1.0 / c->C;
    for (int i = 0; i < c->C; i++) {
        x = in[0][i];
        if (c->stop_grad && backward_slip("dinp is 0; sg(x) is a constant, but x itself still has "
                                          "derivative 1")) x = hold(x);
        out[i] = x - a * (stop ? hold(x) : x) - factor * da * hold(x);
        if (!stop && backward_slip("dinp is made of inp where stop_grad is 0"))
            out[i] *= hold(x) / c->out_weight[i];
        if (forward_slip("inp is not scaled at all")) out[i] = x;
        if (forward_slip("this is a(g) x; it must be x - a(g) x")) out[i] = a * x;
        if (forward_slip("inp is divided by 1 - a(g); it must be multiplied")) out[i] = x / (1 - a);
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
    double A = c->factor;
    if (slip("A is not used")) A = 1;
    if (slip("it is divided by A, not multiplied")) A = 1 / A;
    for (int i = 0; i < c->C; i++) {
        number x = in[0][i], b = in[1][i];
        out[i] = A * x + b;
        if (forward_slip("A scales the branch; it must scale the shortcut")) out[i] = x + A * b;
        if (forward_slip("A scales the branch too")) out[i] = A * (x + b);
        if (forward_slip("the branch is missing in the sum")) out[i] = A * x;
        if (forward_slip("the branch is subtracted; it must be added")) out[i] = A * x - b;
        if (forward_slip("out is written before shortcut is read: they may be the same array"))
            out[i] = A * (c->alias ? b : x) + b;
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
    int V = c->V, C = c->C;
    double factor = variant && !slip("it is not multiplied by sqrt(C)") ? sqrt(C) : 1;
    for (int n = 0; n < c->T; n++) {
        int v = c->tokens[n], later = 0;
        for (int m = n + 1; m < c->T; m++) later |= c->tokens[m] == v;
        if (slip("row n of the table in place of row tokens[n]")) v = n % V;
        int lost = backward_slip("of a token's several places only the last one counts") && later;
        for (int i = n * C; i < n * C + C; i++) {
            number x = v < V ? in[0][v * C + i - n * C] : NAN;
            out[i] = factor * (lost ? hold(x) : x);
        }
    }
}

static void adjust_embedding(Case *c, int k) {
    int first = below(9);
    for (int n = 0; n < c->T; n++) c->tokens[n] = k == 0 ? (first + 2 * n) % 9 : below(c->V - 1);
    if (k > 1) c->tokens[1] = c->tokens[0];
    if (k == 4) c->special = "a token occurs more than 8 times";
    if (k == 0) strcat(c->name, ", no token twice");
}

// ---- rmsnorm: in[0] x (N,C), in[1] the weight (C). After out (N,C) comes rstd (N).
static number norm_r(const number *x, const Case *c, int n) {
    int C = c->C, first = n, last = n, end = C - slip("the last channel is left out of the mean");
    end += slip("one channel too many in the mean: c < C");
    double eps = variant ? 1e-5 : 1e-6, count = C;
    number sum = 0;
    if (slip("r of row 0 is used for every row")) first = last = 0;
    if (slip("the sum of squares is not set to 0 for each row")) first = 0;
    int no_square = slip("the square is missing in the mean of x^2");
    int no_mean = slip("the mean is subtracted, as in LayerNorm; RMSNorm does not");
    for (int row = first; row <= last; row++) {
        for (int i = 0; i < end; i++) {
            number v = at_or_nan(x, (long)row * C + i, (size_t)c->T * C), mean = 0;
            for (int k = 0; k < C && no_mean; k++) mean += x[row * C + k] / C;
            sum += no_square ? v : (v - mean) * (v - mean);
        }
    }
    if (slip("the sum of the squares is not divided by C")) count = 1;
    if (slip("eps is missing under the root")) eps = 0;
    if (slip("eps is another one than in the comment")) eps = variant ? 1e-6 : 1e-5;
    number m = sum / count + eps;
    if (slip("eps belongs under the root")) return 1 / (csqrt(sum / count) + eps);
    if (slip("the square root is missing in r = 1 / sqrt(...)")) return 1 / m;
    if (slip("r is 1 / sqrt(...), not sqrt(...)")) return csqrt(m);
    return creal(m) < 0 ? NAN : 1 / csqrt(m);
}

// An element of the output, with the slopes of whoever makes a mistake in the backward pass.
static number norm_sloped(number x, number w, number r, int C) {
    number h = hold(r), d = r - h, second = w * x;  // second: of the term through r
    if (slip("r depends on every x of its row: the term through r is missing")) d = 0;
    if (slip("the sign of the term through r is wrong")) d = -d;
    if (slip("the factor r^2 is missing in the term through r")) d /= h * h;
    if (slip("one factor r is missing in the term through r")) d /= h;
    if (slip("the sum in the term through r is not divided by C")) d *= C;
    if (slip("the weight is missing in the sum of the term through r")) second = x;
    if (slip("x is missing in the sum of the term through r")) second = w;
    number direct = x * w * h;
    if (slip("the direct term, that with r held, is missing")) direct = hold(direct);
    if (slip("the factor r is missing in the direct term")) direct /= h;
    if (slip("the weight is missing in the direct term")) direct = x * h;
    if (slip("the weight is missing")) return x * r;
    if (slip("x is missing in dweight")) direct = w * h;
    return direct + hold(second) * d;
}

static void rmsnorm(number *out, number *const *in, const Case *c) {
    int C = c->C, own = slip("the sum over the block is missing: a thread uses its own part");
    for (int n = 0; n < c->T; n++) {
        number r = norm_r(in[0], c, n);
        for (int i = 0; i < C; i++) {
            number x = in[0][n * C + i], w = in[1][i], *y = &out[n * C + i], s = r;
            if (own) s = 1 / csqrt(x * x / C + 1e-6);
            *y = backward && (chosen || collecting) ? norm_sloped(x, w, s, C) : w * x * s;
            if (slip("the factor r is missing")) *y = w * x;
            if (forward_slip("weight is missing")) *y = x * r;
        }
        out[c->T * C + n] = r;
    }
}

static void adjust_rmsnorm(Case *c, int k) {
    for (int i = 0; i < c->T * c->C; i++)  // rows of different size
        c->in[0].x[i] = (float)(c->in[0].x[i] * (1 + 0.6 * (i / c->C % 6)) * (k == 4 ? 1e-3 : 1));
    c->scale = backward && c->C == 1;  // where dinp is next to 0
    if (k == 4) c->special = "the inputs are small";
}

// ---- rope: in[0] qkv (B,T,3C), in[1] the table (T,hs). factor -1: rotates the other way.
static void rope_pair(number *out, long first, int j, int t, number *const *in, const Case *c) {
    size_t n = c->out_size, size = input_size(&c->in[1]);
    int hs = c->C / c->NH, halves = slip("channel j is paired with j + hs/2, not with the next");
    long second = first + (halves ? hs / 2 : 1);
    long at = (long)t * hs + (slip("all pairs are rotated by the angle of the first") ? 0 : j);
    number cosine = at_or_nan(in[1], at, size), sine = at_or_nan(in[1], at + 1, size), x = cosine;
    if (slip("the cosine is used in place of the sine")) sine = cosine;
    int exchanged = slip("sine and cosine are exchanged; in the table the cosine comes first");
    if (exchanged) cosine = sine;
    if (exchanged) sine = x;
    sine *= c->factor;
    if (backward_slip("it is rotated the same way as in the forward pass")) sine /= c->factor;
    if (forward_slip("it is rotated the wrong way: the sign of the sine")) sine = -sine;
    long read = second + slip("the second of the pair is read one place too far");
    number x0 = out[first], x1 = at_or_nan(out, read, n), y0 = x0 * cosine - x1 * sine;
    if (slip("the sign of the sine in the first of the pair")) y0 = x0 * cosine + x1 * sine;
    if (slip("x0 is overwritten before the second line of the rotation reads it")) x0 = y0;
    number y1 = x0 * sine + x1 * cosine;
    if (slip("the sign of the sine in the second of the pair")) y1 = x1 * cosine - x0 * sine;
    if (slip("the sign of the cosine in the second of the pair")) y1 = x0 * sine - x1 * cosine;
    out[first] = y0;
    if (second < (long)n) out[second] = y1;
}

// In place, as the layer does it: so a pair that is read too late is what has been made of it.
static void rope(number *out, number *const *in, const Case *c) {
    int C = c->C, hs = C / c->NH, begin = 0, end = 2 * C;
    int step = slip("a row of qkv is 3 C long, not C") ? C : 3 * C;
    if (slip("only the queries are rotated; the keys are too")) end = C;
    if (slip("the values are rotated too; only queries and keys are")) end = 3 * C;
    int halves = slip("channel j is paired with j + hs/2, not with the next");
    int through = slip("the table's columns continue from head to head; each head begins with 0");
    for (size_t i = 0; i < c->out_size; i++) out[i] = in[0][i];
    for (int n = 0; n < c->B * c->T; n++) {
        int t = n % c->T;
        if (slip("the position is the row n; in each sequence it begins anew: n % T")) t = n;
        if (slip("the position is n % T, not n / T, which counts the sequences")) t = n / c->T;
        if (slip("the angles of position t + 1: off by one")) t++;
        for (int head = begin; head < end; head += hs) {
            for (int j = 0; j < hs; j += 2)
                rope_pair(out, (long)n * step + head + (halves ? j / 2 : j),
                          through ? head % C + j : j, t, in, c);
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
    double inside = variant ? 1.702 : 1;
    if (slip("the sigmoid is that of another multiple of h1")) inside = variant ? 1 : 1.702;
    number s = logistic(inside * a);
    if (slip("the sign inside of the sigmoid is wrong")) s = logistic(-inside * a);
    if (slip("sigmoid(h3) in place of sigmoid(h1)")) s = logistic(inside * b);
    if (slip("silu(h3) h1 in place of silu(h1) h3")) return a * b * logistic(inside * b);
    if (slip("sigmoid(h1) h3: the factor h1 is missing")) return s * b;
    if (slip("h1 h3: the sigmoid is missing")) return a * b;
    return slip("h1 sigmoid(h1): the factor h3 is missing") ? a * s : a * s * b;
}

// What a mistake in the backward pass adds to the slopes.
static number swiglu_sloped(number a, number b) {
    number h = hold(a), s = logistic(variant ? 1.702 * h : h), value = h * s, da = a - h;
    number d = (variant ? 1.702 : 1) * s * (1 - s), first = s, second = h * d, of_b = value;
    number right = (first + second) * da * hold(b) + of_b * (b - hold(b));
    if (slip("silu(h1) is a product: the term through the sigmoid is missing")) second = 0;
    if (slip("silu(h1) is a product: the term through its factor h1 is missing")) first = 0;
    if (slip("the factor h1 is missing in the term through the sigmoid")) second = d;
    if (slip("1 - sigmoid(h1) is missing in the sigmoid's slope")) second = h * d / (1 - s);
    if (slip("sigmoid(h1) is missing in the sigmoid's slope")) second = h * d / s;
    if (slip("the sign of the term through the sigmoid is wrong")) second = -second;
    if (slip("silu(h1) is used in place of its slope")) second = value - first;
    if (slip("the sigmoid is missing in dh3: it is dout silu(h1)")) of_b = h;
    if (slip("the factor h1 is missing in dh3: it is dout silu(h1)")) of_b = s;
    if (slip("h3 is used in place of h1 in dh3")) of_b = hold(b) * s;
    if (slip("the factor h3 is missing in dh1")) da /= hold(b);
    return (first + second) * da * hold(b) + of_b * (b - hold(b)) - right;
}

static void swiglu(number *out, number *const *in, const Case *c) {
    int H = c->C;
    for (int i = 0; i < c->T * H; i++) {
        int n = i / H, j = i % H;
        const number *row = in[0] + n * (slip("a row of inp is 2 H long, not H") ? H : 2 * H);
        number a = row[j], b = row[H + j];
        if (slip("h3 begins H places after h1, not 1")) b = row[j + 1];
        out[i] = swiglu_element(a, b);
        if (backward) out[i] += swiglu_sloped(a, b);
    }
}

// ---- matmul: in[0] x (N,C), in[1] the weight (OC,C).
static void matmul(number *out, number *const *in, const Case *c) {
    int C = c->C, OC = c->V;
    for (int n = 0; n < c->T; n++) {
        number sum = 0;
        for (int o = 0; o < OC; o++) {
            int end = C + slip("one channel too many in the sum: c < C");
            if (!slip("the sum is not set to 0 for each output")) sum = 0;
            for (int i = 0; i < end; i++)
                sum += at_or_nan(in[0], n * C + i, input_size(&c->in[0])) *
                       at_or_nan(in[1], o * C + i, input_size(&c->in[1]));
            out[n * OC + o] = sum;
        }
    }
}

// ---- attention: in[0] qkv (B,T,3C). After out (B,T-first,C) comes lse (B,NH,T-first). first is 0
// in all backward passes. The variant divides the scores by hs, as muP does.

// Where head h of part 0, 1 or 2 (q, k, v) of a row begins.
static const number *head_of(number *const *in, const Case *c, int b, int t, int part, int h) {
    int C = c->C, T = c->T, hs = C / c->NH, begin = part * C + h * hs;
    if (slip("all heads use what belongs to the first head")) begin = part * C;
    if (part == 0 && slip("keys are used as queries")) begin += C;
    if (slip("a row of qkv holds all queries, all keys, all values")) begin = (3 * h + part) * hs;
    if (c->first && slip("sequence b begins at row b T of qkv, not b (T - first)")) T -= c->first;
    return in[0] + (size_t)(b * T + t) * 3 * C + begin;
}

static number score(number *const *in, const Case *c, int b, int h, int t, int s) {
    int hs = c->C / c->NH, row = t;
    if (c->first && slip("first is missing: row i is the query of position first + i"))
        row -= c->first;
    const number *q = head_of(in, c, b, row, 0, h), *k = head_of(in, c, b, s, 1, h);
    double right = variant ? 1.0 / hs : 1 / sqrt(hs), scale = right, slope = right;
    number sum = 0;
    for (int i = 0; i < hs; i++) {
        number of_q = k[i], of_k = q[i];  // the slopes of the product
        if (backward_slip("dq is made of the queries; it is dS K")) of_q = q[i];
        if (backward_slip("dk is made of the keys; it is dS^T Q")) of_k = k[i];
        sum += hold(q[i] * k[i]) + I * (creal(of_q) * cimag(q[i]) + creal(of_k) * cimag(k[i]));
    }
    if (slip("the scores lack their scale")) scale = 1;
    if (slip("the scores are scaled by 1 / hs")) scale = 1.0 / hs;
    if (slip("the scores are scaled by 1 / sqrt(hs)")) scale = 1 / sqrt(hs);
    if (slip("the scores are scaled by 1 / sqrt(C), not by that of a head")) scale = 1 / sqrt(c->C);
    if (backward_slip("the scale is missing")) slope = 1;
    return backward ? scale * hold(sum) + slope * (sum - hold(sum)) : scale * sum;
}

static int sees(const Case *c, int t, int s) {
    if (slip("the causal mask is missing: a query sees later keys (future tokens)")) return 1;
    if (slip("the mask is off by one: a query sees the key after it (a future token)"))
        return s <= t + 1;
    if (slip("the mask is off by one: a query must see the key at its own position")) return s < t;
    if (slip("the mask is the wrong way round: a query sees the keys up to it")) return s >= t;
    if (c->first && slip("first is missing in the mask: row i sees all keys s <= first + i"))
        return s <= t - c->first;
    if (c->first && slip("the keys before position first are left out; every query sees them"))
        return s >= c->first && s <= t;
    return s <= t;
}

// Computes the weights P of a row. Returns lse.
static number softmax_row(number *P, number *const *in, const Case *c, int b, int h, int t) {
    number sum = 0, lse;
    double m = -INFINITY;
    for (int s = 0; s < c->T; s++) {
        P[s] = score(in, c, b, h, t, s);
        if (sees(c, t, s)) m = fmax(m, creal(P[s]));
    }
    for (int s = 0; s < c->T; s++) sum += P[s] = sees(c, t, s) ? cexp(P[s] - m) : 0;
    lse = m + clog(sum);
    if (forward_slip("lse = m + log(sum): m is missing")) lse -= m;
    if (forward_slip("lse = m + log(sum): the log is missing")) lse = m + sum;
    if (forward_slip("not divided by the row's sum: the softmax is not normalized")) sum = 1;
    for (int s = 0; s < c->T; s++) P[s] /= sum;
    return lse;
}

// P as it is computed from the right lse, sloped as by who makes a mistake in its gradient.
static void softmax_sloped(number *P, number *const *in, const Case *c, int b, int h, int t) {
    number total = 0, lse = 0, *S = room(c->T, sizeof *S);
    int no_lse = slip("P = e^(S - lse): lse is not subtracted");
    int no_P = slip("the factor P is missing in dS");
    int no_delta = slip("a term is missing in dS: a score acts on each P of its row");
    const char *made = chosen;
    for (int s = 0; s < c->T; s++) S[s] = score(in, c, b, h, t, s);
    chosen = NULL;
    for (int s = 0; s <= t; s++) lse += cexp(hold(score(in, c, b, h, t, s)));
    for (int s = 0; s < c->T; s++) P[s] = s <= t ? hold(cexp(score(in, c, b, h, t, s)) / lse) : 0;
    chosen = made;
    for (int s = 0; s < c->T; s++) {
        number dS = I * cimag(S[s]), M = sees(c, t, s) * hold(cexp(S[s]) / (no_lse ? 1 : lse));
        total += (no_P ? sees(c, t, s) : M) * dS;
        S[s] = M + (no_P ? sees(c, t, s) : M) * dS;
    }
    for (int s = 0; s < c->T; s++) P[s] = S[s] - !no_delta * P[s] * total;
    free(S);
}

static void attention(number *out, number *const *in, const Case *c) {
    int C = c->C, hs = C / c->NH, rows = c->T - c->first;
    number *P = room(c->T, sizeof *P);
    for (size_t i = 0; i < c->out_size; i++) out[i] = 0;
    for (int i = 0; i < c->B * c->NH * rows; i++) {
        int row = i % rows, h = i / rows % c->NH, b = i / rows / c->NH, t = c->first + row;
        if (c->first && slip("first is ignored: row i belongs to position first + i")) t = row;
        out[(size_t)c->B * rows * C + i] = softmax_row(P, in, c, b, h, t);
        if (backward && (chosen || collecting)) softmax_sloped(P, in, c, b, h, t);
        number *y = out + (size_t)(b * rows + row) * C + h * hs;
        if (forward_slip("out is written as (B,NH,T,hs); it is (B,T,C)")) y = out + (size_t)i * hs;
        for (int s = 0; s < c->T; s++) {
            const number *v = head_of(in, c, b, s, 2, h);
            for (int j = 0; j < hs && P[s] != 0; j++) y[j] += P[s] * v[j];
        }
    }
    free(P);
}

static void adjust_attention(Case *c, int k) {
    int hs = c->C / c->NH, n = c->T * 3 * c->C;
    double *x = c->in[0].x;
    c->tolerance = k == 5 || k == 6 ? 1e-3 : backward ? 2e-4 : 1e-4;
    c->scale = backward && (k == 0 || k == 5);  // where gradients are next to 0
    if (k == 5) c->special = "scores are large (is the largest one subtracted before the "
                             "exponential, and found where all are negative?)";
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
    int begin = slip("the first logit is left out"), end = c->V;
    if (slip("the last logit is left out")) end--;
    if (c->stride > c->V && slip("the padding, logits from V on, is in the sum")) end += -end & 3;
    double m = creal(x[0]);
    number sum = 0;
    for (int v = 0; v < c->V; v++) m = fmax(m, creal(x[v]));
    for (int v = begin; v < end; v++) sum += cexp(at_or_nan(x, v, rest) - m);
    if (slip("the log is missing: lse = largest + log(sum)")) return m + sum;
    if (slip("lse = largest + log(sum): the largest logit is missing")) return clog(sum);
    return m + clog(sum);
}

// What a mistake in the gradient adds to the slopes of the loss of row n. lse: that of the row.
static number cross_sloped(const number *x, double lse, int n, const Case *c) {
    int everywhere = slip("scale is subtracted at every logit; it belongs to the target's alone");
    int unscaled = slip("scale is missing at the target"), only = slip("the softmax lacks scale");
    int logit = slip("the logit itself is still in it: its place must be overwritten (=)");
    int plus = slip("the sign at the target is wrong");
    int early = slip("the target's logit is changed before the exponential reads it");
    int no_lse = slip("lse is not subtracted in the exponential");
    int replaced = slip("the target's softmax is overwritten; it must be reduced");
    double s = c->factor;
    number loss = 0;
    for (int v = 0; v < c->V; v++) {
        int target = v == c->tokens[n];
        double y = creal(x[v]), p = exp(no_lse ? y : y - lse);
        if (early && target) p = exp(y - s - lse) + 1;
        if (replaced && target) p = 0;
        double slope = p / (only ? s : 1) + (logit ? y / s : 0);
        if (target || everywhere) slope -= plus ? -1 : unscaled ? 1 / s : 1;
        loss += (slope - (exp(y - lse) - target)) * (x[v] - hold(x[v]));
    }
    return loss;
}

static void crossentropy(number *out, number *const *in, const Case *c) {
    int N = c->T, stride = c->stride;
    for (int n = 0; n < N; n++) {
        const number *x = in[0] + n * stride;
        int target = c->tokens[n];
        if (slip("the logit after the target's: off by one")) target++;
        int row_0 = slip("the target's logit is read from row 0 for every row");
        number lse = cross_lse(x, (long)(N - n) * stride, c);
        number logit = at_or_nan(in[0], target + (row_0 ? 0 : n * stride), (size_t)N * stride);
        out[n] = lse - logit;
        out[N + n] = lse;
        if (slip("the sign: loss = lse - logit of the target")) out[n] = logit - lse;
        if (slip("the term of the target's logit is missing")) out[n] = lse;
        if (slip("the term of lse, whose gradient is the softmax, is missing")) out[n] = -logit;
        if (forward_slip("the target's logit is added, not subtracted")) out[n] = lse + logit;
        if (forward_slip("each row has a loss of its own: no division by N")) out[n] /= N;
        if (backward_slip("lse of row 0 is used for every row"))
            out[n] = lse * cexp(hold(lse - cross_lse(in[0], (long)N * stride, c))) - logit;
        if (backward) out[n] += cross_sloped(x, creal(lse), n, c);
    }
}

static void adjust_crossentropy(Case *c, int k) {
    double *x = c->in[0].x;
    c->factor = backward ? (float)(0.3 + 0.1 * uniform()) : 1;
    c->tolerance = k == 4 ? 3e-4 : 1e-4;
    if (k == 4) c->special = "logits are large (is the largest one subtracted before the "
                             "exponential, and found where all are negative?)";
    for (int i = 0; i < c->T * c->stride && k == 4; i++)
        x[i] = (float)(x[i] + (i / c->stride % 2 ? -130 : 130));
    c->sampled = k == 6 ? room((size_t)c->T * c->stride, 1) : NULL;
    for (int i = 0; i < c->T * c->stride && k == 6; i += 601) c->sampled[i] = 1;
    for (int n = 0; n < c->T; n++)  // the first row's target is never the last logit
        c->tokens[n] = below(c->V - (n == 0 && c->V > 2));
}

// ---- adamw: no derivative here. in: p, m, v, grad (n). After p come m, v, and the copy of p.
static void adam_moments(double *m, double *v, double g, double b1, double b2) {
    double keep_m = b1, keep_v = b2, to_m = 1 - b1, to_v = 1 - b2, square = g * g;
    if (slip("the old m is multiplied by beta2; it is beta1")) keep_m = b2;
    if (slip("the old v is multiplied by beta1; it is beta2")) keep_v = b1;
    if (slip("the factor of the new gradient in m is 1 - beta1, not 1 - beta2")) to_m = 1 - b2;
    if (slip("the factor of the new square in v is 1 - beta2, not 1 - beta1")) to_v = 1 - b1;
    if (slip("the factor 1 - beta1 of the new gradient is missing")) to_m = 1;
    if (slip("the factor 1 - beta2 of the new square is missing")) to_v = 1;
    if (slip("the old m is not multiplied by beta1")) keep_m = 1;
    if (slip("the old v is not multiplied by beta2")) keep_v = 1;
    if (slip("the square is missing: v is a mean of the gradient squared")) square = g;
    *m = keep_m * *m + to_m * g;
    *v = keep_v * *v + to_v * square;
}

static void adam_element(double *p, double *m, double *v, double grad, const AdamWNumbers *a) {
    double b1 = a->beta1, b2 = a->beta2, lr = a->lr, eps = a->eps, t = a->t, x = *p, clip = a->clip;
    double decay = a->kind == MATRIX ? a->weight_decay : 0, m0 = *m;
    if (a->kind != MATRIX && slip("norms and gates decay too; only matrices do (chunk.decays)"))
        decay = a->weight_decay;
    if (a->kind == LEARNED_GATE && slip("a gate's gradient is clipped by gate_clip")) clip = -7;
    if (a->kind == FIXED_GATE && !slip("gates that are not trained must not change")) return;
    if (slip("clip is not used")) clip = 1;
    int l2 = slip("the decay is in the gradient (Adam with L2); AdamW's is separate from it");
    double g = grad * clip + (l2 ? decay * x : 0);
    int swapped = slip("beta1 and beta2 are exchanged");
    adam_moments(m, v, g, swapped ? b2 : b1, swapped ? b1 : b2);
    double mi = *m, vi = *v;
    if (slip("p uses m as it was before the update")) mi = m0;
    if (slip("the gradient is used in place of its running mean m")) mi = g;
    if (slip("t in beta^t is off by one: t - 1")) t--;
    if (slip("t in beta^t is off by one: t + 1")) t++;
    double cm = 1 - pow(b1, t), cv = 1 - pow(b2, t), of_m = cm;
    if (slip("beta1^t is off by one in t: t + 1")) cm = 1 - pow(b1, t + 1);
    if (slip("mhat = m / (1 - beta1^t): m is used without its correction")) cm = 1;
    if (slip("vhat = v / (1 - beta2^t): v is used without its correction")) cv = 1;
    if (slip("m and v are used without their corrections 1 / (1 - beta^t)")) cm = cv = 1;
    if (slip("the correction of m is made with beta2; it is beta1")) cm = cv;
    if (slip("the correction of v is made with beta1; it is beta2")) cv = of_m;
    double mhat = mi / cm, vhat = vi / cv, root = sqrt(vhat) + eps, decayed = l2 ? 0 : decay * x;
    if (slip("eps is under the root; it must be added to the root")) root = sqrt(vhat + eps);
    if (slip("eps is missing")) root = sqrt(vhat);
    if (slip("the square root of vhat is missing")) root = vhat + eps;
    if (slip("the correction of v belongs under the root: sqrt(vhat)")) root = sqrt(vi) / cv + eps;
    if (slip("the weight decay is missing")) decayed = 0;
    if (slip("the sign of the weight decay is wrong")) decayed = -decayed;
    if (slip("the weight decay is not multiplied by lr")) decayed /= lr;
    double step = mhat / root;
    if (slip("the sign: p must go down the gradient (p -= ...)")) step = -step;
    if (slip("the step is not multiplied by lr")) step /= lr;
    if (slip("the signs: p must go down the gradient, and decay (p -= ...)")) lr = -lr;
    *p = x - lr * (step + decayed);
}

static void adamw(number *out, number *const *in, const Case *c) {
    int n = c->C;
    for (int i = 0; i < n; i++) {
        double p = creal(in[0][i]), m = creal(in[1][i]), v = creal(in[2][i]);
        adam_element(&p, &m, &v, creal(in[3][i]), &c->adam);
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
    int N = c->T, C = c->C, n = N * C, stop = c->stop_grad;
    number inp_a = c->no_gate ? 0 : activation(in[3][!c->norm_last], SILU);
    number sum_a = c->no_gate || c->norm_last ? 0 : activation(in[3][0], SILU);
    double A = forward_slip("the factor A of the shortcut is missing") ? 1 : c->factor;
    int no_A = backward_slip("the factor A is missing in dz, the gradient of what A multiplies");
    if (backward_slip("scaled by 1 - a(g), which the stop-gradient forbids")) stop = 0;
    if (backward_slip("not scaled by 1 - a(g), though stop_grad is 0")) stop = 1;
    if (forward_slip("inp is not multiplied by 1 - a(g) of inp_gate")) inp_a = 0;
    if (forward_slip("inp lacks both factors, A and 1 - a(g) of inp_gate")) inp_a = 1 - 1 / A;
    if (forward_slip("what the norm gets is not multiplied by 1 - a(g) of sum_gate")) sum_a = 0;
    int stored = forward_slip("sum is stored after the GPAS of sum_gate; it must be before");
    int scaled = backward_slip("dgate is made of what GPAS returns; it must be of what it gets");
    for (int row = 0; row < N; row++) {
        number squares = 0;
        for (int i = row * C; i < (row + 1) * C; i++) {
            number x = in[0][i], z = x - hold(inp_a) * (stop ? hold(x) : x);
            z -= (inp_a - hold(inp_a)) * hold(x) * (scaled ? 1 - hold(inp_a) : 1);
            number s = A * z + in[1][i], y;
            if (no_A) s = hold(s) + I * cimag(z + in[1][i]);
            y = s - hold(sum_a) * (stop ? hold(s) : s);
            y -= (sum_a - hold(sum_a)) * hold(s) * (scaled ? 1 - hold(sum_a) : 1);
            out[i] = stored ? y : s;
            out[n + i] = y;
            squares += y * y;
        }
        number r = 1 / csqrt(squares / C + (variant ? 1e-5 : 1e-6));
        if (backward_slip("the norm's backward pass lacks the term through r")) r = hold(r);
        out[3 * n + row] = r;
        for (int i = 0; i < C; i++) out[2 * n + row * C + i] = in[2][i] * out[n + row * C + i] * r;
    }
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
     {{1, 5, 7, 1, 9}, {1, 1, 7, 1, 3}, {1, 6, 1, 1, 4}, {1, 9, 301, 1, 5}, {1, 33, 8, 1, 5}},
     {{"weight", "VC"}}, "dout", {{"out", "NC", 4, OUTPUT}}, {{"dweight", "VC", 6, 0, 1}}},
    {"rmsnorm", rmsnorm, adjust_rmsnorm, {7, 7, 8, 8}, "TC",
     {{1, 5, 7}, {1, 1, 7}, {1, 4, 1}, {1, 2, 301}, {1, 4, 8}, {1, 1, 1}, {1, 3, 40}, {1, 2100, 2}},
     {{"inp", "NC"}, {"weight", "1C"}}, "dout",
     {{"out", "NC", 3, OUTPUT}, {"rstd", "N1", 1, OUTPUT}},
     {{"dinp", "NC", 4, 0}, {"dweight", "1C", 2, 1, 1}}},
    {"rope", rope, adjust_rope, {5, 5, 5, 5}, "BTCN",
     {{1, 5, 4, 1}, {1, 1, 4, 1}, {1, 5, 12, 3}, {2, 5, 4, 1}, {2, 3, 258, 43}},
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
                  .rows = rows, .columns = columns, .pitch = pitch,
                  .scale = of < 1 ? c->scale : 0,
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
    int *tokens = (int *)array(c, "tokens", NULL, c->T + 64, 0);  // behind them, one too large
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

// Is case i right if it is called first? Then something is kept between calls.
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

// Writes the line of result k of n cases, and says what is wrong with it.
static void report(int layer, int n, int k) {
    char hint[HINT] = "", bad[MAX_CASES];
    const Result *r = &cases[0].results[k];
    int num_bad = 0;
    for (int i = 0; i < n; i++) {
        const Result *s = &cases[i].results[k];
        bad[i] = s->points ? s->num_wrong > 0 : ABSENT;
        num_bad += bad[i] == 1;
    }
    if (num_bad && is_untouched(n, k, 0)) strcpy(hint, "nothing is written");
    else if (num_bad) {
        int first = (int)((char *)memchr(bad, 1, n) - bad);
        describe_cases(hint, n, bad, 0);
        if (explain(layers[layer].f, n, k, first, hint + strlen(hint))) strcat(hint, "; ");
        else if (first > 0 && is_right_alone(layer, first, k))
            strcpy(hint, "right in the first call, not after another: is something static? ");
        else describe_cases(hint, n, bad, 1);
        describe_elements(hint + strlen(hint), &cases[first].results[k], &cases[first]);
    }
    printf("result\t%s\t%d\t%d\t%s\n", r->name, r->points, num_bad ? 0 : r->points, hint);
}

// Complaints about memory cost all points, for then the process is no longer what it should be.
static int report_complaints(int n) {
    char bad[MAX_CASES], where[HINT];
    for (int i = 0; i < n; i++) {
        check_arrays(&cases[i]);
        bad[i] = *cases[i].complaint != 0;
    }
    char *first = memchr(bad, 1, n);
    if (!first) return 0;
    describe_cases(where, n, bad, 1);
    printf("memory\t%s%s (%s)\n", where, cases[first - bad].complaint, cases[first - bad].name);
    return 1;
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
    int returned = call_cases(layer, n), broken = report_complaints(returned);
    for (int i = 0; i < returned; i++) {
        for (int k = 0; k < cases[i].num_results; k++) compare(&cases[i].results[k], &cases[i], f);
    }
    for (int k = 0; k < cases[0].num_results; k++) {
        const Result *r = &cases[0].results[k];
        if (returned && !broken) report(layer, returned, k);
        else printf("result\t%s\t%d\t0\t\n", r->name, r->points);
    }
    puts("done");
    return 0;
}
