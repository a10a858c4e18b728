"""Faults on purpose: failing system calls (shim) and every state a power cut may leave (crashstates)."""
