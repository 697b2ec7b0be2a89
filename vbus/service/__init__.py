"""vbus as a service: telling its manager, taking sockets from it, logging for it.

The protocol is systemd's (sd_notify(3), sd_listen_fds(3), sd-daemon(3)), which other
managers speak as well. Without a manager nothing of this does anything.
"""
