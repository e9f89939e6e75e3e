# What only a GPU can tell, in one run of some minutes:
#
#     sh dev/gpu.sh [PEER]
#
# builds everything; runs the checks in fp32 and bf16, alone and under compute-sanitizer; compares
# 300 steps of the toy preset with the CPU's losses and with themselves; and prints the speed of
# every preset. PEER is a PyTorch program that takes --config --B --T --device cuda --dtype bf16
# --compile and prints a line of its own, to be timed beside ours. Logs go to out/gpu. The last
# lines sum up.
set -u
out=out/gpu
mkdir -p $out
summary=$out/summary.txt
: > $summary

note() { echo "$*" | tee -a $summary; }

verdict() { # NAME STATUS LOG: one line of the summary, with the log's last line
    word=FAIL
    [ "$2" -eq 0 ] && word="ok  "
    note "$word $1: $(tail -n 1 "$3")"
}

losses_within() { # FILE FILE: the largest relative difference of two log.csv's training losses
    python3 - "$1" "$2" << 'END'
import csv, sys
a, b = ([float(r["train_loss"]) for r in csv.DictReader(open(f)) if r["train_loss"]]
        for f in sys.argv[1:])
worst = max(abs(x / y - 1) for x, y in zip(a, b))
print("%d steps, largest relative difference %.2e" % (len(a), worst))
sys.exit(len(a) != len(b) or not worst <= 1e-3)
END
}

note "$(date -u +%Y-%m-%d), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
make -s -j 8 train_gpas train_gpas_cuda test_gpas_cuda_fp32 test_gpas_cuda_bf16 bench_cuda \
    data/toy/tokenizer.bin > $out/build.log 2>&1
status=$?
[ -s $out/build.log ] || echo "no warning" > $out/build.log
verdict build $status $out/build.log
[ $status -eq 0 ] || exit 1

make -s test-cuda > $out/test.log 2>&1
verdict "make test-cuda" $? $out/test.log

if command -v compute-sanitizer > /dev/null; then
    for type in fp32 bf16; do
        for tool in memcheck racecheck initcheck; do
            log=$out/$tool.$type.log
            timeout 150 compute-sanitizer --tool $tool --error-exitcode 1 \
                ./test_gpas_cuda_$type > "$log" 2>&1
            status=$?
            [ $status -eq 124 ] && echo "not finished in 150 s" >> "$log"
            verdict "compute-sanitizer $tool, $type" $status "$log"
        done
    done
else
    note "FAIL compute-sanitizer: it is not installed (a part of the CUDA Toolkit)"
fi

toy="--steps 300 --val-every 100"
./train_gpas $toy --out $out/cpu > $out/cpu.log 2>&1
./train_gpas_cuda $toy --dtype fp32 --out $out/fp32 > $out/fp32.log 2>&1
losses_within $out/cpu/log.csv $out/fp32/log.csv > $out/losses.log 2>&1
verdict "toy in fp32 beside the CPU" $? $out/losses.log
for turn in 1 2; do
    ./train_gpas_cuda $toy --out $out/bf16 > $out/bf16.log 2>&1
    mv $out/bf16/ckpt_000300.safetensors $out/turn$turn.safetensors
done
cmp $out/turn1.safetensors $out/turn2.safetensors > $out/same.log 2>&1
status=$?
[ -s $out/same.log ] || echo "the same bits" > $out/same.log
verdict "toy in bf16, twice" $status $out/same.log

./bench_cuda 2>&1 | tee $out/bench.log
if [ $# -gt 0 ]; then
    for row in "71m 256 256" "130m 256 256" "350m 128 256" "1b 64 256" \
        "71m 64 1024" "130m 64 1024" "350m 32 1024" "1b 16 1024"; do
        # shellcheck disable=SC2086
        set -- "$1" $row
        timeout 120 python3 "$1" --config "$2" --B "$3" --T "$4" --device cuda --dtype bf16 \
            --compile 2>> $out/peer.err | tee -a $out/peer.log
    done
fi
echo && cat $summary
! grep -q FAIL $summary
