def raise_in_thread(ident: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread as soon as it runs Python code again; what waits in C is not woken.

    ident: that of threading.get_ident(). kind: an exception class; None takes back what was not raised yet.
    """
