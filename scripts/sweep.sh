#!/usr/bin/env bash
# Encode one KV cache with several quantization configs: one JSON per config, and a table of bits per value.
# usage: sweep.sh KV_FILE OUTPUT_FOLDER CONFIG...      (run it again after an interruption: it resumes)
set -euo pipefail
kv_file=$1 output_folder=$2
shift 2
mkdir -p "$output_folder"
for config in "$@"; do
  name=$(basename "$config" .json)
  python "$(dirname "$0")/../run_encoding.py" --path_to_kv "$kv_file" --quantization_config "$config" \
    --output_path "$output_folder/$name" --json "$output_folder/$name.json" |
    sed -n "s/^bits per value */$name  /p"
done
