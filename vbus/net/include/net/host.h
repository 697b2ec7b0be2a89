/* South end of a venet connection: frames out of the guest's TX ring, and events to it.
 * Frames into its RX ring are in net/host_rx.h. Both together know every format of ABI
 * section 7: flat, scatter-gather, PMTD, completion events, L4RO with its page queue.
 *
 * collect() looks at descriptors and describes their frames without moving anything;
 * when the frames have been delivered, release() hands the descriptors back.
 *
 * A packet that breaks a rule of 7.4 is dropped, counted and completed. A value that
 * leaves no way to go on (a ring or pool that cannot be right) sets the ring's fault.
 */
#ifndef NET_HOST_H
#define NET_HOST_H

#include "ioq/ring.h"
#include "net/offload.h"
#include "net/record.h"

#define VN_MAX_SLOT_IOVS 64u

enum { VN_BELL_RX = 1, VN_BELL_TX = 2, VN_BELL_EVENTS = 4 };

struct vn_done { /* a TX descriptor that was looked at */
    uint64_t cookie;
    bool named;          /* the cookie could be read */
};

struct vn_host_counters {
    uint64_t tx_frames, tx_bytes, tx_length_errors, tx_frame_errors;
    uint64_t rx_frames, rx_bytes, rx_dropped, rx_length_errors;
    uint64_t segmented, checksummed, deferred_events, flushed;
};

struct vn_host {
    struct vb_ring *tx, *rx, *events, *pages;             /* NULL: not shared (yet) */
    struct vb_view *tx_pool, *event_pool, *rx_pool;
    uint32_t mtu, mitigation;
    uint32_t tx_caps, rx_caps; /* negotiated bits of groups 0 and 2 */
    bool txc, up;
    unsigned taken;
    struct vn_done done[VN_BATCH];
    uint32_t filled, used_pages; /* descriptors of rx and pages not yet handed over */
    bool told;                   /* there are events: completions wait in the record */
    struct vn_record *record;
    struct vn_frame scratch[2];  /* a segment, and a frame whose head is changed */
    struct vn_host_counters counters;
};

/* ---- guest to host ---- */

static inline int vn_host_length_error(struct vn_host *host)
{
    host->counters.tx_length_errors++;
    return -EINVAL;
}

static inline int vn_host_take_flat(struct vn_host *host, const struct vb_desc *desc,
                                    struct vn_frame *frame)
{
    int pieces;

    if (desc->len < VN_ETHER_HEADER || desc->len > host->mtu + VN_ETHER_HEADER)
        return vn_host_length_error(host);
    pieces = vb_space_iov(host->tx->space, desc->ptr, desc->len, false, frame->piece,
                          VN_PIECES);
    if (pieces < 0)
        return vn_host_length_error(host);
    frame->pieces = (uint16_t)pieces;
    frame->len = (uint32_t)desc->len;
    frame->offload = (struct vn_offload){0};
    return 0;
}

/* Copy `size` bytes of the venet_sg a TX descriptor locates: 0 or -EFAULT. */
static inline int vn_host_read_sg(struct vn_host *host, uint64_t ptr, void *to,
                                  uint64_t size)
{
    const uint8_t *slot;

    if (!(host->tx_caps & VN_CAP_PMTD))
        return vb_space_read(host->tx->space, ptr, to, size);
    slot = host->tx_pool ? vb_view_ptr(host->tx_pool, ptr, size) : NULL;
    if (!slot)
        return -EFAULT;
    memcpy(to, slot, size);
    return 0;
}

struct vn_sg_copy {
    struct vn_sg sg;
    struct vn_iov iov[VN_MAX_FRAGMENTS];
};

_Static_assert(sizeof(struct vn_sg_copy) == VN_MAX_SG_SIZE, "vn_sg_copy");

/* The checks of 7.4, in their order, on a private copy. */
static inline int vn_host_check_sg(struct vn_host *host, const struct vn_sg_copy *copy,
                                   uint64_t size)
{
    const struct vn_sg *sg = &copy->sg;
    uint64_t sum = 0, limit = host->mtu + VN_ETHER_HEADER;

    if (sizeof(*sg) + sizeof(struct vn_iov) * (uint64_t)sg->count > size)
        return vn_host_length_error(host);
    if (sg->flags & VN_SG_GSO)
        limit = VN_MAX_GSO;
    if (sg->len > limit || sg->len < VN_ETHER_HEADER || sg->count > VN_MAX_FRAGMENTS)
        return vn_host_length_error(host);
    for (uint32_t i = 0; i < sg->count; i++)
        sum += copy->iov[i].len;
    return sum == sg->len ? 0 : vn_host_length_error(host);
}

static inline bool vn_caps_take_gso(uint32_t caps, const struct vn_offload *offload)
{
    uint32_t need = offload->gso_type == VN_GSO_TCP4   ? VN_CAP_TSO4
                    : offload->gso_type == VN_GSO_TCP6 ? VN_CAP_TSO6
                                                       : VN_CAP_UFO;

    if (offload->flags & VN_SG_ECN)
        need |= VN_CAP_ECN;
    return (caps & need) == need;
}

static inline int vn_host_take_sg(struct vn_host *host, const struct vb_desc *desc,
                                  struct vn_frame *frame, struct vn_done *done)
{
    struct vn_sg_copy copy;
    const struct vn_sg *sg = &copy.sg;
    int total = 0;

    if (desc->len < sizeof(*sg) + sizeof(struct vn_iov) || desc->len > VN_MAX_SG_SIZE ||
        vn_host_read_sg(host, desc->ptr, &copy, desc->len)) {
        done->named = vn_host_read_sg(host, desc->ptr, &done->cookie, 8) == 0;
        return vn_host_length_error(host);
    }
    done->cookie = sg->cookie;
    if (vn_host_check_sg(host, &copy, desc->len))
        return -EINVAL;
    for (uint32_t i = 0; i < sg->count; i++) {
        int pieces = vb_space_iov(host->tx->space, copy.iov[i].ptr, copy.iov[i].len, false,
                                  frame->piece + total, VN_PIECES - total);
        if (pieces < 0)
            return vn_host_length_error(host);
        total += pieces;
    }
    frame->pieces = (uint16_t)total;
    frame->len = sg->len;
    frame->offload = (struct vn_offload){.flags = sg->flags,
                                         .gso_type = sg->gso_type,
                                         .gso_size = sg->gso_size,
                                         .csum_start = sg->csum_start,
                                         .csum_offset = sg->csum_offset};
    return 0;
}

static inline int vn_host_take(struct vn_host *host, const struct vb_desc *desc,
                               struct vn_frame *frame, struct vn_done *done)
{
    *done = (struct vn_done){desc->cookie, true};
    if (host->tx_caps & VN_CAP_SG ? vn_host_take_sg(host, desc, frame, done)
                                  : vn_host_take_flat(host, desc, frame))
        return -EINVAL;
    vn_frame_load(frame);
    if (((frame->offload.flags & VN_SG_GSO) &&
         !vn_caps_take_gso(host->tx_caps, &frame->offload)) ||
        vn_offload_check(frame)) {
        host->counters.tx_frame_errors++;
        return -EINVAL;
    }
    host->counters.tx_frames++;
    host->counters.tx_bytes += frame->len;
    return 0;
}

/* The guest does not take its completions: until it does, we take no frames. */
static inline bool vn_host_blocked(const struct vn_host *host)
{
    return host->record->pending_count > VN_MAX_PENDING - VN_BATCH;
}

/* Describe the next frames of the TX ring in `batch`: the number of descriptors looked
 * at, which may be more than the batch has frames, or -EIO. */
static inline int vn_host_collect(struct vn_host *host, struct vn_batch *batch)
{
    batch->count = 0;
    host->taken = 0;
    if (!host->tx || !host->up || vn_host_blocked(host))
        return 0;
    if (vb_ring_check(host->tx))
        return -EIO;
    while (host->taken < VN_BATCH) {
        struct vb_desc desc;
        int got = vb_ring_peek(host->tx, VB_INUSE, VB_HEAD, host->taken, &desc);

        if (got <= 0)
            break;
        if (vn_host_take(host, &desc, &batch->frame[batch->count],
                         &host->done[host->taken++]) == 0)
            batch->count++;
    }
    return (int)host->taken;
}

/* ---- events ---- */

static inline void vn_host_queue_event(struct vn_host *host, uint32_t id, uint64_t value)
{
    struct vn_record *record = host->record;
    uint32_t at = (record->next_first + record->next_count) % VN_MAX_PENDING;

    if (!host->told || record->next_count >= VN_MAX_PENDING)
        return; /* collect() stops before, and link states are few */
    record->pending[at] = (struct vn_pending){id, 0, value};
    record->next_count++;
}

static inline int vn_host_write_event(struct vn_host *host, const struct vb_desc *desc,
                                      const struct vn_pending *event)
{
    struct vn_event_txc txc = {{0, sizeof(txc), VN_EVENT_TXC}, 0, event->value};
    struct vn_event_linkstate link = {{0, sizeof(link), VN_EVENT_LINKSTATE},
                                      event->value != 0, {0}};
    uint8_t *to = vb_view_ptr(host->event_pool, desc->ptr, VN_EVENT_SIZE);

    if (!to || desc->len < VN_EVENT_SIZE)
        return vb_ring_fail(host->events, "event-bounds");
    if (event->id == VN_EVENT_TXC)
        memcpy(to, &txc, sizeof(txc));
    else
        memcpy(to, &link, sizeof(link));
    return 0;
}

/* One move of what waits into the event ring: how many, or -EIO. */
static inline int vn_host_move_events(struct vn_host *host)
{
    struct vn_record *record = host->record;
    uint32_t n = 0, limit = vn_move_limit(host->events);
    struct vb_desc desc;

    if (vb_ring_check(host->events))
        return -EIO;
    while (n < record->pending_count && n < limit &&
           vb_ring_peek(host->events, VB_INUSE, VB_TAIL, n, &desc) > 0) {
        uint32_t at = (record->pending_first + n) % VN_MAX_PENDING;

        if (vn_host_write_event(host, &desc, &record->pending[at]))
            return -EIO;
        n++;
    }
    if (n == 0)
        return 0;
    vn_record_begin(record);
    record->events = vn_move_of(host->events, VB_TAIL, n);
    record->next_first = (record->pending_first + n) % VN_MAX_PENDING;
    record->next_count = record->pending_count - n;
    vn_record_decide(record);
    if (vb_ring_push(host->events, VB_INUSE, n, 0))
        return -EIO;
    vn_record_done(record);
    return (int)n;
}

/* Put what waits into the event ring: how many, or -EIO. */
static inline int vn_host_flush_events(struct vn_host *host)
{
    int moved = 1, n = 0;

    if (!host->events || !host->event_pool || host->record->pending_count == 0)
        return 0;
    while (moved > 0 && host->record->pending_count > 0) {
        moved = vn_host_move_events(host);
        n += moved > 0 ? moved : 0;
    }
    host->counters.deferred_events += host->record->pending_count;
    return moved < 0 ? moved : n;
}

/* Pop n descriptors, the first of the collected ones is `first`: 0 or -EIO. */
static inline int vn_host_move_tx(struct vn_host *host, unsigned first, unsigned n)
{
    vn_record_begin(host->record);
    host->record->tx = vn_move_of(host->tx, VB_HEAD, n);
    for (unsigned i = first; host->txc && i < first + n; i++)
        if (host->done[i].named)
            vn_host_queue_event(host, VN_EVENT_TXC, host->done[i].cookie);
    vn_record_decide(host->record);
    if (vb_ring_pop(host->tx, VB_INUSE, n, 0))
        return -EIO;
    vn_record_done(host->record);
    return 0;
}

/* Complete n descriptors from `first` of the collected ones: VN_BELL_* or -EIO. */
static inline int vn_host_complete(struct vn_host *host, unsigned first, unsigned n)
{
    unsigned part = n < vn_move_limit(host->tx) ? n : vn_move_limit(host->tx);
    int events;

    if (vn_host_move_tx(host, first, part) ||
        (part < n && vn_host_move_tx(host, first + part, n - part)))
        return -EIO;
    if (!host->txc)
        return vb_ring_inject(host->tx) ? VN_BELL_TX : 0;
    events = vn_host_flush_events(host);
    if (events < 0)
        return events;
    return events > 0 && vb_ring_inject(host->events) ? VN_BELL_EVENTS : 0;
}

/* Hand the collected descriptors back, with a signal after every `mitigation` of them
 * and at the end: VN_BELL_* that the caller has to ring, or -EIO. */
static inline int vn_host_release(struct vn_host *host)
{
    unsigned step = host->mitigation ? host->mitigation : 1, taken = host->taken;
    int bells = 0;

    host->taken = 0;
    for (unsigned done = 0; done < taken; done += step) {
        int bell = vn_host_complete(host, done, taken - done < step ? taken - done : step);

        if (bell < 0)
            return bell;
        bells |= bell;
    }
    return bells;
}

#endif
