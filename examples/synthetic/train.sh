#!/usr/bin/env bash
# Train a whole unCLIP on drawn shapes and sample from it. Started again, it goes on where it was stopped.
# What follows on the line goes to every stage: examples/synthetic/train.sh train.steps=20
set -euo pipefail

RUNS=${RUNS:-runs/synthetic}   # run folders and the finished model
OUT=${OUT:-outputs/synthetic}  # pictures
PORT=${PORT:-29500}            # where deepspeed's processes meet; another one for a second run on this machine

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -x .venv/bin/deepspeed ] && PATH="$PWD/.venv/bin:$PATH"

stage() {
    printf '\n== %s\n' "$*"
    deepspeed --master_port "$PORT" "$@" train.wandb.mode=disabled
}

clip=$RUNS/clip/model
stage train_clip.py --config configs/clip/synthetic.yaml train.run_dir="$RUNS/clip" "$@"
stage train_prior.py --config configs/prior/synthetic.yaml clip="$clip" train.run_dir="$RUNS/prior" "$@"
stage train_decoder.py --config configs/decoder/synthetic_64.yaml clip="$clip" train.run_dir="$RUNS/decoder" "$@"
for size in 64_to_256 256_to_1024; do
    stage train_upsampler.py --config "configs/upsampler/synthetic_$size.yaml" \
        train.run_dir="$RUNS/upsampler_${size#*_to_}" "$@"
done

unclip bundle --overwrite --out "$RUNS/model" --name shapes --clip "$clip" --prior "$RUNS/prior/model" \
    --decoder "$RUNS/decoder/model" --upsampler-256 "$RUNS/upsampler_256/model" \
    --upsampler-1024 "$RUNS/upsampler_1024/model"
unclip sample --model "$RUNS/model" --out "$OUT" \
    --prompt "a large red circle on a white background" \
    --prompt "a small yellow star at the top on a blue background" \
    --prompt "a large green square on the right on a black background"
