"""Settings: their names in the environment, their defaults, and a secret that stays one."""

from pathlib import Path

import pytest
from prefect.settings import get_current_settings
from pydantic import ValidationError

from taskadapter.coordination.engines import url_of
from taskadapter.settings import TaskadapterSettings

PREFIX = "PREFECT_INTEGRATIONS_TASKADAPTER_"
URL = "postgresql://node:hunter2@db/tasks"


def test_defaults():
    """A node that sets nothing works, with five runs at once and a look every second."""
    settings = TaskadapterSettings()

    assert settings.work_pool == "taskadapter"
    assert settings.database_url is None
    assert settings.worker_count == 5
    assert settings.poll_seconds == 0.6
    assert settings.preload == ()
    assert settings.drain_seconds == 30


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("work_pool", "nightly", "nightly"),
        ("worker_count", "12", 12),
        ("poll_seconds", "0.25", 0.25),
        ("preload", "pandas, numpy.linalg", ("pandas", "numpy.linalg")),
        ("drain_seconds", "0", 0),
    ],
)
def test_names_in_the_environment(monkeypatch, name, text, value):
    """Each setting is read from the environment under Prefect's prefix for integrations."""
    monkeypatch.setenv(PREFIX + name.upper(), text)

    assert getattr(TaskadapterSettings(), name) == value


def test_every_setting_is_described():
    """Each setting says what it is for."""
    fields = TaskadapterSettings.model_fields.items()

    assert [name for name, field in fields if not field.description] == []


def test_prefect_toml(monkeypatch, tmp_path):
    """Settings may stand in the project's prefect.toml; the environment wins over it."""
    text = "[integrations.taskadapter]\nwork_pool = 'nightly'\nworker_count = 3\n"
    (tmp_path / "prefect.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PREFIX + "WORKER_COUNT", "4")

    settings = TaskadapterSettings()

    assert (settings.work_pool, settings.worker_count) == ("nightly", 4)


@pytest.mark.parametrize(
    ("name", "least", "below"),
    [
        ("worker_count", "1", "0"),
        ("poll_seconds", "0.001", "0"),
        ("drain_seconds", "0", "-0.001"),
    ],
)
def test_both_sides_of_each_limit(monkeypatch, name, least, below):
    """The least value is accepted, the one below it refused by name."""
    monkeypatch.setenv(PREFIX + name.upper(), least)
    assert getattr(TaskadapterSettings(), name) == float(least)

    monkeypatch.setenv(PREFIX + name.upper(), below)
    with pytest.raises(ValidationError, match=name):
        TaskadapterSettings()


def test_the_database_of_one_machine():
    """Where nothing is named the database is a SQLite file in Prefect's home, by its absolute path."""
    url = url_of(TaskadapterSettings().default_database_url())

    assert url.get_backend_name() == "sqlite"
    assert Path(str(url.database)) == get_current_settings().home / "taskadapter.db"


def test_the_databases_url_is_never_shown(monkeypatch):
    """Neither repr, str nor a dump of the settings shows the URL, which holds a password."""
    monkeypatch.setenv(PREFIX + "DATABASE_URL", URL)
    settings = TaskadapterSettings()

    shown = (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json())
    assert [text for text in shown if "hunter2" in text] == []
