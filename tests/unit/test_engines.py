"""How a database is named: what can be read in one way only, and never shown with a password."""

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from taskadapter.coordination.engines import url_of, would_make_file
from taskadapter.coordination.faults import is_of_session, translated, where
from taskadapter.errors import CoordinationError, DatabaseUnavailableError

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://root:p@hunter2@127.0.0.1:5432/tasks",
        "postgresql://root:p@hunter2/w#rd%1@127.0.0.1:5432/tasks",
        "postgresql://root:@hunter2@db/tasks",
        "postgresql://root:hunter2@@db/tasks",
        "postgresql://root:p@hunter2#word",
        "postgresql://root:p#@hunter2/@db/tasks",
        "postgresql://root:p/@hunter2@db/tasks",
        "postgresql://root:p@[hunter2@db/tasks",
        "postgresql://root:p?@hunter2@db/tasks",
        "postgresql://ro/ot:hunter2@db/tasks",
        "postgresql://db?password=x@hunter2",
        "postgresql://db:5432/tasks?password=x@hunter2",
        "mysql://root:p@hunter2@db/tasks",
        "mysql://root:p@ss:hunter2@db:3306/tasks",
        "mysql+pymysql://me@corp:hunter2@db/tasks",
        "mariadb://root:p@hunter2/@db/tasks?charset=utf8",
        "postgresql://root:p@ss@/tasks?host=/run/hunter2",
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(url):
    """With a sentence that says how to write it, and shows nothing of it."""
    with pytest.raises(CoordinationError) as caught:
        url_of(url)

    said = str(caught.value)
    assert "special characters in a" in said
    assert "as %XX" in said
    assert [part for part in ("root", SECRET, "127.0.0.1", "w#rd") if part in said] == []
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "password", "shown"),
    [
        (
            "postgresql://root:p%40ss%2Fw%23rd%251@127.0.0.1:5432/tasks",
            "p@ss/w#rd%1",
            "root@127.0.0.1:5432/tasks",
        ),
        ("postgresql://root:p/w#r?d%1:2@db/tasks", "p/w#r?d%1:2", "root@db/tasks"),
        ("mysql://me%40corp:hunter2@db/tasks", "hunter2", "me@corp@db/tasks"),
        ("postgresql://root@db/tasks", None, "root@db/tasks"),
        ("postgresql://root:hunter2@[::1]:5432/tasks", "hunter2", "root@::1:5432/tasks"),
        ("postgresql:///tasks?host=/run/pg@15", None, "/tasks"),
        ("postgresql://root:hunter2@db/tasks?options=a%40b", "hunter2", "root@db/tasks"),
        ("sqlite:////home/me@corp/a@b#1.db", None, "/home/me@corp/a@b#1.db"),
    ],
)
def test_what_can_be_read_in_one_way_is_taken(url, password, shown):
    """Escaped or not; no password is shown, and a URL that was rendered is read as the same one."""
    read = url_of(url)

    assert (read.password, where(read)) == (password, f"database {shown}")
    assert url_of(read.render_as_string(hide_password=False)) == read == url_of(make_url(url))


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("sqlite:///tasks.db", "tasks.db"),
        ("sqlite:///./data/tasks.db", "data/tasks.db"),
        ("sqlite+pysqlite:///file:tasks.db?uri=true", "tasks.db"),
        ("sqlite://", ":memory:"),
        ("sqlite:///:memory:", ":memory:"),
    ],
)
def test_a_file_that_is_another_one_in_each_folder_is_refused(url, named):
    """Two agents that are started in two folders would both be active."""
    with pytest.raises(CoordinationError, match=rf"names '{named}'.* as in sqlite:////home/me/tasks.db"):
        url_of(url)


def test_a_file_that_would_be_made_is_known_before(tmp_path):
    """Only a SQLite file that is not there, in a folder that is."""
    file = tmp_path / "tasks.db"
    urls = [url_of(f"sqlite:///{file}"), url_of(f"sqlite:///file:{file}?mode=ro&uri=true")]
    others = [url_of("postgresql://db/tasks"), url_of(f"sqlite:///{tmp_path}/nowhere/tasks.db")]

    assert [would_make_file(url) for url in [*urls, *others]] == [True, True, False, False]
    file.touch()
    assert [would_make_file(url) for url in urls] == [False, False]


def fault(code, words):
    """Return an error of MySQL's driver."""
    return DBAPIError("SELECT", None, Exception(code, words))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1290, "The MariaDB server is running with the --read-only option so it cannot execute this"),
        (1792, "Cannot execute statement in a READ ONLY transaction"),
        (1836, "Running in read-only mode"),
    ],
)
def test_mysql_that_is_read_only_is_asked_again_in_a_new_session(code, words):
    """It may be a replica by now, or have been one when the session was opened."""
    url, error = make_url("mysql://db/tasks"), fault(code, words)

    with pytest.raises(DatabaseUnavailableError, match="name the primary"), translated(url):
        raise error
    assert is_of_session(error, url)


@pytest.mark.parametrize("code", [1205, 1213, 1146])
def test_a_new_session_is_no_help_where_the_session_is_not_at_fault(code):
    """A lock, a deadlock, a table that is missing."""
    assert not is_of_session(fault(code, ""), make_url("mysql://db/tasks"))


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("postgresql://db/tasks", None, "FATAL:  sorry, too many clients already"),
        ("postgresql://db/tasks", None, 'FATAL:  too many connections for role "me"'),
        (
            "postgresql://db/tasks",
            None,
            "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
        ),
        ("mysql://db/tasks", 1040, "Too many connections"),
        (
            "mysql://db/tasks",
            1203,
            "User me already has more than 'max_user_connections' active connections",
        ),
        ("mysql://db/tasks", 1226, "User 'me' has exceeded the 'max_user_connections' resource"),
    ],
)
def test_too_many_connections_have_a_remedy_of_their_own(url, code, words):
    """The server runs, and can be reached."""
    with pytest.raises(DatabaseUnavailableError, match="; raise that limit, or"), translated(make_url(url)):
        raise fault(code, words)
