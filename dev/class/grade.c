/*
grade.c: is a layer right, and if not, what is wrong with it?

    grade LAYER forward|backward SEED

writes a line per case, `case NAME`, and after it for each wrong result `wrong WHAT HINT`, with tabs
between. grade.py runs it, and may have to kill it: a submission may do anything in here.

    1  Reference       each layer as its plain definition, over complex numbers
    2  Explaining      from a wrong result to what a tutor would say about it
    3  Layers          for each layer the cases, and the mistakes one makes there

No derivative is written down here. A definition f is evaluated at x + ih with h = 1e-30: the
imaginary part of the result is h f'(x), exact to the last digit, since nothing is subtracted (the
complex step). Where a derivative must not look, hold() drops the imaginary part: so GPAS's
stop-gradient is one word in its definition. The same trick finds mistakes: a definition with one
part held, or with something else wrong in it, has just the derivative of someone who forgot it.
*/
#include <complex.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include "grade.h"

typedef double complex number;

enum { SILU, IDENTITY, RELU, LEAKY_RELU, TANH };
enum { GUARD = 1024, MAX_WATCHED = 16, MEGABYTES = 512 };

static uint64_t seed;
static FILE *results;
static int num_complaints;

static void *room(size_t count, size_t size) {
    void *p = calloc(count + 1, size);
    if (!p) exit(9);
    return p;
}

// Uniform in [-1, 1).
static double uniform(void) {
    uint64_t z = (seed += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return ((z ^ (z >> 31)) >> 11) / 0x1p52 - 1;
}

// Numbers that float can hold, none of them near 0 (where a mistake would not show).
static double *numbers(size_t n, double size) {
    double *x = room(n, sizeof *x);
    for (size_t i = 0; i < n; i++) {
        double u = uniform();
        x[i] = (float)(size * (u + (u < 0 ? -0.2 : 0.2)));
    }
    return x;
}

/* ------------------------------------------------------------------------------------------------
1. Reference
*/

// The sizes of a case and the inputs of the layer's definition.
typedef struct {
    const char *name;
    int B, T, C, NH;      // rows are B T; where there are only rows, B is 1
    int first;            // attention alone: the position of the first query
    int K;                // H, OC or V
    int act, stop_grad;
    double factor;        // A, scale
    const int *tokens;    // or targets
    double *in[3];
    size_t size[3], out_size;
    const char *names[3];     // of the inputs; an input without rows is none that is read
    int rows[3], sections;    // a row of in[0] is so many equal parts, with names
    const char *parts[3];
    const char *dout;         // its name, if it is another
} Case;

// An input (rows,columns) of new numbers.
static void add_input(Case *c, int k, const char *name, int rows, int columns, double size) {
    c->size[k] = (size_t)rows * columns, c->in[k] = numbers(c->size[k], size);
    c->names[k] = name, c->rows[k] = rows;
}

// out = f(in), or what one gets who makes the mistake `wrong` (0: none).
typedef void (*Definition)(number *out, number *const *in, const Case *c, int wrong);

static number hold(number x) { return creal(x); }

static double *evaluate(Definition f, const Case *c, int wrong) {
    number *in[3] = {NULL}, *out = room(c->out_size, sizeof *out);
    double *result = room(c->out_size, sizeof *result);
    for (int k = 0; k < 3; k++) {
        in[k] = room(c->size[k], sizeof(number));
        for (size_t i = 0; i < c->size[k]; i++) in[k][i] = c->in[k][i];
    }
    f(out, in, c, wrong);
    for (size_t i = 0; i < c->out_size; i++) result[i] = creal(out[i]);
    for (int k = 0; k < 3; k++) free(in[k]);
    free(out);
    return result;
}

// The gradient of sum(out * dout) with respect to in[which], by complex steps.
static double *differentiate(Definition f, const Case *c, int which, const double *dout,
                             int wrong) {
    const double h = 1e-30;
    number *in[3] = {NULL}, *out = room(c->out_size, sizeof *out);
    double *result = room(c->size[which], sizeof *result);
    for (int k = 0; k < 3; k++) {
        in[k] = room(c->size[k], sizeof(number));
        for (size_t i = 0; i < c->size[k]; i++) in[k][i] = c->in[k][i];
    }
    for (size_t i = 0; i < c->size[which]; i++) {
        number x = in[which][i];
        in[which][i] = x + I * h;
        f(out, in, c, wrong);
        for (size_t j = 0; j < c->out_size; j++)  // where there is none, a NaN does not matter
            if (cimag(out[j]) != 0) result[i] += dout[j] * (cimag(out[j]) / h);
        in[which][i] = x;
    }
    for (int k = 0; k < 3; k++) free(in[k]);
    free(out);
    return result;
}

/* ------------------------------------------------------------------------------------------------
The arrays that a submission gets: float, between guards that hold NaN. Who reads a guard gets NaN,
who writes one is noticed, and so is who changes what he should only read.
*/

typedef struct {
    const char *name;
    float *x;
    size_t n;
    float *before;  // what it held
    int may_change;
} Watched;
static Watched watched[MAX_WATCHED];
static int num_watched;
static const uint32_t guard_bits = 0x7FC5A500;  // plus the array's number

static float *watch(const char *name, size_t n, int may_change) {
    float *base = aligned_alloc(64, ((n + 2 * GUARD) * sizeof(float) / 64 + 1) * 64);
    if (!base) exit(9);
    uint32_t bits = guard_bits + num_watched;  // so that a copied guard is noticed too
    for (size_t i = 0; i < n + 2 * GUARD; i++) memcpy(base + i, &bits, sizeof bits);
    watched[num_watched++] = (Watched){name, base + GUARD, n, NULL, may_change};
    return base + GUARD;
}

// An array that is only read.
static float *input(const char *name, const double *x, size_t n) {
    float *array = watch(name, n, 0);
    for (size_t i = 0; i < n; i++) array[i] = (float)x[i];
    return array;
}

// An array to write or to add to: what it holds before is some numbers, not 0.
static float *output(const char *name, size_t n) {
    double *old = numbers(n, 0.7);
    float *array = input(name, old, n);
    watched[num_watched - 1].may_change = 1;
    free(old);
    return array;
}

// An array that is read and then overwritten.
static float *in_place(const char *name, const double *x, size_t n) {
    float *array = input(name, x, n);
    watched[num_watched - 1].may_change = 1;
    return array;
}

// Token numbers behind which stands one that is too large.
static int *token_numbers(const int *tokens, int n, int V) {
    int *array = room(n + 64, sizeof(int));
    for (int i = 0; i < n + 64; i++) array[i] = i < n ? tokens[i] : V;
    return array;
}

static float *copy_of(const float *x, size_t n) {
    return memcpy(room(n, sizeof *x), x, n * sizeof *x);
}

static void begin_case(const Case *c) {
    fprintf(results, "case\t%s\n", c->name);
    fflush(results);
    num_watched = 0;
}

// After the arrays are made, before the call.
static void remember(void) {
    for (Watched *w = watched; w < watched + num_watched; w++) {
        w->before = copy_of(w->x, w->n);
    }
}

__attribute__((format(printf, 2, 3)))
static void wrong(const char *what, const char *format, ...) {
    va_list args;
    num_complaints++;
    va_start(args, format);
    fprintf(results, "wrong\t%s\t", what);
    vfprintf(results, format, args);
    fputc('\n', results);
    fflush(results);
    va_end(args);
}

// What was written that should not have been? Returns how many complaints there were.
static int check_watched(void) {
    int complaints = 0;
    for (Watched *w = watched; w < watched + num_watched; w++) {
        uint32_t bits = guard_bits + (uint32_t)(w - watched);
        for (long i = -GUARD; i < (long)w->n + GUARD; i++) {
            if (i == 0) i = (long)w->n;
            if (memcmp(w->x + i, &bits, sizeof bits) == 0) continue;
            wrong(w->name, "writes outside of the array: to %s[%ld], which has %zu elements; check "
                  "loop bounds and row lengths", w->name, i, w->n);
            complaints++;
            break;
        }
        for (size_t i = 0; !w->may_change && i < w->n; i++)
            if (memcmp(w->x + i, w->before + i, sizeof(float)) != 0) {
                wrong(w->name, "%s is only to be read, but %s[%zu] was changed", w->name, w->name,
                      i);
                complaints++;
                break;
            }
    }
    return complaints;
}

static const float *before(const float *x) {
    for (Watched *w = watched; w < watched + num_watched; w++)
        if (w->x == x) return w->before;
    exit(8);  // a result that is no watched array
}

/* ------------------------------------------------------------------------------------------------
2. Explaining

A wrong result is compared with what known mistakes give. Three kinds of them:

    hypotheses   whole arrays, each the result of one mistake
    quantities   numbers by which the result, or one of the terms it is the sum of, may have been
                 multiplied or not: a product of two powers of them is looked for
    terms        result = term + term: one of them may be missing, have the wrong sign or factor

If nothing fits everywhere, the places where the result is wrong are looked at by themselves: "only
the last row", "every second channel".
*/
enum { MAX_HYPOTHESES = 600, MAX_QUANTITIES = 12, MAX_TERMS = 4, HINT_SIZE = 600 };

typedef struct { const char *text; const double *values; } Named;
typedef struct { const char *text; double value; } Constant;

typedef struct {
    const char *name;
    const float *got;
    const double *expected;   // of an array that is added to: what is added
    int adds;                 // else it is written
    int in_place;             // what it held before is an input: no talk of accumulating
    size_t n;
    int rows, columns;
    const char *row, *column; // what they are
    int sections;             // the columns are so many equal parts, with names
    const char *section_names[3];
    double scale, tolerance;  // 0: the expected values' size, 1e-4
    Named hypotheses[MAX_HYPOTHESES], quantities[MAX_QUANTITIES], terms[MAX_TERMS];
    int num_hypotheses, num_quantities, num_terms;
    Constant constants[8];
    int num_constants;
    // Set by compare():
    double *value;            // got, minus what was there before where it adds
    char *is_wrong;
    size_t num_wrong;
} Result;

static void add_hypothesis(Result *r, const char *text, const double *values) {
    if (r->num_hypotheses < MAX_HYPOTHESES)
        r->hypotheses[r->num_hypotheses++] = (Named){text, values};
}

static void add_quantity(Result *r, const char *text, const double *values) {
    if (r->num_quantities < MAX_QUANTITIES)
        r->quantities[r->num_quantities++] = (Named){text, values};
}

static void add_constant(Result *r, const char *text, double value) {
    if (r->num_constants < 8 && fabs(value - 1) > 1e-2)
        r->constants[r->num_constants++] = (Constant){text, value};
}

static void add_term(Result *r, const char *text, const double *values) {
    r->terms[r->num_terms++] = (Named){text, values};
}

static Result result_of(const char *name, const float *got, const double *expected, int adds,
                        int rows, int columns, const char *row, const char *column) {
    Result r;
    memset(&r, 0, sizeof r);
    r.name = name, r.got = got, r.expected = expected, r.adds = adds;
    r.rows = rows, r.columns = columns, r.row = row, r.column = column;
    r.n = (size_t)rows * columns;
    return r;
}

static double size_of(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sqrt(sum / (n ? n : 1));
}

// Marks what is wrong; returns how much is.
static size_t compare(Result *r) {
    const float *old = before(r->got);
    double scale = r->scale ? r->scale : size_of(r->expected, r->n);
    double tolerance = r->tolerance ? r->tolerance : 1e-4;
    r->scale = scale > 0 ? scale : 1e-3;
    r->value = room(r->n, sizeof(double)), r->is_wrong = room(r->n, 1), r->num_wrong = 0;
    for (size_t i = 0; i < r->n; i++) {
        r->value[i] = (double)r->got[i] - (r->adds ? old[i] : 0);
        double allowed = tolerance * (r->scale + fabs(r->expected[i])) + (r->adds ? 1e-6 : 0);
        r->is_wrong[i] = !(fabs(r->value[i] - r->expected[i]) <= allowed);
        r->num_wrong += r->is_wrong[i];
    }
    return r->num_wrong;
}

// Where a hypothesis must hold: everywhere; only where the result is wrong; there, but for what is
// NaN or infinite, because something outside of an input was read.
enum { WRONG_PLACES, EVERYWHERE, FINITE_PLACES };

// Does x = factor * y hold there?
static int equals(const Result *r, const double *x, const double *y, double factor, int where) {
    double tolerance = r->n == 1 ? 1e-4 : 5e-4;
    size_t seen = 0;
    for (size_t i = 0; i < r->n; i++) {
        if (where != EVERYWHERE && !r->is_wrong[i]) continue;
        if (where == FINITE_PLACES && !isfinite(x[i])) continue;
        double z = factor * y[i];
        seen += isfinite(z) && r->is_wrong[i];
        double allowed = tolerance * (fabs(z) + (r->n == 1 ? 0 : 0.5 * r->scale)) +
                         1e-7 * r->scale + (r->adds ? 1e-6 : 0);
        if (!isfinite(x[i]) && !isfinite(z)) continue;
        if (!isfinite(z) || !(fabs(x[i] - z) <= allowed)) return 0;
    }
    return seen >= (where == FINITE_PLACES ? 3 : 1);
}

// The factor between x and y that fits best there.
static double ratio(const Result *r, const double *x, const double *y, int where) {
    double xy = 0, yy = 0;
    for (size_t i = 0; i < r->n; i++)
        if (where == EVERYWHERE || r->is_wrong[i]) xy += x[i] * y[i], yy += y[i] * y[i];
    return yy > 0 ? xy / yy : 0;
}

static int near(double a, double b) { return fabs(a - b) <= 1e-3 * fabs(b); }

// Says what the factor k is, if it is known: 2, C, 1 / C, ... Returns whether it is.
static int name_factor(const Result *r, double k, char *text) {
    for (int sign = 1; sign >= -1; sign -= 2)
        for (int i = 0; i < r->num_constants; i++) {
            double c = r->constants[i].value;
            const char *s = sign < 0 ? ", and the sign is wrong" : "";
            if (near(sign * k, c * c) || near(sign * k, 1 / (c * c)))
                return sprintf(text, "%s %s = %.4g%s", near(sign * k, c * c)
                               ? "multiplied, in place of divided, by (or once too often by)"
                               : "divided, in place of multiplied, by", r->constants[i].text, c, s);
            if (near(sign * k, c))
                return sprintf(text, "too large by the factor %s = %.4g%s", r->constants[i].text, c,
                               s);
            if (near(sign * k, 1 / c))
                return sprintf(text, "the factor %s = %.4g is missing%s", r->constants[i].text, c,
                               s);
        }
    return 0;
}

// Is x a multiple of y by a factor that is the same everywhere? Then says so. With `known` the
// factor must be one that has a name.
static int constant_factor(const Result *r, const double *x, const double *y, int where, int known,
                           char *text) {
    double k = ratio(r, x, y, where);
    size_t n = where == EVERYWHERE ? r->n : r->num_wrong;
    if (equals(r, x, y, -1, where)) return sprintf(text, "it has the wrong sign");
    if (size_of(y, r->n) < 1e-9 || !isfinite(k) || fabs(k) < 1e-4 || near(k, 1)) return 0;
    if (!equals(r, x, y, k, where)) return 0;
    if (known) return name_factor(r, k, text);
    if (fabs(k) > 1e4) return 0;
    if (n < 3 && !near(fabs(k), 2) && !near(fabs(k), 0.5)) return 0;
    return sprintf(text, "it is off by the constant factor %.5g", k);
}

static void describe_power(char *text, const char *name, int power) {
    if (power > 0)
        sprintf(text, "the factor %s%s is too much", name, power > 1 ? " squared" : "");
    else
        sprintf(text, "the factor %s%s is missing", name, power < -1 ? " squared" : "");
}

static double power_of(double x, int power) {
    if (power == 0) return 1;
    if (power < 0) return 1 / power_of(x, -power);
    return power == 1 ? x : x * x;
}

// Is x = k y p^a q^b for two of the quantities, small a and b, and some k?
static int quantity_factor(const Result *r, const double *x, const double *y, int where,
                           char *text) {
    double *z = room(r->n, sizeof *z);
    char one[200], two[200];
    for (int pass = 0; pass < 3; pass++)  // one quantity; two; one and a constant
        for (int p = 0; p < r->num_quantities; p++)
            for (int q = 0; q < (pass == 1 ? p : 1); q++)
                for (int powers = 0; powers < 4; powers++) {
                    static const int of_one[] = {-1, 1, -2, 2};
                    int a = pass == 1 ? powers % 2 * 2 - 1 : of_one[powers];
                    int b = pass == 1 ? powers / 2 * 2 - 1 : 0;
                    for (size_t i = 0; i < r->n; i++)
                        z[i] = y[i] * power_of(r->quantities[p].values[i], a) *
                               power_of(r->quantities[q].values[i], b);
                    double k = pass == 2 ? ratio(r, x, z, where) : 1;
                    if (pass == 2 && (r->n == 1 || !isfinite(k) || fabs(k) < 1e-4 ||
                                      equals(r, z, y, ratio(r, z, y, where), where)))
                        continue;
                    int sign = equals(r, x, z, k, where) ? 1 : -1;
                    if (sign < 0 && !equals(r, x, z, -k, where)) continue;
                    describe_power(one, r->quantities[p].text, a);
                    describe_power(two, r->quantities[q].text, b);
                    sprintf(text, "%s%s%s", one, b ? ", and " : "", b ? two : "");
                    if (pass == 2)
                        sprintf(text + strlen(text), ", and it is off by %.4g", sign * k);
                    else if (sign < 0) strcat(text, ", and the sign is wrong");
                    free(z);
                    return 1;
                }
    free(z);
    return 0;
}

// A factor that is the same along each row but differs from row to row: then a sum over the row, or
// something that belongs to the row, is wrong.
static int row_factor(const Result *r, const double *x, const double *y, char *text) {
    int counted = 0;
    for (int row = 0; row < r->rows; row++) {
        const double *a = x + (size_t)row * r->columns, *b = y + (size_t)row * r->columns;
        const char *bad = r->is_wrong + (size_t)row * r->columns;
        double ab = 0, bb = 0;
        int n = 0;
        for (int i = 0; i < r->columns; i++)
            if (bad[i]) ab += a[i] * b[i], bb += b[i] * b[i], n++;
        for (int i = 0; i < r->columns; i++)
            if (bad[i] && !(fabs(a[i] - ab / bb * b[i]) <= 1e-3 * (fabs(b[i]) + 0.3 * r->scale)))
                return 0;
        counted += n > 2;
    }
    return counted < 2 ? 0 : sprintf(text, "off by a factor that differs from one %s to the next: "
                                     "look at what is summed, or divided by, once per %s", r->row,
                                     r->row);
}

static int explain_terms(const Result *r, int where, char *hint) {
    double *x = room(r->n, sizeof *x);
    char text[400];
    int found = 0;
    for (int t = 0; t < r->num_terms && !found; t++) {
        const double *term = r->terms[t].values;
        for (size_t i = 0; i < r->n; i++) x[i] = r->value[i] - (r->expected[i] - term[i]);
        double *zero = room(r->n, sizeof *zero);
        if (equals(r, x, zero, 1, where))
            found = sprintf(hint, "a term is missing: %s", r->terms[t].text);
        else if (constant_factor(r, x, term, where, 1, text) ||
                 quantity_factor(r, x, term, where, text) ||
                 constant_factor(r, x, term, where, 0, text) ||
                 (where == WRONG_PLACES && row_factor(r, x, term, text)))
            found = sprintf(hint, "one term is wrong (%s): %s", r->terms[t].text, text);
        free(zero);
    }
    free(x);
    return found;
}

// Was something written that should have been added, or not written at all?
static int explain_writing(const Result *r, int where, char *hint) {
    const float *old = before(r->got);
    double *then = room(r->n, sizeof *then), *zero = room(r->n, sizeof *zero);
    double *sum = room(r->n, sizeof *sum), *set = room(r->n, sizeof *set), more = 0;
    double *minus = room(r->n, sizeof *minus), *shifted = room(r->n, sizeof *shifted);
    int found = 0;
    for (size_t i = 0; i < r->n; i++)
        if (r->is_wrong[i]) more += (r->value[i] - r->expected[i]) / r->num_wrong;
    for (size_t i = 0; i < r->n; i++) {
        then[i] = old[i];
        sum[i] = then[i] + r->expected[i], set[i] = r->expected[i] - then[i];
        minus[i] = then[i] - r->expected[i], shifted[i] = r->expected[i] + more;
    }
    if (equals(r, r->value, r->adds ? zero : then, 1, where))
        found = sprintf(hint, "nothing is %s there: it holds what it held before the call",
                        r->adds ? "added" : "written");
    else if (r->adds && equals(r, r->value, set, 1, where))
        found = sprintf(hint, "it is overwritten; the gradient of a parameter must be added with "
                        "+=, for it is summed over micro-batches");
    else if (!r->adds && !r->in_place && equals(r, r->value, sum, 1, where))
        found = sprintf(hint, "it adds to what was there (+=); it must write (=)");
    else if (!r->adds && !r->in_place && equals(r, r->value, minus, 1, where))
        found = sprintf(hint, "it subtracts from what was there (-=); it must write (=)");
    else if (r->num_wrong > 2 && equals(r, r->value, shifted, 1, where))
        found = sprintf(hint, "%.4g too %s everywhere: does each sum begin at 0?", fabs(more),
                        more > 0 ? "large" : "small");
    free(then), free(zero), free(sum), free(set), free(minus), free(shifted);
    return found;
}

static int explain_hypotheses(const Result *r, int where, int sign, char *hint) {
    for (int h = 0; h < r->num_hypotheses; h++)
        if (equals(r, r->value, r->hypotheses[h].values, sign, where))
            return sprintf(hint, "%s%s", sign < 0 ? "wrong sign, and: " : "",
                           r->hypotheses[h].text);
    return 0;
}

static int explain_values(const Result *r, int where, char *hint) {
    const double *x = r->value, *y = r->expected;
    int quantities_first = r->num_terms < 2 || (where == WRONG_PLACES && r->num_wrong > 1);
    return explain_writing(r, where, hint) ||
           (equals(r, x, y, -1, where) && sprintf(hint, "it has the wrong sign")) ||
           (where == EVERYWHERE && explain_hypotheses(r, where, 1, hint)) ||
           (!r->adds && equals(r, x, y, 0, where) && sprintf(hint, "it is all zeros")) ||
           constant_factor(r, x, y, where, 1, hint) ||
           (quantities_first && quantity_factor(r, x, y, where, hint)) ||
           constant_factor(r, x, y, where, 0, hint) ||
           (where != EVERYWHERE && explain_hypotheses(r, where, 1, hint)) ||
           explain_terms(r, where, hint) || quantity_factor(r, x, y, where, hint) ||
           (where == WRONG_PLACES && row_factor(r, x, y, hint)) ||
           explain_hypotheses(r, where, -1, hint);
}

// Section by section: dq, dk, dv.
static int explain_sections(const Result *whole, char *hint) {
    Result r = *whole;
    int width = r.sections ? r.columns / r.sections : 1, found = 0;
    r.is_wrong = room(r.n, 1);
    for (int s = 0; s < r.sections; s++) {
        char text[1000] = "";
        r.num_wrong = 0;
        for (size_t i = 0; i < r.n; i++) {
            r.is_wrong[i] = (int)(i % r.columns / width) == s && whole->is_wrong[i];
            r.num_wrong += r.is_wrong[i];
        }
        if (r.num_wrong && explain_values(&r, WRONG_PLACES, text))
            sprintf(hint + strlen(hint), "%s%s: %s", found++ ? "; " : "", r.section_names[s], text);
    }
    return found;
}

// The right numbers at the wrong places?
static int explain_places(const Result *r, char *hint) {
    int rows = r->rows, columns = r->columns;
    double *moved = room(r->n, sizeof *moved);
    int found = 0;
    for (int shift = -1; shift <= 1 && !found && r->n > 2; shift += 2) {
        int good = 1;
        for (size_t i = 1; i + 1 < r->n; i++)
            good = good && fabs(r->value[i] - r->expected[i + shift]) <= 1e-3 * r->scale;
        if (good) found = sprintf(hint, "each number stands one place %s", shift < 0 ? "late"
                                                                                      : "early");
    }
    for (size_t i = 0; i < r->n; i++) moved[i] = r->expected[i % rows * columns + i / rows];
    if (!found && rows > 1 && columns > 1 && equals(r, r->value, moved, 1, 1))
        found = sprintf(hint, "the indices are transposed: rows and columns are exchanged");
    for (int k = 0; k < 4 && !found && rows > 1; k++) {
        int steps[] = {0, 1, rows, columns / 2}, step = steps[k];
        if (step >= columns) continue;
        for (size_t i = 0; i < r->n; i++) moved[i] = r->adds ? 0 : before(r->got)[i];
        for (size_t i = 0; i < r->n; i++) {
            double *to = moved + i / columns * step + i % columns;
            *to = r->expected[i] + (r->adds ? *to : 0);
        }
        if (equals(r, r->value, moved, 1, EVERYWHERE))
            found = step ? sprintf(hint, "%s n is written from element %d n on; it begins at %d n",
                                   r->row, step, columns)
                         : sprintf(hint, "every %s is written to the first one", r->row);
    }
    for (size_t i = 0; i < r->n; i++) {
        int c = (int)(i % columns);
        moved[i] = r->expected[i - c + (c + columns / 2) % columns];
    }
    if (!found && columns > 1 && columns % 2 == 0 && equals(r, r->value, moved, 1, 1))
        found = sprintf(hint, "the two halves of each row are exchanged");
    free(moved);
    return found;
}

// Which of n rows or columns are marked, in words; nothing if all are.
static void describe(char *text, const char *marked, int n, const char *what) {
    int count = 0, first = -1, last = -1, even = 0;
    for (int i = 0; i < n; i++)
        if (marked[i]) {
            count++, even += i % 2 == 0, last = i;
            if (first < 0) first = i;
        }
    *text = 0;
    if (count == n || count == 0) return;
    if (count == 1)
        sprintf(text, "only in %s %d%s", what, first,
                first == n - 1 ? ", the last" : first == 0 ? ", the first" : "");
    else if (count == last - first + 1 && last == n - 1)
        sprintf(text, "from %s %d on", what, first);
    else if (count == last - first + 1 && first == 0)
        sprintf(text, "up to %s %d", what, last);
    else if (count >= 2 && (even == 0 || even == count) && count >= n / 2)
        sprintf(text, "in every second %s: the %s ones", what, even ? "even" : "odd");
    else if (count == last - first + 1)
        sprintf(text, "from %s %d to %d", what, first, last);
    else
        sprintf(text, "in %d of %d %ss, first in %d", count, n, what, first);
}

// Where the result is wrong, in words; "" if it is everywhere.
static void describe_places(const Result *r, char *text) {
    char *rows = room(r->rows, 1), *columns = room(r->columns, 1), part[200];
    int width = r->sections ? r->columns / r->sections : r->columns, hit[3] = {0}, hits = 0;
    *text = 0;
    for (size_t i = 0; i < r->n; i++)
        if (r->is_wrong[i]) {
            rows[i / r->columns] = 1, columns[i % r->columns % width] = 1;
            hit[i % r->columns / width] = 1;
        }
    for (int s = 0; s < r->sections; s++) hits += hit[s];
    for (int s = 0, n = 0; s < r->sections && hits < r->sections; s++)
        if (hit[s])
            sprintf(text + strlen(text), "%s%s", n++ ? " and " : "only in ", r->section_names[s]);
    describe(part, rows, r->rows, r->row);
    if (*part) sprintf(text + strlen(text), "%s%s", *text ? ", " : "", part);
    describe(part, columns, width, r->column);
    if (*part) sprintf(text + strlen(text), "%s%s", *text ? ", " : "", part);
    free(rows), free(columns);
}

// Compares, and says what is wrong. extra: a hint of the layer's own, or NULL.
static void report(Result *r, const char *extra) {
    char hint[2000] = "", places[600];
    size_t nans = 0, at = 0;
    double worst = -1;
    if (!r->value && !compare(r)) return;
    if (!r->num_wrong) return;
    describe_places(r, places);
    const char *where = *places ? " (wrong " : "", *end = *places ? ")" : "";
    for (size_t i = 0; i < r->n; i++) {
        double d = fabs(r->value[i] - r->expected[i]);
        if (!isfinite(r->value[i]) && !nans++) at = i;
        else if (!nans && d > worst) worst = d, at = i;
    }
    if (explain_values(r, EVERYWHERE, hint) || explain_places(r, hint) ||
        explain_values(r, WRONG_PLACES, hint) || explain_sections(r, hint) ||
        (nans && nans < r->n && explain_hypotheses(r, FINITE_PLACES, 1, hint))) {
        if (nans) strcat(hint, "; NaN comes from what is read outside of an input, or from 0 / 0");
        wrong(r->name, "%s%s%s%s%s%s", hint, where, places, end, extra ? "; " : "",
              extra ? extra : "");
        return;
    }
    if (nans)
        sprintf(hint, "%zu of %zu elements are NaN or infinite: a read outside of an input (there "
                "is NaN behind each), an exponential that overflows, a log or root of a negative "
                "number, or a division by 0%s%s", nans,
                r->n, extra ? "; " : "", extra ? extra : "");
    else if (extra) snprintf(hint, sizeof hint, "%s", extra);
    else sprintf(hint, "wrong values");
    if (!extra && r->rows > 1 && strstr(places, r->row) && !memchr(r->is_wrong, 1, r->columns))
        sprintf(hint + strlen(hint), "; %s 0 is right, later ones are not: does each begin at the "
                "right place, and is all that belongs to a %s taken from it?", r->row, r->row);
    wrong(r->name, "%s%s%s%s; element %zu is %.6g, should be %.6g", hint, where, places, end, at,
          (double)r->got[at], r->expected[at] + (r->adds ? before(r->got)[at] : 0));
}

/* ------------------------------------------------------------------------------------------------
3. Layers

For each one its definition with the mistakes that are made in it, and a function for the forward
and one for the backward pass. A case differs from the one before it in one thing where it can, so
that which cases are right tells something too. Each backward pass gets what the right forward pass
would have left.
*/

enum { FORWARD = 1, BACKWARD = 2, BOTH = 3 };
typedef struct { int number, pass; const char *text; } Mistake;

static number logistic(number x) { return 1 / (1 + cexp(-x)); }

static double *repeated(double x, size_t n) {
    double *a = room(n, sizeof *a);
    for (size_t i = 0; i < n; i++) a[i] = x;
    return a;
}

// The mistakes of indices that any loop can have: an array, or a part of its rows, is not all read,
// or at the wrong places, or another one in its place.
typedef struct {
    const double *x;
    int array, rows, columns, begin, width;  // array 3 is dout; a part's columns begin at begin
    const char *name;
} View;

enum { LAST_ROW, FIRST_ROW, ONLY_LAST, SAME_ROW, ROWS_REVERSED, TURNED, STEP_1, STEP_ROWS,
       STEP_HALF, STEP_DOUBLE,  // up to here only for several rows; then for several columns
       LAST_COLUMN, FIRST_COLUMN, ONLY_LAST_COLUMN, ONLY_FIRST_COLUMN, SAME_COLUMN, REVERSED,
       IN_LOOP, NOT_READ, TOO_FAR, TOO_EARLY, READINGS, RIGHTLY };
static const char *const readings[READINGS] = {
    "the last row of %s is left out", "the first row of %s is left out",
    "only the last row of %s counts: is it set (=) in the loop instead of added (+=)?",
    "row 0 of %s is read for every row", "the rows of %s are read in reverse order",
    "%s is read transposed: rows and columns are exchanged",
    "row n of %s is read from element n on: n must be multiplied by the row's length",
    "row n of %s is read from element n times the number of rows on; it is n times its length",
    "row n of %s is read half a row's length times n on: its length is forgotten in part",
    "row n of %s is read from twice the row's length times n on",
    "the last column of %s is left out", "the first column of %s is left out",
    "only the last column of %s counts: is it set (=) in the loop instead of added (+=)?",
    "only the first column of %s counts", "%s is read at [0] for every index",
    "%s is read in reverse order",
    "the sum over the columns of %s is added inside of the loop, again and again",
    "%s is missing: 1 stands in its place", "%s is read one place too far",
    "%s is read one place too early"};

static double read_wrongly(const View *v, int how, int row, int column) {
    int last_row = v->rows - 1, last = v->width - 1, at;
    if (how == NOT_READ) return 1;
    if ((how == LAST_ROW && row == last_row) || (how == FIRST_ROW && row == 0) ||
        (how == LAST_COLUMN && column == last) || (how == FIRST_COLUMN && column == 0) ||
        (how == ONLY_LAST && row < last_row) || (how == ONLY_LAST_COLUMN && column < last) ||
        (how == ONLY_FIRST_COLUMN && column > 0))
        return 0;
    if (how == SAME_ROW) row = 0;
    if (how == ROWS_REVERSED) row = last_row - row;
    if (how == SAME_COLUMN) column = 0;
    if (how == REVERSED) column = last - column;
    at = row * v->columns + v->begin + column + (how == TOO_FAR) - (how == TOO_EARLY);
    if (how == TURNED) at = column * v->rows + row;
    if (how == STEP_1) at = row + v->begin + column;
    if (how == STEP_ROWS) at = row * v->rows + v->begin + column;
    if (how == STEP_HALF) at = row * v->columns / 2 + v->begin + column;
    if (how == STEP_DOUBLE) at = row * v->columns * 2 + v->begin + column;
    return at < 0 || at >= v->rows * v->columns ? NAN
           : v->x[at] * (how == IN_LOOP ? v->width - column : 1);
}

static double *misread(const View *v, int how, const View *other) {
    double *y = room((size_t)v->rows * v->columns, sizeof *y);
    memcpy(y, v->x, (size_t)v->rows * v->columns * sizeof *y);
    for (int i = 0; i < v->rows; i++)
        for (int j = 0; j < v->width; j++)
            y[i * v->columns + v->begin + j] = other ? read_wrongly(other, RIGHTLY, i, j)
                                                     : read_wrongly(v, how, i, j);
    return y;
}

static int views_of(View *v, const Case *c, const double *dout, int rows, int columns) {
    int n = 0;
    for (int k = 0; k < 3; k++) {
        int parts = k == 0 && c->sections ? c->sections : 1;
        int width = c->rows[k] ? (int)(c->size[k] / c->rows[k]) : 0;
        if (width) v[n++] = (View){c->in[k], k, c->rows[k], width, 0, width, c->names[k]};
        for (int s = 0; s < parts && width && parts > 1; s++)
            v[n++] = (View){c->in[k], k, c->rows[k], width, s * width / parts, width / parts,
                            c->parts[s]};
    }
    if (dout) v[n++] = (View){dout, 3, rows, columns, 0, columns, c->dout ? c->dout : "dout"};
    return n;
}

// What a mistake's result is made of: the whole, and, of a gradient with two terms, each alone.
typedef struct {
    Definition f;
    const Case *c;
    const double *dout;       // NULL: forward
    int which, held;
    size_t offset;            // forward: where in f's result the output begins
    const double *direct;     // with held: the first term as it should be
    const char *first, *second;
} Outcome;

static void add_outcome(Result *r, const Outcome *o, const Case *c, const double *dout,
                        const char *text) {
    double *all = o->dout ? differentiate(o->f, c, o->which, dout, 0)
                          : evaluate(o->f, c, 0) + o->offset;
    if (!o->held && size_of(all, r->n) > 1e-9) add_hypothesis(r, text, all);
    if (!o->held) return;
    double *held = differentiate(o->f, c, o->which, dout, o->held);
    for (int second = 0; second < 2; second++) {
        double *z = room(r->n, sizeof *z), *term = room(r->n, sizeof *term);
        char *said = room(strlen(text) + 200, 1);
        for (size_t i = 0; i < r->n; i++) {
            term[i] = second ? all[i] - held[i] : held[i];
            z[i] = term[i] + (second ? o->direct[i] : r->expected[i] - o->direct[i]);
        }
        if (size_of(term, r->n) < 1e-9) return;  // so the term is missing: another hint
        sprintf(said, "in one term (%s): %s", second ? o->second : o->first, text);
        add_hypothesis(r, said, z);
    }
    add_hypothesis(r, text, all);
}

static void reading_mistakes(Result *r, const Outcome *o, int rows, int columns) {
    View views[8];
    int n = views_of(views, o->c, o->dout, rows, columns);
    if (o->dout && o->c->size[o->which] * o->c->out_size > 10000) return;  // that would take long
    for (View *v = views; v < views + n; v++)
        for (int how = 0; how < READINGS + n; how++) {
            View *other = how < READINGS ? NULL : views + how - READINGS;
            Case c = *o->c;
            char *text = room(300, 1);
            if (other && (other == v || other->rows != v->rows || other->width != v->width))
                continue;
            if ((v->rows == 1 && how < LAST_COLUMN) ||
                (v->width == 1 && how >= LAST_COLUMN && how <= IN_LOOP))
                continue;
            double *y = misread(v, how, other);
            if (other) sprintf(text, "%s is read in place of %s", other->name, v->name);
            else sprintf(text, readings[how], v->name);
            if (v->array < 3) c.in[v->array] = y;
            add_outcome(r, o, &c, v->array < 3 ? o->dout : y, text);
        }
}

// Hypotheses for an output that begins at `offset` in what the definition returns.
static void forward_mistakes(Result *r, Definition f, const Case *c, size_t offset,
                             const Mistake *m) {
    for (; m->text; m++)
        if (m->pass & FORWARD) add_hypothesis(r, m->text, evaluate(f, c, m->number) + offset);
    reading_mistakes(r, &(Outcome){.f = f, .c = c, .offset = offset}, 0, 0);
}

// Hypotheses for the gradient of input `which`: of mistaken definitions, and of arrays that are
// not read as they should be. dout is (rows,columns). With `held`, a mistake that holds one part of
// the definition, the gradient is made of two terms, whose names are given.
static void backward_mistakes(Result *r, Definition f, const Case *c, int which, const double *dout,
                              int rows, int columns, const Mistake *m, int held, const char *first,
                              const char *second) {
    double *rest = room(r->n, sizeof *rest), *direct = NULL;
    for (; m->text; m++)
        if (m->pass & BACKWARD)
            add_hypothesis(r, m->text, differentiate(f, c, which, dout, m->number));
    if (held) {
        direct = differentiate(f, c, which, dout, held);
        for (size_t i = 0; i < r->n; i++) rest[i] = r->expected[i] - direct[i];
        add_term(r, first, direct), add_term(r, second, rest);
    }
    reading_mistakes(r, &(Outcome){f, c, dout, which, held, 0, direct, first, second}, rows,
                     columns);
}

// ---- gpas: in[0] x (n), in[1] the gate.

static number gate_function(number g, int act) {
    if (act == SILU) return g * logistic(g);
    if (act == RELU) return creal(g) > 0 ? g : 0;
    if (act == LEAKY_RELU) return creal(g) > 0 ? g : 0.01 * g;
    return act == TANH ? ctanh(g) : g;
}

enum { GPAS_HOLDS = 1, GPAS_PLAIN, GPAS_PLUS, GPAS_RAW, GPAS_SIGMOID, GPAS_OFF, GPAS_ONLY,
       GPAS_NO_X, GPAS_LEAK, GPAS_NEGATIVE, GPAS_INSIDE, GPAS_MINUS,
       GPAS_HOLD_SIGMOID, GPAS_HOLD_FACTOR };
static const Mistake gpas_mistakes[] = {
    {GPAS_HOLDS, BACKWARD, "dinp is dout, unscaled: the derivative does not look into sg(x)"},
    {GPAS_PLAIN, BACKWARD, "scaled by 1 - a(g): with the stop-gradient (stop_grad 1) dinp must be "
     "dout itself, for sg(x) is a constant to the derivative"},
    {GPAS_PLUS, BOTH, "the sign of a(g) x is wrong: it is 1 + a(g) instead of 1 - a(g)"},
    {GPAS_RAW, BOTH, "the gate is used as it is: the scale is 1 - a(g), not 1 - g"},
    {GPAS_SIGMOID, BOTH, "SiLU is g sigmoid(g); this is what sigmoid(g) alone gives"},
    {GPAS_OFF, FORWARD, "inp is not scaled at all"},
    {GPAS_NO_X, FORWARD, "a(g) is subtracted as it is; it must be a(g) x"},
    {GPAS_ONLY, BOTH, "this is a(g) x; it must be x - a(g) x"},
    {GPAS_NEGATIVE, BOTH, "a(-g) in place of a(g): the sign of the gate in its activation"},
    {GPAS_INSIDE, BOTH, "the sign inside of the sigmoid of SiLU: a = g / (1 + e^-g)"},
    {GPAS_MINUS, BOTH, "a sign in the sigmoid of SiLU: a = g / (1 + e^-g)"},
    {GPAS_LEAK, BOTH, "leaky ReLU has the slope 0.01 for g < 0"},
    {0, 0, NULL}};

static void gpas(number *out, number *const *in, const Case *c, int wrong) {
    number g = in[1][0], a = gate_function(g, c->act);
    int stop = wrong == GPAS_HOLDS ? 1 : wrong == GPAS_PLAIN ? 0 : c->stop_grad;
    if (wrong == GPAS_PLUS) a = -a;
    if (wrong == GPAS_RAW) a = g;
    if (wrong == GPAS_NEGATIVE) a = gate_function(-g, c->act);
    if (wrong == GPAS_INSIDE) a = g * logistic(-g);
    if (wrong == GPAS_MINUS) a = g / (1 - cexp(-g));
    if (wrong == GPAS_HOLD_SIGMOID) a = g * hold(logistic(g));
    if (wrong == GPAS_HOLD_FACTOR) a = hold(g) * logistic(g);
    if (wrong == GPAS_SIGMOID) a = logistic(g);
    if (wrong == GPAS_LEAK) a = creal(g) > 0 ? g : 0.1 * g;
    for (size_t i = 0; i < c->size[0]; i++) {
        number x = in[0][i];
        out[i] = x - a * (stop ? hold(x) : x);
        if (wrong == GPAS_OFF) out[i] = x;
        if (wrong == GPAS_ONLY) out[i] = a * x;
        if (wrong == GPAS_NO_X) out[i] = x - a;
    }
}

static const char *const acts[] = {"silu", "identity", "relu", "leaky_relu", "tanh"};

static Case gpas_case(int n, int act, double gate, const char *more) {
    Case c = {.B = 1, .T = 1, .C = n, .act = act, .stop_grad = 1, .out_size = (size_t)n};
    char *name = room(100, 1);
    sprintf(name, "%s gate %.2f, %d number%s%s", acts[act], gate, n, n > 1 ? "s" : "", more);
    c.name = name;
    add_input(&c, 0, "inp", 1, n, 1);
    c.in[1] = repeated((float)gate, 1), c.size[1] = 1;
    return c;
}

static double a_gate(int k) {
    double sign = k % 2 ? -1 : 1;
    return (float)(sign * (0.45 + 0.15 * uniform()));
}

static void check_gpas_forward(void) {
    static const int sizes[] = {7, 1, 1003};
    for (int k = 0; k < 12; k++) {
        int act = k < 4 ? SILU : (k - 2) / 2;
        Case c = gpas_case(sizes[k < 4 ? k % 3 : 0], act, a_gate(k), "");
        begin_case(&c);
        float *x = input("inp", c.in[0], c.C), *y = output("out", c.C);
        remember();
        submission.gpas_forward(y, x, (float)c.in[1][0], act, c.C);
        if (check_watched()) continue;
        Result r = result_of("out", y, evaluate(gpas, &c, 0), 0, 1, c.C, "row", "element");
        if (!compare(&r)) continue;
        forward_mistakes(&r, gpas, &c, 0, gpas_mistakes);
        add_constant(&r, "1 - a(g)", 1 - creal(gate_function(c.in[1][0], act)));
        report(&r, NULL);
    }
}

static void gate_hints(Result *r, const Case *c, const double *dout) {
    double minus[] = {-1, 0}, g = c->in[1][0], a = creal(gate_function(g, c->act));
    Case one = *c;
    one.in[0] = repeated(1, 1), one.size[0] = one.out_size = 1;
    double *plain = differentiate(gpas, c, 1, dout, GPAS_RAW);
    add_hypothesis(r, "the factor a'(g) is missing", plain);
    add_hypothesis(r, "a(g) in place of a'(g)", repeated(plain[0] * a, 1));
    add_constant(r, "n (a mean in place of the sum?)", c->C);
    add_quantity(r, "a'(g)", differentiate(gpas, &one, 1, minus, 0));
    add_quantity(r, "a(g)", repeated(a, 1));
    add_quantity(r, "1 - a(g) (is it inp that is summed, or the scaled activation?)",
                 repeated(1 - a, 1));
    if (c->act != SILU) return;
    double s = creal(logistic(g)), *first = differentiate(gpas, c, 1, dout, GPAS_HOLD_SIGMOID);
    add_term(r, "of SiLU's slope: that with the sigmoid held", first);
    add_term(r, "of SiLU's slope: that through the sigmoid",
             differentiate(gpas, c, 1, dout, GPAS_HOLD_FACTOR));
    add_quantity(r, "g", repeated(g, 1));
    add_quantity(r, "sigmoid(g)", repeated(s, 1));
    add_quantity(r, "1 - sigmoid(g)", repeated(1 - s, 1));
    add_quantity(r, "1 + sigmoid(g)", repeated(1 + s, 1));
}

static void check_gpas_gate(const Case *c, const double *dout, const float *dgate) {
    static int bad;  // with the stop-gradient
    Result r = result_of("dgate", dgate, differentiate(gpas, c, 1, dout, 0), 1, 1, 1, "row",
                         "number");
    for (size_t i = 0; i < c->size[0]; i++) r.scale += fabs(dout[i] * c->in[0][i]) / 8;
    r.tolerance = 2e-5;
    if (!compare(&r)) return;
    gate_hints(&r, c, dout);
    backward_mistakes(&r, gpas, c, 1, dout, 1, c->C, gpas_mistakes + 2, 0, NULL, NULL);
    char *slope = room(100, 1);
    sprintf(slope, "right for SiLU: look at the slope of %s", acts[c->act]);
    report(&r, bad ? NULL : !c->stop_grad ? "stop_grad 0 changes dinp, not dgate"
               : c->act == SILU ? NULL : slope);
    bad = bad || (c->act == SILU && c->stop_grad);
}

static void check_gpas_dinp(const Case *c, const double *dout, const float *dinp, int alias) {
    int large = c->C > 10000;  // and stop_grad 1
    Result r = result_of("dinp", dinp, large ? dout : differentiate(gpas, c, 0, dout, 0), 0, 1,
                         c->C, "row", "element");
    r.in_place = alias;
    r.tolerance = c->stop_grad ? 1e-12 : 0;
    if (!compare(&r)) return;
    if (large) {
        report(&r, "does each thread go on with the number gridDim.x * blockDim.x further?");
        return;
    }
    add_constant(&r, "1 - a(g)", 1 - creal(gate_function(c->in[1][0], c->act)));
    add_hypothesis(&r, "this is inp; wanted is the gradient", c->in[0]);
    double one[] = {-1}, *sloped = room(r.n, sizeof *sloped);
    Case single = *c;
    single.size[0] = single.out_size = 1, single.in[0] = repeated(1, 1);
    double slope = *differentiate(gpas, &single, 1, one, 0);
    for (size_t i = 0; i < r.n; i++) sloped[i] = (1 - slope) * dout[i];
    add_hypothesis(&r, "scaled by 1 - a'(g); without the stop-gradient it is 1 - a(g)", sloped);
    double *plain = differentiate(gpas, c, 0, dout, GPAS_PLAIN);
    if (c->stop_grad && equals(&r, r.value, plain, 1, 1)) {
        wrong(r.name, "%s", gpas_mistakes[1].text);
        return;
    }
    if (!c->stop_grad && equals(&r, r.value, dout, 1, 1)) {
        wrong(r.name, "dinp is dout, but without the stop-gradient (stop_grad 0) y = (1 - a(g)) x "
              "is a plain scale and dinp = (1 - a(g)) dout");
        return;
    }
    backward_mistakes(&r, gpas, c, 0, dout, 1, c->C, gpas_mistakes, 0, NULL, NULL);
    int close = c->stop_grad && equals(&r, r.value, dout, 1, EVERYWHERE);
    report(&r, close ? "it must be dout exactly, to the last bit" : NULL);
}

static void check_gpas_backward(void) {
    static const int sizes[] = {7, 1, 1003};
    for (int k = 0; k < 20 + submission.cuda; k++) {  // at last more numbers than threads
        int act = k < 6 || k == 20 ? SILU : (k - 4) / 2 % 5, alias = k == 4 || k == 5 || k == 18;
        int stop = k != 3 && k != 5 && (k < 16 || k == 20), no_gate = k == 19;
        Case c = gpas_case(k == 20 ? 600000 : sizes[k < 3 ? k : 0], act, a_gate(k),
                           stop ? alias ? ", dinp is dout" : ""
                                : alias ? ", stop_grad 0, dinp is dout"
                                        : no_gate ? ", stop_grad 0, dgate NULL" : ", stop_grad 0");
        c.stop_grad = stop;
        double *dout = numbers(c.C, 1);
        for (int i = 0; i < c.C; i++) dout[i] = (float)(0.4 * dout[i] + 0.5 * c.in[0][i]);
        begin_case(&c);
        float *x = input("inp", c.in[0], c.C), *dgate = output("dgate", 1);
        float *dy = alias ? in_place("dout", dout, c.C) : input("dout", dout, c.C);
        float *dx = alias ? dy : output("dinp", c.C);
        remember();
        submission.gpas_backward(dx, no_gate ? NULL : dgate, dy, x, (float)c.in[1][0], act, stop,
                                 c.C);
        if (check_watched()) continue;
        check_gpas_dinp(&c, dout, dx, alias);
        if (!no_gate) check_gpas_gate(&c, dout, dgate);
    }
}

// ---- residual: in[0] the shortcut, in[1] the branch (n).

enum { RESIDUAL_SWAPPED = 1, RESIDUAL_BOTH, RESIDUAL_PLAIN, RESIDUAL_PRODUCT, RESIDUAL_ADDED };
static const Mistake residual_mistakes[] = {
    {RESIDUAL_SWAPPED, FORWARD, "A scales the branch; it must scale the shortcut"},
    {RESIDUAL_BOTH, FORWARD, "A scales the branch too; it must scale the shortcut alone"},
    {RESIDUAL_PLAIN, BOTH, "A is not used"},
    {RESIDUAL_PRODUCT, FORWARD, "shortcut and branch are multiplied; they must be added"},
    {RESIDUAL_ADDED, FORWARD, "A is added; it must scale the shortcut"},
    {0, 0, NULL}};

static void residual(number *out, number *const *in, const Case *c, int wrong) {
    int plain = wrong == RESIDUAL_SWAPPED || wrong == RESIDUAL_PLAIN || wrong == RESIDUAL_ADDED;
    double a = plain ? 1 : c->factor;
    double b = wrong == RESIDUAL_SWAPPED || wrong == RESIDUAL_BOTH ? c->factor : 1;
    for (size_t i = 0; i < c->out_size; i++) {
        out[i] = a * in[0][i] + b * in[1][i];
        if (wrong == RESIDUAL_PRODUCT) out[i] = a * in[0][i] * in[1][i];
        if (wrong == RESIDUAL_ADDED) out[i] += c->factor;
    }
}

static Case residual_case(int n, double alpha, const char *name) {
    Case c = {.name = name, .C = n, .factor = (float)alpha, .out_size = (size_t)n};
    add_input(&c, 0, "shortcut", 1, n, 1), add_input(&c, 1, "branch", 1, n, 1);
    return c;
}

static Case a_residual_case(int k) {
    double alpha = 1.5 + 0.3 * uniform();
    if (k == 0) return residual_case(7, alpha, "7 numbers");
    if (k == 1) return residual_case(1, alpha, "1 number");
    if (k == 2) return residual_case(1003, alpha, "1003 numbers");
    if (k == 3) return residual_case(7, 1, "A = 1");
    if (k == 4) return residual_case(7, alpha, "in place");
    return residual_case(7, 1, "A = 1, in place");
}

static void check_residual_forward(void) {
    for (int k = 0; k < 4; k++) {
        Case c = a_residual_case(k);
        begin_case(&c);
        float *x = input("shortcut", c.in[0], c.C), *b = input("branch", c.in[1], c.C);
        float *y = output("out", c.C);
        remember();
        submission.residual_forward(y, x, b, (float)c.factor, c.C);
        if (check_watched()) continue;
        Result r = result_of("out", y, evaluate(residual, &c, 0), 0, 1, c.C, "row", "element");
        if (!compare(&r)) continue;
        double *first = room(c.C, sizeof *first);
        for (int i = 0; i < c.C; i++) first[i] = c.factor * c.in[0][i];
        add_term(&r, "A shortcut", first), add_term(&r, "branch", c.in[1]);
        add_constant(&r, "A", c.factor);
        forward_mistakes(&r, residual, &c, 0, residual_mistakes);
        report(&r, NULL);
    }
}

static void check_residual_backward(void) {
    for (int k = 0; k < 6; k++) {
        Case c = a_residual_case(k);
        double *dout = numbers(c.C, 1);
        begin_case(&c);
        float *dy = k >= 4 ? in_place("dout", dout, c.C) : input("dout", dout, c.C);
        float *dx = k >= 4 ? dy : output("dshortcut", c.C);
        remember();
        submission.residual_backward(dx, dy, (float)c.factor, c.C);
        if (check_watched()) continue;
        Result r = result_of("dshortcut", dx, differentiate(residual, &c, 0, dout, 0), 0, 1, c.C,
                             "row", "element");
        r.in_place = k >= 4;
        if (!compare(&r)) continue;
        backward_mistakes(&r, residual, &c, 0, dout, 1, c.C, residual_mistakes, 0, NULL, NULL);
        add_constant(&r, "A", c.factor);
        report(&r, NULL);
    }
}

// ---- embedding: in[0] the table (V,C).

enum { EMBEDDING_NO_TOKEN = 1, EMBEDDING_NEXT, EMBEDDING_BEFORE, EMBEDDING_FIRST,
       EMBEDDING_TOKEN_NEXT };
static const Mistake embedding_mistakes[] = {
    {EMBEDDING_NO_TOKEN, BOTH, "row n of the table in place of row tokens[n]"},
    {EMBEDDING_NEXT, BOTH, "the row after that of the token: an index is off by one"},
    {EMBEDDING_BEFORE, BOTH, "the row before that of the token: an index is off by one"},
    {EMBEDDING_TOKEN_NEXT, BOTH, "tokens[n + 1] in place of tokens[n]: off by one"},
    {EMBEDDING_FIRST, BOTH, "tokens[0] is used for every row"},
    {0, 0, NULL}};

static void embedding(number *out, number *const *in, const Case *c, int wrong) {
    int V = c->K, C = c->C;
    for (int n = 0; n < c->T; n++)
        for (int i = 0; i < C; i++) {
            int v = c->tokens[n];
            if (wrong == EMBEDDING_NO_TOKEN) v = n % V;
            if (wrong == EMBEDDING_NEXT) v = (v + 1) % V;
            if (wrong == EMBEDDING_BEFORE) v = (v + V - 1) % V;
            if (wrong == EMBEDDING_FIRST) v = c->tokens[0];
            if (wrong == EMBEDDING_TOKEN_NEXT) v = n + 1 < c->T ? c->tokens[n + 1] : V;
            out[n * C + i] = v < V ? in[0][v * C + i] : NAN;
        }
}

static Case embedding_case(int k) {
    static const int shapes[][3] = {{5, 7, 9}, {1, 7, 3}, {6, 1, 4}, {9, 67, 5}, {33, 8, 5}};
    static const char *const names[] = {"5 tokens x 7 channels, no token twice", "one token",
                                        "one channel", "9 tokens x 67 channels", "33 tokens x 8"};
    int N = shapes[k][0], C = shapes[k][1], V = shapes[k][2], *tokens = room(N, sizeof(int));
    Case c = {.name = names[k], .T = N, .C = C, .K = V, .out_size = (size_t)N * C};
    int first = (int)((uniform() + 1) / 2 * V);
    for (int n = 0; n < N; n++)
        tokens[n] = k == 0 ? (first + 2 * n) % V : (int)((uniform() + 1) / 2 * (V - 1));
    c.tokens = tokens, add_input(&c, 0, "weight", V, C, 1);
    return c;
}

static void check_embedding_forward(void) {
    for (int k = 0; k < 5; k++) {
        Case c = embedding_case(k);
        begin_case(&c);
        float *w = input("weight", c.in[0], c.size[0]), *y = output("out", c.out_size);
        remember();
        submission.embedding_forward(y, token_numbers(c.tokens, c.T, c.K), w, c.T, c.C);
        if (check_watched()) continue;
        Result r = result_of("out", y, evaluate(embedding, &c, 0), 0, c.T, c.C, "row", "channel");
        if (!compare(&r)) continue;
        forward_mistakes(&r, embedding, &c, 0, embedding_mistakes);
        report(&r, NULL);
    }
}

// What is left in the table by one who sets (=) each token's row instead of adding to it.
static double *embedding_set(const Case *c, const double *dout, const float *old) {
    double *d = room(c->size[0], sizeof *d);
    for (int n = 0; n < c->T; n++)
        for (int i = 0; i < c->C; i++) {
            size_t at = (size_t)c->tokens[n] * c->C + i;
            d[at] = dout[n * c->C + i] - old[at];
        }
    return d;
}

static void check_embedding_backward(void) {
    for (int k = 0; k < 5; k++) {
        Case c = embedding_case(k);
        double *dout = numbers(c.out_size, 1);
        begin_case(&c);
        float *dy = input("dout", dout, c.out_size), *dw = output("dweight", c.size[0]);
        remember();
        submission.embedding_backward(dw, dy, token_numbers(c.tokens, c.T, c.K), c.T, c.C);
        if (check_watched()) continue;
        Result r = result_of("dweight", dw, differentiate(embedding, &c, 0, dout, 0), 1, c.K, c.C,
                             "table row", "channel");
        if (!compare(&r)) continue;
        add_hypothesis(&r, "the row is set (=) in place of added to (+=): what was there, and a "
                       "token's earlier places, are lost", embedding_set(&c, dout, before(dw)));
        backward_mistakes(&r, embedding, &c, 0, dout, c.T, c.C, embedding_mistakes, 0, NULL, NULL);
        report(&r, NULL);
    }
}

// ---- rmsnorm: in[0] x (N,C), in[1] the weight (C). After out (N,C) comes rstd (N).

enum { NORM_HELD = 1, NORM_SUM, NORM_NO_EPS, NORM_EPS, NORM_NO_ROOT, NORM_INVERSE, NORM_MEAN,
       NORM_LAST, NORM_FIRST, NORM_ABS, NORM_MINUS_ONE, NORM_NO_R, NORM_R2,
       NORM_COLUMN, NORM_EPS_OUTSIDE, NORM_NO_X, NORM_ROW_0, NORM_NO_SQUARE, NORM_ABS_ROOT,
       NORM_SQUARE, NORM_GROWS, NORM_ALL, NORM_WEIGHT_1, NORM_MORE, NORM_OWN };
static const Mistake norm_mistakes[] = {
    {NORM_HELD, 2, "r is treated as a constant, but it depends on every x of its row: a term is "
     "missing"},
    {NORM_SUM, 3, "the sum of the squares in place of their mean: it must be divided by C"},
    {NORM_NO_EPS, 1, "eps is missing under the root"},
    {NORM_EPS, 1, "eps is 1e-6"},
    {NORM_EPS_OUTSIDE, 1, "eps stands outside of the root; it belongs under it"},
    {NORM_R2, 3, "the factor r is there twice, or r = 1 / sqrt(...) lacks its root"},
    {NORM_INVERSE, 1, "r is 1 / sqrt(...), not sqrt(...)"},
    {NORM_MEAN, 3, "the mean is subtracted, as in LayerNorm; RMSNorm does not"},
    {NORM_LAST, 3, "the last channel is missing in the mean of squares"},
    {NORM_FIRST, 3, "the first channel is missing in the mean of squares"},
    {NORM_ABS, 3, "the mean of |x| in place of the root of the mean of x^2"},
    {NORM_NO_SQUARE, 1, "the square is missing: the mean of x in place of that of x^2"},
    {NORM_ABS_ROOT, 1, "the mean of |x| in place of that of x^2"},
    {NORM_SQUARE, 1, "this is the mean of the squares; r is 1 / sqrt of it"},
    {NORM_MORE, 1, "one channel too many in the sum: c < C"},
    {NORM_GROWS, 1, "the sum of squares goes on from row to row; it must begin at 0 in each"},
    {NORM_ALL, 1, "one mean over all rows; each row has its own"},
    {NORM_WEIGHT_1, 1, "multiplied by 1 + weight; it is weight"},
    {NORM_MINUS_ONE, 3, "the mean divides by C, not by C - 1 or C + 1"},
    {NORM_NO_R, 3, "not divided by the root mean square: the factor r is missing"},
    {NORM_NO_ROOT, 3, "the square root is missing in r = 1 / sqrt(...)"},
    {NORM_ROW_0, 3, "r of row 0 is used for every row"},
    {NORM_NO_X, 2, "x is missing in the sum"},
    {NORM_COLUMN, 3, "the wrong axis: the mean is over the rows, it must be over the channels"},
    {0, 0, NULL}};

static number norm_r(number *const *in, const Case *c, int n, int wrong) {
    int C = c->C, begin = wrong == NORM_FIRST;
    int end = wrong == NORM_LAST ? C - 1 : wrong == NORM_MORE ? C + 1 : C;
    int first = wrong == NORM_ROW_0 || wrong == NORM_GROWS || wrong == NORM_ALL ? 0 : n;
    int last = wrong == NORM_ROW_0 ? 0 : wrong == NORM_ALL ? c->T - 1 : n;
    number sum = 0, mean = 0, m;
    for (int row = first; row <= last; row++) {
        const number *x = in[0] + row * C;
        for (int i = begin; i < end && wrong == NORM_MEAN; i++) mean += x[i] / C;
        if (row * C + end > (int)c->size[0]) return NAN;
        for (int i = begin; i < end; i++)
            sum += wrong == NORM_NO_SQUARE ? x[i] : wrong == NORM_ABS || wrong == NORM_ABS_ROOT
                   ? (creal(x[i]) < 0 ? -x[i] : x[i]) : (x[i] - mean) * (x[i] - mean);
    }
    for (int row = 0; row < c->T && wrong == NORM_COLUMN; row++)
        sum += (row ? 0 : -sum) + in[0][row * C] * in[0][row * C];
    m = sum / (wrong == NORM_SUM ? 1 : wrong == NORM_MINUS_ONE ? fmax(1, C - 1)
               : wrong == NORM_COLUMN ? c->T : wrong == NORM_ALL ? C * c->T : C);
    if (wrong == NORM_ABS) return 1 / m;
    if (wrong == NORM_EPS_OUTSIDE) return 1 / (csqrt(m) + 1e-6);
    if (wrong == NORM_SQUARE) return m;
    m += wrong == NORM_NO_EPS ? 0 : wrong == NORM_EPS ? 1e-5 : 1e-6;
    if (creal(m) < 0) return NAN;  // the root of a negative sum
    return wrong == NORM_NO_ROOT ? 1 / m : wrong == NORM_INVERSE ? csqrt(m) : 1 / csqrt(m);
}

static const char own_part[] = "each thread uses its own part of the sum over the row: is the sum "
    "over the block missing?";

static void rmsnorm(number *out, number *const *in, const Case *c, int wrong) {
    for (int n = 0; n < c->T; n++) {
        number r = norm_r(in, c, n, wrong), mean = 0;
        if (wrong == NORM_HELD) r = hold(r);
        for (int i = 0; i < c->C && wrong == NORM_MEAN; i++) mean += in[0][n * c->C + i] / c->C;
        for (int i = 0; i < c->C; i++) {
            number w = in[1][i] + (wrong == NORM_WEIGHT_1);
            number times = wrong == NORM_NO_R ? 1 : wrong == NORM_R2 ? r * r : r;
            number x = wrong == NORM_NO_X ? 1 : in[0][n * c->C + i] - mean;
            if (wrong == NORM_OWN) times = 1 / csqrt(x * x / c->C + 1e-6);
            out[n * c->C + i] = w * x * times;
        }
        if (c->out_size > (size_t)c->T * c->C) out[c->T * c->C + n] = r;
    }
}

static Case norm_case(int k, int with_rstd) {
    static const int shapes[][2] = {{5, 7}, {1, 7}, {4, 1}, {2, 301}, {4, 8}, {1, 1}, {2100, 2}};
    static const char *const names[] = {"5 rows x 7", "one row", "one channel", "2 rows x 301",
                                        "4 rows x 8, small inputs", "one number", "2100 rows x 2"};
    int N = shapes[k][0], C = shapes[k][1];
    Case c = {.name = names[k], .T = N, .C = C, .out_size = (size_t)N * (C + with_rstd)};
    add_input(&c, 0, "inp", N, C, k == 4 ? 1e-3 : 1), add_input(&c, 1, "weight", 1, C, 1);
    for (int n = 0; n < N; n++)  // rows of different size
        for (int i = 0; i < C; i++)
            c.in[0][n * C + i] = (float)(c.in[0][n * C + i] * (1 + 0.6 * (n % 6)));
    return c;
}

// A vector with one number per column, or per row, as a quantity.
static void add_spread(Result *r, const char *name, const double *x, int per_row) {
    double *q = room(r->n, sizeof *q);
    for (size_t i = 0; i < r->n; i++) q[i] = x[per_row ? i / r->columns : i % r->columns];
    add_quantity(r, name, q);
}

static void check_rmsnorm_forward(void) {
    for (int k = 0; k < 6; k++) {
        Case c = norm_case(k, 1);
        begin_case(&c);
        float *x = input("inp", c.in[0], c.size[0]), *w = input("weight", c.in[1], c.C);
        float *y = output("out", c.size[0]), *rstd = output("rstd", c.T);
        remember();
        submission.rmsnorm_forward(y, rstd, x, w, c.T, c.C);
        if (check_watched()) continue;
        double *right = evaluate(rmsnorm, &c, 0), *rs = right + c.size[0];
        Result r = result_of("out", y, right, 0, c.T, c.C, "row", "channel");
        Result s = result_of("rstd", rstd, rs, 0, c.T, 1, "row", "number");
        int bad = compare(&r) != 0, bad_r = compare(&s) != 0;
        add_spread(&r, "r", rs, 1), add_spread(&r, "weight", c.in[1], 0);
        add_quantity(&r, "x", c.in[0]), add_spread(&s, "r", rs, 0);
        s.quantities[0].values = rs;
        add_constant(&r, "C", c.C), add_constant(&r, "sqrt(C)", sqrt(c.C));
        for (int i = 0; i < 2; i++)
            add_constant(i ? &r : &s, "sqrt(C / N) (is it the mean over the C channels?)",
                         sqrt((double)c.C / c.T));
        if (submission.cuda) add_hypothesis(&r, own_part, evaluate(rmsnorm, &c, NORM_OWN));
        if (bad_r) forward_mistakes(&s, rmsnorm, &c, c.size[0], norm_mistakes), report(&s, NULL);
        if (bad) forward_mistakes(&r, rmsnorm, &c, 0, norm_mistakes), report(&r, NULL);
    }
}

// The sum in the second term without one of its factors, and with a wrong r: the first term has it
// once, the second three times.
static void norm_backward_mistakes(Result *r, const Case *c, const double *dout, const double *rs) {
    static const char *const texts[] = {
        "in the sum of the term through r the weight is missing",
        "in the sum of the term through r, x is missing", "r of row 0 is used for every row",
        "r is used as if it were the root mean square itself: it is 1 / sqrt(...) already"};
    for (int k = 0; k < 4; k++) {
        double *d = room(r->n, sizeof *d), *z = room(r->n, sizeof *z);
        for (size_t i = 0; i < r->n; i++) d[i] = dout[i] / (k ? c->in[0][i] : c->in[1][i % c->C]);
        double *all = differentiate(rmsnorm, c, 0, d, 0);
        double *held = differentiate(rmsnorm, c, 0, d, NORM_HELD);
        for (size_t i = 0; i < r->n; i++) {
            double own = rs[i / c->C], q = (k == 2 ? rs[0] : 1 / own) / own;
            double one = r->terms[0].values[i], two = r->terms[1].values[i];
            z[i] = k < 2 ? one + all[i] - held[i] : one * q + two * q * q * q;
        }
        add_hypothesis(r, texts[k], z);
    }
    double *own = room(r->n, sizeof *own);
    for (int j = 0; j < c->C && submission.cuda; j++) {
        double *d = room(r->n, sizeof *d);
        for (size_t i = j; i < r->n; i += c->C) d[i] = dout[i];
        double *all = differentiate(rmsnorm, c, 0, d, 0);
        double *held = differentiate(rmsnorm, c, 0, d, NORM_HELD);
        for (size_t i = j; i < r->n; i += c->C) own[i] = r->terms[0].values[i] + all[i] - held[i];
    }
    if (submission.cuda) add_hypothesis(r, own_part, own);
}

// A block of kernels takes every 2048th row, so more of them show what is kept from row to row.
static const char many_rows[] = "few rows are right: what if a block has several? Is what belongs "
    "to one row set to 0 for the next, and what belongs to all of them added up (+=)?";

static void check_rmsnorm_backward(void) {
    for (int k = 0; k < 6 + submission.cuda; k++) {
        Case c = norm_case(k, 0), d = c;
        double *dout = numbers(c.size[0], 1);
        d.out_size += c.T;
        double *rs = evaluate(rmsnorm, &d, 0) + c.size[0];
        begin_case(&c);
        float *dy = input("dout", dout, c.size[0]), *x = input("inp", c.in[0], c.size[0]);
        float *w = input("weight", c.in[1], c.C), *rstd = input("rstd", rs, c.T);
        float *dx = output("dinp", c.size[0]), *dw = output("dweight", c.C);
        remember();
        submission.rmsnorm_backward(dx, dw, dy, x, w, rstd, c.T, c.C);
        if (check_watched()) continue;
        Result r = result_of("dinp", dx, differentiate(rmsnorm, &c, 0, dout, 0), 0, c.T, c.C, "row",
                             "channel");
        Result s = result_of("dweight", dw, differentiate(rmsnorm, &c, 1, dout, 0), 1, 1, c.C,
                             "row", "channel");
        if (c.C == 1) r.scale = size_of(dout, c.T);  // dx is all but 0 there
        if (k == 6) {
            int bad = num_complaints;
            if (compare(&r)) report(&r, bad ? NULL : many_rows);
            if (compare(&s)) report(&s, bad ? NULL : many_rows);
            continue;
        }
        if (compare(&r)) {
            add_constant(&r, "C", c.C);
            add_constant(&r, "C / N (is it the mean over the C channels?)", (double)c.C / c.T);
            add_spread(&r, "r", rs, 1), add_spread(&r, "weight", c.in[1], 0);
            add_quantity(&r, "x", c.in[0]), add_quantity(&r, "dout", dout);
            backward_mistakes(&r, rmsnorm, &c, 0, dout, c.T, c.C, norm_mistakes, NORM_HELD,
                              "that with r held", "that through r, which depends on every x of the "
                              "row");
            norm_backward_mistakes(&r, &c, dout, rs);
            report(&r, NULL);
        }
        if (compare(&s)) {
            add_spread(&s, "weight", c.in[1], 0), add_constant(&s, "N", c.T);
            backward_mistakes(&s, rmsnorm, &c, 1, dout, c.T, c.C, norm_mistakes + 1, 0, NULL, NULL);
            Case e = c;
            e.in[0] = repeated(1, c.size[0]);
            add_hypothesis(&s, "x and r are missing",
                           differentiate(rmsnorm, &e, 1, dout, NORM_NO_R));
            e.in[0] = dout;
            add_hypothesis(&s, "dout in place of x",
                           differentiate(rmsnorm, &e, 1, dout, NORM_NO_R));
            report(&s, NULL);
        }
    }
}

// ---- rope: in[0] qkv (B,T,3C), in[1] the table (T,hs). factor -1: the other way round.

enum { ROPE_BACK = 1, ROPE_SWAPPED, ROPE_VALUES, ROPE_QUERIES, ROPE_KEYS, ROPE_NEXT, ROPE_BEFORE,
       ROPE_ROW, ROPE_SEQUENCE, ROPE_HALVES, ROPE_ALIASED, ROPE_FIRST_PLUS, ROPE_SECOND_MINUS,
       ROPE_COSINE_MINUS, ROPE_HEAD, ROPE_TABLE_C, ROPE_ONE_HEAD, ROPE_LATER_HEADS, ROPE_NO_SINE,
       ROPE_ONLY_COSINES, ROPE_ONLY_SINES, ROPE_ANGLES, ROPE_FIRST_ANGLE, ROPE_FAR, ROPE_SAME,
       ROPE_TWICE, ROPE_OVERLAP, ROPE_STEP_C, ROPE_STEP_2C };
static const Mistake rope_mistakes[] = {
    {ROPE_BACK, FORWARD, "turned the wrong way: the sign of the sine"},
    {ROPE_BACK, BACKWARD, "turned the same way as in the forward pass"},
    {ROPE_SWAPPED, BOTH, "sine and cosine are exchanged; in the table the cosine comes first"},
    {ROPE_VALUES, BOTH, "the values are turned too; only queries and keys are"},
    {ROPE_QUERIES, BOTH, "only the queries are turned; the keys are too"},
    {ROPE_KEYS, BOTH, "only the keys are turned; the queries are too"},
    {ROPE_NEXT, BOTH, "the angles of position t + 1: off by one"},
    {ROPE_BEFORE, BOTH, "the angles of position t - 1: off by one"},
    {ROPE_ROW, BOTH, "the position is the row n; in the second sequence it begins anew: n % T"},
    {ROPE_SEQUENCE, BOTH, "the position is n % T, not n / T, which counts the sequences"},
    {ROPE_HALVES, BOTH, "channel j is paired with j + hs/2; pairs are adjacent channels"},
    {ROPE_ALIASED, BOTH, "x0 is overwritten before the second line of the rotation reads it"},
    {ROPE_FIRST_PLUS, FORWARD, "sign: the first of the pair is x0 cos - x1 sin"},
    {ROPE_FIRST_PLUS, BACKWARD, "the sign of the sine in the first of the pair"},
    {ROPE_SECOND_MINUS, FORWARD, "sign: the second of the pair is x0 sin + x1 cos"},
    {ROPE_SECOND_MINUS, BACKWARD, "the sign of the sine in the second of the pair"},
    {ROPE_COSINE_MINUS, BOTH, "sign: the second of the pair has + x1 cos"},
    {ROPE_HEAD, BOTH, "the table's columns go on from head to head; each head begins with 0"},
    {ROPE_TABLE_C, BOTH, "a row of the table is hs long, not C"},
    {ROPE_ONE_HEAD, BOTH, "only the first head is turned"},
    {ROPE_LATER_HEADS, BOTH, "the first head of the queries is not turned"},
    {ROPE_NO_SINE, BOTH, "the sines are missing"},
    {ROPE_ONLY_COSINES, BOTH, "the cosine stands in place of the sine"},
    {ROPE_ONLY_SINES, BOTH, "the sine stands in place of the cosine"},
    {ROPE_ANGLES, BOTH, "the table holds cosines and sines already, no angles"},
    {ROPE_FIRST_ANGLE, BOTH, "all pairs turn by the angle of the first pair"},
    {ROPE_TWICE, BOTH, "both results are written to the first of the pair"},
    {ROPE_FAR, BOTH, "the second of the pair is read one place too far"},
    {ROPE_SAME, BOTH, "the first of the pair is read in place of the second"},
    {ROPE_OVERLAP, BOTH, "the pairs overlap: from one to the next it is 2 channels"},
    {ROPE_STEP_C, BOTH, "a row of qkv is 3 C long, not C"},
    {ROPE_STEP_2C, BOTH, "a row of qkv is 3 C long, not 2 C"},
    {0, 0, NULL}};

static number at_or_nan(const number *x, long i, size_t n) {
    return i < 0 || i >= (long)n ? NAN : x[i];
}

static void rope_pair(number *out, long first, int j, int t, number *const *in, const Case *c,
                      int wrong) {
    int hs = c->C / c->NH, size = wrong == ROPE_TABLE_C ? c->C : hs;
    long second = first + (wrong == ROPE_HALVES ? hs / 2 : 1);
    long at = (long)t * size + (wrong == ROPE_FIRST_ANGLE ? 0 : j);
    number cosine = at_or_nan(in[1], at, c->size[1]), sine = at_or_nan(in[1], at + 1, c->size[1]);
    if (wrong == ROPE_ANGLES) sine = sin(creal(cosine)), cosine = cos(creal(cosine));
    if (wrong == ROPE_SWAPPED) { number x = cosine; cosine = sine, sine = x; }
    if (wrong == ROPE_NO_SINE) sine = 0;
    if (wrong == ROPE_ONLY_COSINES) sine = cosine;
    if (wrong == ROPE_ONLY_SINES) cosine = sine;
    if ((c->factor < 0) != (wrong == ROPE_BACK)) sine = -sine;
    number x0 = out[first], x1 = at_or_nan(out, wrong == ROPE_SAME ? first
                                                : second + (wrong == ROPE_FAR), c->out_size);
    if (second >= (long)c->out_size) return;
    out[first] = x0 * cosine + (wrong == ROPE_FIRST_PLUS ? x1 : -x1) * sine;
    if (wrong == ROPE_ALIASED) x0 = out[first];
    number y = (wrong == ROPE_SECOND_MINUS ? -x0 : x0) * sine +
               (wrong == ROPE_COSINE_MINUS ? -x1 : x1) * cosine;
    out[wrong == ROPE_TWICE ? first : second] = y;
}

// In place, as the layer does it: so a pair that is read too late is what has been made of it.
static void rope(number *out, number *const *in, const Case *c, int wrong) {
    int C = c->C, hs = C / c->NH, step = wrong == ROPE_STEP_C ? C : wrong == ROPE_STEP_2C ? 2 * C
                                                                                         : 3 * C;
    int begin = wrong == ROPE_KEYS ? C : wrong == ROPE_LATER_HEADS ? hs : 0;
    int end = wrong == ROPE_VALUES ? 3 * C : wrong == ROPE_QUERIES ? C : 2 * C;
    for (size_t i = 0; i < c->out_size; i++) out[i] = in[0][i];
    for (int n = 0; n < c->B * c->T; n++)
        for (int head = begin; head < end; head += hs)
            for (int j = 0; j < hs; j += wrong == ROPE_OVERLAP ? 1 : 2) {
                int t = wrong == ROPE_ROW ? n : wrong == ROPE_SEQUENCE ? n / c->T : n % c->T;
                t += (wrong == ROPE_NEXT) - (wrong == ROPE_BEFORE);
                if (wrong == ROPE_ONE_HEAD && head % C >= hs) continue;
                long first = (long)n * step + head + (wrong == ROPE_HALVES ? j / 2 : j);
                rope_pair(out, first, wrong == ROPE_HEAD ? head % C + j : j, t, in, c, wrong);
            }
}

static double *rope_table(int T, int hs) {
    double *table = room(T * hs, sizeof *table);
    for (int i = 0; i < T * hs; i++) {
        double angle = i / hs * pow(10000, -2.0 * (i % hs / 2) / hs);
        table[i] = (float)(i % 2 ? sin(angle) : cos(angle));
    }
    return table;
}

static void qkv_input(Case *c, double size) {
    add_input(c, 0, "qkv", c->B * c->T, 3 * c->C, size);
    c->sections = 3;
    c->parts[0] = "q", c->parts[1] = "k", c->parts[2] = "v";
}

static Case rope_case(int k) {
    static const int shapes[][4] = {{1, 5, 4, 1}, {1, 1, 4, 1}, {1, 5, 12, 3}, {2, 5, 4, 1},
                                    {3, 7, 20, 2}};
    static const char *const names[] = {"one head of 4 channels", "T = 1", "3 heads of 4 channels",
                                        "2 sequences", "3 sequences, 2 heads of 10"};
    Case c = {.name = names[k], .B = shapes[k][0], .T = shapes[k][1], .C = shapes[k][2],
              .NH = shapes[k][3]};
    int hs = c.C / c.NH;
    qkv_input(&c, 1);
    c.in[1] = rope_table(c.T, hs), c.size[1] = (size_t)c.T * hs;
    c.names[1] = "the table", c.rows[1] = c.T, c.out_size = c.size[0];
    return c;
}

static Result qkv_result(const char *name, const float *got, const double *expected, const Case *c,
                         const char *q, const char *k, const char *v) {
    Result r = result_of(name, got, expected, 0, c->B * c->T, 3 * c->C, "row", "channel");
    r.sections = 3, r.section_names[0] = q, r.section_names[1] = k, r.section_names[2] = v;
    return r;
}

static void check_rope(int backward) {
    for (int k = 0; k < 5; k++) {
        Case c = rope_case(k);
        int hs = c.C / c.NH;
        double *dout = numbers(c.size[0], 1), *angles = c.in[1];
        begin_case(&c);
        float *table = input("table", angles, c.size[1]);
        float *x = in_place(backward ? "dqkv" : "qkv", backward ? dout : c.in[0], c.size[0]);
        float *made = output("rope_angles", (size_t)c.T * hs);
        remember();
        if (!backward) submission.rope_angles(made, c.T, hs);
        (backward ? submission.rope_backward : submission.rope_forward)(x, table, c.B, c.T, c.C,
                                                                        hs);
        if (check_watched()) continue;
        Result a = result_of("rope_angles", made, angles, 0, c.T, hs, "position", "column");
        if (!backward && compare(&a))
            report(&a, "pair j turns by t 10000^(-2j/hs); the cosine comes first");
        double *right = backward ? differentiate(rope, &c, 0, dout, 0) : evaluate(rope, &c, 0);
        Result r = qkv_result(backward ? "dqkv" : "qkv", x, right, &c, "the queries", "the keys",
                              "the values");
        r.in_place = 1;
        if (!compare(&r)) continue;
        if (!backward) forward_mistakes(&r, rope, &c, 0, rope_mistakes);
        for (int side = -1; side <= 1 && backward; side += 2) {  // mistaken rotations, either way
            c.in[0] = dout, c.factor = side;
            for (const Mistake *m = rope_mistakes; m->text; m++)
                if (m->pass & BACKWARD) add_hypothesis(&r, m->text, evaluate(rope, &c, m->number));
            reading_mistakes(&r, &(Outcome){.f = rope, .c = &c}, 0, 0);
        }
        size_t first = 0;
        while (!r.is_wrong[first]) first++;
        report(&r, first < r.n / c.B ? NULL : "only later sequences are wrong: the position begins "
               "anew in each, it is n % T");
    }
}

static void check_rope_forward(void) { check_rope(0); }
static void check_rope_backward(void) { check_rope(1); }

// ---- swiglu: in[0] (N,2H), a row holds h1, then h3; in the code here they are a and b.

enum { SWIGLU_HELD = 1, SWIGLU_SWAPPED, SWIGLU_SIGMOID, SWIGLU_PRODUCT, SWIGLU_SUM, SWIGLU_NEGATIVE,
       SWIGLU_TANH, SWIGLU_LINEAR, SWIGLU_MIXED, SWIGLU_INTERLEAVED,
       SWIGLU_BESIDE, SWIGLU_FAR, SWIGLU_RELU, SWIGLU_GELU, SWIGLU_ONLY_TANH };
static const Mistake swiglu_mistakes[] = {
    {SWIGLU_HELD, 2, "silu(h1) = h1 sigmoid(h1) is a product: the term through the sigmoid is "
     "missing"},
    {SWIGLU_LINEAR, 2, "silu(h1) = h1 sigmoid(h1) is a product: the term through its factor h1 is "
     "missing"},
    {SWIGLU_SWAPPED, 3, "the halves are exchanged: silu(h3) h1 in place of silu(h1) h3"},
    {SWIGLU_SIGMOID, 3, "sigmoid(h1) h3: the factor h1 is missing"},
    {SWIGLU_PRODUCT, 3, "h1 h3: the sigmoid is missing"},
    {SWIGLU_SUM, 3, "silu(h1) + h3 in place of silu(h1) h3"},
    {SWIGLU_NEGATIVE, 3, "the sign inside of the sigmoid is wrong"},
    {SWIGLU_TANH, 3, "tanh in place of the sigmoid"},
    {SWIGLU_MIXED, 3, "sigmoid(h3) in place of sigmoid(h1)"},
    {SWIGLU_BESIDE, 3, "h3 begins H places after h1, not 1"},
    {SWIGLU_FAR, 3, "h3 begins H places after h1, in the same row; not N H"},
    {SWIGLU_RELU, 3, "ReLU in place of SiLU"},
    {SWIGLU_GELU, 3, "GELU in place of SiLU: the sigmoid is that of h1 itself, without a factor"},
    {SWIGLU_ONLY_TANH, 3, "tanh(h1) in place of h1 sigmoid(h1)"},
    {SWIGLU_INTERLEAVED, 3, "h1 and h3 are read alternately; a row holds all of h1, then all of "
     "h3"},
    {0, 0, NULL}};

static void swiglu(number *out, number *const *in, const Case *c, int wrong) {
    int H = c->K;
    for (int n = 0; n < c->T; n++)
        for (int i = 0; i < H; i++) {
            const number *row = in[0] + n * 2 * H;
            number a = row[i], b = row[H + i];
            if (wrong == SWIGLU_BESIDE) b = row[i + 1];
            if (wrong == SWIGLU_FAR) b = at_or_nan(in[0], (2 * n + c->T) * H + i, c->size[0]);
            if (wrong == SWIGLU_INTERLEAVED) a = row[2 * i], b = row[2 * i + 1];
            if (wrong == SWIGLU_SWAPPED) { number t = a; a = b, b = t; }
            number s = logistic(wrong == SWIGLU_NEGATIVE ? -a : wrong == SWIGLU_MIXED ? b
                                : wrong == SWIGLU_GELU ? 1.702 * a : a);
            if (wrong == SWIGLU_HELD) s = hold(s);
            if (wrong == SWIGLU_LINEAR) a = hold(a);
            if (wrong == SWIGLU_TANH) s = ctanh(a);
            if (wrong == SWIGLU_RELU) s = creal(a) > 0;
            if (wrong == SWIGLU_ONLY_TANH) s = ctanh(a) / a;
            number silu = wrong == SWIGLU_SIGMOID ? s : wrong == SWIGLU_PRODUCT ? a : a * s;
            out[n * H + i] = wrong == SWIGLU_SUM ? silu + b : silu * b;
        }
}

static Case swiglu_case(int k) {
    static const int shapes[][2] = {{5, 7}, {1, 7}, {4, 1}, {5, 64}};
    static const char *const names[] = {"5 rows x 7", "one row", "H = 1", "5 rows x 64"};
    Case c = {.name = names[k], .T = shapes[k][0], .K = shapes[k][1]};
    add_input(&c, 0, "inp", c.T, 2 * c.K, 1.4);
    c.out_size = (size_t)c.T * c.K, c.sections = 2, c.parts[0] = "h1", c.parts[1] = "h3";
    return c;
}

// h1, h3, sigmoid(h1), ... as quantities for a result whose rows are `times` H long.
static void swiglu_quantities(Result *r, const Case *c, const double *dout, int times) {
    static const char *const names[] = {"h1", "h3", "sigmoid(h1)", "1 - sigmoid(h1)",
                                        "1 + sigmoid(h1)", "dout"};
    double *q[6];
    for (int k = 0; k < 6; k++) q[k] = room(r->n, sizeof(double));
    for (size_t i = 0; i < r->n; i++) {
        size_t n = i / (times * c->K), j = i % c->K;
        double a = c->in[0][n * 2 * c->K + j], s = 1 / (1 + exp(-a));
        q[0][i] = a, q[1][i] = c->in[0][n * 2 * c->K + c->K + j], q[2][i] = s, q[3][i] = 1 - s;
        q[4][i] = 1 + s, q[5][i] = dout ? dout[n * c->K + j] : 0;
    }
    for (int k = 0; k < (dout ? 6 : 5); k++) add_quantity(r, names[k], q[k]);
}

static void check_swiglu_forward(void) {
    for (int k = 0; k < 4; k++) {
        Case c = swiglu_case(k);
        begin_case(&c);
        float *x = input("inp", c.in[0], c.size[0]), *y = output("out", c.out_size);
        remember();
        submission.swiglu_forward(y, x, c.T, c.K);
        if (check_watched()) continue;
        Result r = result_of("out", y, evaluate(swiglu, &c, 0), 0, c.T, c.K, "row", "column");
        if (!compare(&r)) continue;
        forward_mistakes(&r, swiglu, &c, 0, swiglu_mistakes);
        swiglu_quantities(&r, &c, NULL, 1);
        report(&r, NULL);
    }
}

static void check_swiglu_backward(void) {
    for (int k = 0; k < 4; k++) {
        Case c = swiglu_case(k);
        double *dout = numbers(c.out_size, 1);
        begin_case(&c);
        float *x = input("inp", c.in[0], c.size[0]), *dy = input("dout", dout, c.out_size);
        float *dx = output("dinp", c.size[0]);
        remember();
        submission.swiglu_backward(dx, dy, x, c.T, c.K);
        if (check_watched()) continue;
        Result r = result_of("dinp", dx, differentiate(swiglu, &c, 0, dout, 0), 0, c.T, 2 * c.K,
                             "row", "column");
        r.sections = 2, r.section_names[0] = "dh1", r.section_names[1] = "dh3";
        if (!compare(&r)) continue;
        backward_mistakes(&r, swiglu, &c, 0, dout, c.T, c.K, swiglu_mistakes, SWIGLU_HELD,
                          "that with the sigmoid held, and all of dh3", "that through the "
                          "derivative of the sigmoid, in dh1");
        swiglu_quantities(&r, &c, dout, 2);
        report(&r, NULL);
    }
}

// ---- matmul: in[0] x (N,C), in[1] the weight (OC,C).

enum { MATMUL_MORE = 1, MATMUL_GROWS, MATMUL_SAME, MATMUL_OUTPUT };
static const Mistake matmul_mistakes[] = {
    {MATMUL_MORE, 1, "one channel too many in the sum: c < C"},
    {MATMUL_GROWS, 1, "the sum goes on from output to output; it must begin at 0 for each"},
    {MATMUL_SAME, 1, "row n of the weight in place of row o"},
    {MATMUL_OUTPUT, 3, "the next output's row of the weight: off by one"},
    {0, 0, NULL}};

static void matmul(number *out, number *const *in, const Case *c, int wrong) {
    int C = c->C, OC = c->K;
    for (int n = 0; n < c->T; n++) {
        number sum = 0;
        for (int o = 0; o < OC; o++) {
            int row = wrong == MATMUL_OUTPUT ? (o + 1) % OC : wrong == MATMUL_SAME ? n : o;
            if (wrong != MATMUL_GROWS) sum = 0;
            for (int i = 0; i < C + (wrong == MATMUL_MORE); i++)
                sum += at_or_nan(in[0], n * C + i, c->size[0]) *
                       at_or_nan(in[1], row * C + i, c->size[1]);
            out[n * OC + o] = sum;
        }
    }
}

static Case matmul_case(int k) {
    static const int shapes[][3] = {{5, 7, 3}, {1, 7, 5}, {4, 4, 4}, {3, 1, 5}, {5, 4, 1},
                                    {13, 37, 19}};
    static const char *const names[] = {"N 5, C 7, OC 3", "one row", "N 4, C 4, OC 4", "C = 1",
                                        "OC = 1", "N 13, C 37, OC 19"};
    Case c = {.name = names[k], .T = shapes[k][0], .C = shapes[k][1], .K = shapes[k][2]};
    add_input(&c, 0, "inp", c.T, c.C, 1), add_input(&c, 1, "weight", c.K, c.C, 1);
    c.out_size = (size_t)c.T * c.K;
    return c;
}

static void check_matmul_forward(void) {
    for (int k = 0; k < 6; k++) {
        Case c = matmul_case(k);
        begin_case(&c);
        float *x = input("inp", c.in[0], c.size[0]), *w = input("weight", c.in[1], c.size[1]);
        float *y = output("out", c.out_size);
        remember();
        submission.matmul_forward(y, x, w, c.T, c.C, c.K);
        if (check_watched()) continue;
        Result r = result_of("out", y, evaluate(matmul, &c, 0), 0, c.T, c.K, "row", "output");
        if (!compare(&r)) continue;
        forward_mistakes(&r, matmul, &c, 0, matmul_mistakes);
        add_constant(&r, "C", c.C);
        report(&r, NULL);
    }
}

static void check_matmul_backward(void) {
    for (int k = 0; k < 6; k++) {
        Case c = matmul_case(k);
        double *dout = numbers(c.out_size, 1);
        begin_case(&c);
        float *x = input("inp", c.in[0], c.size[0]), *w = input("weight", c.in[1], c.size[1]);
        float *dy = input("dout", dout, c.out_size);
        float *dx = output("dinp", c.size[0]), *dw = output("dweight", c.size[1]);
        remember();
        submission.matmul_backward(dx, dw, dy, x, w, c.T, c.C, c.K);
        if (check_watched()) continue;
        Result two[] = {result_of("dinp", dx, differentiate(matmul, &c, 0, dout, 0), 0, c.T, c.C,
                                  "row", "channel"),
                        result_of("dweight", dw, differentiate(matmul, &c, 1, dout, 0), 1, c.K, c.C,
                                  "output", "channel")};
        for (int which = 0; which < 2; which++) {
            Result *r = &two[which];
            if (!compare(r)) continue;
            backward_mistakes(r, matmul, &c, which, dout, c.T, c.K, matmul_mistakes, 0, NULL, NULL);
            add_constant(r, "N", c.T), add_constant(r, "OC", c.K), add_constant(r, "C", c.C);
            report(r, NULL);
        }
    }
}

// ---- attention: in[0] qkv (B,T,3C); in[1] nothing, or (B,NH,T,T) zeros that are added to the
// scores, so that one can differentiate by them. After out (B,T-first,C) comes lse (B,NH,T-first);
// first is 0 in all backward passes.

enum { ATTENTION_HELD = 1, ATTENTION_UNMASKED, ATTENTION_PEEK, ATTENTION_STRICT, ATTENTION_UNSCALED,
       ATTENTION_HS, ATTENTION_C, ATTENTION_UP, ATTENTION_RAW, ATTENTION_ALL, ATTENTION_QQ,
       ATTENTION_KK, ATTENTION_VK, ATTENTION_VQ, ATTENTION_Q0, ATTENTION_K0, ATTENTION_V0,
       ATTENTION_AXIS, ATTENTION_TRANSPOSED, ATTENTION_NOT_EXP, ATTENTION_FUTURE, ATTENTION_MEAN,
       ATTENTION_T, ATTENTION_GROUPED, ATTENTION_BY_HEAD, ATTENTION_VT, ATTENTION_B0,
       FIRST_IGNORED, FIRST_NOT_IN_MASK, FIRST_NOT_IN_Q, FIRST_IN_KEYS, FIRST_IN_B,
       LSE_NO_M, LSE_NO_LOG, LSE_ONLY_M, LSE_MINUS, LSE_M_TWICE, LSE_TWO_M };  // of lse alone
static const Mistake attention_mistakes[] = {
    {ATTENTION_UNMASKED, 3, "the causal mask is missing: it reads keys after the query (future "
     "tokens)"},
    {ATTENTION_PEEK, 3, "the mask is off by one: a query sees the key after it (a future token); "
     "s <= t is allowed"},
    {ATTENTION_STRICT, 3, "the mask is off by one: a query must see the key at its own position"},
    {ATTENTION_UNSCALED, 3, "the scores lack their factor 1 / sqrt(hs)"},
    {ATTENTION_HS, 3, "the scores are scaled by 1 / hs; it must be 1 / sqrt(hs)"},
    {ATTENTION_C, 3, "the scores are scaled by 1 / sqrt(C); it must be 1 / sqrt(hs)"},
    {ATTENTION_UP, 3, "the scores are multiplied by sqrt(hs) in place of divided"},
    {ATTENTION_FUTURE, 3, "the mask is the wrong way round: a query sees the keys from its own "
     "position on, not those up to it"},
    {ATTENTION_MEAN, 1, "divided by the number of keys in place of the sum of the exponentials"},
    {ATTENTION_T, 1, "divided by T in place of the sum of the exponentials"},
    {ATTENTION_GROUPED, 3, "two heads share keys and values, as in grouped-query attention; here "
     "each head has its own"},
    {ATTENTION_BY_HEAD, 3, "q, k and v are read head by head; a row holds the queries of all "
     "heads, then all keys, then all values"},
    {ATTENTION_B0, 3, "keys and values of the first sequence are used for every sequence"},
    {ATTENTION_VT, 3, "the value of the query's position in place of the key's: v_t, not v_s"},
    {ATTENTION_RAW, 1, "not divided by the row's sum: the softmax is not normalized"},
    {ATTENTION_ALL, 3, "the row's sum goes over all keys, the future ones too"},
    {ATTENTION_QQ, 3, "queries are used as keys"},
    {ATTENTION_KK, 3, "keys are used as queries"},
    {ATTENTION_VK, 3, "keys are used as values"},
    {ATTENTION_VQ, 3, "queries are used as values"},
    {ATTENTION_Q0, 3, "all heads use the queries of the first head"},
    {ATTENTION_K0, 3, "all heads use the keys of the first head"},
    {ATTENTION_V0, 3, "all heads use the values of the first head"},
    {ATTENTION_AXIS, 3, "the wrong axis: the softmax sums over the queries; it must be the keys"},
    {ATTENTION_TRANSPOSED, 2, "P is transposed: P_st in place of P_ts"},
    {LSE_NO_M, 1, "lse = m + log(sum): m is missing"},
    {LSE_NO_LOG, 1, "lse = m + log(sum): the log is missing"},
    {LSE_ONLY_M, 1, "lse = m + log(sum): log(sum) is missing"},
    {LSE_MINUS, 1, "lse = m + log(sum): a sign is wrong"},
    {LSE_M_TWICE, 1, "lse = m + log(sum): m is scaled wrongly (by sqrt(hs))"},
    {LSE_TWO_M, 1, "the largest score is not subtracted before the exponential (but added after "
     "the log)"},
    {ATTENTION_NOT_EXP, 1, "the exponential is missing"},
    {0, 0, NULL}};

// Mistakes that change nothing where first is 0.
static const Mistake first_mistakes[] = {
    {FIRST_IGNORED, 1, "first is ignored: the rows computed are those of positions 0 to "
     "T - first - 1; they must be those of positions first to T - 1"},
    {FIRST_NOT_IN_MASK, 1, "first is missing in the mask: row i belongs to position first + i, and "
     "sees all keys s <= first + i"},
    {FIRST_NOT_IN_Q, 1, "first is missing where the query is read: row i is the query of position "
     "first + i"},
    {FIRST_IN_KEYS, 1, "the keys before position first are left out: every query sees the keys "
     "from position 0 on"},
    {FIRST_IN_B, 1, "sequence b is read from row b (T - first) of qkv on; it begins at row b T, "
     "because qkv holds all T positions"},
    {0, 0, NULL}};

// Where head h of part 0, 1 or 2 (q, k, v) of a row begins.
static const number *attention_head(number *const *in, const Case *c, int b, int t, int part, int h,
                                    int wrong) {
    int C = c->C, hs = C / c->NH;
    if ((wrong == ATTENTION_Q0 && part == 0) || (wrong == ATTENTION_K0 && part == 1) ||
        (wrong == ATTENTION_V0 && part == 2))
        h = 0;
    if (wrong == ATTENTION_GROUPED && part > 0) h /= 2;
    if (wrong == ATTENTION_B0 && part > 0) b = 0;
    return in[0] + (size_t)(b * (c->T - (wrong == FIRST_IN_B ? c->first : 0)) + t) * 3 * C +
           (wrong == ATTENTION_BY_HEAD ? (3 * h + part) * hs : part * C + h * hs);
}

static number attention_score(number *const *in, const Case *c, int b, int h, int t, int s,
                              int wrong) {
    int C = c->C, hs = C / c->NH;
    int row = wrong == FIRST_NOT_IN_Q ? t - c->first : t;
    const number *q = attention_head(in, c, b, row, 0, h, wrong);
    const number *k = attention_head(in, c, b, s, 1, h, wrong);
    number sum = 0;
    if (wrong == ATTENTION_QQ) k -= C;
    if (wrong == ATTENTION_KK) q += C;
    for (int i = 0; i < hs; i++) sum += q[i] * k[i];
    sum *= wrong == ATTENTION_UNSCALED ? 1 : wrong == ATTENTION_HS ? 1.0 / hs
           : wrong == ATTENTION_C ? 1 / sqrt(C) : wrong == ATTENTION_UP ? sqrt(hs) : 1 / sqrt(hs);
    return c->size[1] ? sum + in[1][((b * c->NH + h) * c->T + t) * c->T + s] : sum;
}

// The keys that query t sees are those from *begin to *end - 1.
static void attention_keys(const Case *c, int t, int wrong, int *begin, int *end) {
    *begin = wrong == ATTENTION_TRANSPOSED || wrong == ATTENTION_FUTURE ? t : 0;
    *end = t + 1;
    if (wrong == ATTENTION_UNMASKED || wrong == ATTENTION_TRANSPOSED || wrong == ATTENTION_FUTURE)
        *end = c->T;
    if (wrong == ATTENTION_PEEK && t + 1 < c->T) *end = t + 2;
    if (wrong == ATTENTION_STRICT) *end = t;
    if (wrong == FIRST_NOT_IN_MASK) *end = t - c->first + 1;
    if (wrong == FIRST_IN_KEYS) *begin = c->first;
}

static double lse_mistake(int wrong, double m, double sum, int hs) {
    return wrong == LSE_NO_M ? log(sum) : wrong == LSE_NO_LOG ? m + sum : wrong == LSE_ONLY_M ? m
           : wrong == LSE_TWO_M ? 2 * m + log(sum) : wrong == LSE_M_TWICE ? m * sqrt(hs) + log(sum)
           : wrong == LSE_MINUS ? m - log(sum) : m + log(sum);
}

static void attention_row(number *out, number *lse, number *const *in, const Case *c, int b, int h,
                          int t, int wrong) {
    int hs = c->C / c->NH, begin, end;
    int part = wrong == ATTENTION_VK ? 1 : wrong == ATTENTION_VQ ? 0 : 2;
    number *p = room(c->T, sizeof *p), sum = 0;
    double m = -1e300;
    attention_keys(c, t, wrong, &begin, &end);
    for (int s = begin; s < end; s++) {
        p[s] = attention_score(in, c, b, h, t, s, wrong);
        if (creal(p[s]) > m) m = creal(p[s]);
    }
    for (int s = begin; s < end; s++)
        sum += p[s] = wrong == ATTENTION_NOT_EXP ? p[s] : cexp(p[s] - m);
    *lse = m + clog(sum);
    if (wrong >= LSE_NO_M) *lse = lse_mistake(wrong, m, creal(sum), hs);
    if (wrong == ATTENTION_HELD) sum = hold(sum);
    if (wrong == ATTENTION_ALL)
        for (int s = end; s < c->T; s++) sum += cexp(attention_score(in, c, b, h, t, s, 0) - m);
    for (int s = begin; s < end; s++) {
        if (wrong == ATTENTION_TRANSPOSED || wrong == ATTENTION_AXIS) {  // another's P
            number total = 0;
            int axis = wrong == ATTENTION_AXIS, from = axis ? s : 0, to = axis ? c->T : s + 1;
            for (int u = from; u < to; u++)
                total += cexp(axis ? attention_score(in, c, b, h, u, s, 0)
                                   : attention_score(in, c, b, h, s, u, 0));
            p[s] = cexp(axis ? attention_score(in, c, b, h, t, s, 0)
                             : attention_score(in, c, b, h, s, t, 0)) / total;
            sum = 1;
        }
        int at = wrong == ATTENTION_VT ? t : s;
        const number *v = attention_head(in, c, b, at, part, h, wrong);
        number weight = p[s] / (wrong == ATTENTION_RAW ? 1 : wrong == ATTENTION_MEAN ? t + 1
                                : wrong == ATTENTION_T ? c->T : sum);
        for (int i = 0; i < hs; i++) out[i] += weight * v[i];
    }
    free(p);
}

static int first_row, last_row;  // of attention(): all of them if last_row is 0

// Row i belongs to position first + i.
static void attention(number *out, number *const *in, const Case *c, int wrong) {
    int C = c->C, hs = C / c->NH, rows = c->T - c->first;
    for (size_t i = 0; i < c->out_size; i++) out[i] = 0;
    for (int b = 0; b < c->B; b++)
        for (int h = 0; h < c->NH; h++)
            for (int i = first_row; i < (last_row ? last_row : rows); i++) {
                number lse;
                attention_row(out + (size_t)(b * rows + i) * C + h * hs, &lse, in, c, b, h,
                              wrong == FIRST_IGNORED ? i : c->first + i, wrong);
                size_t at = (size_t)c->B * rows * C + (b * c->NH + h) * rows + i;
                if (at < c->out_size) out[at] = lse;
            }
}

static Case attention_case(int k, int with_lse) {
    static const int shapes[][4] = {{1, 1, 3, 1}, {1, 5, 3, 1}, {1, 5, 12, 3}, {2, 4, 6, 2},
                                    {1, 17, 6, 1}, {1, 6, 4, 1}, {1, 0, 4, 1}, {1, 7, 6, 2},
                                    {2, 6, 6, 2}};
    static const char *const names[] = {"T = 1", "T = 5, one head", "T = 5, 3 heads",
                                        "2 sequences, 2 heads", "T = 17", "T = 6, large scores",
                                        "", "T = 7, first = 4", "2 sequences, T = 6, first = 2"};
    Case c = {.name = names[k], .B = shapes[k][0], .T = shapes[k][1], .C = shapes[k][2],
              .NH = shapes[k][3]};
    c.first = k == 7 ? 4 : k == 8 ? 2 : 0;
    if (submission.cuda && c.C / c.NH % 2) c.C += c.NH;  // pairs of channels are loaded there
    if (k == 6) c.T = submission.cuda ? 140 : 530;       // several blocks
    if (k == 6) c.name = submission.cuda ? "T = 140" : "T = 530";
    qkv_input(&c, k == 6 ? 1.6 : 1.2);
    for (size_t i = 0; i < c.size[0] && k == 5; i++)  // large queries and keys
        if (i / c.C % 3 < 2) c.in[0][i] = (float)(c.in[0][i] * 10);
    for (int i = 0; i < c.C && k == 5; i++)  // the first score, all that its query sees: -200
        c.in[0][c.C + i] = (float)(-200 * sqrt(c.C) / c.C / c.in[0][i]);
    c.out_size = (size_t)c.B * (c.T - c.first) * (c.C + (with_lse ? c.NH : 0));
    return c;
}

static const char several_heads[] =
    "one head of one sequence is right: look at where a head begins in qkv and out, at the order "
    "(B,NH,T) of lse, and whether hs is meant where C stands";
static const char several_lanes[] =
    "one key is right, several are not: are a row's largest score and its sum taken over all lanes "
    "that share it?";
static const char at_large_scores[] =
    "only large scores go wrong: is the largest one subtracted before the exponential, and found "
    "too where all are negative?";
static const char across_blocks[] =
    "shorter sequences are right: look at what happens from one block to the next (where a block "
    "begins, the correction of what has been summed, whether a product adds or writes)";

static const char from_first_on[] =
    "all cases with first = 0 are right; in general, row i of out (B,T-first,C) and of lse "
    "(B,NH,T-first) belongs to position first + i of qkv (B,T,3C), whose query sees all keys from "
    "position 0 to first + i";

static void attention_mistakes_of(Result *r, const Case *c, size_t offset) {
    for (const Mistake *m = first_mistakes; c->first && m->text; m++)
        add_hypothesis(r, m->text, evaluate(attention, c, m->number) + offset);
    forward_mistakes(r, attention, c, offset, attention_mistakes);
}

static void check_attention_forward(void) {
    int bad = 0;
    for (int k = 0; k < 9; k++) {
        Case c = attention_case(k, 1);
        int queries = c.T - c.first;
        size_t n = (size_t)c.B * queries * c.C, rows = (size_t)c.B * c.NH * queries;
        begin_case(&c);
        float *x = input("qkv", c.in[0], c.size[0]), *y = output("out", n);
        float *lse = output("lse", rows);
        remember();
        submission.attention_forward(y, lse, x, c.first, c.B, c.T, c.C, c.NH);
        if (check_watched()) {
            if (c.first && !bad) wrong("first", "%s", from_first_on);
            bad = 1;
            continue;
        }
        double *right = evaluate(attention, &c, 0);
        Result r = result_of("out", y, right, 0, c.B * queries, c.C, "row", "channel");
        Result s = result_of("lse", lse, right + n, 0, c.B * c.NH, queries, "head", "position");
        const char *about = bad ? NULL : k == 1 && submission.cuda ? several_lanes
                            : k == 6 ? across_blocks : k == 5 ? at_large_scores
                            : k == 2 || k == 3 ? several_heads : NULL;
        r.tolerance = s.tolerance = k == 5 ? 5e-4 : 1e-4;
        if (compare(&r)) {
            if (k != 6) attention_mistakes_of(&r, &c, 0);
            double *by_heads = room(r.n, sizeof *by_heads);
            for (size_t i = 0; i < n; i++) {
                int hs = c.C / c.NH, bt = (int)(i / c.C), h = (int)(i % c.C) / hs;
                int row = (bt / queries * c.NH + h) * queries + bt % queries;
                by_heads[row * hs + i % hs] = right[i];
            }
            add_hypothesis(&r, "out is written as (B,NH,T,hs); it is (B,T,C)", by_heads);
            report(&r, about);
        }
        if (compare(&s)) {
            if (k != 6) attention_mistakes_of(&s, &c, n);
            report(&s, about);
        }
        if (c.first && !bad && (r.num_wrong || s.num_wrong)) wrong("first", "%s", from_first_on);
        bad = bad || r.num_wrong || s.num_wrong;
    }
}

// sum_s M_ts x_s, or with `transposed` sum_t M_ts x_t, for each head: x is a part of qkv (0 q, 1 k,
// 2 v), dout (3) or out (4). The result goes to part `to` of z, which is like qkv.
static void mix(double *z, const Case *c, const double *M, int transposed, int part, int to,
                const double *dout, const double *out) {
    int T = c->T, C = c->C, hs = C / c->NH;
    const double *x = part == 4 ? out : dout;
    for (int b = 0; b < c->B; b++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < C; i++) {
                const double *m = M + (size_t)(b * c->NH + i / hs) * T * T;
                double sum = 0;
                for (int s = 0; s < T; s++)
                    sum += m[transposed ? s * T + t : t * T + s] *
                           (part >= 3 ? x[(b * T + s) * C + i]
                                      : c->in[0][(b * T + s) * 3 * C + part * C + i]);
                z[(b * T + t) * 3 * C + to * C + i] = sum;
            }
}

// Products with the wrong one of the two neighbours, or the wrong side of the matrix.
static void wrong_products(Result *r, const Case *c, const double *dS, const double *P,
                           const double *dout, const double *out) {
    static const char *const names[] = {"q", "k", "v", "dout", "out"};
    static const char *const to[] = {"dq", "dk", "dv"};
    static const int partners[] = {1, 0, 3};
    for (int k = 0; k < 3 * 2 * 2 * 5; k++) {
        int gradient = k / 20, which = k / 10 % 2, transposed = k / 5 % 2, part = k % 5;
        const char *name = which ? "P" : "dS";
        char *text = room(300, 1);
        double *z = room(r->n, sizeof *z);
        memcpy(z, r->expected, r->n * sizeof *z);
        mix(z, c, which ? P : dS, transposed, part, gradient, dout, out);
        if (part == partners[gradient] && which == (gradient == 2))
            sprintf(text, "the indices of %s are transposed in the sum for %s", name, to[gradient]);
        else
            sprintf(text, "%s is a product of the wrong things: this is %s%s times %s",
                    to[gradient], name, transposed ? " transposed" : "", names[part]);
        add_hypothesis(r, text, z);
    }
}

// All scores; and out from in[1] (B,NH,T,T) in place of P.
static void all_scores(number *out, number *const *in, const Case *c, int wrong) {
    for (int i = 0; i < (int)c->out_size; i++) {
        int s = i % c->T, t = i / c->T % c->T, head = i / c->T / c->T;
        out[i] = attention_score(in, c, head / c->NH, head % c->NH, t, s, wrong);
    }
}

static void all_values(number *out, number *const *in, const Case *c, int wrong) {
    int hs = c->C / c->NH;
    for (int i = 0; i < (int)c->out_size; i++) {
        int t = i / c->C % c->T, b = i / c->C / c->T, h = i % c->C / hs;
        out[i] = 0;
        for (int s = 0; s < c->T; s++)
            out[i] += in[1][((b * c->NH + h) * c->T + t) * c->T + s] *
                      attention_head(in, c, b, s, 2, h, wrong)[i % hs];
    }
}

// All three gradients from a dS or a P with something wrong in it.
static void wrong_matrices(Result *r, const Case *c, const double *dS, const double *held,
                           double *P, const double *dout) {
    enum { NO_P, DIAGONAL_ONLY, NO_DIAGONAL, LAST_KEY, KINDS };
    static const char *const texts[] = {
        "the factor P is missing in the gradient of the scores",
        "the softmax's derivative is more than P (1 - P): a score acts on every P of its row",
        "the mask is off by one: a query must see the key at its own position",
        "only a query's last key counts: is dq set (=) in the loop instead of added (+=)?"};
    size_t cells = (size_t)c->B * c->NH * c->T * c->T;
    for (int kind = 0; kind < KINDS; kind++) {
        double *S = room(cells, sizeof *S), *Q = room(cells, sizeof *Q);
        Case scores = *c, values = *c;
        for (size_t i = 0; i < cells; i++) {
            int diagonal = i % c->T == i / c->T % c->T;
            S[i] = kind == NO_P ? (P[i] > 0 ? dS[i] / P[i] : 0) : kind == DIAGONAL_ONLY
                   ? held[i] * (1 - P[i]) : (kind == LAST_KEY) == diagonal ? dS[i] : 0;
            Q[i] = kind == NO_DIAGONAL && diagonal ? 0 : P[i];
        }
        scores.out_size = cells, values.in[1] = Q, values.size[1] = cells;
        double *z = differentiate(all_scores, &scores, 0, S, 0);
        double *v = differentiate(all_values, &values, 0, dout, 0);
        for (int i = 0; i < (int)r->n; i++)
            z[i] = kind == LAST_KEY && i % r->columns >= c->C ? r->expected[i] : z[i] + v[i];
        add_hypothesis(r, texts[kind], z);
    }
}

static void attention_products(Result *r, const Case *c, const double *dout, const double *out,
                               const double *lse) {
    size_t cells = (size_t)c->B * c->NH * c->T * c->T;
    double *P = room(cells, sizeof *P), scale = 1 / sqrt(c->C / c->NH), *e = room(r->n, sizeof *e);
    Case d = *c;
    d.in[1] = repeated(0, cells), d.size[1] = cells;
    double *dS = differentiate(attention, &d, 1, dout, 0);
    double *held = differentiate(attention, &d, 1, dout, ATTENTION_HELD);
    number *in[3] = {room(c->size[0], sizeof(number)), NULL, NULL};
    for (size_t i = 0; i < c->size[0]; i++) in[0][i] = c->in[0][i];
    for (size_t i = 0; i < cells; i++) {
        int s = i % c->T, t = i / c->T % c->T, head = (int)(i / c->T / c->T);
        if (s <= t)
            P[i] = exp(creal(attention_score(in, c, head / c->NH, head % c->NH, t, s, 0)) -
                       lse[head * c->T + t]);
    }
    wrong_matrices(r, c, dS, held, P, dout);
    for (size_t i = 0; i < cells; i++) dS[i] *= scale;
    wrong_products(r, c, dS, P, dout, out);
    for (size_t i = 0; i < r->n; i++) {
        int bt = (int)(i / r->columns), h = (int)(i % c->C) / (c->C / c->NH);
        e[i] = exp(lse[(bt / c->T * c->NH + h) * c->T + bt % c->T]);
    }
    add_quantity(r, "e^lse (P = e^(S - lse))", e);
}

// Does the gradient read the future? Changes all that comes after position t, but for the softmax
// that was given, and looks at what must not depend on it.
static const char *reads_future(const Case *c, const double *dout, const double *out,
                                const double *lse) {
    int t = c->T / 2, changed = 0;
    size_t n = c->size[0];
    num_watched = 0;
    float *x = input("qkv", c->in[0], n), *dy = input("dout", dout, (size_t)c->B * c->T * c->C);
    float *y = input("out", out, (size_t)c->B * c->T * c->C);
    float *l = input("lse", lse, (size_t)c->B * c->NH * c->T);
    float *one = output("dqkv", n), *two = output("dqkv", n), *three = output("dqkv", n);
    memcpy(two, one, n * sizeof *two), memcpy(three, one, n * sizeof *three);
    remember();
    submission.attention_backward(one, dy, y, l, x, c->B, c->T, c->C, c->NH);
    int middle = (t + 1) * 3 * c->C, end = c->T * 3 * c->C;
    for (int i = middle; i < end; i++) x[i] += 0.5f;
    submission.attention_backward(two, dy, y, l, x, c->B, c->T, c->C, c->NH);
    for (int i = 0; i < end; i++) x[i] = (float)c->in[0][i] + (i < middle ? 0.5f : 0);
    submission.attention_backward(three, dy, y, l, x, c->B, c->T, c->C, c->NH);
    for (int i = 0; i < end; i++) {
        int is_dq = i % (3 * c->C) < c->C;
        if (i < middle && is_dq) changed |= !(fabs(one[i] - two[i]) < 1e-4);
        if (i >= middle && !is_dq) changed |= 2 * !(fabs(one[i] - three[i]) < 1e-4);
    }
    return changed & 1 ? "dq depends on keys or values after its query (future tokens): check the "
                         "mask" : changed ? "dk or dv depends on queries before its key, which do "
                         "not see it: check the mask" : NULL;
}

// P without the subtraction of lse and the like show where there is but one key: P must be 1.
static void one_key_hints(Result *r, const Case *c, const double *lse) {
    double *P = room(r->n, sizeof *P), *up = room(r->n, sizeof *up), *hs = room(r->n, sizeof *hs);
    for (size_t i = 0; i < r->n; i++) {
        int h = (int)(i % c->C / (c->C / c->NH));
        double root = sqrt(c->C / c->NH);
        P[i] = exp(lse[h]), up[i] = exp(lse[h] * (root - 1)), hs[i] = exp(lse[h] * (1 / root - 1));
    }
    double *unseen = room(r->n, sizeof *unseen);  // a mask without the diagonal: all 0
    add_hypothesis(r, "the mask is off by one: a query must see the key at its own position",
                   unseen);
    add_quantity(r, "e^lse (P = e^(S - lse))", P);
    add_quantity(r, "e^(score - score / sqrt(hs)) (P is made of scores without their scale)", up);
    add_quantity(r, "e^(S / sqrt(hs) - S) (P is made of scores divided by hs)", hs);
}

static void check_attention_small(int k, int bad) {
    Case c = attention_case(k, 0), d = attention_case(k, 1);
    size_t n = c.out_size;
    d.in[0] = c.in[0];
    double *dout = numbers(n, 1), *out = evaluate(attention, &d, 0), *lse = out + n;
    begin_case(&c);
    float *x = input("qkv", c.in[0], c.size[0]), *dy = input("dout", dout, n);
    float *y = input("out", out, n), *l = input("lse", lse, (size_t)c.B * c.NH * c.T);
    float *dx = output("dqkv", c.size[0]);
    remember();
    submission.attention_backward(dx, dy, y, l, x, c.B, c.T, c.C, c.NH);
    if (check_watched()) return;
    Result r = qkv_result("dqkv", dx, differentiate(attention, &c, 0, dout, 0), &c, "dq", "dk",
                          "dv");
    r.tolerance = k == 5 ? 1e-3 : k == 0 ? 1e-4 : 2e-4;
    if (!compare(&r)) return;
    float *old = copy_of(before(dx), c.size[0]);
    const char *future = c.B == 1 && c.T > 2 ? reads_future(&c, dout, out, lse) : NULL;
    watched[0] = (Watched){"dqkv", dx, c.size[0], old, 1}, num_watched = 1;
    add_constant(&r, "sqrt(hs)", sqrt(c.C / c.NH)), add_constant(&r, "hs", c.C / c.NH);
    if (k == 0) one_key_hints(&r, &c, lse);
    if (k && c.T <= 6) {
        if (k < 5) attention_products(&r, &c, dout, out, lse);
        backward_mistakes(&r, attention, &c, 0, dout, c.B * c.T, c.C, attention_mistakes,
                          ATTENTION_HELD, "that with the softmax's sum held, and all of dv", "that "
                          "through the softmax's sum, in which every score of the row is");
    }
    report(&r, future ? future : (k == 2 || k == 3) && !bad ? several_heads : NULL);
}

// Several blocks: a sample of the elements, the gradient of one at a time.
static void check_attention_large(int bad) {
    enum { EACH = 16 };
    Case c = attention_case(6, 0), d = c;
    size_t n = c.out_size;
    d.out_size += (size_t)c.NH * c.T;
    double *dout = numbers(n, 1), *out = evaluate(attention, &d, 0), *lse = out + n;
    double *expected = room(3 * EACH, sizeof *expected);
    number *in[3] = {room(c.size[0], sizeof(number)), NULL, NULL}, *z = room(n, sizeof *z);
    begin_case(&c);
    float *x = input("qkv", c.in[0], c.size[0]), *dy = input("dout", dout, n);
    float *y = input("out", out, n), *l = input("lse", lse, (size_t)c.NH * c.T);
    float *dx = output("dqkv", c.size[0]), *sample = output("dqkv (a sample)", 3 * EACH);
    remember();
    submission.attention_backward(dx, dy, y, l, x, c.B, c.T, c.C, c.NH);
    if (check_watched()) return;
    for (size_t i = 0; i < c.size[0]; i++) in[0][i] = c.in[0][i];
    for (int i = 0; i < 3 * EACH; i++) {
        int part = i / EACH, t = (int)((i % EACH + (uniform() + 1) / 2) * c.T / EACH);
        int channel = (int)((uniform() + 1) / 2 * c.C);
        size_t at = (size_t)t * 3 * c.C + part * c.C + channel;
        in[0][at] += I * 1e-30;
        first_row = t, last_row = part == 0 ? t + 1 : c.T;
        attention(z, in, &c, 0);
        for (size_t j = 0; j < n; j++) expected[i] += dout[j] * (cimag(z[j]) / 1e-30);
        in[0][at] = c.in[0][at], sample[i] = dx[at];
    }
    first_row = last_row = 0;
    Result r = result_of("dqkv", sample, expected, 0, 1, 3 * EACH, "row", "sampled position");
    r.sections = 3, r.tolerance = 1e-3;
    r.section_names[0] = "dq", r.section_names[1] = "dk", r.section_names[2] = "dv";
    if (compare(&r)) report(&r, bad ? NULL : across_blocks);
}

static void check_attention_backward(void) {
    for (int k = 0; k < 6; k++) check_attention_small(k, num_complaints > 0);
    check_attention_large(num_complaints > 0);
}

// ---- crossentropy: in[0] the logits (N,V). After losses (N) comes lse (N).

enum { CROSS_HELD = 1, CROSS_SIGN, CROSS_NO_TARGET, CROSS_NO_LSE, CROSS_LAST, CROSS_FIRST,
       CROSS_MEAN, CROSS_LOG2, CROSS_NEXT, CROSS_BEFORE, CROSS_ONE, CROSS_NO_LOG, CROSS_NO_MAX,
       CROSS_PLUS, CROSS_NOT_EXP, CROSS_MINUS, CROSS_ONLY_MAX, CROSS_MAX_TWICE,
       CROSS_ROW, CROSS_BEGINS, CROSS_MORE };
static const Mistake cross_mistakes[] = {
    {CROSS_SIGN, 3, "the sign: loss = lse - logit of the target"},
    {CROSS_PLUS, 1, "the sign: the logit of the target is added; it must be subtracted from lse"},
    {CROSS_PLUS, 2, "the sign of what stands at the target only"},
    {CROSS_NO_TARGET, 1, "the logit of the target is not subtracted"},
    {CROSS_NO_TARGET, 2, "this is the gradient of lse alone: the loss has another term"},
    {CROSS_NO_LSE, 1, "lse is missing in the loss"},
    {CROSS_NO_LSE, 2, "the softmax is missing"},
    {CROSS_LAST, 3, "the last logit is left out of the sum"},
    {CROSS_FIRST, 3, "the first logit is left out of the sum"},
    {CROSS_BEGINS, 1, "the sum of exponentials begins at 1; it must begin at 0"},
    {CROSS_MORE, 1, "one logit too many in the sum: v < V"},
    {CROSS_MEAN, 1, "the log of the mean of the exponentials; it must be of their sum"},
    {CROSS_LOG2, 1, "log to the base 2 or 10 in place of the natural log"},
    {CROSS_NEXT, 3, "the logit after the target's: off by one"},
    {CROSS_BEFORE, 3, "the logit before the target's: off by one"},
    {CROSS_ROW, 3, "logit n of row n in place of logit targets[n]"},
    {CROSS_ONE, 3, "targets[0] is used for every row"},
    {CROSS_NO_LOG, 1, "the log is missing: lse = largest + log(sum)"},
    {CROSS_MAX_TWICE, 1, "the largest logit is not subtracted before the exponential (but added "
     "after the log)"},
    {CROSS_NO_MAX, 1, "lse = largest + log(sum): the largest logit is missing"},
    {CROSS_ONLY_MAX, 1, "lse = largest + log(sum): log(sum) is missing"},
    {CROSS_MINUS, 1, "lse = largest + log(sum): a sign is wrong"},
    {CROSS_NOT_EXP, 1, "the exponential is missing"},
    {0, 0, NULL}};

static const char wide_row[] = "rows of up to 256 logits are right: what if a thread has several?";
static const char large_logits[] =
    "only large logits go wrong: is the largest one subtracted before the exponential, and found "
    "too where all are negative?";

// rest: how many logits there are from x on, those of later rows too.
static number cross_lse(const number *x, int rest, const Case *c, int wrong) {
    int V = c->K;
    double m = creal(x[0]);
    number sum = wrong == CROSS_BEGINS;
    int end = V - (wrong == CROSS_LAST) + (wrong == CROSS_MORE);
    if (end > rest) return NAN;
    for (int v = 0; v < V; v++) m = fmax(m, creal(x[v]));
    for (int v = wrong == CROSS_FIRST; v < end; v++)
        sum += wrong == CROSS_NOT_EXP ? x[v] - m : cexp(x[v] - m);
    if (wrong == CROSS_MEAN) sum /= V;
    return wrong == CROSS_LOG2 ? m + clog(sum) / log(2) : wrong == CROSS_NO_LOG ? m + sum
           : wrong == CROSS_NO_MAX ? clog(sum) : wrong == CROSS_MINUS ? m - clog(sum)
           : wrong == CROSS_ONLY_MAX ? m : wrong == CROSS_MAX_TWICE ? 2 * m + clog(sum)
           : m + clog(sum);
}

static void crossentropy(number *out, number *const *in, const Case *c, int wrong) {
    int V = c->K, N = c->T;
    for (int n = 0; n < N; n++) {
        const number *x = in[0] + n * V;
        int target = c->tokens[wrong == CROSS_ONE ? 0 : n];
        if (wrong == CROSS_ROW) target = n % V;
        target += n * V + (wrong == CROSS_NEXT) - (wrong == CROSS_BEFORE);
        number lse = cross_lse(x, (N - n) * V, c, wrong);
        number logit = at_or_nan(in[0], target, c->size[0]);
        if (wrong == CROSS_HELD) logit = hold(logit);
        out[n] = wrong == CROSS_SIGN ? logit - lse : wrong == CROSS_NO_TARGET ? lse
                 : wrong == CROSS_NO_LSE ? -logit : wrong == CROSS_PLUS ? lse + logit : lse - logit;
        if (c->out_size > (size_t)N) out[N + n] = lse;
    }
}

static Case cross_case(int k, int with_lse) {
    static const int shapes[][2] = {{5, 7}, {1, 7}, {2, 301}, {4, 4}, {4, 7}};
    static const char *const names[] = {"5 rows x 7", "one row", "2 rows x 301", "V = 4",
                                        "large logits"};
    int N = shapes[k][0], V = shapes[k][1], *targets = room(N, sizeof(int));
    Case c = {.name = names[k], .T = N, .K = V};
    for (int n = 0; n < N; n++)  // the first row's target is never the last logit
        targets[n] = (int)((uniform() + 1) / 2 * (V - (n == 0 && V > 2)));
    c.tokens = targets, add_input(&c, 0, "logits", N, V, 2);
    for (size_t i = 0; i < c.size[0] && k == 4; i++)
        c.in[0][i] = (float)(c.in[0][i] + (i / V % 2 ? -130 : 130));
    c.out_size = (size_t)N * (1 + with_lse);
    return c;
}

// Are the losses wrong only because lse is?
static int follows_lse(const Case *c, const float *losses, const float *lse) {
    for (int n = 0; n < c->T; n++)
        if (!(fabs(losses[n] - (lse[n] - c->in[0][n * c->K + c->tokens[n]])) < 1e-3)) return 0;
    return 1;
}

static void check_crossentropy_forward(void) {
    int bad = 0;
    for (int k = 0; k < 5; k++) {
        Case c = cross_case(k, 1);
        begin_case(&c);
        float *x = input("logits", c.in[0], c.size[0]), *losses = output("losses", c.T);
        float *lse = output("lse", c.T);
        remember();
        submission.crossentropy_forward(losses, lse, x, token_numbers(c.tokens, c.T, c.K), c.T,
                                        c.K);
        if (check_watched()) { bad = 1; continue; }
        double *right = evaluate(crossentropy, &c, 0);
        Result two[] = {result_of("lse", lse, right + c.T, 0, c.T, 1, "row", "number"),
                        result_of("losses", losses, right, 0, c.T, 1, "row", "number")};
        for (int i = 0; i < 2; i++) {
            if (!compare(&two[i])) continue;
            if (i == 1 && two[0].num_wrong && follows_lse(&c, losses, lse)) continue;
            forward_mistakes(&two[i], crossentropy, &c, i ? 0 : c.T, cross_mistakes);
            add_constant(&two[i], "N (each row's loss is wanted, not their mean)", c.T);
            report(&two[i], bad ? NULL : k == 4 ? large_logits
                            : k == 2 && submission.cuda ? wide_row : NULL);
        }
        bad = bad || two[0].num_wrong || two[1].num_wrong;
    }
}

static void cross_backward_mistakes(Result *r, const Case *c, const double *lse) {
    static const char *const texts[] = {
        "lse of row 0 is used for every row",
        "something is subtracted from every logit's gradient that belongs to the target's alone",
        "the logit itself is still in it: its place must be overwritten (=)",
        "the exponential is missing",
        "the target's logit is changed before the exponential reads it"};
    for (int k = 0; k < 5; k++) {
        double *z = room(r->n, sizeof *z), s = c->factor;
        for (int i = 0; i < (int)r->n; i++) {
            int row = i / c->K, target = i % c->K == c->tokens[row];
            double one = r->terms[0].values[i], two = r->terms[1].values[i], x = c->in[0][i];
            z[i] = k == 0 ? one * exp(lse[row] - lse[0]) + two : k == 1 ? one + two - s
                   : k == 2 ? one + two + x : k == 3 ? (x - lse[row]) * s + two
                   : target ? one * exp(-s) : one;
        }
        add_hypothesis(r, texts[k], z);
    }
}

static void check_crossentropy_backward(void) {
    for (int k = 0; k < 5; k++) {
        Case c = cross_case(k, 0), d = cross_case(k, 1);
        d.in[0] = c.in[0], d.tokens = c.tokens;
        c.factor = (float)(0.3 + 0.1 * uniform()), c.dout = "scale";
        double *dout = repeated(c.factor, c.T), *lse = evaluate(crossentropy, &d, 0) + c.T;
        begin_case(&c);
        float *x = in_place("logits", c.in[0], c.size[0]), *l = input("lse", lse, c.T);
        remember();
        submission.crossentropy_backward(x, l, token_numbers(c.tokens, c.T, c.K), (float)c.factor,
                                         c.T, c.K);
        if (check_watched()) continue;
        Result r = result_of("logits", x, differentiate(crossentropy, &c, 0, dout, 0), 0, c.T, c.K,
                             "row", "logit");
        r.in_place = 1, r.tolerance = k == 4 ? 3e-4 : 1e-4;
        if (!compare(&r)) continue;
        backward_mistakes(&r, crossentropy, &c, 0, dout, c.T, 1, cross_mistakes, CROSS_HELD,
                          "that of lse", "that of the target's logit");
        add_constant(&r, "scale", c.factor), add_constant(&r, "N", c.T), add_constant(&r, "V", c.K);
        cross_backward_mistakes(&r, &c, lse);
        double *e = room(c.T, sizeof *e);
        for (int n = 0; n < c.T; n++) e[n] = exp(fmin(lse[n], 80));
        add_spread(&r, "e^lse", e, 1);
        report(&r, NULL);
    }
}

// ---- adamw: no derivative here; m and v as weighted means of the old and the new.

enum { ADAM_NO_BIAS_M = 1, ADAM_NO_BIAS_V, ADAM_NO_BIAS, ADAM_EPS_INSIDE, ADAM_NO_EPS, ADAM_L2,
       ADAM_NO_DECAY, ADAM_DECAY_GROWS, ADAM_ASCENT, ADAM_NO_CLIP, ADAM_STEP_BEFORE, ADAM_STEP_NEXT,
       ADAM_BETAS, ADAM_NO_ROOT, ADAM_NO_SQUARE, ADAM_WHOLE_G, ADAM_CLIP_ONCE, ADAM_DECAY_NO_LR,
       ADAM_BIAS_TIMES, ADAM_GRADIENT, ADAM_BETA_M, ADAM_BETA_V, ADAM_OLD, ADAM_MINUS,
       ADAM_BIAS_SWAPPED, ADAM_NO_OLD, ADAM_UP, ADAM_M_BEFORE, ADAM_V_BEFORE,
       ADAM_M_BETA2, ADAM_V_BETA1, ADAM_KEEP_OTHER, ADAM_NO_LR, ADAM_NO_LR_AT_ALL,
       ADAM_DECAY_CONSTANT, ADAM_CLIP_DIVIDES, ADAM_BETA_NEW, ADAM_OLD_TWICE, ADAM_TIMES_M,
       ADAM_TIMES_V, ADAM_ROOT_ONCE, ADAM_FIRST };
static const Mistake adam_mistakes[] = {
    {ADAM_NO_BIAS_M, 4, "mhat = m / (1 - beta1^t): m is used without its correction"},
    {ADAM_NO_BIAS_V, 4, "vhat = v / (1 - beta2^t): v is used without its correction"},
    {ADAM_NO_BIAS, 4, "m and v are used without their corrections 1 / (1 - beta^t)"},
    {ADAM_BIAS_TIMES, 4, "multiplied by 1 - beta^t in place of divided"},
    {ADAM_BIAS_SWAPPED, 4, "the corrections of m and v are exchanged: beta1 belongs to m"},
    {ADAM_EPS_INSIDE, 4, "eps stands under the root; it must be added to the root"},
    {ADAM_NO_EPS, 4, "eps is missing"},
    {ADAM_L2, 7, "the decay is in the gradient (Adam with L2); AdamW's is separate from it"},
    {ADAM_NO_DECAY, 4, "the weight decay is missing"},
    {ADAM_DECAY_GROWS, 4, "the sign of the weight decay is wrong"},
    {ADAM_DECAY_NO_LR, 4, "the weight decay is not multiplied by lr"},
    {ADAM_ASCENT, 4, "the sign: p must go down the gradient (p -= ...)"},
    {ADAM_NO_LR, 4, "the step is not multiplied by lr"},
    {ADAM_NO_LR_AT_ALL, 4, "lr is missing"},
    {ADAM_DECAY_CONSTANT, 4, "the decay must be proportional to p: weight_decay * p"},
    {ADAM_KEEP_OTHER, 1, "the old m is multiplied by beta1, not by beta2"},
    {ADAM_KEEP_OTHER, 2, "the old v is multiplied by beta2, not by beta1"},
    {ADAM_UP, 4, "the sign: p must go down the gradient, and decay (p -= ...)"},
    {ADAM_NO_CLIP, 7, "clip is not used"},
    {ADAM_STEP_BEFORE, 4, "the step in beta^t is off by one: t - 1"},
    {ADAM_STEP_NEXT, 4, "the step in beta^t is off by one: t + 1"},
    {ADAM_M_BEFORE, 4, "the step in mhat's 1 - beta1^t is off by one: t - 1"},
    {ADAM_V_BEFORE, 4, "the step in vhat's 1 - beta2^t is off by one: t - 1"},
    {ADAM_M_BETA2, 4, "mhat = m / (1 - beta1^t); here it is beta2"},
    {ADAM_V_BETA1, 4, "vhat = v / (1 - beta2^t); here it is beta1"},
    {ADAM_BETAS, 7, "beta1 and beta2 are exchanged"},
    {ADAM_NO_ROOT, 4, "the square root of vhat is missing"},
    {ADAM_GRADIENT, 4, "g is used in place of its running mean m"},
    {ADAM_NO_SQUARE, 2, "v must be a mean of g squared; the square is missing"},
    {ADAM_CLIP_ONCE, 2, "clip must be squared with the gradient"},
    {ADAM_CLIP_DIVIDES, 7, "divided by clip in place of multiplied"},
    {ADAM_FIRST, 7, "grad[0] is used for every element"},
    {ADAM_BETA_NEW, 3, "the new gradient is multiplied by beta; it is 1 - beta"},
    {ADAM_OLD_TWICE, 3, "the old mean is added to itself (+=); it is beta times the old one"},
    {ADAM_TIMES_M, 4, "m is multiplied by 1 - beta1^t in place of divided"},
    {ADAM_TIMES_V, 4, "v is multiplied by 1 - beta2^t in place of divided"},
    {ADAM_ROOT_ONCE, 4, "the correction of v belongs under the root: sqrt(vhat)"},
    {ADAM_WHOLE_G, 3, "the factor 1 - beta of the new gradient is missing"},
    {ADAM_MINUS, 3, "the sign of the new gradient is wrong"},
    {ADAM_BETA_M, 2, "the factor of the new g^2 is 1 - beta2, not 1 - beta1"},
    {ADAM_BETA_V, 1, "the factor of the new g is 1 - beta1, not 1 - beta2"},
    {ADAM_OLD, 3, "the old mean is not multiplied by beta"},
    {ADAM_NO_OLD, 3, "the old mean is lost: m and v must be carried on from step to step"},
    {0, 0, NULL}};

typedef struct { double lr, beta1, beta2, eps, decay, scale; int t, n; } Adam;

static void adam_element(double *p, double *m, double *v, double grad, const Adam *a, int wrong) {
    double b1 = wrong == ADAM_BETAS ? a->beta2 : a->beta1, b2 = wrong == ADAM_BETAS ? a->beta1
                                                                                     : a->beta2;
    double g = grad * (wrong == ADAM_NO_CLIP ? 1 : wrong == ADAM_CLIP_DIVIDES ? 1 / a->scale
                       : a->scale), lr = a->lr, decay = a->decay;
    int t = a->t + (wrong == ADAM_STEP_NEXT) - (wrong == ADAM_STEP_BEFORE);
    if (wrong == ADAM_L2) g += decay * *p, decay = 0;
    double g2 = wrong == ADAM_NO_SQUARE ? g : wrong == ADAM_CLIP_ONCE ? g * grad : g * g;
    double to_m = wrong == ADAM_BETA_V ? 1 - b2 : wrong == ADAM_BETA_NEW ? b1 : 1 - b1;
    double to_v = wrong == ADAM_BETA_M ? 1 - b1 : wrong == ADAM_BETA_NEW ? b2 : 1 - b2;
    if (wrong == ADAM_WHOLE_G) to_m = to_v = 1;
    double keep = wrong == ADAM_NO_OLD ? 0 : 1, sign = wrong == ADAM_MINUS ? -1 : 1;
    double of_m = wrong == ADAM_OLD ? 1 : wrong == ADAM_KEEP_OTHER ? b2 : b1;
    double of_v = wrong == ADAM_OLD ? 1 : wrong == ADAM_KEEP_OTHER ? b1 : b2;
    if (wrong == ADAM_OLD_TWICE) of_m = 1 + b1, of_v = 1 + b2;
    *m = keep * of_m * *m + sign * to_m * g;
    *v = keep * of_v * *v + sign * to_v * g2;
    double cm = 1 - pow(wrong == ADAM_M_BETA2 ? b2 : b1, t - (wrong == ADAM_M_BEFORE));
    double cv = 1 - pow(wrong == ADAM_V_BETA1 ? b1 : b2, t - (wrong == ADAM_V_BEFORE));
    if (wrong == ADAM_NO_BIAS || wrong == ADAM_NO_BIAS_M) cm = 1;
    if (wrong == ADAM_NO_BIAS || wrong == ADAM_NO_BIAS_V) cv = 1;
    if (wrong == ADAM_BIAS_TIMES || wrong == ADAM_TIMES_M) cm = 1 / cm;
    if (wrong == ADAM_BIAS_TIMES || wrong == ADAM_TIMES_V) cv = 1 / cv;
    if (wrong == ADAM_BIAS_SWAPPED) { double x = cm; cm = cv, cv = x; }
    double mhat = (wrong == ADAM_GRADIENT ? g : *m) / cm, vhat = *v / cv;
    double root = sqrt(vhat + (wrong == ADAM_EPS_INSIDE ? a->eps : 0));
    if (wrong == ADAM_NO_ROOT) root = vhat;
    if (wrong == ADAM_ROOT_ONCE) root = sqrt(*v) / cv;
    double step = mhat / (root + (wrong == ADAM_EPS_INSIDE || wrong == ADAM_NO_EPS ? 0 : a->eps));
    if (wrong == ADAM_NO_DECAY) decay = 0;
    if (wrong == ADAM_DECAY_GROWS) decay = -decay;
    double before_step = wrong == ADAM_DECAY_CONSTANT ? 1 : *p;
    if (wrong == ADAM_UP) lr = -lr;
    if (wrong == ADAM_NO_LR_AT_ALL) lr = 1;
    *p -= (wrong == ADAM_ASCENT ? -lr : wrong == ADAM_NO_LR ? 1 : lr) * step;
    *p -= (wrong == ADAM_DECAY_NO_LR ? 1 : lr) * decay * before_step;
}

// p, m and v after the step, or after a mistaken one, from what they held before.
static double *adam_after(int which, const float *const before_step[3], const float *grad,
                          const Adam *a, int wrong) {
    double *result = room(a->n, sizeof *result);
    for (int i = 0; i < a->n; i++) {
        double x[3];
        for (int k = 0; k < 3; k++) x[k] = before_step[k][i];
        adam_element(&x[0], &x[1], &x[2], grad[wrong == ADAM_FIRST ? 0 : i], a, wrong);
        result[i] = x[which];
    }
    return result;
}

static void check_adamw(void) {
    static const int sizes[] = {7, 1, 1003, 7, 7}, steps[] = {3, 1, 12, 2, 40};
    static const char *const names[] = {"7 numbers, t = 3", "1 number, t = 1", "1003 numbers",
                                        "tiny gradients", "t = 40"};
    static const char *const arrays[] = {"p", "m", "v"};
    for (int k = 0; k < 5; k++) {
        double small = k == 3 ? 1e-8 : 1;
        Case c = {.name = names[k]};
        Adam a = {(float)(0.3 + 0.1 * uniform()), (float)(0.8 + 0.1 * uniform()),
                  (float)(0.95 + 0.03 * uniform()), k == 3 ? 1e-8f : 1e-3f,
                  (float)(0.4 + 0.1 * uniform()), (float)(0.6 + 0.2 * uniform()), steps[k],
                  sizes[k]};
        begin_case(&c);
        float *grad = input("grad", numbers(a.n, small), a.n);
        float *x[3] = {in_place("p", numbers(a.n, 1), a.n),
                       in_place("m", numbers(a.n, 0.5 * small), a.n),
                       in_place("v", numbers(a.n, small * small), a.n)};
        for (int i = 0; i < a.n; i++) x[2][i] = fabsf(x[2][i]);
        remember();
        submission.adamw_update(x[0], grad, x[1], x[2], a.n, (float)a.lr, (float)a.beta1,
                                (float)a.beta2, (float)a.eps, (float)a.decay, (float)a.scale, a.t);
        if (check_watched()) continue;
        const float *old[3] = {before(x[0]), before(x[1]), before(x[2])};
        int bad = 0;
        for (int which = 2; which >= 0; which--) {
            Result r = result_of(arrays[which], x[which], adam_after(which, old, grad, &a, 0), 0, 1,
                                 a.n, "row", "element");
            r.in_place = 1;
            if ((which == 0 && bad) || !compare(&r)) continue;  // p follows m and v
            bad = 1;
            for (const Mistake *m = adam_mistakes; m->text; m++)
                if (m->pass >> (which == 1 ? 0 : which == 2 ? 1 : 2) & 1)
                    add_hypothesis(&r, m->text, adam_after(which, old, grad, &a, m->number));
            report(&r, NULL);
        }
    }
}

// ---- residual, gpas and rmsnorm in one kernel, train_gpas.cu alone: in[0] inp, in[1] branch
// (N,C), in[2] the weight (C), inp_gate, sum_gate. K: is the norm last? factor: A. After the sum
// (N,C) come what is normalized, the norm's output (N,C), and rstd (N).

enum { FUSED_NO_A = 1, FUSED_LEAKS, FUSED_NO_INP_GATE, FUSED_A_BRANCH, FUSED_STORED };
static const Mistake fused_mistakes[] = {
    {FUSED_NO_A, 3, "the factor A of the shortcut is missing"},
    {FUSED_LEAKS, 2, "scaled by 1 - a(g), which the stop-gradient forbids"},
    {FUSED_NO_INP_GATE, 1, "inp is not multiplied by 1 - a(g) of inp_gate"},
    {FUSED_A_BRANCH, 3, "A scales the branch too"},
    {FUSED_STORED, 1, "this is GPAS(s); sum is stored before GPAS"},
    {0, 0, NULL}};

static void fused(number *out, number *const *in, const Case *c, int wrong) {
    int N = c->T, C = c->C, n = N * C;
    int stop = c->stop_grad && wrong != FUSED_LEAKS;
    number inp_a = wrong == FUSED_NO_INP_GATE ? 0 : gate_function(in[2][C], SILU);
    number sum_a = c->K ? 0 : gate_function(in[2][C + 1], SILU);
    double A = wrong == FUSED_NO_A ? 1 : c->factor, branch_A = wrong == FUSED_A_BRANCH ? A : 1;
    for (int row = 0; row < N; row++) {
        number squares = 0;
        for (int i = row * C; i < (row + 1) * C; i++) {
            number x = in[0][i], z = x - inp_a * (stop ? hold(x) : x);
            number s = A * z + branch_A * in[1][i], y = s - sum_a * (stop ? hold(s) : s);
            out[i] = wrong == FUSED_STORED ? y : s, out[n + i] = y;
            squares += y * y;
        }
        number r = 1 / csqrt(squares / C + 1e-6);
        out[3 * n + row] = r;
        for (int i = 0; i < C; i++)
            out[2 * n + row * C + i] = in[2][i] * out[n + row * C + i] * r;
    }
}

static Case fused_case(int k) {
    static const char *const names[] = {"norm first, 5 rows x 7", "norm last, 5 rows x 7",
                                        "norm first, 4 rows x 8", "norm last, 4 rows x 8",
                                        "norm first, stop_grad 0", "norm last, stop_grad 0",
                                        "norm first, 2100 rows x 2", "norm last, 2100 rows x 2"};
    Case c = {.name = names[k], .B = 1, .T = k > 5 ? 2100 : k / 2 == 1 ? 4 : 5,
              .C = k > 5 ? 2 : k / 2 == 1 ? 8 : 7, .K = k % 2, .stop_grad = k / 2 != 2,
              .factor = k % 2 ? (float)(1.5 + uniform() / 4) : 1};
    size_t n = (size_t)c.T * c.C;
    c.size[0] = c.size[1] = n, c.size[2] = c.C + 2, c.out_size = 3 * n + c.T;
    for (int i = 0; i < 3; i++) c.in[i] = numbers(c.size[i], 1);
    c.in[2][c.C] = a_gate(k), c.in[2][c.C + 1] = a_gate(k + 1);
    return c;
}

// The arrays of a case. Given are inp, branch and weight; in the backward pass also sum, rstd, dx
// and dfinp, of which `right` is what the forward pass has computed.
static FusedArrays fused_arrays(const Case *c, const double *right, double *dx, double *dfinp) {
    size_t n = c->size[0];
    const double *w = c->in[2], *rstd = right ? right + 3 * n : NULL;
    return (FusedArrays){
        c->T, c->C, c->K, c->stop_grad, (float)c->factor, (float)w[c->C], (float)w[c->C + 1],
        input("inp", c->in[0], n), input("branch", c->in[1], n), input("weight", w, c->C),
        right ? input("sum", right, n) : output("sum", n), output("normed", n),
        right ? input("rstd", rstd, c->T) : output("rstd", c->T),
        right ? input("dfinp", dfinp, n) : output("dfinp", n),
        right ? in_place("dx", dx, n) : output("dx", n), output("dsum", n),
        output("dweight", c->C), output("dgate", 1)};
}

// Hints for a result, which begins at `offset` in that of the forward pass, or, with douts, in the
// gradient of input `which`. douts: those of dx and dfinp together, of each alone, and exchanged.
static void fused_report(Result *r, const Case *c, int which, double *const *douts, size_t offset) {
    if (!compare(r)) return;
    for (int i = 0; i < 2; i++)
        add_constant(r, i ? "1 - a(g) of sum_gate" : "1 - a(g) of inp_gate",
                     1 - creal(gate_function(c->in[2][c->C + i], SILU)));
    add_constant(r, "A", c->factor);
    if (c->T > 1000) {
        report(r, many_rows);
        return;
    }
    for (const Mistake *m = fused_mistakes; m->text; m++)
        if (m->pass & (douts ? BACKWARD : FORWARD))
            add_hypothesis(r, m->text, offset + (douts ? differentiate(fused, c, which, douts[0],
                                                                       m->number)
                                                       : evaluate(fused, c, m->number)));
    if (douts) {
        add_term(r, "that from dx", differentiate(fused, c, which, douts[1], 0) + offset);
        add_term(r, "that from dfinp", differentiate(fused, c, which, douts[2], 0) + offset);
        add_hypothesis(r, c->K ? "dx must be added to dfinp before the norm, not after it"
                               : "dx must be added to dfinp after the norm, not before it",
                       differentiate(fused, c, which, douts[3], 0) + offset);
    }
    report(r, NULL);
}

static void check_fused_forward(void) {
    static const char *const names[] = {"sum", "normed", "rstd"};
    for (int k = 0; k < 6; k++) {
        Case c = fused_case(k);
        begin_case(&c);
        FusedArrays a = fused_arrays(&c, NULL, NULL, NULL);
        const float *got[] = {a.sum, a.normed, a.rstd};
        remember();
        submission.fused(&a, 0);
        if (check_watched()) continue;
        for (int i = 0; i < 3; i++) {
            size_t offset = (i ? i + 1 : 0) * c.size[0];
            Result r = result_of(names[i], got[i], evaluate(fused, &c, 0) + offset, 0, c.T,
                                 i == 2 ? 1 : c.C, "row", "channel");
            fused_report(&r, &c, 0, NULL, offset);
        }
    }
}

static void check_fused_backward(void) {
    static const char *const names[] = {"dx", "dsum", "dweight", "dgate"};
    for (int k = 0; k < 8; k++) {
        Case c = fused_case(k);
        size_t n = c.size[0];
        double *dx = numbers(n, 1), *dfinp = numbers(n, 1), *douts[4];
        for (int d = 0; d < 4; d++) {
            douts[d] = room(c.out_size, sizeof *dx);
            for (size_t i = 0; i < n; i++) {  // norm last, both are gradients of the norm's output
                douts[d][2 * n + i] = d == 1 ? 0 : dfinp[i];
                if (d != 2) douts[d][(c.K == (d != 3) ? 2 : 1) * n + i] += dx[i];
            }
        }
        begin_case(&c);
        FusedArrays a = fused_arrays(&c, evaluate(fused, &c, 0), dx, dfinp);
        const float *got[] = {a.dx, c.K ? a.dsum : a.dx, a.dweight, a.dgate};
        remember();
        submission.fused(&a, 1);
        if (check_watched()) continue;
        for (int i = k < 6 ? !c.K : 2; i < 4; i++) {  // norm first, only that of the sum
            int input = i < 2 ? i : 2, offset = i < 3 ? 0 : c.C + !c.K;
            Result r = result_of(names[i == 1 && !c.K ? 0 : i], got[i],
                                 differentiate(fused, &c, input, douts[0], 0) + offset, i > 1,
                                 i < 2 ? c.T : 1, i < 3 ? c.C : 1, "row", "channel");
            r.in_place = got[i] == a.dx;
            if (i == 3) r.scale = size_of(c.in[0], n) * n / 4;
            fused_report(&r, &c, input, douts, offset);
        }
    }
}

static const struct { const char *layer, *pass; void (*check)(void); } checks[] = {
    {"gpas", "forward", check_gpas_forward}, {"gpas", "backward", check_gpas_backward},
    {"residual", "forward", check_residual_forward},
    {"residual", "backward", check_residual_backward},
    {"embedding", "forward", check_embedding_forward},
    {"embedding", "backward", check_embedding_backward},
    {"rmsnorm", "forward", check_rmsnorm_forward}, {"rmsnorm", "backward", check_rmsnorm_backward},
    {"rope", "forward", check_rope_forward}, {"rope", "backward", check_rope_backward},
    {"swiglu", "forward", check_swiglu_forward}, {"swiglu", "backward", check_swiglu_backward},
    {"matmul", "forward", check_matmul_forward}, {"matmul", "backward", check_matmul_backward},
    {"attention", "forward", check_attention_forward},
    {"attention", "backward", check_attention_backward},
    {"crossentropy", "forward", check_crossentropy_forward},
    {"crossentropy", "backward", check_crossentropy_backward},
    {"adamw", "update", check_adamw},
    {"residual_gpas_rmsnorm", "forward", check_fused_forward},
    {"residual_gpas_rmsnorm", "backward", check_fused_backward}};

// So much may be allocated from now on: addresses that a program reserves at its start, as
// dev/gpu/cuda_on_cpu.h does by the terabyte, do not count. Linux counts in pages in this file.
static void limit_memory(void) {
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file && fscanf(file, "%*u %*u %*u %*u %*u %lu", &pages) != 1) pages = 0;
    if (file) fclose(file);
    rlim_t most = (rlim_t)pages * sysconf(_SC_PAGESIZE) + ((rlim_t)MEGABYTES << 20);
    setrlimit(RLIMIT_DATA, &(struct rlimit){most, most});
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    limit_memory();
    results = fdopen(dup(1), "w");  // the submission may print what it likes
    int nowhere = open("/dev/null", O_WRONLY);
    if (!results || nowhere < 0 || dup2(nowhere, 1) < 0) return 2;
    seed = strtoull(argv[3], NULL, 10);
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
        if (strcmp(argv[1], checks[i].layer) || strcmp(argv[2], checks[i].pass)) continue;
        checks[i].check();
        fprintf(results, "done\n");
        fflush(results);
        _exit(0);
    }
    return 2;
}
