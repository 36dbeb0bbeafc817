"""Every run has a process of its own: nothing of it reaches the next, and nothing outlives it."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.states import Cancelling, Scheduled

from deployments.local import wait_until
from taskadapter.pools import ensure_work_pool
from tests.acceptance.project import PATIENCE, Prefect, Project, is_alive, state_of
from tests.processes import nurseries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Program

PROBE = """
    import contextvars, decimal, json, logging, os, resource, signal, socket, sys, threading
    from ledger import note
    from prefect import flow

    CUSTOMER = contextvars.ContextVar("customer", default="nobody")
    SEEN = []

    @flow
    def probe() -> None:
        note(
            "probe",
            "ran",
            environment=os.environ.get("SECRET_OF_ONE_RUN"),
            context=CUSTOMER.get(),
            precision=decimal.getcontext().prec,
            timeout=socket.getdefaulttimeout(),
            handlers=len(logging.getLogger("app").handlers),
            seen=len(SEEN),
            path="/nowhere" in sys.path,
            argv=sys.argv[1:],
            umask=oct(os.umask(0o022)),
            threads=sum(thread.name == "left" for thread in threading.enumerate()),
            alarm=signal.getitimer(signal.ITIMER_REAL)[0] > 0,
            limit=resource.getrlimit(resource.RLIMIT_CORE)[0],
            cwd=os.getcwd(),
            files=len(os.listdir("/proc/self/fd")),
        )
        os.environ["SECRET_OF_ONE_RUN"] = "s3cret"
        CUSTOMER.set("somebody")
        decimal.getcontext().prec = 3
        socket.setdefaulttimeout(0.5)
        logging.getLogger("app").addHandler(logging.NullHandler())
        SEEN.append(1)
        sys.path.insert(0, "/nowhere")
        sys.argv[1:] = ["left"]
        os.umask(0o077)
        threading.Thread(target=threading.Event().wait, name="left").start()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 600.0)  # this run must not be ended by it
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        os.chdir("/")
        open("/dev/null")
"""

CODE = {
    "prices.py": """
        from ledger import note
        from prefect import flow

        @flow
        def price() -> None:
            from tariff import RATE  # imported where it is used
            note("price", "ran", rate=RATE)
    """,
    "tariff.py": "RATE = 1\n",
    "a/work.py": """
        from helper import WHO
        from ledger import note
        from prefect import flow

        @flow
        def who_a() -> None:
            note("who", "ran", who=WHO)
    """,
    "b/work.py": """
        from helper import WHO
        from ledger import note
        from prefect import flow

        @flow
        def who_b() -> None:
            note("who", "ran", who=WHO)
    """,
    "a/helper.py": 'WHO = "a"\n',
    "b/helper.py": 'WHO = "b"\n',
    "probe.py": PROBE,
    "beats.py": """
        import os, threading, time
        from ledger import note
        from prefect import flow

        def work() -> None:
            while True:
                note("beats", "beat")
                time.sleep(0.1)

        @flow
        def beats() -> None:
            threading.Thread(target=work).start()
            time.sleep(1)
    """,
    "surroundings.py": """
        import logging, os, sys, time
        from ledger import note
        from prefect import flow, get_run_logger

        @flow
        def surroundings() -> None:
            get_run_logger().debug("a line for those who look closely")
            logging.getLogger("mylib").warning("a line of a library")
            try:
                import only_on_pythonpath
                found = only_on_pythonpath.__name__
            except ImportError as error:
                found = repr(error)
            note("surroundings", "ran", zone=time.strftime("%Z"), found=found,
                 optimize=sys.flags.optimize, cwd=os.getcwd(), level=os.environ.get("LEVEL"))
    """,
    "aside/only_on_pythonpath.py": "",
    "sub/placed.py": """
        import os
        from pathlib import Path
        from prefect import flow

        @flow
        def placed() -> None:
            with (Path(__file__).parents[1] / "places").open("a") as file:
                file.write(os.getcwd() + "\\n")
    """,
    "children.py": """
        import os, subprocess, sys, time
        from ledger import note
        from prefect import flow

        def noted(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
            note("children", "started", child=process.pid)
            return process

        @flow
        def waits() -> None:
            noted(subprocess.Popen(["sleep", "7771"])).wait()

        @flow
        def leaves() -> None:
            noted(subprocess.Popen(["sleep", "7772"]))
            noted(subprocess.Popen(["sleep", "7773"], start_new_session=True))

        @flow
        def forks() -> None:
            if os.fork() == 0:
                os.setsid()
                note("children", "started", child=os.getpid())
                time.sleep(7774)
    """,
    "closes.py": """
        import os
        from ledger import note
        from prefect import flow

        @flow
        def closes() -> None:
            note("closes", "ran")
            os.closerange(3, 1024)
            os._exit(7)
    """,
    "bad_byte.py": 'raise RuntimeError("unexpected byte \\x00 in the header")\n',
    "generators.py": """
        from prefect import flow

        @flow
        def numbers():
            yield from range(3)

        @flow
        async def numbers_async():
            yield 1

        @flow
        def broken_numbers():
            yield 1
            raise ConnectionError("no answer")
    """,
    "pools.py": """
        import concurrent.futures, multiprocessing, pickle
        from ledger import note
        from prefect import flow

        class Order:
            number = 7

        def square(order: Order) -> int:
            return order.number ** 2

        @flow
        def processes() -> None:
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                result = pool.submit(square, pickle.loads(pickle.dumps(Order()))).result(300)
            note("processes", "ran", result=result)
    """,
    "last_words.py": """
        import atexit
        from ledger import note
        from prefect import flow, get_run_logger

        @flow
        def last_words() -> None:
            atexit.register(note, "last_words", "exited")
            get_run_logger().info("the last line")
    """,
    "hooked.py": """
        import time
        from ledger import note
        from prefect import flow

        def tell(flow, run, state) -> None:
            note("hooks", state.name, message=state.message)

        @flow(on_crashed=[tell], on_failure=[tell], on_completion=[tell], on_cancellation=[tell])
        def hooked(seconds: int = 0) -> None:
            note("hooked", "began")
            time.sleep(seconds)
    """,
    "exits.py": """
        import sys
        from ledger import note
        from prefect import flow

        def leave(flow, run, state) -> None:
            note("exits", "left")
            sys.exit(4)

        @flow(on_running=[leave])
        def exits() -> None:
            note("exits", "began")
    """,
    "opens.py": """
        import resource
        from prefect import flow

        kept = []

        @flow
        def opens() -> None:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
            try:
                while True:
                    kept.append(open("/dev/null"))
            except OSError:
                pass
    """,
    "preloaded.py": """
        import sys
        from ledger import note
        from prefect import flow

        @flow
        def preloaded() -> None:
            note("preloaded", "ran", setting="wave" in sys.modules, pool="chunk_of_mine" in sys.modules)
    """,
    "chunk_of_mine.py": "",
    "busy.py": """
        import threading

        threading.Thread(target=threading.Event().wait, name="busy-one", daemon=True).start()
    """,
}

PLACES = {
    "price": "prices.py:price",
    "who_a": "a/work.py:who_a",
    "who_b": "b/work.py:who_b",
    "probe": "probe.py:probe",
    "beats": "beats.py:beats",
    "surroundings": "surroundings.py:surroundings",
    "placed": "placed.py:placed",
    "waits": "children.py:waits",
    "leaves": "children.py:leaves",
    "forks": "children.py:forks",
    "closes": "closes.py:closes",
    "bad_byte": "bad_byte.py:job",
    "numbers": "generators.py:numbers",
    "numbers_async": "generators.py:numbers_async",
    "broken_numbers": "generators.py:broken_numbers",
    "processes": "pools.py:processes",
    "last_words": "last_words.py:last_words",
    "hooked": "hooked.py:hooked",
    "exits": "exits.py:exits",
    "opens": "opens.py:opens",
    "preloaded": "preloaded.py:preloaded",
}


def deploy(
    project: Project, prefect: Prefect, flow: str, name: str, pool: str | None = None, **variables: Any
) -> None:
    """Deploy one of the flows by a name, to the module's pool or another."""
    prefect.client.create_deployment(
        prefect.client.create_flow_from_name(flow),
        name,
        entrypoint=PLACES[flow],
        work_pool_name=pool or project.pool,
        job_variables=variables,
        enforce_parameter_schema=False,
    )


@pytest.fixture(scope="module", autouse=True)
def agent(project: Project, prefect: Prefect) -> Iterator[Program]:
    """An agent that has one run at a time, for the flows of a folder."""
    for path, source in CODE.items():
        project.write(path, source)
    ensure_work_pool(project.pool)
    for flow in PLACES:
        variables = {"working_dir": "sub"} if flow == "placed" else {}
        deploy(project, prefect, flow, flow, **variables)
    with project.agent("alone", "--limit", "1") as node:
        yield node


def run(prefect: Prefect, name: str) -> FlowRun:
    """Run a flow, and return the run once it has ended."""
    return prefect.wait_for_end(prefect.start(name))


def assert_completed(runs: list[FlowRun]) -> None:
    """All of them did what they were to do."""
    assert [state_of(each).name for each in runs] == ["Completed"] * len(runs)


# --- nothing reaches the next run -----------------------------------------------------------------


def test_what_is_imported_late_is_fresh(project: Project, prefect: Prefect) -> None:
    """A module that a flow imports where it is used is the one that lies there at that moment."""
    first = run(prefect, "price")
    project.write("tariff.py", "RATE = 1000\n")
    assert_completed([first, run(prefect, "price"), run(prefect, "price")])
    assert [entry["rate"] for entry in project.entries("price")] == [1, 1000, 1000]


def test_two_modules_of_one_name(project: Project, prefect: Prefect) -> None:
    """Each deployment has the helper that lies beside its flow."""
    assert_completed([run(prefect, "who_a"), run(prefect, "who_b")])
    assert [entry["who"] for entry in project.entries("who")] == ["a", "b"]


def test_a_run_sees_nothing_of_the_one_before(project: Project, prefect: Prefect) -> None:
    """Environment, globals, libraries, signals, threads and files are those of a new process."""
    deploy(project, prefect, "probe", "again")
    assert_completed([run(prefect, "probe"), run(prefect, "probe"), run(prefect, "probe/again")])
    first, *others = [entry.details for entry in project.entries("probe")]
    assert others == [first, first]
    assert first["environment"] is None
    assert first["threads"] == 0


def test_a_deployments_environment_is_its_own(project: Project, prefect: Prefect) -> None:
    """What Python, Prefect and the C library read of the environment takes effect, for this one alone."""
    env = {
        "PYTHONPATH": str(project.folder / "aside"),
        "TZ": "Asia/Tokyo",
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "mylib",
        "LEVEL": "set",
    }
    deploy(project, prefect, "surroundings", "set", env=env)
    given, other = run(prefect, "surroundings/set"), run(prefect, "surroundings")
    assert_completed([given, other])
    first, second = project.entries("surroundings")
    assert (first["zone"], first["found"], first["level"]) == ("JST", "only_on_pythonpath", "set")
    assert second["zone"] != "JST"
    assert "ModuleNotFoundError" in second["found"]
    assert second["level"] is None
    prefect.wait_for_logs(given, "a line for those who look closely")
    prefect.wait_for_logs(given, "a line of a library")
    prefect.wait_for_logs(other, "Finished in state")
    assert not any(line.startswith("a line") for line in prefect.logs(other))


@pytest.mark.slow
def test_what_an_interpreter_reads_when_it_starts(project: Project, prefect: Prefect) -> None:
    """A deployment that sets such a variable gets a fresh interpreter, and its log says so."""
    deploy(project, prefect, "surroundings", "optimized", env={"PYTHONOPTIMIZE": "1", "LEVEL": "fresh"})
    given = run(prefect, "surroundings/optimized")
    assert_completed([given])
    entry = project.entries("surroundings")[-1]
    assert (entry["optimize"], entry["level"]) == (1, "fresh")
    prefect.wait_for_logs(given, "gets its own interpreter")


def test_a_relative_working_directory(project: Project, prefect: Prefect) -> None:
    """It is relative to where the agent was started, for each run."""
    assert_completed([run(prefect, "placed") for _ in range(3)])
    assert (project.folder / "places").read_text().split() == [str(project.folder / "sub")] * 3


# --- nothing outlives a run -----------------------------------------------------------------------


def test_a_thread_ends_with_its_run(project: Project, prefect: Prefect) -> None:
    """A thread that never ends, and is no daemon, neither holds the run nor goes on after it."""
    ended = run(prefect, "beats")
    assert_completed([ended])
    (pid,) = {entry.pid for entry in project.entries("beats")}
    wait_until(lambda: not is_alive(pid), PATIENCE, "the process to end")


def is_gone(pid: int) -> bool:
    """Return whether a process has ended."""
    return not is_alive(pid)


def children(project: Project, count: int) -> list[int]:
    """Return the last processes that runs have started, once they are noted."""
    before = len(CHILDREN)
    entries = project.wait_for("children", "started", before + count)
    CHILDREN.extend(entries[before:])
    return [int(entry["child"]) for entry in entries[before:]]


CHILDREN: list[Any] = []


def test_a_cancelled_run_takes_its_children_along(project: Project, prefect: Prefect) -> None:
    """A cancelled run shows as Cancelled, and what it had started is gone."""
    going_on = prefect.start("waits")
    (child,) = children(project, 1)
    prefect.client.set_flow_run_state(going_on.id, Cancelling())
    assert state_of(prefect.wait_for_end(going_on)).name == "Cancelled"
    wait_until(lambda: not is_alive(child), PATIENCE, "the child to end")


@pytest.mark.parametrize(
    ("flow", "commands"), [("leaves", ["sleep 7772", "sleep 7773"]), ("forks", ["nursery"])]
)
def test_what_a_run_leaves_is_ended(
    project: Project, prefect: Prefect, flow: str, commands: list[str]
) -> None:
    """A run that ended well, and left processes in its group or out of it, is told so in its log."""
    ended = run(prefect, flow)
    assert_completed([ended])
    for child in children(project, len(commands)):
        wait_until(partial(is_gone, child), PATIENCE, "a child to end")
    log = prefect.wait_for_logs(ended, "left these processes behind")
    (line,) = [message for message in log if "left these processes behind" in message]
    assert all(command in line for command in commands)


def test_a_job_that_closes_every_file(project: Project, prefect: Prefect) -> None:
    """The end of a process is seen when it ends; its socket was closed long before."""
    assert state_of(run(prefect, "closes")).name == "Crashed"
    assert_completed([run(prefect, "price")])


def test_a_job_that_leaves_as_many_files_open_as_it_may(prefect: Prefect) -> None:
    """Its body has come to its end: that is entered and told, and the next run has its place."""
    assert_completed([run(prefect, "opens"), run(prefect, "price")])


def test_a_processs_last_words(project: Project, prefect: Prefect) -> None:
    """What a run logs last arrives, and its `atexit` functions are called."""
    ended = run(prefect, "last_words")
    project.wait_for("last_words", "exited")
    prefect.wait_for_logs(ended, "the last line")


# --- states ---------------------------------------------------------------------------------------


def test_a_message_that_no_database_keeps(project: Project, prefect: Prefect) -> None:
    """A NUL in an error's message does not keep its run from ending, nor the next from beginning.

    Once the code is mended, somebody who retries the run gets it.
    """
    crashed = run(prefect, "bad_byte")
    assert state_of(crashed).name == "Crashed"
    assert "unexpected byte" in (state_of(crashed).message or "")
    assert_completed([run(prefect, "price")])

    project.write("bad_byte.py", "from prefect import flow\n\n@flow\ndef job() -> None: ...\n")
    prefect.client.set_flow_run_state(crashed.id, Scheduled())
    assert_completed([prefect.wait_for_end(crashed)])


def test_a_hook_for_the_beginning_that_exits_ends_its_run(project: Project, prefect: Prefect) -> None:
    """Nothing of its body has begun: it would begin again and again."""
    crashed = run(prefect, "exits")

    def is_settled() -> bool:
        return "SystemExit: 4" in (state_of(prefect.client.read_flow_run(crashed.id)).message or "")

    wait_until(is_settled, PATIENCE, "the agent to say what has ended the run")
    assert_completed([run(prefect, "price")])
    assert [entry.what for entry in project.entries("exits")] == ["left"]


@pytest.mark.parametrize(
    ("flow", "state"),
    [("numbers", "Completed"), ("numbers_async", "Completed"), ("broken_numbers", "Failed")],
)
def test_generators_run(prefect: Prefect, flow: str, state: str) -> None:
    """A flow that yields runs to its end."""
    assert state_of(run(prefect, flow)).name == state


@pytest.mark.slow
def test_other_processes_find_the_flows_module(project: Project, prefect: Prefect) -> None:
    """What is defined in a flow's file can be pickled, and called in a process that the flow starts."""
    assert_completed([run(prefect, "processes")])
    assert [entry["result"] for entry in project.entries("processes")] == [49]


# --- the nursery ----------------------------------------------------------------------------------


def nursery_of(agent: Program) -> psutil.Process:
    """Return the one process that forks others, once it is there."""
    (found,) = wait_until(lambda: nurseries(agent.pid), PATIENCE, "a nursery")
    return found


def test_the_nursery_has_nothing_to_share(agent: Program, prefect: Prefect) -> None:
    """It has no thread and no connection that processes would inherit."""
    assert_completed([run(prefect, "price")])
    nursery = nursery_of(agent)
    assert nursery.num_threads() == 1
    assert nursery.net_connections() == []


def test_a_nursery_that_is_killed_is_replaced(agent: Program, project: Project, prefect: Prefect) -> None:
    """Its runs end with it, and their children; the next ones run, also if it had stood still."""
    going_on = prefect.start("waits")
    (child,) = children(project, 1)
    nursery = nursery_of(agent)
    nursery.send_signal(signal.SIGSTOP)
    nursery.kill()
    assert state_of(prefect.wait_for_end(going_on)).name == "Crashed"
    wait_until(lambda: not is_alive(child), PATIENCE, "the child to end")
    assert_completed([run(prefect, "price")])
    assert nursery_of(agent).pid != nursery.pid


@pytest.mark.slow
def test_a_nursery_that_stands_still_is_replaced(
    agent: Program, project: Project, prefect: Prefect
) -> None:
    """Nobody waits for ever for a process that is not forked, nor for the end of one that is not told.

    The place of a run that has ended so is free again, also if it is the only one. Two agents, since it
    takes two minutes.
    """
    pool = f"{project.pool}-still"
    ensure_work_pool(pool)
    deploy(project, prefect, "price", "still", pool)
    with project.agent("still", pool=pool) as other:
        assert_completed([run(prefect, "price"), run(prefect, "price/still")])
        still = {node: nursery_of(node) for node in (agent, other)}
        going_on = prefect.start("beats")
        project.wait_for("beats", "beat", len(project.entries("beats")) + 1)
        for nursery in still.values():
            nursery.send_signal(signal.SIGSTOP)
        unforked = prefect.start("price/still")
        assert_completed([prefect.wait_for_end(one) for one in (going_on, unforked)])
        assert_completed([run(prefect, "price"), run(prefect, "price/still")])
        assert [node for node, nursery in still.items() if nursery_of(node).pid == nursery.pid] == []


# --- in time --------------------------------------------------------------------------------------

LOADS_LONG = """
    import time
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, current_run

    time.sleep(5)  # as a heavy import does
    listener = Listener(trigger=TriggerConfiguration(interval=10, max_count=20))

    @listener.service("loads-long")
    def loads_long() -> None:
        note("loads-long", "began", due=current_run().scheduled_time.timestamp())
"""


@pytest.mark.slow
def test_a_job_that_takes_long_to_load_is_in_time(agent: Program, project: Project) -> None:
    """Its process is made as long before the moment as its code took to load the last time.

    One that is made a second before, as others are, is four seconds late at least.
    """
    project.write("flows/loads_long.py", LOADS_LONG)
    project.deploy()

    def in_time() -> bool:
        late = [entry.at - entry["due"] for entry in project.entries("loads-long")]
        return any(seconds < 3.0 for seconds in late[1:])

    wait_until(in_time, PATIENCE, "a run in time")
    assert all(entry.at >= entry["due"] for entry in project.entries("loads-long"))


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hooks_are_called_once(project: Project, prefect: Prefect) -> None:
    """A run that its stopping agent ends is Crashed, and its hook is called once, for that state."""
    pool = f"{project.pool}-hooks"
    ensure_work_pool(pool)
    deploy(project, prefect, "hooked", "stopped", pool)
    short = {"PREFECT_INTEGRATIONS_TASKADAPTER_DRAIN_SECONDS": "1"}
    with project.agent("hooks", env=short, pool=pool) as node:
        assert_completed([run(prefect, "hooked/stopped")])
        going_on = prefect.start("hooked/stopped", parameters={"seconds": 600})
        project.wait_for("hooked", "began", 2)
        pid = node.pid
        os.kill(pid, signal.SIGTERM)
        ended = prefect.wait_for_end(going_on)
        project.wait_for("hooks", "Crashed")
        wait_until(lambda: not is_alive(pid), PATIENCE, "the agent to end")
    assert state_of(ended).name == "Crashed"
    assert [entry.what for entry in project.entries("hooks")] == ["Completed", "Crashed"]


def test_hooks_of_a_run_whose_process_was_killed(
    agent: Program, project: Project, prefect: Prefect
) -> None:
    """They are called once, in a process of their own."""
    before = len(project.entries("hooks", "Crashed"))
    going_on = prefect.start("hooked", parameters={"seconds": 600})
    (entry,) = project.wait_for("hooked", "began", len(project.entries("hooked")) + 1)[-1:]
    os.kill(entry.pid, signal.SIGKILL)
    assert state_of(prefect.wait_for_end(going_on)).name == "Crashed"
    found = project.wait_for("hooks", "Crashed", before + 1)
    assert found[-1]["message"] == state_of(prefect.client.read_flow_run(going_on.id)).message
    assert_completed([run(prefect, "price")])
    assert len(project.entries("hooks", "Crashed")) == before + 1


# --- preloading -----------------------------------------------------------------------------------

PRELOAD = "PREFECT_INTEGRATIONS_TASKADAPTER_PRELOAD"


@pytest.mark.slow
def test_a_node_preloads_what_setting_and_pool_name(project: Project, prefect: Prefect) -> None:
    """The modules are there when a run's process starts; one that starts a thread keeps the agent down."""
    pool = f"{project.pool}-preload"
    ensure_work_pool(pool)
    template = prefect.client.read_work_pool(pool).base_job_template
    template["variables"]["properties"]["preload"]["default"] = ["chunk_of_mine"]
    prefect.client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
    deploy(project, prefect, "preloaded", "at-start", pool)
    with project.agent("preloads", env={PRELOAD: "wave"}, pool=pool):
        assert_completed([run(prefect, "preloaded/at-start")])
    (entry,) = project.entries("preloaded")
    assert (entry["setting"], entry["pool"]) == (True, True)

    with pytest.raises(AssertionError, match=r"starts threads when it is imported \(busy-one\)"):
        project.prefect(
            *("worker", "start", "--pool", pool, "--type", "warm-backup", "--name", "busy"),
            env={PRELOAD: "busy"},
        )
