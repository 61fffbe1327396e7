#!/usr/bin/env python3
"""Measure the time to first token over a real link of a given rate: nginx in a network namespace behind `tc tbf`.

For each rate, one level loaded whole is compared with max(transfer, decode), and a policy with the simulator's
prediction. Needs root, iproute2 and nginx; the traffic stays on this machine.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]
sys.path.append(str(REPOSITORY / "src"))

from cachegen import command_line  # noqa: E402
from cachegen.errors import BackendUnavailableError  # noqa: E402

ADDRESSES = ipaddress.IPv4Network("198.18.0.0/15")
"""Of links: set aside for measuring (RFC 2544). Each process has four of its own, so that links side by side work."""
PORT = 8077
# What is left of a link's rate for a body: 1448 bytes of every Ethernet frame's 1514, which is what tbf counts.
GOODPUT = 1448 / 1514
NGINX_CONF = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off; sendfile on; max_ranges 1; etag on; keepalive_timeout 60s;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen {address}:{port}; root {root}; add_header Cache-Control immutable; }}
}}
"""


def find_missing() -> str | None:
    """Return why no shaped link can be made here; None where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "nginx") if shutil.which(tool, path=_search_path()) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install iproute2 nginx-light)"
    name = f"cachegen-try-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "delete", name)
    except BackendUnavailableError as error:
        return str(error)
    return None


class ShapedLink:
    """A web server in a network namespace of its own, and a link to it whose rate can be set; a context manager."""

    def __init__(self, root: Path, mbps: float) -> None:
        """Serve `root`, from the start over a link of `mbps` megabits per second."""
        self._root, self._mbps = root.resolve(), mbps
        self._namespace = f"cachegen-{os.getpid()}"
        self._outside, self._inside = f"cgo{os.getpid()}", f"cgi{os.getpid()}"
        self._folder = tempfile.TemporaryDirectory(prefix="cachegen-nginx-")
        self._server: subprocess.Popen[bytes] | None = None
        first = os.getpid() * 4 % ADDRESSES.num_addresses
        self._client_address, self._server_address = str(ADDRESSES[first + 1]), str(ADDRESSES[first + 2])
        self.url = f"http://{self._server_address}:{PORT}"

    def __enter__(self) -> ShapedLink:
        try:
            _run("ip", "netns", "add", self._namespace)
            _run("ip", "link", "add", self._outside, "type", "veth", "peer", "name", self._inside)
            _run("ip", "link", "set", self._inside, "netns", self._namespace)
            _run("ip", "address", "add", f"{self._client_address}/30", "dev", self._outside)
            _run("ip", "link", "set", self._outside, "up")
            self._run_inside("ip", "address", "add", f"{self._server_address}/30", "dev", self._inside)
            self._run_inside("ip", "link", "set", self._inside, "up")
            self.set_rate(self._mbps)
            self.start_server()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_server()
        subprocess.run([_find("ip"), "netns", "delete", self._namespace], capture_output=True)
        subprocess.run([_find("ip"), "link", "delete", self._outside], capture_output=True)
        self._folder.cleanup()

    def set_rate(self, mbps: float) -> None:
        """Change the rate of what the server sends, from now on."""
        burst = max(16_000, round(mbps * 1e6 / 8 * 0.002))  # 2 ms, at least ten frames
        rate = ["rate", f"{round(mbps * 1000)}kbit", "burst", str(burst), "latency", "100ms"]
        self._run_inside("tc", "qdisc", "replace", "dev", self._inside, "root", "tbf", *rate)

    def cut(self) -> None:
        """Take the link down: nothing arrives, nobody is told."""
        self._run_inside("ip", "link", "set", self._inside, "down")

    def mend(self) -> None:
        """Take the link up again."""
        self._run_inside("ip", "link", "set", self._inside, "up")

    def start_server(self) -> None:
        """Start nginx and wait until it answers."""
        folder = Path(self._folder.name)
        text = NGINX_CONF.format(folder=folder, address=self._server_address, port=PORT, root=self._root)
        (folder / "nginx.conf").write_text("user root;" + text)
        command = ["ip", "netns", "exec", self._namespace, _find("nginx"), "-c", str(folder / "nginx.conf")]
        self._server = subprocess.Popen([_find(command[0]), *command[1:]], stderr=subprocess.DEVNULL)
        import socket

        for _ in range(200):
            try:
                socket.create_connection((self._server_address, PORT), timeout=0.1).close()
                return
            except OSError:
                time.sleep(0.02)
        log = (folder / "error.log").read_text() if (folder / "error.log").exists() else ""
        raise BackendUnavailableError(f"nginx does not answer: {log.strip()[-200:]}")

    def kill_server(self) -> None:
        """Kill nginx, as a crash would; the kernel closes its connections."""
        if self._server is not None:
            self._server.send_signal(signal.SIGKILL)
            self._server.wait()
            self._server = None

    def _run_inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._namespace, _find(command[0]), *command[1:])


def _search_path() -> str:
    return "/usr/sbin:/sbin:" + os.defpath


def _find(tool: str) -> str:
    return shutil.which(tool, path=_search_path()) or tool


def _run(*command: str) -> None:
    result = subprocess.run([_find(command[0]), *command[1:]], capture_output=True, text=True)
    if result.returncode != 0:
        raise BackendUnavailableError(f"{' '.join(command[:4])}: {result.stderr.strip() or 'failed'}")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("--path_to_store", default="store", help="a store of run_publishing.py, in a folder")
    add("--path_to_context", default=command_line.default_input(REPOSITORY, "9k_prompts/0.txt"), help="its text")
    add("--model_id", default=command_line.default_input(REPOSITORY, "models/tiny-mistral"), help="the model")
    add("--mbps", nargs="+", type=command_line.positive_float, default=[10, 20, 40], help="rates to measure at")
    add("--slo", type=command_line.positive_float, default=2.0, help="objective of the policy: seconds")
    add("--policy", default="ours", help="compared with the simulator's prediction")
    add("--output_path", help="folder for shaped_link.csv and the timelines; None writes nothing")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_measure, build_parser(), argv)


def _measure(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    why_not = find_missing()
    if why_not is not None:
        raise BackendUnavailableError(f"no shaped link here: {why_not}")
    rows, logs = [], []
    with ShapedLink(Path(args.path_to_store), args.mbps[0]) as link:
        for mbps in args.mbps:
            link.set_rate(mbps)
            whole = _load(args, link.url, "--level", "1")
            policy = _load(args, link.url, "--policy", args.policy, "--slo", str(args.slo))
            row = {
                "mbps": mbps,
                **_compare_with_bound(whole, mbps),
                **_compare_with_simulator(args, link, policy, mbps),
            }
            rows.append(row)
            report.row(
                f"{mbps:g} Mbit/s",
                f"level 1 whole: cache after {row['ready_seconds']:.3f} s, {row['ready_ratio']:.3f} x max(transfer, "
                f"decode), first token {row['ttft_ratio']:.3f} x; {args.policy}: first token after "
                f"{row['policy_ttft_seconds']:.3f} s, simulated {row['simulated_seconds']:.3f} s "
                f"({100 * row['difference']:+.1f} %)",
            )
            if args.output_path is not None:
                _draw(args, policy, mbps)
            logs.append({"mbps": mbps, "whole": whole, "policy": policy})
    if args.output_path is not None:
        _write_csv(Path(args.output_path) / "shaped_link.csv", rows)
    command_line.finish(args, {"rows": rows, "runs": logs})


def _load(args: argparse.Namespace, url: str, *flags: str) -> dict[str, Any]:
    """Run run_decoding_remote.py in this process and return its JSON."""
    import run_decoding_remote

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.json"
        common = {"--path_to_encoded_kv": url, "--path_to_context": args.path_to_context, "--model_id": args.model_id}
        argv = [item for pair in common.items() for item in pair]
        code = run_decoding_remote.main([*argv, *flags, "--max_new_tokens", "1", "--quiet", "--json", str(output)])
        if code != 0:
            raise SystemExit(code)
        return json.loads(output.read_text())


def _compare_with_bound(record: dict[str, Any], mbps: float) -> dict[str, float]:
    transfer = record["encoded_bytes"] / (mbps * 1e6 / 8 * GOODPUT)
    bound = max(transfer, record["decode_seconds"] + record["copy_seconds"])
    return {
        "bytes": record["encoded_bytes"],
        "transfer_seconds": transfer,
        "decode_seconds": record["decode_seconds"] + record["copy_seconds"],
        "ready_seconds": record["ready_seconds"],
        "ttft_seconds": record["ttft_seconds"],
        "ready_ratio": record["ready_seconds"] / bound,
        "ttft_ratio": record["ttft_seconds"] / bound,
    }


def _compare_with_simulator(
    args: argparse.Namespace, link: ShapedLink, record: dict[str, Any], mbps: float
) -> dict[str, float]:
    """Simulate the same request with the speeds that were measured in it, the first token's included."""
    from cachegen.simulation import traces
    from cachegen.simulation.simulator import simulate_request
    from cachegen.store.catalog import FoundDocument
    from cachegen.store.manifest import MAX_MANIFEST_BYTES, unpack_manifest
    from cachegen.store.store import open_store
    from cachegen.streaming.policies import POLICIES
    from cachegen.streaming.policy import DecodeSpeed, Objective, PrefillSpeed, Speeds
    from cachegen.streaming.remote import RemoteDocument

    store = open_store(args.path_to_store)
    address = record["manifest"]
    manifest = unpack_manifest(store.get(address.removeprefix(f"{link.url}/"), MAX_MANIFEST_BYTES))
    document = RemoteDocument(store, FoundDocument(manifest, address, record["num_chunks"]), 1)
    measured = record["speeds"]
    decode = {name: float("inf") if value is None else value for name, value in measured["decode"].items()}
    speeds = Speeds(
        PrefillSpeed(**measured["prefill"]),
        DecodeSpeed(**decode),
        record["prefill_seconds"],
        stop_seconds=measured["stop_seconds"],
    )
    result = simulate_request(
        POLICIES[args.policy],
        document.list_levels(),
        Objective(args.slo - record["lookup_seconds"]),
        speeds,
        traces.constant(mbps / 1000 * GOODPUT),
        block_tokens=manifest.prefill_block_size,
        num_layers=record["num_layers"],
    )
    simulated = result.ttft_seconds + record["lookup_seconds"]
    return {
        "policy_ttft_seconds": record["ttft_seconds"],
        "simulated_seconds": simulated,
        "difference": record["ttft_seconds"] / simulated - 1,
        "policy_bytes": record["encoded_bytes"],
        "computed_tokens": record["num_recomputed_tokens"],
    }


def _draw(args: argparse.Namespace, record: dict[str, Any], mbps: float) -> None:
    from cachegen.streaming.timeline import draw_timeline

    marks = {"first token": record["ttft_seconds"], "objective": record["slo_seconds"]}
    title = f"{args.policy} over {mbps:g} Mbit/s (nginx, tc tbf), {record['num_chunks']} chunks, on {record['device']}"
    draw_timeline(Path(args.output_path) / f"timeline_{args.policy}_{mbps:g}mbps.png", record["timeline"], title, marks)


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    from cachegen.files import write_file

    lines = [",".join(rows[0])] + [",".join(f"{value:.6g}" for value in row.values()) for row in rows]
    write_file(path, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
