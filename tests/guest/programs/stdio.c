/* The C library's own buffers, on the heap, given to system calls. */
#include <string.h>

#include "say.h"

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 1;
    FILE *file = tmpfile();
    CHECK(file);
    for (int round = 0; round < rounds; round++) {
        rewind(file);
        for (int i = 0; i < 4000; i++)
            fprintf(file, "%d %d\n", i, i * round);
        rewind(file);
        long total = 0;
        char *line = NULL;
        size_t room = 0;
        for (int i = 0; i < 4000; i++) {
            int left, right;
            CHECK(getline(&line, &room, file) > 0);
            CHECK(sscanf(line, "%d %d", &left, &right) == 2);
            total += left + right;
        }
        free(line);
        printf("round %d: %ld\n", round, total);
        char *large = malloc(300000);
        memset(large, 'a' + round % 26, 300000);
        fwrite(large, 1, 300000, stdout);
        free(large);
    }
    fclose(file);
    return 0;
}
