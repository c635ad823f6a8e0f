/* Threads that come and go: joined ones, detached ones, on stacks of the library's and, where the
   second argument says so, on stacks of their own. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#include "say.h"

enum { AT_A_TIME = 6 };

static atomic_int detached;
static int own_stacks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t counted;
static __thread uint64_t own;

struct task {
    uint64_t seed;
    uint64_t result;
};

/* Works with blocks of its own arena, its stack and its thread-local. */
static void *work(void *argument) {
    struct task *task = argument;
    uint64_t random = task->seed;
    uint64_t local[512];
    own = task->seed;
    for (int i = 0; i < 512; i++)
        local[i] = draw(&random);
    for (int i = 0; i < 40; i++) {
        size_t bytes = 16 + draw(&random) % 60000;
        unsigned char *block = malloc(bytes);
        CHECK(block);
        memset(block, (int)(own + i), bytes);
        CHECK(block[bytes / 2] == (unsigned char)(own + i));
        task->result = task->result * 3 + bytes;
        free(block);
    }
    for (int i = 0; i < 512; i++)
        task->result = task->result * 3 + local[i];
    CHECK(own == task->seed);
    pthread_mutex_lock(&lock);
    counted++;
    pthread_mutex_unlock(&lock);
    return &task->result;
}

static void *alone(void *argument) {
    work(argument);
    free(argument);
    atomic_fetch_add(&detached, 1);
    return NULL;
}

static void detach(uint64_t seed) {
    struct task *task = calloc(1, sizeof *task);
    task->seed = seed;
    pthread_attr_t attributes;
    pthread_t thread;
    CHECK(pthread_attr_init(&attributes) == 0);
    CHECK(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0);
    CHECK(pthread_create(&thread, &attributes, alone, task) == 0);
    CHECK(pthread_attr_destroy(&attributes) == 0);
}

/* Sleeps, and ends without touching any memory after that, as a thread may that is cut short by the
   scheduler at its very end. */
static void *sleep_and_end(void *argument) {
    const long poll = 7, end = 60;
    long result;
    (void)argument;
    __asm__ volatile("syscall\n\tmov %2, %%rax\n\txor %%edi, %%edi\n\tsyscall"
                     : "=a"(result)
                     : "a"(poll), "r"(end), "D"(0), "S"(0), "d"(5)
                     : "rcx", "r11", "memory");
    return argument;
}

/* Starts a thread, every other one on a stack of the program's, where that is asked for. */
static void *start(pthread_t *thread, int number, void *(*work)(void *), void *argument) {
    enum { STACK = 256 << 10 };
    void *stack = NULL;
    pthread_attr_t attributes;
    CHECK(pthread_attr_init(&attributes) == 0);
    if (own_stacks && number % 2) {
        CHECK(posix_memalign(&stack, 4096, STACK) == 0);
        CHECK(pthread_attr_setstack(&attributes, stack, STACK) == 0);
    }
    CHECK(pthread_create(thread, &attributes, work, argument) == 0);
    CHECK(pthread_attr_destroy(&attributes) == 0);
    return stack;
}

static void sleepers(void) {
    pthread_t threads[AT_A_TIME];
    void *stacks[AT_A_TIME];
    for (int i = 0; i < AT_A_TIME; i++)
        stacks[i] = start(&threads[i], i, sleep_and_end, NULL);
    for (int i = 0; i < AT_A_TIME; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        free(stacks[i]);
    }
}

static uint64_t run_together(uint64_t round) {
    struct task *tasks = calloc(AT_A_TIME, sizeof *tasks);
    pthread_t threads[AT_A_TIME];
    void *stacks[AT_A_TIME];
    for (int i = 0; i < AT_A_TIME; i++) {
        tasks[i].seed = round * 100 + (uint64_t)i;
        stacks[i] = start(&threads[i], i, work, &tasks[i]);
    }
    uint64_t total = 0;
    for (int i = 0; i < AT_A_TIME; i++) {
        void *result;
        CHECK(pthread_join(threads[i], &result) == 0);
        CHECK(result == &tasks[i].result);
        total = total * 5 + tasks[i].result;
        free(stacks[i]);
    }
    free(tasks);
    return total;
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 1;
    own_stacks = count > 2 && strcmp(arguments[2], "own-stacks") == 0;
    for (int round = 0; round < rounds; round++) {
        uint64_t total = 0;
        sleepers();
        for (int i = 0; i < 10; i++) {
            total = total * 7 + run_together((uint64_t)(round * 10 + i));
            detach((uint64_t)i);
        }
        say("round %d: %llx\n", round, (unsigned long long)total);
    }
    while (atomic_load(&detached) < rounds * 10)
        sched_yield();
    say("threads: %llu\n", (unsigned long long)counted);
    return 0;
}
