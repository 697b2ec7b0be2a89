/* A TAP file descriptor as an end of the hub: frames with a vnet header before them, so
 * that segmentation and checksums stay with the kernel.
 *
 * The fd is non-blocking. The kernel is trusted with memory, not with shapes: what it
 * hands us goes through the same offload checks as a guest's frame.
 */
#ifndef NET_TAP_H
#define NET_TAP_H

#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "net/offload.h"

#define VN_TAP_MAX_FRAME (65536u + 64u)
#define VN_TAP_BUFFER (8u * VN_TAP_MAX_FRAME)

struct vn_tap_counters {
    uint64_t in_frames, in_bytes, in_errors, out_frames, out_bytes, out_errors;
};

struct vn_tap {
    int fd;
    size_t header_size;  /* 12 or 10 */
    uint8_t *buffer;     /* frames of one batch, one behind the other; made when needed */
    struct vn_tap_counters counters;
};

static inline struct vn_offload vn_offload_from_tap(const struct vn_tap_header *header)
{
    struct vn_offload out = {.csum_start = header->csum_start,
                             .csum_offset = header->csum_offset};
    uint8_t type = header->gso_type & (uint8_t)~VN_TAP_GSO_ECN;

    if (header->flags & VN_TAP_NEEDS_CSUM)
        out.flags |= VN_SG_NEEDS_CSUM;
    if (type == VN_TAP_GSO_NONE)
        return out;
    out.flags |= VN_SG_GSO | (header->gso_type & VN_TAP_GSO_ECN ? VN_SG_ECN : 0);
    out.gso_size = header->gso_size;
    out.gso_type = type == VN_TAP_GSO_TCP4   ? VN_GSO_TCP4
                   : type == VN_TAP_GSO_TCP6 ? VN_GSO_TCP6
                                             : VN_GSO_UDP;
    return out;
}

static inline struct vn_tap_header vn_offload_to_tap(const struct vn_offload *offload)
{
    struct vn_tap_header out = {0};

    if (offload->flags & VN_SG_NEEDS_CSUM) {
        out.flags = VN_TAP_NEEDS_CSUM;
        out.csum_start = offload->csum_start;
        out.csum_offset = offload->csum_offset;
    }
    if (offload->flags & VN_SG_GSO) {
        out.gso_type = offload->gso_type == VN_GSO_TCP4 ? VN_TAP_GSO_TCP4 : VN_TAP_GSO_TCP6;
        if (offload->flags & VN_SG_ECN)
            out.gso_type |= VN_TAP_GSO_ECN;
        out.gso_size = offload->gso_size;
        out.hdr_len = offload->hdr_len;
    }
    return out;
}

/* Read one frame into `to`: its length, 0 = nothing there, or -errno. A frame we cannot
 * use counts as an error and reads as -EBADMSG. */
static inline ssize_t vn_tap_read(struct vn_tap *tap, uint8_t *to, size_t room,
                                  struct vn_frame *frame)
{
    struct vn_tap_header header = {0};
    struct iovec into[2] = {{&header, tap->header_size}, {to, room}};
    ssize_t got = readv(tap->fd, into, 2);

    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : errno == EIO ? -ENODEV : -errno;
    got -= (ssize_t)tap->header_size;
    frame->offload = vn_offload_from_tap(&header);
    frame->pieces = 1;
    if (got >= (ssize_t)VN_ETHER_HEADER) {
        frame->piece[0] = (struct iovec){to, (size_t)got};
        frame->len = (uint32_t)got;
        vn_frame_load(frame);
        if (vn_offload_check(frame) == 0) {
            tap->counters.in_frames++;
            tap->counters.in_bytes += (uint64_t)got;
            return got;
        }
    }
    tap->counters.in_errors++;
    return -EBADMSG;
}

static inline uint64_t vn_tap_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Is there a frame (or an error to fetch)? Looks for up to `ns` nanoseconds. */
static inline bool vn_tap_ready(struct vn_tap *tap, uint64_t ns)
{
    struct pollfd look = {.fd = tap->fd, .events = POLLIN};
    uint64_t start = ns > 0 ? vn_tap_clock() : 0;

    do {
        if (poll(&look, 1, 0) != 0)
            return true;
    } while (ns > 0 && vn_tap_clock() - start < ns);
    return false;
}

/* Read frames into the batch: their number, or -errno when the device is gone. */
static inline int vn_tap_collect(struct vn_tap *tap, struct vn_batch *batch)
{
    size_t used = 0;

    batch->count = 0;
    if (!tap->buffer && !(tap->buffer = malloc(VN_TAP_BUFFER)))
        return -ENOMEM;
    while (batch->count < VN_BATCH && used + VN_TAP_MAX_FRAME <= VN_TAP_BUFFER) {
        ssize_t got = vn_tap_read(tap, tap->buffer + used, VN_TAP_MAX_FRAME,
                                  &batch->frame[batch->count]);
        if (got == 0)
            break;
        if (got == -EBADMSG)
            continue;
        if (got < 0)
            return (int)got;
        batch->count++;
        used += ((size_t)got + 63) & ~(size_t)63;
    }
    return (int)batch->count;
}

/* Write frames; one that the kernel does not take (interface down) is counted. */
static inline void vn_tap_deliver(struct vn_tap *tap, const struct vn_batch *batch,
                                  unsigned from, unsigned n)
{
    for (unsigned i = from; i < from + n && i < batch->count; i++) {
        const struct vn_frame *frame = &batch->frame[i];
        struct vn_tap_header header = vn_offload_to_tap(&frame->offload);
        struct iovec out[VN_PIECES + 3];

        out[0] = (struct iovec){&header, tap->header_size};
        out[1] = (struct iovec){(void *)(uintptr_t)frame->head, frame->head_len};
        memcpy(out + 2, frame->piece, frame->pieces * sizeof(*out));
        if (writev(tap->fd, out, 2 + frame->pieces) < 0) {
            tap->counters.out_errors++;
            continue;
        }
        tap->counters.out_frames++;
        tap->counters.out_bytes += frame->len;
    }
}

#endif
