#!/usr/bin/env bash
# The three stages on the bundled model: prefill once, encode, then answer from the chunk files.
# usage: demo.sh [WORK_FOLDER]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$root/build/demo}
mkdir -p "$work"
cd "$root"

echo "== 1. Prefill a context of 9,000 tokens and save its KV cache"
python main.py --save_dir "$work/data"
echo
echo "== 2. Quantize and entropy-code it into chunk files"
python run_encoding.py --path_to_kv "$work/data/test_kv_0.pkl" --output_path "$work/encoded" --num_chunks 4
echo
echo "== 3. Decode the chunks, answer from them, and compare with the answer from the text"
python run_decoding_disk.py --path_to_encoded_kv "$work/encoded" --verify --json "$work/decode.json"
echo
python - "$work/decode.json" 9k_prompts/questions.json <<'PYTHON'
import json
import sys

decoded = json.load(open(sys.argv[1]))
expected = next(c["answer"] for c in json.load(open(sys.argv[2])) if c["file"] == "0.txt")
answer = decoded["text"].split()[0]
faster = decoded["text_prefill_seconds"] / decoded["ttft_seconds"]
print(f"== The question of 9k_prompts/0.txt: answered {answer}, right is {expected}.")
print(f"   The first token came {faster:.0f}x sooner than by prefilling the text again.")
sys.exit(0 if answer == expected and decoded["greedy_match"] else 1)
PYTHON
echo
echo "== 4. The same cache with the transform codec and the model's profile"
python run_encoding.py --path_to_kv "$work/data/test_kv_0.pkl" --output_path "$work/encoded_transform" \
    --quantization_config config/transform_tiny.json
echo
python run_decoding_disk.py --path_to_encoded_kv "$work/encoded_transform"
