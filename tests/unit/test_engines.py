"""How a database is named: what can be read in one way only, and never shown with a password."""

import pytest
from sqlalchemy import make_url

from taskadapter.coordination.engines import url_of, would_make_file
from taskadapter.coordination.faults import where
from taskadapter.errors import CoordinationError

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
