/* A frame on its way through the hub, and a batch of them.
 *
 * Payload stays where it is (a guest's memory, a buffer) and is described by pieces. The
 * first bytes are copied once into `head`: whatever is decided on (addresses, protocol
 * headers) is read there, and the same bytes are delivered, so that the guest who owns
 * the memory cannot exchange them after the check.
 *
 * Pieces are good until the source is released, which is in the same turn.
 */
#ifndef NET_FRAME_H
#define NET_FRAME_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "net/venet.h"

#define VN_BATCH 64      /* frames */
#define VN_HEAD 192      /* Ethernet, two tags, IP with options, TCP with options: 142 */
#define VN_PIECES 40     /* 18 fragments, each may cross region borders */

struct vn_offload {
    uint32_t flags;      /* VN_SG_* */
    uint8_t gso_type;    /* VN_GSO_* */
    uint16_t hdr_len;    /* all headers, when GSO */
    uint16_t gso_size;
    uint16_t csum_start, csum_offset;
};

struct vn_frame {
    uint32_t len;        /* head_len and all pieces */
    uint16_t head_len;
    uint16_t pieces;
    struct vn_offload offload;
    struct iovec piece[VN_PIECES + 1]; /* one more: a slice may begin inside `head` */
    uint8_t head[VN_HEAD];
};

struct vn_batch {
    unsigned count;
    struct vn_frame frame[VN_BATCH];
};

/* Walks over the bytes of a frame. */
struct vn_cursor {
    const struct vn_frame *frame;
    int piece;           /* -1: in the head */
    size_t offset;
};

static inline const uint8_t *vn_cursor_chunk(const struct vn_cursor *at, size_t *length)
{
    const struct vn_frame *frame = at->frame;

    if (at->piece < 0) {
        *length = frame->head_len - at->offset;
        return frame->head + at->offset;
    }
    if (at->piece >= frame->pieces) {
        *length = 0;
        return NULL;
    }
    *length = frame->piece[at->piece].iov_len - at->offset;
    return (const uint8_t *)frame->piece[at->piece].iov_base + at->offset;
}

static inline void vn_cursor_advance(struct vn_cursor *at, size_t length)
{
    size_t chunk;

    while (vn_cursor_chunk(at, &chunk) && length >= chunk) {
        length -= chunk;
        at->piece++;
        at->offset = 0;
    }
    at->offset += length;
}

static inline struct vn_cursor vn_cursor_at(const struct vn_frame *frame, size_t offset)
{
    struct vn_cursor at = {frame, -1, 0};

    vn_cursor_advance(&at, offset);
    return at;
}

/* Copy the next `length` bytes; the frame holds them (the caller counted). */
static inline void vn_cursor_copy(struct vn_cursor *at, void *to, size_t length)
{
    uint8_t *out = to;

    while (length > 0) {
        size_t chunk;
        const uint8_t *from = vn_cursor_chunk(at, &chunk);

        if (!from)
            return;
        if (chunk > length)
            chunk = length;
        memmove(out, from, chunk); /* a guest may name the same memory twice */
        vn_cursor_advance(at, chunk);
        out += chunk;
        length -= chunk;
    }
}

/* `piece` describes the whole frame of `len` bytes: take the head out of it, once. */
static inline void vn_frame_load(struct vn_frame *frame)
{
    unsigned from = 0, to = 0;
    size_t got = 0;

    while (from < frame->pieces && got < VN_HEAD) {
        struct iovec *piece = &frame->piece[from];
        size_t chunk = piece->iov_len < VN_HEAD - got ? piece->iov_len : VN_HEAD - got;

        memcpy(frame->head + got, piece->iov_base, chunk);
        got += chunk;
        piece->iov_base = (uint8_t *)piece->iov_base + chunk;
        piece->iov_len -= chunk;
        if (piece->iov_len > 0)
            break;
        from++;
    }
    if (from > 0)
        while (from < frame->pieces)
            frame->piece[to++] = frame->piece[from++];
    else
        to = frame->pieces;
    frame->pieces = (uint16_t)to;
    frame->head_len = (uint16_t)got;
}

/* A copy whose head may be changed; the pieces are shared. */
static inline void vn_frame_copy(struct vn_frame *to, const struct vn_frame *from)
{
    to->len = from->len;
    to->head_len = from->head_len;
    to->pieces = from->pieces;
    to->offload = from->offload;
    memcpy(to->piece, from->piece, from->pieces * sizeof(*from->piece));
    memcpy(to->head, from->head, from->head_len);
}

#endif
