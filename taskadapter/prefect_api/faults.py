"""What Prefect's API fails with, in words that say what to do."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import httpx
import prefect
from prefect.settings import get_current_settings

FAULTS = (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError)
"""What Prefect's client raises: its URL is none, or the API does not answer, refuses, or makes no sense.

The last is a ValueError, or a TypeError where an answer was taken for a list.
"""

BROKEN = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)
"""What becomes of a connection whose server has ended, or was ended, meanwhile."""

EXAMPLE = "such as http://HOST:4200/api"

UNSET = (
    "PREFECT_API_URL is not set, and Prefect would start a server for each command alone; set it to the "
    f"API of the server that all nodes use, {EXAMPLE}"
)


def shown(url: str | None) -> str:
    """Return the URL of an API without the user and password that may be in it."""
    return re.sub(r"^(\w+://)?.*@", r"\1", url or "")


def without_users(text: str) -> str:
    """Return a text without the users and passwords that may be in URLs of it."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def named() -> str:
    """Return the API that the settings name, as a sentence about it begins."""
    url = shown(get_current_settings().api.url)
    return f"Prefect's API at {url}" if url else "Prefect's API"


def unreachable(fault: httpx.TransportError) -> str:
    """Say of an API that gave no answer what became of the question; many such faults have no words."""
    who, words = named(), str(fault).removesuffix(".")
    if isinstance(fault, httpx.TimeoutException):
        return f"{who} has not answered for {get_current_settings().api.request_timeout:g} s"
    if isinstance(fault, BROKEN):
        return f"{who} has broken the connection off ({words or type(fault).__name__})"
    return f"{who} does not answer: {words or type(fault).__name__}"


def explain(fault: Exception, *, is_prefect: bool) -> str:
    """Say why the API that the settings name could not be used, and what to do.

    Args:
        fault: one of `FAULTS`.
        is_prefect: whether it has already answered as Prefect's API does.
    """
    url = shown(get_current_settings().api.url)
    who = f"Prefect's API at {url}"
    if isinstance(fault, httpx.HTTPStatusError):
        return _refused(fault.response, who, url, is_prefect=is_prefect)
    if isinstance(fault, httpx.UnsupportedProtocol):
        rest = url.rpartition("://")[-1]
        return f"PREFECT_API_URL={url} does not begin with http:// or https://; write http://{rest}"
    if isinstance(fault, httpx.TimeoutException):
        return f"{unreachable(fault)}; see its process, its database and its load"
    if isinstance(fault, httpx.TransportError):
        return (
            f"{unreachable(fault)}; start it with `prefect server start`, or name another one in "
            "PREFECT_API_URL"
        )
    if isinstance(fault, httpx.InvalidURL):
        return f"PREFECT_API_URL={url} is no URL; set it to the API of the server, {EXAMPLE}"
    if is_prefect:
        return (
            f"{who} answers what Prefect {prefect.__version__} here does not understand; install the "
            "server's version, or see whether a proxy changes its answers"
        )
    return _not_prefect(url, "its answer makes no sense")


def _refused(response: httpx.Response, who: str, url: str, *, is_prefect: bool) -> str:
    said = f"{response.status_code} {httpx.codes.get_reason_phrase(response.status_code)}".strip()
    match response.status_code:
        case 401 | 403:
            return f"{who} refuses this machine ({said}); {_credentials()}"
        case 429:
            return f"{who} is asked too often ({said}); wait a minute, or run fewer agents of this account"
        case 502 | 503 | 504:
            return f"{who} is not ready ({said}); start the server, or see why the proxy before it has none"
        case code if code < httpx.codes.INTERNAL_SERVER_ERROR and not is_prefect:
            return _not_prefect(url, said)
        case _:
            asked = f"{response.request.method} {response.request.url.path}"
            return (
                f"{who} fails at {asked} ({said}); see the server's log, and whether its database answers"
            )


def _not_prefect(url: str, why: str) -> str:
    if "api" not in urlsplit(url).path.split("/"):
        right = f"{url.rstrip('/')}/api"
        return f"{url} is not Prefect's API ({why}), and lacks /api; set PREFECT_API_URL to {right}"
    return f"{url} is not Prefect's API ({why}); set PREFECT_API_URL to that of the server, {EXAMPLE}"


def _credentials() -> str:
    api = get_current_settings().api
    if api.auth_string is not None:
        return "make PREFECT_API_AUTH_STRING what PREFECT_SERVER_API_AUTH_STRING is on the server"
    if api.key is not None:
        return "set PREFECT_API_KEY to a key that is valid, and whose owner may use this workspace"
    return "set PREFECT_API_AUTH_STRING as on the server, or PREFECT_API_KEY for Prefect Cloud"
