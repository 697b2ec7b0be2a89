"""What runs devices in a process of their own: `vbus backend run`."""
