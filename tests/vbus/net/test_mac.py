"""Ethernet addresses as text and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus.errors import InvalidError
from vbus.net import MacAddress


@given(octets=st.binary(min_size=6, max_size=6))
def test_text_and_bytes_are_the_same_address(octets: bytes) -> None:
    """Six octets in, the same six out; group addresses and zero are no station's."""
    mac = MacAddress(octets)
    assert bytes(mac) == octets
    assert mac.is_group == bool(octets[0] & 1)
    if mac.is_group or not any(octets):
        with pytest.raises(InvalidError):
            MacAddress.parse(str(mac))
    else:
        assert MacAddress.parse(str(mac).upper()) == mac


@given(name=st.text(max_size=63))
def test_a_name_makes_one_address_of_local_administration(name: str) -> None:
    """Stable: a guest finds the address it knew."""
    mac = MacAddress.from_name(name)
    assert mac == MacAddress.from_name(name)
    assert mac[0] & 3 == 2
    assert MacAddress.parse(str(mac)) == mac


def test_different_names_make_different_addresses() -> None:
    """Ports of one bus do not collide."""
    assert len({MacAddress.from_name(f"port{n}") for n in range(5000)}) == 5000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "aa:bb:cc:dd:ee",
        "aabbccddeeff",
        "aa-bb-cc-dd-ee-ff",
        "aa:bb:cc:dd:ee:fg",
        "aa:bb:cc:dd:ee:ff:00",
        "٠a:bb:cc:dd:ee:f0",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    """9.3 knows one form."""
    with pytest.raises(InvalidError):
        MacAddress.parse(text)


def test_other_lengths_are_refused() -> None:
    """Six octets."""
    for length in (0, 5, 7):
        with pytest.raises(InvalidError):
            MacAddress(bytes(length))
