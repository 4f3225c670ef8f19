"""The dashboard's file: whole in itself, and allowed nothing that is not in it."""

from __future__ import annotations

import re

import pytest

from penstock.gateway.page import Page, load_page


@pytest.fixture(scope="module")
def page() -> Page:
    return load_page()


def policy(page: Page) -> dict[str, str]:
    [value] = re.findall(r"^Content-Security-Policy: (.*)\r$", page.headers.decode(), re.MULTILINE)
    return dict(rule.partition(" ")[::2] for rule in value.split("; "))


def test_nothing_is_allowed_but_what_is_in_the_file(page: Page) -> None:
    rules = policy(page)
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[name])
    assert {rules[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert b"X-Content-Type-Options: nosniff\r\n" in page.headers
    assert page.headers.endswith(b"\r\n")
    assert b"\r\n\r\n" not in page.headers


def test_the_file_names_nothing_from_elsewhere(page: Page) -> None:
    text = page.body.decode()
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}, "a name, never fetched"
    assert re.findall(r"\b(?:src|href)=\S+", text) == ['href="data:,">']


def test_nothing_is_put_in_as_markup(page: Page) -> None:
    text = page.body.decode()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", " style="):
        assert way not in text
    assert re.findall(r"<[^>]*\son\w+\s*=", text) == []
