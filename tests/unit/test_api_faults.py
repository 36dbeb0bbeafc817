"""What Prefect's API fails with, in one line of an agent's log."""

from __future__ import annotations

import httpx
import pytest
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, temporary_settings

from taskadapter.prefect_api.client import in_words


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
