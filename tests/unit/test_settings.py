"""Settings: their names in the environment, their defaults, and a secret that stays one."""

from pathlib import Path

import pytest
from prefect.settings import get_current_settings
from prefect.types.names import BANNED_CHARACTERS

from taskadapter import Listener, TriggerConfiguration
from taskadapter.coordination.engines import url_of
from taskadapter.declare.names import BANNED
from taskadapter.doctor.findings import warning
from taskadapter.doctor.project import read_settings
from taskadapter.errors import DeclarationError
from taskadapter.settings import PREFIX, TaskadapterSettings, misspelt

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
    with pytest.raises(DeclarationError, match=PREFIX + name.upper() + "=" + below):
        TaskadapterSettings()


def test_the_database_of_one_machine():
    """Where nothing is named the database is a SQLite file in Prefect's home, by its absolute path."""
    url = url_of(TaskadapterSettings().default_database_url())

    assert url.get_backend_name() == "sqlite"
    assert Path(str(url.database)) == get_current_settings().home / "taskadapter.db"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/b", "=a/b is refused: it must have 1 to 255 printable characters"),
        ("100%", "=100% is refused: it must have 1 to 255 printable characters"),
        ("..", "=.. is refused: it must have"),
        ("  ", "='  ' is refused: it must have"),
        ("two\nlines", r"='two\nlines' is refused: it must have"),
        ("x" * 256, "xxxx' is refused: it must have"),
        ("Prefect-pool", "=Prefect-pool is refused: it must not begin with 'prefect', as"),
    ],
)
def test_a_pool_is_refused_as_a_listener_refuses_it(monkeypatch, name, said):
    """By the same rule, and by the name of the setting; Prefect answered 404, or 422, at its first use."""
    with pytest.raises(DeclarationError) as of_listener:
        Listener(trigger=TriggerConfiguration(interval=5), work_pool=name)
    monkeypatch.setenv(PREFIX + "WORK_POOL", name)
    with pytest.raises(DeclarationError) as caught:
        _ = Listener(trigger=TriggerConfiguration(interval=5)).work_pool

    text = str(caught.value)
    assert text.startswith(f"setting {PREFIX}WORK_POOL=")
    assert said in text
    assert text.endswith("; correct it, or unset it")
    assert "\n" not in text
    rule = text.partition(" is refused: ")[2].removesuffix("; correct it, or unset it")
    assert rule in str(of_listener.value)


@pytest.mark.parametrize("name", ["a", "x" * 255, "ETL 2", "my-prefect"])
def test_a_pool_that_a_listener_accepts(monkeypatch, name):
    """What is none of the two is accepted by both."""
    monkeypatch.setenv(PREFIX + "WORK_POOL", name)

    assert Listener(trigger=TriggerConfiguration(interval=5)).work_pool == name
    assert Listener(trigger=TriggerConfiguration(interval=5), work_pool=name).work_pool == name


def test_what_prefect_bans_is_banned():
    """The rule is written out, because declarations know nothing of Prefect."""
    assert set(BANNED_CHARACTERS) <= set(BANNED)


def test_the_databases_url_is_never_shown(monkeypatch):
    """Neither repr, str nor a dump of the settings shows the URL, which holds a password."""
    monkeypatch.setenv(PREFIX + "DATABASE_URL", URL)
    settings = TaskadapterSettings()

    shown = (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json())
    assert [text for text in shown if "hunter2" in text] == []


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("WORKER_COUNT", "abc", "must be a valid integer"),
        ("WORKER_COUNT", "0", "must be greater than or equal to 1"),
        ("POLL_SECONDS", "-1", "must be greater than 0"),
        ("LEDGER_DAYS", "x", "must be a valid number"),
        ("DRAIN_SECONDS", "-3", "must be greater than or equal to 0"),
    ],
)
def test_what_is_refused_is_named_as_it_is_set(monkeypatch, name, value, rule):
    """One sentence with the variable's whole name, its value, the rule and the remedy."""
    monkeypatch.setenv(PREFIX + name, value)

    with pytest.raises(DeclarationError) as caught:
        TaskadapterSettings()

    assert str(caught.value) == (
        f"setting {PREFIX}{name}={value} is refused: it {rule}; correct it, or unset it"
    )
    assert [finding.text.removesuffix(".") for finding in read_settings()[1]] == [str(caught.value)]


def test_each_value_that_is_refused_has_a_line(monkeypatch):
    """Whoever corrects one need not start again to hear of the next."""
    monkeypatch.setenv(PREFIX + "WORKER_COUNT", "0")
    monkeypatch.setenv(PREFIX + "LEDGER_DAYS", "0")

    with pytest.raises(DeclarationError, match=r"WORKER_COUNT=0.*\n.*LEDGER_DAYS=0"):
        TaskadapterSettings()
    assert len(read_settings()[1]) == 2


@pytest.mark.parametrize("name", [name.upper() for name in TaskadapterSettings.model_fields])
def test_an_empty_variable_is_an_unset_one(monkeypatch, name):
    """Compose sets one so for ${NAME:-}."""
    monkeypatch.setenv(PREFIX + name, "")

    assert TaskadapterSettings() == TaskadapterSettings.model_construct()


def test_a_variable_that_is_no_setting_is_named(monkeypatch):
    """With the one that it is close to; otherwise with all of them."""
    monkeypatch.setenv(PREFIX + "DATABSE_URL", "postgresql://node:hunter2@db/tasks")
    monkeypatch.setenv(PREFIX + "XYZZY", "1")
    monkeypatch.setenv(PREFIX + "WORKER_COUNT", "3")
    monkeypatch.setenv((PREFIX + "work_pool").lower(), "nightly")

    first, second = misspelt()

    assert first == (
        f"{PREFIX}DATABSE_URL is no setting and has no effect; did you mean {PREFIX}DATABASE_URL?"
    )
    assert second.startswith(f"{PREFIX}XYZZY is no setting and has no effect; settings are WORK_POOL, ")
    assert [finding.text.removesuffix(".") for finding in read_settings()[1]] == [first, second]


@pytest.mark.parametrize(
    ("file", "table"),
    [
        ("prefect.toml", "integrations.taskadapter"),
        ("pyproject.toml", "tool.prefect.integrations.taskadapter"),
    ],
)
def test_a_key_of_a_file_that_is_no_setting_is_named(monkeypatch, tmp_path, file, table):
    """As a variable is; its value, which may hold a password, is not told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(
        f"[{table}]\ndatabaseurl = 'postgresql://node:hunter2@db/tasks'\nworker_count = 3\nxyzzy = 1\n"
    )

    first, second = misspelt()

    told = f"in [{table}] of {file} is no setting and has no effect"
    assert first == f"databaseurl {told}; did you mean database_url?"
    assert second.startswith(f"xyzzy {told}; settings are work_pool, ")
    assert [finding.text.removesuffix(".") for finding in read_settings()[1]] == [first, second]


def test_a_name_in_a_profile_that_is_no_setting_is_named(monkeypatch, tmp_path):
    """Prefect takes any name there, and ignores it."""
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(
        f"active = 'mine'\n[profiles.mine]\n{PREFIX}WORKPOOL = 'nightly'\n{PREFIX}WORKER_COUNT = '3'\n"
    )
    for name in ("TEST", "UNIT_TEST", "TESTING_TEST", "TESTING_UNIT_TEST"):
        monkeypatch.delenv(f"PREFECT_{name}_MODE", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(profiles))

    assert misspelt() == [
        f"{PREFIX}WORKPOOL in Prefect's profile is no setting and has no effect; "
        f"did you mean {PREFIX}WORK_POOL?"
    ]


def test_a_sentence_of_doctors_ends_once():
    """A question has its mark already."""
    assert warning("did you mean this?").text == "did you mean this?"
    assert warning("write this").text == "write this."


def test_doctor_looks_for_what_is_to_be_preloaded(monkeypatch):
    """A module, or the package that it is in, may be missing; nothing is imported for that but packages."""
    monkeypatch.setenv(PREFIX + "PRELOAD", "json, nosuchmod, nosuch.mod, xml.dom")

    said = [finding.text.removesuffix(".") for finding in read_settings()[1]]

    assert said == [
        f"setting {PREFIX}PRELOAD names {name!r}, which cannot be found; install it, or take it out"
        for name in ("nosuchmod", "nosuch.mod")
    ]
