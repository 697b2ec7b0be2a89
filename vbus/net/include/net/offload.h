/* Checksum and segmentation offload in software: what a network card would do for a
 * receiver that takes only plain frames. TCP over IPv4 and IPv6.
 *
 * The convention of ABI 12.2: in a frame that NEEDS_CSUM the checksum field holds the
 * folded sum of the pseudo header, not complemented, over the whole transport length.
 */
#ifndef NET_OFFLOAD_H
#define NET_OFFLOAD_H

#include <errno.h>

#include "net/frame.h"

#define VN_TCP 6
enum { VN_TCP_FIN = 0x01, VN_TCP_PSH = 0x08, VN_TCP_CWR = 0x80 };

static inline uint16_t vn_get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline void vn_put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline uint32_t vn_get32(const uint8_t *at)
{
    return (uint32_t)vn_get16(at) << 16 | vn_get16(at + 2);
}

static inline void vn_put32(uint8_t *at, uint32_t value)
{
    vn_put16(at, value >> 16);
    vn_put16(at + 2, value);
}

/* Ones' complement sum of native 16-bit words; byte order does not matter to it, so the
 * result is turned round once, in vn_fold(). */
static inline uint64_t vn_sum(const uint8_t *at, size_t length)
{
    uint64_t sum = 0;

    for (; length >= 4; at += 4, length -= 4) {
        uint32_t word;

        memcpy(&word, at, 4);
        sum += word;
    }
    if (length & 2) {
        uint16_t word;

        memcpy(&word, at, 2);
        sum += word;
        at += 2;
    }
    if (length & 1)
        sum += *at;
    return sum;
}

static inline uint16_t vn_fold_native(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

/* The folded sum in host order, as a number one would write with vn_put16. */
static inline uint16_t vn_fold(uint64_t sum)
{
    return __builtin_bswap16(vn_fold_native(sum));
}

/* Sum of a frame's bytes from `start` to its end. */
static inline uint64_t vn_frame_sum(const struct vn_frame *frame, size_t start)
{
    struct vn_cursor at = vn_cursor_at(frame, start);
    uint64_t sum = 0;
    bool odd = false;
    const uint8_t *chunk;
    size_t length;

    while ((chunk = vn_cursor_chunk(&at, &length)) != NULL) {
        uint16_t part = vn_fold_native(vn_sum(chunk, length));

        sum += odd ? __builtin_bswap16(part) : part;
        odd ^= length & 1;
        vn_cursor_advance(&at, length);
    }
    return sum;
}

/* Where the headers of a TCP frame begin and end. */
struct vn_tcp {
    bool six;
    uint16_t ip, tcp, payload;
};

static inline int vn_parse_ip6(const struct vn_frame *frame, struct vn_tcp *out)
{
    size_t at = out->ip + 40u;
    uint8_t next;

    if (at > frame->head_len || frame->head[out->ip] >> 4 != 6)
        return -EINVAL;
    next = frame->head[out->ip + 6];
    while (next == 0 || next == 43 || next == 60) { /* hop by hop, routing, destination */
        if (at + 8 > frame->head_len)
            return -EINVAL;
        next = frame->head[at];
        at += 8u * (1u + frame->head[at + 1]);
    }
    out->tcp = (uint16_t)at;
    return next == VN_TCP ? 0 : -EINVAL;
}

static inline int vn_parse_ip4(const struct vn_frame *frame, struct vn_tcp *out)
{
    const uint8_t *ip = frame->head + out->ip;
    unsigned header;

    if (out->ip + 20u > frame->head_len || ip[0] >> 4 != 4)
        return -EINVAL;
    header = (ip[0] & 15u) * 4;
    if (header < 20 || ip[9] != VN_TCP || (vn_get16(ip + 6) & 0x3fff)) /* a fragment */
        return -EINVAL;
    out->tcp = (uint16_t)(out->ip + header);
    return 0;
}

/* Find TCP in the head: 0, or -EINVAL when it is not TCP or the headers do not fit. */
static inline int vn_parse_tcp(const struct vn_frame *frame, struct vn_tcp *out)
{
    size_t at = 12;
    uint16_t kind;
    unsigned header;

    do {
        if (at + 2 > frame->head_len)
            return -EINVAL;
        kind = vn_get16(frame->head + at);
        at += kind == 0x8100 || kind == 0x88a8 ? 4 : 2;
    } while (kind == 0x8100 || kind == 0x88a8);
    out->ip = (uint16_t)at;
    out->six = kind == 0x86dd;
    if (!out->six && kind != 0x0800)
        return -EINVAL;
    if (out->six ? vn_parse_ip6(frame, out) : vn_parse_ip4(frame, out))
        return -EINVAL;
    if (out->tcp + 20u > frame->head_len)
        return -EINVAL;
    header = (frame->head[out->tcp + 12] >> 4) * 4u;
    out->payload = (uint16_t)(out->tcp + header);
    return header >= 20 && out->payload <= frame->head_len ? 0 : -EINVAL;
}

/* The folded sum of the pseudo header for `length` bytes of TCP. */
static inline uint16_t vn_pseudo(const uint8_t *head, const struct vn_tcp *at,
                                 uint32_t length)
{
    uint64_t sum = at->six ? vn_sum(head + at->ip + 8, 32) : vn_sum(head + at->ip + 12, 8);
    uint8_t tail[8] = {0, 0, 0, 0, 0, 0, 0, VN_TCP};

    vn_put32(tail, length);
    return vn_fold(sum + vn_sum(tail, sizeof(tail)));
}

/* Check what the sender asks for against the frame itself, and put it into one shape: a
 * GSO frame always needs its checksum, at the place where its TCP header really is, with
 * the pseudo header's sum in it. 0 or -EINVAL. */
static inline int vn_offload_check(struct vn_frame *frame)
{
    struct vn_offload *offload = &frame->offload;
    struct vn_tcp at;

    if (!(offload->flags & VN_SG_GSO)) {
        offload->flags &= VN_SG_NEEDS_CSUM;
        if (offload->flags == 0)
            return 0;
        return offload->csum_start >= VN_ETHER_HEADER &&
                       offload->csum_start + offload->csum_offset + 2u <= frame->head_len
                   ? 0 : -EINVAL;
    }
    if (offload->gso_size == 0 || vn_parse_tcp(frame, &at) ||
        offload->gso_type != (at.six ? VN_GSO_TCP6 : VN_GSO_TCP4))
        return -EINVAL;
    offload->flags |= VN_SG_NEEDS_CSUM;
    offload->csum_start = at.tcp;
    offload->csum_offset = 16;
    offload->hdr_len = at.payload;
    vn_put16(frame->head + at.tcp + 16, vn_pseudo(frame->head, &at, frame->len - at.tcp));
    return 0;
}

/* Compute the checksum the frame still needs and store it in the head. */
static inline void vn_offload_checksum(struct vn_frame *frame)
{
    struct vn_offload *offload = &frame->offload;
    uint16_t sum;

    if (!(offload->flags & VN_SG_NEEDS_CSUM))
        return;
    sum = (uint16_t)~vn_fold(vn_frame_sum(frame, offload->csum_start));
    /* 0 means "none" in UDP; both forms mean the same in TCP. */
    vn_put16(frame->head + offload->csum_start + offload->csum_offset, sum ? sum : 0xffff);
    offload->flags &= ~(uint32_t)VN_SG_NEEDS_CSUM;
}

/* Cuts a checked GSO frame into segments that each need their checksum. */
struct vn_segments {
    const struct vn_frame *frame;
    struct vn_tcp at;
    struct vn_cursor payload;
    uint32_t done, total, number;
};

static inline void vn_segments_begin(struct vn_segments *it, const struct vn_frame *frame)
{
    *it = (struct vn_segments){.frame = frame};
    vn_parse_tcp(frame, &it->at); /* vn_offload_check() accepted it */
    it->payload = vn_cursor_at(frame, it->at.payload);
    it->total = frame->len - it->at.payload;
}

/* How many more segments vn_segments_next() will give. */
static inline uint32_t vn_segments_left(const struct vn_segments *it)
{
    uint32_t size = it->frame->offload.gso_size;

    if (it->total == 0)
        return it->number == 0;
    return (it->total - it->done + size - 1) / size;
}

static inline void vn_segment_ip(uint8_t *head, const struct vn_tcp *at, uint32_t length,
                                 uint32_t number)
{
    uint8_t *ip = head + at->ip;

    if (at->six) {
        vn_put16(ip + 4, length - 40);
        return;
    }
    vn_put16(ip + 2, length);
    vn_put16(ip + 4, vn_get16(ip + 4) + number);
    vn_put16(ip + 10, 0);
    vn_put16(ip + 10, (uint16_t)~vn_fold(vn_sum(ip, (size_t)(at->tcp - at->ip))));
}

static inline void vn_segment_slice(struct vn_segments *it, struct vn_frame *out,
                                    uint32_t length)
{
    out->pieces = 0;
    while (length > 0) {
        size_t chunk;
        const uint8_t *from = vn_cursor_chunk(&it->payload, &chunk);

        if (chunk > length)
            chunk = length;
        out->piece[out->pieces++] = (struct iovec){(void *)(uintptr_t)from, chunk};
        vn_cursor_advance(&it->payload, chunk);
        length -= (uint32_t)chunk;
    }
}

/* The next segment, or false. Its pieces point into the frame, head included. */
static inline bool vn_segments_next(struct vn_segments *it, struct vn_frame *out)
{
    const struct vn_frame *frame = it->frame;
    uint32_t length = it->total - it->done;
    uint8_t *tcp = out->head + it->at.tcp;

    if (vn_segments_left(it) == 0)
        return false;
    if (length > frame->offload.gso_size)
        length = frame->offload.gso_size;
    memcpy(out->head, frame->head, it->at.payload);
    out->head_len = it->at.payload;
    out->len = it->at.payload + length;
    out->offload = (struct vn_offload){.flags = VN_SG_NEEDS_CSUM,
                                       .csum_start = it->at.tcp,
                                       .csum_offset = 16};
    vn_segment_slice(it, out, length);
    vn_segment_ip(out->head, &it->at, out->len - it->at.ip, it->number);
    vn_put32(tcp + 4, vn_get32(tcp + 4) + it->done);
    if (it->done + length < it->total)
        tcp[13] &= (uint8_t)~(VN_TCP_FIN | VN_TCP_PSH);
    if (it->number > 0)
        tcp[13] &= (uint8_t)~VN_TCP_CWR;
    vn_put16(tcp + 16, vn_pseudo(out->head, &it->at, out->len - it->at.tcp));
    it->done += length;
    it->number++;
    return true;
}

#endif
