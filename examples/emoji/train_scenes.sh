#!/usr/bin/env bash
# The bundled model goes on to scenes of a few things. Started again, it goes on where it was stopped.
#   SOURCE=my/noto-emoji examples/emoji/train_scenes.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data}                # the rendered data sets; two of them are train.sh's
RUNS=${RUNS:-runs/emoji_scenes}   # run folders
OUT=${OUT:-$RUNS/model}           # the finished model

python examples/emoji/prepare.py --source "$SOURCE" --size 256 --captions natural --out "$DATA/emoji_natural"
python examples/emoji/prepare.py --source "$SOURCE" --size 1024 --out "$DATA/emoji_1024" \
    --names examples/emoji/familiar.txt
scenes=(python examples/emoji/scenes.py --source "$SOURCE" --names examples/emoji/scene_things.txt --tidy)
"${scenes[@]}" --out "$DATA/emoji_scenes_alike" --count 60000 --alike 8
"${scenes[@]}" --out "$DATA/emoji_scenes" --count 100000

# Both towers of the CLIP learn scenes, first by families alone, then with others among them; prior and decoder follow.
single="{source: $DATA/emoji_natural, weight: 3, restyle: 0.4}"
families="{source: $DATA/emoji_scenes_alike, weight: 3, streaming: true, cache: false, plain: false}"
others="{source: $DATA/emoji_scenes, weight: 4, streaming: true, cache: false, plain: false}"
streamed="source: $DATA/emoji_scenes, streaming: true, cache: false"
clip=$RUNS/clip_more/model
stage train_clip.py --config configs/clip/emoji_scenes.yaml train.run_dir="$RUNS/clip" data.sources="[$single, $families]"
stage train_clip.py --config configs/clip/emoji_scenes_more.yaml init_from="$RUNS/clip/model" \
    train.run_dir="$RUNS/clip_more" data.sources="[$single, $families, $others]"
stage train_prior.py --config configs/prior/emoji_scenes.yaml clip="$clip" train.run_dir="$RUNS/prior" \
    data.sources="[{source: $DATA/emoji_natural, weight: 1}, {$streamed, weight: 1}]"
every="{source: $DATA/emoji_natural, weight: 3, restyle: 0.3}, {source: $DATA/emoji_1024, weight: 1, restyle: 0.3}"
stage train_decoder.py --config configs/decoder/emoji_64_scenes.yaml clip="$clip" train.run_dir="$RUNS/decoder" \
    data.sources="[$every, {$streamed, weight: 6}]"

unclip bundle --overwrite --name emoji-scenes --license Apache-2.0 --clip "$clip" --prior "$RUNS/prior/model" \
    --decoder "$RUNS/decoder/model" --upsampler-256 unclip/models/emoji/upsampler_256 \
    --upsampler-1024 unclip/models/emoji/upsampler_1024 --out "$OUT"
python examples/emoji/measure.py --data "$DATA/emoji_natural" --source "$SOURCE" --model "$OUT" \
    --figures scenes names phrasings variations --out "$RUNS/figures"
