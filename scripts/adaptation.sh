#!/usr/bin/env bash
# The simulations of README.md, "Streaming: adaptation": JSON and plots into a folder, tables on stdout.
#     bash scripts/adaptation.sh [folder] [seeds]
set -euo pipefail
folder=${1:-results/adaptation}
seeds=${2:-200}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder"

simulate() { # name, flags...
    local name=$1
    shift
    echo "== $name"
    python "$root/run_adaptation.py" --seeds "$seeds" --json "$folder/$name.json" "$@"
    echo
}

for levels in pessimistic small_model; do
    curve="$root/config/adaptation/levels_$levels.json"
    # Every trace, one second, as good as the deadline allows.
    plot=()
    [[ $levels == pessimistic ]] && plot=(--plot "$folder/mistral-7b-a40.png")
    simulate "slo-1s-$levels-a40" --levels "$curve" "${plot[@]}"
    for gpu in a40 h100; do
        # Time to first token at the KL of 8-bit quantization, and at that of the paper's usual setting.
        for kl in 0.00001 0.0018; do
            simulate "ttft-kl-$kl-$levels-$gpu" --levels "$curve" --gpu "$gpu" --traces constant --gbps 0.4 15 \
                --num_rates 25 --slo 10 --target_kl "$kl"
        done
    done
done
