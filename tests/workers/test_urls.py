"""URLs as people may see them: no part of a password, however malformed the URL is."""

from __future__ import annotations

import pytest

from workers.urls import hide_passwords, is_plain_url, shown_url

SHOWN = {
    "postgresql://me:secret@host:5432/name": "postgresql://me:***@host:5432/name",
    "postgresql+psycopg://me:p%40ss%2Fw%25rd@[::1]/name": "postgresql+psycopg://me:***@[::1]/name",
    "postgresql://me@host/name": "postgresql://me@host/name",
    "postgresql:///name?host=/tmp/socket&port=5": "postgresql:///name?host=/tmp/socket&port=5",
    "postgresql://host/name?user=me&password=secret&host=part-of-it": "postgresql://host/name?***",
    "mysql://me:secret@host/name": "mysql://me:***@host/name",
    "sqlite:////a/b@c/100%25?d#e.db": "sqlite:////a/b@c/100%25?d#e.db",
    "sqlite://me:secret@host/name": "sqlite://me:***@host/name",
    "s3://bucket/prefix": "s3://bucket/prefix",
    "s3://bucket/odd?prefix#with@all": "s3://bucket/odd?prefix#with@all",
    "s3://KEY:secret@bucket/prefix": "s3://KEY:***@bucket/prefix",
    "/a/folder/with:and@in it": "/a/folder/with:and@in it",
    "file:///a/b@c": "file:///a/b@c",
    "nonsense": "nonsense",
    "": "",
}
AMBIGUOUS = [
    "postgresql://me:sec@ret/more@host/name",
    "postgresql://me:sec@ret@host/name",
    "postgresql://me:sec/ret@host/name",
    "postgresql://me:sec?ret@host/name",
    "postgresql://me:sec#ret@host/name",
    "postgresql://me:sec ret@host/name",
    "postgresql://m/e:secret@host/name",
    "postgresql://me:secret/name",
    "postgresql://me:secret@host:port/name",
    "postgresql:///me:secret@host/name",
    "postgresql://host/name?password=sec@ret",
    "s3://KEY:sec/ret@bucket/prefix",
]
NO_URLS = [
    "postgresql:/me:secret@host/name",
    "postgresql//me:secret@host",
    "me:secret@host/name",
    "//me:secret@host/name",
]


@pytest.mark.parametrize("url", SHOWN)
def test_what_can_be_read_in_one_way_is_shown_without_its_password(url: str) -> None:
    assert shown_url(url) == SHOWN[url]


@pytest.mark.parametrize("url", AMBIGUOUS)
def test_of_what_can_be_read_in_several_ways_the_scheme_is_shown(url: str) -> None:
    assert shown_url(url) == f"{url.partition('://')[0]}://***"
    assert not is_plain_url(url)


@pytest.mark.parametrize("url", NO_URLS)
def test_of_what_is_no_url_nothing_is_shown(url: str) -> None:
    assert shown_url(url) == "***"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("at postgresql://me:secret@host/name: no answer", "at postgresql://me:***@host/name: no answer"),
        ("No such command 'postgresql://me:sec ret@host/name'.", "No such command 'postgresql://***'."),
        ("got http://me:secret@host:9/x, wanted an answer (1@2)", "got http://me:***@host:9/x, wanted an answer (1@2)"),
        ("s3://a/b and postgresql://me:secret@host/x\nnext@line", "s3://a/b and postgresql://me:***@host/x\nnext@line"),
        ("nothing to hide: small@1, 10:30", "nothing to hide: small@1, 10:30"),
    ],
)
def test_urls_in_texts_are_shown_in_the_same_way(text: str, wanted: str) -> None:
    assert hide_passwords(text) == wanted
