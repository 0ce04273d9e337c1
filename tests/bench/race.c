/* Breadth-first search over the tables of mmu.machine, one state at a time: what scalar code makes of the same model.
   Input: a file of little-endian int32: actors, shared bits, start; then of each actor moves, locals, and for each
   (local, shared, move) the next local state (-1: not possible) and the next shared number.
   Output: states, transitions, depth, seconds. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MAX 16

static int32_t *read_all(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) exit(2);
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    int32_t *data = malloc(size);
    if (!data || fread(data, 1, size, file) != (size_t)size) exit(2);
    fclose(file);
    return data;
}

int main(int argc, char **argv) {
    int32_t *in = read_all(argv[1]);
    int slots = argc > 2 ? atoi(argv[2]) : 24;
    int actors = *in++, bits = *in++, shift[MAX], moves[MAX], width[MAX];
    uint64_t start = *in++, shared_mask = (1ull << bits) - 1;
    uint64_t *change[MAX]; /* what a move xors into a state; 0: not possible, 1 << 63 beside it: possible, but the same state */
    int at = bits;
    for (int a = 0; a < actors; a++) {
        moves[a] = *in++;
        int locals = *in++;
        shift[a] = at;
        for (width[a] = 0; 1 << width[a] < locals; width[a]++) {}
        at += width[a];
        change[a] = calloc((size_t)locals * moves[a] << bits, sizeof(uint64_t));
        for (int l = 0; l < locals; l++)
            for (uint64_t s = 0; s <= shared_mask; s++)
                for (int m = 0; m < moves[a]; m++) {
                    int32_t to = *in++;
                    uint64_t after = *in++;
                    if (to >= 0)
                        change[a][((size_t)l << bits | s) * moves[a] + m] =
                            ((uint64_t)(to ^ l) << shift[a] | (after ^ s)) | 1ull << 63;
                }
    }
    uint64_t mask = (1ull << slots) - 1, room = 1ull << slots;
    uint64_t *table = aligned_alloc(1 << 21, room * sizeof *table), *queue = aligned_alloc(1 << 21, room * sizeof *queue);
    if (!table || !queue) exit(2);
    madvise(table, room * sizeof *table, MADV_HUGEPAGE);
    madvise(queue, room * sizeof *queue, MADV_HUGEPAGE);
    memset(table, 0xff, room * sizeof *table); /* empty; and no page is first touched while the clock runs */
    memset(queue, 0, room * sizeof *queue);

    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    uint64_t head = 0, tail = 0, transitions = 0, depth = 0, level_end;
    queue[tail++] = start;
    table[(start * 0x9E3779B97F4A7C15ull) >> (64 - slots)] = start;
    level_end = tail;
    while (head < tail) {
        if (head == level_end) {
            depth++;
            level_end = tail;
        }
        uint64_t state = queue[head++], shared = state & shared_mask;
        for (int a = 0; a < actors; a++) {
            uint64_t local = state >> shift[a] & ((1ull << width[a]) - 1);
            const uint64_t *row = change[a] + (local << bits | shared) * moves[a];
            for (int m = 0; m < moves[a]; m++) {
                if (!row[m]) continue;
                transitions++;
                uint64_t next = state ^ (row[m] & ~(1ull << 63));
                uint64_t slot = (next * 0x9E3779B97F4A7C15ull) >> (64 - slots);
                while (table[slot] != ~0ull && table[slot] != next) slot = (slot + 1) & mask;
                if (table[slot] == next) continue;
                table[slot] = next;
                queue[tail++] = next;
            }
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &t1);
    double seconds = (t1.tv_sec - t0.tv_sec) + (t1.tv_nsec - t0.tv_nsec) * 1e-9;
    printf("%llu %llu %llu %.6f\n", (unsigned long long)tail, (unsigned long long)transitions, (unsigned long long)depth, seconds);
    return 0;
}
