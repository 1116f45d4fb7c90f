"""As much of W&B's service as `wandb agent` asks for: one sweep, whose run is the engine's choice."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import sweeps


def suggest(sweep: dict, runs: list[sweeps.SweepRun]) -> dict:
    """The engine's next suggestion after `runs`, as the service sends it: {key: {"value": v}}."""
    suggestion = sweeps.next_run(sweeps.SweepConfig(copy.deepcopy(sweep)), runs).config
    values = {key: entry["value"] for key, entry in suggestion.items()}
    return {key: {"value": v.item() if isinstance(v, np.generic) else v} for key, v in values.items()}


class SweepService:
    """Gives the first agent a new run, and later ones that run again, as W&B does with one that was pre-empted.

    `environment` is what an agent needs to find it. Stands on what wandb 0.31 asks for.
    """

    def __init__(self, sweep: dict, run_id: str) -> None:
        self.agents, self.handed_out = 0, 0
        command = {"run_id": run_id, "program": sweep["program"], "args": suggest(sweep, [])}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
                if "agentHeartbeat" in query:
                    commands = []
                    if service.handed_out < service.agents:
                        commands = [{"type": "resume" if service.handed_out else "run", **command}]
                        service.handed_out += 1
                    data = {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
                elif "createAgent" in query:
                    service.agents += 1
                    data = {"createAgent": {"agent": {"id": "agent"}}}
                elif "sweep(" in query:
                    data = {"project": {"sweep": {"config": json.dumps(sweep), "runs": {"edges": []}}}}
                else:
                    data = {"viewer": {"id": "viewer", "entity": "team", "username": "user", "teams": {"edges": []}}}
                answer = json.dumps({"data": data}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{self._server.server_port}", "WANDB_API_KEY": "0" * 40}

    def stop(self) -> None:
        self._server.shutdown()
