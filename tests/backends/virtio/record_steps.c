/* The device's end of a ring with its in-flight record, that dies at a chosen step.
 *
 * A shared library for test_record.py. `steps` counts VQ_STEP() of one call: at that one
 * the process "dies" (the call returns DIED), 0 is never. What a dead process had in its
 * own memory is not looked at again.
 */
#define _GNU_SOURCE
#include <setjmp.h>

static jmp_buf death;
static long left;

static void step(void)
{
    if (left > 0 && --left == 0)
        longjmp(death, 1);
}

#define VQ_STEP() step()
#include <virtio/queue.h>

enum { NONE = -1, DIED = -2, FAILED = -3, OUTS = 64 };

struct end {
    struct vb_space space;
    struct vq queue;
    struct vq_chain out[OUTS];
    uint32_t outs;
};

struct end *end_new(int fd, uint64_t bytes)
{
    struct end *end = calloc(1, sizeof(*end));

    if (end && vb_space_map(&end->space, 0, bytes, fd, 0, true)) {
        free(end);
        return NULL;
    }
    return end;
}

void end_free(struct end *end)
{
    for (uint32_t n = 0; n < end->outs; n++)
        vq_chain_free(&end->out[n]);
    vq_close(&end->queue);
    vb_space_clear(&end->space);
    free(end->space.regions);
    free(end);
}

int end_open(struct end *end, uint32_t size, const uint64_t *at, uint64_t features,
             uint8_t *record, bool resume, long steps)
{
    struct vq_addresses where = {at[0], at[1], at[2]};

    if (vq_open(&end->queue, &end->space, size, where, features, NULL))
        return FAILED;
    left = steps;
    if (setjmp(death))
        return DIED;
    return vq_record_begin(&end->queue, record, resume) ? FAILED : 0;
}

/* Take a chain: its id. */
int end_pop(struct end *end, long steps)
{
    struct vq_chain *chain = &end->out[end->outs];
    int got;

    if (end->outs == OUTS)
        return NONE;
    *chain = (struct vq_chain){.segs = NULL};
    left = steps;
    if (setjmp(death))
        return DIED;
    got = vq_check(&end->queue) ? FAILED : vq_pop(&end->queue, chain);
    if (got <= 0)
        return got ? FAILED : NONE;
    end->outs++;
    return chain->id;
}

/* Give back the chains at `which`, together. */
int end_give(struct end *end, const uint32_t *which, uint32_t count, long steps)
{
    left = steps;
    if (setjmp(death))
        return DIED;
    for (uint32_t n = 0; n < count; n++)
        vq_push(&end->queue, &end->out[which[n]], 0);
    vq_publish(&end->queue);
    left = 0;
    for (uint32_t n = 0; n < count; n++)
        vq_chain_free(&end->out[which[n]]);
    for (uint32_t n = count; n-- > 0;) /* ascending in `which` */
        memmove(&end->out[which[n]], &end->out[which[n] + 1],
                (--end->outs - which[n]) * sizeof(*end->out));
    return 0;
}
