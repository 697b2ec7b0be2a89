"""The guest's own Linux as the platform: a PCI function by VFIO or by uio."""
