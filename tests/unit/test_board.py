"""What an agent shows its hosts."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from taskadapter.coordination.board import NEVER, DeadlineBoard, clock
from taskadapter.coordination.messages import Token

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = Token("group", "node-1", 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "board"


def test_shows_deadlines(path: Path) -> None:
    """A reader sees what the writer wrote last, for each group, before or since it opened."""
    with DeadlineBoard.create(path) as board:
        board.write(TOKEN, 1.5)
        with DeadlineBoard.open(path) as reader:
            assert reader.read(TOKEN) == 1.5
            assert reader.read(Token("other", "node-1", 7)) == NEVER
            board.write(TOKEN, 2.5)
            board.write(Token("other", "node-1", 7), 9.5)
            assert reader.read(TOKEN) == 2.5
            assert reader.read(Token("other", "node-1", 7)) == 9.5
            board.write(TOKEN, NEVER)
            assert reader.read(TOKEN) == NEVER


def test_another_term_is_not_trusted(path: Path) -> None:
    """A run of an earlier term is not kept alive by the deadline of a later one."""
    with DeadlineBoard.create(path) as board:
        board.write(TOKEN, 1.5)
        board.write(Token("group", "node-1", 8), 2.5)
        assert board.read(TOKEN) == NEVER
        assert board.read(Token("group", "node-1", 8)) == 2.5


def test_is_read_by_another_process(path: Path) -> None:
    """A host, which shares nothing but the file, reads the deadline and the same clock."""
    program = (
        "import sys; from taskadapter.coordination.board import DeadlineBoard, clock\n"
        "from taskadapter.coordination.messages import Token\n"
        "with DeadlineBoard.open(sys.argv[1]) as board:\n"
        "    print(board.read(Token('group', 'node-1', 7)) - clock())\n"
    )
    with DeadlineBoard.create(path) as board:
        board.write(TOKEN, clock() + 100)
        command = [sys.executable, "-c", program, str(path)]
        left = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert 50 < left < 100


def test_reading_costs_little() -> None:
    """A host that only reads imports neither SQLAlchemy nor the heartbeat."""
    program = (
        "import sys, taskadapter.coordination.board, taskadapter.coordination.messages\n"
        "print({'sqlalchemy', 'taskadapter.coordination.heartbeat'} & sys.modules.keys())\n"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"set()\n"


def test_is_removed_by_its_creator(path: Path) -> None:
    """A reader leaves the file, its creator removes it; then there is nothing to open."""
    board = DeadlineBoard.create(path)
    with pytest.raises(FileExistsError):
        DeadlineBoard.create(path)
    DeadlineBoard.open(path).close()
    board.close()
    with pytest.raises(FileNotFoundError):
        DeadlineBoard.open(path)


def test_has_room_for_its_capacity(path: Path) -> None:
    """A full board says so, and keeps what it has."""
    with DeadlineBoard.create(path, capacity=2) as board:
        for number in range(2):
            board.write(Token(f"group-{number}", "node-1", 1), 5.0)
        with pytest.raises(ValueError, match="2 groups"):
            board.write(TOKEN, 5.0)
        assert board.read(Token("group-1", "node-1", 1)) == 5.0


def test_a_place_that_is_not_needed_any_more_is_anothers(path: Path) -> None:
    """In a long life there are more groups than at one time; a reader does not take one for another."""
    first, second, third = (Token(f"group-{number}", "node-1", 1) for number in range(3))
    with DeadlineBoard.create(path, capacity=2) as board, DeadlineBoard.open(path) as reader:
        for token in (first, second):
            board.write(token, 5.0)
        assert reader.read(first) == 5.0
        board.write(first, NEVER)
        board.write(third, 7.0)
        assert [reader.read(token) for token in (first, second, third)] == [NEVER, 5.0, 7.0]
        board.write(second, NEVER)
        board.write(first, 9.0)
        assert [board.read(token) for token in (first, second, third)] == [9.0, NEVER, 7.0]
