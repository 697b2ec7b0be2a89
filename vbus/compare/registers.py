"""The register sets of virtio-pci's layouts, as far as their sizes and offsets go.

Fields in order with their bytes; each is aligned to its own size. What the registers do
is not modelled here.
"""

from vbus.compare.space import align_up, power_of_two

Fields = tuple[tuple[str, int], ...]

LEGACY: Fields = (
    ("host_features", 4),
    ("guest_features", 4),
    ("queue_pfn", 4),
    ("queue_size", 2),
    ("queue_select", 2),
    ("queue_notify", 2),
    ("status", 1),
    ("isr", 1),
)
MSIX_FIELDS: Fields = (("msi_config_vector", 2), ("msi_queue_vector", 2))

# The four-BAR proposal's common registers.
FOUR_BAR_COMMON: Fields = (
    ("device_feature_select", 4),
    ("device_feature", 4),
    ("guest_feature_select", 4),
    ("guest_feature", 4),
    ("config_gen_and_latch", 4),
    ("msix_config", 2),
    ("device_status", 1),
    ("pad", 1),
    ("queue_select", 2),
    ("queue_align", 2),
    ("queue_size", 2),
    ("queue_msix_vector", 2),
    ("queue_address", 8),
)

# The mirrored proposal: the vectors are always there, and three fields are appended.
MIRRORED: Fields = (
    *LEGACY,
    *MSIX_FIELDS,
    ("host_feature_select", 4),
    ("guest_feature_select", 4),
    ("queue_pfn_hi", 4),
)

NET_CONFIG = 8
"""Device config of a plain virtio-net: six bytes of MAC, two of status."""


def offset(fields: Fields, name: str) -> int:
    """Give where a field begins; "" for where all of them end."""
    at = 0
    for field, size in fields:
        at = align_up(at, size)
        if field == name:
            return at
        at += size
    if name:
        raise KeyError(name)
    return at


def legacy_config(*, msix: bool) -> int:
    """Give where device config begins in the legacy registers."""
    return offset((*LEGACY, *MSIX_FIELDS) if msix else LEGACY, "")


def legacy_bar(config_bytes: int) -> int:
    """Give the size of the legacy port BAR of a function with MSI-X."""
    return power_of_two(legacy_config(msix=True) + config_bytes)


def mirrored_bar(config_bytes: int) -> int:
    """Give the size of the mirrored proposal's port BAR, with config laid over it."""
    overlaid = legacy_config(msix=True) + config_bytes
    return power_of_two(max(offset(MIRRORED, ""), overlaid))
