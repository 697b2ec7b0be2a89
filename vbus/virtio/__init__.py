"""The vocabulary of virtio 1.2 that devices and drivers share: numbers and layouts."""
