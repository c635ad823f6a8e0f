/* Output that needs no memory but the stack, and an end for what must not be. */
#ifndef SAY_H
#define SAY_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void say(const char *format, ...) {
    char line[256];
    va_list list;
    va_start(list, format);
    int count = vsnprintf(line, sizeof line, format, list);
    va_end(list);
    if (write(1, line, (size_t)count) != count)
        _exit(90);
}

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            say("line %d: %s does not hold\n", __LINE__, #what);                                   \
            _exit(91);                                                                             \
        }                                                                                          \
    } while (0)

/* splitmix64. */
static inline uint64_t draw(uint64_t *state) {
    uint64_t x = *state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

#endif
