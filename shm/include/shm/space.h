/* The guest's memory as the function sees it: a table of mapped regions, and views.
 *
 * A region is a range of guest addresses, with memory behind it (a shared mapping of a
 * file) or without. Addresses and sizes come from a hostile guest: each look-up checks
 * them against the table. What lies in the memory itself is not looked at here.
 *
 * Not thread-safe: a table and its views belong to one thread. Functions return 0 or a
 * count, or -errno. Define _GNU_SOURCE (mremap) or include this before system headers.
 */
#ifndef SHM_SPACE_H
#define SHM_SPACE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#define VB_SPACE_MAX_REGIONS 32768u /* a guest must not use up our mappings */
#define VB_VIEW_MAX_PARTS 1024u      /* each costs a mapping more */
#define VB_HUGETLBFS_MAGIC 0x958458f6u

struct vb_region {
    uint64_t addr, size;
    uint8_t *host;      /* NULL: known to the guest, but no memory we could reach */
    size_t host_size;   /* bytes mapped: size rounded up to the file's pages */
    bool writable;
    bool alive;         /* false once unmapped: `host` must not be used any more */
    unsigned refs;      /* the table's own and one per view */
};

struct vb_space {
    struct vb_region **regions; /* sorted by addr, never overlapping */
    size_t count, room;
    size_t last;                /* where the last look-up hit */
    uint64_t generation;        /* changes whenever the table does */
    uint64_t bytes;             /* mapped memory, regions without memory not counted */
    uint64_t faults;            /* look-ups refused */
};

/* A contiguous piece of guest memory, kept for a while. `host` may be used only after
 * vb_view_alive() said yes, within one operation (nothing unmaps in the middle). */
struct vb_view {
    uint8_t *host;
    uint64_t addr, size;
    bool writable;
    bool own_map;               /* `host` is a mirror of several regions side by side */
    int nparts;                 /* 0: closed */
    struct vb_region **parts;
};

static inline uint64_t vb_page_size(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

static inline uint64_t vb_round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static inline void vb_region_unref(struct vb_region *region)
{
    if (--region->refs == 0)
        free(region);
}

/* Number of regions that begin at or below `addr`. */
static inline size_t vb_space_upper(const struct vb_space *space, uint64_t addr)
{
    size_t low = 0, high = space->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (space->regions[middle]->addr <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The region that holds `addr`, with memory or without, or NULL. */
static inline struct vb_region *vb_space_find(struct vb_space *space, uint64_t addr)
{
    struct vb_region *region;
    size_t upper;

    if (space->last < space->count) {
        region = space->regions[space->last];
        if (addr - region->addr < region->size)
            return region;
    }
    upper = vb_space_upper(space, addr);
    if (upper == 0)
        return NULL;
    region = space->regions[upper - 1];
    if (addr - region->addr >= region->size)
        return NULL;
    space->last = upper - 1;
    return region;
}

static inline uint64_t vb_file_page_size(int fd)
{
    struct statfs about;

    if (fstatfs(fd, &about) == 0 && (uint32_t)about.f_type == VB_HUGETLBFS_MAGIC)
        return (uint64_t)about.f_bsize;
    return vb_page_size();
}

static inline int vb_region_mmap(struct vb_region *region, int fd, uint64_t offset)
{
    int protection = region->writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *host;

    region->host_size = vb_round_up(region->size, vb_file_page_size(fd));
    host = mmap(NULL, region->host_size, protection, MAP_SHARED, fd, (off_t)offset);
    if (host == MAP_FAILED)
        return -errno;
    region->host = host;
    return 0;
}

static inline int vb_space_grow(struct vb_space *space)
{
    size_t room = space->room ? 2 * space->room : 8;
    struct vb_region **regions;

    if (space->count < space->room)
        return 0;
    if (space->count >= VB_SPACE_MAX_REGIONS)
        return -ENOSPC;
    regions = realloc(space->regions, room * sizeof(*regions));
    if (!regions)
        return -ENOMEM;
    space->regions = regions;
    space->room = room;
    return 0;
}

/* Add a region; fd < 0: one without memory. The fd is not kept. The caller has checked
 * that the file covers offset + size and cannot shrink (else a read here is SIGBUS).
 * -EINVAL size 0, wrap, offset not a page multiple; -EEXIST overlap; -ENOSPC; mmap's. */
static inline int vb_space_map(struct vb_space *space, uint64_t addr, uint64_t size,
                               int fd, uint64_t offset, bool writable)
{
    uint64_t end = addr + size - 1; /* the last byte: a range may touch the very top */
    struct vb_region *region;
    size_t at;
    int error;

    if (size == 0 || end < addr || size > (uint64_t)INT64_MAX - vb_page_size())
        return -EINVAL;
    if (fd >= 0 && (offset % vb_page_size() || offset > (uint64_t)INT64_MAX - size))
        return -EINVAL;
    at = vb_space_upper(space, end);
    if (at > 0 && space->regions[at - 1]->addr + (space->regions[at - 1]->size - 1) >= addr)
        return -EEXIST;
    error = vb_space_grow(space);
    if (error)
        return error;
    region = calloc(1, sizeof(*region));
    if (!region)
        return -ENOMEM;
    *region = (struct vb_region){
        .addr = addr, .size = size, .writable = writable, .alive = true, .refs = 1};
    error = fd < 0 ? 0 : vb_region_mmap(region, fd, offset);
    if (error) {
        free(region);
        return error;
    }
    memmove(space->regions + at + 1, space->regions + at,
            (space->count - at) * sizeof(*space->regions));
    space->regions[at] = region;
    space->count++;
    space->bytes += region->host ? size : 0;
    space->generation++;
    return 0;
}

static inline void vb_region_kill(struct vb_region *region)
{
    region->alive = false;
    if (region->host)
        munmap(region->host, region->host_size);
    region->host = NULL;
    vb_region_unref(region);
}

/* Remove every region inside the range: their number (0 is fine), or -EINVAL, and
 * nothing is removed, when the range wraps or cuts a region in two. */
static inline long vb_space_unmap(struct vb_space *space, uint64_t addr, uint64_t size)
{
    uint64_t end = addr + size - 1;
    size_t from, to;

    if (size == 0)
        return 0;
    if (end < addr)
        return -EINVAL;
    to = vb_space_upper(space, end);
    for (from = to; from > 0; from--) {
        const struct vb_region *region = space->regions[from - 1];
        uint64_t last = region->addr + (region->size - 1);

        if (last < addr)
            break;
        if (region->addr < addr || last > end)
            return -EINVAL;
    }
    for (size_t i = from; i < to; i++) {
        space->bytes -= space->regions[i]->host ? space->regions[i]->size : 0;
        vb_region_kill(space->regions[i]);
    }
    if (to == from)
        return 0;
    memmove(space->regions + from, space->regions + to,
            (space->count - to) * sizeof(*space->regions));
    space->count -= to - from;
    space->last = 0;
    space->generation++;
    return (long)(to - from);
}

static inline void vb_space_clear(struct vb_space *space)
{
    for (size_t i = 0; i < space->count; i++)
        vb_region_kill(space->regions[i]);
    free(space->regions);
    *space = (struct vb_space){.generation = space->generation + 1,
                               .faults = space->faults};
}

/* The host address of a range inside one region; NULL if it is not memory, not writable
 * when it must be, or crosses a border. Valid until the next unmap. */
static inline uint8_t *vb_space_ptr(struct vb_space *space, uint64_t addr, uint64_t size,
                                    bool write)
{
    struct vb_region *region = vb_space_find(space, addr);
    uint64_t offset;

    if (!region || !region->host || (write && !region->writable))
        return NULL;
    offset = addr - region->addr;
    return size <= region->size - offset ? region->host + offset : NULL;
}

/* The first piece of a range: its host address, and in *length how much of `size` lies
 * there in one piece. NULL (length 0) if it is not memory, or not writable as asked. */
static inline uint8_t *vb_space_piece(struct vb_space *space, uint64_t addr,
                                      uint64_t size, bool write, uint64_t *length)
{
    struct vb_region *region = vb_space_find(space, addr);
    uint64_t offset;

    *length = 0;
    if (!region || !region->host || (write && !region->writable)) {
        space->faults++;
        return NULL;
    }
    offset = addr - region->addr;
    *length = region->size - offset < size ? region->size - offset : size;
    return region->host + offset;
}

/* Does a range of this size end within the address space? */
static inline bool vb_range_wraps(uint64_t addr, uint64_t size)
{
    return size > 0 && addr + (size - 1) < addr;
}

/* A range as pieces of host memory, at most `max`: their number, -EFAULT if any byte of
 * it is not memory (or not writable when it must be), -E2BIG if more are needed. */
static inline int vb_space_iov(struct vb_space *space, uint64_t addr, uint64_t size,
                               bool write, struct iovec *out, int max)
{
    int pieces = 0;

    if (vb_range_wraps(addr, size))
        return -EFAULT;
    while (size > 0) {
        uint64_t length;
        uint8_t *host = vb_space_piece(space, addr, size, write, &length);

        if (!host)
            return -EFAULT;
        if (pieces == max)
            return -E2BIG;
        out[pieces++] = (struct iovec){host, length};
        addr += length;
        size -= length;
    }
    return pieces;
}

/* Is every byte of the range memory (that may be written)? */
static inline bool vb_space_covers(struct vb_space *space, uint64_t addr, uint64_t size,
                                   bool write)
{
    uint64_t length;

    if (vb_range_wraps(addr, size))
        return false;
    for (; size > 0; addr += length, size -= length)
        if (!vb_space_piece(space, addr, size, write, &length))
            return false;
    return true;
}

static inline int vb_space_copy(struct vb_space *space, uint64_t addr, uint8_t *local,
                                uint64_t size, bool write)
{
    uint8_t *host = vb_space_ptr(space, addr, size, write);
    uint64_t length = size;

    if (!host && !vb_space_covers(space, addr, size, write)) /* all or nothing */
        return -EFAULT;
    while (size > 0) {
        if (!host)
            host = vb_space_piece(space, addr, size, write, &length);
        memcpy(write ? host : local, write ? local : host, length);
        host = NULL;
        local += length;
        addr += length;
        size -= length;
    }
    return 0;
}

/* Copy out of (into) guest memory, across borders, all or nothing: 0 or -EFAULT. */
static inline int vb_space_read(struct vb_space *space, uint64_t addr, void *to,
                                uint64_t size)
{
    return vb_space_copy(space, addr, to, size, false);
}

static inline int vb_space_write(struct vb_space *space, uint64_t addr, const void *from,
                                 uint64_t size)
{
    return vb_space_copy(space, addr, (uint8_t *)(uintptr_t)from, size, true);
}

/* All parts are still mapped: ask once per operation, then use `host`. */
static inline bool vb_view_alive(const struct vb_view *view)
{
    for (int i = 0; i < view->nparts; i++)
        if (!view->parts[i]->alive)
            return false;
    return view->nparts > 0;
}

/* Host address of a part of the view; NULL if it is dead or the part is outside. */
static inline uint8_t *vb_view_ptr(const struct vb_view *view, uint64_t offset,
                                   uint64_t size)
{
    if (!vb_view_alive(view) || offset > view->size || size > view->size - offset)
        return NULL;
    return view->host + offset;
}

static inline void vb_view_close(struct vb_view *view)
{
    uint64_t page = vb_page_size();

    if (view->own_map) {
        uint64_t lead = (uintptr_t)view->host % page;

        munmap(view->host - lead, vb_round_up(lead + view->size, page));
    }
    for (int i = 0; i < view->nparts; i++)
        vb_region_unref(view->parts[i]);
    free(view->parts);
    *view = (struct vb_view){0};
}

/* Map the parts a second time, side by side, so that the view is contiguous for us too.
 * Only possible where they meet on page borders of their files, else -EINVAL. */
static inline int vb_view_mirror(struct vb_view *view)
{
    uint64_t page = vb_page_size(), done = 0;
    uint64_t skip = view->addr - view->parts[0]->addr, lead = skip % page;
    uint64_t span = vb_round_up(lead + view->size, page);
    uint8_t *base;

    for (int i = 0; i < view->nparts - 1; i++)
        if (view->parts[i]->size % page)
            return -EINVAL;
    base = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return -errno;
    skip -= lead;
    for (int i = 0; i < view->nparts; i++, skip = 0) {
        uint64_t length = view->parts[i]->size - skip;

        if (length > span - done)
            length = span - done;
        /* An old size of 0 duplicates a shared mapping. */
        if (mremap(view->parts[i]->host + skip, 0, vb_round_up(length, page),
                   MREMAP_MAYMOVE | MREMAP_FIXED, base + done) == MAP_FAILED) {
            int error = -errno;

            munmap(base, span);
            return error;
        }
        done += length;
    }
    view->host = base + lead;
    view->own_map = true;
    return 0;
}

/* Open a view: 0; -EINVAL size 0, too many parts, or parts that cannot lie side by side;
 * -EFAULT a byte is not memory (or not writable when it must be); -ENOMEM. `view` need
 * not be initialised. */
static inline int vb_view_open(struct vb_view *view, struct vb_space *space,
                               uint64_t addr, uint64_t size, bool write)
{
    size_t first, last;

    *view = (struct vb_view){.addr = addr, .size = size, .writable = write};
    if (size == 0)
        return -EINVAL;
    if (!vb_space_covers(space, addr, size, write))
        return -EFAULT;
    first = vb_space_upper(space, addr) - 1;
    last = vb_space_upper(space, addr + (size - 1)) - 1;
    if (last - first >= VB_VIEW_MAX_PARTS)
        return -EINVAL;
    view->parts = calloc(last - first + 1, sizeof(*view->parts));
    if (!view->parts)
        return -ENOMEM;
    for (size_t i = first; i <= last; i++) {
        view->parts[view->nparts++] = space->regions[i];
        space->regions[i]->refs++;
    }
    if (view->nparts == 1) {
        view->host = view->parts[0]->host + (addr - view->parts[0]->addr);
    } else {
        int error = vb_view_mirror(view);

        if (error) {
            vb_view_close(view);
            return error;
        }
    }
    return 0;
}

#endif
