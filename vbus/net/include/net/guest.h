/* North end of a venet connection, the driver's side: frames from a TAP into the TX ring,
 * frames out of the RX ring. It supplies the buffers of all rings and pools.
 *
 * Frames read from a TAP land in guest memory at once: `arena` is a circular heap of
 * frames that are under way, freed in order. A descriptor's own number is its cookie. The
 * device is not trusted: what it writes into our memory is read once and checked.
 */
#ifndef NET_GUEST_H
#define NET_GUEST_H

#include "net/host.h"
#include "net/tap.h"

#define VN_GUEST_MAX_IOVS 40u

struct vn_guest_counters {
    uint64_t tx_frames, tx_bytes, tx_errors, rx_frames, rx_bytes, rx_errors, bad_events;
};

struct vn_guest {
    struct vb_ring *tx, *rx, *events, *pages;     /* events, pages: or NULL */
    struct vb_view *arena, *buffers;              /* TX frames; RX buffers, one per slot */
    struct vb_view *tx_pool, *rx_pool;            /* venet_sg slots; NULL = flat */
    struct vb_view *event_pool, *page_memory;
    bool pmtd, txc;
    uint32_t page_size, page_count, buffer_size;
    uint32_t tx_slot, rx_slot;                    /* bytes per venet_sg slot */
    uint64_t head, tail;                          /* of the arena, never wrapped */
    uint64_t *tx_end;                             /* per TX descriptor: head behind it */
    uint8_t *tx_done, *page_lent;                 /* per TX descriptor, per page */
    uint32_t oldest, in_flight;
    unsigned taken;
    uint32_t page_back[VN_BATCH * VN_GUEST_MAX_IOVS], pages_back;
    int link;                                     /* -1 unknown, 0 down, 1 up */
    struct vn_frame scratch;
    struct vn_guest_counters counters;
};

static inline int vn_guest_check(struct vn_guest *guest)
{
    struct vb_view *views[] = {guest->arena,   guest->buffers,    guest->tx_pool,
                               guest->rx_pool, guest->event_pool, guest->page_memory};

    for (size_t i = 0; i < sizeof(views) / sizeof(*views); i++)
        if (views[i] && !vb_view_alive(views[i]))
            return vb_ring_fail(guest->rx, "unmapped");
    if (vb_ring_check(guest->tx) || vb_ring_check(guest->rx) ||
        (guest->events && vb_ring_check(guest->events)) ||
        (guest->pages && vb_ring_check(guest->pages)))
        return -EIO;
    return 0;
}

/* ---- receive ---- */

static inline uint32_t vn_guest_rx_number(const struct vn_guest *guest, int end,
                                          uint32_t nth)
{
    return vb_ring_at(guest->rx, end == VB_TAIL ? VB_VALID : VB_INUSE, end, nth);
}

/* Make RX descriptor `nth` from `end` an empty buffer again. */
static inline void vn_guest_prepare_rx(struct vn_guest *guest, int end, uint32_t nth)
{
    uint32_t number = vn_guest_rx_number(guest, end, nth);
    uint64_t buffer = guest->buffers->addr + (uint64_t)number * guest->buffer_size;
    struct vb_desc desc = {number, buffer, guest->buffer_size, true};

    if (guest->rx_pool) {
        struct vn_sg_copy copy = {.sg = {.cookie = number, .count = 1}};
        uint64_t offset = (uint64_t)number * guest->rx_slot;

        copy.iov[0] = (struct vn_iov){.len = guest->buffer_size, .ptr = buffer};
        memcpy(guest->rx_pool->host + offset, &copy, sizeof(copy.sg) + sizeof(*copy.iov));
        desc.ptr = offset;
        desc.len = guest->rx_slot;
    }
    vb_ring_set(guest->rx, end == VB_TAIL ? VB_VALID : VB_INUSE, end, nth, &desc);
}

/* Give page `page` to the host as the nth new one of the page queue: 0 or -EIO. */
static inline int vn_guest_lend_page(struct vn_guest *guest, uint32_t page, uint32_t nth)
{
    struct vb_desc desc;

    if (vb_ring_peek(guest->pages, VB_INUSE, VB_TAIL, nth, &desc) <= 0)
        return vb_ring_fail(guest->pages, "page-not-returned");
    desc = (struct vb_desc){
        page, guest->page_memory->addr + (uint64_t)page * guest->page_size,
        guest->page_size, false};
    vb_ring_set(guest->pages, VB_INUSE, VB_TAIL, nth, &desc);
    guest->page_lent[page] = 1;
    return 0;
}

static inline int vn_guest_post_events(struct vn_guest *guest)
{
    for (uint32_t i = 0; i < guest->events->count; i++) {
        struct vb_desc desc = {i, (uint64_t)i * VN_EVENT_SIZE, VN_EVENT_SIZE, false};

        vb_ring_set(guest->events, VB_VALID, VB_TAIL, i, &desc);
    }
    return vb_ring_push(guest->events, VB_VALID, guest->events->count, 0);
}

/* Fill all rings with empty buffers, once: 0 or -EIO. */
static inline int vn_guest_post(struct vn_guest *guest)
{
    if (vn_guest_check(guest))
        return -EIO;
    for (uint32_t i = 0; i < guest->rx->count; i++)
        vn_guest_prepare_rx(guest, VB_TAIL, i);
    if (vb_ring_push(guest->rx, VB_VALID, guest->rx->count, 0))
        return -EIO;
    if (guest->events && vn_guest_post_events(guest))
        return -EIO;
    if (!guest->pages)
        return 0;
    for (uint32_t i = 0; i < guest->page_count; i++)
        if (vn_guest_lend_page(guest, i, i))
            return -EIO;
    return vb_ring_push(guest->pages, VB_INUSE, guest->page_count, 0);
}

static inline int vn_guest_take_flat(struct vn_guest *guest, uint32_t number,
                                     const struct vb_desc *desc, struct vn_frame *frame)
{
    if (desc->len > guest->buffer_size)
        return vb_ring_fail(guest->rx, "rx-length");
    frame->offload = (struct vn_offload){0};
    frame->len = (uint32_t)desc->len;
    frame->pieces = 1;
    frame->piece[0] = (struct iovec){
        guest->buffers->host + (uint64_t)number * guest->buffer_size, desc->len};
    return 0;
}

/* One page that the device put into a frame. */
static inline int vn_guest_take_page(struct vn_guest *guest, const struct vn_iov *iov,
                                     struct vn_frame *frame)
{
    if (iov->ptr >= guest->page_count || !guest->page_lent[iov->ptr] ||
        iov->len > guest->page_size || iov->len == 0)
        return vb_ring_fail(guest->rx, "rx-page");
    guest->page_lent[iov->ptr] = 0;
    guest->page_back[guest->pages_back++] = (uint32_t)iov->ptr;
    frame->piece[frame->pieces++] = (struct iovec){
        guest->page_memory->host + iov->ptr * guest->page_size, iov->len};
    return 0;
}

static inline int vn_guest_take_sg(struct vn_guest *guest, uint32_t number,
                                   struct vn_frame *frame)
{
    const uint8_t *slot = guest->rx_pool->host + (uint64_t)number * guest->rx_slot;
    uint32_t room = (guest->rx_slot - (uint32_t)sizeof(struct vn_sg)) / 16u;
    struct vn_iov iov[VN_GUEST_MAX_IOVS];
    struct vn_sg sg;
    uint64_t sum;

    memcpy(&sg, slot, sizeof(sg));
    frame->len = sg.len;
    if (sg.len == 0)
        return 0;
    if (sg.count == 0 || sg.count > room || sg.count > VN_GUEST_MAX_IOVS)
        return vb_ring_fail(guest->rx, "rx-count");
    memcpy(iov, slot + sizeof(sg), sg.count * sizeof(*iov));
    if (iov[0].len > guest->buffer_size)
        return vb_ring_fail(guest->rx, "rx-length");
    frame->pieces = iov[0].len > 0;
    frame->piece[0] = (struct iovec){
        guest->buffers->host + (uint64_t)number * guest->buffer_size, iov[0].len};
    sum = iov[0].len;
    for (uint32_t i = 1; i < sg.count; i++) {
        if (vn_guest_take_page(guest, &iov[i], frame))
            return -EIO;
        sum += iov[i].len;
    }
    if (sum != sg.len)
        return vb_ring_fail(guest->rx, "rx-length");
    frame->offload = (struct vn_offload){.flags = sg.flags, .gso_type = sg.gso_type,
                                         .gso_size = sg.gso_size,
                                         .csum_start = sg.csum_start,
                                         .csum_offset = sg.csum_offset};
    return 0;
}

/* Describe received frames in `batch`: the number of descriptors, or -EIO. */
static inline int vn_guest_collect(struct vn_guest *guest, struct vn_batch *batch)
{
    batch->count = 0;
    guest->taken = 0;
    guest->pages_back = 0;
    if (vn_guest_check(guest))
        return -EIO;
    while (guest->taken < VN_BATCH) {
        struct vn_frame *frame = &batch->frame[batch->count];
        uint32_t number = vn_guest_rx_number(guest, VB_HEAD, guest->taken);
        struct vb_desc desc;

        if (vb_ring_peek(guest->rx, VB_INUSE, VB_HEAD, guest->taken, &desc) <= 0)
            break;
        if (guest->rx_pool ? vn_guest_take_sg(guest, number, frame)
                           : vn_guest_take_flat(guest, number, &desc, frame))
            return -EIO;
        guest->taken++;
        if (frame->len == 0) /* flushed */
            continue;
        vn_frame_load(frame);
        if (frame->len < VN_ETHER_HEADER || vn_offload_check(frame)) {
            guest->counters.rx_errors++;
            continue;
        }
        guest->counters.rx_frames++;
        guest->counters.rx_bytes += frame->len;
        batch->count++;
    }
    return (int)guest->taken;
}

/* Hand the buffers of the collected frames back, without a signal: how many pages were
 * among them, or -EIO. */
static inline int vn_guest_release(struct vn_guest *guest)
{
    unsigned taken = guest->taken;
    uint32_t pages = guest->pages_back;

    guest->taken = guest->pages_back = 0;
    if (taken == 0)
        return 0;
    if (vn_guest_check(guest))
        return -EIO;
    for (uint32_t i = 0; i < pages; i++)
        if (vn_guest_lend_page(guest, guest->page_back[i], i))
            return -EIO;
    if (pages > 0 && vb_ring_push(guest->pages, VB_INUSE, pages, 0))
        return -EIO;
    for (uint32_t i = 0; i < taken; i++)
        vn_guest_prepare_rx(guest, VB_HEAD, i);
    return vb_ring_pop(guest->rx, VB_INUSE, taken, 0) ? -EIO : (int)pages;
}

/* ---- transmit ---- */

static inline int vn_guest_tx_index(const struct vn_guest *guest)
{
    return guest->txc ? VB_INUSE : VB_VALID;
}

static inline void vn_guest_free_oldest(struct vn_guest *guest)
{
    guest->tail = guest->tx_end[guest->oldest];
    guest->tx_done[guest->oldest] = 0;
    guest->oldest = guest->oldest + 1 == guest->tx->count ? 0 : guest->oldest + 1;
    if (--guest->in_flight == 0)
        guest->head = guest->tail = 0; /* begin anew where the cache is warm */
}

static inline void vn_guest_take_event(struct vn_guest *guest, const uint8_t *at)
{
    struct vn_event_txc event;
    uint64_t age;

    memcpy(&event, at, sizeof(event));
    if (event.header.id == VN_EVENT_LINKSTATE) {
        guest->link = (event.txqid & 0xff) != 0; /* `state` lies there */
        return;
    }
    if (event.header.id == VN_EVENT_TXC && guest->txc && event.cookie < guest->tx->count) {
        age = event.cookie + guest->tx->count - guest->oldest;
        if (age % guest->tx->count < guest->in_flight && !guest->tx_done[event.cookie]) {
            guest->tx_done[event.cookie] = 1;
            return;
        }
    }
    guest->counters.bad_events++;
}

/* Take what the event ring holds: how many events, or -EIO. */
static inline int vn_guest_take_events(struct vn_guest *guest)
{
    struct vb_desc desc;
    uint32_t n = 0;

    while (n < guest->events->count &&
           vb_ring_peek(guest->events, VB_INUSE, VB_HEAD, n, &desc) > 0) {
        uint32_t number = vb_ring_at(guest->events, VB_INUSE, VB_HEAD, n);

        vn_guest_take_event(guest,
                            guest->event_pool->host + (uint64_t)number * VN_EVENT_SIZE);
        n++;
    }
    return vb_ring_pop(guest->events, VB_INUSE, n, 0) ? -EIO : (int)n;
}

static inline int vn_guest_reap_ring(struct vn_guest *guest)
{
    struct vb_desc desc;
    uint32_t n = 0;

    while (n < guest->in_flight &&
           vb_ring_peek(guest->tx, VB_VALID, VB_HEAD, n, &desc) > 0) {
        vb_ring_set_valid(guest->tx, VB_VALID, VB_HEAD, n, false);
        n++;
    }
    if (vb_ring_pop(guest->tx, VB_VALID, n, VB_KEEP_OWNER))
        return -EIO;
    for (; n > 0; n--)
        vn_guest_free_oldest(guest);
    return 0;
}

/* Free what the host has done with, take events: how many events, or -EIO. */
static inline int vn_guest_reap(struct vn_guest *guest)
{
    int events;

    if (vn_guest_check(guest))
        return -EIO;
    events = guest->events ? vn_guest_take_events(guest) : 0;
    if (events < 0)
        return events;
    if (!guest->txc)
        return vn_guest_reap_ring(guest) ? -EIO : events;
    while (guest->in_flight > 0 && guest->tx_done[guest->oldest])
        vn_guest_free_oldest(guest);
    return events;
}

/* Room for one more frame of up to `size` bytes: where, or NULL. */
static inline uint8_t *vn_guest_room(struct vn_guest *guest, uint32_t size)
{
    struct vb_desc desc;
    uint64_t at = guest->head % guest->arena->size, head = guest->head;

    if (guest->in_flight == guest->tx->count ||
        vb_ring_peek(guest->tx, vn_guest_tx_index(guest), VB_TAIL, 0, &desc) <= 0)
        return NULL;
    if (guest->arena->size - at < size)
        head += guest->arena->size - at;
    if (head + size - guest->tail > guest->arena->size)
        return NULL;
    guest->head = head;
    return guest->arena->host + head % guest->arena->size;
}

/* Push the frame of `len` bytes that lies at the arena's head: 0 or -EIO. The owner of
 * one descriptor is flipped at a time: the host may begin while we go on reading. */
static inline int vn_guest_push(struct vn_guest *guest, uint32_t len,
                                const struct vn_offload *offload)
{
    int index = vn_guest_tx_index(guest);
    uint32_t number = vb_ring_at(guest->tx, index, VB_TAIL, 0);
    uint64_t addr = guest->arena->addr + guest->head % guest->arena->size;
    struct vb_desc desc = {number, addr, len, true};

    if (guest->tx_pool) {
        struct vn_sg_copy copy = {
            .sg = {.cookie = number, .flags = offload->flags, .len = len,
                   .csum_start = offload->csum_start,
                   .csum_offset = offload->csum_offset,
                   .gso_type = offload->gso_type, .gso_hdrlen = offload->hdr_len,
                   .gso_size = offload->gso_size, .count = 1}};
        uint64_t offset = (uint64_t)number * guest->tx_slot;

        copy.iov[0] = (struct vn_iov){.len = len, .ptr = addr};
        desc.len = sizeof(copy.sg) + sizeof(*copy.iov);
        memcpy(guest->tx_pool->host + offset, &copy, desc.len);
        desc.ptr = guest->pmtd ? offset : guest->tx_pool->addr + offset;
    }
    guest->head += ((uint64_t)len + 63) & ~(uint64_t)63;
    guest->tx_end[number] = guest->head;
    vb_ring_set(guest->tx, index, VB_TAIL, 0, &desc);
    guest->in_flight++;
    guest->counters.tx_frames++;
    guest->counters.tx_bytes += len;
    return vb_ring_push(guest->tx, index, 1, guest->txc ? 0 : VB_BOTH);
}

static inline uint32_t vn_guest_max_frame(const struct vn_guest *guest)
{
    return guest->tx_pool ? VN_MAX_GSO : guest->buffer_size;
}

/* Is there no room for one more frame? Then wait for completions. */
static inline bool vn_guest_full(struct vn_guest *guest)
{
    return vn_guest_room(guest, vn_guest_max_frame(guest)) == NULL;
}

/* Read up to `limit` frames from the TAP into guest memory and push them, without a
 * signal: their number, or -errno. */
static inline int vn_guest_pull(struct vn_guest *guest, struct vn_tap *tap, int limit)
{
    uint32_t room = vn_guest_max_frame(guest);
    int n = 0;

    if (vn_guest_check(guest))
        return -EIO;
    while (n < limit) {
        uint8_t *to = vn_guest_room(guest, room);
        ssize_t got = to ? vn_tap_read(tap, to, room, &guest->scratch) : 0;

        if (got == 0)
            break;
        if (got == -EBADMSG)
            continue;
        if (got < 0)
            return (int)got;
        if (vn_guest_push(guest, (uint32_t)got, &guest->scratch.offload))
            return -EIO;
        n++;
    }
    return n;
}

/* Copy frames of a batch into guest memory and push them, without a signal: how many
 * there was room for, or -EIO. */
static inline int vn_guest_deliver(struct vn_guest *guest, const struct vn_batch *batch,
                                   unsigned from, unsigned n)
{
    unsigned done = 0;

    if (vn_guest_check(guest))
        return -EIO;
    for (; done < n && from + done < batch->count; done++) {
        const struct vn_frame *frame = &batch->frame[from + done];
        struct vn_cursor at;
        uint8_t *to = vn_guest_room(guest, vn_guest_max_frame(guest));

        if (!to)
            break;
        vn_frame_copy(&guest->scratch, frame);
        if (!guest->tx_pool)
            vn_offload_checksum(&guest->scratch);
        if (frame->len > vn_guest_max_frame(guest) ||
            (guest->scratch.offload.flags && !guest->tx_pool)) {
            guest->counters.tx_errors++;
            continue;
        }
        at = vn_cursor_at(&guest->scratch, 0);
        vn_cursor_copy(&at, to, frame->len);
        if (vn_guest_push(guest, frame->len, &guest->scratch.offload))
            return -EIO;
    }
    return (int)done;
}

#endif
