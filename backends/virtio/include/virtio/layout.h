/* The wire of virtqueues (virtio 1.2, sections 2.7 and 2.8), for either side.
 *
 * Rings lie in memory that the other side writes at any time. Every shared field is an
 * atomic, loaded once into a local, checked there, and used from there. Who publishes
 * stores with release what the other side loads with acquire; before a look at whether
 * the other side sleeps (or goes to sleep) stands a full fence.
 */
#ifndef VIRTIO_LAYOUT_H
#define VIRTIO_LAYOUT_H

#include <shm/space.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the layouts are little-endian and read in place"
#endif

#define VQ_MAX_SIZE 32768u

/* Feature bits that change a ring. */
#define VQ_INDIRECT (1ull << 28)
#define VQ_EVENT_IDX (1ull << 29)
#define VQ_PACKED (1ull << 34)

/* Flags of a descriptor; the last two only in packed rings. */
#define VQ_F_NEXT 1u
#define VQ_F_WRITE 2u
#define VQ_F_INDIRECT 4u
#define VQ_F_AVAIL 0x80u
#define VQ_F_USED 0x8000u

#define VQ_SPLIT_QUIET 1u /* split: `flags` of the avail or used ring */
#define VQ_WRAP 0x8000u   /* packed: the wrap counter in `off_wrap` */

/* Packed: `flags` of an event suppression area. */
enum { VQ_EVENT_ENABLE = 0, VQ_EVENT_DISABLE = 1, VQ_EVENT_DESC = 2 };

struct vq_split_desc {
    _Atomic uint64_t addr;
    _Atomic uint32_t len;
    _Atomic uint16_t flags, next;
};

struct vq_avail {
    _Atomic uint16_t flags, idx, ring[]; /* ring[size] is used_event */
};

struct vq_used_elem {
    _Atomic uint32_t id, len;
};

struct vq_used {
    _Atomic uint16_t flags, idx;
    struct vq_used_elem ring[]; /* the first half of ring[size].id is avail_event */
};

struct vq_packed_desc {
    _Atomic uint64_t addr;
    _Atomic uint32_t len;
    _Atomic uint16_t id, flags;
};

struct vq_event {
    _Atomic uint16_t off_wrap, flags;
};

/* A descriptor of either kind, in private memory, laid as in a split table; `next` is
 * the id in packed rings. */
struct vq_entry {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

/* From a packed table, where the id comes before the flags, or to it. */
static inline struct vq_entry vq_swapped(struct vq_entry entry)
{
    return (struct vq_entry){entry.addr, entry.len, entry.next, entry.flags};
}

_Static_assert(sizeof(struct vq_split_desc) == 16, "as on the wire");
_Static_assert(sizeof(struct vq_packed_desc) == 16, "as on the wire");
_Static_assert(sizeof(struct vq_entry) == 16, "as on the wire");

#define vq_load(field) atomic_load_explicit(&(field), memory_order_relaxed)
#define vq_load_acquire(field) atomic_load_explicit(&(field), memory_order_acquire)
#define vq_store(field, value) atomic_store_explicit(&(field), value, memory_order_relaxed)
#define vq_store_release(field, value) \
    atomic_store_explicit(&(field), value, memory_order_release)

static inline void vq_fence(void)
{
    atomic_thread_fence(memory_order_seq_cst);
}

static inline _Atomic uint16_t *vq_avail_event(struct vq_used *used, uint32_t size)
{
    return (_Atomic uint16_t *)(void *)&used->ring[size];
}

/* Was `event` passed by the step from `old` to `new` (2.7.10)? */
static inline bool vq_passed(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

static inline uint16_t vq_off_wrap(uint32_t at, bool wrap)
{
    return (uint16_t)(at | (wrap ? VQ_WRAP : 0));
}

/* Packed: does the other side, which left `event`, want to hear of the last `moved`
 * descriptors before the position `at`? Reserved flags count as yes. */
static inline bool vq_event_wants(struct vq_event *event, bool event_idx, uint32_t size,
                                  uint32_t at, bool wrap, uint32_t moved)
{
    uint16_t flags = vq_load_acquire(event->flags), off_wrap;
    uint32_t target;

    if (flags == VQ_EVENT_DISABLE)
        return false;
    if (flags != VQ_EVENT_DESC || !event_idx)
        return true;
    off_wrap = vq_load(event->off_wrap);
    target = off_wrap & (VQ_WRAP - 1);
    if (!(off_wrap & VQ_WRAP) == wrap) /* it means the lap before */
        target -= size;
    return vq_passed((uint16_t)target, (uint16_t)at, (uint16_t)(at - moved));
}

/* The flags by which a packed descriptor says whose it is, on a lap. */
static inline uint16_t vq_avail_flags(bool wrap)
{
    return wrap ? VQ_F_AVAIL : VQ_F_USED;
}

static inline uint16_t vq_used_flags(bool wrap)
{
    return wrap ? VQ_F_AVAIL | VQ_F_USED : 0;
}

static inline bool vq_owned(uint16_t flags, uint16_t wanted)
{
    return (flags & (VQ_F_AVAIL | VQ_F_USED)) == wanted;
}

/* Move on in a packed ring; passing its end begins the next lap. */
static inline void vq_advance(uint16_t *at, bool *wrap, uint32_t by, uint32_t size)
{
    uint32_t to = *at + by;

    if (to >= size) {
        to -= size;
        *wrap = !*wrap;
    }
    *at = (uint16_t)to;
}

/* Can a ring of this kind have this size. */
static inline bool vq_fits(uint32_t size, uint64_t features)
{
    return size > 0 && size <= VQ_MAX_SIZE &&
           ((features & VQ_PACKED) || (size & (size - 1)) == 0);
}

/* The three parts of a ring, mapped; `generation` of the space when all were alive. */
struct vq_parts {
    struct vb_space *space;
    struct vb_view desc, driver, device;
    uint64_t generation;
};

static inline bool vq_aligned(const struct vb_view *view, uint64_t unit)
{
    return ((view->addr | (uintptr_t)view->host) & (unit - 1)) == 0;
}

static inline void vq_parts_close(struct vq_parts *parts)
{
    vb_view_close(&parts->desc);
    vb_view_close(&parts->driver);
    vb_view_close(&parts->device);
}

struct vq_addresses {
    uint64_t desc, driver, device;
};

/* Map the parts, all writable for the driver, who lays them: 0; -EFAULT not memory;
 * -EINVAL misaligned, or in regions that cannot lie side by side; -ENOMEM. */
static inline int vq_parts_open(struct vq_parts *parts, struct vb_space *space,
                                struct vq_addresses at, uint32_t size, uint64_t features,
                                bool device_side)
{
    bool packed = features & VQ_PACKED;
    uint64_t extra = features & VQ_EVENT_IDX ? 2 : 0;
    uint64_t driver = packed ? sizeof(struct vq_event) : 4 + 2 * (uint64_t)size + extra;
    uint64_t device = packed ? sizeof(struct vq_event) : 4 + 8 * (uint64_t)size + extra;
    int error;

    *parts = (struct vq_parts){.space = space, .generation = space->generation};
    error = vb_view_open(&parts->desc, space, at.desc, 16 * (uint64_t)size,
                         packed || !device_side);
    if (!error)
        error = vb_view_open(&parts->driver, space, at.driver, driver, !device_side);
    if (!error)
        error = vb_view_open(&parts->device, space, at.device, device, true);
    if (!error && !(vq_aligned(&parts->desc, 16) &&
                    vq_aligned(&parts->driver, packed ? 4 : 2) &&
                    vq_aligned(&parts->device, 4)))
        error = -EINVAL;
    if (error)
        vq_parts_close(parts);
    return error;
}

/* Is the ring still memory? Asked at the begin of every operation. */
static inline bool vq_parts_alive(struct vq_parts *parts)
{
    if (parts->generation == parts->space->generation)
        return parts->desc.nparts > 0;
    if (!vb_view_alive(&parts->desc) || !vb_view_alive(&parts->driver) ||
        !vb_view_alive(&parts->device))
        return false;
    parts->generation = parts->space->generation;
    return true;
}

#endif
