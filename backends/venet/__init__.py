"""venet, the network device of the bus: interface type "virtual-ethernet".

`Venet` is a port of a `Switch`, `VenetTap` one that ends in a TAP of the host,
`VenetLoopback` one that hands every frame back. `SwitchTap` links a Switch to the host.
"""

from backends.venet.loopback import VenetLoopback
from backends.venet.port import Venet
from backends.venet.switch import Switch
from backends.venet.tap import SwitchTap, VenetTap

__all__ = ["Switch", "SwitchTap", "Venet", "VenetLoopback", "VenetTap"]
