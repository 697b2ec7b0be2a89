/* Thin limited-API binding of the batch mover: FrameBatch and the ends of the hub.
 *
 * An end's collect() describes frames in a batch; deliver() of any other end takes a
 * stretch of them; release() of the source ends the batch. All under the GIL and in one
 * turn, so that no memory goes away meanwhile; a batch that outlived an unmap is refused.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <net/guest.h>
#include <net/host_rx.h>
#include <net/tap.h>

#define MAX_PARTS 11

static PyObject *ring_fault, *invalid_error;
static PyTypeObject *batch_type, *tap_type, *host_type, *guest_type;

typedef struct {
    PyObject_HEAD
    struct vn_batch batch;
    PyObject *source;         /* keeps the frames' memory */
    struct vb_space *space;   /* of the source, if guest memory */
    uint64_t generation;      /* of that space when the frames were described */
} Batch;

typedef struct {
    PyObject_HEAD
    struct vn_tap tap;
} Tap;

/* HostEnd and GuestEnd are made of rings and views, attached by name. */
typedef struct {
    PyObject_HEAD
    PyObject *kept[MAX_PARTS];
    PyObject *record; /* the view that end.record lies in; NULL: it is our own */
    struct vb_view *view; /* that view's; NULL too once it is dead */
    struct vn_host end;
} Host;

typedef struct {
    PyObject_HEAD
    PyObject *kept[MAX_PARTS];
    struct vn_guest end;
} Guest;

struct part {
    const char *name;
    bool ring;
    size_t offset; /* of the pointer in the end's struct */
};

/* ---- helpers ---- */

static void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    release(self);
    Py_DECREF(type);
}

static void *alloc_object(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);

    return alloc(type, 0); /* zeroed */
}

static PyObject *counters(const void *from, size_t size)
{
    const uint64_t *at = from;
    Py_ssize_t n = (Py_ssize_t)(size / sizeof(*at));
    PyObject *out = PyTuple_New(n);

    for (Py_ssize_t i = 0; out && i < n; i++)
        PyTuple_SetItem(out, i, PyLong_FromUnsignedLongLong(at[i]));
    return out;
}

static bool as_unsigned(PyObject *object, unsigned *out)
{
    unsigned long value = PyLong_AsUnsignedLong(object);

    *out = (unsigned)value;
    if (value == (unsigned long)-1 && PyErr_Occurred())
        return false;
    if (value != *out)
        PyErr_SetString(PyExc_OverflowError, "number too large");
    return value == *out;
}

static bool as_bool(PyObject *object, bool *out)
{
    int truth = PyObject_IsTrue(object);

    *out = truth > 0;
    return truth >= 0;
}

static bool exactly(Py_ssize_t nargs, Py_ssize_t wanted)
{
    if (nargs != wanted)
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, nargs);
    return nargs == wanted;
}

/* A result of the core: a number, or RingFault with the ring's reason, or OSError. */
static PyObject *result(int value, struct vb_ring *const *rings, size_t n)
{
    const char *reason = "unknown";
    PyObject *error;

    if (value >= 0)
        return PyLong_FromLong(value);
    if (value != -EIO || n == 0) {
        errno = -value;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    for (size_t i = 0; i < n; i++)
        if (rings[i] && rings[i]->fault)
            reason = rings[i]->fault;
    error = PyObject_CallFunction(ring_fault, "s", reason);
    if (error)
        PyErr_SetObject(ring_fault, error);
    Py_XDECREF(error);
    return NULL;
}

static void *from_capsule(PyObject *object, const char *name)
{
    PyObject *capsule = PyObject_GetAttrString(object, "_capsule");
    void *pointer = capsule ? PyCapsule_GetPointer(capsule, name) : NULL;

    Py_XDECREF(capsule);
    return pointer;
}

static PyObject *attach(void *end, PyObject **kept, const struct part *parts, size_t n,
                        PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *name;
    void *pointer;

    if (!exactly(nargs, 2))
        return NULL;
    name = PyUnicode_AsUTF8String(args[0]);
    if (!name)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(PyBytes_AsString(name), parts[i].name))
            continue;
        Py_DECREF(name);
        pointer = from_capsule(args[1], parts[i].ring ? "ioq.ring" : "shm.view");
        if (!pointer)
            return NULL;
        memcpy((char *)end + parts[i].offset, &pointer, sizeof(pointer));
        Py_INCREF(args[1]);
        Py_XDECREF(kept[i]);
        kept[i] = args[1];
        Py_RETURN_NONE;
    }
    PyErr_Format(PyExc_ValueError, "no part %S", args[0]);
    Py_DECREF(name);
    return NULL;
}

static int visit_kept(PyObject *self, PyObject **kept, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < MAX_PARTS; i++)
        Py_VISIT(kept[i]);
    return 0;
}

/* ---- FrameBatch ---- */

static PyObject *batch_new(PyTypeObject *type, PyObject *Py_UNUSED(args),
                           PyObject *Py_UNUSED(kwargs))
{
    return alloc_object(type);
}

static int batch_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Batch *)self)->source);
    return 0;
}

static int batch_clear_refs(PyObject *self)
{
    Batch *batch = (Batch *)self;
    PyObject *source = batch->source;

    batch->batch.count = 0;
    batch->source = NULL;
    batch->space = NULL;
    Py_XDECREF(source);
    return 0;
}

static void batch_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    batch_clear_refs(self);
    free_object(self);
}

static Py_ssize_t batch_length(PyObject *self)
{
    return (Py_ssize_t)((Batch *)self)->batch.count;
}

/* Are the frames' bytes still there? */
static bool batch_alive(Batch *batch)
{
    if (!batch->space || batch->space->generation == batch->generation)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "the batch outlived its memory");
    return false;
}

static Batch *batch_from(PyObject *object)
{
    if (Py_TYPE(object) == batch_type)
        return (Batch *)object;
    PyErr_SetString(PyExc_TypeError, "a FrameBatch is needed");
    return NULL;
}

/* The frames of `batch` now come from `source`. */
static void batch_begin(Batch *batch, PyObject *source, struct vb_space *space)
{
    if (batch->source != source) {
        Py_INCREF(source);
        Py_XDECREF(batch->source);
        batch->source = source;
    }
    batch->space = space;
    batch->generation = space ? space->generation : 0;
}

/* (batch, from, n) of deliver() */
static Batch *batch_stretch(PyObject *const *args, Py_ssize_t nargs, unsigned *from,
                            unsigned *n)
{
    Batch *batch = exactly(nargs, 3) ? batch_from(args[0]) : NULL;

    if (!batch || !as_unsigned(args[1], from) || !as_unsigned(args[2], n) ||
        !batch_alive(batch))
        return NULL;
    if (*from <= batch->batch.count && *n <= batch->batch.count - *from)
        return batch;
    PyErr_SetString(PyExc_IndexError, "the batch has fewer frames");
    return NULL;
}

/* runs() -> [(destination + source, first, count), ...] */
static PyObject *batch_runs(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const struct vn_batch *batch = &((Batch *)self)->batch;
    PyObject *runs = PyList_New(0);

    for (unsigned i = 0, first; runs && i < batch->count;) {
        const uint8_t *key = batch->frame[i].head;
        PyObject *run;

        first = i++;
        while (i < batch->count && memcmp(batch->frame[i].head, key, 12) == 0)
            i++;
        run = Py_BuildValue("(y#II)", key, (Py_ssize_t)12, first, i - first);
        if (!run || PyList_Append(runs, run) < 0)
            Py_CLEAR(runs);
        Py_XDECREF(run);
    }
    return runs;
}

/* frame(i) -> (bytes, flags, gso_type, gso_size, csum_start, csum_offset) */
static PyObject *batch_frame(PyObject *self, PyObject *index)
{
    Batch *batch = (Batch *)self;
    const struct vn_frame *frame;
    struct vn_cursor at;
    PyObject *bytes;
    unsigned i;

    if (!as_unsigned(index, &i) || !batch_alive(batch))
        return NULL;
    if (i >= batch->batch.count) {
        PyErr_SetString(PyExc_IndexError, "the batch has fewer frames");
        return NULL;
    }
    frame = &batch->batch.frame[i];
    bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)frame->len);
    if (!bytes)
        return NULL;
    at = vn_cursor_at(frame, 0);
    vn_cursor_copy(&at, PyBytes_AsString(bytes), frame->len);
    return Py_BuildValue("(NIBHHH)", bytes, frame->offload.flags, frame->offload.gso_type,
                         frame->offload.gso_size, frame->offload.csum_start,
                         frame->offload.csum_offset);
}

/* snap(i, limit) -> (bytes, length, flags, gso_type, gso_size): the first `limit` bytes */
static PyObject *batch_snap(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Batch *batch = (Batch *)self;
    const struct vn_frame *frame;
    struct vn_cursor at;
    PyObject *bytes;
    unsigned i, size;

    if (!exactly(nargs, 2) || !as_unsigned(args[0], &i) || !as_unsigned(args[1], &size) ||
        !batch_alive(batch))
        return NULL;
    if (i >= batch->batch.count) {
        PyErr_SetString(PyExc_IndexError, "the batch has fewer frames");
        return NULL;
    }
    frame = &batch->batch.frame[i];
    if (size > frame->len)
        size = frame->len;
    bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (!bytes)
        return NULL;
    at = vn_cursor_at(frame, 0);
    vn_cursor_copy(&at, PyBytes_AsString(bytes), size);
    return Py_BuildValue("(NIIBH)", bytes, frame->len, frame->offload.flags,
                         frame->offload.gso_type, frame->offload.gso_size);
}

/* load([(bytes, flags, gso_type, gso_size, csum_start, csum_offset), ...]) */
static bool batch_load_one(struct vn_frame *frame, PyObject *item)
{
    struct vn_offload *offload = &frame->offload;
    Py_ssize_t length;
    char *at;

    memset(offload, 0, sizeof(*offload));
    if (!PyArg_ParseTuple(item, "y#IBHHH", &at, &length, &offload->flags,
                          &offload->gso_type, &offload->gso_size, &offload->csum_start,
                          &offload->csum_offset))
        return false;
    frame->piece[0] = (struct iovec){at, (size_t)length};
    frame->pieces = 1;
    frame->len = (uint32_t)length;
    if (length >= VN_ETHER_HEADER && length <= VN_MAX_GSO) {
        vn_frame_load(frame);
        if (vn_offload_check(frame) == 0)
            return true;
    }
    PyErr_SetString(invalid_error, "not a frame one could send");
    return false;
}

static PyObject *batch_load(PyObject *self, PyObject *frames)
{
    Batch *batch = (Batch *)self;
    PyObject *kept = PySequence_Tuple(frames); /* holds the bytes */
    Py_ssize_t n = kept ? PyTuple_Size(kept) : 0;

    batch_clear_refs(self);
    if (!kept)
        return NULL;
    if (n > VN_BATCH)
        PyErr_SetString(PyExc_ValueError, "too many frames for a batch");
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++)
        batch_load_one(&batch->batch.frame[i], PyTuple_GetItem(kept, i));
    if (!PyErr_Occurred()) {
        batch_begin(batch, kept, NULL);
        batch->batch.count = (unsigned)n;
    }
    Py_DECREF(kept);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(n);
}

#include "_plain.inc"

static PyMethodDef batch_methods[] = {
    {"runs", batch_runs, METH_NOARGS, NULL},
    {"frame", batch_frame, METH_O, NULL},
    {"snap", (PyCFunction)(void (*)(void))batch_snap, METH_FASTCALL, NULL},
    {"load", batch_load, METH_O, NULL},
    {"plain", (PyCFunction)(void (*)(void))batch_plain, METH_FASTCALL, NULL},
    {0},
};

static PyType_Slot batch_slots[] = {
    {Py_tp_new, batch_new},           {Py_tp_dealloc, batch_dealloc},
    {Py_tp_traverse, batch_traverse}, {Py_tp_clear, batch_clear_refs},
    {Py_tp_methods, batch_methods},   {Py_sq_length, batch_length},
    {0, NULL},
};

static PyType_Spec batch_spec = {"vbus.net._core.FrameBatch", sizeof(Batch), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, batch_slots};

/* ---- TapEnd(fd, header_size) ---- */

static PyObject *tap_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    int fd, header_size;
    Tap *self;

    if (!PyArg_ParseTuple(args, "ii", &fd, &header_size))
        return NULL;
    if (header_size != 10 && header_size != 12)
        return PyErr_Format(PyExc_ValueError, "a vnet header has 10 or 12 bytes");
    self = alloc_object(type);
    if (self)
        self->tap = (struct vn_tap){.fd = fd, .header_size = (size_t)header_size};
    return (PyObject *)self;
}

static void tap_dealloc(PyObject *self)
{
    free(((Tap *)self)->tap.buffer);
    free_object(self);
}

static PyObject *tap_collect(PyObject *self, PyObject *arg)
{
    Batch *batch = batch_from(arg);

    if (!batch)
        return NULL;
    batch_begin(batch, self, NULL);
    return result(vn_tap_collect(&((Tap *)self)->tap, &batch->batch), NULL, 0);
}

static PyObject *tap_deliver(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    unsigned from, n;
    Batch *batch = batch_stretch(args, nargs, &from, &n);

    if (!batch)
        return NULL;
    vn_tap_deliver(&((Tap *)self)->tap, &batch->batch, from, n);
    Py_RETURN_NONE;
}

/* ready(nanoseconds) -> is a frame there? looks for so long */
static PyObject *tap_ready(PyObject *self, PyObject *arg)
{
    unsigned long long ns = PyLong_AsUnsignedLongLong(arg);

    if (ns == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(vn_tap_ready(&((Tap *)self)->tap, ns));
}

static PyObject *tap_counters(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return counters(&((Tap *)self)->tap.counters, sizeof(struct vn_tap_counters));
}

static PyMethodDef tap_methods[] = {
    {"collect", tap_collect, METH_O, NULL},
    {"deliver", (PyCFunction)(void (*)(void))tap_deliver, METH_FASTCALL, NULL},
    {"ready", tap_ready, METH_O, NULL},
    {"_counters", tap_counters, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot tap_slots[] = {
    {Py_tp_new, tap_new},
    {Py_tp_dealloc, tap_dealloc},
    {Py_tp_methods, tap_methods},
    {0, NULL},
};

static PyType_Spec tap_spec = {"vbus.net._core.TapEnd", sizeof(Tap), 0, Py_TPFLAGS_DEFAULT,
                               tap_slots};

#include "_host.inc"
#include "_guest.inc"

/* ---- module ---- */

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);

    if (type && PyModule_AddType(module, (PyTypeObject *)type) == 0)
        return (PyTypeObject *)type;
    Py_XDECREF(type);
    return NULL;
}

static PyObject *find_error(const char *module, const char *name)
{
    PyObject *errors = PyImport_ImportModule(module);
    PyObject *error = errors ? PyObject_GetAttrString(errors, name) : NULL;

    Py_XDECREF(errors);
    return error;
}

static bool fill_module(PyObject *module)
{
    return (ring_fault = find_error("ioq.errors", "RingFault")) &&
           (invalid_error = find_error("shm.errors", "InvalidError")) &&
           (batch_type = add_type(module, &batch_spec)) &&
           (tap_type = add_type(module, &tap_spec)) &&
           (host_type = add_type(module, &host_spec)) &&
           (guest_type = add_type(module, &guest_spec)) &&
           PyModule_AddIntConstant(module, "BATCH", VN_BATCH) == 0 &&
           PyModule_AddIntConstant(module, "RECORD_SIZE", VN_RECORD_SIZE) == 0 &&
           PyModule_AddIntConstant(module, "BELL_RX", VN_BELL_RX) == 0 &&
           PyModule_AddIntConstant(module, "BELL_TX", VN_BELL_TX) == 0 &&
           PyModule_AddIntConstant(module, "BELL_EVENTS", VN_BELL_EVENTS) == 0;
}

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT, "vbus.net._core", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&core_module);

    if (module && !fill_module(module))
        Py_CLEAR(module);
    return module;
}
