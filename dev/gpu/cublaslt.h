// cublaslt.h: defines gemm, the matrix product of NVIDIA's library cuBLASLt.
#ifndef CUBLASLT_H
#define CUBLASLT_H
#include "device.h"
#ifndef CUDA_ON_CPU
#include <cublasLt.h>
#endif

#define CUBLAS_CHECK(call) cublas_check(call, __FILE__, __LINE__)

static inline void cublas_check(cublasStatus_t status, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt: %s (%s:%d)", cublasLtGetStatusString(status), file, line);
}

// A product of column-major matrices: D (m,n) = A B, or D += A B, where A is (m,k), or (k,m) if
// trans_a, and B is (k,n), or (n,k) if trans_b. A number of A or B has real_size bytes, one of D
// result_size. The addresses of all three are multiples of `aligned`.
typedef struct {
    int trans_a, trans_b, m, n, k, real_size, result_size, aligned;
} Product;

// Describing a product to cuBLASLt, and choosing one of its kernels, takes longer than computing a
// small product. So the plans of the last PLANS products are kept.
typedef struct {
    Product product;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulHeuristicResult_t found;
} Plan;

enum { PLANS = 64, WORKSPACE = 32 << 20 };
static cublasLtHandle_t cublaslt;
static void *workspace;  // WORKSPACE bytes, for sums that a kernel splits into parts
static Plan plans[PLANS];
static int num_plans;    // how many have been made; the next goes to plans[num_plans % PLANS]

static inline void free_plan(Plan *plan) {
    if (!plan->operation) return;
    CUBLAS_CHECK(cublasLtMatmulDescDestroy(plan->operation));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(plan->a));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(plan->b));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(plan->d));
    plan->operation = NULL;
}

// Finds up to `wanted` kernels for a plan's product, in the order of cuBLASLt's own estimate of
// their speed, and returns how many there are. A kernel that splits a sum must add the parts in
// float.
static inline int find_kernels(const Plan *plan, cublasLtMatmulHeuristicResult_t *found,
                               int wanted) {
    cublasLtMatmulPreference_t preference;
    size_t bytes = WORKSPACE;
    uint32_t in_float = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, aligned = plan->product.aligned;
    int count = 0;
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const void *value, size_t size) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, what, value, size));
    };
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_float, sizeof in_float);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &aligned, sizeof aligned);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &aligned, sizeof aligned);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &aligned, sizeof aligned);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &aligned, sizeof aligned);
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        cublaslt, plan->operation, plan->a, plan->b, plan->d, plan->d, preference, wanted, found,
        &count);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    return count;
}

// Returns the plan for a product, with the kernel that cuBLASLt ranks first. We do not time the
// kernels, because then the next run might choose another one, and its results would differ.
static inline Plan *plan_for(Product p) {
    for (int i = 0; i < imin(num_plans, PLANS); i++)
        if (memcmp(&plans[i].product, &p, sizeof p) == 0) return &plans[i];
    if (!cublaslt) {
        CUBLAS_CHECK(cublasLtCreate(&cublaslt));
        CUDA_CHECK(cudaMalloc(&workspace, WORKSPACE));
    }
    Plan *plan = &plans[num_plans++ % PLANS];
    cublasOperation_t ops[] = {CUBLAS_OP_N, CUBLAS_OP_T};
    cudaDataType_t types[] = {CUDA_R_16BF, CUDA_R_32F};
    cudaDataType_t type = types[p.real_size == 4], result = types[p.result_size == 4];
    int a_rows = p.trans_a ? p.k : p.m, a_cols = p.trans_a ? p.m : p.k;
    int b_rows = p.trans_b ? p.n : p.k, b_cols = p.trans_b ? p.k : p.n;
    free_plan(plan);
    plan->product = p;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &ops[p.trans_a], sizeof *ops));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB,
                                                &ops[p.trans_b], sizeof *ops));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan->a, type, a_rows, a_cols, a_rows));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan->b, type, b_rows, b_cols, b_rows));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan->d, result, p.m, p.n, p.m));
    if (find_kernels(plan, &plan->found, 1) == 0)
        die("cuBLASLt has no kernel for a product of %d x %d x %d; make --channels a multiple of 8",
            p.m, p.n, p.k);
    return plan;
}

// Returns the largest power of two, at most 256, of which all three addresses are multiples.
static inline int alignment_of(const void *a, const void *b, const void *d) {
    uintptr_t bits = (uintptr_t)a | (uintptr_t)b | (uintptr_t)d | 256;
    return (int)(bits & -bits);
}

// Computes a Product. All matrices are in GPU memory.
template <class result, class real>
static void gemm(result *d, const real *a, int trans_a, const real *b, int trans_b, int m, int n,
                 int k, int accumulate) {
    Product product = {trans_a, trans_b, m, n, k, (int)sizeof(real), (int)sizeof(result),
                       alignment_of(a, b, d)};
    Plan *plan = plan_for(product);
    float alpha = 1, beta = accumulate ? 1 : 0;
    CUBLAS_CHECK(cublasLtMatmul(cublaslt, plan->operation, &alpha, a, plan->a, b, plan->b, &beta, d,
                                plan->d, d, plan->d, &plan->found.algo, workspace, WORKSPACE, 0));
}
#endif
