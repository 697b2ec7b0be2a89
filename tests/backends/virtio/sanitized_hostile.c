/* Programs of a hostile driver against a virtqueue, to run under a sanitizer.
 *
 * A program is a string of bytes: features, size, then operations of the driver and the
 * device. Memory is taken from the heap, so that a byte past its end is seen. The same
 * function serves libFuzzer (compile with -DLIBFUZZER); else the programs are random.
 *
 * Usage: sanitized_hostile PROGRAMS SEED; or ... SEED race: the ring changes all the time;
 * or ... SEED FOLDER: keep each program there too, as the corpus of a fuzzer
 */
#include <virtio/queue.h>

#include <pthread.h>
#include <stdio.h>

enum { RING = 0x1000, RING_SIZE = 0x1000, HIGH = 0x8000, LOW_SIZE = 0x4000 };
enum { DESC = RING, DRIVER = RING + 0x400, DEVICE = RING + 0x800, TABLE = RING + 0xc00 };
enum { MAX_SIZE = 64, MAX_OUT = 256, STEP = 100 };

struct input {
    const uint8_t *at, *end;
};

struct stage {
    struct vb_space space;
    uint8_t *blocks[3];
    struct vq queue;
    struct vq_chain out[MAX_OUT];
    uint32_t outs;
    uint16_t offered;
    uint8_t copy[STEP];
};

static void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "%s\n", what);
    abort();
}

static uint32_t take(struct input *input, int bytes)
{
    uint32_t value = 0;

    for (int i = 0; i < bytes && input->at < input->end; i++)
        value = value << 8 | *input->at++;
    return value;
}

/* ---- memory: two regions side by side, one read-only further on ---- */

static void add_region(struct stage *stage, int nth, uint64_t addr, uint64_t size,
                       bool writable)
{
    check(vb_space_map(&stage->space, addr, size, -1, 0, writable) == 0, "map");
    if (!stage->blocks[nth]) {
        stage->blocks[nth] = aligned_alloc(4096, size);
        memset(stage->blocks[nth], 0, size);
    }
    vb_space_find(&stage->space, addr)->host = stage->blocks[nth];
}

static void remove_region(struct stage *stage, uint64_t addr, uint64_t size)
{
    struct vb_region *region = vb_space_find(&stage->space, addr);

    if (!region)
        return;
    region->host = NULL; /* the heap's, not to be unmapped */
    check(vb_space_unmap(&stage->space, addr, size) == 1, "unmap");
}

static void open_stage(struct stage *stage)
{
    add_region(stage, 0, 0, LOW_SIZE, true);
    add_region(stage, 1, LOW_SIZE, LOW_SIZE, true);
    add_region(stage, 2, 2 * HIGH, LOW_SIZE, false);
}

static void close_stage(struct stage *stage)
{
    while (stage->outs)
        vq_chain_free(&stage->out[--stage->outs]);
    vq_close(&stage->queue);
    remove_region(stage, 0, LOW_SIZE);
    remove_region(stage, LOW_SIZE, LOW_SIZE);
    remove_region(stage, 2 * HIGH, LOW_SIZE);
    vb_space_clear(&stage->space);
    for (int i = 0; i < 3; i++)
        free(stage->blocks[i]);
}

/* ---- the driver ---- */

/* Mostly good ones: what is all bad goes no deeper than the first check. */
static uint64_t some_address(struct input *input)
{
    static const uint64_t bases[] = {LOW_SIZE - 8, HIGH - 16, HIGH,         2 * HIGH,
                                     DESC,         1ull << 40, UINT64_MAX - 15};
    uint32_t which = take(input, 1);

    return which < 240 ? 0x2000 + 32 * which : bases[which % 7] + take(input, 1);
}

static uint32_t some_length(struct input *input)
{
    static const uint32_t lengths[] = {0, 0x4000, 0x8001, 0xffffffff};
    uint32_t which = take(input, 1);

    return which < 240 ? 1 + which : lengths[which % 4];
}

static struct vq_entry some_entry(struct input *input)
{
    uint32_t kind = take(input, 1);
    struct vq_entry entry = {some_address(input), some_length(input), 0, 0};

    if (kind % 8 == 0) {
        entry.addr = TABLE;
        entry.len = 16 * (1 + kind % 5) + (kind > 240);
        entry.flags = VQ_F_INDIRECT;
    }
    entry.flags |= (kind & 16 ? VQ_F_WRITE : 0) | (kind & 96 ? 0 : VQ_F_NEXT);
    return entry;
}

static void describe(struct stage *stage, struct input *input)
{
    struct vq_entry entry = some_entry(input);
    uint32_t where = take(input, 1) % (MAX_SIZE + 32), begin = DESC, next;

    if (where >= MAX_SIZE) {
        where -= MAX_SIZE;
        begin = TABLE;
    }
    next = take(input, 1);
    entry.next = (uint16_t)(next < 200 ? where + 1 : next < 250 ? next % 8 : UINT16_MAX);
    if (stage->queue.packed) {
        entry.flags |= vq_avail_flags(take(input, 1) & 1);
        entry = vq_swapped(entry);
    }
    memcpy(stage->blocks[0] + begin + 16 * where, &entry, 16);
}

/* Make a head available (split), or the descriptor that is next (packed). */
static void offer(struct stage *stage, struct input *input)
{
    uint16_t head = (uint16_t)(take(input, 1) % (MAX_SIZE + 1)), *avail;
    struct vq *q = &stage->queue;

    if (q->packed) {
        uint16_t *flags = (uint16_t *)(void *)(stage->blocks[0] + DESC +
                                               16 * q->at.next_avail + 14);

        *flags = (*flags & 7) | vq_avail_flags(q->at.avail_wrap);
        return;
    }
    avail = (uint16_t *)(void *)(stage->blocks[0] + DRIVER);
    avail[2 + stage->offered % q->size] = head;
    avail[1] = ++stage->offered;
}

static void poke(struct stage *stage, struct input *input)
{
    uint16_t event[2] = {(uint16_t)take(input, 2), VQ_EVENT_DESC};
    uint32_t at = take(input, 2);

    if (at % 2) /* what a packed driver wants to hear of */
        memcpy(stage->blocks[0] + DRIVER, event, 4);
    else
        memcpy(stage->blocks[0] + RING + at % (RING_SIZE - 1), event, 2);
}

static void remap(struct stage *stage, struct input *input)
{
    uint32_t which = take(input, 1);

    if (which % 2) {
        remove_region(stage, LOW_SIZE, LOW_SIZE);
        if (which % 4 == 1)
            add_region(stage, 1, LOW_SIZE, LOW_SIZE, true);
    } else if (which == 64) {
        remove_region(stage, 0, LOW_SIZE);
    }
}

/* ---- the device ---- */

/* Touch every byte of a chain, and see that it is what its sizes say. */
static void use(struct stage *stage, struct vq_chain *chain)
{
    uint64_t sizes[2] = {0, 0};

    if (vq_chain_renew(chain, &stage->space, &stage->queue.walk))
        return;
    for (uint32_t i = 0; i < chain->npieces; i++)
        sizes[i >= chain->out_pieces] += chain->pieces[i].iov_len;
    check(sizes[0] == chain->readable && sizes[1] == chain->writable, "sizes");
    for (int write = 0; write < 2; write++)
        for (uint64_t at = 0, size; at < sizes[write]; at += size) {
            struct iovec window[4];

            size = sizes[write] - at < STEP ? sizes[write] - at : STEP;
            vq_chain_copy(chain, write, at, stage->copy, size);
            check(vq_chain_window(chain, write, at, size, window, 4) > 0, "window");
        }
}

static void pop(struct stage *stage)
{
    struct vq_chain chain = {.segs = NULL};
    int got = vq_check(&stage->queue) ? -EIO : vq_pop(&stage->queue, &chain);

    check((got == -EIO) == (stage->queue.broken != NULL), "broken");
    if (got != 1)
        return;
    check(stage->outs < stage->queue.size, "more chains than descriptors");
    check(chain.readable + chain.writable > 0, "an empty chain");
    use(stage, &chain);
    stage->out[stage->outs++] = chain;
}

static void push(struct stage *stage, struct input *input)
{
    struct vq_chain *chain;

    if (stage->outs == 0 || vq_check(&stage->queue))
        return;
    chain = &stage->out[take(input, 1) % stage->outs];
    use(stage, chain);
    vq_push(&stage->queue, chain, (uint32_t)chain->writable);
    vq_publish(&stage->queue);
    vq_chain_free(chain);
    *chain = stage->out[--stage->outs];
}

static void operate(struct stage *stage, struct input *input)
{
    switch (take(input, 1) % 16) {
    case 0: case 1: case 2: case 3: describe(stage, input); break;
    case 4: case 5: case 6: offer(stage, input); break;
    case 7: poke(stage, input); break;
    case 8: case 9: case 10: pop(stage); break;
    case 11: case 12: push(stage, input); break;
    case 13: vq_should_notify(&stage->queue); break;
    case 14: vq_enable_kicks(&stage->queue); vq_disable_kicks(&stage->queue); break;
    default: remap(stage, input);
    }
}

static bool begin(struct stage *stage, struct input *input)
{
    uint32_t kind = take(input, 1), size = 1 + take(input, 1) % MAX_SIZE;
    uint64_t features = (uint64_t)(kind & 3) << 28 | (kind & 4 ? VQ_PACKED : 0);

    if (!(features & VQ_PACKED))
        size = 1u << (size % 7);
    open_stage(stage);
    for (uint32_t i = 0; i < 2 * MAX_SIZE; i++) { /* the table too */
        struct vq_entry good = {0x2000 + 64 * i, 64, i % 3 ? VQ_F_WRITE : 0, 0};

        if (features & VQ_PACKED)
            good = vq_swapped(good);
        memcpy(stage->blocks[0] + (i < MAX_SIZE ? DESC : TABLE) + 16 * (i % MAX_SIZE),
               &good, 16);
    }
    return vq_open(&stage->queue, &stage->space, size,
                   (struct vq_addresses){DESC, DRIVER, DEVICE}, features, NULL) == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
    static struct stage stage;
    struct input input = {data, data + length};

    stage = (struct stage){.outs = 0};
    check(begin(&stage, &input), "open");
    while (input.at < input.end)
        operate(&stage, &input);
    close_stage(&stage);
    return 0;
}

#ifndef LIBFUZZER

static uint64_t random_state;
static atomic_bool racing;

static uint8_t random_byte(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (uint8_t)(*state >> 32);
}

/* Rewrites the ring for as long as the device looks at it. */
static void *change(void *argument)
{
    uint8_t *ring = (uint8_t *)argument + RING;
    uint64_t state = random_state + 1;

    while (atomic_load(&racing)) {
        uint32_t at = (random_byte(&state) << 8 | random_byte(&state)) % RING_SIZE;

        atomic_store_explicit((_Atomic uint8_t *)(ring + at), random_byte(&state) & 0x87,
                              memory_order_relaxed);
    }
    return NULL;
}

static void race(uint64_t programs)
{
    for (uint64_t n = 0; n < programs; n++) {
        static struct stage stage;
        uint8_t program[512];
        struct input input = {program, program + sizeof(program)};
        pthread_t thread;

        for (size_t i = 0; i < sizeof(program); i++)
            program[i] = random_byte(&random_state);
        stage = (struct stage){.outs = 0};
        check(begin(&stage, &input), "open");
        atomic_store(&racing, true);
        pthread_create(&thread, NULL, change, stage.blocks[0]);
        while (input.at < input.end && !stage.queue.broken) {
            offer(&stage, &input);
            pop(&stage);
            if (stage.outs > 4)
                push(&stage, &input);
        }
        atomic_store(&racing, false);
        pthread_join(thread, NULL);
        close_stage(&stage);
    }
}

static void keep(const char *folder, uint64_t number, const uint8_t *program, size_t size)
{
    char path[4096];
    FILE *file;

    snprintf(path, sizeof(path), "%s/program%llu", folder, (unsigned long long)number);
    file = fopen(path, "wb");
    check(file && fwrite(program, 1, size, file) == size && !fclose(file), path);
}

int main(int argc, char **argv)
{
    uint64_t programs = argc > 2 ? strtoull(argv[1], NULL, 10) : 0;
    uint8_t program[400];

    check(programs > 0, "usage: sanitized_hostile PROGRAMS SEED [race | FOLDER]");
    random_state = strtoull(argv[2], NULL, 10) * 2654435761u + 1;
    if (argc > 3 && strcmp(argv[3], "race") == 0) {
        race(programs);
    } else {
        for (uint64_t n = 0; n < programs; n++) {
            for (size_t i = 0; i < sizeof(program); i++)
                program[i] = random_byte(&random_state);
            if (argc > 3)
                keep(argv[3], n, program, sizeof(program));
            LLVMFuzzerTestOneInput(program, sizeof(program));
        }
    }
    puts("ok");
    return 0;
}

#endif
