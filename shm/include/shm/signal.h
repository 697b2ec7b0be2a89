/* shm-signal: tell the other side that shared memory changed, as rarely as possible.
 *
 * Sixteen bytes in memory that both sides write (ABI section 5). irq[x] describes
 * notifications towards locale x: `enabled` is written by x; `pending` and `dirty` are
 * set by the other side and cleared by x. These functions move the bytes with the fences
 * of 5.4; crossing the boundary (a doorbell, an event) is the caller's business.
 *
 * The original used fences here that do not order a store before a later load; ours do.
 * `desc` needs no alignment. The peer may write anything at any time: every byte is
 * taken as zero or not zero, and nothing here depends on it for memory safety.
 */
#ifndef SHM_SIGNAL_H
#define SHM_SIGNAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the layouts are little-endian and read in place"
#endif

#define VB_SIG_MAGIC 0x58fa39dfu
#define VB_SIG_VERSION 1u
#define VB_SIG_SIZE 16u

enum { VB_NORTH = 0, VB_SOUTH = 1 };

struct vb_sig_irq {
    _Atomic uint8_t enabled, pending, dirty;
};

static inline struct vb_sig_irq *vb_sig_irq(uint8_t *desc, int locale)
{
    return (struct vb_sig_irq *)(desc + 8) + locale;
}

static inline bool vb_sig_test(_Atomic uint8_t *flag)
{
    return atomic_load_explicit(flag, memory_order_acquire) != 0;
}

static inline void vb_sig_put(_Atomic uint8_t *flag, uint8_t value)
{
    atomic_store_explicit(flag, value, memory_order_release);
}

static inline void vb_sig_fence(void)
{
    atomic_thread_fence(memory_order_seq_cst);
}

static inline void vb_sig_format(uint8_t *desc)
{
    const uint32_t head[2] = {VB_SIG_MAGIC, VB_SIG_VERSION};

    memset(desc, 0, VB_SIG_SIZE);
    memcpy(desc, head, sizeof(head));
}

static inline bool vb_sig_valid(const uint8_t *desc)
{
    uint32_t head[2];

    memcpy(head, desc, sizeof(head));
    return head[0] == VB_SIG_MAGIC && head[1] == VB_SIG_VERSION;
}

/* Ask for notifications. True: something is dirty or pending already; look again before
 * sleeping, nobody will tell. */
static inline bool vb_sig_enable(uint8_t *desc, int me)
{
    struct vb_sig_irq *mine = vb_sig_irq(desc, me);

    vb_sig_put(&mine->enabled, 1);
    vb_sig_fence(); /* our enabled before our look at dirty and at the memory */
    return vb_sig_test(&mine->dirty) || vb_sig_test(&mine->pending);
}

static inline void vb_sig_disable(uint8_t *desc, int me)
{
    vb_sig_put(&vb_sig_irq(desc, me)->enabled, 0);
    vb_sig_fence();
}

/* The memory changed: true = cross the boundary now. */
static inline bool vb_sig_inject(uint8_t *desc, int me)
{
    struct vb_sig_irq *theirs = vb_sig_irq(desc, 1 - me);

    vb_sig_put(&theirs->dirty, 1); /* release: what we changed is visible first */
    vb_sig_fence();                /* our dirty before our look at enabled, pending */
    if (!vb_sig_test(&theirs->enabled) || vb_sig_test(&theirs->pending))
        return false;
    vb_sig_put(&theirs->pending, 1);
    vb_sig_fence(); /* pending before the doorbell, by whatever way that goes */
    return true;
}

/* 5.3 a: we are about to look at the memory. */
static inline void vb_sig_wakeup_begin(uint8_t *desc, int me)
{
    vb_sig_put(&vb_sig_irq(desc, me)->dirty, 0);
    vb_sig_fence(); /* our dirty := 0 before our look at the memory */
}

/* 5.3 b, c: true = look again (from wakeup_begin), false = done, pending is cleared. */
static inline bool vb_sig_wakeup_end(uint8_t *desc, int me)
{
    struct vb_sig_irq *mine = vb_sig_irq(desc, me);

    if (vb_sig_test(&mine->enabled) && vb_sig_test(&mine->dirty))
        return true;
    vb_sig_put(&mine->pending, 0);
    vb_sig_fence(); /* our pending := 0 before our look at dirty */
    return vb_sig_test(&mine->enabled) &&
           (vb_sig_test(&mine->dirty) || vb_sig_test(&mine->pending));
}

/* Before sleeping after a drain with the signal disabled: from here on every change of
 * the memory notifies us. The caller looks at the memory once more, then sleeps. It has
 * emptied its doorbell before, or a notification taken there could hide behind pending. */
static inline void vb_sig_arm(uint8_t *desc, int me)
{
    struct vb_sig_irq *mine = vb_sig_irq(desc, me);

    vb_sig_put(&mine->pending, 0);
    vb_sig_put(&mine->dirty, 0);
    vb_sig_put(&mine->enabled, 1);
    vb_sig_fence(); /* all three before our look at the memory */
}

#endif
