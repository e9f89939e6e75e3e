# make run    trains a small network without and with GPAS and shows what GPAS did (2 to 3 minutes)
# make test   checks everything; the last line says how many checks passed and failed
# make help   lists the rest

CC = gcc
CFLAGS = -O3 -march=native
# Always: contract a * b + c to one instruction; sqrtf may be vectorized, for nobody reads errno.
FLAGS = -std=c11 -Wall -Wextra -Wpedantic -fopenmp -ffp-contract=fast -fno-math-errno $(CFLAGS)
PYTHON = python3

train_gpas: train_gpas.c dev/plumbing.h
	$(CC) $(FLAGS) $< -o $@ -lm

data/toy/tokenizer.bin:
	$(PYTHON) prepro_tinystories.py --out data/toy

run: train_gpas data/toy/tokenizer.bin
	./train_gpas --norm pre --gpas off --out out/pre
	./train_gpas --norm pre --gpas on --out out/pre_gpas
	@$(PYTHON) dev/compare.py out/pre out/pre_gpas

test_gpas: test_gpas.c train_gpas.c dev/plumbing.h
	$(CC) $(FLAGS) $< -o $@ -lm

test_gpas_double: test_gpas.c train_gpas.c dev/plumbing.h
	$(CC) $(FLAGS) -DDOUBLE $< -o $@ -lm

test: train_gpas test_gpas test_gpas_double
	@sh dev/run_tests.sh ./test_gpas ./test_gpas_double "$(PYTHON) dev/test_prepro.py" \
	    "$(PYTHON) dev/reference.py --check"

# The same programs, slower, stopping at the first wrong access or undefined operation.
sanitize:
	$(MAKE) clean
	$(MAKE) test CFLAGS="-O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all"
	$(MAKE) clean

# Nothing is linked: OpenBLAS, the yardstick, is looked for when the program runs.
bench: dev/bench.c train_gpas.c dev/plumbing.h
	$(CC) $(FLAGS) $< -o dev/bench -lm -ldl
	dev/bench

reference:
	$(PYTHON) dev/reference.py

clean:
	rm -f train_gpas test_gpas test_gpas_double dev/bench

help:
	@echo "make              builds train_gpas; then: ./train_gpas --help"
	@echo "make run          trains without and with GPAS and compares"
	@echo "make test         all checks; needs gcc, make, python3"
	@echo "make sanitize     the same checks under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench        times a training step beside the machine's matrix rate"
	@echo "make reference    computes dev/reference.safetensors again, byte for byte the same"
	@echo "make clean        removes the programs; data/ and out/ stay"
	@echo "make CC=clang     another compiler (make clean first)"

.PHONY: run test sanitize bench reference clean help
