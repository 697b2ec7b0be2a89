/* Both ends of a virtqueue as threads of one process, to run under a sanitizer.
 *
 * Every chain carries a number and brings it back; the device gives chains back in any
 * order. Batches have random sizes, either end asks for notifications or not at random,
 * and sleeps on an eventfd. A sleeper that has work and gets no doorbell is a lost
 * notification.
 *
 * Usage: sanitized_queue FEATURES SIZE CHAINS SEED
 */
#include <virtio/driver.h>
#include <virtio/queue.h>

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/eventfd.h>

#ifndef PATIENCE_MS
#define PATIENCE_MS 2000 /* a peer may lose its core for long, between work and bell */
#endif

enum { MEMORY = 1 << 20, MAX = 256, ENTRIES = 4, SLOT = 256 };
enum { DESC = 0x1000, DRIVER = 0x3000, DEVICE = 0x4000, TABLES = 0x8000, DATA = 0x40000 };

struct end {
    int bell, peer;
    uint64_t random;
};

static uint64_t chains;
static uint32_t ring_size;

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint32_t dice(struct end *end, uint32_t sides)
{
    end->random ^= end->random << 13;
    end->random ^= end->random >> 7;
    end->random ^= end->random << 17;
    return (uint32_t)(end->random % sides);
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

static void ring_bell(int bell)
{
    const uint64_t one = 1;

    if (write(bell, &one, sizeof(one)) != sizeof(one))
        fail("doorbell");
}

/* ---- the driver ---- */

struct driver {
    struct end end;
    struct vd queue;
    struct vb_space space;
    uint64_t number[MAX]; /* by id */
    uint32_t slot[MAX], spare[MAX], spares;
    uint64_t sent, back;
};

static uint8_t *slot_host(struct driver *driver, uint32_t slot)
{
    return vb_space_ptr(&driver->space, DATA + SLOT * slot, SLOT, true);
}

/* Add one chain of one to four buffers: 8 bytes to read, and 8 to write. */
static bool send_one(struct driver *driver)
{
    uint32_t slot = driver->spares ? driver->spare[driver->spares - 1] : 0;
    uint64_t at = DATA + SLOT * slot;
    uint32_t cut = dice(&driver->end, 8), n = 0, out;
    struct vd_buffer buffers[4];
    long id;

    if (driver->sent == chains || driver->spares == 0)
        return false;
    memcpy(slot_host(driver, slot), &driver->sent, 8);
    if (cut && driver->queue.size > 3) {
        buffers[n++] = (struct vd_buffer){at, cut};
        buffers[n++] = (struct vd_buffer){at + cut, 8 - cut};
    } else {
        buffers[n++] = (struct vd_buffer){at, 8};
    }
    out = n;
    buffers[n++] = (struct vd_buffer){at + 64, 8};
    id = vd_add(&driver->queue, buffers, n, out);
    if (id == -EAGAIN)
        return false;
    if (id < 0)
        fail("add");
    driver->number[id] = driver->sent++;
    driver->slot[id] = slot;
    driver->spares--;
    return true;
}

static bool collect_one(struct driver *driver)
{
    uint32_t written;
    uint64_t answer;
    long id = vd_collect(&driver->queue, &written);

    if (id == -EAGAIN)
        return false;
    if (id < 0)
        fail(driver->queue.broken);
    memcpy(&answer, slot_host(driver, driver->slot[id]) + 64, 8);
    if (written != 8 || answer != ~driver->number[id])
        fail("a wrong answer");
    driver->spare[driver->spares++] = driver->slot[id];
    driver->back++;
    return true;
}

static void *drive(void *argument)
{
    struct driver *driver = argument;

    while (driver->back < chains) {
        uint32_t moves = 0;

        for (uint32_t n = 1 + dice(&driver->end, 40); n > 0 && send_one(driver); n--)
            moves++;
        vd_publish(&driver->queue);
        if (vd_kick_needed(&driver->queue))
            ring_bell(driver->end.peer);
        for (uint32_t n = 1 + dice(&driver->end, 40); n > 0 && collect_one(driver); n--)
            moves++;
        if (dice(&driver->end, 4) == 0)
            vd_disable(&driver->queue);
        if (moves || driver->back == chains || vd_enable(&driver->queue))
            continue;
        while (!rung(driver->end.bell))
            if (vd_ready(&driver->queue) && !rung(driver->end.bell))
                fail("lost interrupt");
    }
    return NULL;
}

/* ---- the device ---- */

struct device {
    struct end end;
    struct vq queue;
    struct vb_space space;
    struct vq_chain out[MAX];
    uint32_t outs;
    uint64_t done;
};

static bool take_one(struct device *device)
{
    struct vq_chain chain = {.segs = NULL};
    int got = vq_pop(&device->queue, &chain);
    uint64_t number;

    if (got < 0)
        fail(device->queue.broken ? device->queue.broken : "no memory");
    if (got == 0)
        return false;
    if (chain.readable != 8 || chain.writable != 8)
        fail("a wrong chain");
    vq_chain_copy(&chain, false, 0, (uint8_t *)&number, 8);
    number = ~number;
    vq_chain_copy(&chain, true, 0, (uint8_t *)&number, 8);
    device->out[device->outs++] = chain;
    return true;
}

static void give_one(struct device *device)
{
    uint32_t which = dice(&device->end, device->outs);

    vq_push(&device->queue, &device->out[which], 8);
    vq_chain_free(&device->out[which]);
    device->out[which] = device->out[--device->outs];
    device->done++;
}

static void *serve(void *argument)
{
    struct device *device = argument;

    while (device->done < chains) {
        uint32_t taken = 0, gives;

        for (uint32_t n = dice(&device->end, 40); n > 0 && take_one(device); n--)
            taken++;
        gives = taken ? dice(&device->end, device->outs + 1) : device->outs;
        for (uint32_t n = gives; n > 0; n--)
            give_one(device);
        vq_publish(&device->queue);
        if (vq_should_notify(&device->queue))
            ring_bell(device->end.peer);
        if (dice(&device->end, 4) == 0)
            vq_disable_kicks(&device->queue);
        if (taken || gives || device->done == chains || vq_enable_kicks(&device->queue))
            continue;
        while (!rung(device->end.bell))
            if (take_one(device) && !rung(device->end.bell))
                fail("lost kick");
    }
    return NULL;
}

static void map(struct driver *driver, struct device *device, int memory)
{
    if (vb_space_map(&driver->space, 0, MEMORY, memory, 0, true) ||
        vb_space_map(&device->space, 0, MEMORY, -1, 0, true))
        fail("map");
    /* The same mapping for both, or the sanitizer would see different memory. */
    device->space.regions[0]->host = driver->space.regions[0]->host;
}

int main(int argc, char **argv)
{
    static struct driver driver;
    static struct device device;
    const struct vq_addresses at = {DESC, DRIVER, DEVICE};
    int memory = memfd_create("stress", 0);
    pthread_t threads[2];
    uint64_t features, seed;

    if (argc != 5 || memory < 0 || ftruncate(memory, MEMORY))
        fail("usage: sanitized_queue FEATURES SIZE CHAINS SEED");
    features = strtoull(argv[1], NULL, 0);
    ring_size = (uint32_t)strtoul(argv[2], NULL, 10);
    chains = strtoull(argv[3], NULL, 10);
    seed = strtoull(argv[4], NULL, 10) * 2654435761u;
    map(&driver, &device, memory);
    if (vd_open(&driver.queue, &driver.space, ring_size, at, features, TABLES, ENTRIES) ||
        vq_open(&device.queue, &device.space, ring_size, at, features, NULL))
        fail("open");
    for (uint32_t i = 0; i < ring_size; i++)
        driver.spare[driver.spares++] = i;
    driver.end = (struct end){eventfd(0, 0), eventfd(0, 0), seed + 1};
    device.end = (struct end){driver.end.peer, driver.end.bell, seed + 2};
    pthread_create(&threads[0], NULL, drive, &driver);
    pthread_create(&threads[1], NULL, serve, &device);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    vd_close(&driver.queue);
    vq_close(&device.queue);
    device.space.regions[0]->host = NULL;
    vb_space_clear(&device.space);
    vb_space_clear(&driver.space);
    puts("ok");
    return 0;
}
