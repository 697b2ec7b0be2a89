"""Virtio devices from the guest's side, driven in user space."""
