"""Whom a callback may be sent to."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.jobs.address import (
    URL_CHARACTERS_MAX,
    CallbackRefused,
    Target,
    check_addresses,
    may_be_called,
    read_networks,
    read_target,
)

PUBLIC = ["8.8.8.8", "193.99.144.80", "100.128.0.1", "2001:4860:4860::8888", "2a02:2e0::1", "::ffff:8.8.8.8"]
PUBLIC += ["64:ff9b::808:808", "2002:808:808::1"]
NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1"),
    *("172.31.255.255", "192.0.0.9", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *(
        "::",
        "::1",
        "::2",
        "::10.0.0.1",
        "::8.8.8.8",
        "fe80::1",
        "fe80::1%eth0",
        "2a02:2e0::1%eth0",
        "fec0::1",
        "fc00::1",
    ),
    *("fd12:3456::1", "ff02::1", "ff0e::1", "2001::1", "2001:2::1", "2001:db8::1", "3fff::1", "100::1", "5f00::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::10.0.0.1", "64:ff9b::127.0.0.1"),
    *("64:ff9b:1::8.8.8.8", "2002:7f00:1::1", "2002:a00:1::1", "2002:a9fe:a9fe::1", "4000::1", "e000::1"),
]


@pytest.mark.parametrize("text", PUBLIC)
def test_what_is_public(text: str) -> None:
    assert may_be_called(ipaddress.ip_address(text), ())


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_what_is_not(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert not may_be_called(address, ())
    assert may_be_called(address, read_networks(["0.0.0.0/0", "::/0"])), "unless it is allowed"
    with pytest.raises(CallbackRefused, match=r"name has the address .*, which is not public; .*callback_allow"):
        check_addresses("name", [PUBLIC[0], text], ())


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "64:ff9b::"]))
def test_an_embedded_address_counts_as_itself(address: ipaddress.IPv4Address, prefix: str) -> None:
    embedded = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | int(address))
    assert may_be_called(embedded, ()) == may_be_called(address, ())
    assert may_be_called(embedded, read_networks([f"{address}/32"]))


@given(st.ip_addresses())
def test_nothing_is_public_that_python_does_not_take_for_it(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert address.is_global or not may_be_called(address, ())


def test_this_host_keeps_its_name_where_it_is_allowed() -> None:
    assert read_target("http://localhost:1/", read_networks(["127.0.0.0/8"])).authority == "localhost:1"


def test_networks_that_are_allowed() -> None:
    allowed = read_networks(["10.0.0.0/8", "fd00::/8", "192.168.1.7"])
    for text, may in [("10.1.2.3", True), ("11.1.2.3", True), ("fd00::1", True), ("fc00::1", False)]:
        assert may_be_called(ipaddress.ip_address(text), allowed) == may
    assert may_be_called(ipaddress.ip_address("192.168.1.7"), allowed)
    assert not may_be_called(ipaddress.ip_address("192.168.1.8"), allowed)


@pytest.mark.parametrize("text", ["10.0.0.0/33", "10.0.0.1/8", "localhost", ""])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=r'\[jobs\] callback_allow has "'):
        read_networks([text])


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("http://example.com", Target(False, "example.com", 80, "/"), "example.com"),
        ("https://Example.com:443/a?b=c#d", Target(True, "example.com", 443, "/a?b=c"), "example.com"),
        ("https://example.com.:8443?x", Target(True, "example.com.", 8443, "/?x"), "example.com.:8443"),
        ("HTTP://8.8.8.8:443/%20", Target(False, "8.8.8.8", 443, "/%20"), "8.8.8.8:443"),
        ("http://[2A02:2E0::1]:80/", Target(False, "2a02:2e0::1", 80, "/"), "[2a02:2e0::1]"),
        ("http://[2a02:2e0::1]:81/", Target(False, "2a02:2e0::1", 81, "/"), "[2a02:2e0::1]:81"),
        ("http://xn--bcher-kva.example/", Target(False, "xn--bcher-kva.example", 80, "/"), "xn--bcher-kva.example"),
        ("http://my_host-1/", Target(False, "my_host-1", 80, "/"), "my_host-1"),
        ("http://0x8.8.8.8/", Target(False, "8.8.8.8", 80, "/"), "8.8.8.8"),
    ],
)
def test_what_a_url_says(url: str, target: Target, authority: str) -> None:
    assert read_target(url, ()) == target
    assert target.authority == authority


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "percent-encoded"),
        ("ftp://example.com/", "neither with http"),
        ("example.com", "neither with http"),
        ("//example.com/", "neither with http"),
        ("file:///etc/passwd", "neither with http"),
        ("http:///path", "no host"),
        ("http://:80/", "no host"),
        ("http://user@example.com/", "user or a password"),
        ("http://user:geheim@example.com/", "user or a password"),
        ("http://@example.com/", "user or a password"),
        ("http://example.com:0/", "port 0"),
        ("http://example.com:65536/", "no URL"),
        ("http://example.com:x/", "no URL"),
        ("http://[::1", "no URL"),
        ("http://[v1.x]/", "brackets|no URL"),
        ("http://[8.8.8.8]/", "brackets|no URL"),
        ("http://exa mple.com/", "percent-encoded"),
        ("http://example.com/a b", "percent-encoded"),
        ("http://example.com/\r\nHost: other", "percent-encoded"),
        ("http://example.com/\t", "percent-encoded"),
        ("http://example.com\\@other/", "percent-encoded"),
        ("http://bücher.example/", "punycode"),
        ("http://-a/", "no host"),
        ("http://a..b/", "no host"),
        ("http://" + "a" * 64 + "/", "no host"),
        ("http://[fe80::1%25eth0]/", "not public"),
        ("http://%31%32%37.0.0.1/", "no host"),
        ("http://127.0.0.1/", "names 127.0.0.1, which is not public"),
        ("http://127.0.0.1./", "names 127.0.0.1, which is not public"),
        ("http://localhost:8000/", "names 127.0.0.1, which is not public"),
        ("http://a.LOCALHOST./", "names 127.0.0.1, which is not public"),
        ("http://127.1/", "names 127.0.0.1, which is not public"),
        ("http://2130706433/", "names 127.0.0.1, which is not public"),
        ("http://0x7f000001/", "names 127.0.0.1, which is not public"),
        ("http://0177.0.0.1/", "names 127.0.0.1, which is not public"),
        ("http://0/", "names 0.0.0.0, which is not public"),
        ("http://[::1]/", "names ::1, which is not public"),
        ("http://[::ffff:10.0.0.1]/", "which is not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://example.com/" + "x" * URL_CHARACTERS_MAX, "may have 2048"),
    ],
)
def test_what_is_refused_at_once(url: str, why: str) -> None:
    with pytest.raises(CallbackRefused, match=why) as told:
        read_target(url, ())
    assert "geheim" not in str(told.value)


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "http://[", "http://8.8.8.8"]))
def test_whatever_comes_is_read_or_refused(text: str, begin: str) -> None:
    url = begin + text
    try:
        target = read_target(url, ())
    except CallbackRefused:
        return
    assert target.host
    assert 0 < target.port < 65536
    assert target.path.startswith("/")
    assert not {*" \r\n\t"} & {*target.path, *target.authority}
