/* The driver's end of a virtqueue, split or packed (virtio 1.2, sections 2.7 and 2.8).
 *
 * Where the ring's state is not the device's to write, it is kept here, and only copied
 * into the ring: a device can neither change it nor name a chain that is not in flight.
 * One that breaks a rule breaks the queue: `broken` names the rule. One thread owns it.
 */
#ifndef VIRTIO_DRIVER_H
#define VIRTIO_DRIVER_H

#include <virtio/layout.h>

/* By id: a chain in flight, or a link of the free ids (split: free descriptors). */
struct vd_slot {
    uint32_t writable;
    uint16_t ndescs, next;
    bool busy;
};

struct vd_buffer {
    uint64_t addr;
    uint32_t len;
};

struct vd {
    struct vq_parts parts;
    uint32_t size;
    bool packed, event_idx;
    const char *broken;
    uint16_t next_avail, next_used; /* free running (split), positions (packed) */
    bool avail_wrap, used_wrap;
    uint32_t room;    /* free descriptors */
    uint32_t added;   /* chains (split), descriptors (packed), kick not decided on */
    uint32_t in_flight; /* chains */
    uint16_t free;    /* the first free id */
    struct vd_slot *slots;
    uint64_t tables;  /* of indirect descriptors, `entries` each, one for each id */
    uint32_t entries; /* 0: none */
    uint64_t kicked, suppressed, collected;
};

static inline int vd_fail(struct vd *d, const char *reason)
{
    if (!d->broken)
        d->broken = reason;
    return -EIO;
}

static inline int vd_check(struct vd *d)
{
    if (!vq_parts_alive(&d->parts))
        vd_fail(d, "ring-unmapped");
    return d->broken ? -EIO : 0;
}

static inline void vd_close(struct vd *d)
{
    vq_parts_close(&d->parts);
    free(d->slots);
    d->slots = NULL;
}

/* Lay a fresh ring: 0, or as vq_parts_open. Indirect tables of `entries` descriptors lie
 * one after the other from `tables` on, `size` of them. */
static inline int vd_open(struct vd *d, struct vb_space *space, uint32_t size,
                          struct vq_addresses at, uint64_t features, uint64_t tables,
                          uint32_t entries)
{
    int error;

    *d = (struct vd){.size = size,
                     .packed = features & VQ_PACKED,
                     .event_idx = features & VQ_EVENT_IDX,
                     .avail_wrap = true,
                     .used_wrap = true,
                     .room = size,
                     .tables = tables,
                     .entries = features & VQ_INDIRECT ? entries : 0};
    error = vq_parts_open(&d->parts, space, at, size, features, false);
    if (error)
        return error;
    d->slots = calloc(size, sizeof(*d->slots));
    if (!d->slots) {
        vd_close(d);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < size; i++)
        d->slots[i].next = (uint16_t)(i + 1);
    memset(d->parts.desc.host, 0, d->parts.desc.size);
    memset(d->parts.driver.host, 0, d->parts.driver.size);
    memset(d->parts.device.host, 0, d->parts.device.size);
    return 0;
}

static inline struct vq_avail *vd_avail(const struct vd *d)
{
    return (struct vq_avail *)(void *)d->parts.driver.host;
}

static inline struct vq_used *vd_used_ring(const struct vd *d)
{
    return (struct vq_used *)(void *)d->parts.device.host;
}

static inline struct vq_split_desc *vd_split_desc(const struct vd *d, uint32_t at)
{
    return (struct vq_split_desc *)(void *)d->parts.desc.host + at;
}

static inline struct vq_packed_desc *vd_packed_desc(const struct vd *d, uint32_t at)
{
    return (struct vq_packed_desc *)(void *)d->parts.desc.host + at;
}

/* ---- adding chains ---- */

static inline void vd_put_split(struct vd *d, uint32_t at, const struct vq_entry *entry)
{
    struct vq_split_desc *desc = vd_split_desc(d, at);

    vq_store(desc->addr, entry->addr);
    vq_store(desc->len, entry->len);
    vq_store(desc->flags, entry->flags);
    vq_store(desc->next, entry->next);
}

static inline struct vq_entry vd_entry(const struct vd_buffer *buffers, uint32_t i,
                                       uint32_t n, uint32_t out)
{
    return (struct vq_entry){
        buffers[i].addr, buffers[i].len,
        (uint16_t)((i + 1 < n ? VQ_F_NEXT : 0) | (i >= out ? VQ_F_WRITE : 0)), 0};
}

/* Write an indirect table, and the entry that names it: 0 or -EFAULT. */
static inline int vd_put_table(struct vd *d, uint32_t id, const struct vd_buffer *buffers,
                               uint32_t n, uint32_t out, struct vq_entry *named)
{
    uint64_t at = d->tables + 16 * (uint64_t)d->entries * id;

    for (uint32_t i = 0; i < n; i++) {
        struct vq_entry entry = vd_entry(buffers, i, n, out);

        entry.next = (uint16_t)(i + 1);
        if (d->packed)
            entry = vq_swapped((struct vq_entry){entry.addr, entry.len,
                                                 entry.flags & VQ_F_WRITE, 0});
        if (vb_space_write(d->parts.space, at + 16 * (uint64_t)i, &entry, 16))
            return -EFAULT;
    }
    *named = (struct vq_entry){at, 16 * n, VQ_F_INDIRECT, 0};
    return 0;
}

/* Put the descriptors of a chain into a split ring, and its head before the index. */
static inline void vd_add_split(struct vd *d, const struct vd_buffer *buffers, uint32_t n,
                                uint32_t out, const struct vq_entry *named)
{
    uint16_t head = d->free, at = head;

    for (uint32_t i = 0; i < n; i++) {
        struct vq_entry entry = named ? *named : vd_entry(buffers, i, n, out);

        entry.next = d->slots[at].next;
        vd_put_split(d, at, &entry);
        at = entry.next;
    }
    d->free = at;
    vq_store(vd_avail(d)->ring[d->next_avail % d->size], head);
    d->next_avail++;
    d->added++;
}

/* Put a chain into a packed ring; its first flags last, as they hand it over. */
static inline void vd_add_packed(struct vd *d, const struct vd_buffer *buffers, uint32_t n,
                                 uint32_t out, const struct vq_entry *named)
{
    struct vq_packed_desc *first = vd_packed_desc(d, d->next_avail);
    uint16_t id = d->free, first_flags = 0;

    for (uint32_t i = 0; i < n; i++) {
        struct vq_entry entry = named ? *named : vd_entry(buffers, i, n, out);
        struct vq_packed_desc *desc = vd_packed_desc(d, d->next_avail);
        uint16_t flags = entry.flags | vq_avail_flags(d->avail_wrap);

        vq_store(desc->addr, entry.addr);
        vq_store(desc->len, entry.len);
        vq_store(desc->id, id);
        if (i == 0)
            first_flags = flags;
        else
            vq_store(desc->flags, flags);
        vq_advance(&d->next_avail, &d->avail_wrap, 1, d->size);
    }
    d->free = d->slots[id].next;
    d->added += n;
    vq_store_release(first->flags, first_flags);
}

/* Add a chain of n buffers, the first `out` of them device-readable; vd_check came
 * before, vd_publish comes after the last. Its id, -EAGAIN no room now, -EINVAL it never
 * has, -EFAULT the indirect table is no memory. */
static inline long vd_add(struct vd *d, const struct vd_buffer *buffers, uint32_t n,
                          uint32_t out)
{
    bool indirect = n > 1 && n <= d->entries;
    uint32_t takes = indirect ? 1 : n;
    struct vq_entry named;
    struct vd_slot *slot;
    uint64_t writable = 0;
    uint16_t id = d->free;

    if (n == 0 || n > d->size)
        return -EINVAL;
    if (takes > d->room)
        return -EAGAIN;
    for (uint32_t i = out; i < n; i++)
        writable += buffers[i].len;
    if (writable > UINT32_MAX)
        return -EINVAL;
    if (indirect && vd_put_table(d, id, buffers, n, out, &named))
        return -EFAULT;
    slot = &d->slots[id];
    if (d->packed)
        vd_add_packed(d, buffers, takes, out, indirect ? &named : NULL);
    else
        vd_add_split(d, buffers, takes, out, indirect ? &named : NULL);
    slot->writable = (uint32_t)writable;
    slot->ndescs = (uint16_t)takes;
    slot->busy = true;
    d->room -= takes;
    d->in_flight++;
    return id;
}

/* The device sees what was added, and its data, once it sees the index. */
static inline void vd_publish(struct vd *d)
{
    if (!d->packed)
        vq_store_release(vd_avail(d)->idx, d->next_avail);
}

/* Does the device want a kick for what was added since we asked last? */
static inline bool vd_kick_needed(struct vd *d)
{
    uint32_t added = d->added;
    bool wants;

    if (added == 0 || vd_check(d))
        return false;
    vq_fence(); /* what we published before our look at what the device wants */
    d->added = 0;
    if (d->packed)
        wants = vq_event_wants((struct vq_event *)(void *)d->parts.device.host,
                               d->event_idx, d->size, d->next_avail, d->avail_wrap,
                               added < d->size ? added : d->size);
    else if (d->event_idx)
        wants = added > UINT16_MAX ||
                vq_passed(vq_load(*vq_avail_event(vd_used_ring(d), d->size)),
                          d->next_avail, (uint16_t)(d->next_avail - added));
    else
        wants = !(vq_load(vd_used_ring(d)->flags) & VQ_SPLIT_QUIET);
    d->kicked += wants;
    d->suppressed += !wants;
    return wants;
}

/* ---- collecting what is used ---- */

static inline bool vd_ready(const struct vd *d)
{
    uint16_t flags;

    if (!d->packed)
        return vq_load_acquire(vd_used_ring(d)->idx) != d->next_used;
    flags = vq_load_acquire(vd_packed_desc(d, d->next_used)->flags);
    return vq_owned(flags, vq_used_flags(d->used_wrap));
}

static inline void vd_free(struct vd *d, uint16_t id)
{
    struct vd_slot *slot = &d->slots[id];
    uint16_t last = id;

    for (uint32_t i = 1; !d->packed && i < slot->ndescs; i++)
        last = d->slots[last].next;
    d->slots[last].next = d->free;
    d->free = id;
    slot->busy = false;
    d->room += slot->ndescs;
    d->in_flight--;
    d->collected++;
}

/* Take a used chain; vd_check came before. Its id, and how many bytes the device says
 * it wrote; -EAGAIN there is none; -EIO broken. */
static inline long vd_collect(struct vd *d, uint32_t *written)
{
    uint32_t id;

    if (!vd_ready(d))
        return -EAGAIN;
    if (d->packed) {
        struct vq_packed_desc *desc = vd_packed_desc(d, d->next_used);

        id = vq_load(desc->id);
        *written = vq_load(desc->flags) & VQ_F_WRITE ? vq_load(desc->len) : 0;
    } else {
        struct vq_used_elem *elem = &vd_used_ring(d)->ring[d->next_used % d->size];

        if (d->in_flight == 0)
            return vd_fail(d, "used-index");
        id = vq_load(elem->id);
        *written = vq_load(elem->len);
    }
    if (id >= d->size || !d->slots[id].busy)
        return vd_fail(d, "used-id");
    if (*written > d->slots[id].writable)
        return vd_fail(d, "used-length");
    if (d->packed)
        vq_advance(&d->next_used, &d->used_wrap, d->slots[id].ndescs, d->size);
    else
        d->next_used++;
    vd_free(d, (uint16_t)id);
    return (long)id;
}

/* ---- interrupts ---- */

static inline struct vq_event *vd_event(const struct vd *d)
{
    return (struct vq_event *)(void *)d->parts.driver.host;
}

/* A hint to the device: no interrupts, we are awake. */
static inline void vd_disable(struct vd *d)
{
    if (vd_check(d))
        return;
    if (d->packed)
        vq_store(vd_event(d)->flags, VQ_EVENT_DISABLE);
    else if (!d->event_idx)
        vq_store(vd_avail(d)->flags, VQ_SPLIT_QUIET);
}

/* Ask for an interrupt with the next used chain. True: look again, nobody will tell. */
static inline bool vd_enable(struct vd *d)
{
    if (vd_check(d))
        return true;
    if (d->packed) {
        if (d->event_idx)
            vq_store(vd_event(d)->off_wrap, vq_off_wrap(d->next_used, d->used_wrap));
        vq_store_release(vd_event(d)->flags,
                         d->event_idx ? VQ_EVENT_DESC : VQ_EVENT_ENABLE);
    } else if (d->event_idx) {
        vq_store(vd_avail(d)->ring[d->size], d->next_used);
    } else {
        vq_store(vd_avail(d)->flags, 0);
    }
    vq_fence(); /* our wish before our look at the ring */
    return vd_ready(d);
}

#endif
