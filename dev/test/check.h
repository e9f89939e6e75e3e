// check.h: defines check, summary. A test program prints one line for each check, and
// `N passed, N failed` at the end.
#ifndef CHECK_H
#define CHECK_H
#include <stdarg.h>
#include <stdio.h>

static int passed, failed;

// Counts one check and prints its line. If it failed, the line also says what was seen.
__attribute__((format(printf, 3, 4)))
static void check(int good, const char *name, const char *format, ...) {
    printf("%s %s", good ? "ok  " : "FAIL", name);
    if (good) {
        passed++;
    } else {
        va_list args;
        va_start(args, format);
        printf(": ");
        vprintf(format, args);
        va_end(args);
        failed++;
    }
    printf("\n");
    fflush(stdout);  // so that a line is not lost if the next test crashes
}

// Prints how many checks passed and failed. Returns the exit status of the test program.
static int summary(void) {
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
#endif
