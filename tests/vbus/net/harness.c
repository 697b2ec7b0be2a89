/* A program around the plain headers of vbus.net, to be built with sanitizers: reads
 * cases from stdin, writes answers to stdout, so that any slip is a crash.
 *
 * Each case is: u8 what, u32 length, bytes. Each answer: u32 length, bytes.
 *   'C' checksum     u16 start, frame                  -> u16 folded sum
 *   'S' segments     offload (12 bytes), frame         -> (u32 length, bytes)*
 *   'V' hostile      see run_hostile()                 -> the end's counters
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "net/guest.h"
#include "net/host_rx.h"

#define MEMORY (1u << 20)
#define RING_COUNT 16u

static uint8_t out[1 << 22];
static uint32_t out_length;

static void put(const void *from, size_t n)
{
    if (out_length + n > sizeof(out))
        abort();
    memcpy(out + out_length, from, n);
    out_length += (uint32_t)n;
}

static void put_frame(const struct vn_frame *frame)
{
    struct vn_cursor at = vn_cursor_at(frame, 0);
    uint8_t *copy = malloc(frame->len + 1);

    vn_cursor_copy(&at, copy, frame->len);
    put(&frame->len, 4);
    put(copy, frame->len);
    free(copy);
}

/* Describe bytes in pieces of odd sizes, each malloc'ed so that ASan sees its end. */
static struct iovec kept[VN_PIECES];

static void scatter(struct vn_frame *frame, const uint8_t *from, uint32_t length)
{
    uint32_t size = length / (VN_PIECES - 1) + 1;

    *frame = (struct vn_frame){.len = length};
    for (uint32_t done = 0; done < length; done += size) {
        uint32_t part = length - done < size ? length - done : size;

        kept[frame->pieces] = (struct iovec){malloc(part), part};
        memcpy(kept[frame->pieces].iov_base, from + done, part);
        frame->piece[frame->pieces] = kept[frame->pieces];
        frame->pieces++;
    }
    vn_frame_load(frame);
}

static void unscatter(void)
{
    for (size_t i = 0; i < VN_PIECES; i++) {
        free(kept[i].iov_base);
        kept[i] = (struct iovec){0};
    }
}

static void run_checksum(const uint8_t *in, uint32_t length)
{
    struct vn_frame frame;
    uint16_t start, sum;

    memcpy(&start, in, 2);
    scatter(&frame, in + 2, length - 2);
    sum = vn_fold(vn_frame_sum(&frame, start));
    put(&sum, 2);
    unscatter();
}

static void run_segments(const uint8_t *in, uint32_t length)
{
    struct vn_frame frame, segment;
    struct vn_segments it;
    struct vn_offload offload = {0};

    memcpy(&offload.flags, in, 4);
    offload.gso_type = in[4];
    memcpy(&offload.gso_size, in + 6, 2);
    memcpy(&offload.csum_start, in + 8, 2);
    memcpy(&offload.csum_offset, in + 10, 2);
    scatter(&frame, in + 12, length - 12);
    frame.offload = offload;
    if (frame.len >= VN_ETHER_HEADER && vn_offload_check(&frame) == 0) {
        if (!(frame.offload.flags & VN_SG_GSO)) {
            vn_offload_checksum(&frame);
            put_frame(&frame);
        } else {
            vn_segments_begin(&it, &frame);
            while (vn_segments_next(&it, &segment)) {
                vn_offload_checksum(&segment);
                put_frame(&segment);
            }
        }
    }
    unscatter();
}

/* ---- a host end over memory that the input fills ---- */

enum { AT_TX = 0x1000, AT_RX = 0x2000, AT_PAGES = 0x3000, AT_EVENTS = 0x4000,
       AT_TX_POOL = 0x5000, AT_RX_POOL = 0x7000, AT_EVENT_POOL = 0x9000,
       AT_DATA = 0x10000 };

struct world {
    int fd;
    struct vb_space space;
    struct vb_view views[7];
    struct vb_ring rings[4];
    struct vn_host host;
    struct vn_batch batch;
};

static bool world_attach(struct world *world)
{
    static const struct { uint64_t at, size; } place[7] = {
        {AT_TX, 0}, {AT_RX, 0}, {AT_PAGES, 0}, {AT_EVENTS, 0},
        {AT_TX_POOL, 320 * RING_COUNT}, {AT_RX_POOL, 320 * RING_COUNT},
        {AT_EVENT_POOL, 24 * RING_COUNT}};
    bool fine = true;

    for (int i = 0; i < 7; i++)
        if (vb_view_open(&world->views[i], &world->space, place[i].at,
                         place[i].size ? place[i].size : vb_ring_size(RING_COUNT), true))
            abort();
    for (int i = 0; i < 4; i++)
        if (vb_ring_attach(&world->rings[i], &world->views[i], &world->space, VB_SOUTH, 2048))
            fine = false;
    return fine;
}

/* Two regions with a border in the middle of the data, and nothing behind. */
static void world_open(struct world *world, const uint8_t *image, uint32_t length)
{
    uint8_t *map;

    world->fd = memfd_create("guest", 0);
    if (world->fd < 0 || ftruncate(world->fd, MEMORY))
        abort();
    if (vb_space_map(&world->space, 0, MEMORY / 2, world->fd, 0, true) ||
        vb_space_map(&world->space, MEMORY / 2, MEMORY / 2, world->fd, MEMORY / 2, true))
        abort();
    map = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, world->fd, 0);
    if (map == MAP_FAILED)
        abort();
    memcpy(map + AT_TX, image, length < MEMORY - AT_TX ? length : MEMORY - AT_TX);
    for (int i = 0; i < 4; i++) { /* heads that attach() takes: the rest is the input's */
        struct vb_ioq *ring = (struct vb_ioq *)(map + AT_TX + 0x1000 * i);

        ring->magic = VB_RING_MAGIC;
        ring->version = VB_RING_VERSION;
        memcpy(ring->signal, (const uint32_t[]){VB_SIG_MAGIC, VB_SIG_VERSION}, 8);
        ring->count = RING_COUNT;
    }
    munmap(map, MEMORY);
}

static void world_close(struct world *world)
{
    for (int i = 0; i < 7; i++)
        vb_view_close(&world->views[i]);
    vb_space_clear(&world->space);
    close(world->fd);
    free(world->host.record);
}

static void pump(struct world *world)
{
    struct vn_host *host = &world->host;

    for (int turn = 0; turn < 8; turn++) {
        if (vn_host_collect(host, &world->batch) < 0)
            return;
        if (vn_host_deliver(host, &world->batch, 0, world->batch.count) < 0 ||
            vn_host_release(host) < 0 || vn_host_flush_events(host) < 0)
            return;
    }
    vn_host_flush_rx(host);
}

/* u8 tx caps, u8 rx caps, u8 txc, u8 mitigation, then the image of memory from AT_TX */
static void run_hostile(const uint8_t *in, uint32_t length)
{
    struct world *world = calloc(1, sizeof(*world));
    struct vn_host *host = &world->host;
    const char *fault = "";

    world_open(world, in + 4, length - 4);
    if (world_attach(world)) {
        *host = (struct vn_host){
            .tx = &world->rings[0], .rx = &world->rings[1], .pages = &world->rings[2],
            .events = &world->rings[3], .tx_pool = &world->views[4],
            .rx_pool = &world->views[5], .event_pool = &world->views[6], .mtu = 1500,
            .tx_caps = in[0], .rx_caps = in[1], .txc = in[2], .mitigation = in[3],
            .told = true, .up = true,
            .record = calloc(1, sizeof(struct vn_record))};
        pump(world);
    }
    put(&host->counters, sizeof(host->counters));
    put(&world->rings[0].injects, 8);
    for (int i = 0; i < 4; i++)
        fault = world->rings[i].fault ? world->rings[i].fault : fault;
    put(fault, strlen(fault));
    world_close(world);
    free(world);
}

int main(void)
{
    uint8_t what;
    uint32_t length;

    while (fread(&what, 1, 1, stdin) == 1 && fread(&length, 4, 1, stdin) == 1) {
        uint8_t *in = malloc(length ? length : 1); /* exact: ASan guards its end */

        if (fread(in, 1, length, stdin) != length)
            return 2;
        out_length = 0;
        if (what == 'C')
            run_checksum(in, length);
        else if (what == 'S')
            run_segments(in, length);
        else
            run_hostile(in, length);
        fwrite(&out_length, 4, 1, stdout);
        fwrite(out, 1, out_length, stdout);
        fflush(stdout);
        free(in);
    }
    return 0;
}
