"""Virtual machines for trying things out: a QEMU, a small guest, a way to run it.

Not a part of the daemon, which knows nothing of what its guests are.
"""
