# Runs the test commands given as arguments and adds up their last lines `N passed, N failed`. A
# command without such a line counts as one check, of its exit status; one that exits with another
# status than 0 counts as at least one failure. Waiting threads must not spin, because the tests use
# more threads than some machines have cores.
OMP_WAIT_POLICY=passive
export OMP_WAIT_POLICY
total_passed=0
total_failed=0
log=build/tests.$$
mkdir -p build
trap 'rm -f "$log"' EXIT
for command in "$@"; do
    eval "$command" > "$log" 2>&1
    status=$?
    line=$(grep -a -E '^[0-9]+ passed, [0-9]+ failed$' "$log" | tail -n 1)
    grep -a -v -x -F -- "${line:-no line}" "$log"
    if [ -n "$line" ]; then
        total_passed=$((total_passed + ${line%% *}))
        failed=${line#*, }
        failed=${failed%% *}
        [ "$status" -ne 0 ] && [ "$failed" -eq 0 ] && failed=1
        total_failed=$((total_failed + failed))
    elif [ "$status" -eq 0 ]; then
        echo "ok   $command"
        total_passed=$((total_passed + 1))
    else
        echo "FAIL $command: ended with status $status"
        total_failed=$((total_failed + 1))
    fi
done
echo "$total_passed passed, $total_failed failed" && [ "$total_failed" -eq 0 ]
