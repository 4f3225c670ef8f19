"""Which handler a URL finds, and with what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.routes import Route, RouteError, Routes

ROUTES: Routes[str] = Routes(
    [
        Route("GET", "/v2", "server"),
        Route("GET", "/v2/models/{model}", "model"),
        Route("GET", "/v2/models/{model}/versions/{version}", "version"),
        Route("POST", "/v2/models/{model}/infer", "infer"),
        Route("GET", "/both", "get both"),
        Route("POST", "/both", "post both"),
        Route("POST", "/v1/{model}:ask", "ask", any_case=True),
        Route("GET", "/v1/{model}", "look"),
        Route("POST", "/v1/{model}", "other"),
    ]
)


@pytest.mark.parametrize(
    ("method", "url", "handler", "arguments"),
    [
        ("GET", "/v2", "server", {}),
        ("GET", "/v2/", "server", {}),
        ("GET", "/v2?x=1", "server", {}),
        ("GET", "/v2/?x=/v2/models/a", "server", {}),
        ("GET", "/v2#part", "server", {}),
        ("GET", "/%76%32", "server", {}),
        ("GET", "http://here:8000/v2", "server", {}),
        ("GET", "https://here/v2/models/a?b=http://c/d", "model", {"model": "a"}),
        ("GET", "/v2/models/a", "model", {"model": "a"}),
        ("GET", "/v2/models/a/", "model", {"model": "a"}),
        ("GET", "/v2/models/a%20b%2Fc%3F", "model", {"model": "a b/c?"}),
        ("GET", "/v2/models/gr%C3%BC%C3%9Fe", "model", {"model": "grüße"}),
        ("GET", "/v2/models/a+b", "model", {"model": "a+b"}),
        ("GET", "/v2/models/100%", "model", {"model": "100%"}),
        ("GET", "/v2/models/%zz", "model", {"model": "%zz"}),
        ("GET", "/v2/models/..", "model", {"model": ".."}),
        ("GET", "/v2/models/{model}", "model", {"model": "{model}"}),
        ("GET", "/v2/models//versions/1", "version", {"model": "", "version": "1"}),
        ("GET", "/v2/models/a/versions/2", "version", {"model": "a", "version": "2"}),
        ("POST", "/v2/models/a/infer", "infer", {"model": "a"}),
        ("POST", "/both", "post both", {}),
        ("POST", "/v1/a:ask", "ask", {"model": "a"}),
        ("POST", "/V1/A:b:ASK", "ask", {"model": "A:b"}),
        ("POST", "/v1/a:asks", "other", {"model": "a:asks"}),
        ("POST", "/v1/ask", "other", {"model": "ask"}),
        ("GET", "/v1/a", "look", {"model": "a"}),
    ],
)
def test_found(method: str, url: str, handler: str, arguments: dict[str, str]) -> None:
    assert ROUTES.find(method.encode(), url.encode()) == (handler, arguments)


@pytest.mark.parametrize(
    "url",
    [
        "/",
        "",
        "*",
        "/v1",
        "/V2",
        "/v2/models",
        "/v2/models/a/b",
        "/v2/models/a/versions",
        "/v2/models/a/versions/1/infer",
        "/v2%2Fmodels%2Fa",
        "http://here",
        "http://here:8000/",
        "?x=/v2",
    ],
)
def test_not_found(url: str) -> None:
    with pytest.raises(RouteError) as raised:
        ROUTES.find(b"GET", url.encode())
    assert (raised.value.status, raised.value.sentence, raised.value.allow) == (404, "Not Found", ())


@pytest.mark.parametrize(
    ("method", "url", "allow"),
    [
        ("POST", "/v2", ("GET", "HEAD", "OPTIONS")),
        ("get", "/v2", ("GET", "HEAD", "OPTIONS")),
        ("\xff", "/v2", ("GET", "HEAD", "OPTIONS")),
        ("GET", "/v2/models/a/infer", ("OPTIONS", "POST")),
        ("HEAD", "/v2/models/a/infer", ("OPTIONS", "POST")),
        ("DELETE", "/both", ("GET", "HEAD", "OPTIONS", "POST")),
        ("GET", "/v1/a:ask", ("OPTIONS", "POST")),
    ],
)
def test_wrong_method_is_told_the_right_ones(method: str, url: str, allow: tuple[str, ...]) -> None:
    with pytest.raises(RouteError) as raised:
        ROUTES.find(method.encode("latin-1"), url.encode())
    assert (raised.value.status, raised.value.sentence, raised.value.allow) == (405, "Method Not Allowed", allow)


def test_head_is_answered_by_who_answers_get() -> None:
    assert ROUTES.find(b"HEAD", b"/v2/models/a") == ROUTES.find(b"GET", b"/v2/models/a")


def test_the_methods_of_a_path_and_of_the_server() -> None:
    assert ROUTES.allowed(b"/v2/models/a/infer") == ("OPTIONS", "POST")
    assert ROUTES.methods() == ("GET", "HEAD", "OPTIONS", "POST")


def test_what_a_path_says_itself_goes_before_arguments() -> None:
    routes = Routes([Route("GET", "/a/{x}", "any")])
    routes.add([Route("GET", "/a/b", "b")])
    assert (routes.find(b"GET", b"/a/b"), routes.find(b"GET", b"/a/c")) == (("b", {}), ("any", {"x": "c"}))


@pytest.mark.parametrize("url", [b"/v2/models/%FF", b"/v2/models/\xff", b"/v2/models/%C3/infer", b"/%ED%A0%80"])
def test_path_that_is_no_text_is_refused(url: bytes) -> None:
    with pytest.raises(RouteError) as raised:
        ROUTES.find(b"GET", url)
    assert (raised.value.status, raised.value.sentence) == (
        400,
        "the path is not UTF-8 once its percent signs are decoded",
    )


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"/v2/models/", b"http://"]))
def test_any_url_is_a_handler_or_a_route_error(url: bytes, start: bytes) -> None:
    try:
        found: object = ROUTES.find(b"GET", start + url)[0]
    except RouteError as error:
        found = error.status
    assert found in ("server", "model", "version", "get both", 400, 404, 405)
