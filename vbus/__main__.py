"""`python -m vbus` is the command `vbus`."""

from vbus.cli import main

main()
