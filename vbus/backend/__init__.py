"""Backends in processes of their own: the protocol, and the daemon's side of it."""
