/* Batches of messages: between private memory and a ring, and from ring to ring.
 *
 * Each works on the inuse index, publishes it once per batch, and signals nobody. A
 * message is copied, and its descriptor read, before the descriptor is handed over; a
 * descriptor with a bad address or length ends the batch before it, and faults the ring
 * when it comes first.
 */
#ifndef IOQ_BATCH_H
#define IOQ_BATCH_H

#include <ioq/ring.h>

#define VB_PREFETCH_AHEAD 8u

/* North's own buffers: descriptor i uses the one at addr + i * size. */
struct vb_slots {
    uint64_t addr;
    uint32_t size; /* 0: descriptors come with buffers of the other side */
};

/* Lengths of messages: equal ones (each NULL), or one of each. */
struct vb_sizes {
    const uint32_t *each;
    uint32_t equal;
};

static inline void vb_copy(void *to, const void *from, uint64_t size)
{
    if (size == 64) /* common enough to spare the call */
        memcpy(to, from, 64);
    else
        memcpy(to, from, size);
}

/* Ask for the descriptor we will come to, to write it (`sown` at least). */
static inline void vb_ring_prefetch(const struct vb_ring *ring, int end, uint32_t nth)
{
    if (nth < ring->count)
        __builtin_prefetch(vb_ring_desc(ring, VB_INUSE, end, nth), 1);
}

static inline int vb_copy_out(struct vb_ring *ring, const struct vb_desc *desc, void *to)
{
    const uint8_t *host = vb_space_ptr(ring->space, desc->ptr, desc->len, false);

    if (!host)
        return vb_space_read(ring->space, desc->ptr, to, desc->len);
    vb_copy(to, host, desc->len);
    return 0;
}

static inline int vb_copy_in(struct vb_ring *ring, uint64_t addr, const void *from,
                             uint32_t size)
{
    uint8_t *host = vb_space_ptr(ring->space, addr, size, true);

    if (!host)
        return vb_space_write(ring->space, addr, from, size);
    vb_copy(host, from, size);
    return 0;
}

/* End a batch of n: hand it over. With n = 0, and `error` set, that is the answer. */
static inline long vb_batch_end(struct vb_ring *ring, int end, uint32_t n, int error)
{
    int failed;

    if (n == 0)
        return error;
    failed = end == VB_TAIL ? vb_ring_push(ring, VB_INUSE, n, 0)
                            : vb_ring_pop(ring, VB_INUSE, n, 0);
    return failed ? failed : (long)n;
}

/* Send up to n messages, which lie back to back: those taken (0: no room), -EMSGSIZE if
 * the first does not fit its buffer, -EIO fault. */
static inline long vb_ring_produce(struct vb_ring *ring, const uint8_t *payload,
                                   struct vb_sizes sizes, uint32_t n,
                                   struct vb_slots slots)
{
    uint32_t done;
    int error = 0;

    if (vb_ring_check(ring))
        return -EIO;
    if (n > ring->count)
        n = ring->count;
    for (done = 0; done < n; done++) {
        uint32_t at = vb_ring_at(ring, VB_INUSE, VB_TAIL, done);
        uint32_t size = sizes.each ? sizes.each[done] : sizes.equal;
        struct vb_ioq_desc *shared = &ring->shared->desc[at];
        struct vb_desc desc = {.cookie = at, .valid = true};

        vb_ring_prefetch(ring, VB_TAIL, done + VB_PREFETCH_AHEAD);
        if (!vb_desc_owned(shared, ring->me))
            break;
        if (slots.size) {
            desc.ptr = slots.addr + (uint64_t)at * slots.size;
            desc.len = slots.size;
        } else {
            vb_desc_load(shared, &desc);
        }
        if (size > desc.len) {
            error = -EMSGSIZE;
            break;
        }
        if (vb_copy_in(ring, desc.ptr, payload, size)) {
            error = done ? 0 : vb_ring_fail(ring, "buffer-address");
            break;
        }
        desc.len = size;
        if (slots.size)
            vb_desc_store(shared, &desc);
        else
            atomic_store_explicit(&shared->len, size, memory_order_relaxed);
        payload += size;
    }
    return vb_batch_end(ring, VB_TAIL, done, error);
}

/* Take up to n messages into `payload` back to back, their lengths into `sizes`: the
 * number, 0 if none, -EIO fault. `repost` not 0 (north): hand each buffer back empty,
 * with that many bytes of room. */
static inline long vb_ring_consume(struct vb_ring *ring, uint8_t *payload, uint64_t room,
                                   uint32_t *sizes, uint32_t n, uint64_t repost)
{
    uint32_t done;
    int error = 0;

    if (vb_ring_check(ring))
        return -EIO;
    if (n > ring->count)
        n = ring->count;
    for (done = 0; done < n; done++) {
        struct vb_ioq_desc *shared = vb_ring_desc(ring, VB_INUSE, VB_HEAD, done);
        struct vb_desc desc;

        vb_ring_prefetch(ring, VB_HEAD, done + VB_PREFETCH_AHEAD);
        if (!vb_desc_owned(shared, ring->me))
            break;
        vb_desc_load(shared, &desc);
        if (desc.len > room || desc.len > UINT32_MAX) {
            error = done ? 0 : vb_ring_fail(ring, "message-length");
            break;
        }
        if (vb_copy_out(ring, &desc, payload)) {
            error = done ? 0 : vb_ring_fail(ring, "buffer-address");
            break;
        }
        sizes[done] = (uint32_t)desc.len;
        payload += desc.len;
        room -= desc.len;
        if (repost) {
            atomic_store_explicit(&shared->len, repost, memory_order_relaxed);
            atomic_store_explicit(&shared->valid, 1, memory_order_relaxed);
        }
    }
    return vb_batch_end(ring, VB_HEAD, done, error);
}

/* Copy between two places of guest memory, which may overlap: 0, -EFAULT source bad,
 * -ENXIO target bad; all or nothing. */
static inline int vb_space_move(struct vb_space *to, uint64_t target,
                                struct vb_space *from, uint64_t source, uint64_t size)
{
    if (!vb_space_covers(from, source, size, false))
        return -EFAULT;
    if (!vb_space_covers(to, target, size, true))
        return -ENXIO;
    while (size > 0) {
        uint64_t length;
        const uint8_t *here = vb_space_piece(from, source, size, false, &length);
        uint8_t *there = vb_space_piece(to, target, length, true, &length);

        memmove(there, here, length);
        source += length;
        target += length;
        size -= length;
    }
    return 0;
}

/* Move one message: 1 done, 2 dropped as it exceeds its buffer, 0 nothing to move or no
 * room, -EIO. `moved` and `filled` count descriptors of this batch on either ring. */
static inline int vb_ring_forward_one(struct vb_ring *from, uint32_t moved,
                                      struct vb_ring *to, uint32_t filled, bool first)
{
    struct vb_desc message, buffer;
    int error;

    if (vb_ring_peek(from, VB_INUSE, VB_HEAD, moved, &message) != 1 ||
        vb_ring_peek(to, VB_INUSE, VB_TAIL, filled, &buffer) != 1)
        return 0;
    if (message.len > buffer.len)
        return 2;
    error = vb_space_move(to->space, buffer.ptr, from->space, message.ptr, message.len);
    if (error) {
        if (first)
            vb_ring_fail(error == -EFAULT ? from : to, "buffer-address");
        return -EIO;
    }
    vb_ring_set_len(to, VB_INUSE, VB_TAIL, filled, message.len);
    return 1;
}

/* Move up to n messages from one ring, as its consumer, to buffers posted on another:
 * the number taken off `from`, -EIO a fault of either. A message longer than its buffer
 * is dropped and counted: neither ring is to blame for the other's sizes. */
static inline long vb_ring_forward(struct vb_ring *from, struct vb_ring *to, uint32_t n,
                                   uint64_t *dropped)
{
    uint32_t moved = 0, filled = 0;

    if (vb_ring_check(from) || vb_ring_check(to))
        return -EIO;
    while (moved < n && moved < from->count) {
        int one = vb_ring_forward_one(from, moved, to, filled, moved == 0);

        if (one < 0 && moved == 0)
            return -EIO;
        if (one <= 0)
            break;
        moved++;
        filled += one == 1;
        *dropped += one == 2;
    }
    /* The copies are done before either side gets its descriptors. */
    if (vb_batch_end(to, VB_TAIL, filled, 0) < 0)
        return -EIO;
    return vb_batch_end(from, VB_HEAD, moved, 0);
}

#endif
