/* An address space whose map changes between the operations of a backend, under a
 * sanitizer: regions come and go at random, views outlive what they look at, and every
 * answer is compared with a table that is kept beside it.
 *
 * Two threads take turns, as two threads of a daemon may (never at once: a space belongs
 * to one thread at a time): one maps and unmaps, the other copies a batch. The memory
 * file is longer than what is mapped, with canaries between the pieces.
 *
 * Usage: changing_space ROUNDS SEED
 */
#include <shm/space.h>

#include <pthread.h>
#include <stdio.h>

enum { SLOTS = 16, PAGE = 4096, SIZE = 2 * PAGE, STRIDE = 3 * PAGE, BATCH = 32 };
enum kind { ABSENT, WRITABLE, READ_ONLY, UNBACKED };

static struct vb_space space;
static enum kind table[SLOTS];
static struct vb_view views[SLOTS];
static uint8_t *file_memory; /* the whole file, as the guest has it */
static int file;
static uint64_t state, rounds;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint32_t dice(uint32_t sides)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state % sides);
}

/* Slots lie a stride apart, in the guest as in the file; the last page is a canary. */
static uint64_t address(int slot)
{
    return 0x100000 + (uint64_t)slot * STRIDE;
}

static void change(void)
{
    int slot = (int)dice(SLOTS);
    enum kind kind = (enum kind)(1 + dice(3));

    if (table[slot] == ABSENT) {
        if (vb_space_map(&space, address(slot), SIZE, kind == UNBACKED ? -1 : file,
                         (uint64_t)slot * STRIDE, kind != READ_ONLY))
            fail("map");
        table[slot] = kind;
        if (!views[slot].nparts && kind != UNBACKED &&
            vb_view_open(&views[slot], &space, address(slot), SIZE, kind == WRITABLE))
            fail("view");
    } else if (dice(64) == 0) {
        vb_space_clear(&space);
        memset(table, 0, sizeof(table));
    } else {
        if (vb_space_unmap(&space, address(slot), STRIDE) != 1)
            fail("unmap");
        table[slot] = ABSENT;
        if (views[slot].nparts && vb_view_alive(&views[slot]))
            fail("a view outlives its region");
    }
}

static void copy(void)
{
    uint8_t local[SIZE];
    int slot = (int)dice(SLOTS);
    uint64_t skip = dice(STRIDE), size = 1 + dice(SIZE);
    bool write = dice(2), inside = skip + size <= SIZE;
    enum kind kind = table[slot];
    bool allowed = inside && (kind == WRITABLE || (kind == READ_ONLY && !write));
    int error;

    memset(local, 'w', sizeof(local));
    error = write ? vb_space_write(&space, address(slot) + skip, local, size)
                  : vb_space_read(&space, address(slot) + skip, local, size);
    if ((error == 0) != allowed)
        fail(allowed ? "refused" : "out of the memory");
    if (!write && !error && memchr(local, 'c', size))
        fail("a canary was read");
}

static void use_view(void)
{
    int slot = (int)dice(SLOTS);
    uint8_t *host = vb_view_ptr(&views[slot], dice(SIZE), 1);

    if (host && table[slot] == ABSENT)
        fail("a view of nothing");
    if (host && views[slot].writable)
        *host = 'v';
    if (views[slot].nparts && !vb_view_alive(&views[slot]) && dice(2))
        vb_view_close(&views[slot]);
}

static void *mapper(void *unused)
{
    for (uint64_t i = 0; i < rounds; i++) {
        pthread_mutex_lock(&turn);
        for (uint32_t n = dice(8); n > 0; n--)
            change();
        pthread_mutex_unlock(&turn);
    }
    return unused;
}

static void *backend(void *unused)
{
    for (uint64_t i = 0; i < rounds; i++) {
        pthread_mutex_lock(&turn);
        for (int n = 0; n < BATCH; n++) {
            copy();
            use_view();
        }
        pthread_mutex_unlock(&turn);
    }
    return unused;
}

static void check_canaries(void)
{
    for (int slot = 0; slot < SLOTS; slot++)
        for (int at = SIZE; at < STRIDE; at++)
            if (file_memory[slot * STRIDE + at] != 'c')
                fail("a canary was written");
}

int main(int argc, char **argv)
{
    pthread_t threads[2];

    if (argc != 3)
        return 2;
    rounds = strtoull(argv[1], NULL, 0);
    state = strtoull(argv[2], NULL, 0) * 2 + 1;
    file = memfd_create("guest", 0);
    if (file < 0 || ftruncate(file, SLOTS * STRIDE))
        fail("memory");
    file_memory = mmap(NULL, SLOTS * STRIDE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    for (int slot = 0; slot < SLOTS; slot++)
        memset(file_memory + slot * STRIDE + SIZE, 'c', STRIDE - SIZE);
    pthread_create(&threads[0], NULL, mapper, NULL);
    pthread_create(&threads[1], NULL, backend, NULL);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    check_canaries();
    for (int slot = 0; slot < SLOTS; slot++)
        vb_view_close(&views[slot]);
    vb_space_clear(&space);
    puts("ok");
    return 0;
}
