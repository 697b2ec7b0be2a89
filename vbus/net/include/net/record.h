/* Part of net/host.h: what of a venet outlives its process, so that the next one finds
 * every ring as it has to be. Little-endian, in memory of VN_RECORD_SIZE bytes:
 *
 *     0    magic u32 "VNIF", version u32
 *     8    doing u32: 1 while the moves below are decided on and not known to be done
 *     16   four moves of descriptors, {first u32, n u32}: pop of TX, pop of the page
 *          queue, push of RX, push of events; n = 0: none
 *     48   pending u32 x 2: the first and the number of the completions that wait
 *     56   next u32 x 2: the same, once the moves are done
 *     64   rx_first u32, rx_filled u32: RX descriptors that are being filled, whose
 *          lengths were, by number from rx_first on:
 *     72   room u64 x VN_MAX_RING
 *     ...  completions {id u32, pad u32, value u64} x VN_MAX_PENDING, a circle
 *
 * A move is decided on by the store of `doing`, with all that belongs to it; a process
 * that dies after that leaves it to the next, which finishes it. So a frame can be lost
 * (taken from its source and not given to RX) or sent twice (sent and not popped from
 * TX), at most a batch of each, but a descriptor or a completion can not.
 */
#ifndef NET_RECORD_H
#define NET_RECORD_H

#include "ioq/ring.h"

#define VN_RECORD_MAGIC 0x46494e56u
#define VN_RECORD_VERSION 1u
#define VN_MAX_RING 2048u
#define VN_MAX_PENDING 8192u /* completions a guest may leave lying about */

#ifndef VN_STEP
#define VN_STEP() ((void)0) /* where a process can die, for tests */
#endif

struct vn_pending { /* an event that waits for room in the event ring */
    uint32_t id, pad;
    uint64_t value;
};

struct vn_move {
    uint32_t first, n;
};

struct vn_record {
    uint32_t magic, version;
    _Atomic uint32_t doing;
    uint32_t pad;
    struct vn_move tx, pages, rx, events;
    uint32_t pending_first, pending_count, next_first, next_count;
    uint32_t rx_first;
    _Atomic uint32_t rx_filled;
    uint64_t room[VN_MAX_RING];
    struct vn_pending pending[VN_MAX_PENDING];
};

#define VN_RECORD_SIZE sizeof(struct vn_record)

_Static_assert(offsetof(struct vn_record, room) == 72, "as above");

/* Make one of memory that is zero. */
static inline void vn_record_format(struct vn_record *record)
{
    record->magic = VN_RECORD_MAGIC;
    record->version = VN_RECORD_VERSION;
}

/* Begin to write down moves: none so far. */
static inline void vn_record_begin(struct vn_record *record)
{
    record->tx = record->pages = record->rx = record->events = (struct vn_move){0, 0};
    record->next_first = record->pending_first;
    record->next_count = record->pending_count;
}

static inline void vn_record_decide(struct vn_record *record)
{
    VN_STEP();
    atomic_store_explicit(&record->doing, 1, memory_order_release);
    VN_STEP();
}

/* The moves are done. */
static inline void vn_record_done(struct vn_record *record)
{
    VN_STEP();
    record->pending_first = record->next_first;
    record->pending_count = record->next_count;
    if (record->rx.n > 0)
        atomic_store_explicit(&record->rx_filled, 0, memory_order_release);
    VN_STEP();
    atomic_store_explicit(&record->doing, 0, memory_order_release);
    VN_STEP();
}

/* An RX descriptor, the nth from our position, is about to lose its length. */
static inline void vn_record_room(struct vn_record *record, const struct vb_ring *rx,
                                  uint32_t nth, uint64_t length)
{
    if (nth >= VN_MAX_RING)
        return;
    record->rx_first = rx->pos[VB_INUSE][VB_TAIL];
    record->room[nth] = length;
    atomic_store_explicit(&record->rx_filled, nth + 1, memory_order_release);
}

/* Descriptors that one move may have: with all of a ring its two ends look the same. */
static inline uint32_t vn_move_limit(const struct vb_ring *ring)
{
    return ring->count > 1 ? ring->count - 1 : 1;
}

static inline struct vn_move vn_move_of(const struct vb_ring *ring, int end, uint32_t n)
{
    return (struct vn_move){ring->pos[VB_INUSE][end], n};
}

static inline int vn_move_redo(struct vb_ring *ring, int end, struct vn_move move)
{
    if (move.n == 0)
        return 0;
    if (!ring)
        return -EINVAL;
    return vb_ring_redo(ring, end, move.first, move.n);
}

#endif
