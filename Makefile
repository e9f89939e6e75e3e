# make run    trains a small network without and with GPAS and shows what GPAS did (1 to 3 minutes)
# make test   checks everything; the last line says how many checks passed and failed
# make help   lists the rest

CC = gcc
CFLAGS = -O3 -march=native
# Always: a * b + c may be one instruction. Nobody reads errno or catches floating-point traps: so
# sqrtf may be vectorized, and both sides of a ?: computed.
FLAGS = -std=c11 -Wall -Wextra -Wpedantic -fopenmp -ffp-contract=fast -fno-math-errno \
    -fno-trapping-math $(if $(PLAIN),-DPLAIN) $(CFLAGS)
PYTHON = python3
# $(call q,X): X as one word of the shell, whatever is in it.
q = '$(subst ','\'',$1)'
SOURCES = train_gpas.c $(wildcard dev/*.h)

# PLAIN=1: with train_gpas.c's own matrix multiplication, ten lines, instead of dev/gemm.h's.
train_gpas: $(SOURCES) build/flags
	$(CC) $(FLAGS) $< -o $@ -lm

# When the compiler or its flags change, this file does, and what depends on it is built again.
build/flags: FORCE
	@mkdir -p $(@D)
	@echo $(call q,$(CC) $(FLAGS)) | cmp -s - $@ || echo $(call q,$(CC) $(FLAGS)) > $@
FORCE:

# What a command that fails has written is no result.
.DELETE_ON_ERROR:

data/toy/tokenizer.bin:
	$(PYTHON) prepro_tinystories.py --out data/toy

run: train_gpas data/toy/tokenizer.bin
	./train_gpas --norm pre --gpas off --out out/pre --overwrite on
	./train_gpas --norm pre --gpas on --out out/pre_gpas --overwrite on
	@$(PYTHON) dev/tools/compare.py out/pre out/pre_gpas
	@$(PYTHON) dev/tools/report.py out/pre out/pre_gpas

# Any runs of your own in one HTML file: make report RUNS="out/a out/b".
RUNS = out/pre out/pre_gpas
report:
	@$(PYTHON) dev/tools/report.py $(RUNS)

# What GPAS does, in pictures: docs/figures.md. Needs matplotlib. If interrupted, it continues.
figures: train_gpas data/toy/tokenizer.bin
	$(PYTHON) dev/tools/figures.py

TEST_SOURCES = $(SOURCES) $(wildcard dev/test/*.h) build/flags
test_gpas: test_gpas.c $(TEST_SOURCES)
	$(CC) $(FLAGS) $< -o $@ -lm

test_gpas_double: test_gpas.c $(TEST_SOURCES)
	$(CC) $(FLAGS) -DDOUBLE $< -o $@ -lm

build/test_gpas_plain: test_gpas.c $(TEST_SOURCES)
	$(CC) $(FLAGS) -DPLAIN $< -o $@ -lm

build/train_gpas_plain: $(SOURCES) build/flags
	$(CC) $(FLAGS) -DPLAIN $< -o $@ -lm

build/test_headers: dev/test/test_headers.c $(TEST_SOURCES)
	$(CC) $(FLAGS) $< -o $@ -lm

# The kernels' tests on the CPU need Linux, and have a checker of their own.
KERNELS = $(shell uname)
ifeq ($(KERNELS),Linux)
CUDA_ON_CPU = train_gpas_cuda_on_cpu build/test_cuda_on_cpu build/test_cuda_on_cpu_unchecked \
    build/test_fp32 build/test_bf16
CUDA_ON_CPU_TESTS = ./build/test_cuda_on_cpu ./build/test_cuda_on_cpu_unchecked \
    ./build/test_fp32 ./build/test_bf16 \
    "$(PYTHON) dev/test/test_program.py ./train_gpas_cuda_on_cpu fp32" \
    "$(PYTHON) dev/test/test_program.py ./train_gpas_cuda_on_cpu bf16" \
    "$(PYTHON) dev/test/test_export.py ./train_gpas_cuda_on_cpu"
endif

C_PROGRAMS = train_gpas test_gpas test_gpas_double build/test_gpas_plain build/train_gpas_plain \
    build/test_headers
C_TESTS = ./test_gpas ./test_gpas_double build/test_gpas_plain build/test_headers \
    "$(PYTHON) dev/test/test_program.py" \
    "$(PYTHON) dev/test/test_plain.py ./train_gpas build/train_gpas_plain"
test: $(C_PROGRAMS) $(CUDA_ON_CPU)
	@sh dev/test/run_tests.sh $(C_TESTS) "$(PYTHON) dev/test/test_prepro.py" \
	    "$(PYTHON) dev/test/test_export.py" "$(PYTHON) dev/test/reference.py --check" \
	    "$(PYTHON) dev/test/test_assignment.py" "$(PYTHON) dev/test/test_figures.py" \
	    "$(PYTHON) dev/test/test_mutations.py" "$(PYTHON) dev/test/soak.py --kills 20" \
	    $(CUDA_ON_CPU_TESTS)

# ---- The GPU: needs the CUDA Toolkit, and to run it a GPU of compute capability 8.0 or newer.

# -ftz=true: numbers below 1e-38 become 0. exp2f() is then one instruction instead of four.
NVCC = nvcc
NVCC_FLAGS = -std=c++17 -O3 -ftz=true -gencode arch=compute_80,code=sm_80 \
    -gencode arch=compute_90,code=[sm_90,compute_90] -Xcompiler -Wall,-Wextra,-fopenmp,-march=native
CUBLASLT = -lcublasLt
CUDA_SOURCES = train_gpas.cu $(wildcard dev/gpu/*.h dev/*.h)

train_gpas_cuda: $(CUDA_SOURCES)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(CUBLASLT)

# The kernels' tests load train_gpas.c from here, to compare with it.
build/cpu.so: dev/test/cpu.c $(TEST_SOURCES)
	$(CC) $(FLAGS) -shared -fPIC $< -o $@ -lm

KERNEL_TESTS = test_gpas.c build/cpu.so $(wildcard dev/test/*.h)
ON_GPU = -DTRAIN_GPAS_CU='"train_gpas.cu"' -x cu
test_gpas_cuda_fp32: $(KERNEL_TESTS) $(CUDA_SOURCES)
	$(NVCC) $(NVCC_FLAGS) -DCUDA_REAL=float $(ON_GPU) $< -o $@ $(CUBLASLT)

test_gpas_cuda_bf16: $(KERNEL_TESTS) $(CUDA_SOURCES)
	$(NVCC) $(NVCC_FLAGS) -DCUDA_REAL=bf16 $(ON_GPU) $< -o $@ $(CUBLASLT)

bench_cuda: dev/gpu/bench.cu $(CUDA_SOURCES)
	$(NVCC) $(NVCC_FLAGS) -I. $< -o $@ $(CUBLASLT)

test-cuda: train_gpas train_gpas_cuda test_gpas_cuda_fp32 test_gpas_cuda_bf16
	@sh dev/test/run_tests.sh ./test_gpas_cuda_fp32 ./test_gpas_cuda_bf16 \
	    "$(PYTHON) dev/test/test_program.py ./train_gpas_cuda fp32" \
	    "$(PYTHON) dev/test/test_program.py ./train_gpas_cuda bf16" \
	    "$(PYTHON) dev/test/test_export.py ./train_gpas_cuda"

bench-cuda: bench_cuda
	./bench_cuda

# ---- The same source without GPU and Toolkit, by dev/gpu/cuda_on_cpu.h. C++ lacks three pieces of
# CUDA's syntax: launches and the two kinds of shared memory. sed writes them as calls, each time: a
# submission that is copied to its place may be older than what was made of the one before.

CXX = g++
CXXFLAGS = -O2 -march=native
ON_CPU = $(CXX) -std=c++17 -g -Wall -Wextra -fno-strict-aliasing -fopenmp -U_FORTIFY_SOURCE \
    -DCUDA_ON_CPU -I. -Idev/gpu $(CXXFLAGS) -x c++
# Checked: the compiler calls the header before each access to memory. Compiled with
# -fsanitize=thread, linked without it. No optimization that splits or joins accesses.
CHECKED = -O1 -fno-tree-sra -fno-ipa-sra -fsanitize=thread -DTRAIN_GPAS_CU='"build/train_gpas.cu"'
ON_CPU_SOURCES = build/train_gpas.cu $(patsubst %,build/dev/gpu/%.h,device cublaslt layout tiles) \
    dev/gpu/cuda_on_cpu.h $(wildcard dev/*.h)

define as_cpp
	@mkdir -p $(@D)
	@(echo '#line 1 "$<"'; sed -E \
	    -e 's/(\w+(<[^<>]*>)?)<<<(.*)>>>\(/launch("\1", \1, \3)(/' \
	    -e 's/extern __shared__ (.*) (\w+)\[\];/auto *\2 = dynamic_shared<\1>();/' \
	    -e 's/__shared__ (.*) (\w+)((\[[^]]*\])*);/auto \&\2 = shared_array<\1 \3>("\2", []{});/' \
	    $<) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
endef
build/%.cu: %.cu FORCE ; $(as_cpp)
build/%.h: %.h FORCE ; $(as_cpp)

train_gpas_cuda_on_cpu: $(ON_CPU_SOURCES)
	$(ON_CPU) $< -o $@

build/test_fp32: $(KERNEL_TESTS) $(ON_CPU_SOURCES)
	$(ON_CPU) $(CHECKED) -DCUDA_REAL=float -c $< -o $@.o && $(CXX) -fopenmp $@.o -o $@ -ldl

build/test_bf16: $(KERNEL_TESTS) $(ON_CPU_SOURCES)
	$(ON_CPU) $(CHECKED) -DCUDA_REAL=bf16 -c $< -o $@.o && $(CXX) -fopenmp $@.o -o $@ -ldl

build/test_cuda_on_cpu: build/dev/gpu/test_cuda_on_cpu.cu dev/gpu/cuda_on_cpu.h
	$(ON_CPU) $(CHECKED) -c $< -o $@.o && $(CXX) -fopenmp $@.o -o $@

build/test_cuda_on_cpu_unchecked: build/dev/gpu/test_cuda_on_cpu.cu dev/gpu/cuda_on_cpu.h
	$(ON_CPU) $< -o $@

test-cuda-on-cpu: train_gpas $(CUDA_ON_CPU)
	@sh dev/test/run_tests.sh $(CUDA_ON_CPU_TESTS)

# ---- The classroom: docs/syllabus.md.

# LAYERS="gpas attention": what is left to write, all by default. CUDA=1: train_gpas.cu too.
# VARIANT=1: with other formulas, so that the public solution does not fit.
OUT = assignment
CUDA =
VARIANT =
CLASS_FLAGS = $(if $(CUDA),--cuda) $(if $(VARIANT),--variant)
assignment:
	@$(PYTHON) dev/class/assignment.py $(CLASS_FLAGS) --out=$(call q,$(OUT)) $(LAYERS)

# A folder of submissions, with the LAYERS, CUDA and VARIANT of their hand-out.
SUBMISSIONS = submissions
GRADES = grades
grades:
	@$(PYTHON) dev/class/grades.py --submissions=$(call q,$(SUBMISSIONS)) $(CLASS_FLAGS) \
	    --out=$(call q,$(GRADES)) --cc=$(call q,$(CC)) --cxx=$(call q,$(CXX)) \
	    $(if $(SEED),--seed=$(call q,$(SEED))) $(LAYERS)

ZIP = autograder.zip
gradescope:
	@$(PYTHON) dev/class/gradescope.py $(CLASS_FLAGS) --out=$(call q,$(ZIP)) $(LAYERS)

# In the hand-out; here it grades the solution. JSON=1: for a gradebook.
grade: $(ON_CPU_SOURCES)
	@$(PYTHON) dev/class/grade.py --cc $(call q,$(CC)) --cxx $(call q,$(CXX)) \
	    $(if $(ON_CPU),--on-cpu $(call q,$(ON_CPU) $(filter-out -DTRAIN%,$(CHECKED)))) \
	    $(if $(JSON),--json) $(if $(SEED),--seed=$(call q,$(SEED))) $(if $(VARIANT),--variant=1) \
	    $(ASSIGNED)

# ----

# The C programs, slower, stopping at the first wrong access or undefined operation.
sanitize:
	$(MAKE) clean
	$(MAKE) test KERNELS=none CFLAGS="-O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all"
	$(MAKE) clean

# The readers against files and options that nobody would write: dev/test/fuzz/fuzz.c. Needs clang.
# SECONDS=60: a minute for each instead of ten.
FUZZED = checkpoint tokens tokenizer options
build/fuzz_%: dev/test/fuzz/fuzz.c $(SOURCES)
	@mkdir -p build/corpus_$*
	clang -std=c11 -Wall -Wextra -Wpedantic -Wno-pass-failed -fopenmp -fno-math-errno -g -O2 \
	    -march=native -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	    -DFUZZ_$* $< -o $@ -lm

fuzz: SECONDS = 600
fuzz: $(FUZZED:%=build/fuzz_%)
	for name in $(FUZZED); do ASAN_OPTIONS=detect_leaks=0 build/fuzz_$$name -close_fd_mask=3 \
	    -rss_limit_mb=1024 -timeout=10 -use_value_profile=1 -max_total_time=$(SECONDS) \
	    build/corpus_$$name dev/test/fuzz/$$name || exit 1; done

# Trains for an hour, is killed now and then, goes on. SECONDS=600: for ten minutes.
soak: SECONDS = 3600
soak: train_gpas data/toy/tokenizer.bin
	$(PYTHON) dev/test/soak.py --seconds $(call q,$(SECONDS))

# No BLAS is linked: the program looks for OpenBLAS and MKL, its yardsticks, when it runs.
dev/tools/bench: dev/tools/bench.c $(SOURCES) build/flags
	$(CC) $(FLAGS) $< -o $@ -lm -ldl

bench: dev/tools/bench
	dev/tools/bench

reference:
	$(PYTHON) dev/test/reference.py

clean:
	rm -rf build
	rm -f train_gpas test_gpas test_gpas_double train_gpas_cuda_on_cpu
	rm -f train_gpas_cuda test_gpas_cuda_fp32 test_gpas_cuda_bf16 bench_cuda dev/tools/bench

help:
	@echo "make              builds train_gpas; then: ./train_gpas --help"
	@echo "make run          trains without and with GPAS, to out/pre and out/pre_gpas, and compares"
	@echo "make report       draws runs of your own in out/report.html; RUNS=\"out/a out/b\""
	@echo "make figures      runs dev/tools/experiments.tsv and draws docs/figures; needs matplotlib"
	@echo "make test         all checks, kernels on the CPU included; needs gcc, g++, make, python3"
	@echo "make train_gpas_cuda    the same training on a GPU; needs the CUDA Toolkit"
	@echo "make test-cuda          its checks on a GPU"
	@echo "make bench-cuda         its speed on a GPU"
	@echo "make train_gpas_cuda_on_cpu    the GPU's program on the CPU, slowly"
	@echo "make test-cuda-on-cpu   the kernels' checks on the CPU, with every memory access checked"
	@echo "make assignment   a hand-out, layers left to write: LAYERS=\"gpas rope\" CUDA=1 OUT=folder"
	@echo "make grade        grades the layers, in a hand-out or here; JSON=1 for a gradebook"
	@echo "make grades       grades a folder of submissions: SUBMISSIONS=folder LAYERS=\"gpas rope\""
	@echo "make gradescope   writes autograder.zip, for Gradescope; LAYERS=\"gpas rope\""
	@echo "make sanitize     the C programs' checks under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz         looks for input that the readers cannot stand, 40 minutes; needs clang"
	@echo "make soak         trains for an hour, is killed now and then, and must end the same"
	@echo "make bench        times a training step beside the machine's matrix rate"
	@echo "make reference    computes dev/test/reference.safetensors again, byte for byte the same"
	@echo "make clean        removes the programs; data/ and out/ stay"
	@echo "make CC=clang     another compiler"
	@echo "make PLAIN=1      train_gpas with the plain matrix multiplication in train_gpas.c itself"

# An empty value is most likely an unset variable of the shell.
$(foreach v,CC CXX NVCC PYTHON OUT LAYERS RUNS SEED SECONDS SUBMISSIONS GRADES ZIP,$(if \
    $(filter command environment,$(origin $v)),$(if $(strip $($v)),,$(error $v is given, but empty))))

# make -j clean test: one after the other.
$(if $(filter clean,$(MAKECMDGOALS)),$(eval .NOTPARALLEL:))

.PHONY: FORCE run report figures test assignment grade grades gradescope sanitize fuzz soak bench
.PHONY: reference clean help
.PHONY: test-cuda bench-cuda test-cuda-on-cpu
