"""virtio-balloon: its configuration; it reclaims nothing and gives all back."""

from backends.virtio.small import VirtioBalloon
from tests.backends.virtio.rig import rigged


async def test_the_target_is_told_and_the_driver_says_what_it_has() -> None:
    """R28."""
    balloon = VirtioBalloon(target=10)
    async with rigged(balloon) as rig:
        rig.start()
        balloon.set_target(512)
        assert rig.config_interrupts == 1
        assert balloon.read_config(0, 4) == b"\0\2\0\0"
        balloon.write_config(4, b"\0\1\0\0")
        assert balloon.actual == 256
        rig.device.set_status(0)
        assert balloon.actual == 0


async def test_pages_are_given_back_untouched() -> None:
    async with rigged(VirtioBalloon()) as rig:
        rig.start()
        for queue in (0, 1):
            assert await rig.request(queue, bytes(range(64))) == b""
