"""Which hosts and origins are this machine's own."""

import pytest

from dit_trt.runtime.hosts import is_foreign, is_loopback_name


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2:9"])
def test_names_of_this_machine(host):
    assert is_loopback_name(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "10.0.0.1", "localhost.evil.example", "[", "[::1", ""]
)
def test_names_of_others_and_none(host):
    assert not is_loopback_name(host)


def test_a_page_is_of_the_server_or_foreign():
    assert not is_foreign("http://localhost:7860", "LocalHost:7860")
    for origin in ("http://evil.example", "http://localhost", "http://localhost:78601", "null", ""):
        assert is_foreign(origin, "localhost:7860")
