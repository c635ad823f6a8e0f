/* Blocks of all sizes: filled, grown, shrunk, sorted, compared and freed in any order. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "say.h"

enum { BLOCKS = 96 };

struct block {
    uint64_t *words;
    size_t count;
    uint64_t seed;
};

static void fill(struct block *block, size_t from) {
    for (size_t i = from; i < block->count; i++)
        block->words[i] = block->seed * 31 + i;
}

static uint64_t sum(const struct block *block) {
    uint64_t total = 0;
    for (size_t i = 0; i < block->count; i++) {
        CHECK(block->words[i] == block->seed * 31 + i);
        total = total * 3 + block->words[i];
    }
    return total;
}

/* From a few bytes to a few megabytes: the heap's and those with a mapping of their own. */
static size_t size_of(uint64_t random) {
    size_t magnitude = random % 17;
    return 2 + (random >> 8) % ((size_t)2 << magnitude);
}

static uint64_t churn(struct block *blocks, uint64_t *random) {
    struct block *block = &blocks[draw(random) % BLOCKS];
    uint64_t total = 0;
    if (!block->words) {
        block->count = size_of(draw(random));
        block->seed = draw(random) >> 32;
        block->words = draw(random) % 2 ? malloc(block->count * 8) : calloc(block->count, 8);
        CHECK(block->words);
        fill(block, 0);
    } else if (draw(random) % 3) {
        size_t former = block->count;
        block->count = size_of(draw(random)) + former / 2;
        block->words = realloc(block->words, block->count * 8);
        CHECK(block->words);
        fill(block, former < block->count ? former : block->count);
        total = sum(block);
    } else {
        total = sum(block);
        free(block->words);
        block->words = NULL;
    }
    return total;
}

static int by_text(const void *one, const void *other) {
    return strcmp(*(char *const *)one, *(char *const *)other);
}

/* Sorts strings, each a block of its own. */
static uint64_t sort_strings(uint64_t *random) {
    enum { COUNT = 3000 };
    char **texts = malloc(COUNT * sizeof *texts);
    for (int i = 0; i < COUNT; i++) {
        char text[40];
        snprintf(text, sizeof text, "%llx-%d", (unsigned long long)draw(random), i);
        texts[i] = strdup(text);
    }
    qsort(texts, COUNT, sizeof *texts, by_text);
    uint64_t total = 0;
    for (int i = 0; i < COUNT; i++) {
        CHECK(i == 0 || strcmp(texts[i - 1], texts[i]) < 0);
        total = total * 7 + (unsigned char)texts[i][0] + strlen(texts[i]);
    }
    for (int i = 0; i < COUNT; i++)
        free(texts[i]);
    free(texts);
    return total;
}

/* Grows one block over many mremaps, and looks at all of it each time. */
static uint64_t grow(void) {
    struct block block = {NULL, 0, 5};
    uint64_t total = 0;
    for (size_t count = 20000; count < 900000; count = count * 3 / 2) {
        size_t former = block.count;
        block.words = realloc(block.words, count * 8);
        block.count = count;
        fill(&block, former);
        total += sum(&block);
    }
    free(block.words);
    return total;
}

/* Memory that must be zero: mapped afresh, and given back in between. Advice is not believed where the
   second argument says so. */
static void zeros(int unbelieving) {
    size_t bytes = 3 << 20;
    unsigned char *memory = calloc(1, bytes);
    for (size_t i = 0; i < bytes; i += 512)
        CHECK(memory[i] == 0);
    memset(memory, 9, bytes);
    free(memory);
    memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    memset(memory, 1, bytes);
    CHECK(madvise(memory + (1 << 20), 1 << 20, MADV_DONTNEED) == 0);
    for (size_t i = 0; i < bytes; i += 512)
        CHECK(memory[i] == (i / (1 << 20) != 1) || (unbelieving && i / (1 << 20) == 1));
    CHECK(mprotect(memory, 1 << 20, PROT_READ) == 0);
    CHECK(memory[77] == 1);
    CHECK(munmap(memory, bytes) == 0);
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 1;
    int unbelieving = count > 2 && strcmp(arguments[2], "events") == 0;
    struct block *blocks = calloc(BLOCKS, sizeof *blocks);
    uint64_t random = 1;
    for (int round = 0; round < rounds; round++) {
        uint64_t total = 0;
        for (int i = 0; i < 150; i++)
            total = total * 5 + churn(blocks, &random);
        total += sort_strings(&random);
        total += grow();
        zeros(unbelieving);
        say("round %d: %llx\n", round, (unsigned long long)total);
    }
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks[i].words)
            sum(&blocks[i]);
        free(blocks[i].words);
    }
    free(blocks);
    return 7;
}
