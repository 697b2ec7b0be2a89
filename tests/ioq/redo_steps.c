/* The south end of a ring that dies in a push or pop, and the one after it.
 *
 * A shared library for test_redo.py, on a ring that lies in a memory file. */
#define _GNU_SOURCE
#include <ioq/ring.h>

struct end {
    struct vb_space space;
    struct vb_view view;
    struct vb_ring ring;
};

struct end *end_new(int fd, uint64_t bytes, uint64_t size)
{
    struct end *end = calloc(1, sizeof(*end));

    if (vb_space_map(&end->space, 0, bytes, fd, 0, true) ||
        vb_view_open(&end->view, &end->space, 0, size, true) ||
        vb_ring_attach(&end->ring, &end->view, &end->space, VB_SOUTH, 2048))
        return NULL;
    return end;
}

void end_free(struct end *end)
{
    vb_view_close(&end->view);
    vb_space_clear(&end->space);
    free(end);
}

/* How many descriptors from our position on are ours. */
uint32_t end_ours(struct end *end, int where)
{
    struct vb_desc desc;
    uint32_t n = 0;

    while (vb_ring_peek(&end->ring, VB_INUSE, where, n, &desc) > 0)
        n++;
    return n;
}

uint32_t end_position(struct end *end, int where)
{
    return end->ring.pos[VB_INUSE][where];
}

/* Move n descriptors, and die after `flips` of them were handed on; -1: before all. */
int end_move(struct end *end, int where, uint32_t n, int flips)
{
    struct vb_ring *ring = &end->ring;
    uint32_t first = ring->pos[VB_INUSE][where];
    int error;

    if (flips < 0)
        return 0;
    error = where == VB_HEAD ? vb_ring_pop(ring, VB_INUSE, n, VB_KEEP_OWNER)
                             : vb_ring_push(ring, VB_INUSE, n, VB_KEEP_OWNER);
    vb_ring_flip(ring, first, (uint32_t)flips < n ? (uint32_t)flips : n);
    return error;
}

int end_redo(struct end *end, int where, uint32_t first, uint32_t n)
{
    return vb_ring_redo(&end->ring, where, first, n);
}
