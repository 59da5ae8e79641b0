/* Which prefetches arrive: a tile of packed keys is asked for at some pace, in some order; after a
 * while some of its lines, chosen at random, are loaded and timed one by one.
 *
 * A tile is 4 pages of 8 KiB in random places: 16 tokens of 8 heads of 64 bytes.  Orders:
 *   head      each head in turn, for all 64 tokens
 *   memory    token by token, all heads of it
 *   quarters  as in memory, the four pages in turn
 *
 *     cc -O2 -march=native docs/scripts/dropped_prefetches.c -o dropped && ./dropped
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <x86intrin.h>

enum { PAGE = 8192, PAGES = 65536, TILE = 4, TOKENS = 16, HEADS = 8, LINE = 64, LINES = 512 };
enum { TILES = 1000, TIMED = 64, SLOW = 250 /* cycles of the time stamp counter */ };
static const char *ORDERS[] = {"head", "memory", "quarters"};
static char *memory;
static int pages[PAGES];

static uint64_t now(void) {
    _mm_lfence();
    uint64_t t = __rdtsc();
    _mm_lfence();
    return t;
}

static char *line(int tile, int token, int head) {
    size_t page = pages[TILE * tile + token / TOKENS];
    return memory + page * PAGE + token % TOKENS * HEADS * LINE + head * LINE;
}

static char *nth(int order, int tile, int n) {
    if (order == 0) return line(tile, n % 64, n / 64);
    if (order == 1) return line(tile, n / HEADS, n % HEADS);
    return line(tile, n % TILE * TOKENS + n / TILE / HEADS, n / TILE % HEADS);
}

int main(void) {
    size_t size = (size_t)PAGES * PAGE;
    memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 1;
    madvise(memory, size, MADV_HUGEPAGE);
    memset(memory, 1, size);
    for (int i = 0; i < PAGES; i++) pages[i] = i;
    for (int i = PAGES - 1; i > 0; i--) {
        int j = rand() % (i + 1), other = pages[i];
        pages[i] = pages[j];
        pages[j] = other;
    }
    volatile float sink = 0;
    puts("level  order     cycles a line  did not come");
    for (int level = 1; level <= 2; level++)
        for (int order = 0; order < 3; order++)
            for (int pause = 0; pause <= 6; pause += 2) {
                __m512 one = _mm512_set1_ps(1.f), sum = one;
                uint64_t cycles = 0;
                long slow = 0;
                for (int tile = 0; tile < TILES; tile++) {
                    uint64_t start = now();
                    for (int n = 0; n < LINES; n++) {
                        char *p = nth(order, tile, n);
                        if (level == 1) _mm_prefetch(p, _MM_HINT_T0);
                        else _mm_prefetch(p, _MM_HINT_T1);
                        for (int i = 0; i < pause; i++) sum = _mm512_fmadd_ps(sum, one, one);
                    }
                    cycles += now() - start;
                    for (int i = 0; i < 3000; i++) sum = _mm512_fmadd_ps(sum, one, one);
                    sink += _mm512_cvtss_f32(sum);
                    for (int i = 0; i < TIMED; i++) {
                        volatile char *p = nth(1, tile, rand() % LINES);
                        uint64_t before = now();
                        (void)*p;
                        slow += now() - before > SLOW;
                    }
                }
                printf("%5d  %-8s %14.1f %12.1f %%\n", level, ORDERS[order],
                       (double)cycles / TILES / LINES, 100. * slow / TILES / TIMED);
            }
}
