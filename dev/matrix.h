// matrix.h: defines Matrix, matrix, transpose, from: a view of a matrix in memory.
#ifndef MATRIX_H
#define MATRIX_H
#include <stddef.h>

// A matrix in memory: element (i,j) is x[i * row + j * column]. One of the two strides is 1.
typedef struct {
    const float *x;
    size_t row, column;
} Matrix;

// Returns the row-major matrix at x whose rows are `row` numbers apart.
static inline Matrix matrix(const float *x, size_t row) {
    Matrix a = {x, row, 1};
    return a;
}

// Returns the transpose: the same memory with the two strides swapped.
static inline Matrix transpose(Matrix a) {
    Matrix t = {a.x, a.column, a.row};
    return t;
}

// Returns the part of a that begins with its element (i,j).
static inline Matrix from(Matrix a, int i, int j) {
    a.x += i * a.row + j * a.column;
    return a;
}
#endif
