// thread_memory.h: defines thread_memory, free_thread_memory.
#ifndef THREAD_MEMORY_H
#define THREAD_MEMORY_H
#include "utils.h"

// Each thread has ten buffers. Numbers 8 and 9 belong to gemm().
enum { THREAD_BUFFERS = 10, SHARED_OPERAND = 8, OWN_OPERAND = 9 };
static float *thread_buffer[THREAD_BUFFERS];
static size_t thread_buffer_size[THREAD_BUFFERS];
#pragma omp threadprivate(thread_buffer, thread_buffer_size)

// Returns buffer number `which` of the calling thread, with room for n floats. When it has to grow,
// its contents are lost.
static inline float *thread_memory(int which, size_t n) {
    if (thread_buffer_size[which] < n) {
        free(thread_buffer[which]);
        thread_buffer[which] = (float *)allocate(n, sizeof(float));
        thread_buffer_size[which] = n;
    }
    return thread_buffer[which];
}

// Frees the buffers of the threads of a parallel region that starts here.
static inline void free_thread_memory(void) {
    #pragma omp parallel
    for (int which = 0; which < THREAD_BUFFERS; which++) {
        free(thread_buffer[which]);
        thread_buffer[which] = NULL;
        thread_buffer_size[which] = 0;
    }
}
#endif
