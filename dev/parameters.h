// parameters.h: defines Config, norm_comes_last, has_post_norm, shortcut_scale; Tensor, TensorList,
// tensor_list, find_tensor, initialize_parameters; rope_angles.
#ifndef PARAMETERS_H
#define PARAMETERS_H
#include "utils.h"
#include <math.h>
#include <omp.h>
#include "gate.h"
#include "random.h"

/* ------------------------------------------------------------------------------------------------
What a network is
*/

enum { NORM_PRE, NORM_LNS, NORM_SANDWICH, NORM_POST, NORM_DEEPNORM, NORM_MIX };

typedef struct {
    int V, L, C, H, NH, T;   // vocabulary, layers, channels, feed-forward width, heads, context
    int norm;                // NORM_*: where the norms are
    int gpas;                // 1: with GPAS
    int gate_activation;     // GATE_*: a in a(g)
    int gate_train;          // 0: the gates keep their initial value
    int stop_grad;           // 0: 1 - a(g) is an ordinary learned scale, not GPAS
    double gate_init;        // the gates' initial value
} Config;

// In layer l = 0, 1, ..., does the norm come after the sum: y = norm(A x + f(x))?
static inline int norm_comes_last(const Config *c, int l) {
    if (c->norm == NORM_MIX) return l < c->L / 4;
    return c->norm == NORM_POST || c->norm == NORM_DEEPNORM;
}

// Does a second norm follow the branch: x + post_norm(f(norm(x)))?
static inline int has_post_norm(const Config *c) { return c->norm == NORM_SANDWICH; }

// A, by which the shortcut is multiplied where the norm comes last: DeepNorm's (2L)^(1/4)
// (arXiv 2203.00555), else 1.
static inline float shortcut_scale(const Config *c) {
    return c->norm == NORM_DEEPNORM ? powf(2.0f * c->L, 0.25f) : 1;
}

/* ------------------------------------------------------------------------------------------------
The parameters, as they lie in memory and in a checkpoint
*/

// The kinds of tensors, in their order within a layer.
enum { EMBEDDING, WQ, WK, WV, WO, W1, W3, W2, ATTENTION_NORM, ATTENTION_POST_NORM, FFN_NORM,
       FFN_POST_NORM, GATE, FINAL_NORM, OUTPUT };

typedef struct {
    char name[56];        // as in the checkpoint
    int kind, layer;      // WQ, ...; 0, 1, ..., or -1 if it belongs to no layer
    int rows, cols;       // of a matrix; a vector has cols 0
    size_t offset, size;  // in floats
    float mean, std;      // of the normal distribution of its initial values
} Tensor;

// The tensors of a network, in order; `size` is their total number of floats.
typedef struct {
    Tensor *tensors;
    int count;
    size_t size;
} TensorList;

__attribute__((format(printf, 8, 9)))
static inline void add_tensor(TensorList *list, int kind, int layer, int rows, int cols,
                              double mean, double std, const char *name, ...) {
    Tensor *t = &list->tensors[list->count++];
    va_list args;
    va_start(args, name);
    vsnprintf(t->name, sizeof t->name, name, args);
    va_end(args);
    t->kind = kind;
    t->layer = layer;
    t->rows = rows;
    t->cols = cols;
    t->mean = (float)mean;
    t->std = (float)std;
    t->offset = list->size;
    t->size = (size_t)rows * imax(cols, 1);
    list->size += t->size;
}

// LNS starts the weight of each norm at 1/sqrt(layer), layer = 1, 2, ..., as the GPAS authors' code
// does. (The LayerNorm-Scaling paper, arXiv 2502.05795, multiplies the norm's output by this factor
// and keeps it fixed.) DeepNorm draws from Xavier's normal distribution, std = gain sqrt(2 / (fan
// in + fan out)), with a gain below 1 for all matrices of a layer but wq and wk. We use this
// initialization with GPAS too; the authors' code does not.
static inline void add_layer(TensorList *list, const Config *c, int l) {
    int C = c->C, H = c->H, deep = c->norm == NORM_DEEPNORM;
    double gain = pow(8.0 * c->L, -0.25), norm = c->norm == NORM_LNS ? 1 / sqrt(l + 1.0) : 1;
    double qk = deep ? sqrt(1.0 / C) : 0.02, vo = deep ? gain * sqrt(1.0 / C) : 0.02;
    double ffn = deep ? gain * sqrt(2.0 / (C + H)) : 0.02;
    add_tensor(list, WQ, l, C, C, 0, qk, "layers.%d.attention.wq.weight", l);
    add_tensor(list, WK, l, C, C, 0, qk, "layers.%d.attention.wk.weight", l);
    add_tensor(list, WV, l, C, C, 0, vo, "layers.%d.attention.wv.weight", l);
    add_tensor(list, WO, l, C, C, 0, vo, "layers.%d.attention.wo.weight", l);
    add_tensor(list, W1, l, H, C, 0, ffn, "layers.%d.feed_forward.w1.weight", l);
    add_tensor(list, W3, l, H, C, 0, ffn, "layers.%d.feed_forward.w3.weight", l);
    add_tensor(list, W2, l, C, H, 0, ffn, "layers.%d.feed_forward.w2.weight", l);
    add_tensor(list, ATTENTION_NORM, l, C, 0, norm, 0, "layers.%d.attention_norm.weight", l);
    if (has_post_norm(c))
        add_tensor(list, ATTENTION_POST_NORM, l, C, 0, norm, 0,
                   "layers.%d.attention_post_norm.weight", l);
    add_tensor(list, FFN_NORM, l, C, 0, norm, 0, "layers.%d.ffn_norm.weight", l);
    if (has_post_norm(c))
        add_tensor(list, FFN_POST_NORM, l, C, 0, norm, 0, "layers.%d.ffn_post_norm.weight", l);
    if (c->gpas) add_tensor(list, GATE, l, 1, 0, c->gate_init, 0, "layers.%d.gate", l);
}

// Returns the names, shapes, places and initial values of all parameters. The caller frees
// list.tensors.
static inline TensorList tensor_list(const Config *c) {
    TensorList list = {(Tensor *)allocate(3 + 12 * c->L, sizeof(Tensor)), 0, 0};
    // sqrt(2/5) is the standard deviation that the authors' code gives the embedding
    add_tensor(&list, EMBEDDING, -1, c->V, c->C, 0, sqrt(2.0 / 5), "tok_embeddings.weight");
    for (int l = 0; l < c->L; l++) add_layer(&list, c, l);
    add_tensor(&list, FINAL_NORM, -1, c->C, 0, 1, 0, "norm.weight");
    add_tensor(&list, OUTPUT, -1, c->V, c->C, 0, 0.02, "output.weight");
    return list;
}

// Returns the tensor of this kind in layer l (-1 for those of no layer), or NULL.
static inline const Tensor *find_tensor(const TensorList *list, int kind, int l) {
    for (int i = 0; i < list->count; i++)
        if (list->tensors[i].kind == kind && list->tensors[i].layer == l) return &list->tensors[i];
    return NULL;
}

// Draws the initial values of the tensors in `parameters` (list->size). Each tensor has its own
// stream of random numbers, keyed by its name, so a network with gates starts with the same weights
// as the one without.
static inline void initialize_parameters(float *parameters, const TensorList *list, int seed) {
    for (int k = 0; k < list->count; k++) {
        const Tensor *t = &list->tensors[k];
        uint64_t key = seed;
        for (const char *c = t->name; *c; c++) {
            key ^= (unsigned char)*c;
            key = random_bits(&key);
        }
        float *p = parameters + t->offset;
        #pragma omp parallel for
        for (size_t i = 0; i < t->size; i++) {
            // Box-Muller: for uniform u and v, sqrt(-2 log u) cos(2 pi v) is normal
            uint64_t state = key + 2 * i * RANDOM_STEP;
            double radius = sqrt(-2 * log(1 - random_uniform(&state)));
            double angle = 2 * 3.14159265358979323846 * random_uniform(&state);
            p[i] = t->mean + t->std * (float)(radius * cos(angle));
        }
    }
}

// RoPE rotates pair j of each head at position t by the angle t 10000^(-2j/hs). Writes the cosine
// and the sine of these angles to table (T,hs/2,2).
static inline void rope_angles(float *table, int T, int hs) {
    for (int t = 0; t < T; t++)
        for (int j = 0; j < hs / 2; j++) {
            double angle = t * pow(10000, -2.0 * j / hs);
            *table++ = (float)cos(angle);
            *table++ = (float)sin(angle);
        }
}
#endif
