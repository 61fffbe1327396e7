#!/usr/bin/env bash
# What each part of a profile brings: profiles by several recipes from the same caches, each with its measured curve.
# usage: ablation.sh FOLDER_OF_KV_CACHES OUTPUT_FOLDER [MODEL]
# Resumable: a recipe whose JSON is there is not measured again, unless caches, model or recipe have changed since.
set -euo pipefail
caches=$1 output=$2
root=$(cd "$(dirname "$0")/.." && pwd)
model=${3:-$root/models/tiny-mistral}
mkdir -p "$output"

# What the results depend on: every byte of the caches, and of a model that is a folder.
inputs=$({
    find -L "$caches" -type f -print0
    [ ! -d "$model" ] || find -L "$model" -type f -print0
} | sort -z | xargs -0 sha256sum | sha256sum)

measure() {
    local name=$1 wanted
    shift
    wanted="$model $* $inputs"
    # The JSON is written whole, and after the profile; the note of its inputs after both.
    if [ -s "$output/$name.json" ] && [ "$(cat "$output/$name.inputs" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    rm -f "$output/$name.inputs"
    python "$root/run_calibration.py" --path_to_kv "$caches" --model_id "$model" --finest_step 0.0625 \
        --output_path "$output/$name" --overwrite --quiet --json "$output/$name.json" "$@"
    echo "$wanted" >"$output/$name.inputs"
}

measure all-layers-fisher --weights fisher
measure all-layers-diagonal --weights diagonal
measure all-layers-none --weights none
measure 3-layers-fisher --weights fisher --layers_per_group 3
measure 2-layers-fisher --weights fisher --layers_per_group 2
measure 1-layer-fisher --weights fisher --layers_per_group 1

python - "$output" <<'PYTHON'
import json
import math
import pathlib
import sys


def bits_at(curve, kl):
    """Bits per value at a KL, on straight lines through the logarithms of the measured points."""
    points = sorted((math.log(p["kl"]), math.log(p["bits_per_value"])) for p in curve)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= math.log(kl) <= x1:
            return f"{math.exp(y0 + (y1 - y0) * (math.log(kl) - x0) / (x1 - x0)):.3f}"
    return ""


targets = (0.002, 0.0005, 0.0001)
print("| recipe | profile, kB | " + " | ".join(f"b/v at KL {kl}" for kl in targets) + " |")
print("|---|---:|" + "---:|" * len(targets))
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    record = json.loads(path.read_text())
    cells = [bits_at(record["curve"], kl) for kl in targets]
    print(f"| {path.stem} | {record['profile_bytes'] / 1000:.0f} | " + " | ".join(cells) + " |")
PYTHON
