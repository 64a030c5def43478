"""Which addresses the app may fetch a picture from."""

from __future__ import annotations

import pytest

from app.remote_image import is_public


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]
)
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("prefix", ["::", "::ffff:", "::ffff:0:", "64:ff9b::", "64:ff9b:1::"])
@pytest.mark.parametrize("inner", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0"])
def test_an_inner_address_is_not_public_when_it_is_wrapped(prefix: str, inner: str) -> None:
    """Gateways and kernels unwrap these, and the machine itself would be asked."""
    assert not is_public(prefix + inner)


@pytest.mark.parametrize(
    "address", ["2002:7f00:1::", "2002:a01:203::1", "2002:e000:1::", "fec0::1", "64:ff9b:1::808:808"]
)
def test_6to4_of_inner_addresses_and_networks_that_are_never_public(address: str) -> None:
    assert not is_public(address)
