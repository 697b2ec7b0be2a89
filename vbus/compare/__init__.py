"""One bridge or one function per device: layouts as models, what they cost, reports.

A layout really allocates: addresses, ports, bus numbers, vectors, by the rules of PCI,
until something runs out. Nothing here talks to a guest of the bus.
"""
