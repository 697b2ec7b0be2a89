"""Virtio device models, transport-free, and the virtqueues they are driven through."""
