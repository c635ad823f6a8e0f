/* Children that look at what they inherited, signals in the middle of everything, and jumps out of
   them. */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "say.h"

enum { WORDS = 200000 };

static volatile sig_atomic_t ticks;
static sigjmp_buf *out;

static void tick(int number) {
    unsigned char local[3000];
    memset(local, number, sizeof local);
    ticks += local[sizeof local - 1] == number;
}

static void jump(int number) {
    siglongjmp(*out, number);
}

static void handle(int number, void (*handler)(int)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    CHECK(sigaction(number, &action, NULL) == 0);
}

static void clock_every(long microseconds) {
    struct itimerval time = {{0, microseconds}, {0, microseconds}};
    CHECK(setitimer(ITIMER_REAL, &time, NULL) == 0);
}

static uint64_t sum(const uint64_t *words) {
    uint64_t total = 0;
    for (int i = 0; i < WORDS; i++)
        total = total * 3 + words[i];
    return total;
}

/* A child finds what was there before it, whatever the parent does meanwhile. */
static int fork_and_compare(uint64_t *words, int round) {
    uint64_t before = sum(words);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(sum(words) == before);
        char *text = malloc(100000);
        memset(text, 'c', 100000);
        for (int i = 0; i < WORDS; i += 100)
            words[i] = 0;
        CHECK(text[99999] == 'c');
        free(text);
        _exit(round % 50 + 1);
    }
    for (int i = 0; i < WORDS; i += 7)
        words[i]++;
    int status;
    while (waitpid(child, &status, 0) < 0)
        CHECK(errno == EINTR);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static int jump_out(void) {
    sigjmp_buf place;
    out = &place;
    int number = sigsetjmp(place, 1);
    if (number == 0) {
        raise(SIGUSR1);
        return -1;
    }
    return number;
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 1;
    uint64_t *words = malloc(WORDS * sizeof *words);
    uint64_t random = 3;
    for (int i = 0; i < WORDS; i++)
        words[i] = draw(&random);
    handle(SIGALRM, tick);
    handle(SIGUSR1, jump);
    clock_every(2000);
    for (int round = 0; round < rounds; round++) {
        int status = fork_and_compare(words, round);
        int number = 0;
        for (int i = 0; i < 100; i++)
            number += jump_out();
        say("round %d: %d %d %llx\n", round, status, number, (unsigned long long)sum(words));
    }
    clock_every(0);
    free(words);
    return 3;
}
