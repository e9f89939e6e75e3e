/* cuda_on_cpu.h - run CUDA C++ kernels on a machine without a GPU and without the CUDA Toolkit.
 *
 * A .cu file includes this header instead of the CUDA headers when CUDA_ON_CPU is defined.
 * C++ lacks three pieces of CUDA's syntax, which three sed rules (see build.mk) rewrite line by
 * line; write one launch per line, all up to the "(" on it, and one shared array per declaration:
 *
 *   name<T, 4><<<grid, block, bytes>>>(x) -> launch("name", name<T, 4>, grid, block, bytes)(x)
 *   __shared__ float tile[A][B];   -> auto &tile = shared_array<float [A][B]>("tile", []{});
 *   extern __shared__ float buf[]; -> auto *buf = dynamic_shared<float>();
 *
 * A launched kernel needs its template arguments spelled out, and no default arguments. Compile
 * with -fno-strict-aliasing, since kernels read arrays of one type through pointers to another.
 *
 * How it runs: the blocks of a grid are shared out to the cores by OpenMP. The threads of a block
 * are fibers (stacks of their own, switched by hand) of one core: each runs until it must wait
 * for others in __syncthreads(), __syncwarp(), a shuffle or an mma. A launch returns when the
 * grid is done; streams exist in name only.
 *
 * What it reports, as one line on stderr and exit status 1:
 *   always: barriers that some threads never reach, accesses that hit the inaccessible pages
 *     around each cudaMalloc, changed bytes around allocations and shared arrays (checked after
 *     the launch), host pointers passed to kernels, wrong pointers, sizes or directions in
 *     cudaMemcpy and the like;
 *   compiled with g++ -fsanitize=thread but linked without it: every memory access of a kernel
 *     is checked for bounds, alignment, uninitialized reads and races (the last section), and
 *     host code may not touch device memory.
 *
 * CUDA_ON_CPU_ORDER=reverse or =shuffle runs blocks and threads in another order.
 *
 * What it does not see: host pointers inside structs passed to a kernel; faults in local arrays;
 * what memcpy() or memset() touch inside a kernel; races on single bytes; in the plain build, small
 * overruns that only read. The checked build takes memory that only atomics order for a race, and
 * a 16 byte struct of two 8 byte members off a multiple of 16 for a misaligned access. Warp
 * functions need all lanes; __threadfence() and cudaMemcpyToSymbol() are missing.
 */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <link.h>
#include <stddef.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <type_traits>
#include <vector>

#include <omp.h>

#if defined __USE_FORTIFY_LEVEL && __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: it takes a switch between fibers for a broken stack"
#endif

#ifdef __clang__
#if __has_feature(thread_sanitizer)
#error "the checked build needs g++: clang++ hides struct copies from the checks"
#endif
#endif
#ifdef __SANITIZE_THREAD__
#define CUDA_ON_CPU_CHECKED 1
#else
#define CUDA_ON_CPU_CHECKED 0
#endif

// The functions of the emulator itself: the compiler must not check their memory accesses.
#define RUNTIME inline __attribute__((no_sanitize("thread")))

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// ------------------------------------------------------------------------------------------------
// Types and arithmetic. These are what a kernel computes with, so in the checked build their
// memory accesses are checked like the kernel's own.

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local uint3 threadIdx, blockIdx;  // of the fiber that runs now on this core
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))
#define __fdividef(x, y) ((x) / (y))
template <class T> T __ldg(const T *p) { return *p; }
#define CUDA_MIN_MAX(T) inline T min(T a, T b) { return b < a ? b : a; } \
    inline T max(T a, T b) { return b > a ? b : a; }
CUDA_MIN_MAX(int) CUDA_MIN_MAX(unsigned) CUDA_MIN_MAX(long) CUDA_MIN_MAX(unsigned long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

RUNTIME float bf16_bits_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}

// A bf16 is the upper half of a float. Rounding to nearest, ties to even: add just under half of
// the last bit that stays, plus that bit, and cut. A nan would turn into infinity: CUDA's is 7fff.
RUNTIME uint16_t float_to_bf16_bits(float f) {
    uint32_t wide;
    memcpy(&wide, &f, 4);
    if (f != f) return 0x7fff;
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) : bits(float_to_bf16_bits(f)) {}
    operator float() const { return bf16_bits_to_float(bits); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline float __low2float(__nv_bfloat162 b) { return b.x; }
inline float __high2float(__nv_bfloat162 b) { return b.y; }

// ------------------------------------------------------------------------------------------------
// The state: one arena of addresses holds all "device" memory, and after it a piece for each
// worker (a core's OS thread) with the shared memory of the block it runs. An address is device
// or shared memory if it lies in the arena. Device addresses are handed out once and never again,
// so that a use after cudaFree always shows.

namespace on_cpu {

constexpr size_t SLOT = 64 << 10;                  // a cudaMalloc takes whole slots and a guard
constexpr size_t DEVICE_BYTES = (size_t)256 << 30; // addresses, not memory
constexpr size_t SHARED_BYTES = 512 << 10;         // per worker, then as much again as a guard
constexpr size_t SHARED_DEFAULT = 48 << 10, SHARED_MOST = 227 << 10;  // as on an H100
constexpr int MAX_WORKERS = 128, MAX_THREADS = 1024, MAX_ARRAYS = 100;
constexpr int MAX_FIBERS = 30000;        // Linux allows 65530 mappings: a stack and a guard each
constexpr size_t ARENA_BYTES = DEVICE_BYTES + MAX_WORKERS * 2 * SHARED_BYTES;
constexpr size_t STACK_BYTES = 64 << 10;

struct Range {              // a cudaMalloc or a shared array
    char *start;
    size_t size, front, back;  // front and back: bytes around it that must stay 0xff
    const char *name;       // of a shared array
    const void *key;        // tells shared arrays apart
    bool live;
};

struct Site { const char *name; int line; bool block; };  // a barrier, of a block or of a warp

struct Fiber { jmp_buf context; char *stack; };

struct Thread {
    uint3 index;
    Site waits;             // name is null when the thread has returned
    Fiber *fiber;           // null unless it has begun and not yet returned
};

struct Warp {
    uint32_t exists, ready, arrived;   // a bit per lane; arrived: at the barrier `site`
    Site site;
    int first;                         // the thread that arrived first
    uint32_t clock;                    // counts barriers
    union Deposit {                    // what lanes show each other
        uint64_t value[32];
        struct { float a[16][16], b[16][8]; } mma;
    } deposit[2];                      // taken in turns: see exchange()
};

struct Worker {
    const char *kernel;     // null outside kernels
    jmp_buf made;           // where make_fiber() goes on
    Fiber home, *newest, *idle[MAX_THREADS];  // home: of run_block()
    Thread thread[MAX_THREADS];
    Warp warps[32];
    int fibers_made, idle_fibers, threads, current, alive, arrived, first;
    Site site;              // the __syncthreads() that `arrived` threads wait in, `first` first
    uint32_t clock, serial, launch_base;  // serial: of the block, launch_base: of block 0
    void (*body)(void *);
    void *args;
    char *shared, *handler_stack;
    size_t shared_used, shared_sum, shared_limit;
    Range arrays[MAX_ARRAYS];
    int arrays_used;
    uint8_t array_of[SHARED_BYTES / 256];
    const void *pc;         // behind the access being checked, else null
};

struct Cell { uint64_t writer, reader; };  // who touched two bytes of the arena: the last section

RUNTIME size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
inline const size_t PAGE = sysconf(_SC_PAGESIZE);
inline const size_t STACK_GUARD = round_up(20 << 10, PAGE);  // odd, else stacks share cache sets

inline thread_local Worker *worker;
inline int workers_made;
inline std::vector<Worker *> free_workers;
inline size_t arena_bytes, device_used, device_live;
inline Range **range_of_slot;
inline Cell *shadow;
inline std::vector<Range *> ranges;              // all cudaMallocs
inline std::map<const void *, size_t> pinned;    // all cudaMallocHosts
inline std::map<const void *, size_t> shared_attribute;
inline uint32_t next_serial = 1;

RUNTIME char *reserve(size_t bytes, int protection) {
    void *p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p != MAP_FAILED) return (char *)p;
    fprintf(stderr, "cuda_on_cpu: cannot reserve %zu bytes of addresses\n", bytes);
    _exit(1);
}

RUNTIME char *start_up() {
    char *p = reserve(ARENA_BYTES, PROT_NONE);
    range_of_slot = (Range **)reserve(DEVICE_BYTES / SLOT * 8, PROT_READ | PROT_WRITE);
    if (CUDA_ON_CPU_CHECKED) shadow = (Cell *)reserve(ARENA_BYTES * 8, PROT_NONE);
    arena_bytes = ARENA_BYTES;
    return p;
}
inline char *const arena = start_up();

RUNTIME bool in_arena(const void *p) { return (size_t)((const char *)p - arena) < arena_bytes; }
RUNTIME bool on_device(const void *p) { return (size_t)((const char *)p - arena) < DEVICE_BYTES; }
RUNTIME Cell *cell(const char *p) { return shadow + (p - arena) / 2; }

// Makes pages of the arena usable (or gives them back) together with their shadow.
RUNTIME bool open_pages(char *p, size_t bytes) {
    return mprotect(p, bytes, PROT_READ | PROT_WRITE) == 0 &&
        (!shadow || mprotect(cell(p), bytes * 8, PROT_READ | PROT_WRITE) == 0);
}

RUNTIME void close_pages(char *p, size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    mmap(p, bytes, PROT_NONE, flags, -1, 0);
    if (shadow) mmap(cell(p), bytes * 8, PROT_NONE, flags, -1, 0);
}

// ------------------------------------------------------------------------------------------------
// Reports.

// Where in the source an instruction is, by binutils' addr2line: " at x.cu:12", or nothing.
RUNTIME void source_line(const void *pc, char *text, size_t size) {
    static size_t load_address;
    char command[200], line[400] = "";
    dl_iterate_phdr([](dl_phdr_info *i, size_t, void *) { return load_address = i->dlpi_addr, 1; },
                    nullptr);  // the first one is the program
    snprintf(command, sizeof command, "addr2line -e /proc/%d/exe %zx 2>/dev/null", getpid(),
             (size_t)pc - 1 - load_address);
    FILE *f = popen(command, "r");
    if (f && fgets(line, sizeof line, f) && !strchr(line, '?')) {
        char *name = strrchr(line, '/') ? strrchr(line, '/') + 1 : line;
        snprintf(text, size, " at %.*s", (int)strcspn(name, " \n"), name);
    }
}

// Prints one line and ends the process, also from inside a fiber. who: null for the kernel.
[[noreturn]] RUNTIME void report(const char *who, const char *format, ...) {
    static int reported;
    if (__atomic_exchange_n(&reported, 1, __ATOMIC_SEQ_CST)) for (;;) pause();
    char what[600], where[400] = "", line[1200];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    int n = snprintf(line, sizeof line, "cuda_on_cpu: %s: %s", who ? who : worker->kernel, what);
    if (!who) {
        if (worker->pc) source_line(worker->pc, where, sizeof where);
        n += snprintf(line + n, sizeof line - n, "%s, block (%u,%u,%u) thread (%u,%u,%u)", where,
                      blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    }
    line[n++] = '\n';
    fflush(stdout);
    if (write(2, line, n) != n) _exit(1);
    _exit(1);
}

RUNTIME size_t distance(const Range &r, const char *p) {
    return p < r.start ? r.start - p : p < r.start + r.size ? 0 : p - (r.start + r.size) + 1;
}

// Says where n bytes at p are: "4 past the end of a cudaMalloc of 400 bytes".
RUNTIME const char *place(const char *p, size_t n) {
    static thread_local char text[200];
    const Range *best = nullptr;
    if (on_device(p)) {
        for (Range *r : ranges) if (!best || distance(*r, p) < distance(*best, p)) best = r;
    } else if (worker && in_arena(p)) {
        for (int i = 1; i < worker->arrays_used; i++) {
            Range *r = &worker->arrays[i];
            if (!best || distance(*r, p) < distance(*best, p)) best = r;
        }
    }
    if (!best) return snprintf(text, sizeof text, "at %p, which is no device memory", p), text;
    const Range &r = *best;
    const char *end = r.start + r.size;
    int m = p < r.start ? snprintf(text, sizeof text, "%zu before the start", r.start - p) :
        p >= end ? snprintf(text, sizeof text, "%zu past the end", p - end) :
        p + n > end ? snprintf(text, sizeof text, "up to %zu past the end", p + n - end) :
        snprintf(text, sizeof text, "at byte %zu", p - r.start);
    snprintf(text + m, sizeof text - m, " of %s%s of %zu bytes", r.name ? "shared memory " :
             r.live ? "a " : "a freed ", r.name ? r.name : "cudaMalloc", r.size);
    return text;
}

// The live allocation or shared array of this worker that holds all n bytes at p, or null.
RUNTIME Range *find_range(const char *p, size_t n) {
    Range *r = nullptr;
    if (on_device(p)) r = range_of_slot[(p - arena) / SLOT];
    else if (worker && (size_t)(p - worker->shared) < SHARED_BYTES)
        r = &worker->arrays[worker->array_of[(p - worker->shared) / 256]];
    return r && r->live && p >= r->start && p + n <= r->start + r->size ? r : nullptr;
}

// True if the bytes around an allocation or an array are as they were made.
RUNTIME bool intact(const Range &r) {
    for (size_t i = 1; i <= r.front; i++) if (r.start[-(ptrdiff_t)i] != '\xff') return false;
    for (size_t i = 0; i < r.back; i++) if (r.start[r.size + i] != '\xff') return false;
    return true;
}

// ------------------------------------------------------------------------------------------------
// Fibers. A thread of a block that must wait saves its registers with _setjmp and jumps with
// _longjmp to the next thread that can run; these two make no system call. A fiber whose thread
// returns runs the next one that has not begun, so that a kernel without barriers never switches.

enum Order { FORWARD, REVERSE, SHUFFLE };
RUNTIME Order read_order() {
    const char *s = getenv("CUDA_ON_CPU_ORDER");
    if (!s || !*s) return FORWARD;
    if (!strcmp(s, "reverse")) return REVERSE;
    if (!strcmp(s, "shuffle")) return SHUFFLE;
    report("CUDA_ON_CPU_ORDER", "must be reverse or shuffle, not %s", s);
}
inline const Order order = read_order();

RUNTIME uint64_t ordered(uint64_t i, uint64_t n) {
    constexpr uint64_t prime = 4294967311;  // no divisor in common with n < 2^32: a permutation
    return order == FORWARD ? i : order == REVERSE ? n - 1 - i : i * prime % n;
}

// The next thread of the block that can run, those of the current warp first; -1 if there's none.
RUNTIME int next_ready(Worker &w) {
    int warps = (w.threads + 31) / 32, warp = w.current / 32;
    for (int i = 0; i < warps; i++) {
        uint32_t ready = w.warps[warp].ready;
        if (ready) {
            static thread_local uint32_t random = 1;
            if (order == FORWARD) return warp * 32 + __builtin_ctz(ready);
            if (order == REVERSE) return warp * 32 + 31 - __builtin_clz(ready);
            int turn = (random = random * 1664525 + 1013904223) >> 27;
            uint32_t turned = ready >> turn | (uint64_t)ready << 32 >> turn;
            return warp * 32 + (__builtin_ctz(turned) + turn) % 32;
        }
        warp = order == REVERSE ? (warp ? warp : warps) - 1 : warp + 1 == warps ? 0 : warp + 1;
    }
    return -1;
}

// Thread a waits at a barrier that thread b isn't going to reach.
[[noreturn]] RUNTIME void report_missed(Worker &w, int a, int b) {
    Site s = w.thread[a].waits, t = w.thread[b].waits;
    uint3 i = w.thread[b].index;
    char there[100] = "has returned";
    if (t.name) snprintf(there, sizeof there, "waits in %s() on line %d", t.name, t.line);
    threadIdx = w.thread[a].index;
    report(nullptr, "waits for every thread of the %s in %s() on line %d, but thread (%u,%u,%u) %s",
           s.block ? "block" : "warp", s.name, s.line, i.x, i.y, i.z, there);
}

// No thread can run and not all have returned: names one that waits and one that it waits for.
[[noreturn]] RUNTIME void report_stuck(Worker &w) {
    for (int block = 0; block < 2; block++) {  // a barrier of a warp may hold up a block's
        for (int a = 0; a < w.threads; a++) {
            Site s = w.thread[a].waits;
            if (!s.name || s.block != block) continue;
            for (int b = 0; b < w.threads; b++) {
                Site t = w.thread[b].waits;
                bool together = t.name && t.line == s.line && t.block == s.block;
                if ((block || a / 32 == b / 32) && !together) report_missed(w, a, b);
            }
        }
    }
    report(nullptr, "no thread of the block can run");
}

RUNTIME void fiber_main();

RUNTIME __attribute__((noinline)) Fiber *make_fiber(Worker &w) {
    Fiber *f = w.newest = new Fiber();
    f->stack = reserve(STACK_GUARD + STACK_BYTES, PROT_READ | PROT_WRITE);
    mprotect(f->stack, STACK_GUARD, PROT_NONE);
    ucontext_t context;
    getcontext(&context);
    context.uc_link = nullptr;
    context.uc_stack.ss_sp = f->stack + STACK_GUARD;
    context.uc_stack.ss_size = STACK_BYTES - w.fibers_made++ % 16 * 256;  // spreads cache sets too
    makecontext(&context, fiber_main, 0);
    if (!_setjmp(w.made)) setcontext(&context);
    return f;
}

// Goes on with thread `next`, on its fiber or if it has not begun on an idle one (-1: with
// run_block()). Returns when somebody switches back to the fiber `from`.
RUNTIME __attribute__((noinline)) void switch_to(Worker &w, Fiber *from, int next) {
    Fiber *to = &w.home;
    if (next >= 0) {
        Thread &t = w.thread[w.current = next];
        if (!t.fiber) t.fiber = w.idle_fibers ? w.idle[--w.idle_fibers] : make_fiber(w);
        to = t.fiber;
    }
    if (!_setjmp(from->context)) _longjmp(to->context, 1);
}

// The current thread can't go on. Returns the thread that does, -1 if all have returned.
RUNTIME int other_thread(Worker &w) {
    w.warps[w.current / 32].ready &= ~(1u << w.current % 32);
    int next = next_ready(w);
    if (next < 0 && w.alive) report_stuck(w);
    return next;
}

RUNTIME void wait(Worker &w) {
    Thread &t = w.thread[w.current];
    int next = other_thread(w);
    switch_to(w, t.fiber, next);
    threadIdx = t.index;
}

RUNTIME void fiber_main() {
    Worker &w = *worker;
    Fiber *f = w.newest;
    if (!_setjmp(f->context)) _longjmp(w.made, 1);
    for (;;) {
        Thread &t = w.thread[w.current];
        threadIdx = t.index;
        w.body(w.args);
        t.waits.name = nullptr;
        t.fiber = nullptr;
        w.alive--;
        w.idle[w.idle_fibers++] = f;
        int next = other_thread(w);
        if (next < 0 || w.thread[next].fiber) switch_to(w, f, next);
        else w.thread[w.current = next].fiber = w.idle[--w.idle_fibers];  // f itself
    }
}

// Comes on a stack of its own, since a fiber's may be what has overflowed.
RUNTIME void on_fault(int, siginfo_t *info, void *interrupted) {
    const char *p = (const char *)info->si_addr;
    Worker *w = worker;
    if (!w || !w->kernel) report("host code", "segmentation fault, %s", place(p, 1));
    auto &registers = ((ucontext_t *)interrupted)->uc_mcontext;
#ifdef __x86_64__
    w->pc = (const void *)(registers.gregs[REG_RIP] + 1);
#else
    w->pc = (const void *)(registers.pc + 1);
#endif
    size_t above = p - w->thread[w->current].fiber->stack;
    if (above < STACK_GUARD)
        report(nullptr, "stack overflow: a thread has %zu KiB", STACK_BYTES >> 10);
    report(nullptr, "segmentation fault, %s", place(p, 1));
}

RUNTIME void catch_faults(char *handler_stack) {
    stack_t stack = {};
    stack.ss_sp = handler_stack;
    stack.ss_size = SLOT;
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

RUNTIME Worker *new_worker() {
    if (workers_made == MAX_WORKERS) report("launch", "more than %d OS threads", MAX_WORKERS);
    Worker *w = new Worker();
    w->shared = arena + DEVICE_BYTES + workers_made++ * 2 * SHARED_BYTES;
    w->handler_stack = reserve(SLOT, PROT_READ | PROT_WRITE);
    if (!open_pages(w->shared, SHARED_BYTES)) report("launch", "out of memory");
    return w;
}

// Takes a worker for an OS thread and, when that ends, puts it back: OpenMP may end and start
// threads whenever a launch uses another number of them.
struct WorkerLease {
    WorkerLease() {
        #pragma omp critical (cuda_on_cpu)
        {
            worker = free_workers.empty() ? new_worker() : free_workers.back();
            if (!free_workers.empty()) free_workers.pop_back();
        }
        catch_faults(worker->handler_stack);
    }
    ~WorkerLease() {
        #pragma omp critical (cuda_on_cpu)
        free_workers.push_back(worker);
        worker = nullptr;
    }
};

RUNTIME Worker &this_worker() {
    static thread_local WorkerLease lease;
    return *worker;
}

// ------------------------------------------------------------------------------------------------
// Barriers, shuffles and the tensor core. Macros pass the line, so that a thread that waits in
// another __syncthreads() than the rest of its block is told apart.

RUNTIME void block_barrier(Site site) {
    Worker &w = *worker;
    w.thread[w.current].waits = site;
    if (w.arrived == 0) w.site = site, w.first = w.current;
    if (w.site.line != site.line) report_missed(w, w.first, w.current);
    if (++w.arrived < w.threads) return wait(w);
    w.arrived = 0;
    int warps = (w.threads + 31) / 32;
    for (int i = 0; i < warps; i++) w.clock = std::max(w.clock, w.warps[i].clock);
    w.clock++;
    for (int i = 0; i < warps; i++) {
        w.warps[i].ready = w.warps[i].exists;
        w.warps[i].clock = w.clock;
    }
}

RUNTIME void warp_barrier(Site site, unsigned mask = 0xffffffff) {
    Worker &w = *worker;
    Warp &warp = w.warps[w.current / 32];
    if ((mask & warp.exists) != warp.exists)
        report(nullptr, "%s() on line %d: mask %08x leaves out lanes of the warp, which this "
               "emulation does not have", site.name, site.line, mask);
    w.thread[w.current].waits = site;
    if (warp.arrived == 0) warp.site = site, warp.first = w.current;
    if (warp.site.line != site.line) report_missed(w, warp.first, w.current);
    warp.arrived |= 1u << w.current % 32;
    if (warp.arrived != warp.exists) return wait(w);
    warp.arrived = 0;
    warp.ready = warp.exists;
    warp.clock++;
}

// Gives each lane the value of the lane that it names. Two deposits in turns make one barrier
// enough: nobody can fill this one again before all have passed the barrier of the other.
template <class T>
RUNTIME T exchange(Site site, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Warp &warp = worker->warps[worker->current / 32];
    uint64_t *values = warp.deposit[warp.clock % 2].value;
    memcpy(&values[worker->current % 32], &value, sizeof(T));
    warp_barrier(site, mask);
    if (!(warp.exists >> source & 1))
        report(nullptr, "%s() on line %d reads lane %d, which this warp does not have", site.name,
               site.line, source);
    memcpy(&value, &values[source], sizeof(T));
    return value;
}

RUNTIME int lane() { return worker->current % 32; }

template <class T> RUNTIME T shuffle(Site s, unsigned mask, T v, int from, int width = 32) {
    return exchange(s, mask, v, (lane() & -width) | (from & (width - 1)));
}
template <class T> RUNTIME T shuffle_xor(Site s, unsigned mask, T v, int bits, int width = 32) {
    int from = lane() ^ bits;
    return exchange(s, mask, v, from > (lane() | (width - 1)) ? lane() : from);
}
template <class T> RUNTIME T shuffle_down(Site s, unsigned mask, T v, unsigned by, int width = 32) {
    int from = lane() + (int)by;
    return exchange(s, mask, v, from > (lane() | (width - 1)) ? lane() : from);
}
template <class T> RUNTIME T shuffle_up(Site s, unsigned mask, T v, unsigned by, int width = 32) {
    int from = lane() - (int)by;
    return exchange(s, mask, v, from < (lane() & -width) ? lane() : from);
}

// D = A B + C by a warp, in the layout of mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32:
// with g = lane / 4 and t = lane % 4, a lane holds of A the pairs of columns 2t and 2t + 8 of the
// rows g and g + 8, of B the pairs of rows 2t and 2t + 8 of column g, and of C and D the columns
// 2t and 2t + 1 of the rows g and g + 8. All lanes deposit theirs as floats, then each sums its 4.
RUNTIME void mma(Site site, float c[4], const __nv_bfloat162 a[4], const __nv_bfloat162 b[2]) {
    Warp &warp = worker->warps[worker->current / 32];
    auto &m = warp.deposit[warp.clock % 2].mma;
    int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
        m.a[row][column] = bf16_bits_to_float(a[i].x.bits);
        m.a[row][column + 1] = bf16_bits_to_float(a[i].y.bits);
    }
    for (int i = 0; i < 2; i++) {
        m.b[2 * t + i * 8][g] = bf16_bits_to_float(b[i].x.bits);
        m.b[2 * t + i * 8 + 1][g] = bf16_bits_to_float(b[i].y.bits);
    }
    warp_barrier(site);
    float sum[4] = {};
    for (int k = 0; k < 16; k++) {
        sum[0] += m.a[g][k] * m.b[k][2 * t];
        sum[1] += m.a[g][k] * m.b[k][2 * t + 1];
        sum[2] += m.a[g + 8][k] * m.b[k][2 * t];
        sum[3] += m.a[g + 8][k] * m.b[k][2 * t + 1];
    }
    for (int i = 0; i < 4; i++) c[i] += sum[i];
}

#define __syncthreads() on_cpu::block_barrier({"__syncthreads", __LINE__, true})
#define __syncwarp(...) \
    on_cpu::warp_barrier({"__syncwarp", __LINE__, false} __VA_OPT__(,) __VA_ARGS__)
#define __shfl_sync(...) on_cpu::shuffle({"__shfl_sync", __LINE__, false}, __VA_ARGS__)
#define __shfl_xor_sync(...) on_cpu::shuffle_xor({"__shfl_xor_sync", __LINE__, false}, __VA_ARGS__)
#define __shfl_down_sync(...) \
    on_cpu::shuffle_down({"__shfl_down_sync", __LINE__, false}, __VA_ARGS__)
#define __shfl_up_sync(...) on_cpu::shuffle_up({"__shfl_up_sync", __LINE__, false}, __VA_ARGS__)
#define mma_m16n8k16_bf16(...) on_cpu::mma({"mma_m16n8k16_bf16", __LINE__, false}, __VA_ARGS__)

// ------------------------------------------------------------------------------------------------
// Shared memory. An array gets its place when a thread first comes to its declaration; the place
// is kept for the launch. Like on a GPU, a block finds in it whatever the block before it left.

RUNTIME Range &add_array(Worker &w, const void *key, const char *name, size_t size) {
    size_t whole = round_up(size, 256) + 256;
    if ((w.shared_sum += size) > w.shared_limit || w.arrays_used == MAX_ARRAYS)
        report(nullptr, "%zu bytes of shared memory with %s, more than the %zu of a block",
               w.shared_sum, name, w.shared_limit);
    char *start = w.shared + w.shared_used;
    memset(start + size, 0xff, whole - size);
    memset(w.array_of + w.shared_used / 256, w.arrays_used, whole / 256);
    w.shared_used += whole;
    return w.arrays[w.arrays_used++] = {start, size, 0, whole - size, name, key, true};
}

RUNTIME char *find_array(const void *key, const char *name, size_t size) {
    Worker &w = *worker;
    for (int i = 1; i < w.arrays_used; i++) if (w.arrays[i].key == key) return w.arrays[i].start;
    return add_array(w, key, name, size).start;
}

}  // namespace on_cpu

// Key is the type of a lambda, which differs for each declaration and each template instance.
template <class T, class Key> RUNTIME T &shared_array(const char *name, Key) {
    static char key;
    return *(T *)on_cpu::find_array(&key, name, sizeof(T));
}

template <class T> RUNTIME T *dynamic_shared() { return (T *)on_cpu::worker->arrays[1].start; }

// ------------------------------------------------------------------------------------------------
// Host API: errors, then launches. As in CUDA a launch returns nothing and leaves its error for
// cudaGetLastError().

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101,
};
typedef struct CUstream_st *cudaStream_t;

struct cudaErrorText { cudaError_t error; const char *name, *text; };
RUNTIME cudaErrorText cuda_error_text(cudaError_t e) {
    const cudaErrorText all[] = {
        {cudaSuccess, "cudaSuccess", "no error"},
        {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
        {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
        {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
         "invalid configuration argument"},
        {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"}};
    for (auto &t : all) if (t.error == e) return t;
    return {e, "unrecognized error code", "unrecognized error code"};
}
RUNTIME const char *cudaGetErrorName(cudaError_t e) { return cuda_error_text(e).name; }
RUNTIME const char *cudaGetErrorString(cudaError_t e) { return cuda_error_text(e).text; }

namespace on_cpu {

inline cudaError_t last_error;
RUNTIME cudaError_t failed(cudaError_t e) { return last_error = e; }

struct Grid {
    const char *kernel;
    const void *function;
    dim3 grid, block;
    size_t shared;
    void (*body)(void *);
    void *args;
};

// Readies this core for blocks of a launch.
RUNTIME void prepare(Worker &w, const Grid &g, uint32_t base, size_t shared_limit) {
    blockDim = g.block;
    gridDim = g.grid;
    w.threads = g.block.x * g.block.y * g.block.z;
    for (int t = 0; t < w.threads; t++)
        w.thread[t].index = {t % g.block.x, t / g.block.x % g.block.y, t / g.block.x / g.block.y};
    w.kernel = g.kernel;
    w.body = g.body;
    w.args = g.args;
    w.launch_base = base;
    w.shared_used = w.shared_sum = 0;
    w.shared_limit = shared_limit;
    w.arrays_used = 1;  // array 0 stands for none
    memset(w.array_of, 0, sizeof w.array_of);
    add_array(w, nullptr, "(dynamic)", g.shared);
}

RUNTIME void run_block(Worker &w, uint32_t number) {
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    w.serial = w.launch_base + number;
    w.clock = w.arrived = w.current = 0;
    w.alive = w.threads;
    for (int i = 0; i * 32 < w.threads; i++) {
        Warp &warp = w.warps[i];
        int lanes = std::min(w.threads - i * 32, 32);
        warp.exists = warp.ready = 0xffffffff >> (32 - lanes);
        warp.arrived = warp.clock = 0;
    }
    w.current = order == REVERSE ? w.threads - 1 : 0;
    switch_to(w, &w.home, next_ready(w));
    for (int i = 1; i < w.arrays_used; i++)
        if (!intact(w.arrays[i]))
            report(w.kernel, "block (%u,%u,%u) wrote past the end of shared memory %s of %zu bytes",
                   blockIdx.x, blockIdx.y, blockIdx.z, w.arrays[i].name, w.arrays[i].size);
}

RUNTIME void check_intact(const char *who) {
    for (Range *r : ranges)
        if (r->live && !intact(*r))
            report(who, "wrote before the start or past the end of a cudaMalloc of %zu bytes",
                   r->size);
}

RUNTIME void run_grid(const Grid &g) {
    dim3 n = g.grid, b = g.block;
    uint64_t blocks = (uint64_t)n.x * n.y * n.z, threads = (uint64_t)b.x * b.y * b.z;
    size_t limit = SHARED_DEFAULT;
    if (shared_attribute.count(g.function)) limit = shared_attribute[g.function];
    if (blocks == 0 || threads == 0 || threads > MAX_THREADS || b.z > 64 || n.y > 65535 ||
        n.z > 65535 || blocks >> 31) { failed(cudaErrorInvalidConfiguration); return; }
    if (g.shared > limit) { failed(cudaErrorInvalidValue); return; }
    uint32_t base = next_serial;
    next_serial += blocks;
    int workers = std::min({omp_get_max_threads(), MAX_WORKERS, MAX_FIBERS / (int)threads});
    #pragma omp parallel num_threads(workers) if (blocks > 1)
    {
        Worker &w = this_worker();
        prepare(w, g, base, limit > SHARED_DEFAULT ? SHARED_MOST : SHARED_DEFAULT);
        #pragma omp for schedule(dynamic)
        for (uint64_t i = 0; i < blocks; i++) run_block(w, ordered(i, blocks));
        w.kernel = nullptr;
    }
    check_intact(g.kernel);
}

template <class T> RUNTIME void check_argument(const char *kernel, int number, const T &value) {
    if constexpr (std::is_pointer_v<T>) {
        if (!value || on_device((const void *)value)) return;
        auto p = pinned.upper_bound((const void *)value);
        if (p != pinned.begin() && (--p, (char *)value < (char *)p->first + p->second)) return;
        report(kernel, "argument %d is a host pointer", number);
    }
}

template <class... P> struct Launch {
    const char *name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t shared;
    void operator()(P... args) const {
        int number = 0;
        (check_argument(name, ++number, args), ...);
        auto body = [&] { kernel(args...); };
        run_grid({name, (const void *)kernel, grid, block, shared,
                  [](void *p) { (*(decltype(body) *)p)(); }, &body});
    }
};

}  // namespace on_cpu

template <class... P>
on_cpu::Launch<P...> launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                            size_t shared_bytes = 0, cudaStream_t = nullptr) {
    return {name, kernel, grid, block, shared_bytes};
}

// ------------------------------------------------------------------------------------------------
// Host API: memory. An allocation lies at the end of its slots, up to the guard, as far as its
// start is a multiple of 256. It is filled with 0xff, in floats a nan: a GPU's holds no zeros.

enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};

namespace on_cpu {

constexpr uint64_t BY_HOST = 1;  // the writer of a cell

RUNTIME size_t device_total() { return sysconf(_SC_PHYS_PAGES) * PAGE; }

// Checks n bytes that the host is about to read or write for the kernel side's sake.
RUNTIME void touch(const char *who, const void *pointer, size_t n, bool write, bool need_values) {
    const char *p = (const char *)pointer;
    if (!n || !on_device(p)) return;
    if (!find_range(p, n))
        report(who, "%s %zu bytes, %s", write ? "writes" : "reads", n, place(p, n));
    if (!shadow) return;
    for (Cell *c = cell(p); c <= cell(p + n - 1); c++) {
        if (write) *c = {BY_HOST, 0};
        else if (need_values && !c->writer)
            report(who, "reads what nothing has written, %s", place(arena + (c - shadow) * 2, 1));
    }
}

RUNTIME cudaError_t copy(const char *who, void *to, const void *from, size_t n,
                         cudaMemcpyKind kind) {
    bool to_device = on_device(to), from_device = on_device(from);
    if (kind != cudaMemcpyDefault && n) {
        if (to_device != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice))
            report(who, "the direction does not fit: the destination is %s memory",
                   to_device ? "device" : "host");
        if (from_device != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice))
            report(who, "the direction does not fit: the source is %s memory",
                   from_device ? "device" : "host");
    }
    touch(who, to, n, true, false);
    touch(who, from, n, false, !to_device);
    memmove(to, from, n);
    if (shadow && to_device && from_device)
        for (size_t i = 0; i < n; i++)
            cell((char *)to + i)->writer = cell((const char *)from + i)->writer ? BY_HOST : 0;
    return cudaSuccess;
}

}  // namespace on_cpu

RUNTIME cudaError_t cudaMalloc(void **pointer, size_t size) {
    using namespace on_cpu;
    *pointer = nullptr;
    if (size == 0) return cudaSuccess;
    size_t bytes = round_up(round_up(size, 256), SLOT);
    if (device_live + size > device_total() || device_used + bytes + 2 * SLOT > DEVICE_BYTES)
        return failed(cudaErrorMemoryAllocation);
    char *slots = arena + device_used + SLOT;  // the first of them stays a guard
    char *start = slots + bytes - round_up(size, 256);
    char *open = (char *)((uintptr_t)start / PAGE * PAGE);
    if (!open_pages(open, slots + bytes - open)) return failed(cudaErrorMemoryAllocation);
    memset(open, 0xff, slots + bytes - open);
    Range *r = new Range{start, size, std::min((size_t)(start - open), (size_t)256),
                         (size_t)(slots + bytes - start) - size, nullptr, nullptr, true};
    for (char *p = slots; p < slots + bytes; p += SLOT) range_of_slot[(p - arena) / SLOT] = r;
    ranges.push_back(r);
    device_used += SLOT + bytes;
    device_live += size;
    *pointer = start;
    return cudaSuccess;
}

RUNTIME cudaError_t cudaFree(void *pointer) {
    using namespace on_cpu;
    if (!pointer) return cudaSuccess;
    Range *r = find_range((char *)pointer, 1);
    if (!on_device(pointer) || !r || r->start != pointer)
        report("cudaFree", "not the start of a live cudaMalloc, %s", place((char *)pointer, 1));
    check_intact("cudaFree: some kernel");
    char *first = arena + (r->start - arena) / SLOT * SLOT;
    close_pages(first, round_up(r->start + r->size - first, SLOT));
    r->live = false;
    device_live -= r->size;
    return cudaSuccess;
}

RUNTIME cudaError_t cudaMallocHost(void **pointer, size_t size) {
    *pointer = aligned_alloc(256, on_cpu::round_up(std::max(size, (size_t)1), 256));
    if (!*pointer) return on_cpu::failed(cudaErrorMemoryAllocation);
    on_cpu::pinned[*pointer] = size;
    return cudaSuccess;
}

RUNTIME cudaError_t cudaFreeHost(void *pointer) {
    if (pointer && !on_cpu::pinned.erase(pointer))
        on_cpu::report("cudaFreeHost", "%p is not the start of a live cudaMallocHost", pointer);
    free(pointer);
    return cudaSuccess;
}

template <class T> cudaError_t cudaMalloc(T **p, size_t n) { return cudaMalloc((void **)p, n); }
template <class T> cudaError_t cudaMallocHost(T **p, size_t n) {
    return cudaMallocHost((void **)p, n);
}

RUNTIME cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    return on_cpu::copy("cudaMemcpy", to, from, n, kind);
}

RUNTIME cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                    cudaStream_t = nullptr) {
    return on_cpu::copy("cudaMemcpyAsync", to, from, n, kind);
}

RUNTIME cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                 size_t width, size_t height, cudaMemcpyKind kind) {
    if (width > to_pitch || width > from_pitch) return on_cpu::failed(cudaErrorInvalidValue);
    for (size_t y = 0; y < height; y++)
        on_cpu::copy("cudaMemcpy2D", (char *)to + y * to_pitch, (const char *)from + y * from_pitch,
                     width, kind);
    return cudaSuccess;
}

RUNTIME cudaError_t cudaMemset(void *p, int value, size_t n) {
    if (n && !on_cpu::on_device(p)) on_cpu::report("cudaMemset", "%p is host memory", p);
    on_cpu::touch("cudaMemset", p, n, true, false);
    memset(p, value, n);
    return cudaSuccess;
}

RUNTIME cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t = nullptr) {
    return cudaMemset(p, value, n);
}

// ------------------------------------------------------------------------------------------------
// Host API: the rest.

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, regsPerBlock;
    int maxThreadsPerMultiProcessor, maxThreadsDim[3], maxGridSize[3];
    int clockRate, memoryClockRate, memoryBusWidth, l2CacheSize;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef double *cudaEvent_t;  // seconds

RUNTIME cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
RUNTIME cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
RUNTIME cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = nullptr; return cudaSuccess; }
RUNTIME cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
RUNTIME cudaError_t cudaPeekAtLastError() { return on_cpu::last_error; }
RUNTIME cudaError_t cudaGetLastError() {
    cudaError_t e = on_cpu::last_error;
    on_cpu::last_error = cudaSuccess;
    return e;
}
RUNTIME cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
RUNTIME cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
RUNTIME cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : on_cpu::failed(cudaErrorInvalidDevice);
}

RUNTIME cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    *p = {"the CPU (cuda_on_cpu.h)", on_cpu::device_total(), on_cpu::SHARED_DEFAULT,
          on_cpu::SHARED_MOST, 228 << 10, 9, 0, omp_get_max_threads(), 32, 1024, 65536, 2048,
          {1024, 1024, 64}, {0x7fffffff, 65535, 65535}, 0, 0, 0, 0};
    return cudaSetDevice(device);
}

RUNTIME cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = on_cpu::device_total();
    *free = *total - on_cpu::device_live;
    return cudaSuccess;
}

template <class F>
RUNTIME cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        (size_t)value > on_cpu::SHARED_MOST) return on_cpu::failed(cudaErrorInvalidValue);
    on_cpu::shared_attribute[(const void *)kernel] =
        std::max((size_t)value, on_cpu::SHARED_DEFAULT);
    return cudaSuccess;
}

RUNTIME cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = new double(0); return cudaSuccess; }
RUNTIME cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
RUNTIME cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
RUNTIME cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr) {
    *e = omp_get_wtime();
    return cudaSuccess;
}
RUNTIME cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t stop) {
    *ms = (float)((*stop - *start) * 1e3);
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// cuBLASLt: D = alpha op(A) op(B) + beta C of column-major matrices. Whatever their types and
// transposes, op(A) and op(B) are first packed as floats, A in panels of 8 rows and B in panels of
// 4 columns; then one loop serves all cases. It sums over k in order: the result doesn't depend
// on the number of cores.

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
};
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1 };
typedef struct cublasLtContext { } *cublasLtHandle_t;
typedef struct cublasLtMatmulDescOpaque { cublasOperation_t a, b; } *cublasLtMatmulDesc_t;
typedef struct cublasLtMatrixLayoutOpaque {
    cudaDataType_t type;
    size_t rows, cols, ld;
} *cublasLtMatrixLayout_t;
typedef struct cublasLtMatmulPreferenceOpaque { size_t workspace; } *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
};

RUNTIME const char *cublasLtGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_SUCCESS ? "success" : s == CUBLAS_STATUS_INVALID_VALUE ?
        "an unsupported value or parameter was passed to the function" : "not supported";
}

namespace on_cpu {
template <class T> RUNTIME cublasStatus_t make(T **p, T value) {
    *p = new T(value);
    return CUBLAS_STATUS_SUCCESS;
}
template <class T> RUNTIME cublasStatus_t destroy(T *p) { return delete p, CUBLAS_STATUS_SUCCESS; }
template <class T> RUNTIME cublasStatus_t set(T *to, const void *from, size_t n) {
    if (n != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, from, n);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace on_cpu

RUNTIME cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { return on_cpu::make(h, {}); }
RUNTIME cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return on_cpu::destroy(h); }
RUNTIME cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t,
                                                cudaDataType_t) { return on_cpu::make(d, {}); }
RUNTIME cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
    cublasLtMatmulDescAttributes_t which, const void *value, size_t n) {
    return on_cpu::set(which == CUBLASLT_MATMUL_DESC_TRANSA ? &d->a : &d->b, value, n);
}
RUNTIME cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    return on_cpu::destroy(d);
}
RUNTIME cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type,
                                                  uint64_t rows, uint64_t cols, int64_t ld) {
    if (ld < (int64_t)rows) return CUBLAS_STATUS_INVALID_VALUE;
    return on_cpu::make(l, {type, rows, cols, (size_t)ld});
}
RUNTIME cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    return on_cpu::destroy(l);
}
RUNTIME cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return on_cpu::make(p, {});
}
RUNTIME cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
    cublasLtMatmulPreferenceAttributes_t, const void *value, size_t n) {
    return on_cpu::set(&p->workspace, value, n);
}
RUNTIME cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return on_cpu::destroy(p);
}

namespace on_cpu {

RUNTIME float element(const void *p, cudaDataType_t type, size_t i) {
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    return bf16_bits_to_float(((const uint16_t *)p)[i]);
}

RUNTIME bool same_shape(cublasLtMatrixLayout_t l, size_t rows, size_t cols) {
    return l->rows == rows && l->cols == cols;
}

RUNTIME void touch_matrix(const void *p, cublasLtMatrixLayout_t l, bool write) {
    size_t size = l->type == CUDA_R_32F ? 4 : 2;
    if (l->rows && l->cols && !on_device(p)) report("cublasLtMatmul", "%p is host memory", p);
    for (size_t c = 0; c < l->cols; c++)
        touch("cublasLtMatmul", (const char *)p + c * l->ld * size, l->rows * size, write, true);
}

// Packs n vectors of k floats in panels of `width`: element k of the panel's vectors together.
RUNTIME std::vector<float> pack(const void *p, cublasLtMatrixLayout_t l, bool k_adjacent, size_t n,
                                size_t k, size_t width) {
    size_t step = k_adjacent ? l->ld : 1, k_step = k_adjacent ? 1 : l->ld;
    std::vector<float> packed(round_up(n, width) * k);
    float *out = packed.data();
    cudaDataType_t type = l->type;
    #pragma omp parallel for
    for (size_t i0 = 0; i0 < n; i0 += width)
        for (size_t kk = 0; kk < k; kk++)
            for (size_t i = i0; i < std::min(i0 + width, n); i++)
                out[i0 * k + kk * width + i - i0] = element(p, type, i * step + kk * k_step);
    return packed;
}

typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));

// sum[c][r] = the products of 8 packed rows of op(A) with 4 packed columns of op(B)
RUNTIME void multiply(const float *a, const float *b, size_t k, Vec8 sum[4]) {
    Vec8 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (size_t kk = 0; kk < k; kk++, a += 8, b += 4) {
        Vec8 va = *(const Vec8 *)a;
        s0 += va * b[0];
        s1 += va * b[1];
        s2 += va * b[2];
        s3 += va * b[3];
    }
    sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
}

}  // namespace on_cpu

RUNTIME cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha_pointer, const void *A,
    cublasLtMatrixLayout_t la, const void *B, cublasLtMatrixLayout_t lb, const void *beta_pointer,
    const void *C, cublasLtMatrixLayout_t lc, void *D, cublasLtMatrixLayout_t ld,
    const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t) {
    using namespace on_cpu;
    float alpha = *(const float *)alpha_pointer, beta = *(const float *)beta_pointer;
    bool ta = desc->a == CUBLAS_OP_T, tb = desc->b == CUBLAS_OP_T;
    size_t m = ld->rows, n = ld->cols, k = ta ? la->rows : la->cols;
    if (!same_shape(la, ta ? k : m, ta ? m : k) || !same_shape(lb, tb ? n : k, tb ? k : n) ||
        !same_shape(lc, m, n) || lc->type != ld->type) return CUBLAS_STATUS_INVALID_VALUE;
    touch_matrix(A, la, false);
    touch_matrix(B, lb, false);
    if (beta != 0) touch_matrix(C, lc, false);
    std::vector<float> a = pack(A, la, ta, m, k, 8), b = pack(B, lb, !tb, n, k, 4);
    const float *pa = a.data(), *pb = b.data();
    #pragma omp parallel for collapse(2)
    for (size_t i0 = 0; i0 < m; i0 += 8) {
        for (size_t j0 = 0; j0 < n; j0 += 4) {
            Vec8 sum[4];
            multiply(pa + i0 * k, pb + j0 * k, k, sum);
            for (size_t j = j0; j < std::min(j0 + 4, n); j++) {
                for (size_t i = i0; i < std::min(i0 + 8, m); i++) {
                    float d = alpha * sum[j - j0][i - i0];
                    if (beta != 0) d += beta * element(C, lc->type, j * lc->ld + i);
                    if (ld->type == CUDA_R_32F) ((float *)D)[j * ld->ld + i] = d;
                    else ((uint16_t *)D)[j * ld->ld + i] = float_to_bf16_bits(d);
                }
            }
        }
    }
    touch_matrix(D, ld, true);
    return CUBLAS_STATUS_SUCCESS;
}

RUNTIME cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int wanted,
    cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = wanted > 0;
    if (*found) results[0] = {};
    return wanted > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

// ------------------------------------------------------------------------------------------------
// The checked build. g++ -fsanitize=thread makes the compiler call __tsan_read4(address) before
// each read of 4 bytes, and so on; these functions are usually ThreadSanitizer's. Here are others.
//
// Each two bytes of the arena have a Cell that says who wrote and who read them last, as
//   serial of the block : 32 | clock : 20 | thread : 10 | flag : 2
// The clock of a warp goes up at each of its barriers; at a __syncthreads() all clocks of the
// block go to one value that none had before. So an earlier access happened before this one if it
// is of an earlier launch, or of this block with a clock below that of the last __syncthreads(),
// or of this warp with a clock below its present one, or of this thread. If not, and if one of the
// two writes, they race. The flag of a writer says that it was an atomic, that of a reader whether
// it stands for several lanes, warps or blocks.

namespace on_cpu {

enum Access { READ, WRITE, ATOMIC };
enum Flag { ONE = 0, LANES = 1, WARPS = 2, BLOCKS = 3, BY_ATOMIC = 1 };

RUNTIME uint32_t clock_of(uint64_t who) { return who >> 12 & 0xfffff; }
RUNTIME int thread_of(uint64_t who) { return who >> 2 & 1023; }

// True if who is of an earlier launch, or with shared memory of the block that had it before.
RUNTIME bool is_old(const Worker &w, uint64_t who, bool shared) {
    return shared ? who >> 32 != w.serial : who >> 32 < w.launch_base;
}

// True if who's access didn't happen before what this thread does now.
RUNTIME bool concurrent(const Worker &w, uint64_t who, bool shared) {
    int flag = who & 3;
    if (is_old(w, who, shared)) return false;
    if (flag == BLOCKS || who >> 32 != w.serial) return true;
    if (clock_of(who) < w.clock) return false;
    if (flag == WARPS || thread_of(who) / 32 != w.current / 32) return true;
    if (clock_of(who) < w.warps[w.current / 32].clock) return false;
    return flag == LANES || thread_of(who) != w.current;
}

[[noreturn]] RUNTIME void report_race(const Worker &w, const char *p, size_t n, Access access,
                                      uint64_t who, const char *did) {
    char other[100];
    uint32_t number = (who >> 32) - w.launch_base, x = gridDim.x, y = gridDim.y;
    uint3 t = w.thread[thread_of(who)].index;
    bool same_block = who >> 32 == w.serial && (who & 3) != BLOCKS;
    bool same_warp = same_block && (who & 3) != WARPS && thread_of(who) / 32 == w.current / 32;
    if (who & 3) snprintf(other, sizeof other, "other threads");
    else if (same_block) snprintf(other, sizeof other, "thread (%u,%u,%u)", t.x, t.y, t.z);
    else snprintf(other, sizeof other, "block (%u,%u,%u)", number % x, number / x % y,
                  number / x / y);
    const char *between = !same_block ? "in the same launch" : same_warp ?
        "with no __syncwarp() between" : "with no __syncthreads() between";
    report(nullptr, "race: %s %zu bytes, %s, that %s %s %s", access == READ ? "reads" : "writes", n,
           place(p, n), other, did, between);
}

// Checks one cell of an access to n bytes at p. A cell of which it takes one byte (whole is false)
// is not checked for races, for the other byte may be another thread's.
RUNTIME void check_cell(const Worker &w, Cell &c, bool whole, const char *p, size_t n,
                        Access access) {
    bool shared = !on_device(p);
    uint64_t self = (uint64_t)w.serial << 32 | (w.warps[w.current / 32].clock & 0xfffff) << 12 |
        w.current << 2;
    uint64_t writer = __atomic_load_n(&c.writer, __ATOMIC_RELAXED);
    uint64_t reader = __atomic_load_n(&c.reader, __ATOMIC_RELAXED);
    bool unset = shared ? is_old(w, writer, true) : !writer;
    if (unset && access != WRITE)
        report(nullptr, "reads %zu bytes that nothing has written yet, %s", n, place(p, n));
    if (!whole) {
        if (unset) __atomic_store_n(&c.writer, self, __ATOMIC_RELAXED);
        return;
    }
    if (!(access == ATOMIC && (writer & 3) == BY_ATOMIC) && concurrent(w, writer & ~3ull, shared))
        report_race(w, p, n, access, writer & ~3ull, "wrote");
    if (access == READ) {
        if (concurrent(w, reader, shared)) {
            int flag = reader >> 32 != w.serial ? BLOCKS :
                thread_of(reader) / 32 != w.current / 32 ? WARPS : LANES;
            self |= std::max(flag, (int)(reader & 3));
        }
        __atomic_store_n(&c.reader, self, __ATOMIC_RELAXED);
    } else {
        if (concurrent(w, reader, shared)) report_race(w, p, n, access, reader, "read");
        __atomic_store_n(&c.writer, self | (access == ATOMIC ? BY_ATOMIC : 0), __ATOMIC_RELAXED);
    }
}

RUNTIME void check(const char *p, size_t n, Access access, bool aligned, const void *pc) {
    Worker *w = worker;
    if (!w || !w->kernel)
        report("host code", "touches %zu bytes of device memory, %s", n, place(p, n));
    const char *verb = access == READ ? "reads" : "writes";
    w->pc = pc;
    if (!find_range(p, n)) report(nullptr, "out of bounds: %s %zu bytes, %s", verb, n, place(p, n));
    if (aligned && (uintptr_t)p % n)
        report(nullptr, "misaligned: %s %zu bytes, %s", verb, n, place(p, n));
    for (const char *q = p - (p - arena) % 2; q < p + n; q += 2)
        check_cell(*w, *cell(q), q >= p && q + 2 <= p + n, p, n, access);
    w->pc = nullptr;
}

// Atomic functions. Those of different blocks run on different cores, so they must be real ones.
template <class T, class F> RUNTIME T atomic_update(T *p, F f) {
    if (shadow && in_arena(p))
        check((char *)p, sizeof(T), ATOMIC, true, __builtin_return_address(0));
    T old, next;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do next = f(old);
    while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

}  // namespace on_cpu

template <class T> RUNTIME T atomicAdd(T *p, std::common_type_t<T> v) {
    return on_cpu::atomic_update(p, [=](T old) { return old + v; });
}
template <class T> RUNTIME T atomicMax(T *p, std::common_type_t<T> v) {
    return on_cpu::atomic_update(p, [=](T old) { return old > v ? old : v; });
}

#if CUDA_ON_CPU_CHECKED
#define HOOK extern "C" __attribute__((used)) RUNTIME
#define HOOK_SIZE(name, n, access) HOOK void name(void *p) \
    { if (on_cpu::in_arena(p)) on_cpu::check((char *)p, n, on_cpu::access, true, \
                                             __builtin_return_address(0)); }
#define HOOKS_OF_SIZE(n) HOOK_SIZE(__tsan_read##n, n, READ) HOOK_SIZE(__tsan_write##n, n, WRITE)
HOOKS_OF_SIZE(1) HOOKS_OF_SIZE(2) HOOKS_OF_SIZE(4) HOOKS_OF_SIZE(8) HOOKS_OF_SIZE(16)

#define HOOK_RANGE(name, access) HOOK void name(void *p, long n) \
    { if (n && on_cpu::in_arena(p)) on_cpu::check((char *)p, n, on_cpu::access, false, \
                                                  __builtin_return_address(0)); }
HOOK_RANGE(__tsan_read_range, READ) HOOK_RANGE(__tsan_write_range, WRITE)

// Atomic operations of C++ itself, such as behind a static variable. 5 is __ATOMIC_SEQ_CST.
#define HOOKS_OF_ATOMIC(bits, T) \
    HOOK T __tsan_atomic##bits##_load(const volatile T *p, int) { return __atomic_load_n(p, 5); } \
    HOOK void __tsan_atomic##bits##_store(volatile T *p, T v, int) { __atomic_store_n(p, v, 5); } \
    HOOK T __tsan_atomic##bits##_exchange(volatile T *p, T v, int) \
    { return __atomic_exchange_n(p, v, 5); } \
    HOOK T __tsan_atomic##bits##_fetch_add(volatile T *p, T v, int) \
    { return __atomic_fetch_add(p, v, 5); } \
    HOOK T __tsan_atomic##bits##_fetch_sub(volatile T *p, T v, int) \
    { return __atomic_fetch_sub(p, v, 5); } \
    HOOK bool __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *o, T v, int, int) \
    { return __atomic_compare_exchange_n(p, o, v, 0, 5, 5); } \
    HOOK bool __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *o, T v, int, int) \
    { return __atomic_compare_exchange_n(p, o, v, 0, 5, 5); }
HOOKS_OF_ATOMIC(8, unsigned char) HOOKS_OF_ATOMIC(16, unsigned short)
HOOKS_OF_ATOMIC(32, unsigned) HOOKS_OF_ATOMIC(64, unsigned long)

HOOK void __tsan_atomic_thread_fence(int) {}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void *) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void *, void *) {}
#endif

#endif
