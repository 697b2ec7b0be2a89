/* Thin limited-API binding of virtio/driver.h: DriverQueue. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <shm/binding.h>
#include <virtio/driver.h>

static PyObject *queue_error, *fault_error, *invalid_error;

typedef struct {
    PyObject_HEAD
    struct vd queue;
    PyObject *space;    /* keeps the C struct that `queue` points to */
    PyObject **tokens;  /* by id, of chains in flight */
    struct vd_buffer *scratch;
} Queue;

/* ---- life ---- */

static PyObject *broken(const struct vd *d)
{
    PyObject *error = PyObject_CallFunction(queue_error, "s", d->broken);

    if (error) {
        PyErr_SetObject(queue_error, error);
        Py_DECREF(error);
    }
    return NULL;
}

static PyObject *open_refused(int error, unsigned int size)
{
    if (error == -ENOMEM)
        return PyErr_NoMemory();
    if (error == -EFAULT)
        return PyErr_Format(fault_error, "a ring of %u entries there is not our memory",
                            size);
    return PyErr_Format(invalid_error, "a ring of %u entries cannot lie there", size);
}

/* Queue(space, size, desc, driver, device, features, tables, entries) */
static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned long long desc, driver, device, features, tables;
    unsigned int size, entries;
    PyObject *space_object;
    struct vb_space *space;
    Queue *self;
    int error;

    if (!no_keywords(kwargs) ||
        !PyArg_ParseTuple(args, "OIKKKKKI", &space_object, &size, &desc, &driver, &device,
                          &features, &tables, &entries))
        return NULL;
    space = from_capsule(space_object, "shm.space");
    if (!space)
        return NULL;
    if (!vq_fits(size, features))
        return PyErr_Format(invalid_error, "a ring of this kind cannot have %u entries",
                            size);
    self = (Queue *)alloc_object(type);
    if (!self)
        return NULL;
    error = vd_open(&self->queue, space, size, (struct vq_addresses){desc, driver, device},
                    features, tables, entries);
    self->tokens = calloc(size, sizeof(*self->tokens));
    self->scratch = calloc(size, sizeof(*self->scratch));
    if (!error && self->tokens && self->scratch) {
        self->space = Py_NewRef(space_object);
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return open_refused(error ? error : -ENOMEM, size);
}

static int queue_traverse(PyObject *object, visitproc visit, void *arg)
{
    Queue *self = (Queue *)object;

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->space);
    for (uint32_t i = 0; self->tokens && i < self->queue.size; i++)
        Py_VISIT(self->tokens[i]);
    return 0;
}

/* Only the tokens: the C queue points into the space, which does not refer back. */
static int queue_clear(PyObject *object)
{
    Queue *self = (Queue *)object;

    for (uint32_t i = 0; self->tokens && i < self->queue.size; i++)
        Py_CLEAR(self->tokens[i]);
    return 0;
}

static void queue_dealloc(PyObject *object)
{
    Queue *self = (Queue *)object;

    PyObject_GC_UnTrack(object);
    queue_clear(object);
    vd_close(&self->queue);
    free(self->tokens);
    free(self->scratch);
    Py_CLEAR(self->space);
    free_object(object);
}

/* ---- adding ---- */

static bool buffer_of(PyObject *item, struct vd_buffer *out)
{
    uint64_t len;

    if (!PyTuple_Check(item) || PyTuple_Size(item) != 2) {
        PyErr_SetString(PyExc_TypeError, "a buffer is a tuple (addr, size)");
        return false;
    }
    if (!as_u64(PyTuple_GetItem(item, 0), &out->addr) ||
        !as_u64(PyTuple_GetItem(item, 1), &len))
        return false;
    if (len == 0 || len > UINT32_MAX) {
        PyErr_Format(invalid_error, "a buffer of %llu bytes", (unsigned long long)len);
        return false;
    }
    out->len = (uint32_t)len;
    return true;
}

/* Append buffers of a sequence to `scratch`, of which n are filled: how many are now, or
 * -1 with an exception. */
static Py_ssize_t fill(Queue *self, PyObject *buffers, Py_ssize_t n)
{
    PyObject *tuple = PySequence_Tuple(buffers);
    Py_ssize_t count = tuple ? PyTuple_Size(tuple) : 0;

    if (tuple && count > (Py_ssize_t)self->queue.size - n) {
        PyErr_Format(invalid_error, "a chain of more buffers than the queue has entries");
        Py_CLEAR(tuple);
    }
    for (Py_ssize_t i = 0; tuple && i < count; i++)
        if (!buffer_of(PyTuple_GetItem(tuple, i), self->scratch + n + i))
            Py_CLEAR(tuple);
    if (!tuple)
        return -1;
    Py_DECREF(tuple);
    return n + count;
}

/* Add (readable, writable, token): 1, 0 no room, -1 with an exception. */
static int add_one(Queue *self, PyObject *item)
{
    PyObject *token, *readable, *writable;
    Py_ssize_t out, n;
    long id;

    if (!PyTuple_Check(item) || PyTuple_Size(item) != 3) {
        PyErr_SetString(PyExc_TypeError, "a chain is a tuple (readable, writable, token)");
        return -1;
    }
    readable = PyTuple_GetItem(item, 0);
    writable = PyTuple_GetItem(item, 1);
    token = PyTuple_GetItem(item, 2);
    out = fill(self, readable, 0);
    n = out < 0 ? -1 : fill(self, writable, out);
    if (n < 0)
        return -1;
    if (vd_check(&self->queue)) { /* only now: taking the buffers may have run code */
        broken(&self->queue);
        return -1;
    }
    id = vd_add(&self->queue, self->scratch, (uint32_t)n, (uint32_t)out);
    if (id == -EAGAIN)
        return 0;
    if (id == -EFAULT)
        PyErr_SetString(fault_error, "the indirect tables are not our memory");
    else if (id < 0)
        PyErr_SetString(invalid_error, "a chain without a buffer, or of 4 GiB or more");
    if (id < 0)
        return -1;
    self->tokens[id] = Py_NewRef(token);
    return 1;
}

/* add_batch([(readable, writable, token), ...]) */
static PyObject *queue_add_batch(PyObject *object, PyObject *batch)
{
    Queue *self = (Queue *)object;
    PyObject *chains = PySequence_Tuple(batch);
    Py_ssize_t n, done;
    int added = 1;

    if (!chains)
        return NULL;
    n = PyTuple_Size(chains);
    for (done = 0; done < n; done += added) {
        added = add_one(self, PyTuple_GetItem(chains, done));
        if (added <= 0)
            break;
    }
    Py_DECREF(chains);
    if (done > 0 && vd_check(&self->queue) == 0)
        vd_publish(&self->queue); /* also what came before one that cannot be added */
    return added < 0 ? NULL : PyLong_FromSsize_t(done);
}

/* ---- collecting ---- */

static PyObject *pair(PyObject *token, uint32_t written)
{
    PyObject *number = PyLong_FromUnsignedLong(written);
    PyObject *tuple = number ? PyTuple_Pack(2, token, number) : NULL;

    Py_XDECREF(number);
    return tuple;
}

/* collect(limit) */
static PyObject *queue_collect(PyObject *object, PyObject *limit_object)
{
    Queue *self = (Queue *)object;
    PyObject *list;
    uint64_t limit;

    if (!as_u64(limit_object, &limit))
        return NULL;
    if (vd_check(&self->queue))
        return broken(&self->queue);
    list = PyList_New(0);
    for (uint64_t n = 0; list && n < limit; n++) {
        PyObject *token, *item;
        uint32_t written;
        long id = vd_collect(&self->queue, &written);

        if (id == -EAGAIN || (id < 0 && n > 0))
            break;
        if (id < 0) {
            Py_DECREF(list);
            return broken(&self->queue);
        }
        token = self->tokens[id];
        self->tokens[id] = NULL;
        item = pair(token, written);
        Py_DECREF(token);
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *queue_kick_needed(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(vd_kick_needed(&((Queue *)object)->queue));
}

static PyObject *queue_disable(PyObject *object, PyObject *Py_UNUSED(none))
{
    vd_disable(&((Queue *)object)->queue);
    Py_RETURN_NONE;
}

static PyObject *queue_enable(PyObject *object, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(vd_enable(&((Queue *)object)->queue));
}

/* ---- looking at it ---- */

static PyObject *queue_counters(PyObject *object, PyObject *Py_UNUSED(none))
{
    struct vd *d = &((Queue *)object)->queue;

    return Py_BuildValue("(KKK)", (unsigned long long)d->collected,
                         (unsigned long long)d->kicked, (unsigned long long)d->suppressed);
}

static PyObject *queue_size(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(((Queue *)object)->queue.size);
}

static PyObject *queue_room(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(((Queue *)object)->queue.room);
}

static PyObject *queue_in_flight(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(((Queue *)object)->queue.in_flight);
}

static PyObject *queue_broken(PyObject *object, void *Py_UNUSED(closure))
{
    struct vd *d = &((Queue *)object)->queue;

    vd_check(d);
    return d->broken ? PyUnicode_FromString(d->broken) : Py_NewRef(Py_None);
}

static PyMethodDef queue_methods[] = {
    {"add_batch", queue_add_batch, METH_O, NULL},
    {"collect", queue_collect, METH_O, NULL},
    {"kick_needed", queue_kick_needed, METH_NOARGS, NULL},
    {"disable_interrupts", queue_disable, METH_NOARGS, NULL},
    {"enable_interrupts", queue_enable, METH_NOARGS, NULL},
    {"_counters", queue_counters, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef queue_getset[] = {
    {"size", queue_size, NULL, NULL, NULL},
    {"room", queue_room, NULL, NULL, NULL},
    {"in_flight", queue_in_flight, NULL, NULL, NULL},
    {"broken", queue_broken, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_new, queue_new},
    {Py_tp_dealloc, queue_dealloc},
    {Py_tp_traverse, queue_traverse},
    {Py_tp_clear, queue_clear},
    {Py_tp_methods, queue_methods},
    {Py_tp_getset, queue_getset},
    {0, NULL},
};

static PyType_Spec queue_spec = {
    "proxy.virtio._core.Queue", sizeof(Queue), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, queue_slots};

/* ---- module ---- */

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT, "proxy.virtio._core", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&core_module);
    PyTypeObject *type;

    if (!module)
        return NULL;
    type = add_type(module, &queue_spec);
    queue_error = find_error("proxy.virtio.errors", "DriverQueueError");
    fault_error = find_error("shm.errors", "FaultError");
    invalid_error = find_error("shm.errors", "InvalidError");
    if (type && queue_error && fault_error && invalid_error)
        return module;
    Py_DECREF(module);
    return NULL;
}
