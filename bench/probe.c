/* The yardstick: what two processes reach on this machine, this minute, in plain C.
 *
 *   probe ring SIZE BATCH SLOTS MILLISECONDS   -> messages a second
 *   probe eventfd MILLISECONDS                 -> round trip p50 and p99, nanoseconds
 *
 * Two processes on two cores (the first and the last one we may use). The ring is
 * busy-polled, slots are handed over once per batch, and each message is copied from a
 * private buffer into the ring and out of it into another. A slot has the shape of an
 * IOQ descriptor with its owner flag; there are no checks and no signals. The eventfd
 * round trip sleeps in read(2) on both sides.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define MOST_SLOTS 1024

struct slot {
    uint64_t cookie, offset, length;
    _Atomic uint64_t full;
};

struct ring {
    _Alignas(64) _Atomic int stop;
    _Alignas(64) struct slot slots[MOST_SLOTS];
    uint8_t data[];
};

struct run {
    struct ring *ring;
    uint64_t size, batch, slots, at; /* `at`: messages so far, by this side */
};

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void pin(int last)
{
    cpu_set_t allowed, one;
    int pick = -1;

    sched_getaffinity(0, sizeof(allowed), &allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && (last || pick < 0))
            pick = cpu;
    }
    CPU_ZERO(&one);
    CPU_SET(pick, &one);
    sched_setaffinity(0, sizeof(one), &one);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void *fresh(size_t size)
{
    void *memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);

    if (!memory)
        exit(1);
    memset(memory, 0x5a, size);
    return memory;
}

static struct slot *slot_at(const struct run *run, uint64_t nth)
{
    return &run->ring->slots[(run->at + nth) % run->slots];
}

static void hand_over(struct run *run, uint64_t n, uint64_t full)
{
    for (uint64_t i = 0; i < n; i++)
        atomic_store_explicit(&slot_at(run, i)->full, full, memory_order_release);
    run->at += n;
}

/* Copies each message out of the ring, like a consumer that keeps it. */
static void consume(struct run *run)
{
    uint8_t *out = fresh(run->size * run->batch);

    while (!atomic_load_explicit(&run->ring->stop, memory_order_relaxed)) {
        uint64_t taken = 0, used = 0;

        for (; taken < run->batch; taken++) {
            struct slot *slot = slot_at(run, taken);

            if (!atomic_load_explicit(&slot->full, memory_order_acquire))
                break;
            memcpy(out + used, run->ring->data + slot->offset, slot->length);
            used += slot->length;
        }
        hand_over(run, taken, 0);
        __asm__ volatile("" ::"r"(out) : "memory"); /* someone reads it */
        if (taken == 0)
            relax();
    }
}

static void produce(struct run *run, const uint8_t *in, uint64_t until)
{
    while (now_ns() < until) {
        for (uint64_t i = 0; i < run->batch; i++) {
            struct slot *slot = slot_at(run, i);

            while (atomic_load_explicit(&slot->full, memory_order_acquire))
                relax();
            slot->offset = (run->at + i) % run->slots * run->size;
            slot->length = run->size;
            memcpy(run->ring->data + slot->offset, in + i * run->size, run->size);
        }
        hand_over(run, run->batch, 1);
    }
}

static void ring_rate(uint64_t size, uint64_t batch, uint64_t slots, uint64_t ms)
{
    struct run run = {.size = size, .batch = batch, .slots = slots};
    uint8_t *in = fresh(size * batch);
    uint64_t begin, before;
    pid_t child;

    if (batch > slots || slots > MOST_SLOTS)
        exit(2);
    run.ring = mmap(NULL, sizeof(struct ring) + size * slots, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (run.ring == MAP_FAILED || (child = fork()) < 0)
        exit(1);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(1);
        consume(&run);
        _exit(0);
    }
    pin(0);
    produce(&run, in, now_ns() + ms * 200000u); /* a fifth to warm up */
    begin = now_ns();
    before = run.at;
    produce(&run, in, begin + ms * 1000000u);
    printf("%.0f\n", (double)(run.at - before) * 1e9 / (double)(now_ns() - begin));
    atomic_store(&run.ring->stop, 1);
    waitpid(child, NULL, 0);
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static void tell(int fd)
{
    if (eventfd_write(fd, 1))
        exit(1);
}

static void await(int fd)
{
    eventfd_t count;

    if (eventfd_read(fd, &count))
        exit(1);
}

static void eventfd_trip(uint64_t ms)
{
    enum { MOST = 1 << 20, WARM_UP = 200 };
    uint64_t *took = fresh(MOST * sizeof(*took));
    int there = eventfd(0, 0), back = eventfd(0, 0);
    uint64_t until, begin, count = 0;
    pid_t child = fork();

    if (child < 0)
        exit(1);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(1);
        for (;;) {
            await(there);
            tell(back);
        }
    }
    pin(0);
    for (int i = 0; i < WARM_UP; i++) {
        tell(there);
        await(back);
    }
    until = now_ns() + ms * 1000000u;
    do {
        begin = now_ns();
        tell(there);
        await(back);
        took[count++] = now_ns() - begin;
    } while (count < MOST && begin < until);
    qsort(took, count, sizeof(*took), ascending);
    printf("%llu %llu\n", (unsigned long long)took[count / 2],
           (unsigned long long)took[count * 99 / 100]);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "ring"))
        ring_rate(strtoul(argv[2], 0, 0), strtoul(argv[3], 0, 0), strtoul(argv[4], 0, 0),
                  strtoul(argv[5], 0, 0));
    else if (argc == 3 && !strcmp(argv[1], "eventfd"))
        eventfd_trip(strtoul(argv[2], 0, 0));
    else
        return 2;
    return 0;
}
