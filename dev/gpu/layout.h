// layout.h: defines Layout, lay_out, free_layout, offset_of, ABSENT, copy_tensors; Chunk: where the
// parameters of a network lie on the GPU.
//
// Each tensor begins at a multiple of 256 bytes, in bf16 too. Only wk, wv and w3 do not, because
// they form one matrix with wq or w1, which they follow. H and V are rounded up to multiples of 8,
// so that rows begin at multiples of 16 bytes. Therefore w1, w3 and the output matrix have more
// rows than in a file, and w2 has more columns. The added numbers are 0 and their gradients are 0,
// so they stay 0.
#ifndef LAYOUT_H
#define LAYOUT_H
#include "device.h"
#include "../parameters.h"

enum { CHUNK = 4096 };  // the most numbers in a chunk

// A piece of a tensor. Kernels that work on all parameters have one block for each chunk.
typedef struct {
    size_t offset;
    int size;
    int kind, layer;  // of the tensor: WQ, ...; 0, 1, ..., or -1 if it belongs to no layer
    int decays;       // 1: AdamW's weight decay applies
} Chunk;

typedef struct {
    TensorList list;        // the names and shapes of the tensors, as in files
    int H, V;               // rounded up
    size_t *offsets;        // see offset_of()
    size_t size;            // of an array that holds all tensors
    Chunk *chunks;          // (num_chunks) on the host
    int num_chunks;
} Layout;

enum { KINDS = OUTPUT + 1 };
const size_t ABSENT = (size_t)-1;

// Returns where a tensor begins in an array of layout->size numbers, or ABSENT if the network has
// no such tensor. l is -1 for tensors of no layer.
static inline size_t &offset_of(const Layout *layout, int kind, int l) {
    return layout->offsets[(l + 1) * KINDS + kind];
}

// Cuts a tensor of `size` numbers, which begins at layout->size, into chunks.
static inline void add_chunks(Layout *layout, const Tensor *t, size_t size) {
    for (size_t at = 0; at < size; at += CHUNK) {
        int n = (int)(size - at < CHUNK ? size - at : (size_t)CHUNK);
        Chunk chunk = {layout->size + at, n, t->kind, t->layer, t->cols > 0};
        layout->chunks[layout->num_chunks++] = chunk;
    }
}

// Decides where the tensors of a network lie. The caller calls free_layout().
static inline Layout lay_out(const Config *c) {
    Layout layout = {tensor_list(c), (c->H + 7) / 8 * 8, (c->V + 7) / 8 * 8, NULL, 0, NULL, 0};
    const Tensor *end = layout.list.tensors + layout.list.count;
    size_t most = 0;
    layout.offsets = (size_t *)allocate((c->L + 1) * KINDS, sizeof(size_t));
    for (int i = 0; i < (c->L + 1) * KINDS; i++) layout.offsets[i] = ABSENT;
    for (const Tensor *t = layout.list.tensors; t < end; t++)
        most += (size_t)(t->rows + 8) * (t->cols + 8) / CHUNK + 1;
    layout.chunks = (Chunk *)allocate(most, sizeof(Chunk));
    for (const Tensor *t = layout.list.tensors; t < end; t++) {
        size_t rows = t->rows, cols = imax(t->cols, 1);
        if (t->kind == W1 || t->kind == W3) rows = layout.H;
        if (t->kind == W2) cols = layout.H;
        if (t->kind == OUTPUT) rows = layout.V;
        if (t->kind != WK && t->kind != WV && t->kind != W3)
            layout.size = (layout.size + 127) / 128 * 128;  // 256 bytes in bf16
        offset_of(&layout, t->kind, t->layer) = layout.size;
        add_chunks(&layout, t, rows * cols);
        layout.size += rows * cols;
    }
    return layout;
}

static inline void free_layout(Layout *layout) {
    free(layout->list.tensors);
    free(layout->offsets);
    free(layout->chunks);
}

// Copies all tensors between an array on the host, laid out as in files, and one on the GPU.
static inline void copy_tensors(const Layout *layout, float *host, float *device,
                                cudaMemcpyKind kind) {
    const Tensor *end = layout->list.tensors + layout->list.count;
    for (const Tensor *t = layout->list.tensors; t < end; t++) {
        size_t rows = t->cols ? t->rows : 1, width = (t->cols ? t->cols : t->rows) * sizeof(float);
        size_t pitch = t->kind == W2 ? layout->H * sizeof(float) : width;  // of a row on the GPU
        float *here = host + t->offset, *there = device + offset_of(layout, t->kind, t->layer);
        if (kind == cudaMemcpyHostToDevice)
            CUDA_CHECK(cudaMemcpy2D(there, pitch, here, width, width, rows, kind));
        else CUDA_CHECK(cudaMemcpy2D(here, width, there, pitch, width, rows, kind));
    }
}
#endif
