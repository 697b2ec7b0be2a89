/* Thin limited-API binding of shm/space.h and shm/signal.h: Space, View, Signal. */
#include <Python.h>

#include <shm/binding.h>
#include <shm/signal.h>
#include <shm/space.h>

static PyObject *fault_error, *invalid_error, *exists_error, *denied_error, *space_error;

typedef struct {
    PyObject_HEAD
    struct vb_space space;
} Space;

typedef struct {
    PyObject_HEAD
    struct vb_view view;
} View;

static PyTypeObject *space_type, *view_type, *signal_type;

/* ---- helpers ---- */

/* A number that no 64-bit address, size or offset can be gets `error`. */
static bool as_u64_or(PyObject *object, uint64_t *out, PyObject *error)
{
    if (as_u64(object, out))
        return true;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(error, "%S is not in the 64-bit address space", object);
    }
    return false;
}

static PyObject *no_memory_there(uint64_t addr, uint64_t size, bool write)
{
    return PyErr_Format(fault_error, "%llu bytes at %p are not %s memory of the guest",
                        (unsigned long long)size, (void *)(uintptr_t)addr,
                        write ? "writable" : "readable");
}

/* ---- Space ---- */

static PyObject *space_new(PyTypeObject *type, PyObject *Py_UNUSED(args),
                           PyObject *Py_UNUSED(kwargs))
{
    return alloc_object(type); /* zeroed: an empty table */
}

static void space_dealloc(PyObject *self)
{
    vb_space_clear(&((Space *)self)->space);
    free_object(self);
}

static PyObject *map_refused(int error, uint64_t addr, uint64_t size)
{
    PyObject *kind = error == -EINVAL   ? invalid_error
                     : error == -EEXIST ? exists_error
                     : error == -EPERM || error == -EACCES ? denied_error
                                                           : space_error;
    const char *what = error == -EINVAL ? "size, address or offset out of range"
                                        : strerror(-error);

    return PyErr_Format(kind, "cannot map %llu bytes at %p: %s",
                        (unsigned long long)size, (void *)(uintptr_t)addr, what);
}

/* _map(addr, size, fd or -1, offset, writable) */
static PyObject *space_map(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t addr, size, offset;
    long fd;
    int writable, error;

    if (!exactly(nargs, 5) || !as_u64_or(args[0], &addr, invalid_error) || !as_u64_or(args[1], &size, invalid_error) ||
        !as_u64_or(args[3], &offset, invalid_error))
        return NULL;
    fd = PyLong_AsLong(args[2]);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    writable = PyObject_IsTrue(args[4]);
    if (writable < 0)
        return NULL;
    error = vb_space_map(&((Space *)self)->space, addr, size, (int)fd, offset, writable);
    if (error)
        return map_refused(error, addr, size);
    Py_RETURN_NONE;
}

static PyObject *space_unmap(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t addr, size;
    long removed;

    if (!exactly(nargs, 2) || !as_u64_or(args[0], &addr, invalid_error) || !as_u64_or(args[1], &size, invalid_error))
        return NULL;
    removed = vb_space_unmap(&((Space *)self)->space, addr, size);
    if (removed < 0)
        return PyErr_Format(invalid_error,
                            "unmapping %llu bytes at %p would cut a region in two",
                            (unsigned long long)size, (void *)(uintptr_t)addr);
    return PyLong_FromLong(removed);
}

static PyObject *space_clear(PyObject *self, PyObject *Py_UNUSED(none))
{
    vb_space_clear(&((Space *)self)->space);
    Py_RETURN_NONE;
}

static PyObject *space_read(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vb_space *space = &((Space *)self)->space;
    uint64_t addr, size;
    PyObject *out;

    if (!exactly(nargs, 2) || !as_u64_or(args[0], &addr, fault_error) || !as_u64_or(args[1], &size, fault_error))
        return NULL;
    /* Before the allocation: the size may be the guest's. */
    if (!vb_space_covers(space, addr, size, false))
        return no_memory_there(addr, size, false);
    out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (out)
        vb_space_read(space, addr, PyBytes_AsString(out), size);
    return out;
}

static PyObject *space_copy(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                            bool write)
{
    struct vb_space *space = &((Space *)self)->space;
    Py_buffer local;
    uint64_t addr;
    int error;

    if (!exactly(nargs, 2) || !as_u64_or(args[0], &addr, fault_error))
        return NULL;
    if (PyObject_GetBuffer(args[1], &local, write ? PyBUF_SIMPLE : PyBUF_WRITABLE))
        return NULL;
    error = vb_space_copy(space, addr, local.buf, (uint64_t)local.len, write);
    if (error)
        no_memory_there(addr, (uint64_t)local.len, write);
    PyBuffer_Release(&local);
    if (error)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *space_read_into(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return space_copy(self, args, nargs, false);
}

static PyObject *space_write(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return space_copy(self, args, nargs, true);
}

/* _regions(): (addr, size, writable, backed) of each, by address */
static PyObject *space_regions(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct vb_space *space = &((Space *)self)->space;
    PyObject *list = PyList_New((Py_ssize_t)space->count);

    for (size_t i = 0; list && i < space->count; i++) {
        struct vb_region *region = space->regions[i];
        PyObject *item = Py_BuildValue("(KKNN)", (unsigned long long)region->addr,
                                       (unsigned long long)region->size,
                                       PyBool_FromLong(region->writable),
                                       PyBool_FromLong(region->host != NULL));

        if (!item)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, (Py_ssize_t)i, item);
    }
    return list;
}

static PyObject *space_counters(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct vb_space *space = &((Space *)self)->space;

    return Py_BuildValue("(KKKK)", (unsigned long long)space->count,
                         (unsigned long long)space->bytes,
                         (unsigned long long)space->generation,
                         (unsigned long long)space->faults);
}

static PyObject *space_capsule(PyObject *self, void *Py_UNUSED(closure))
{
    return PyCapsule_New(&((Space *)self)->space, "shm.space", NULL);
}

static PyMethodDef space_methods[] = {
    {"_map", (PyCFunction)space_map, METH_FASTCALL, NULL},
    {"unmap", (PyCFunction)space_unmap, METH_FASTCALL, NULL},
    {"clear", space_clear, METH_NOARGS, NULL},
    {"read", (PyCFunction)space_read, METH_FASTCALL, NULL},
    {"read_into", (PyCFunction)space_read_into, METH_FASTCALL, NULL},
    {"write", (PyCFunction)space_write, METH_FASTCALL, NULL},
    {"_regions", space_regions, METH_NOARGS, NULL},
    {"_counters", space_counters, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef space_getset[] = {
    {"_capsule", space_capsule, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot space_slots[] = {
    {Py_tp_new, space_new},
    {Py_tp_dealloc, space_dealloc},
    {Py_tp_methods, space_methods},
    {Py_tp_getset, space_getset},
    {0, NULL},
};

static PyType_Spec space_spec = {
    "shm._core.Space", sizeof(Space), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    space_slots};

/* ---- View ---- */

static PyObject *view_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *space, *addr_object, *size_object;
    int writable = 1, error;
    uint64_t addr, size;
    View *self;

    if (!no_keywords(kwargs))
        return NULL;
    if (!PyArg_ParseTuple(args, "O!OO|p", space_type, &space, &addr_object, &size_object,
                          &writable) ||
        !as_u64_or(addr_object, &addr, fault_error) ||
        !as_u64_or(size_object, &size, fault_error))
        return NULL;
    self = (View *)alloc_object(type);
    if (!self)
        return NULL;
    error = vb_view_open(&self->view, &((Space *)space)->space, addr, size, writable);
    if (!error)
        return (PyObject *)self;
    Py_DECREF(self);
    if (error == -EFAULT)
        return no_memory_there(addr, size, writable);
    if (error == -ENOMEM)
        return PyErr_NoMemory();
    return PyErr_Format(invalid_error, "cannot view %llu bytes at %p as one piece",
                        (unsigned long long)size, (void *)(uintptr_t)addr);
}

static void view_dealloc(PyObject *self)
{
    vb_view_close(&((View *)self)->view);
    free_object(self);
}

static PyObject *view_close(PyObject *self, PyObject *Py_UNUSED(none))
{
    vb_view_close(&((View *)self)->view);
    Py_RETURN_NONE;
}

/* Part of a view as host memory, or NULL with FaultError or InvalidError set. */
static uint8_t *view_part(View *self, uint64_t offset, uint64_t size, bool write)
{
    const struct vb_view *view = &self->view;
    uint8_t *host = vb_view_ptr(view, offset, size);

    if (host && (!write || view->writable))
        return host;
    if (host)
        PyErr_SetString(denied_error, "the view is read-only");
    else if (!vb_view_alive(view))
        PyErr_SetString(fault_error, "the view is closed or its memory was unmapped");
    else
        PyErr_Format(invalid_error, "%llu bytes at offset %llu are outside the view",
                     (unsigned long long)size, (unsigned long long)offset);
    return NULL;
}

static PyObject *view_read(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t offset = 0, size;
    const uint8_t *host;

    if (nargs > 2) {
        exactly(nargs, 2);
        return NULL;
    }
    if (nargs > 0 && !as_u64_or(args[0], &offset, invalid_error))
        return NULL;
    size = ((View *)self)->view.size;
    size = offset < size ? size - offset : 0;
    if (nargs > 1 && !as_u64_or(args[1], &size, invalid_error))
        return NULL;
    host = view_part((View *)self, offset, size, false);
    return host ? PyBytes_FromStringAndSize((const char *)host, (Py_ssize_t)size) : NULL;
}

static PyObject *view_copy(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                           bool write)
{
    Py_buffer local;
    uint64_t offset;
    uint8_t *host;

    if (!exactly(nargs, 2) || !as_u64_or(args[0], &offset, invalid_error))
        return NULL;
    if (PyObject_GetBuffer(args[1], &local, write ? PyBUF_SIMPLE : PyBUF_WRITABLE))
        return NULL;
    host = view_part((View *)self, offset, (uint64_t)local.len, write);
    if (host)
        memcpy(write ? host : local.buf, write ? local.buf : host, (size_t)local.len);
    PyBuffer_Release(&local);
    if (!host)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *view_read_into(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return view_copy(self, args, nargs, false);
}

static PyObject *view_write(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return view_copy(self, args, nargs, true);
}

static PyObject *view_addr(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((View *)self)->view.addr);
}

static PyObject *view_size(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((View *)self)->view.size);
}

static PyObject *view_alive(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(vb_view_alive(&((View *)self)->view));
}

static PyObject *view_writable(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((View *)self)->view.writable);
}

static PyObject *view_capsule(PyObject *self, void *Py_UNUSED(closure))
{
    return PyCapsule_New(&((View *)self)->view, "shm.view", NULL);
}

static PyMethodDef view_methods[] = {
    {"read", (PyCFunction)view_read, METH_FASTCALL, NULL},
    {"read_into", (PyCFunction)view_read_into, METH_FASTCALL, NULL},
    {"write", (PyCFunction)view_write, METH_FASTCALL, NULL},
    {"close", view_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef view_getset[] = {
    {"addr", view_addr, NULL, NULL, NULL},
    {"size", view_size, NULL, NULL, NULL},
    {"alive", view_alive, NULL, NULL, NULL},
    {"writable", view_writable, NULL, NULL, NULL},
    {"_capsule", view_capsule, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_new, view_new},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_methods, view_methods},
    {Py_tp_getset, view_getset},
    {0, NULL},
};

static PyType_Spec view_spec = {
    "shm.View", sizeof(View), 0, Py_TPFLAGS_DEFAULT, view_slots};

#include "_signal.inc"
#include "_doorbell.inc"

/* ---- module ---- */

static bool find_errors(void)
{
    fault_error = find_error("shm.errors", "FaultError");
    invalid_error = find_error("shm.errors", "InvalidError");
    exists_error = find_error("shm.errors", "ExistsError");
    denied_error = find_error("shm.errors", "PermissionDeniedError");
    space_error = find_error("shm.errors", "NoSpaceError");
    return fault_error && invalid_error && exists_error && denied_error && space_error;
}

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT, "shm._core", NULL, -1, doorbell_functions, NULL, NULL, NULL,
    NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&core_module);

    if (!module)
        return NULL;
    space_type = add_type(module, &space_spec);
    view_type = add_type(module, &view_spec);
    signal_type = add_type(module, &signal_spec);
    if (space_type && view_type && signal_type && find_errors())
        return module;
    Py_DECREF(module);
    return NULL;
}
