"""Serve a model by vLLM with the connector, over the interface of OpenAI; further flags are vLLM's."""

from __future__ import annotations

import argparse
import json
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--store", required=True, help="a folder or URL that all engines share")
    parser.add_argument("--method", default="lossless")
    args, others = parser.parse_known_args()
    connector = {
        "kv_connector": "CacheGenConnector",
        "kv_connector_module_path": "cachegen.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": args.store, "method": args.method},
    }
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    flags = ["--host", args.host, "--port", str(args.port), "--kv-transfer-config", json.dumps(connector)]
    os.execv(sys.executable, [*program, *flags, *others])


if __name__ == "__main__":
    raise SystemExit(main())
