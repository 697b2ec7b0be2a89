/* IOQ version 4: a ring of descriptors in memory that both sides write (ABI section 6).
 *
 * `sown` of a descriptor is the real hand-over: the owner may touch the descriptor and
 * its buffer, and flips it last. The indices are hints for position and counting. We keep
 * our positions to ourselves and only publish them, once per batch.
 *
 * The peer may write anything at any time, so what is read from the ring is read once
 * into a local, checked, then used. A value that the protocol forbids sets `fault`, a
 * stable short name, and every later operation refuses with -EIO.
 *
 * Both sides (VB_NORTH owns the memory, VB_SOUTH is the device) use the same functions.
 * One attached ring per side; not thread-safe within a side.
 */
#ifndef IOQ_RING_H
#define IOQ_RING_H

#include <shm/space.h>

#include <assert.h>
#include <shm/signal.h>
#include <stdatomic.h>
#include <time.h>

#define VB_RING_MAGIC 0x47fa2fe4u
#define VB_RING_VERSION 4u

enum { VB_VALID = 0, VB_INUSE = 1 };      /* which index */
enum { VB_HEAD = 0, VB_TAIL = 1 };        /* which end of it: pop at head, push at tail */
enum { VB_BOTH = 1, VB_KEEP_OWNER = 2 };  /* flags of push and pop */

struct vb_ioq_desc {
    _Atomic uint64_t cookie, ptr, len;
    _Atomic uint8_t valid, sown;
    uint8_t pad[6];
};

struct vb_ioq_index {
    _Atomic uint32_t at[2]; /* head, tail */
    _Atomic uint8_t full;
    uint8_t pad[3];
};

struct vb_ioq {
    _Atomic uint32_t magic, version;
    uint8_t signal[16];
    struct vb_ioq_index index[2];
    _Atomic uint32_t count;
    uint32_t pad;
    struct vb_ioq_desc desc[];
};

static_assert(sizeof(struct vb_ioq_desc) == 32, "descriptor");
static_assert(sizeof(struct vb_ioq_index) == 12, "index");
static_assert(sizeof(struct vb_ioq) == 56, "ring head");
static_assert(offsetof(struct vb_ioq, signal) == 8, "signal");
static_assert(offsetof(struct vb_ioq, index) == 24, "indices");
static_assert(offsetof(struct vb_ioq, count) == 48, "count");

/* A private copy of a descriptor. */
struct vb_desc {
    uint64_t cookie, ptr, len;
    bool valid;
};

struct vb_ring {
    struct vb_view *view;
    struct vb_space *space; /* where descriptors' `ptr` lead */
    struct vb_ioq *shared;  /* the view's host address: use after vb_ring_check() only */
    const char *fault;      /* NULL: none */
    int me;
    uint32_t count;
    uint32_t pos[2][2];     /* [index][end]: where we go on */
    uint64_t pushed, popped, injects, doorbells;
};

static inline uint64_t vb_ring_size(uint32_t count)
{
    return sizeof(struct vb_ioq) + (uint64_t)count * sizeof(struct vb_ioq_desc);
}

static inline int vb_ring_fail(struct vb_ring *ring, const char *reason)
{
    if (!ring->fault)
        ring->fault = reason;
    return -EIO;
}

/* 0, or -EIO: the ring has a fault, or its memory is gone. Once per batch. */
static inline int vb_ring_check(struct vb_ring *ring)
{
    if (__builtin_expect(!vb_view_alive(ring->view), 0))
        return vb_ring_fail(ring, "unmapped");
    return ring->fault ? -EIO : 0;
}

static inline const char *vb_ring_range_fault(int index, int end)
{
    static const char *const names[2][2] = {{"valid-head-range", "valid-tail-range"},
                                            {"inuse-head-range", "inuse-tail-range"}};
    return names[index][end];
}

static inline const char *vb_ring_moved_fault(int index, int end)
{
    static const char *const names[2][2] = {{"valid-head-moved", "valid-tail-moved"},
                                            {"inuse-head-moved", "inuse-tail-moved"}};
    return names[index][end];
}

/* Make a ring out of the view: all descriptors north's, all indices 0. */
static inline int vb_ring_format(struct vb_view *view, uint32_t count)
{
    uint8_t *host = vb_view_ptr(view, 0, vb_ring_size(count));
    struct vb_ioq *ioq = (struct vb_ioq *)host;

    if (!host)
        return -EFAULT;
    if (!view->writable || count == 0 || view->size != vb_ring_size(count) ||
        (uintptr_t)host % 8)
        return -EINVAL;
    memset(host, 0, view->size);
    vb_sig_format(ioq->signal);
    atomic_store_explicit(&ioq->magic, VB_RING_MAGIC, memory_order_relaxed);
    atomic_store_explicit(&ioq->version, VB_RING_VERSION, memory_order_relaxed);
    atomic_store_explicit(&ioq->count, count, memory_order_release);
    return 0;
}

/* Why a view is no ring we could attach to (6.1), or NULL. Reads `count` once. */
static inline const char *vb_ring_refusal(struct vb_view *view, uint32_t limit,
                                          uint32_t *count)
{
    struct vb_ioq *ioq = (struct vb_ioq *)view->host;

    if (!vb_view_alive(view))
        return "unmapped";
    if (!view->writable)
        return "read-only";
    if ((uintptr_t)view->host % 8)
        return "alignment";
    if (view->size < sizeof(struct vb_ioq))
        return "size";
    if (atomic_load_explicit(&ioq->magic, memory_order_acquire) != VB_RING_MAGIC)
        return "magic";
    if (atomic_load_explicit(&ioq->version, memory_order_relaxed) != VB_RING_VERSION)
        return "version";
    if (!vb_sig_valid(ioq->signal))
        return "signal";
    *count = atomic_load_explicit(&ioq->count, memory_order_relaxed);
    if (*count == 0 || *count > limit)
        return "count";
    return view->size == vb_ring_size(*count) ? NULL : "size";
}

/* Attach to a formatted ring: NULL, or a stable name of what is wrong with it. `view`
 * and `space` must outlive the ring. */
static inline const char *vb_ring_attach(struct vb_ring *ring, struct vb_view *view,
                                         struct vb_space *space, int me, uint32_t limit)
{
    const char *refusal;

    *ring = (struct vb_ring){.view = view, .space = space, .me = me};
    refusal = vb_ring_refusal(view, limit, &ring->count);
    if (refusal)
        return refusal;
    ring->shared = (struct vb_ioq *)view->host;
    for (int index = VB_VALID; index <= VB_INUSE; index++) {
        for (int end = VB_HEAD; end <= VB_TAIL; end++) {
            uint32_t at = atomic_load_explicit(&ring->shared->index[index].at[end],
                                               memory_order_relaxed);

            if (at >= ring->count)
                return vb_ring_range_fault(index, end);
            ring->pos[index][end] = at;
        }
    }
    return NULL;
}

/* The number of the nth descriptor from our position; nth < count. */
static inline uint32_t vb_ring_at(const struct vb_ring *ring, int index, int end,
                                  uint32_t nth)
{
    uint64_t at = (uint64_t)ring->pos[index][end] + nth;

    return (uint32_t)(at < ring->count ? at : at - ring->count);
}

static inline struct vb_ioq_desc *vb_ring_desc(const struct vb_ring *ring, int index,
                                               int end, uint32_t nth)
{
    return &ring->shared->desc[vb_ring_at(ring, index, end, nth)];
}

static inline bool vb_desc_owned(struct vb_ioq_desc *desc, int me)
{
    return atomic_load_explicit(&desc->sown, memory_order_acquire) == (uint8_t)me;
}

static inline void vb_desc_load(struct vb_ioq_desc *desc, struct vb_desc *out)
{
    out->cookie = atomic_load_explicit(&desc->cookie, memory_order_relaxed);
    out->ptr = atomic_load_explicit(&desc->ptr, memory_order_relaxed);
    out->len = atomic_load_explicit(&desc->len, memory_order_relaxed);
    out->valid = atomic_load_explicit(&desc->valid, memory_order_relaxed) != 0;
}

static inline void vb_desc_store(struct vb_ioq_desc *desc, const struct vb_desc *from)
{
    atomic_store_explicit(&desc->cookie, from->cookie, memory_order_relaxed);
    atomic_store_explicit(&desc->ptr, from->ptr, memory_order_relaxed);
    atomic_store_explicit(&desc->len, from->len, memory_order_relaxed);
    atomic_store_explicit(&desc->valid, from->valid, memory_order_relaxed);
}

/* Copy the nth descriptor from our position: 1 = ours and copied, 0 = not ours (or
 * nth >= count), -EIO. The caller did vb_ring_check() in this operation. */
static inline int vb_ring_peek(struct vb_ring *ring, int index, int end, uint32_t nth,
                               struct vb_desc *out)
{
    struct vb_ioq_desc *desc;

    if (ring->fault)
        return -EIO;
    if (nth >= ring->count)
        return 0;
    desc = vb_ring_desc(ring, index, end, nth);
    if (!vb_desc_owned(desc, ring->me))
        return 0;
    vb_desc_load(desc, out);
    return 1;
}

/* Write the fields of the nth descriptor, which the caller has peeked as ours. */
static inline void vb_ring_set(struct vb_ring *ring, int index, int end, uint32_t nth,
                               const struct vb_desc *from)
{
    vb_desc_store(vb_ring_desc(ring, index, end, nth), from);
}

static inline void vb_ring_set_len(struct vb_ring *ring, int index, int end,
                                   uint32_t nth, uint64_t len)
{
    atomic_store_explicit(&vb_ring_desc(ring, index, end, nth)->len, len,
                          memory_order_relaxed);
}

static inline void vb_ring_set_valid(struct vb_ring *ring, int index, int end,
                                     uint32_t nth, bool valid)
{
    atomic_store_explicit(&vb_ring_desc(ring, index, end, nth)->valid, valid,
                          memory_order_relaxed);
}

/* Hand n descriptors from `first` on to the other side, in order. */
static inline void vb_ring_flip(struct vb_ring *ring, uint32_t first, uint32_t n)
{
    for (; n > 0; n--) {
        atomic_store_explicit(&ring->shared->desc[first].sown, (uint8_t)(1 - ring->me),
                              memory_order_release);
        first = first + 1 == ring->count ? 0 : first + 1;
    }
}

/* Does the shared index still say what we published last? Only we may move it. */
static inline int vb_ring_unmoved(struct vb_ring *ring, int index, int end)
{
    uint32_t at = atomic_load_explicit(&ring->shared->index[index].at[end],
                                       memory_order_relaxed);

    if (at >= ring->count)
        return vb_ring_fail(ring, vb_ring_range_fault(index, end));
    if (at != ring->pos[index][end])
        return vb_ring_fail(ring, vb_ring_moved_fault(index, end));
    return 0;
}

/* Move the tail of one index by n, as n single steps would leave it. */
static inline int vb_ring_move_tail(struct vb_ring *ring, int index, uint32_t n)
{
    struct vb_ioq_index *shared = &ring->shared->index[index];
    uint32_t tail = ring->pos[index][VB_TAIL], distance;
    uint32_t head = atomic_load_explicit(&shared->at[VB_HEAD], memory_order_acquire);

    if (head >= ring->count)
        return vb_ring_fail(ring, vb_ring_range_fault(index, VB_HEAD));
    distance = head > tail ? head - tail : ring->count - (tail - head);
    if (distance <= n)
        atomic_store_explicit(&shared->full, 1, memory_order_relaxed);
    tail = vb_ring_at(ring, index, VB_TAIL, n % ring->count);
    atomic_store_explicit(&shared->at[VB_TAIL], tail, memory_order_release);
    ring->pos[index][VB_TAIL] = tail;
    return 0;
}

/* Push n descriptors from our tail on, which the caller has peeked as ours: 0, -EINVAL
 * (n > count) or -EIO. VB_BOTH: `index` is VB_VALID, inuse moves along.
 * Order (6.3): full, tail, then the owners, so that all is visible before a hand-over. */
static inline int vb_ring_push(struct vb_ring *ring, int index, uint32_t n, int flags)
{
    uint32_t first = ring->pos[index][VB_TAIL];

    if (ring->fault || vb_ring_unmoved(ring, index, VB_TAIL))
        return -EIO;
    if (n == 0 || n > ring->count)
        return n ? -EINVAL : 0;
    if (flags & VB_BOTH) {
        if (vb_ring_unmoved(ring, VB_INUSE, VB_TAIL))
            return -EIO;
        if (ring->pos[VB_INUSE][VB_TAIL] != first)
            return vb_ring_fail(ring, "tails-differ");
    }
    if (vb_ring_move_tail(ring, index, n))
        return -EIO;
    if ((flags & VB_BOTH) && vb_ring_move_tail(ring, VB_INUSE, n))
        return -EIO;
    if (!(flags & VB_KEEP_OWNER))
        vb_ring_flip(ring, first, n);
    ring->pushed += n;
    return 0;
}

/* Pop n descriptors from our head on, which the caller has peeked as ours: 0, -EINVAL
 * (n > count) or -EIO. Order (6.3): head, full, then the owners. A `full` that the peer
 * sets while we move the head is cleared by a later pop: at the latest by that of the
 * descriptor whose push set it. */
static inline int vb_ring_pop(struct vb_ring *ring, int index, uint32_t n, int flags)
{
    struct vb_ioq_index *shared = &ring->shared->index[index];
    uint32_t first = ring->pos[index][VB_HEAD], head;

    if (ring->fault || vb_ring_unmoved(ring, index, VB_HEAD))
        return -EIO;
    if (n == 0 || n > ring->count)
        return n ? -EINVAL : 0;
    head = vb_ring_at(ring, index, VB_HEAD, n % ring->count);
    atomic_store_explicit(&shared->at[VB_HEAD], head, memory_order_release);
    if (atomic_load_explicit(&shared->full, memory_order_relaxed))
        atomic_store_explicit(&shared->full, 0, memory_order_relaxed);
    ring->pos[index][VB_HEAD] = head;
    if (!(flags & VB_KEEP_OWNER))
        vb_ring_flip(ring, first, n);
    ring->popped += n;
    return 0;
}

/* Entries of an index as its shared head, tail and full say (6.2), or -EIO. A hint:
 * the peer moves on meanwhile. */
static inline long vb_ring_entries(struct vb_ring *ring, int index)
{
    struct vb_ioq_index *shared = &ring->shared->index[index];
    uint32_t head, tail;

    if (vb_ring_check(ring))
        return -EIO;
    head = atomic_load_explicit(&shared->at[VB_HEAD], memory_order_acquire);
    tail = atomic_load_explicit(&shared->at[VB_TAIL], memory_order_acquire);
    if (head >= ring->count)
        return vb_ring_fail(ring, vb_ring_range_fault(index, VB_HEAD));
    if (tail >= ring->count)
        return vb_ring_fail(ring, vb_ring_range_fault(index, VB_TAIL));
    if (head == tail)
        return atomic_load_explicit(&shared->full, memory_order_relaxed)
                   ? (long)ring->count
                   : 0;
    return tail > head ? (long)(tail - head) : (long)ring->count - (long)(head - tail);
}

/* Is the descriptor at our position ours (a message to take, or room to fill)? False
 * too when the ring has a fault. */
static inline bool vb_ring_owned(struct vb_ring *ring, int index, int end)
{
    return vb_ring_check(ring) == 0 &&
           vb_desc_owned(vb_ring_desc(ring, index, end, 0), ring->me);
}

static inline uint32_t vb_ring_distance(const struct vb_ring *ring, uint32_t from,
                                        uint32_t to)
{
    return to >= from ? to - from : ring->count - (from - to);
}

/* Does the peer have descriptor `at` by a move of its own, after ours from `first` to
 * `last`? It is south's, so either we never handed it on, or the peer gave it back.
 *
 * The peer moves its own end before it gives a descriptor back, and cannot pass one
 * that it does not have: so its end says which. Both ends at one place are no
 * descriptors or all; the one at that place tells, as our move was not of all. */
static inline int vb_ring_came_back(struct vb_ring *ring, int end, uint32_t last,
                                    uint32_t at)
{
    _Atomic uint32_t *theirs = &ring->shared->index[VB_INUSE].at[1 - end];

    for (int tries = 0; tries < 1000; tries++) {
        uint32_t peer = atomic_load_explicit(theirs, memory_order_acquire), filled;
        bool mine = vb_desc_owned(&ring->shared->desc[last], ring->me);

        if (peer >= ring->count)
            return vb_ring_fail(ring, vb_ring_range_fault(VB_INUSE, 1 - end));
        if (peer == last &&
            atomic_load_explicit(theirs, memory_order_acquire) != peer)
            continue; /* it is moving just now */
        if (end == VB_HEAD) { /* what it pushed lies from `last` to `peer` */
            filled = peer != last ? vb_ring_distance(ring, last, peer)
                     : mine       ? ring->count
                                  : 0;
            return vb_ring_distance(ring, last, at) < filled;
        }
        filled = peer != last ? vb_ring_distance(ring, peer, last)
                 : mine       ? 0
                              : ring->count; /* what it has not popped yet */
        return vb_ring_distance(ring, peer, at) >= filled;
    }
    return vb_ring_fail(ring, "never-still");
}

/* Finish the pop (VB_HEAD) or push (VB_TAIL) of the inuse index, of n < count
 * descriptors from `first` on, in which a process before us may have died: 0 or -EIO.
 * The ring was just attached. */
static inline int vb_ring_redo(struct vb_ring *ring, int end, uint32_t first, uint32_t n)
{
    uint32_t at = ring->pos[VB_INUSE][end], last;

    if (vb_ring_check(ring))
        return -EIO;
    if (first >= ring->count || n > ring->count)
        return vb_ring_fail(ring, "record-range");
    last = (first + n) % ring->count;
    if (at == first && (n < ring->count || vb_ring_owned(ring, VB_INUSE, end)))
        return end == VB_HEAD ? vb_ring_pop(ring, VB_INUSE, n, 0)
                              : vb_ring_push(ring, VB_INUSE, n, 0);
    if (at != last)
        return vb_ring_fail(ring, "record-moved");
    for (uint32_t p = first; p != last; p = p + 1 == ring->count ? 0 : p + 1) {
        int back;

        if (!vb_desc_owned(&ring->shared->desc[p], ring->me))
            continue;
        back = vb_ring_came_back(ring, end, last, p);
        if (back < 0)
            return back;
        if (!back)
            vb_ring_flip(ring, p, 1);
    }
    if (end == VB_HEAD && !vb_ring_owned(ring, VB_INUSE, end) &&
        atomic_load_explicit(&ring->shared->index[VB_INUSE].at[VB_TAIL],
                             memory_order_acquire) == last) /* empty: not full */
        atomic_store_explicit(&ring->shared->index[VB_INUSE].full, 0,
                              memory_order_relaxed);
    return 0;
}

/* Signal the peer: true = the caller crosses the boundary now. */
static inline bool vb_ring_inject(struct vb_ring *ring)
{
    if (vb_ring_check(ring))
        return false;
    ring->injects++;
    if (!vb_sig_inject(ring->shared->signal, ring->me))
        return false;
    ring->doorbells++;
    return true;
}

/* Stop notifications: we are awake and will look at the ring by ourselves. */
static inline void vb_ring_disable(struct vb_ring *ring)
{
    if (vb_ring_check(ring) == 0)
        vb_sig_disable(ring->shared->signal, ring->me);
}

/* Last step before sleeping, after the doorbell was emptied: true = do not sleep, there
 * is something for us (or the ring has a fault, which the next operation reports). */
static inline bool vb_ring_arm(struct vb_ring *ring, int index, int end)
{
    if (vb_ring_check(ring))
        return true;
    vb_sig_arm(ring->shared->signal, ring->me);
    return vb_ring_owned(ring, index, end);
}

static inline void vb_cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static inline uint64_t vb_clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Look at our position for up to `ns` nanoseconds: true as soon as it is ours. */
static inline bool vb_ring_spin(struct vb_ring *ring, int index, int end, uint64_t ns)
{
    uint64_t start = vb_clock_ns();

    do {
        for (int i = 0; i < 16; i++) {
            if (vb_ring_owned(ring, index, end))
                return true;
            vb_cpu_relax();
        }
    } while (!ring->fault && vb_clock_ns() - start < ns);
    return false;
}

/* One position on a ring, moved and used step by step (6.3). `flags` as for push and
 * pop; VB_BOTH goes with index VB_VALID: push moves inuse along. */
struct vb_iter {
    struct vb_ring *ring;
    int index, flags;
    uint32_t at;
};

/* Position := head or tail as the shared index says: 0 or -EIO. */
static inline int vb_iter_seek_end(struct vb_iter *iter, int end)
{
    struct vb_ring *ring = iter->ring;
    uint32_t at;

    if (vb_ring_check(ring))
        return -EIO;
    at = atomic_load_explicit(&ring->shared->index[iter->index].at[end],
                              memory_order_acquire);
    if (at >= ring->count)
        return vb_ring_fail(ring, vb_ring_range_fault(iter->index, end));
    iter->at = at;
    return 0;
}

static inline int vb_iter_seek_set(struct vb_iter *iter, uint32_t at)
{
    if (at >= iter->ring->count)
        return -EINVAL;
    iter->at = at;
    return 0;
}

static inline void vb_iter_seek_next(struct vb_iter *iter)
{
    iter->at = iter->at + 1 == iter->ring->count ? 0 : iter->at + 1;
}

/* Step over the descriptor at our position; `end` says how: VB_TAIL pushes it, VB_HEAD
 * pops it. 0; -EINVAL unless the position is that end and the descriptor ours; -EIO. */
static inline int vb_iter_step(struct vb_iter *iter, int end)
{
    struct vb_ring *ring = iter->ring;
    int error;

    if (vb_ring_check(ring))
        return -EIO;
    if (iter->at != ring->pos[iter->index][end] ||
        !vb_desc_owned(&ring->shared->desc[iter->at], ring->me))
        return -EINVAL;
    error = end == VB_TAIL ? vb_ring_push(ring, iter->index, 1, iter->flags)
                           : vb_ring_pop(ring, iter->index, 1, iter->flags);
    if (error == 0)
        vb_iter_seek_next(iter);
    return error;
}

#endif
