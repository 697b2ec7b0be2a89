/* Part of virtio/queue.h: the split ring, 2.7. */
#ifndef VIRTIO_SPLIT_H
#define VIRTIO_SPLIT_H

static inline struct vq_avail *vq_avail(const struct vq *q)
{
    return (struct vq_avail *)(void *)q->parts.driver.host;
}

static inline struct vq_used *vq_used(const struct vq *q)
{
    return (struct vq_used *)(void *)q->parts.device.host;
}

static inline bool vq_split_consistent(const struct vq *q)
{
    return !q->restored || vq_load(vq_used(q)->idx) == q->at.next_used;
}

/* Walk one descriptor's chain from `head` on; NULL, or why it is bad. */
static inline const char *vq_split_follow(struct vq *q, uint32_t at)
{
    struct vq_split_desc *ring = (struct vq_split_desc *)(void *)q->parts.desc.host;
    const char *reason;

    if (at >= q->size)
        return "head-range";
    for (uint32_t n = 0; n < q->size; n++) {
        struct vq_entry entry = {vq_load(ring[at].addr), vq_load(ring[at].len),
                                 vq_load(ring[at].flags), vq_load(ring[at].next)};

        if (entry.flags & VQ_F_INDIRECT) /* the last, after any number of plain ones */
            return vq_walk_table(q, &entry);
        reason = vq_walk_add(&q->walk, &entry);
        if (reason)
            return reason;
        if (!(entry.flags & VQ_F_NEXT))
            return NULL;
        at = entry.next;
        if (at >= q->size)
            return "next-range";
    }
    return "chain-length";
}

/* 1: walked, `reason` says whether it is good; 0 none; -EIO. */
static inline int vq_split_walk(struct vq *q, struct vq_chain *chain,
                                const char **reason)
{
    uint16_t head;

    if (q->seen == q->at.next_avail) {
        uint16_t ready;

        q->seen = vq_load_acquire(vq_avail(q)->idx);
        ready = (uint16_t)(q->seen - q->at.next_avail);
        if (ready == 0)
            return 0;
        if (ready + q->in_flight > q->size)
            return vq_fail(q, "avail-index");
    }
    head = vq_load(vq_avail(q)->ring[q->at.next_avail % q->size]);
    chain->id = head;
    chain->ndescs = 1; /* of the used ring, which is what counts */
    *reason = vq_split_follow(q, head);
    return 1;
}

static inline void vq_split_taken(struct vq *q)
{
    q->at.next_avail++;
    q->in_flight++;
}

static inline void vq_split_push(struct vq *q, const struct vq_chain *chain,
                                 uint32_t written)
{
    struct vq_used_elem *elem = &vq_used(q)->ring[q->at.next_used % q->size];

    vq_store(elem->id, chain->id);
    vq_store(elem->len, written);
    q->at.next_used++;
    q->in_flight--;
    q->moved++;
}

/* The driver sees elements, and the data in their chains, once it sees the index. */
static inline void vq_split_publish(struct vq *q)
{
    vq_store_release(vq_used(q)->idx, q->at.next_used);
}

static inline bool vq_split_wants(struct vq *q)
{
    uint16_t new = q->at.next_used, event;

    if (!q->event_idx)
        return !(vq_load(vq_avail(q)->flags) & VQ_SPLIT_QUIET);
    event = vq_load(vq_avail(q)->ring[q->size]);
    return q->moved > UINT16_MAX || vq_passed(event, new, (uint16_t)(new - q->moved));
}

/* With EVENT_IDX it stays at the place it was at: one kick at most comes for nothing. */
static inline void vq_split_disable(struct vq *q)
{
    if (!q->event_idx)
        vq_store(vq_used(q)->flags, VQ_SPLIT_QUIET);
}

static inline void vq_split_enable(struct vq *q)
{
    if (q->event_idx)
        vq_store(*vq_avail_event(vq_used(q), q->size), q->at.next_avail);
    else
        vq_store(vq_used(q)->flags, 0);
}

static inline bool vq_split_ready(struct vq *q)
{
    return vq_load_acquire(vq_avail(q)->idx) != q->at.next_avail;
}

#endif
