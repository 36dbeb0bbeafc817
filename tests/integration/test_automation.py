"""The automation that the project has to offer notifies of a takeover, as Prefect's server runs it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from deployments.local import environment, prefect_command, wait_until
from taskadapter.agent import events
from taskadapter.coordination.messages import Token
from tests.acceptance.project import PATIENCE
from tests.unit.given import node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.orchestration import SyncPrefectClient

    from deployments.local import PrefectServer

WHY = "node 'node-1' was silent for 31.2 s"

AGAIN_SECONDS = 5.0
"""How long to wait for a notification before the event is emitted once more."""

FILE = Path(__file__).parents[2] / "deployments" / "notify-on-takeover.yaml"


@contextmanager
def listening(heard: list[dict[str, str]]) -> Iterator[str]:
    """Take what is posted to an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_takeover_is_notified(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, tmp_path: Path
) -> None:
    """Whoever hears of it reads which node, which group, which term, and why."""
    heard: list[dict[str, str]] = []
    group = f"group-{uuid4().hex[:8]}"
    with listening(heard) as url:
        block: Any = CustomWebhookNotificationBlock(
            name="test", url=url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        block_id = block.save(f"hears-{group}")
        automation = yaml.safe_load(FILE.read_text())
        automation["name"] = group
        automation["actions"][0]["block_document_id"] = str(block_id)
        file = tmp_path / "automation.yaml"
        file.write_text(yaml.safe_dump(automation))
        command = [prefect_command(), "automation", "create", "--from-file", str(file)]
        subprocess.run(command, env=environment(prefect_api.env), check=True, timeout=PATIENCE)
        mine = node(pool=SimpleNamespace(id=uuid4()))
        emitted = 0.0

        def is_notified() -> bool:
            nonlocal emitted
            # The server's triggers may not have known of the automation at the first time.
            if time.monotonic() - emitted > AGAIN_SECONDS:
                emitted = time.monotonic()
                events.token_changed(mine, "acquired", Token(group, "node-2", 7), WHY)
            return any(group in one["subject"] for one in heard)

        try:
            wait_until(is_notified, PATIENCE, "a notification")
        finally:  # the server is shared
            for made in prefect_client.read_automations_by_name(group):
                prefect_client.delete_automation(made.id)

    (told,) = {(one["subject"], one["body"]) for one in heard if group in one["subject"]}
    assert told == (f"node-2 is active for {group}", f"Term 7: {WHY}")
