"""Consuming: what a Consumer does on its I/O thread, and what it keeps."""
