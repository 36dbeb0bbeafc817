"""What is in `deployments/` for a user's own machines is valid, and names what is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import kubernetes_validate
import prefect.settings
import pytest
import yaml
from prefect_redis.client import RedisMessagingSettings
from prometheus_client import REGISTRY

from taskadapter.agent import metrics  # noqa: F401 - has them registered
from taskadapter.settings import TaskadapterSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments"
OURS = "PREFECT_INTEGRATIONS_TASKADAPTER_"
REDIS = "PREFECT_REDIS_MESSAGING_"
DRAIN_SECONDS = TaskadapterSettings.model_fields["drain_seconds"].default
TEXTS = [*FOLDER.glob("*"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
NAMES = {
    name
    for file in TEXTS
    if file.is_file() and file.suffix != ".py"
    for name in re.findall(r"PREFECT_[A-Z_]*[A-Z]\b", file.read_text())
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_variable_is_a_setting(name):
    """Of Prefect's, of its package for Redis, or of ours."""
    if name.startswith(OURS):
        assert name.removeprefix(OURS).lower() in TaskadapterSettings.model_fields
    elif name.startswith(REDIS):
        assert name.removeprefix(REDIS).lower() in RedisMessagingSettings.model_fields
    else:
        assert hasattr(prefect.settings, name)


# --- compose --------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return found


def test_the_compose_file_is_valid():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, FOLDER / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_its_nodes_have_names_of_their_own_and_time_to_drain():
    nodes = {name: one for name, one in compose()["services"].items() if name.startswith("node-")}
    assert {one["command"][-1] for one in nodes.values()} == nodes.keys()
    assert len(nodes) == 2
    assert all(int(one["stop_grace_period"].rstrip("s")) > DRAIN_SECONDS for one in nodes.values())


def test_what_a_service_waits_for_tells_that_it_is_healthy():
    services = compose()["services"]
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[name]


def test_the_image_has_what_it_copies():
    sources = re.findall(r"^COPY (.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    paths = [path for line in sources for path in line.split()]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


# --- Kubernetes -----------------------------------------------------------------------------------

MANIFESTS = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_a_manifest_is_valid(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_its_probes_ask_where_the_agent_answers():
    spec = MANIFESTS[0]["spec"]["template"]["spec"]
    (node,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in node["ports"]}
    assert ports == {
        "health": prefect.settings.PREFECT_WORKER_WEBSERVER_PORT.value(),
        "metrics": prefect.settings.PREFECT_CLIENT_METRICS_PORT.value(),
    }
    assert {node[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")} == {"/health"}
    assert spec["terminationGracePeriodSeconds"] > DRAIN_SECONDS


# --- Prometheus and Grafana -----------------------------------------------------------------------

SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
SAMPLES = {
    family.name + suffix
    for family in REGISTRY.collect()
    if family.name.startswith("taskadapter_")
    for suffix in SUFFIXES[family.type]
}


def test_alerts_and_dashboard_ask_for_metrics_that_are_there():
    texts = [(FOLDER / name).read_text() for name in ("alerts.yaml", "grafana.json")]
    for text in texts:
        asked = set(re.findall(r"taskadapter_[a-z_]+", text))
        assert asked
        assert asked <= SAMPLES


def test_the_dashboards_panels_have_a_place_each():
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert all(panel["targets"] and panel["description"] for panel in panels)


if (PROMTOOL := shutil.which("promtool")) is not None:

    def test_prometheus_finds_no_fault_with_the_alerts():
        done = subprocess.run(
            [PROMTOOL, "check", "rules", FOLDER / "alerts.yaml"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# --- systemd --------------------------------------------------------------------------------------


def test_the_unit_gives_runs_time_to_drain():
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(FOLDER / "taskadapter.service")
    service = unit["Service"]
    assert float(service["TimeoutStopSec"]) > DRAIN_SECONDS
    assert service["ExecStart"].split()[1:3] == ["worker", "start"]


if (ANALYZE := shutil.which("systemd-analyze")) is not None:

    def test_systemd_finds_no_fault_with_the_unit(tmp_path):
        """Only a machine with systemd can say that; the command is one that is there."""
        unit = tmp_path / "taskadapter.service"
        text = (FOLDER / "taskadapter.service").read_text()
        unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
        done = subprocess.run([ANALYZE, "verify", "--man=no", unit], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
