/* What the limited-API bindings have in common: objects, arguments, types, capsules. */
#ifndef SHM_BINDING_H
#define SHM_BINDING_H

#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

/* The last step of a tp_dealloc of a heap type. */
static inline void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    release(self);
    Py_DECREF(type);
}

static inline PyObject *alloc_object(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);

    return alloc(type, 0);
}

static inline bool exactly(Py_ssize_t nargs, Py_ssize_t wanted)
{
    if (nargs == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, nargs);
    return false;
}

static inline bool no_keywords(PyObject *kwargs)
{
    if (!kwargs || PyDict_Size(kwargs) == 0)
        return true;
    PyErr_SetString(PyExc_TypeError, "the compiled core takes no keywords");
    return false;
}

static inline bool as_u64(PyObject *object, uint64_t *out)
{
    *out = PyLong_AsUnsignedLongLong(object);
    return *out != (uint64_t)-1 || !PyErr_Occurred();
}

/* The C struct of another extension's object; lives as long as `object`. */
static inline void *from_capsule(PyObject *object, const char *name)
{
    PyObject *capsule = PyObject_GetAttrString(object, "_capsule");
    void *pointer = capsule ? PyCapsule_GetPointer(capsule, name) : NULL;

    Py_XDECREF(capsule);
    return pointer;
}

static inline PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);

    if (type && PyModule_AddType(module, (PyTypeObject *)type) == 0)
        return (PyTypeObject *)type;
    Py_XDECREF(type);
    return NULL;
}

static inline PyObject *find_error(const char *module_name, const char *name)
{
    PyObject *module = PyImport_ImportModule(module_name);
    PyObject *error = module ? PyObject_GetAttrString(module, name) : NULL;

    Py_XDECREF(module);
    return error;
}

#endif
