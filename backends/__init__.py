"""Devices that live on the bus."""
