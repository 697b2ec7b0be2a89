/* A chain of the driver's buffers, and how bytes get out of it and into it.
 *
 * A chain is walked once, into private memory: from then on the driver can change its
 * data, but not its shape. Segments are guest addresses; pieces are the same bytes as
 * host memory, of one generation of the address space. When that has changed, pieces are
 * found again, or the chain is a fault: nothing reads or writes through stale ones.
 */
#ifndef VIRTIO_CHAIN_H
#define VIRTIO_CHAIN_H

#include <virtio/layout.h>

#include <limits.h>

/* Pieces a chain may have beyond one per descriptor, as it crosses regions' borders: a
 * guest must not make us look up millions. */
#define VQ_SPARE_PIECES 1024u

struct vq_segment {
    uint64_t addr;
    uint32_t len, write;
};

struct vq_chain {
    uint16_t id;     /* what the used element names */
    uint16_t ndescs; /* descriptors of the ring it took */
    uint16_t slot;   /* its entry of the in-flight record, if there is one */
    uint32_t nsegs, npieces;
    uint32_t out_pieces; /* the first of them, device-readable */
    uint64_t readable, writable, generation;
    struct vq_segment *segs; /* one block with the pieces, readable ones first */
    struct iovec *pieces;
};

/* Where a chain grows while it is walked: room for every one the queue can have. */
struct vq_walk {
    uint32_t size, nsegs;
    uint64_t readable, writable;
    struct vq_segment *segs;
    struct iovec *pieces;
};

static inline uint32_t vq_max_pieces(uint32_t size)
{
    return size + VQ_SPARE_PIECES;
}

static inline int vq_walk_open(struct vq_walk *walk, uint32_t size)
{
    walk->size = size;
    walk->segs = calloc(size, sizeof(*walk->segs));
    walk->pieces = calloc(vq_max_pieces(size), sizeof(*walk->pieces));
    return walk->segs && walk->pieces ? 0 : -ENOMEM;
}

static inline void vq_walk_close(struct vq_walk *walk)
{
    free(walk->segs);
    free(walk->pieces);
}

static inline void vq_walk_begin(struct vq_walk *walk)
{
    walk->nsegs = 0;
    walk->readable = walk->writable = 0;
}

/* Add a descriptor; NULL, or why the chain is bad. */
static inline const char *vq_walk_add(struct vq_walk *walk, const struct vq_entry *entry)
{
    bool write = entry->flags & VQ_F_WRITE;

    if (walk->nsegs == walk->size)
        return "chain-length";
    if (entry->len == 0)
        return "buffer-empty";
    if (!write && walk->writable)
        return "buffer-order";
    if (walk->readable + walk->writable + entry->len > UINT32_MAX)
        return "chain-bytes";
    *(write ? &walk->writable : &walk->readable) += entry->len;
    walk->segs[walk->nsegs++] = (struct vq_segment){entry->addr, entry->len, write};
    return NULL;
}

/* Find segments in the space: the number of pieces; -EFAULT, -E2BIG. */
static inline int vq_find_pieces(struct vb_space *space, const struct vq_segment *segs,
                                 uint32_t nsegs, struct iovec *pieces, uint32_t max,
                                 uint32_t *out_pieces)
{
    uint32_t n = 0;

    *out_pieces = 0;
    for (uint32_t i = 0; i < nsegs; i++) {
        int more = vb_space_iov(space, segs[i].addr, segs[i].len, segs[i].write,
                                pieces + n, (int)(max - n));

        if (more < 0)
            return more;
        n += (uint32_t)more;
        if (!segs[i].write)
            *out_pieces = n;
    }
    return (int)n;
}

/* (Re)place what a chain holds: 0 or -ENOMEM. */
static inline int vq_chain_hold(struct vq_chain *chain, const struct vq_segment *segs,
                                uint32_t nsegs, const struct iovec *pieces, uint32_t n)
{
    size_t head = nsegs * sizeof(*segs);
    char *block = malloc(head + n * sizeof(*pieces));

    if (!block)
        return -ENOMEM;
    memcpy(block, segs, head);
    memcpy(block + head, pieces, n * sizeof(*pieces));
    free(chain->segs);
    chain->segs = (struct vq_segment *)(void *)block;
    chain->pieces = (struct iovec *)(void *)(block + head);
    chain->nsegs = nsegs;
    chain->npieces = n;
    return 0;
}

/* Make a chain of what was walked: 0, -EFAULT, -E2BIG, -ENOMEM. */
static inline int vq_chain_make(struct vq_chain *chain, struct vb_space *space,
                                const struct vq_walk *walk)
{
    int n = vq_find_pieces(space, walk->segs, walk->nsegs, walk->pieces,
                           vq_max_pieces(walk->size), &chain->out_pieces);

    if (n < 0)
        return n;
    chain->readable = walk->readable;
    chain->writable = walk->writable;
    chain->generation = space->generation;
    return vq_chain_hold(chain, walk->segs, walk->nsegs, walk->pieces, (uint32_t)n);
}

static inline void vq_chain_free(struct vq_chain *chain)
{
    free(chain->segs);
    chain->segs = NULL;
}

/* Before the pieces are used: 0; -EFAULT, part of the chain is no memory any more. */
static inline int vq_chain_renew(struct vq_chain *chain, struct vb_space *space,
                                 struct vq_walk *walk)
{
    uint32_t out_pieces;
    int n, error;

    if (chain->generation == space->generation)
        return 0;
    n = vq_find_pieces(space, chain->segs, chain->nsegs, walk->pieces,
                       vq_max_pieces(walk->size), &out_pieces);
    if (n < 0)
        return -EFAULT;
    error = vq_chain_hold(chain, chain->segs, chain->nsegs, walk->pieces, (uint32_t)n);
    if (error)
        return error;
    chain->out_pieces = out_pieces;
    chain->generation = space->generation;
    return 0;
}

/* The pieces of `size` bytes from `offset` on, of the readable or the writable part, at
 * most `max` of them: their number. The range lies in that part. */
static inline int vq_chain_window(const struct vq_chain *chain, bool write,
                                  uint64_t offset, uint64_t size, struct iovec *out,
                                  int max)
{
    uint32_t i = write ? chain->out_pieces : 0;
    int n = 0;

    while (size > 0 && offset >= chain->pieces[i].iov_len)
        offset -= chain->pieces[i++].iov_len;
    for (; size > 0 && n < max; i++, n++) {
        size_t length = chain->pieces[i].iov_len - offset;

        length = length < size ? length : size;
        out[n] = (struct iovec){(uint8_t *)chain->pieces[i].iov_base + offset, length};
        size -= length;
        offset = 0;
    }
    return n;
}

/* Copy out of the readable part, or into the writable one; the range lies in it. */
static inline void vq_chain_copy(const struct vq_chain *chain, bool write,
                                 uint64_t offset, uint8_t *local, uint64_t size)
{
    uint32_t i = write ? chain->out_pieces : 0;

    while (size > 0 && offset >= chain->pieces[i].iov_len)
        offset -= chain->pieces[i++].iov_len;
    for (; size > 0; i++) {
        uint8_t *host = (uint8_t *)chain->pieces[i].iov_base + offset;
        size_t length = chain->pieces[i].iov_len - offset;

        length = length < size ? length : size;
        memcpy(write ? host : local, write ? local : host, length);
        local += length;
        size -= length;
        offset = 0;
    }
}

#endif
