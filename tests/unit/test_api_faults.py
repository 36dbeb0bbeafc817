"""What Prefect's API fails with, in one line of an agent's log."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, temporary_settings

from taskadapter.errors import ApiUnavailableError
from taskadapter.prefect_api import client
from taskadapter.prefect_api.client import api_client, in_words


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (httpx.ReadError(""), "has broken the connection off (ReadError)"),
        (
            httpx.RemoteProtocolError("Server disconnected."),
            "has broken the connection off (Server disconn",
        ),
        (httpx.ConnectError("All connection attempts failed"), "does not answer: All connection attempts"),
        (httpx.ReadTimeout(""), "has not answered for 7 s"),
    ],
)
def test_a_fault_names_the_api(fault, words):
    """A driver's fault is often no more than a name; no password is shown."""
    there = {PREFECT_API_URL: "http://me:secret@there:4200/api", PREFECT_API_REQUEST_TIMEOUT: 7.0}
    with temporary_settings(there):
        said = in_words(fault)
    assert said.startswith(f"Prefect's API at http://there:4200/api {words}")


def test_no_user_of_the_api_is_shown():
    """httpx names the whole URL of what was refused."""
    url = httpx.URL("http://me:secret@there:4200/api/x")
    answer = httpx.Response(404, request=httpx.Request("GET", url))
    fault = httpx.HTTPStatusError(
        f"Client error '404' for url '{url}'", request=answer.request, response=answer
    )
    assert in_words(fault) == "Client error '404' for url 'http://there:4200/api/x'"


def test_other_faults_have_their_own_words():
    """In one line; one without words has its name."""
    assert in_words(OSError("a\n b")) == "a b"
    assert in_words(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (401, "set PREFECT_API_AUTH_STRING as on the server, or PREFECT_API_KEY for Prefect Cloud"),
        (403, "refuses this machine (403 Forbidden)"),
        (429, "wait a minute"),
        (500, "see the server's log"),
        (503, "start the server"),
        (404, None),
        (409, None),
        (422, None),
    ],
)
def test_what_is_answered_to_whatever_is_asked_is_told_in_our_words(monkeypatch, code, remedy):
    """Other answers are about what was asked, and whoever has asked knows what they mean."""
    answer = httpx.Response(code, request=httpx.Request("POST", "http://there:4200/api/deployments/"))

    class Client:
        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *_: object) -> None: ...

    monkeypatch.setattr(client, "get_client", Client)

    async def ask() -> None:
        async with api_client():
            raise httpx.HTTPStatusError("refused", request=answer.request, response=answer)

    with (
        temporary_settings({PREFECT_API_URL: "http://there:4200/api"}),
        pytest.raises(httpx.HTTPStatusError if remedy is None else ApiUnavailableError) as raised,
    ):
        asyncio.run(ask())
    assert (remedy or "refused") in str(raised.value)
