#!/usr/bin/env bash
# The simulations behind the table of docs/adaptation.md: JSON into a folder, tables on stdout.
# usage: adaptation.sh [OUTPUT_FOLDER] [SEEDS]
set -euo pipefail
folder=${1:-docs/results/adaptation} seeds=${2:-200}
root=$(dirname "$0")/..
mkdir -p "$folder"
for levels in pessimistic small_model; do
  curve=$root/config/adaptation/levels_$levels.json
  echo "== $levels: an objective of one second, U(0.1, 10) Gbps for each chunk"
  python "$root/scripts/simulate_adaptation.py" --levels "$curve" --traces uniform-per-chunk --seeds "$seeds" \
    --json "$folder/slo-$levels.json"
  for gpu in a40 h100; do
    for kl in 0.0000057 0.000057 0.0018; do
      echo "== $levels, $gpu: time to first token at KL $kl"
      python "$root/scripts/simulate_adaptation.py" --levels "$curve" --gpu "$gpu" --traces constant --gbps 0.4 15 --num_rates 25 \
        --slo 10 --target_kl "$kl" --json "$folder/ttft-$levels-$gpu-$kl.json"
    done
  done
done
