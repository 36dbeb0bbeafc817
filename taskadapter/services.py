"""What a listener or the scheduler deploys: a service or a job, and what can be none."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

from prefect import Flow, Task

from taskadapter.declare import attached
from taskadapter.declare.base import shown
from taskadapter.declare.jobs import Job, Service, dump_state
from taskadapter.declare.names import check_name
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.errors import DeclarationError, closest, in_a_line, listed
from taskadapter.execution import flow as flows

_OPTIONS = inspect.signature(Flow.__init__).parameters.keys() - {"self", "fn", "name"}
"""What `prefect.flow` takes besides the name, which a service has from its listener."""

_SWITCHES = {"log_prints", "persist_result", "validate_parameters", "cache_result_in_memory"}
"""Those of them that Prefect does not check, and takes any text for a yes."""

Declarable = type[Job] | type[Service] | Callable[..., Any]


@dataclass(frozen=True)
class Declared:
    """A service as a listener knows it.

    Attributes:
        name: its name, and its deployment's.
        flow: what Prefect runs.
        trigger: the listener's, with what this service adds to it.
        source: the function or class that was declared.
        initial_state: the fields of an attached instance; None where a decorator declared it.
        instance: that instance.
        parameters: what its runs are given, kept as declared; None for the flow's defaults, which the UI
            may change.
    """

    name: str
    flow: Flow[..., Any]
    source: Declarable
    trigger: TriggerConfiguration
    initial_state: dict[str, Any] | None = None
    instance: Service | None = None
    parameters: dict[str, Any] | None = None


def service_of(
    source: Declarable, name: str, trigger: TriggerConfiguration, options: dict[str, Any]
) -> Declared:
    """Return the service that a decorated class or function is.

    Args:
        source: the class or function.
        name: the service's name.
        trigger: its listener's.
        options: what `prefect.flow` is given.

    Raises:
        DeclarationError: it is neither, or cannot be called without arguments.
    """
    if _is_service(source):
        trigger = _one_writer(source, trigger)
        make = partial(flows.service_flow, source(), name, trigger)
    elif inspect.isfunction(source):
        _check_function(source, name)
        make = partial(flows.function_flow, source, name, trigger)
    else:
        raise DeclarationError(f"{named(source)} cannot be service {name!r}: {_remedy(source)}.")
    try:
        flow = make(**options)
    except (TypeError, ValueError) as error:
        if not options:
            raise
        raise DeclarationError(
            f"service {name!r}: Prefect does not take one of {', '.join(options)}; correct it: "
            f"{in_a_line(str(error))}"
        ) from None
    return Declared(name, flow, source, trigger)


def service_of_instance(service: Service, name: str, trigger: TriggerConfiguration) -> Declared:
    """Return the service that an attached instance is; its fields are the initial state.

    Raises:
        DeclarationError: `name` is no name of a service, what is attached is none, or its class cannot be
            imported by its name.
    """
    check_service(name, {})
    cls = type(service)
    if not issubclass(cls, Service):
        raise DeclarationError(
            f"{named(service)} cannot be attached as {name!r}: pass an instance of a Service."
        )
    if "<locals>" in cls.__qualname__:
        raise DeclarationError(
            f"{cls.__qualname__} cannot be attached as {name!r}: nodes import a service's class, "
            "and cannot import one that is defined inside a function. Move it to module level."
        )
    trigger = _one_writer(cls, trigger)
    return Declared(
        name, flows.service_flow(service, name, trigger), cls, trigger, dump_state(service), service
    )


def job_variables(declared: Declared) -> dict[str, Any]:
    """Return what its deployment keeps of a job for the agent."""
    trigger = declared.trigger.model_dump(mode="json", exclude_defaults=True)
    if declared.initial_state is None:
        return {"trigger": trigger}
    return {"trigger": trigger, "initial_state": declared.initial_state}


def description(declared: Declared) -> str:
    """Return the docstring of what was declared; what it inherits from `Service` is not about it."""
    if own := inspect.cleandoc(declared.source.__doc__ or ""):
        return own
    # Of an empty one `prefect deploy` would make "None".
    return f"Job {declared.name} in {place_of(declared.source)}"


def entrypoint(declared: Declared) -> str:
    """Return where Prefect finds the flow of a service: ``flows/counter.py:Counter``.

    For an attached instance that is its class, and the service's name.

    Raises:
        DeclarationError: as `place_of`.
    """
    place = place_of(declared.source)
    return place if declared.initial_state is None else attached.entrypoint(place, declared.name)


def place_of(source: Any) -> str:
    """Return where nodes find a function or class: ``flows/counter.py:Counter``.

    Relative to the working directory, so that nodes may have the project elsewhere; what lies outside
    is named as an importable module.

    Raises:
        DeclarationError: it has no name in its module by which a node could import it, or is of no file,
            or of one outside that nodes could not import by its module's name.
    """
    name, file = source.__qualname__, _file_of(source)
    if "<" in name:
        raise DeclarationError(
            f"{name} in {file} cannot be deployed: nodes import what they run, and cannot import a lambda, "
            "nor what is defined inside a function. Define it at module level."
        )
    _require_own_name(source, file)
    here, module = Path.cwd().resolve(), source.__module__
    if (place := _place_in(here, file)) is not None:
        return f"{place.as_posix()}:{name}"
    if module != "__main__" and _origin(module, here) == file.resolve():
        return f"{module}:{name}"
    what = "this script lies outside the working directory"
    if module != "__main__":
        what = f"from there its module {module} is not found"
    raise DeclarationError(
        f"{name} in {file} cannot be deployed from {here}: nodes import what they run, and {what}. Start "
        "it in the project's folder, or move the definition to a module that the nodes can import."
    )


def may_be_one(place: str, other: str) -> bool:
    """Return whether two places may be one class, or function, as it is found from two folders.

    ``report.py:Report`` may be ``flows/report.py:Report``, and ``flows.report:Report`` is.
    """
    (module, name), (other_module, other_name) = _parts(place), _parts(other)
    shared = min(len(module), len(other_module))
    return name == other_name and module[-shared:] == other_module[-shared:]


def _parts(place: str) -> tuple[list[str], str]:
    """Return the names that lead to the module of a place, and what is in it."""
    module, _, name = place.rpartition(":")
    script = module.removesuffix(".py").removesuffix("/__init__")
    return (module.split(".") if script == module else script.split("/")), name


def _file_of(source: Any) -> Path:
    """Return the file that a function or class is defined in, by the path under which it was found.

    A decorator may have put another function in its place, which is of the decorator's file.
    """
    with suppress(OSError, TypeError):
        file = Path(inspect.getfile(inspect.unwrap(source))).absolute()
        if not file.name.startswith("<"):  # such as "<stdin>"
            return file
    raise DeclarationError(
        f"{source.__qualname__} cannot be deployed: nodes import what they run, and it is in no file. "
        "Define it in a module of the project."
    )


def _require_own_name(source: Any, file: Path) -> None:
    """Refuse a function that was decorated under another name than its own: nodes import it by that."""
    inner = inspect.unwrap(source)
    found = getattr(sys.modules.get(source.__module__), source.__qualname__, None)
    if found is inner is not source:
        raise DeclarationError(
            f"{source.__qualname__} in {file} cannot be deployed as it was decorated elsewhere: nodes "
            "import it by its name, and find it undecorated. Decorate it where it is defined, or define a "
            "function that calls it."
        )


def _place_in(here: Path, file: Path) -> Path | None:
    """Return the path of a file from a folder; None for what is outside, or installed.

    A link in the folder is in it, wherever it leads to: so Kubernetes mounts the files of a ConfigMap.
    """
    installed = Path(sys.prefix).resolve()
    for path in (file, file.resolve()):
        for folder in path.parents:
            if (known := folder.resolve()) == installed:
                return None
            if known == here:
                return path.relative_to(folder)
    return None


def _origin(module: str, here: Path) -> Path | None:
    """Return the file of a module as a process finds it that is started in a folder; None for none.

    That has not the folder of the script that runs here.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "none").resolve().parent
    folders = [str(here), *sys.path]
    if own := [at for at in sys.path if Path(at).resolve() == script]:
        folders.remove(own[0])
    path: Sequence[str] | None = folders
    spec = None
    for name in accumulate(module.split("."), "{}.{}".format):
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next(filter(None, found), None) if path else None
        path = spec.submodule_search_locations if spec else None
    return Path(spec.origin).resolve() if spec and spec.origin else None


def check_service(name: object, options: dict[str, Any]) -> None:
    """Refuse what cannot be the name of a service, and options of `prefect.flow` that its listener has.

    Raises:
        DeclarationError: the name is not one that Prefect accepts, or the listener has such an option.
    """
    if not isinstance(name, str) or not name:
        raise DeclarationError(
            f"a service needs a name in parentheses{f', not {named(name)}' if name else ''}; write "
            'service("a-name") above it, and attach(instance, "a-name").'
        )
    check_name(name, "service")
    for option in ("retries", "retry_delay_seconds"):
        if option in options:
            raise DeclarationError(
                f"service {name!r}: {option}={shown(options[option])} would have Prefect retry what the "
                "listener retries already; declare a RetryConfiguration instead."
            )
    for option in options.keys() - _OPTIONS:
        close = closest(option, _OPTIONS)
        raise DeclarationError(
            f"service {name!r}: {option}= is no option of a flow; "
            f"{f'did you mean {close}?' if close else f'there are {listed(sorted(_OPTIONS))}.'}"
        )
    for option in _SWITCHES & options.keys():
        if not isinstance(options[option], bool | None):
            raise DeclarationError(
                f"service {name!r}: {option}={shown(options[option])} must be True or False; leave it out "
                "for Prefect's default."
            )
    timeout = options.get("timeout_seconds")
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout < math.inf):
        raise DeclarationError(
            f"service {name!r}: timeout_seconds={shown(timeout)} must be a number of seconds, more than 0; "
            "leave it out for none."
        )


def named(given: object) -> str:
    """Name what was given where something else was wanted: a repr has an address, or a user's values."""
    if isinstance(given, Flow):
        return f"flow {given.name!r}"
    if isinstance(given, Task):
        return f"task {given.name!r}"
    if inspect.isclass(given) or inspect.isroutine(given):
        return f"{'class' if inspect.isclass(given) else 'function'} {given.__qualname__}"
    return shown(given)


def _remedy(source: object) -> str:
    if isinstance(source, Flow):
        return "it is a flow already; remove @flow, for service() makes one, and takes its options"
    if isinstance(source, Task):
        return "it is a task; remove @task, or call it in a function that you decorate"
    if inspect.isroutine(source):
        return "it is a method, or built in; decorate a function that calls it, or a subclass of Service"
    return "decorate a subclass of Service, or a function"


def _is_service(source: object) -> TypeGuard[type[Service]]:
    return inspect.isclass(source) and issubclass(source, Service) and not inspect.isabstract(source)


def _check_function(fn: Callable[..., Any], name: str) -> None:
    """Refuse a function that a tick cannot call."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise DeclarationError(
            f"{fn.__qualname__} cannot be service {name!r}: it is a generator, so calling it does "
            "nothing; remove its yield."
        )
    try:
        inspect.signature(fn).bind()
    except TypeError:
        raise DeclarationError(
            f"{fn.__qualname__}{inspect.signature(fn)} cannot be service {name!r}: it is called "
            "without arguments; give its parameters defaults."
        ) from None


def _one_writer(cls: type[Service], trigger: TriggerConfiguration) -> TriggerConfiguration:
    """Return the trigger for a service: one that has state runs one tick at a time.

    Each run starts from the state that the one before it has saved; two at once would lose one of two
    changes.
    """
    if not cls.model_fields:
        return trigger
    policy = trigger.policy
    return trigger.model_copy(update={"task_policy": policy.model_copy(update={"max_concurrent": 1})})
