#!/usr/bin/env bash
# Draw a subject and pictures of its class, and teach the subject to the bundled model in three ways: by a word alone, and
# by adapters with and without prior preservation. Started again, it goes on where it was stopped.
# What follows on the line goes to every run: examples/personalise/train.sh train.steps=20
set -euo pipefail

RUNS=${RUNS:-runs/personalise} # run folders
DATA=${DATA:-data}             # the folders subject and class
PORT=${PORT:-29500}            # where deepspeed's processes meet; another one for a second run on this machine

RUNS=$(realpath -m "$RUNS") DATA=$(realpath -m "$DATA")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -x .venv/bin/deepspeed ] && PATH="$PWD/.venv/bin:$PATH"

stage() {
    printf '\n== %s\n' "$*"
    deepspeed --master_port "$PORT" "$@" train.wandb.mode=disabled
}

example=examples/personalise
subject="{source: $DATA/subject, weight: 1.0}"
class="{source: $DATA/class, weight: 1.0}"
[ -e "$DATA/subject/metadata.jsonl" ] || python $example/subject.py --out "$DATA/subject"
[ -e "$DATA/class/metadata.jsonl" ] ||
    python $example/class_pictures.py --prompt "red apple" --prompt "green apple" --out "$DATA/class"
stage $example/textual_inversion.py --config $example/textual_inversion.yaml \
    data.source="$DATA/subject" train.run_dir="$RUNS/token" "$@"
for part in prior decoder; do
    stage train_$part.py --config $example/dreambooth_$part.yaml \
        "data.sources=[$subject, $class]" train.run_dir="$RUNS/$part" "$@"
    stage train_$part.py --config $example/dreambooth_$part.yaml \
        "data.sources=[$subject]" train.run_dir="$RUNS/${part}_alone" "$@"
done
python $example/recover.py --runs "$RUNS" --sheet "$RUNS/sheet.png"
