/* The device's end of a virtqueue, split or packed (virtio 1.2, sections 2.7 and 2.8).
 *
 * A driver that breaks a rule breaks the queue: `broken` names the rule, no chain comes
 * any more, and the device is to set DEVICE_NEEDS_RESET. Chains taken before may still
 * be given back. One thread owns a queue and its chains.
 *
 * Not offered: in-order use, notification data.
 */
#ifndef VIRTIO_QUEUE_H
#define VIRTIO_QUEUE_H

#include <virtio/chain.h>

/* Where a queue stands: indices that run freely (split), positions and laps (packed). */
struct vq_state {
    uint16_t next_avail, next_used;
    bool avail_wrap, used_wrap;
};

struct vq {
    struct vq_parts parts;
    uint32_t size;
    bool packed, indirect, event_idx;
    const char *broken;
    struct vq_state at;
    uint16_t seen;      /* split: the driver's index when we looked last */
    uint32_t in_flight; /* taken, not given back: chains (split), descriptors (packed) */
    uint32_t moved;     /* used, and not decided on whether to notify; same units */
    bool restored;      /* not known what the driver was told: tell it once */
    struct vq_record *record; /* of what is in flight, or NULL; see virtio/record.h */
    struct vb_view *kept;     /* the view that it lies in, if that can die */
    uint16_t *spare, *again, *batch; /* its entries: free; to take again; to publish */
    uint32_t spares, agains, again_at, batched, noted;
    uint64_t order;
    struct vq_walk walk;
    struct vq_entry *table; /* a private copy of an indirect table */
    uint64_t popped, pushed, notified, suppressed;
};

/* Break the queue (the first reason stays): always -EIO. */
static inline int vq_fail(struct vq *q, const char *reason)
{
    if (!q->broken)
        q->broken = reason;
    return -EIO;
}

/* Walk an indirect table, of which `entry` tells; NULL, or why it is bad. In a packed
 * ring its entries follow each other and have no flag but WRITE (2.8.7). */
static inline const char *vq_walk_table(struct vq *q, const struct vq_entry *entry)
{
    uint32_t count = entry->len / 16, at = 0;

    if (!q->indirect)
        return "indirect-refused";
    if (entry->flags & VQ_F_NEXT)
        return "indirect-next";
    if (count == 0 || entry->len % 16 || count > q->size)
        return "indirect-size";
    if (vb_space_read(q->parts.space, entry->addr, q->table, entry->len))
        return "indirect-address";
    for (uint32_t n = 0; n < count; n++) {
        struct vq_entry each = q->packed ? vq_swapped(q->table[n]) : q->table[at];
        const char *reason;

        if (!q->packed && (each.flags & VQ_F_INDIRECT))
            return "indirect-nested";
        reason = vq_walk_add(&q->walk, &each);
        if (reason)
            return reason;
        if (q->packed)
            continue;
        if (!(each.flags & VQ_F_NEXT))
            return NULL;
        at = each.next;
        if (at >= count)
            return "next-range";
    }
    return q->packed ? NULL : "chain-length";
}

#include <virtio/record.h>

#include <virtio/packed.h>
#include <virtio/split.h>

/* Walk a chain that the process before took and did not give back. */
static inline const char *vq_again_walk(struct vq *q, struct vq_chain *chain)
{
    const struct vq_record_entry *head = &q->record->entry[q->again[q->again_at]];
    const struct vq_record_entry *each = head;

    chain->slot = q->again[q->again_at];
    chain->id = head->id;
    chain->ndescs = head->count;
    if (!q->packed)
        return vq_split_follow(q, head->id);
    for (uint32_t n = head->count; n > 0 && n <= q->size; n--) {
        struct vq_entry entry = {each->addr, each->len, each->flags, head->id};
        const char *reason;

        if (entry.flags & VQ_F_INDIRECT)
            return vq_walk_table(q, &entry);
        reason = vq_walk_add(&q->walk, &entry);
        if (reason)
            return reason;
        if (each->next >= q->size)
            break;
        each = &q->record->entry[each->next];
    }
    return NULL;
}

static inline void vq_close(struct vq *q)
{
    vq_parts_close(&q->parts);
    vq_walk_close(&q->walk);
    vq_record_close(q);
    free(q->table);
    q->table = NULL;
}

/* Open a ring that fits; a fresh one, or where `state` left it. 0, or as
 * vq_parts_open; -ERANGE: the state is not one of this ring. */
static inline int vq_open(struct vq *q, struct vb_space *space, uint32_t size,
                          struct vq_addresses at, uint64_t features,
                          const struct vq_state *state)
{
    int error;

    *q = (struct vq){.size = size,
                     .packed = features & VQ_PACKED,
                     .indirect = features & VQ_INDIRECT,
                     .event_idx = features & VQ_EVENT_IDX,
                     .at = {.avail_wrap = true, .used_wrap = true},
                     .restored = state != NULL};
    error = vq_parts_open(&q->parts, space, at, size, features, true);
    if (error)
        return error;
    if (state)
        q->at = *state;
    q->seen = q->at.next_avail;
    error = vq_walk_open(&q->walk, size);
    q->table = q->indirect ? calloc(size, sizeof(*q->table)) : NULL;
    if (q->indirect && !q->table)
        error = -ENOMEM;
    if (!error && !(q->packed ? vq_packed_consistent(q) : vq_split_consistent(q)))
        error = -ERANGE;
    if (error)
        vq_close(q);
    return error;
}

/* The ring's memory, at the begin of every operation: 0, or broken. */
static inline int vq_check(struct vq *q)
{
    if (q->kept && !vb_view_alive(q->kept))
        return vq_fail(q, "record-unmapped");
    return vq_parts_alive(&q->parts) ? 0 : vq_fail(q, "ring-unmapped");
}

/* Take a chain; vq_check came before. 1; 0 there is none; -EIO broken; -ENOMEM. */
static inline int vq_pop(struct vq *q, struct vq_chain *chain)
{
    bool again = q->again_at < q->agains;
    const char *reason;
    int error = 1;

    if (q->broken)
        return -EIO;
    vq_walk_begin(&q->walk);
    q->noted = 0;
    if (again)
        reason = vq_again_walk(q, chain);
    else
        error = q->packed ? vq_packed_walk(q, chain, &reason)
                          : vq_split_walk(q, chain, &reason);
    if (error <= 0)
        return error;
    if (reason)
        return vq_fail(q, reason);
    error = vq_chain_make(chain, q->parts.space, &q->walk);
    if (error == -ENOMEM)
        return error;
    if (error)
        return vq_fail(q, error == -EFAULT ? "buffer-address" : "buffer-pieces");
    q->popped++;
    if (again) {
        q->again_at++;
        return 1;
    }
    vq_record_taken(q, chain);
    if (q->packed)
        vq_packed_taken(q, chain);
    else
        vq_split_taken(q);
    return 1;
}

/* Give a chain back, of which the first `written` writable bytes are filled; vq_check
 * came before, vq_publish comes after the last. */
static inline void vq_push(struct vq *q, const struct vq_chain *chain, uint32_t written)
{
    if (q->packed) {
        vq_packed_push(q, chain, written);
    } else {
        vq_split_push(q, chain, written);
        vq_record_used(q, chain);
    }
    q->pushed++;
}

static inline void vq_publish(struct vq *q)
{
    if (q->packed)
        return;
    vq_record_publishing(q);
    vq_split_publish(q);
    vq_record_published(q);
}

/* Does the driver want an interrupt for what was given back since we asked last? */
static inline bool vq_should_notify(struct vq *q)
{
    bool wants;

    if ((q->moved == 0 && !q->restored) || vq_check(q))
        return false;
    vq_fence(); /* what we published before our look at what the driver wants */
    wants = q->restored || (q->packed ? vq_packed_wants(q) : vq_split_wants(q));
    q->restored = false;
    q->moved = 0;
    q->notified += wants;
    q->suppressed += !wants;
    return wants;
}

/* A hint to the driver: no kicks, we are awake. */
static inline void vq_disable_kicks(struct vq *q)
{
    if (vq_check(q))
        return;
    if (q->packed)
        vq_packed_disable(q);
    else
        vq_split_disable(q);
}

/* Ask for a kick with the next chain. True: look again, nobody will tell. */
static inline bool vq_enable_kicks(struct vq *q)
{
    if (q->broken || vq_check(q) || q->again_at < q->agains)
        return true;
    if (q->packed)
        vq_packed_enable(q);
    else
        vq_split_enable(q);
    vq_fence(); /* our wish before our look at the ring */
    return q->packed ? vq_packed_ready(q) : vq_split_ready(q);
}

#endif
