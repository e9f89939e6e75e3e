#!/bin/sh
# Builds, tests and measures what needs a GPU, in one run that should take less than eight minutes:
#
#     sh dev/gpu/gpu.sh [--peer FILE] [--llmc FOLDER] [PART ...]
#
#     build      everything, and how long that takes
#     test       make test-cuda: all checks in fp32 and bf16
#     train      300 steps of the toy preset: compares the losses with the CPU's, and the bits of
#                two runs
#     kernels    the time of each kernel beside its floor (roofline.py); for each matrix product
#                the time of the kernel that cuBLASLt ranks first, and of the fastest of eight
#     speed256   tokens/s and memory of the presets with sequences of 256, beside the peer's
#     speed1024  the same with 1024; then 1b with --recompute on and four times the batch
#     sanitize   the tests under compute-sanitizer: memcheck, racecheck and initcheck at once
#
# Without a PART it runs all of them, in this order. FILE is a PyTorch program that takes the
# options --config --B --T --device cuda --dtype bf16 --compile, and prints a line of JSON with
# tokens_per_s and peak_GiB. Each of its runs comes right after ours. It compiles for about a minute
# each time, so with --peer run speed256 and speed1024 in two calls. FOLDER holds llm.c's source:
# its GPT-2 of 124M is built and timed after speed1024.
#
# The logs go to out/gpu. The last lines are the summary. The exit status is 0 if nothing failed.
set -u
PATH=$PATH:/usr/local/cuda/bin
out=out/gpu
peer=
llmc=
summary=$out/summary.txt
times=$out/times.txt

fail() { echo "gpu.sh: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --peer) [ -f "${2-}" ] || fail "--peer needs a file"; peer=$2; shift 2 ;;
        --llmc) [ -d "${2-}" ] || fail "--llmc needs a folder"; llmc=$2; shift 2 ;;
        *) break ;;
    esac
done
for part in "$@"; do
    case $part in
        build|test|train|kernels|speed256|speed1024|sanitize) ;;
        *) fail "no part is called '$part'; the first lines of dev/gpu/gpu.sh name them" ;;
    esac
done
[ ! -e $out ] || [ -f $summary ] || fail "$out exists but was not written by gpu.sh; rename it"
mkdir -p $out || exit 1
: > $summary
: > $times
if [ $# -eq 0 ]; then
    rm -f $out/speed.log $out/peer.err  # all other logs are overwritten
    set -- build test train kernels speed256 speed1024 sanitize
fi

note() { echo "$*" | tee -a $summary; }

verdict() { # NAME STATUS LOG: adds a line to the summary, with the last line of the log
    word=FAIL
    [ "$2" -eq 0 ] && word="ok  "
    note "$word $1: $(tail -n 1 "$3")"
}

losses_within() { # FILE FILE: compares the training losses of two log.csv
    python3 - "$1" "$2" << 'END'
import csv, sys
a, b = ([float(r["train_loss"]) for r in csv.DictReader(open(f)) if r["train_loss"]]
        for f in sys.argv[1:])
worst = max(abs(x / y - 1) for x, y in zip(a, b))
print("%d steps, largest relative difference %.2e" % (len(a), worst))
sys.exit(len(a) != len(b) or not worst <= 1e-3)
END
}

# Prints the flags that link with cuBLASLt. If it is installed as a Python package only, its file
# does not have the name that -lcublasLt looks for.
cublaslt() {
    printf '#include <cublasLt.h>\nint main() { cublasLtHandle_t h; return cublasLtCreate(&h); }' \
        > $out/probe.cu
    package=
    nvcc $out/probe.cu -o $out/probe -lcublasLt > $out/probe.log 2>&1 || package=$(python3 -c '
import glob, nvidia
for folder in nvidia.__path__:
    for file in glob.glob(folder + "/*/lib/libcublasLt.so.*"):
        lib = file.rsplit("/", 1)[0]
        print("-I" + lib[:-3] + "include -Xlinker", file, "-Xlinker -rpath -Xlinker", lib)' \
        2> /dev/null | head -n 1)
    echo "${package:--lcublasLt}"
}

part_build() {
    make -s -j 8 CUBLASLT="$(cublaslt)" train_gpas train_gpas_cuda test_gpas_cuda_fp32 \
        test_gpas_cuda_bf16 bench_cuda data/toy/tokenizer.bin > $out/build.log 2>&1
    status=$?
    grep -q warning $out/build.log || [ $status -ne 0 ] || echo "no warning" >> $out/build.log
    verdict build $status $out/build.log
    [ $status -eq 0 ] || { tail -n 20 $out/build.log; exit 1; }
}

part_test() {
    timeout 200 make -s test-cuda > $out/test.log 2>&1
    status=$?
    grep "passed, " $out/test.log | tail -n 1 > $out/test.line
    [ -s $out/test.line ] || tail -n 1 $out/test.log > $out/test.line
    [ $status -eq 124 ] && echo "not finished after 200 s" >> $out/test.line
    verdict "make test-cuda" $status $out/test.line
}

# cuBLASLt's kernels use Hopper's bulk copies and barriers. Before version 2026.1 two of the tools
# do not fully understand these: racecheck may report races inside such a kernel, and initcheck
# uninitialized reads of what it wrote.
sanitize() { # TOOL TYPE
    log=$out/$1.$2.log
    timeout 200 compute-sanitizer --tool "$1" --error-exitcode 1 "./test_gpas_cuda_$2" \
        > "$log" 2>&1
    status=$?
    [ $status -eq 124 ] && echo "not finished after 200 s" >> "$log"
    verdict "compute-sanitizer $1, $2" $status "$log"
    [ $status -eq 0 ] || note "     lines that name a kernel of ours: $(grep -c '_kernel' "$log")"
}

part_sanitize() {
    if ! command -v compute-sanitizer > /dev/null; then
        note "FAIL compute-sanitizer: it is not installed; it is part of the CUDA Toolkit"
        return
    fi
    export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2  # six programs share the CPU
    for tool in memcheck racecheck initcheck; do
        sanitize $tool fp32 &
        sanitize $tool bf16 &
    done
    wait
}

toy() { # PROGRAM NAME [OPTION ...]: trains the toy preset; the output goes to NAME
    program=$1
    name=$2
    shift 2
    "./$program" --steps 300 --val-every 100 --out "$out/$name" --overwrite on \
        "$@" > "$out/$name.log" 2>&1
}

part_train() {
    toy train_gpas cpu
    for fused in on off; do
        toy train_gpas_cuda fp32_$fused --dtype fp32 --fused $fused
        losses_within $out/cpu/log.csv $out/fp32_$fused/log.csv > $out/losses.log 2>&1
        verdict "toy in fp32 with --fused $fused, compared with the CPU" $? $out/losses.log
    done
    for run in 1 2; do
        toy train_gpas_cuda bf16
        mv $out/bf16/ckpt_000300.safetensors $out/run$run.safetensors
    done
    cmp $out/run1.safetensors $out/run2.safetensors > $out/same.log 2>&1
    status=$?
    [ -s $out/same.log ] || echo "the same bits" > $out/same.log
    verdict "toy in bf16, twice" $status $out/same.log
}

part_kernels() {
    tbytes=4.3  # TB/s that an H200 copies
    case $(nvidia-smi --query-gpu=name --format=csv,noheader) in *H100*) tbytes=3 ;; esac
    for row in "71m 256 256" "350m 32 1024"; do
        name=$(echo "$row" | tr ' ' _)
        log=$out/kernels_$name.log
        roofline=$out/roofline_$name.md
        # shellcheck disable=SC2086  # a row is three arguments
        ./bench_cuda kernels $row > "$log" 2>&1 &&
            python3 dev/gpu/roofline.py --tbytes $tbytes --measured "$log" $row > "$roofline" 2>&1
        status=$?
        tail -n 1 "$log" > $out/kernels.line
        [ $status -ne 0 ] || grep "^| all" "$roofline" > $out/kernels.line
        verdict "kernels of $row" $status $out/kernels.line
        [ $status -eq 0 ] || continue
        echo
        cat "$roofline"
        echo
        # shellcheck disable=SC2086
        ./bench_cuda choices $row > "$out/choices_$name.log" 2>&1
        verdict "choices of $row" $? "$out/choices_$name.log"
        cat "$out/choices_$name.log"
    done
}

speed() { # PRESET B T: adds a line of ours, and a line of the peer's, to speed.log
    ./bench_cuda "$1" "$2" "$3" > $out/bench.log 2>&1
    verdict "speed of $*" $? $out/bench.log
    echo "ours $* $(tail -n 1 $out/bench.log)" >> $out/speed.log
    [ -n "$peer" ] || return
    TORCHINDUCTOR_CACHE_DIR=$PWD/$out/inductor timeout 140 python3 "$peer" --config "$1" --B "$2" \
        --T "$3" --device cuda --dtype bf16 --compile > $out/peer.log 2>> $out/peer.err
    status=$?
    [ -s $out/peer.log ] || echo "it printed nothing; see $out/peer.err" > $out/peer.log
    verdict "speed of the peer" $status $out/peer.log
    echo "peer $* $(tail -n 1 $out/peer.log)" >> $out/speed.log
}

table() { # prints speed.log as a table
    echo
    python3 - $out/speed.log << 'END'
import json, sys
ours, peer = {}, {}
for line in open(sys.argv[1]):
    who, *row, rest = line.split(None, 4)
    if who == "ours" and rest.startswith(row[0] + " "):
        f = rest.split()
        ours[tuple(row)] = float(f[4]), float(f[9]), f[8]
    elif who == "peer" and rest.startswith("{"):
        f = json.loads(rest)
        peer[tuple(row)] = f["tokens_per_s"], f["peak_GiB"]
print("| preset | B | T | tokens/s | of the matrix rate | GiB | peer's tokens/s | GiB | ratio |")
print("|---|---|---|---|---|---|---|---|---|")
for row in ours:
    speed, memory, share = ours[row]
    text = "| %s | %s | %s | %.0f | %s | %.2f |" % (*row, speed, share, memory)
    if row in peer:
        text += " %.0f | %.2f | %.2f |" % (*peer[row], speed / peer[row][0])
    print(text if row in peer else text + " | | |")
END
}

part_speed256() {
    for row in "71m 256 256" "130m 256 256" "350m 128 256" "1b 64 256"; do
        # shellcheck disable=SC2086
        speed $row
    done
    table
}

part_speed1024() {
    for row in "71m 64 1024" "130m 64 1024" "350m 32 1024" "1b 16 1024"; do
        # shellcheck disable=SC2086
        speed $row
    done
    table
    ./bench_cuda 1b 64 1024 bf16 recompute > $out/recompute.log 2>&1
    verdict "1b 64 1024 with --recompute on" $? $out/recompute.log
    [ -z "$llmc" ] || time_llmc
}

time_llmc() { # 20 steps of GPT-2 124M, V 50257, on random tokens, with B 64 and T 1024
    python3 - $out/random.bin << 'END'
import array, random, sys
n = 4 * 64 * 1024 + 1
with open(sys.argv[1], "wb") as file:
    array.array("i", [20240520, 1, n] + [0] * 253).tofile(file)
    array.array("H", (random.randrange(50257) for _ in range(n))).tofile(file)
END
    tokens=$PWD/$out/random.bin
    (cd "$llmc" && make -s train_gpt2cu PRECISION=BF16 && ./train_gpt2cu -e d12 -i "$tokens" \
        -j "$tokens" -b 64 -t 1024 -d 65536 -x 20 -v 0 -s 0 -h 0) > $out/llmc.log 2>&1
    status=$?
    grep tok/s $out/llmc.log | tail -n 1 > $out/llmc.line
    [ -s $out/llmc.line ] || tail -n 1 $out/llmc.log > $out/llmc.line
    verdict "llm.c's GPT-2 124M, B 64, T 1024" $status $out/llmc.line
}

note "$(date -u +%Y-%m-%d), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
for part in "$@"; do
    begin=$(date +%s)
    "part_$part"
    echo "$part: $(($(date +%s) - begin)) s" | tee -a $times
done
echo
cat $summary $times
! grep -q FAIL $summary
