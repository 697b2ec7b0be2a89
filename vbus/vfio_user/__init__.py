"""vfio-user: PCI functions served to another process over a unix socket."""
