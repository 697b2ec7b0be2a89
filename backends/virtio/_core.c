/* Thin limited-API binding of virtio/queue.h: Queue and Chain. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <shm/binding.h>
#include <virtio/queue.h>

static PyObject *queue_error, *fault_error, *invalid_error, *busy_error;

typedef struct {
    PyObject_HEAD
    struct vq queue;
    PyObject *space;  /* keeps the C struct that `queue` points to */
    PyObject *record; /* the view of its in-flight record, or NULL */
} Queue;

typedef struct {
    PyObject_HEAD
    Queue *queue;
    struct vq_chain chain;
    bool out; /* taken, not given back */
} Chain;

static PyTypeObject *queue_type, *chain_type;

static PyObject *broken(const struct vq *q)
{
    PyObject *error = PyObject_CallFunction(queue_error, "s", q->broken);

    if (error) {
        PyErr_SetObject(queue_error, error);
        Py_DECREF(error);
    }
    return NULL;
}

#include "_chain.inc"

/* ---- Queue: life ---- */

/* None, or (next_avail, next_used, avail_wrap, used_wrap). */
static bool state_of(PyObject *object, struct vq_state *out)
{
    int avail_wrap, used_wrap;

    if (!PyArg_ParseTuple(object, "HHpp", &out->next_avail, &out->next_used, &avail_wrap,
                          &used_wrap))
        return false;
    out->avail_wrap = avail_wrap;
    out->used_wrap = used_wrap;
    return true;
}

static PyObject *open_refused(int error, uint32_t size)
{
    if (error == -ENOMEM)
        return PyErr_NoMemory();
    if (error == -ERANGE)
        return PyErr_Format(invalid_error, "the saved state is not one of this ring");
    if (error == -EFAULT)
        return PyErr_Format(fault_error,
                            "a ring of %u entries there is not memory of the guest", size);
    return PyErr_Format(invalid_error, "a ring of %u entries cannot lie there: a part is"
                        " misaligned, or in regions that do not meet on pages", size);
}

/* Keep the record in `view`, or go on from it. */
static bool record_in(Queue *self, PyObject *view_object, bool resume)
{
    struct vb_view *view = from_capsule(view_object, "shm.view");
    uint64_t size = vq_record_bytes(self->queue.size);
    uint8_t *memory = view && view->writable ? vb_view_ptr(view, 0, size) : NULL;
    int error;

    if (!view)
        return false;
    if (!memory || (uintptr_t)memory % 8) {
        PyErr_Format(invalid_error, "no record of %llu bytes can lie there",
                     (unsigned long long)size);
        return false;
    }
    self->record = Py_NewRef(view_object);
    self->queue.kept = view;
    error = vq_record_begin(&self->queue, memory, resume);
    if (error == -ENOMEM)
        PyErr_NoMemory();
    else if (error)
        PyErr_SetString(invalid_error, "the in-flight record is not one of this ring");
    return error == 0;
}

/* Queue(space, size, desc, driver, device, features, state, record, resume) */
static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *space_object, *state_object, *record_object;
    unsigned long long desc, driver, device, features;
    struct vq_state state;
    struct vb_space *space;
    unsigned int size;
    Queue *self;
    int error, resume;

    if (!no_keywords(kwargs) ||
        !PyArg_ParseTuple(args, "OIKKKKOOp", &space_object, &size, &desc, &driver, &device,
                          &features, &state_object, &record_object, &resume))
        return NULL;
    space = from_capsule(space_object, "shm.space");
    if (!space || (state_object != Py_None && !state_of(state_object, &state)))
        return NULL;
    if (!vq_fits(size, features))
        return PyErr_Format(invalid_error, "a ring of this kind cannot have %u entries",
                            size);
    self = (Queue *)alloc_object(type);
    if (!self)
        return NULL;
    error = vq_open(&self->queue, space, size, (struct vq_addresses){desc, driver, device},
                    features, state_object != Py_None ? &state : NULL);
    if (error) {
        self->queue = (struct vq){0};
        Py_DECREF(self);
        return open_refused(error, size);
    }
    self->space = Py_NewRef(space_object);
    if (record_object != Py_None && !record_in(self, record_object, resume)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int queue_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Queue *)object)->space);
    Py_VISIT(((Queue *)object)->record);
    return 0;
}

/* No tp_clear: the C queue points into the space, which does not refer back. */
static void queue_dealloc(PyObject *object)
{
    Queue *self = (Queue *)object;

    PyObject_GC_UnTrack(object);
    vq_close(&self->queue);
    Py_CLEAR(self->space);
    Py_CLEAR(self->record);
    free_object(object);
}

/* ---- Queue: chains ---- */

static Chain *chain_new(Queue *queue)
{
    Chain *chain = (Chain *)PyType_GenericAlloc(chain_type, 0);

    if (chain) {
        chain->queue = (Queue *)Py_NewRef((PyObject *)queue);
        chain->out = true;
    }
    return chain;
}

/* Append one chain: 1, 0 none, -EIO broken, -ENOMEM with an exception. */
static int pop_into(Queue *self, PyObject *list)
{
    struct vq_chain taken = {.segs = NULL};
    int got = vq_pop(&self->queue, &taken);
    Chain *chain;

    if (got == -ENOMEM)
        PyErr_NoMemory();
    if (got <= 0)
        return got;
    chain = chain_new(self);
    if (!chain) {
        vq_chain_free(&taken);
        return -ENOMEM; /* the driver never gets it back; there is no memory anyway */
    }
    chain->chain = taken;
    got = PyList_Append(list, (PyObject *)chain) ? -ENOMEM : 1;
    Py_DECREF(chain);
    return got;
}

static PyObject *queue_pop_batch(PyObject *object, PyObject *limit_object)
{
    Queue *self = (Queue *)object;
    PyObject *list;
    uint64_t limit;
    int got = 1;

    if (!as_u64(limit_object, &limit))
        return NULL;
    if (self->queue.broken || vq_check(&self->queue))
        return broken(&self->queue);
    list = PyList_New(0);
    for (uint64_t n = 0; list && got > 0 && n < limit; n++) {
        got = pop_into(self, list);
        if (got == -ENOMEM || (got == -EIO && n == 0)) {
            Py_CLEAR(list);
            return got == -EIO ? broken(&self->queue) : NULL;
        }
    }
    return list;
}

/* Is `item` (chain, written) something to give back here? Then mark it so. */
static bool take_back(Queue *self, PyObject *item, PyObject *given, uint32_t *written)
{
    Chain *chain = (Chain *)item;
    uint64_t value;

    if (!PyObject_TypeCheck(item, chain_type)) {
        PyErr_SetString(PyExc_TypeError, "only a Chain can be given back");
        return false;
    }
    if (!as_u64(given, &value))
        return false;
    if (chain->queue != self || !chain->out) {
        PyErr_SetString(invalid_error, chain->out ? "the chain is another queue's"
                                                  : "the chain was given back before");
        return false;
    }
    if (value > chain->chain.writable) {
        PyErr_Format(invalid_error, "%llu bytes written into a chain with room for %llu",
                     (unsigned long long)value,
                     (unsigned long long)chain->chain.writable);
        return false;
    }
    chain->out = false;
    *written = (uint32_t)value;
    return true;
}

static bool pair_of(PyObject *item, PyObject **chain, PyObject **written)
{
    if (PyTuple_Check(item) && PyTuple_Size(item) == 2) {
        *chain = PyTuple_GetItem(item, 0);
        *written = PyTuple_GetItem(item, 1);
        return true;
    }
    PyErr_SetString(PyExc_TypeError, "what is given back is a tuple (chain, written)");
    return false;
}

static void push_one(Queue *self, Chain *chain, uint32_t written)
{
    vq_push(&self->queue, &chain->chain, written);
    vq_chain_free(&chain->chain);
}

/* push(chain, written) */
static PyObject *queue_push(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Queue *self = (Queue *)object;
    uint32_t written;

    if (!exactly(nargs, 2))
        return NULL;
    if (vq_check(&self->queue))
        return broken(&self->queue);
    if (!take_back(self, args[0], args[1], &written))
        return NULL;
    push_one(self, (Chain *)args[0], written);
    vq_publish(&self->queue);
    Py_RETURN_NONE;
}

/* Give all back, or none with an exception. */
static bool push_all(Queue *self, PyObject *done, uint32_t *written)
{
    Py_ssize_t n = PyTuple_Size(done), i;
    PyObject *chain, *given;

    if (vq_check(&self->queue)) {
        broken(&self->queue);
        return false;
    }
    for (i = 0; i < n; i++)
        if (!pair_of(PyTuple_GetItem(done, i), &chain, &given) ||
            !take_back(self, chain, given, written + i))
            break;
    if (i < n) {
        while (i-- > 0)
            ((Chain *)PyTuple_GetItem(PyTuple_GetItem(done, i), 0))->out = true;
        return false;
    }
    for (i = 0; i < n; i++)
        push_one(self, (Chain *)PyTuple_GetItem(PyTuple_GetItem(done, i), 0), written[i]);
    if (n > 0)
        vq_publish(&self->queue);
    return true;
}

/* push_batch([(chain, written), ...]) */
static PyObject *queue_push_batch(PyObject *object, PyObject *batch)
{
    PyObject *done = PySequence_Tuple(batch);
    uint32_t *written;
    bool good;

    if (!done)
        return NULL;
    written = calloc((size_t)PyTuple_Size(done) + 1, sizeof(*written));
    good = written && push_all((Queue *)object, done, written);
    if (!written)
        PyErr_NoMemory();
    free(written);
    Py_DECREF(done);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

#include "_batch.inc"

/* ---- Queue: notifications, and looking at it ---- */

static PyObject *queue_should_notify(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(vq_should_notify(&((Queue *)object)->queue));
}

static PyObject *queue_disable_kicks(PyObject *object, PyObject *Py_UNUSED(none))
{
    vq_disable_kicks(&((Queue *)object)->queue);
    Py_RETURN_NONE;
}

static PyObject *queue_enable_kicks(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(vq_enable_kicks(&((Queue *)object)->queue));
}

static PyObject *queue_state(PyObject *object, PyObject *Py_UNUSED(none))
{
    struct vq *q = &((Queue *)object)->queue;

    if (q->in_flight)
        return PyErr_Format(busy_error, "%u chains or descriptors are still out",
                            q->in_flight);
    return Py_BuildValue("(HHNN)", q->at.next_avail, q->at.next_used,
                         PyBool_FromLong(q->at.avail_wrap),
                         PyBool_FromLong(q->at.used_wrap));
}

static PyObject *queue_counters(PyObject *object, PyObject *Py_UNUSED(none))
{
    struct vq *q = &((Queue *)object)->queue;

    return Py_BuildValue("(KKKK)", (unsigned long long)q->popped,
                         (unsigned long long)q->pushed, (unsigned long long)q->notified,
                         (unsigned long long)q->suppressed);
}

static PyObject *queue_size(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(((Queue *)object)->queue.size);
}

static PyObject *queue_packed(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((Queue *)object)->queue.packed);
}

static PyObject *queue_in_flight(PyObject *object, void *Py_UNUSED(closure))
{
    struct vq *q = &((Queue *)object)->queue;

    return PyLong_FromUnsignedLongLong(q->popped - q->pushed);
}

static PyObject *queue_broken(PyObject *object, void *Py_UNUSED(closure))
{
    struct vq *q = &((Queue *)object)->queue;

    vq_check(q);
    return q->broken ? PyUnicode_FromString(q->broken) : Py_NewRef(Py_None);
}

static PyMethodDef queue_methods[] = {
    {"pop_batch", queue_pop_batch, METH_O, NULL},
    {"push", (PyCFunction)queue_push, METH_FASTCALL, NULL},
    {"push_batch", queue_push_batch, METH_O, NULL},
    {"gather", (PyCFunction)queue_gather, METH_FASTCALL, NULL},
    {"scatter", (PyCFunction)queue_scatter, METH_FASTCALL, NULL},
    {"should_notify", queue_should_notify, METH_NOARGS, NULL},
    {"disable_kicks", queue_disable_kicks, METH_NOARGS, NULL},
    {"enable_kicks", queue_enable_kicks, METH_NOARGS, NULL},
    {"_state", queue_state, METH_NOARGS, NULL},
    {"_counters", queue_counters, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef queue_getset[] = {
    {"size", queue_size, NULL, NULL, NULL},
    {"packed", queue_packed, NULL, NULL, NULL},
    {"in_flight", queue_in_flight, NULL, NULL, NULL},
    {"broken", queue_broken, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_new, queue_new},
    {Py_tp_dealloc, queue_dealloc},
    {Py_tp_traverse, queue_traverse},
    {Py_tp_methods, queue_methods},
    {Py_tp_getset, queue_getset},
    {0, NULL},
};

static PyType_Spec queue_spec = {
    "backends.virtio._core.Queue", sizeof(Queue), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, queue_slots};

/* ---- module ---- */

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT, "backends.virtio._core", NULL, -1, NULL, NULL, NULL, NULL,
    NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&core_module);

    if (!module)
        return NULL;
    queue_type = add_type(module, &queue_spec);
    chain_type = add_type(module, &chain_spec);
    queue_error = find_error("backends.virtio.errors", "VirtQueueError");
    fault_error = find_error("shm.errors", "FaultError");
    invalid_error = find_error("shm.errors", "InvalidError");
    busy_error = find_error("shm.errors", "BusyError");
    if (queue_type && chain_type && queue_error && fault_error && invalid_error &&
        busy_error)
        return module;
    Py_DECREF(module);
    return NULL;
}
