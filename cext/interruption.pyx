"""Ending what a thread is doing in Python code: an exception is raised in it at its next step."""
from cpython.ref cimport PyObject

cdef extern from "Python.h":
    int PyThreadState_SetAsyncExc(unsigned long ident, PyObject *exception)


def raise_in_thread(unsigned long ident, kind):
    """Raise an exception in a thread as soon as it runs Python code again; what waits in C is not woken.

    ident: that of threading.get_ident(). kind: an exception class; None takes back what was not raised yet.
    """
    PyThreadState_SetAsyncExc(ident, NULL if kind is None else <PyObject *>kind)
