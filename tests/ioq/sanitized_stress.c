/* Both ends of two rings as threads of one process, to run under a sanitizer.
 *
 * Ring one carries numbers from north to south, ring two carries them back into buffers
 * that north posts; south passes them on with vb_ring_forward or by hand. Batches have
 * random sizes, ends mask and unmask at random, and sleep on eventfds. A sleeper that
 * has work and gets no doorbell is a lost wake-up.
 *
 * Usage: sanitized_stress MESSAGES SEED
 */
#include <ioq/batch.h>

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/eventfd.h>

enum { COUNT = 64, SLOT = 64, MEMORY = 1 << 16, PATIENCE_MS = 5000 };
enum { RING_OUT = 0, RING_BACK = 0x1000, BUFFERS_OUT = 0x4000, BUFFERS_BACK = 0x8000 };

struct end {
    struct vb_ring ring;
    struct vb_view view;
    int which; /* VB_HEAD: consumer, VB_TAIL: producer */
    int bell, peer;
    uint64_t *random;
};

static uint64_t messages;

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint32_t dice(struct end *end, uint32_t sides)
{
    *end->random ^= *end->random << 13;
    *end->random ^= *end->random >> 7;
    *end->random ^= *end->random << 17;
    return (uint32_t)(*end->random % sides);
}

static bool rung(int bell)
{
    struct pollfd wait = {.fd = bell, .events = POLLIN};
    uint64_t count;

    if (poll(&wait, 1, PATIENCE_MS) != 1)
        return false;
    if (read(bell, &count, sizeof(count)) != sizeof(count))
        fail("doorbell");
    return true;
}

static void sleep_on(struct end *end)
{
    while (!rung(end->bell))
        if (vb_ring_owned(&end->ring, VB_INUSE, end->which) && !rung(end->bell))
            fail("lost wake-up");
}

static void wait_for(struct end *end)
{
    uint8_t *desc = end->ring.shared->signal;

    if (dice(end, 4) == 0)
        vb_sig_enable(desc, end->ring.me);
    vb_ring_disable(&end->ring);
    while (!vb_ring_owned(&end->ring, VB_INUSE, end->which)) {
        if (dice(end, 4) == 0)
            vb_ring_spin(&end->ring, VB_INUSE, end->which, 2000);
        if (!vb_ring_arm(&end->ring, VB_INUSE, end->which))
            sleep_on(end);
        vb_ring_disable(&end->ring);
    }
    if (end->ring.fault)
        fail(end->ring.fault);
}

static void signal_peer(struct end *end)
{
    const uint64_t one = 1;

    if (vb_ring_inject(&end->ring) && write(end->peer, &one, sizeof(one)) != sizeof(one))
        fail("doorbell");
}

static uint32_t batch(struct end *end, uint64_t left)
{
    uint32_t n = 1 + dice(end, COUNT + 8);

    return n < left ? n : (uint32_t)left;
}

static void open_end(struct end *end, struct vb_space *space, int which, int me,
                     uint64_t at, int bell, int peer, uint64_t *random)
{
    if (vb_view_open(&end->view, space, at, vb_ring_size(COUNT), true))
        fail("view");
    if (vb_ring_attach(&end->ring, &end->view, space, me, COUNT))
        fail("attach");
    end->which = which;
    end->bell = bell;
    end->peer = peer;
    end->random = random;
}

/* North sends in one direction and takes back in the other, in one thread. */
static uint64_t send_some(struct end *out, uint64_t sent)
{
    uint64_t payload[COUNT + 8];
    uint32_t n = batch(out, messages - sent);
    long taken;

    for (uint32_t i = 0; i < n; i++)
        payload[i] = sent + i;
    taken = vb_ring_produce(&out->ring, (uint8_t *)payload,
                            (struct vb_sizes){.equal = sizeof(*payload)}, n,
                            (struct vb_slots){BUFFERS_OUT, SLOT});
    if (taken < 0)
        fail(out->ring.fault);
    signal_peer(out);
    return sent + (uint64_t)taken;
}

static uint64_t take_some(struct end *back, uint64_t seen)
{
    uint64_t payload[COUNT + 8];
    uint32_t sizes[COUNT + 8];
    long taken = vb_ring_consume(&back->ring, (uint8_t *)payload, sizeof(payload), sizes,
                                 batch(back, COUNT), SLOT);

    if (taken < 0)
        fail(back->ring.fault);
    for (long i = 0; i < taken; i++)
        if (payload[i] != seen + (uint64_t)i || sizes[i] != sizeof(*payload))
            fail("lost or reordered");
    signal_peer(back);
    return seen + (uint64_t)taken;
}

static void *sender(void *argument)
{
    struct end *out = argument;

    for (uint64_t sent = 0; sent < messages; sent = send_some(out, sent))
        wait_for(out);
    return NULL;
}

static void *receiver(void *argument)
{
    struct end *back = argument;

    for (uint64_t seen = 0; seen < messages; seen = take_some(back, seen))
        wait_for(back);
    return NULL;
}

static void *echo(void *argument)
{
    struct end *in = argument, *out = in + 1;
    uint64_t passed = 0, dropped = 0;

    while (passed < messages) {
        long moved;

        wait_for(in);
        wait_for(out);
        moved = vb_ring_forward(&in->ring, &out->ring, batch(in, COUNT), &dropped);
        if (moved < 0)
            fail("fault while forwarding");
        signal_peer(in);
        signal_peer(out);
        passed += (uint64_t)moved;
    }
    return NULL;
}

static void post_buffers(struct vb_ring *ring)
{
    for (uint32_t i = 0; i < COUNT; i++) {
        struct vb_desc desc = {i, BUFFERS_BACK + i * SLOT, SLOT, true};

        vb_ring_set(ring, VB_VALID, VB_TAIL, i, &desc);
    }
    if (vb_ring_push(ring, VB_VALID, COUNT, 0))
        fail("push");
}

int main(int argc, char **argv)
{
    struct vb_space spaces[3] = {{0}}; /* one for each thread: they are not shared */
    struct vb_view fresh;
    struct end north_out, north_back, south[2];
    uint64_t random[3];
    pthread_t threads[3];
    int memory = memfd_create("stress", 0), bells[4];

    if (argc != 3 || memory < 0 || ftruncate(memory, MEMORY))
        fail("usage: sanitized_stress MESSAGES SEED");
    messages = strtoull(argv[1], NULL, 10);
    for (int i = 0; i < 3; i++)
        random[i] = strtoull(argv[2], NULL, 10) * 2654435761u + (uint64_t)i + 1;
    for (int i = 0; i < 4; i++)
        bells[i] = eventfd(0, EFD_CLOEXEC);
    if (vb_space_map(&spaces[0], 0, MEMORY, memory, 0, true))
        fail("map");
    for (int i = 1; i < 3; i++) {
        /* The same mapping for all, or the sanitizer would see different memory. */
        if (vb_space_map(&spaces[i], 0, MEMORY, -1, 0, true))
            fail("map");
        spaces[i].regions[0]->host = spaces[0].regions[0]->host;
    }
    for (uint64_t at = RING_OUT; at <= RING_BACK; at += RING_BACK) {
        if (vb_view_open(&fresh, &spaces[0], at, vb_ring_size(COUNT), true) ||
            vb_ring_format(&fresh, COUNT))
            fail("format");
        vb_view_close(&fresh);
    }
    open_end(&north_out, &spaces[0], VB_TAIL, VB_NORTH, RING_OUT, bells[0], bells[1],
             &random[0]);
    open_end(&north_back, &spaces[1], VB_HEAD, VB_NORTH, RING_BACK, bells[2], bells[3],
             &random[1]);
    open_end(&south[0], &spaces[2], VB_HEAD, VB_SOUTH, RING_OUT, bells[1], bells[0],
             &random[2]);
    open_end(&south[1], &spaces[2], VB_TAIL, VB_SOUTH, RING_BACK, bells[3], bells[2],
             &random[2]);
    post_buffers(&north_back.ring);
    pthread_create(&threads[0], NULL, sender, &north_out);
    pthread_create(&threads[1], NULL, receiver, &north_back);
    pthread_create(&threads[2], NULL, echo, south);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    vb_view_close(&north_out.view);
    vb_view_close(&north_back.view);
    vb_view_close(&south[0].view);
    vb_view_close(&south[1].view);
    for (int i = 2; i >= 0; i--) {
        if (i)
            spaces[i].regions[0]->host = NULL;
        vb_space_clear(&spaces[i]);
    }
    puts("ok");
    return 0;
}
