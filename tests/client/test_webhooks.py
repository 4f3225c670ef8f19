"""Callbacks that are from the server, and others."""

from __future__ import annotations

import pytest

from penstock.client import PenstockError, verify_callback

# The example of the specification's reference libraries.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
HEADERS = {
    "Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
NOW = 1614265330.0


def test_the_example_of_the_specification_is_believed() -> None:
    assert verify_callback(SECRET, HEADERS, BODY, now=NOW) == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    several = HEADERS | {"webhook-signature": f"v1a,x v1,AAAA {HEADERS['webhook-signature']}"}
    assert verify_callback(SECRET, several, BODY, now=NOW)


@pytest.mark.parametrize(
    ("headers", "body", "now", "said"),
    [
        ({}, BODY + b" ", NOW, "is not signed with this secret, or has been changed"),
        ({"Webhook-Id": "other"}, BODY, NOW, "is not signed"),
        ({"webhook-timestamp": "1614265331"}, BODY, NOW, "is not signed"),
        ({"webhook-signature": "v1,\u00e4"}, BODY, NOW, "is not signed"),
        ({"webhook-signature": "v2," + HEADERS["webhook-signature"][3:]}, BODY, NOW, "is not signed"),
        ({"webhook-signature": ""}, BODY, NOW, "are not there"),
        ({"webhook-timestamp": "soon"}, BODY, NOW, "are not there"),
        ({"webhook-timestamp": "-5"}, BODY, NOW, "are not there"),
        ({}, BODY, NOW + 301, "more than 300 s ago"),
        ({}, BODY, NOW - 301, "more than 300 s ago"),
    ],
)
def test_others_are_not(headers: dict[str, str], body: bytes, now: float, said: str) -> None:
    with pytest.raises(PenstockError, match=said):
        verify_callback(SECRET, HEADERS | headers, body, now=now)


def test_secrets() -> None:
    with pytest.raises(PenstockError, match="is not signed"):
        verify_callback("another", HEADERS, BODY, now=NOW)
    with pytest.raises(PenstockError, match="is not signed"):
        verify_callback(b"bytes", HEADERS, BODY, now=NOW)
    with pytest.raises(PenstockError, match="no base64"):
        verify_callback("whsec_*", HEADERS, BODY, now=NOW)
