/* Part of virtio/queue.h: the in-flight record, in memory that outlives this process.
 *
 * It names the chains that were taken and not given back, so that the process after
 * this one takes them again, in the order in which they were taken, and gives each back
 * exactly once. Little-endian, 64 bytes and then `size` entries of 32 bytes:
 *
 *     0   magic u32 "VQIF", version u32, size u32, kind u32 (0 split, 1 packed)
 *     16  used u32: the next used index; packed: position | lap << 16
 *     20  next u32: split: the used index that is being published, else as `used`
 *     24  doing u64: packed: the chain that is being given back, else as it was left:
 *         valid << 63 | flags that its first descriptor had << 40 | used << 16 | entry
 *
 *     entry
 *     0   order u64: which chain this is the head of, counted from 1; 0: of none.
 *         Bit 63: split: used, about to be published
 *     8   addr u64, 16 len u32, 20 flags u16: the descriptor (packed only: the ring's
 *         own is overwritten by used ones)
 *     22  id u16: of the chain, in a head
 *     24  next u16: the entry of the chain's next descriptor
 *     26  count u16: descriptors of the chain, in a head
 *
 * A chain is taken when its head's `order` is stored, last of all. Split: chains are
 * given back together by the store of the ring's used index: between bit 63 of their
 * orders and `used` it decides whether they were. Packed: each by the store of its used
 * descriptor's flags: between `doing` and `used` they decide.
 *
 * VQ_STEP() stands where a process can die with another effect than one line before.
 */
#ifndef VIRTIO_RECORD_H
#define VIRTIO_RECORD_H

#ifndef VQ_STEP
#define VQ_STEP() ((void)0)
#endif

#define VQ_RECORD_MAGIC 0x46495156u
#define VQ_RECORD_VERSION 1u
#define VQ_RECORD_DONE (1ull << 63)

struct vq_record_entry {
    _Atomic uint64_t order;
    uint64_t addr;
    uint32_t len;
    uint16_t flags, id, next, count;
    uint32_t pad;
};

struct vq_record {
    uint32_t magic, version, size, kind;
    _Atomic uint32_t used, next;
    _Atomic uint64_t doing;
    uint8_t pad[32];
    struct vq_record_entry entry[];
};

_Static_assert(sizeof(struct vq_record) == 64, "record head");
_Static_assert(sizeof(struct vq_record_entry) == 32, "record entry");

static inline uint64_t vq_record_bytes(uint32_t size)
{
    return sizeof(struct vq_record) + (uint64_t)size * sizeof(struct vq_record_entry);
}

static inline uint32_t vq_record_at(const struct vq_state *at, bool packed)
{
    return at->next_used | (packed && at->used_wrap ? 1u << 16 : 0);
}

#define vq_put(to, value) atomic_store_explicit(&(to), (value), memory_order_release)
#define vq_get(from) atomic_load_explicit(&(from), memory_order_acquire)

static inline void vq_record_close(struct vq *q)
{
    free(q->spare);
    free(q->again);
    free(q->batch);
    q->spare = q->again = q->batch = NULL;
}

/* ---- taking ---- */

/* Note one descriptor of the ring that belongs to the chain under the walk. */
static inline void vq_record_note(struct vq *q, const struct vq_entry *entry)
{
    struct vq_record_entry *to;
    uint16_t slot;

    if (!q->record || q->noted == q->spares)
        return; /* the walk will find it too long */
    slot = q->spare[q->spares - 1 - q->noted++];
    to = &q->record->entry[slot];
    to->addr = entry->addr;
    to->len = entry->len;
    to->flags = entry->flags;
}

/* The chain was taken: from here on it is in the record. */
static inline void vq_record_taken(struct vq *q, struct vq_chain *chain)
{
    struct vq_record_entry *head;
    uint16_t count = q->packed ? chain->ndescs : 1;

    if (!q->record)
        return;
    for (uint16_t n = 0; n + 1 < count; n++)
        q->record->entry[q->spare[q->spares - 1 - n]].next = q->spare[q->spares - 2 - n];
    chain->slot = q->spare[q->spares - 1];
    head = &q->record->entry[chain->slot];
    head->id = chain->id;
    head->count = count;
    VQ_STEP();
    vq_put(head->order, ++q->order);
    VQ_STEP();
    q->spares -= count;
}

/* ---- giving back ---- */

static inline void vq_record_free(struct vq *q, uint16_t slot)
{
    uint16_t count = q->record->entry[slot].count;

    for (uint16_t n = 0; n < count && q->spares < q->size; n++) {
        q->spare[q->spares++] = slot;
        slot = q->record->entry[slot].next;
        if (slot >= q->size)
            return; /* somebody else writes here: what we lose is our own */
    }
}

/* Split: the chain lies in the used ring, where the driver does not look yet. */
static inline void vq_record_used(struct vq *q, const struct vq_chain *chain)
{
    if (!q->record)
        return;
    VQ_STEP();
    vq_put(q->record->entry[chain->slot].order,
           vq_get(q->record->entry[chain->slot].order) | VQ_RECORD_DONE);
    q->batch[q->batched++] = chain->slot;
}

static inline void vq_record_publishing(struct vq *q)
{
    if (!q->record)
        return;
    VQ_STEP();
    vq_put(q->record->next, q->at.next_used);
    VQ_STEP();
}

static inline void vq_record_published(struct vq *q)
{
    if (!q->record)
        return;
    for (uint32_t n = 0; n < q->batched; n++) {
        VQ_STEP();
        vq_put(q->record->entry[q->batch[n]].order, 0);
        vq_record_free(q, q->batch[n]);
    }
    q->batched = 0;
    VQ_STEP();
    vq_put(q->record->used, q->at.next_used);
    VQ_STEP();
}

/* Packed: the chain's used descriptor comes to where `flags` are now. */
static inline void vq_record_giving(struct vq *q, const struct vq_chain *chain,
                                    uint16_t flags)
{
    if (!q->record)
        return;
    VQ_STEP();
    vq_put(q->record->doing, VQ_RECORD_DONE | (uint64_t)flags << 40 |
                                 (uint64_t)vq_record_at(&q->at, true) << 16 | chain->slot);
    VQ_STEP();
}

static inline void vq_record_given(struct vq *q, const struct vq_chain *chain)
{
    if (!q->record)
        return;
    VQ_STEP();
    vq_put(q->record->entry[chain->slot].order, 0);
    VQ_STEP();
    vq_put(q->record->used, vq_record_at(&q->at, true));
    vq_record_free(q, chain->slot);
    VQ_STEP();
}

/* ---- beginning, and going on ---- */

static inline void vq_record_format(struct vq *q)
{
    memset(q->record, 0, vq_record_bytes(q->size));
    q->record->magic = VQ_RECORD_MAGIC;
    q->record->version = VQ_RECORD_VERSION;
    q->record->size = q->size;
    q->record->kind = q->packed;
    q->record->used = q->record->next = vq_record_at(&q->at, q->packed);
    for (uint32_t n = 0; n < q->size; n++)
        q->spare[n] = (uint16_t)(q->size - 1 - n);
    q->spares = q->size;
}

/* Finish what the process before was at when it died: 0, or -ERANGE. */
static inline int vq_record_settle_split(struct vq *q)
{
    struct vq_record *record = q->record;
    uint32_t used = vq_get(record->used), next = vq_get(record->next);
    uint16_t ring = vq_load_acquire(
        ((struct vq_used *)(void *)q->parts.device.host)->idx);
    bool published = ring != used;

    if (used > UINT16_MAX || next > UINT16_MAX || (published && ring != next))
        return -ERANGE;
    for (uint32_t n = 0; n < q->size; n++) {
        uint64_t order = vq_get(record->entry[n].order);

        if (order & VQ_RECORD_DONE)
            vq_put(record->entry[n].order, published ? 0 : order & ~VQ_RECORD_DONE);
        VQ_STEP();
    }
    vq_put(record->used, ring);
    VQ_STEP();
    q->at.next_used = ring;
    return 0;
}

static inline int vq_record_settle_packed(struct vq *q)
{
    struct vq_record *record = q->record;
    struct vq_packed_desc *ring = (struct vq_packed_desc *)(void *)q->parts.desc.host;
    uint64_t doing = vq_get(record->doing);
    uint32_t used = vq_get(record->used), from = (uint32_t)(doing >> 16 & 0xFFFFFF);
    uint16_t slot = (uint16_t)doing, flags = (uint16_t)(doing >> 40);

    q->at.next_used = (uint16_t)used;
    q->at.used_wrap = used >> 16 & 1;
    if ((used >> 17) || q->at.next_used >= q->size)
        return -ERANGE;
    if (!(doing & VQ_RECORD_DONE) || from != used)
        return 0;
    if (slot >= q->size || record->entry[slot].count > q->size)
        return -ERANGE;
    if (vq_load_acquire(ring[q->at.next_used].flags) == flags)
        return 0; /* the driver has not got it */
    vq_put(record->entry[slot].order, 0);
    VQ_STEP();
    vq_advance(&q->at.next_used, &q->at.used_wrap, record->entry[slot].count, q->size);
    vq_put(record->used, vq_record_at(&q->at, true));
    VQ_STEP();
    return 0;
}

static inline int vq_record_claim(struct vq *q, uint16_t slot, uint8_t *taken)
{
    uint16_t count = q->record->entry[slot].count;

    if (count == 0 || count > q->size || (!q->packed && count != 1))
        return -ERANGE;
    for (uint16_t n = 0; n < count; n++) {
        if (slot >= q->size || taken[slot])
            return -ERANGE;
        taken[slot] = 1;
        slot = q->record->entry[slot].next;
    }
    q->in_flight += count;
    return 0;
}

/* Find the chains that are out, the oldest first, and the entries that are free. */
static inline int vq_record_gather(struct vq *q)
{
    uint8_t *taken = calloc(q->size, 1);
    int error = taken ? 0 : -ENOMEM;

    for (uint16_t n = 0; !error && n < q->size; n++) {
        uint64_t order = vq_get(q->record->entry[n].order);
        uint32_t at = q->agains;

        if (order == 0)
            continue;
        error = order & VQ_RECORD_DONE ? -ERANGE : vq_record_claim(q, n, taken);
        for (; at > 0 && vq_get(q->record->entry[q->again[at - 1]].order) > order; at--)
            q->again[at] = q->again[at - 1];
        q->again[at] = n;
        q->agains++;
        q->order = order > q->order ? order : q->order;
    }
    for (uint32_t n = q->size; !error && n-- > 0;)
        if (!taken[n])
            q->spare[q->spares++] = (uint16_t)n;
    free(taken);
    return error;
}

/* Go on from the record: 0; -ERANGE: it is not one of this ring, or damaged; -ENOMEM. */
static inline int vq_record_resume(struct vq *q)
{
    const struct vq_record *record = q->record;
    int error;

    if (record->magic != VQ_RECORD_MAGIC || record->version != VQ_RECORD_VERSION ||
        record->size != q->size || record->kind != (uint32_t)q->packed)
        return -ERANGE;
    error = q->packed ? vq_record_settle_packed(q) : vq_record_settle_split(q);
    if (!error)
        error = vq_record_gather(q);
    if (error)
        return error;
    q->at.next_avail = q->at.next_used;
    q->at.avail_wrap = q->at.used_wrap;
    if (q->packed)
        vq_advance(&q->at.next_avail, &q->at.avail_wrap, q->in_flight, q->size);
    else
        q->at.next_avail = (uint16_t)(q->at.next_avail + q->in_flight);
    q->seen = q->at.next_avail;
    q->restored = true;
    return 0;
}

/* Keep a record in `memory` of vq_record_bytes(), for a ring that was just opened: 0;
 * with `resume` go on from it, or as vq_record_resume. */
static inline int vq_record_begin(struct vq *q, uint8_t *memory, bool resume)
{
    q->record = (struct vq_record *)(void *)memory;
    q->spare = calloc(q->size, sizeof(*q->spare));
    q->again = calloc(q->size, sizeof(*q->again));
    q->batch = calloc(q->size, sizeof(*q->batch));
    if (!q->spare || !q->again || !q->batch)
        return -ENOMEM;
    if (resume)
        return vq_record_resume(q);
    vq_record_format(q);
    return 0;
}

#endif
