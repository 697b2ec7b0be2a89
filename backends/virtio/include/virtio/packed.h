/* Part of virtio/queue.h: the packed ring, 2.8. */
#ifndef VIRTIO_PACKED_H
#define VIRTIO_PACKED_H

static inline struct vq_packed_desc *vq_packed_desc(const struct vq *q, uint32_t at)
{
    return (struct vq_packed_desc *)(void *)q->parts.desc.host + at;
}

static inline bool vq_packed_consistent(const struct vq *q)
{
    return q->at.next_avail < q->size && q->at.next_used < q->size;
}

/* Walk the list at next_avail, whose first flags are read; NULL, or why it is bad. */
static inline const char *vq_packed_follow(struct vq *q, struct vq_chain *chain,
                                           uint16_t flags)
{
    uint32_t at = q->at.next_avail, left = q->size - q->in_flight;
    const char *reason;

    for (uint32_t n = 1; n <= left; n++) {
        struct vq_packed_desc *desc = vq_packed_desc(q, at);
        struct vq_entry entry = {vq_load(desc->addr), vq_load(desc->len),
                                 n == 1 ? flags : vq_load(desc->flags),
                                 vq_load(desc->id)};

        chain->id = entry.next; /* the last one's counts */
        chain->ndescs = (uint16_t)n;
        vq_record_note(q, &entry);
        if (entry.flags & VQ_F_INDIRECT)
            return vq_walk_table(q, &entry);
        reason = vq_walk_add(&q->walk, &entry);
        if (reason || !(entry.flags & VQ_F_NEXT))
            return reason;
        at = at + 1 == q->size ? 0 : at + 1;
    }
    return "chain-length"; /* it would reach into what is in flight, or into itself */
}

static inline bool vq_packed_is_ready(uint16_t flags, const struct vq *q)
{
    return vq_owned(flags, vq_avail_flags(q->at.avail_wrap));
}

/* 1: walked, `reason` says whether it is good; 0 none. */
static inline int vq_packed_walk(struct vq *q, struct vq_chain *chain,
                                 const char **reason)
{
    uint16_t flags = vq_load_acquire(vq_packed_desc(q, q->at.next_avail)->flags);

    if (!vq_packed_is_ready(flags, q))
        return 0;
    *reason = vq_packed_follow(q, chain, flags);
    return 1;
}

static inline void vq_packed_taken(struct vq *q, const struct vq_chain *chain)
{
    vq_advance(&q->at.next_avail, &q->at.avail_wrap, chain->ndescs, q->size);
    q->in_flight += chain->ndescs;
}

/* The driver sees the element, and the data in its chain, once it sees the flags. */
static inline void vq_packed_push(struct vq *q, const struct vq_chain *chain,
                                  uint32_t written)
{
    struct vq_packed_desc *desc = vq_packed_desc(q, q->at.next_used);
    uint16_t flags = vq_used_flags(q->at.used_wrap);

    vq_record_giving(q, chain, vq_load(desc->flags));
    vq_store(desc->id, chain->id);
    vq_store(desc->len, written);
    vq_store_release(desc->flags, flags | (written ? VQ_F_WRITE : 0));
    vq_advance(&q->at.next_used, &q->at.used_wrap, chain->ndescs, q->size);
    vq_record_given(q, chain);
    q->in_flight -= chain->ndescs;
    q->moved += chain->ndescs;
}

static inline bool vq_packed_wants(struct vq *q)
{
    struct vq_event *event = (struct vq_event *)(void *)q->parts.driver.host;
    uint32_t moved = q->moved < q->size ? q->moved : q->size;

    return vq_event_wants(event, q->event_idx, q->size, q->at.next_used, q->at.used_wrap,
                          moved);
}

static inline struct vq_event *vq_packed_own(const struct vq *q)
{
    return (struct vq_event *)(void *)q->parts.device.host;
}

static inline void vq_packed_disable(struct vq *q)
{
    vq_store(vq_packed_own(q)->flags, VQ_EVENT_DISABLE);
}

static inline void vq_packed_enable(struct vq *q)
{
    struct vq_event *own = vq_packed_own(q);

    if (q->event_idx)
        vq_store(own->off_wrap, vq_off_wrap(q->at.next_avail, q->at.avail_wrap));
    vq_store_release(own->flags, q->event_idx ? VQ_EVENT_DESC : VQ_EVENT_ENABLE);
}

static inline bool vq_packed_ready(struct vq *q)
{
    return vq_packed_is_ready(
        vq_load_acquire(vq_packed_desc(q, q->at.next_avail)->flags), q);
}

#endif
