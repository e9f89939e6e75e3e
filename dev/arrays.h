// arrays.h: defines Arrays, new_array, free_arrays, check_arrays, check_gradients: the memory of a
// model, and --check-finite on, which finds the first operation that computes NaN or infinity.
#ifndef ARRAYS_H
#define ARRAYS_H
#include "utils.h"
#include <math.h>
#include "parameters.h"

// Where in a training step an array is computed: 0 .. 2L-1 are the sublayers' forward passes.
enum { EMBED = -1, HEAD = -2, UPDATE = -3, NO_CHECK = -4, HEAD_BACKWARD = -5, LAYER_BACKWARD = -6,
       EMBED_BACKWARD = -7 };

typedef struct {
    const char *operation;  // that computes it
    int place, shared;      // shared: the memory belongs to another array
    float *x;
    size_t n;
} Array;

typedef struct {
    Array *list;  // in the order of computation
    int count;
    size_t bytes;
} Arrays;

// Returns an array of n floats, zeroed, which `operation` computes at `place`. It is new memory, or
// `shared` if that is not NULL. Exits if memory is short.
static inline float *new_array(Arrays *arrays, int place, const char *operation, size_t n,
                               float *shared) {
    arrays->list = (Array *)realloc(arrays->list, (arrays->count + 1) * sizeof(Array));
    if (!arrays->list) die("not enough memory for the list of arrays");
    float *x = shared ? shared : (float *)allocate(n, sizeof(float));
    Array array = {operation, place, shared != NULL, x, n};
    arrays->list[arrays->count++] = array;
    if (!shared) arrays->bytes += n * sizeof(float);
    return x;
}

static inline void free_arrays(Arrays *arrays) {
    for (int i = 0; i < arrays->count; i++)
        if (!arrays->list[i].shared) free(arrays->list[i].x);
    free(arrays->list);
}

// Exits if x (n), computed by `operation`, holds NaN or infinity. sublayer: 0 .. 2L-1, or -1.
static inline void check_array(const char *operation, int sublayer, const float *x, size_t n) {
    char where[64] = "";
    int bad = 0;
    size_t i = 0;
    #pragma omp simd reduction(| : bad)
    for (size_t k = 0; k < n; k++) bad |= !isfinite(x[k]);
    if (!bad) return;
    while (isfinite(x[i])) i++;
    if (sublayer >= 0)
        snprintf(where, sizeof where, " of layer %d, %s", sublayer / 2 + 1,
                 sublayer % 2 ? "feed-forward" : "attention");
    die("step %d: NaN or infinity: %s%s computed %g (element %zu of %zu); nothing was saved",
        current_step, operation, where, (double)x[i], i + 1, n);
}

// Checks the arrays of one place, in the order of computation.
static inline void check_arrays(const Arrays *arrays, int place, int sublayer) {
    for (int i = 0; i < arrays->count; i++) {
        const Array *array = &arrays->list[i];
        if (array->place == place) check_array(array->operation, sublayer, array->x, array->n);
    }
}

// Checks the gradients of the parameters of layer l, or, with l = -1, of those outside the layers.
static inline void check_gradients(const TensorList *list, const float *gradients, int l) {
    char name[80];
    for (const Tensor *t = list->tensors; t < list->tensors + list->count; t++) {
        if (t->layer != l) continue;
        snprintf(name, sizeof name, "the backward pass for %s", t->name);
        check_array(name, -1, gradients + t->offset, t->size);
    }
}
#endif
