# make run    trains a small network without and with GPAS and shows what GPAS did (1 to 3 minutes)
# make test   checks everything; the last line says how many checks passed and failed
# make help   lists the rest

CC = gcc
CFLAGS = -O3 -march=native
# a * b + c may be one instruction. No code reads errno or catches floating-point traps, so sqrtf may
# be vectorized, and both sides of a ?: may be computed.
FLAGS = -std=c11 -Wall -Wextra -Wpedantic -fopenmp -ffp-contract=fast -fno-math-errno \
    -fno-trapping-math $(if $(PLAIN),-DPLAIN) $(CFLAGS)
PYTHON = python3
# $(call q,X) quotes X for the shell.
q = '$(subst ','\'',$1)'
SOURCES = train_gpas.c $(wildcard dev/*.h)

# PLAIN=1 uses the ten-line matrix multiplication of train_gpas.c instead of that of dev/gemm.h.
train_gpas: $(SOURCES) build/flags
	$(CC) $(FLAGS) $< -o $@ -lm

# This file changes when the compiler or its flags do, and then what depends on it is built again.
build/flags: FORCE
	@mkdir -p $(@D)
	@echo $(call q,$(CC) $(FLAGS)) | cmp -s - $@ || echo $(call q,$(CC) $(FLAGS)) > $@
FORCE:

# If a command fails, make deletes the file that it was to make.
.DELETE_ON_ERROR:

data/toy/tokenizer.bin:
	$(PYTHON) prepro_tinystories.py --out data/toy

# The pair that `make run` trains: the same network without and with GPAS. Without PRESET it takes
# minutes and starts anew. With PRESET it continues where it was interrupted, hours or days later:
# make run PRESET=71m DATA=data/tinystories PROGRAM=./train_gpas_cuda OPTIONS="--batch 64"
PRESET =
DATA = data/toy
PROGRAM = ./train_gpas
OPTIONS =
PAIR = out$(PRESET:%=/%)
LAST = $$(printf 'ckpt_%06d.safetensors' $$(sed -n 's/^steps //p' $(PAIR)/$1/options.txt))
EVERY = $(if $(findstring --save-every,$(OPTIONS)),,--save-every 500)
start = $(PROGRAM) --norm pre --gpas $2 --data $(call q,$(DATA)) --out $(PAIR)/$1 --overwrite on \
    $(if $(PRESET),--preset $(PRESET) $(EVERY)) $(OPTIONS)
resume = $(PROGRAM) --resume $(PAIR)/$1 --data $(call q,$(DATA)) $(OPTIONS)
train = $(if $(PRESET),@set -e; if ! ls $(PAIR)/$1/ckpt_*.safetensors > /dev/null 2>&1; \
    then set -x; $(start); elif test -e $(PAIR)/$1/$(LAST); then echo $(PAIR)/$1 is complete; \
    else set -x; $(resume); fi,$(start))
run: $(PROGRAM) $(filter data/toy/tokenizer.bin,$(DATA)/tokenizer.bin)
	$(call train,pre,off)
	$(call train,pre_gpas,on)
	@$(PYTHON) dev/tools/compare.py $(PAIR)/pre $(PAIR)/pre_gpas
	@$(PYTHON) dev/tools/report.py $(PAIR)/pre $(PAIR)/pre_gpas --out $(PAIR)/report.html

# Any runs of your own in one HTML file: make report RUNS="out/a out/b".
RUNS = out/pre out/pre_gpas
report:
	@$(PYTHON) dev/tools/report.py $(RUNS)

# The figures of docs/figures.md. Needs matplotlib. If interrupted, it continues where it was.
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

# The kernels' tests on the CPU need Linux. They check memory themselves, so `make sanitize` omits them.
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
	    $(if $(filter none,$(KERNELS)),,"$(PYTHON) dev/test/test_docs.py") $(CUDA_ON_CPU_TESTS)

# ---- The GPU: building needs the CUDA Toolkit, running a GPU of compute capability 8.0 or higher.

# -ftz=true flushes numbers below 1e-38 to 0, which makes exp2f() one instruction instead of four.
NVCC = nvcc
NVCC_FLAGS = -std=c++17 -O3 -ftz=true -gencode arch=compute_80,code=sm_80 \
    -gencode arch=compute_90,code=[sm_90,compute_90] -Xcompiler -Wall,-Wextra,-fopenmp,-march=native
CUBLASLT = -lcublasLt
CUDA_SOURCES = train_gpas.cu $(wildcard dev/gpu/*.h dev/*.h)

train_gpas_cuda: $(CUDA_SOURCES)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(CUBLASLT)

# train_gpas.c as a library: the kernels' tests load it and compare with it.
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

# ---- The same source without GPU and Toolkit, through dev/gpu/cuda_on_cpu.h. C++ cannot parse three
# pieces of CUDA's syntax, launches and the two kinds of shared memory, so sed rewrites them as calls.
# It runs every time, because a student's file that is copied here may be older than the last output.

CXX = g++
CXXFLAGS = -O2 -march=native
ON_CPU = $(CXX) -std=c++17 -g -Wall -Wextra -fno-strict-aliasing -fopenmp -U_FORTIFY_SOURCE \
    -DCUDA_ON_CPU -I. -Idev/gpu $(CXXFLAGS) -x c++
# In the checked build the compiler calls the header before each memory access. It is compiled with
# -fsanitize=thread but linked without it. No optimization may split or join accesses.
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

# LAYERS="gpas attention" are left to write, by default (or LAYERS=all) all ten. CUDA=1 adds
# train_gpas.cu.
# VARIANT=1 uses other formulas, so that the public solution does not fit.
OUT = assignment
CUDA =
VARIANT =
CLASS_FLAGS = $(if $(CUDA),--cuda) $(if $(VARIANT),--variant)
assignment:
	@$(PYTHON) dev/class/assignment.py $(CLASS_FLAGS) --out=$(call q,$(OUT)) $(LAYERS)

# A folder of submissions, with the LAYERS, CUDA and VARIANT of their hand-out. There is no default
# for LAYERS; LAYERS=all grades all ten.
SUBMISSIONS = submissions
GRADES = grades
grades:
	@$(PYTHON) dev/class/grades.py --submissions=$(call q,$(SUBMISSIONS)) $(CLASS_FLAGS) \
	    --out=$(call q,$(GRADES)) --cc=$(call q,$(CC)) --cxx=$(call q,$(CXX)) \
	    $(if $(SEED),--seed=$(call q,$(SEED))) $(LAYERS)

ZIP = autograder.zip
gradescope:
	@$(PYTHON) dev/class/gradescope.py $(CLASS_FLAGS) --out=$(call q,$(ZIP)) $(LAYERS)

# Used in the hand-out; here it grades the solution. JSON=1 prints for a gradebook.
grade: $(ON_CPU_SOURCES)
	@$(PYTHON) dev/class/grade.py --cc $(call q,$(CC)) --cxx $(call q,$(CXX)) \
	    $(if $(ON_CPU),--on-cpu $(call q,$(ON_CPU) $(filter-out -DTRAIN%,$(CHECKED)))) \
	    $(if $(JSON),--json) $(if $(SEED),--seed=$(call q,$(SEED))) $(if $(VARIANT),--variant=1) \
	    $(ASSIGNED)

# ----

# The tests of the C programs, slower, stopping at the first wrong access or undefined operation.
sanitize:
	$(MAKE) clean
	$(MAKE) test KERNELS=none CFLAGS="-O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all"
	$(MAKE) clean

# Feeds damaged files and strange options to the four readers: dev/test/fuzz/fuzz.c. Needs clang.
# SECONDS=60 gives each a minute instead of ten.
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

# Trains for an hour, is killed now and then, and resumes. SECONDS=600: for ten minutes.
soak: SECONDS = 3600
soak: train_gpas data/toy/tokenizer.bin
	$(PYTHON) dev/test/soak.py --seconds $(call q,$(SECONDS))

# No BLAS is linked. The program looks for OpenBLAS and MKL, its yardsticks, when it runs.
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
	@echo "                  PRESET=71m DATA=folder PROGRAM=./train_gpas_cuda: at any size; continues"
	@echo "make report       compares runs of your own in out/report.html: RUNS=\"out/a out/b\""
	@echo "make figures      trains dev/tools/experiments.tsv and draws docs/figures; needs matplotlib"
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
	@echo "make fuzz         feeds damaged files and options to the readers, 40 minutes; needs clang"
	@echo "make soak         trains for an hour, is killed now and then, and must end with the same bits"
	@echo "make bench        times a training step against the machine's matrix rate"
	@echo "make reference    computes dev/test/reference.safetensors again, with the same bytes"
	@echo "make clean        removes the programs; data/ and out/ stay"
	@echo "make CC=clang     another compiler"
	@echo "make PLAIN=1      train_gpas with the plain matrix multiplication in train_gpas.c itself"

# An empty value most likely comes from an unset variable of the shell.
NEVER_EMPTY = CC CXX NVCC PYTHON PRESET DATA PROGRAM OUT LAYERS RUNS SEED SECONDS SUBMISSIONS GRADES ZIP
$(foreach v,$(NEVER_EMPTY),$(if $(filter command environment,$(origin $v)),$(if $(strip $($v)),, \
    $(error $v is given, but empty))))

# `make -j clean test` runs its targets one after the other.
$(if $(filter clean,$(MAKECMDGOALS)),$(eval .NOTPARALLEL:))

.PHONY: FORCE run report figures test assignment grade grades gradescope sanitize fuzz soak bench
.PHONY: reference clean help
.PHONY: test-cuda bench-cuda test-cuda-on-cpu
