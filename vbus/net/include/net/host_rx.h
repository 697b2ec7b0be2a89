/* South end of a venet connection: frames into the guest's RX ring, each copied once.
 *
 * What the guest cannot take as it is (segmentation, checksums) is finished here. No
 * buffer, no page: the frame is dropped and counted; nothing waits for a guest.
 */
#ifndef NET_HOST_RX_H
#define NET_HOST_RX_H

#include "net/host.h"

/* Copy the next `length` bytes of the frame into guest memory: 0 or -EFAULT. */
static inline int vn_host_copy(struct vb_space *space, uint64_t addr,
                               struct vn_cursor *from, uint64_t length)
{
    uint8_t *to = vb_space_ptr(space, addr, length, true);
    struct iovec piece[VN_PIECES];
    int pieces;

    if (to) {
        vn_cursor_copy(from, to, length);
        return 0;
    }
    pieces = vb_space_iov(space, addr, length, true, piece, VN_PIECES);
    for (int i = 0; i < pieces; i++)
        vn_cursor_copy(from, piece[i].iov_base, piece[i].iov_len);
    return pieces < 0 ? -EFAULT : 0;
}

static inline int vn_host_fill_flat(struct vn_host *host, const struct vb_desc *desc,
                                    const struct vn_frame *frame)
{
    struct vn_cursor from = vn_cursor_at(frame, 0);

    if (frame->len > desc->len) {
        host->counters.rx_length_errors++;
        return 0;
    }
    if (vn_host_copy(host->rx->space, desc->ptr, &from, frame->len))
        return vb_ring_fail(host->rx, "rx-buffer");
    vn_record_room(host->record, host->rx, host->filled, desc->len);
    vb_ring_set_len(host->rx, VB_INUSE, VB_TAIL, host->filled, frame->len);
    return 1;
}

/* An L4RO slot: its host address and the number of iovs it has room for. */
static inline uint8_t *vn_host_slot(struct vn_host *host, const struct vb_desc *desc,
                                    uint32_t *room)
{
    uint64_t iovs;
    uint8_t *slot = NULL;

    if (host->rx_pool && desc->len >= sizeof(struct vn_sg) + sizeof(struct vn_iov))
        slot = vb_view_ptr(host->rx_pool, desc->ptr, desc->len);
    if (!slot)
        vb_ring_fail(host->rx, "rx-slot");
    iovs = (desc->len - sizeof(struct vn_sg)) / sizeof(struct vn_iov);
    *room = iovs < VN_MAX_SLOT_IOVS ? (uint32_t)iovs : VN_MAX_SLOT_IOVS;
    return slot;
}

/* Find pages for `rest` bytes: the number taken into iov[1..], 0 if there are not
 * enough, -EIO. `addr` gets the pages' GPAs; an iov carries the page's cookie. */
static inline int vn_host_find_pages(struct vn_host *host, uint64_t rest, uint32_t room,
                                     struct vn_iov *iov, uint64_t *addr)
{
    uint32_t n = 0;

    if (!host->pages)
        return 0;
    if (vb_ring_check(host->pages))
        return -EIO;
    while (rest > 0) {
        struct vb_desc page;
        int got = n + 1 < room ? vb_ring_peek(host->pages, VB_INUSE, VB_HEAD,
                                              host->used_pages + n, &page)
                               : 0;
        if (got <= 0)
            return got;
        if (page.len == 0)
            return vb_ring_fail(host->pages, "page-length");
        n++;
        iov[n] = (struct vn_iov){
            .len = (uint32_t)(page.len < rest ? page.len : rest), .ptr = page.cookie};
        addr[n] = page.ptr;
        rest -= iov[n].len;
    }
    return (int)n;
}

static inline int vn_host_fill_l4ro(struct vn_host *host, const struct vb_desc *desc,
                                    const struct vn_frame *frame)
{
    const struct vn_offload *offload = &frame->offload;
    struct vn_cursor from = vn_cursor_at(frame, 0);
    struct vn_iov iov[VN_MAX_SLOT_IOVS];
    uint64_t addr[VN_MAX_SLOT_IOVS];
    struct vn_sg sg = {.flags = offload->flags, .len = frame->len,
                       .csum_start = offload->csum_start,
                       .csum_offset = offload->csum_offset,
                       .gso_type = offload->gso_type, .gso_hdrlen = offload->hdr_len,
                       .gso_size = offload->gso_size};
    uint32_t room, slot_length;
    uint8_t *slot = vn_host_slot(host, desc, &room);
    int pages = 0;

    if (!slot)
        return -EIO;
    memcpy(&iov[0], slot + sizeof(sg), sizeof(iov[0]));
    slot_length = iov[0].len;
    addr[0] = iov[0].ptr;
    if (iov[0].len < frame->len) {
        pages = vn_host_find_pages(host, frame->len - iov[0].len, room, iov, addr);
        if (pages < 0)
            return pages;
        if (pages == 0) {
            host->counters.rx_dropped++;
            return 0;
        }
    } else {
        iov[0].len = frame->len;
    }
    for (int i = 0; i <= pages; i++)
        if (vn_host_copy(host->rx->space, addr[i], &from, iov[i].len))
            return vb_ring_fail(host->rx, "rx-buffer");
    vn_record_room(host->record, host->rx, host->filled, slot_length);
    sg.count = (uint32_t)pages + 1;
    memcpy(slot + 8, (uint8_t *)&sg + 8, sizeof(sg) - 8); /* the cookie stays */
    memcpy(slot + sizeof(sg), iov, sizeof(iov[0]) * sg.count);
    host->used_pages += (uint32_t)pages;
    return 1;
}

/* One frame that needs nothing more into the RX ring: 0 also when dropped, or -EIO. */
static inline int vn_host_fill(struct vn_host *host, const struct vn_frame *frame)
{
    struct vb_desc desc;
    int got = vb_ring_peek(host->rx, VB_INUSE, VB_TAIL, host->filled, &desc);

    if (got <= 0) {
        host->counters.rx_dropped++;
        return got;
    }
    got = host->rx_caps & VN_CAP_SG ? vn_host_fill_l4ro(host, &desc, frame)
                                    : vn_host_fill_flat(host, &desc, frame);
    if (got > 0) {
        host->filled++;
        host->counters.rx_frames++;
        host->counters.rx_bytes += frame->len;
    }
    return got < 0 ? got : 0;
}

/* A frame that is not GSO (any more). `own`: it is ours to change. */
static inline int vn_host_put_plain(struct vn_host *host, const struct vn_frame *frame)
{
    if (!(frame->offload.flags & VN_SG_NEEDS_CSUM) || (host->rx_caps & VN_CAP_SG))
        return vn_host_fill(host, frame);
    vn_frame_copy(&host->scratch[0], frame);
    vn_offload_checksum(&host->scratch[0]);
    host->counters.checksummed++;
    return vn_host_fill(host, &host->scratch[0]);
}

static inline int vn_host_put_segments(struct vn_host *host, const struct vn_frame *frame)
{
    struct vn_segments it;

    vn_segments_begin(&it, frame);
    host->counters.segmented++;
    while (vn_segments_left(&it) > 0) {
        struct vb_desc desc;
        int got = vb_ring_peek(host->rx, VB_INUSE, VB_TAIL, host->filled, &desc);

        if (got <= 0) { /* no room: do not even cut the rest */
            host->counters.rx_dropped += vn_segments_left(&it);
            return got;
        }
        vn_segments_next(&it, &host->scratch[1]);
        if (vn_host_put_plain(host, &host->scratch[1]))
            return -EIO;
    }
    return 0;
}

/* Hand over RX descriptors that are filled, and before them the pages that are used. */
static inline int vn_host_move_rx(struct vn_host *host, uint32_t pages, uint32_t filled)
{
    struct vn_record *record = host->record;

    while (filled > 0) {
        uint32_t n = filled, back = pages;

        if (n > vn_move_limit(host->rx))
            n = vn_move_limit(host->rx);
        if (back > 0 && back > vn_move_limit(host->pages))
            back = vn_move_limit(host->pages);
        if (back < pages)
            n = 0; /* all pages first */
        vn_record_begin(record);
        record->pages = back ? vn_move_of(host->pages, VB_HEAD, back) : record->pages;
        record->rx = vn_move_of(host->rx, VB_TAIL, n);
        vn_record_decide(record);
        if (back > 0 && vb_ring_pop(host->pages, VB_INUSE, back, 0))
            return -EIO;
        VN_STEP();
        if (n > 0 && vb_ring_push(host->rx, VB_INUSE, n, 0))
            return -EIO;
        vn_record_done(record);
        pages -= back;
        filled -= n;
    }
    return 0;
}

/* Hand over what was filled and used. Pages first: the guest gives them back to us as
 * soon as it sees the frames. */
static inline int vn_host_publish(struct vn_host *host)
{
    uint32_t filled = host->filled, pages = host->used_pages;

    host->filled = host->used_pages = 0;
    return filled > 0 ? vn_host_move_rx(host, pages, filled) : 0;
}

/* Copy frames into the RX ring, without a signal: 0 or -EIO. No room: dropped. */
static inline int vn_host_deliver(struct vn_host *host, const struct vn_batch *batch,
                                  unsigned from, unsigned n)
{
    int error = 0;

    if (!host->rx || !host->up) {
        host->counters.rx_dropped += n;
        return 0;
    }
    if (vb_ring_check(host->rx))
        return -EIO;
    for (unsigned i = from; i < from + n && i < batch->count && !error; i++) {
        const struct vn_frame *frame = &batch->frame[i];

        if ((frame->offload.flags & VN_SG_GSO) &&
            !vn_caps_take_gso(host->rx_caps, &frame->offload))
            error = vn_host_put_segments(host, frame);
        else
            error = vn_host_put_plain(host, frame);
    }
    return error ? error : vn_host_publish(host);
}

static inline int vn_host_flush_slot(struct vn_host *host, uint32_t nth,
                                     const struct vb_desc *desc)
{
    const uint32_t zero = 0;
    uint32_t room;
    uint8_t *slot;

    if (!(host->rx_caps & VN_CAP_SG)) {
        vn_record_room(host->record, host->rx, nth, desc->len);
        vb_ring_set_len(host->rx, VB_INUSE, VB_TAIL, nth, 0);
        return 0;
    }
    slot = vn_host_slot(host, desc, &room); /* what the iov says stays */
    if (!slot)
        return -EIO;
    memcpy(slot + offsetof(struct vn_sg, len), &zero, sizeof(zero));
    return 0;
}

/* FLUSHRX: give every posted buffer back empty, without a signal: how many, or -EIO. */
static inline int vn_host_flush_rx(struct vn_host *host)
{
    struct vb_desc desc;
    uint32_t n = 0;

    if (!host->rx)
        return 0;
    if (vb_ring_check(host->rx))
        return -EIO;
    while (vb_ring_peek(host->rx, VB_INUSE, VB_TAIL, n, &desc) > 0) {
        if (vn_host_flush_slot(host, n, &desc))
            return -EIO;
        n++;
    }
    if (vn_host_move_rx(host, 0, n))
        return -EIO;
    host->counters.flushed += n;
    return (int)n;
}

/* ---- going on after another process ---- */

/* Give an RX descriptor the length back that it had when it was posted: 0 or -EIO. */
static inline int vn_host_restore_room(struct vn_host *host, uint32_t nth)
{
    struct vb_desc desc;
    uint64_t length = host->record->room[nth];
    uint32_t room, slot_length = (uint32_t)length;
    uint8_t *slot;

    if (vb_ring_peek(host->rx, VB_INUSE, VB_TAIL, nth, &desc) <= 0)
        return vb_ring_fail(host->rx, "record-room");
    if (!(host->rx_caps & VN_CAP_SG)) {
        vb_ring_set_len(host->rx, VB_INUSE, VB_TAIL, nth, length);
        return 0;
    }
    slot = vn_host_slot(host, &desc, &room);
    if (!slot)
        return -EIO;
    memcpy(slot + sizeof(struct vn_sg) + offsetof(struct vn_iov, len), &slot_length,
           sizeof(slot_length));
    return 0;
}

/* Finish what the process before was at, and make good what it had begun: 0; -EIO, a
 * ring's fault; -EINVAL, the record is damaged. All rings are attached. */
static inline int vn_host_resume(struct vn_host *host)
{
    struct vn_record *record = host->record;
    uint32_t filled;
    int error = 0;

    if (record->magic != VN_RECORD_MAGIC || record->version != VN_RECORD_VERSION)
        return -EINVAL;
    if (atomic_load_explicit(&record->doing, memory_order_acquire)) {
        error = vn_move_redo(host->tx, VB_HEAD, record->tx);
        error = error ? error : vn_move_redo(host->pages, VB_HEAD, record->pages);
        error = error ? error : vn_move_redo(host->rx, VB_TAIL, record->rx);
        error = error ? error : vn_move_redo(host->events, VB_TAIL, record->events);
        if (error)
            return error;
        vn_record_done(record);
    }
    if (record->pending_first >= VN_MAX_PENDING || record->pending_count > VN_MAX_PENDING)
        return -EINVAL;
    filled = atomic_load_explicit(&record->rx_filled, memory_order_acquire);
    if (filled > VN_MAX_RING || (filled > 0 && !host->rx))
        return -EINVAL;
    if (filled == 0 || record->rx_first != host->rx->pos[VB_INUSE][VB_TAIL])
        return 0;
    if (vb_ring_check(host->rx))
        return -EIO;
    for (uint32_t nth = 0; nth < filled; nth++)
        if (vn_host_restore_room(host, nth))
            return -EIO;
    atomic_store_explicit(&record->rx_filled, 0, memory_order_release);
    return 0;
}

#endif
