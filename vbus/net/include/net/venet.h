/* The byte layouts of venet (ABI section 7) and of the header a TAP puts before a frame.
 * Constants and structs only.
 */
#ifndef NET_VENET_H
#define NET_VENET_H

#include <stdint.h>

enum { /* capability bits of groups 0 (guest to host) and 2 (host to guest) */
    VN_CAP_SG = 1 << 0,
    VN_CAP_TSO4 = 1 << 1,
    VN_CAP_TSO6 = 1 << 2,
    VN_CAP_ECN = 1 << 3,
    VN_CAP_UFO = 1 << 4,
    VN_CAP_PMTD = 1 << 5,
};

enum { VN_SG_NEEDS_CSUM = 1 << 0, VN_SG_GSO = 1 << 1, VN_SG_ECN = 1 << 2 };
enum { VN_GSO_TCP4 = 0, VN_GSO_UDP = 1, VN_GSO_TCP6 = 2 };

#define VN_ETHER_HEADER 14u
#define VN_MAX_GSO 65536u    /* vsg.len of a GSO frame */
#define VN_MAX_FRAGMENTS 18u
#define VN_MAX_SG_SIZE 320u  /* 32 + 16 * 18 */

struct vn_iov {
    uint32_t len, pad;
    uint64_t ptr;
};

struct vn_sg {
    uint64_t cookie;
    uint32_t flags;
    uint32_t len;           /* of all fragments */
    uint16_t csum_start;    /* from the start of the frame */
    uint16_t csum_offset;   /* from csum_start */
    uint8_t gso_type;
    uint8_t pad0;
    uint16_t gso_hdrlen;
    uint16_t gso_size;
    uint16_t pad1;
    uint32_t count;
};

enum { VN_EVENT_LINKSTATE = 0, VN_EVENT_TXC = 1 };

struct vn_event {
    uint32_t flags, size, id;
};

struct vn_event_linkstate {
    struct vn_event header;
    uint8_t state, pad[3];
};

struct vn_event_txc {
    struct vn_event header;
    uint32_t txqid;
    uint64_t cookie;
};

#define VN_EVENT_SIZE 24u

/* struct virtio_net_hdr, little-endian, of 12 or (without num_buffers) 10 bytes. */
struct vn_tap_header {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

enum { VN_TAP_NEEDS_CSUM = 1 };
enum { VN_TAP_GSO_NONE = 0, VN_TAP_GSO_TCP4 = 1, VN_TAP_GSO_TCP6 = 4, VN_TAP_GSO_ECN = 0x80 };

_Static_assert(sizeof(struct vn_iov) == 16, "vn_iov");
_Static_assert(sizeof(struct vn_sg) == 32, "vn_sg");
_Static_assert(sizeof(struct vn_event_linkstate) == 16, "vn_event_linkstate");
_Static_assert(sizeof(struct vn_event_txc) == VN_EVENT_SIZE, "vn_event_txc");
_Static_assert(sizeof(struct vn_tap_header) == 12, "vn_tap_header");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "read in place");

#endif
