/* Thin limited-API binding of ioq/ring.h and ioq/batch.h: Ring, Iterator. */
#include <Python.h>

#include <shm/binding.h>
#include <ioq/batch.h>

static PyObject *fault_error, *invalid_error;
static PyTypeObject *ring_type, *iterator_type;

typedef struct {
    PyObject_HEAD
    struct vb_ring ring;
    PyObject *view, *space; /* keep the C structs that `ring` points to */
    uint64_t dropped;
} Ring;

/* ---- helpers ---- */

static PyObject *refuse(struct vb_ring *ring, long error)
{
    PyObject *exception;

    if (error == -EMSGSIZE)
        return PyErr_Format(invalid_error, "the message does not fit its buffer");
    if (error != -EIO)
        return PyErr_Format(invalid_error, "not possible at this position");
    exception = PyObject_CallFunction(fault_error, "s", ring->fault);
    if (exception) {
        PyErr_SetObject(fault_error, exception);
        Py_DECREF(exception);
    }
    return NULL;
}

/* Optional arguments `names`, by position from `first` on or by keyword, into `out`. */
static bool parse(PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
                  Py_ssize_t first, const char *const *names, PyObject **out)
{
    Py_ssize_t nkw = kwnames ? PyTuple_Size(kwnames) : 0, count = 0;

    while (names[count])
        count++;
    if (nargs < first || nargs > first + count) {
        PyErr_Format(PyExc_TypeError, "expected %zd to %zd arguments, got %zd", first,
                     first + count, nargs);
        return false;
    }
    for (Py_ssize_t i = first; i < nargs; i++)
        out[i - first] = args[i];
    for (Py_ssize_t i = 0; i < nkw; i++) {
        PyObject *name = PyTuple_GetItem(kwnames, i);
        Py_ssize_t at = 0;

        while (at < count && PyUnicode_CompareWithASCIIString(name, names[at]))
            at++;
        if (at == count || out[at]) {
            PyErr_Format(PyExc_TypeError, "unexpected argument %R", name);
            return false;
        }
        out[at] = args[nargs + i];
    }
    return true;
}

/* A count of descriptors; more than any ring has is as good as all. */
static bool as_limit(PyObject *object, uint32_t *out)
{
    uint64_t value;

    if (!as_u64(object, &value))
        return false;
    *out = value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
    return true;
}

static bool as_flag(PyObject *object, bool *out)
{
    int truth = object ? PyObject_IsTrue(object) : *out;

    *out = truth > 0;
    return truth >= 0;
}

static bool as_index(PyObject *object, int *out)
{
    long value = object ? PyLong_AsLong(object) : VB_INUSE;

    if (value == -1 && PyErr_Occurred())
        return false;
    if (value != VB_VALID && value != VB_INUSE) {
        PyErr_Format(invalid_error, "no index %ld", value);
        return false;
    }
    *out = (int)value;
    return true;
}

/* ---- Ring: life ---- */

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *view_object, *space_object;
    struct vb_space *space;
    struct vb_view *view;
    const char *refusal;
    unsigned int limit;
    Ring *self;
    int me;

    if (!no_keywords(kwargs))
        return NULL;
    if (!PyArg_ParseTuple(args, "OOiI", &view_object, &space_object, &me, &limit))
        return NULL;
    view = from_capsule(view_object, "shm.view");
    space = view ? from_capsule(space_object, "shm.space") : NULL;
    if (!space)
        return NULL;
    if (me != VB_NORTH && me != VB_SOUTH)
        return PyErr_Format(invalid_error, "locality %d is neither north nor south", me);
    self = (Ring *)alloc_object(type);
    if (!self)
        return NULL;
    refusal = vb_ring_attach(&self->ring, view, space, me, limit);
    if (refusal) {
        Py_DECREF(self);
        return PyErr_Format(invalid_error, "no ring to attach to: %s", refusal);
    }
    Py_INCREF(view_object);
    Py_INCREF(space_object);
    self->view = view_object;
    self->space = space_object;
    return (PyObject *)self;
}

static int ring_traverse(PyObject *object, visitproc visit, void *arg)
{
    Ring *self = (Ring *)object;

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->view);
    Py_VISIT(self->space);
    return 0;
}

/* No tp_clear: the C ring points into both, and neither refers back to a ring. */
static void ring_dealloc(PyObject *object)
{
    Ring *self = (Ring *)object;

    PyObject_GC_UnTrack(object);
    Py_CLEAR(self->view);
    Py_CLEAR(self->space);
    free_object(object);
}

static PyObject *ring_format(PyObject *Py_UNUSED(cls), PyObject *const *args,
                             Py_ssize_t nargs)
{
    struct vb_view *view;
    uint64_t count;
    int error;

    if (!exactly(nargs, 2))
        return NULL;
    view = from_capsule(args[0], "shm.view");
    if (!view || !as_u64(args[1], &count))
        return NULL;
    error = count > UINT32_MAX ? -EINVAL : vb_ring_format(view, (uint32_t)count);
    if (error == 0)
        Py_RETURN_NONE;
    return PyErr_Format(invalid_error,
                        "cannot format a ring of %llu descriptors in %llu bytes%s",
                        (unsigned long long)count, (unsigned long long)view->size,
                        vb_view_alive(view) ? "" : ": unmapped");
}

/* ---- Ring: descriptors ---- */

static PyObject *desc_tuple(const struct vb_desc *desc)
{
    return Py_BuildValue("(KKK)", (unsigned long long)desc->cookie,
                         (unsigned long long)desc->ptr, (unsigned long long)desc->len);
}

/* Up to n descriptors that are ours from an end on, as a list of tuples. North, on the
 * valid index, sees only those that carry a buffer: the others are not in the queue. */
static PyObject *list_descs(struct vb_ring *ring, int index, int end, uint32_t n)
{
    bool carrying = index == VB_VALID && ring->me == VB_NORTH;
    PyObject *list = PyList_New(0);
    struct vb_desc desc;

    for (uint32_t i = 0; list && i < n; i++) {
        PyObject *item;

        if (vb_ring_peek(ring, index, end, i, &desc) != 1 || (carrying && !desc.valid))
            break;
        item = desc_tuple(&desc);
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* peek(limit, index=INUSE) */
static PyObject *ring_peek(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
    static const char *const names[] = {"index", NULL};
    struct vb_ring *ring = &((Ring *)object)->ring;
    PyObject *options[1] = {NULL};
    uint32_t limit;
    int index;

    if (!parse(args, nargs, kwnames, 1, names, options) || !as_limit(args[0], &limit) ||
        !as_index(options[0], &index))
        return NULL;
    if (vb_ring_check(ring))
        return refuse(ring, -EIO);
    return list_descs(ring, index, VB_HEAD, limit);
}

/* pop(limit, index=INUSE, flip=True) */
static PyObject *ring_pop(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const names[] = {"index", "flip", NULL};
    struct vb_ring *ring = &((Ring *)object)->ring;
    PyObject *options[2] = {NULL, NULL}, *list;
    bool flip = true;
    uint32_t limit, n;
    int index, error;

    if (!parse(args, nargs, kwnames, 1, names, options) || !as_limit(args[0], &limit) ||
        !as_index(options[0], &index) || !as_flag(options[1], &flip))
        return NULL;
    if (vb_ring_check(ring))
        return refuse(ring, -EIO);
    list = list_descs(ring, index, VB_HEAD, limit);
    if (!list)
        return NULL;
    n = (uint32_t)PyList_Size(list);
    if (index == VB_VALID && ring->me == VB_NORTH)
        for (uint32_t i = 0; i < n; i++)
            vb_ring_set_valid(ring, index, VB_HEAD, i, false);
    error = vb_ring_pop(ring, index, n, flip ? 0 : VB_KEEP_OWNER);
    if (error) {
        Py_DECREF(list);
        return refuse(ring, error);
    }
    return list;
}

static bool entry_of(PyObject *item, struct vb_desc *out)
{
    if (PyTuple_Check(item) && PyTuple_Size(item) == 3)
        return as_u64(PyTuple_GetItem(item, 0), &out->cookie) &&
               as_u64(PyTuple_GetItem(item, 1), &out->ptr) &&
               as_u64(PyTuple_GetItem(item, 2), &out->len);
    PyErr_SetString(PyExc_TypeError, "an entry is a tuple (cookie, ptr, len)");
    return false;
}

/* Write entries to our descriptors from the tail on: how many, or -1 with an exception.
 * North notes on the valid index what carries a buffer, and does not overwrite it. */
static long set_entries(struct vb_ring *ring, int index, PyObject *entries, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(entries, (Py_ssize_t)i);
        struct vb_desc desc, entry;
        bool good = item && entry_of(item, &entry);

        Py_XDECREF(item);
        if (!good)
            return -1;
        /* Only now: getting the item may have run code. */
        if (vb_ring_check(ring)) {
            refuse(ring, -EIO);
            return -1;
        }
        if (vb_ring_peek(ring, index, VB_TAIL, i, &desc) != 1)
            return i;
        if (ring->me == VB_NORTH && index == VB_VALID && desc.valid)
            return i;
        entry.valid = ring->me == VB_NORTH ? index == VB_VALID : desc.valid;
        vb_ring_set(ring, index, VB_TAIL, i, &entry);
    }
    return n;
}

/* push(entries, index=INUSE, both=False) */
static PyObject *ring_push(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
    static const char *const names[] = {"index", "both", NULL};
    struct vb_ring *ring = &((Ring *)object)->ring;
    PyObject *options[2] = {NULL, NULL};
    Py_ssize_t n;
    bool both = false;
    int index, error;
    long set;

    if (!parse(args, nargs, kwnames, 1, names, options) ||
        !as_index(options[0], &index) || !as_flag(options[1], &both))
        return NULL;
    n = PySequence_Size(args[0]);
    if (n < 0)
        return NULL;
    if (both)
        index = VB_VALID;
    if (n > (Py_ssize_t)ring->count)
        n = (Py_ssize_t)ring->count;
    set = set_entries(ring, index, args[0], (uint32_t)n);
    if (set < 0)
        return NULL;
    error = vb_ring_check(ring);
    if (!error)
        error = vb_ring_push(ring, index, (uint32_t)set, both ? VB_BOTH : 0);
    return error ? refuse(ring, error) : PyLong_FromLong(set);
}

#include "_batch.inc"

/* ---- Ring: waiting ---- */

static PyObject *ring_owned(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(vb_ring_owned(&((Ring *)object)->ring, VB_INUSE, VB_HEAD));
}

static PyObject *ring_room(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(vb_ring_owned(&((Ring *)object)->ring, VB_INUSE, VB_TAIL));
}

static PyObject *ring_disable(PyObject *object, PyObject *Py_UNUSED(none))
{
    vb_ring_disable(&((Ring *)object)->ring);
    Py_RETURN_NONE;
}

/* _arm(end) */
static PyObject *ring_arm(PyObject *object, PyObject *end)
{
    struct vb_ring *ring = &((Ring *)object)->ring;
    long which = PyLong_AsLong(end);
    bool ready;

    if (which == -1 && PyErr_Occurred())
        return NULL;
    ready = vb_ring_arm(ring, VB_INUSE, which ? VB_TAIL : VB_HEAD);
    return ring->fault ? refuse(ring, -EIO) : PyBool_FromLong(ready);
}

/* _spin(end, nanoseconds) */
static PyObject *ring_spin(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t end, ns;

    if (!exactly(nargs, 2))
        return NULL;
    if (!as_u64(args[0], &end) || !as_u64(args[1], &ns))
        return NULL;
    return PyBool_FromLong(
        vb_ring_spin(&((Ring *)object)->ring, VB_INUSE, end ? VB_TAIL : VB_HEAD, ns));
}

/* ---- Ring: looking at it ---- */

/* entries(index=INUSE) */
static PyObject *ring_entries(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
    static const char *const names[] = {"index", NULL};
    struct vb_ring *ring = &((Ring *)object)->ring;
    PyObject *options[1] = {NULL};
    long entries;
    int index;

    if (!parse(args, nargs, kwnames, 0, names, options) || !as_index(options[0], &index))
        return NULL;
    entries = vb_ring_entries(ring, index);
    return entries < 0 ? refuse(ring, entries) : PyLong_FromLong(entries);
}

static PyObject *ring_counters(PyObject *object, PyObject *Py_UNUSED(none))
{
    Ring *self = (Ring *)object;

    return Py_BuildValue("(KKK)", (unsigned long long)self->ring.pushed,
                         (unsigned long long)self->ring.popped,
                         (unsigned long long)self->dropped);
}

static PyObject *ring_count(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(((Ring *)object)->ring.count);
}

static PyObject *ring_fault(PyObject *object, void *Py_UNUSED(closure))
{
    struct vb_ring *ring = &((Ring *)object)->ring;

    vb_ring_check(ring);
    return ring->fault ? PyUnicode_FromString(ring->fault) : Py_NewRef(Py_None);
}

static PyObject *ring_capsule(PyObject *object, void *Py_UNUSED(closure))
{
    return PyCapsule_New(&((Ring *)object)->ring, "ioq.ring", NULL);
}

#define BATCH (METH_FASTCALL | METH_KEYWORDS)

static PyMethodDef ring_methods[] = {
    {"format", (PyCFunction)ring_format, METH_FASTCALL | METH_STATIC, NULL},
    {"peek", (PyCFunction)ring_peek, BATCH, NULL},
    {"pop", (PyCFunction)ring_pop, BATCH, NULL},
    {"push", (PyCFunction)ring_push, BATCH, NULL},
    {"produce", (PyCFunction)ring_produce, BATCH, NULL},
    {"consume", (PyCFunction)ring_consume, BATCH, NULL},
    {"forward", (PyCFunction)ring_forward, METH_FASTCALL, NULL},
    {"owned", ring_owned, METH_NOARGS, NULL},
    {"room", ring_room, METH_NOARGS, NULL},
    {"disable", ring_disable, METH_NOARGS, NULL},
    {"_arm", ring_arm, METH_O, NULL},
    {"_spin", (PyCFunction)ring_spin, METH_FASTCALL, NULL},
    {"entries", (PyCFunction)ring_entries, BATCH, NULL},
    {"_counters", ring_counters, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ring_getset[] = {
    {"count", ring_count, NULL, NULL, NULL},
    {"fault", ring_fault, NULL, NULL, NULL},
    {"_capsule", ring_capsule, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_traverse, ring_traverse},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_getset},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    "ioq._core.Ring", sizeof(Ring), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, ring_slots};

#include "_iterator.inc"

/* ---- module ---- */

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT, "ioq._core", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&core_module);

    if (!module)
        return NULL;
    ring_type = add_type(module, &ring_spec);
    iterator_type = add_type(module, &iterator_spec);
    fault_error = find_error("ioq.errors", "RingFault");
    invalid_error = find_error("shm.errors", "InvalidError");
    if (ring_type && iterator_type && fault_error && invalid_error)
        return module;
    Py_DECREF(module);
    return NULL;
}
