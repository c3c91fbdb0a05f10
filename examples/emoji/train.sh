#!/usr/bin/env bash
# The recipe of the bundled model. Started again, it goes on where it was stopped.
#   SOURCE=my/noto-emoji examples/emoji/train.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data}             # the two rendered data sets
RUNS=${RUNS:-runs/emoji}       # run folders
OUT=${OUT:-runs/emoji/model}   # the finished model; unclip/models/emoji to replace the bundled one

# All emoji without skin tone, with captions of names and keywords and with captions as people type them; the familiar ones
# at full size for the decoder's first phases and the upsamplers.
python examples/emoji/prepare.py --source "$SOURCE" --size 256 --out "$DATA/emoji_256"
python examples/emoji/prepare.py --source "$SOURCE" --size 256 --captions natural --out "$DATA/emoji_natural"
python examples/emoji/prepare.py --source "$SOURCE" --size 1024 --out "$DATA/emoji_1024" \
    --names examples/emoji/familiar.txt

first=$RUNS/clip/model
clip=$RUNS/clip_natural/model
familiar=data.source=$DATA/emoji_1024
natural=data.source=$DATA/emoji_natural
stage train_clip.py --config configs/clip/emoji.yaml data.source="$DATA/emoji_256" train.run_dir="$RUNS/clip"
# The decoder's first three phases need the first CLIP alone: v-prediction, then x_0 from its features with a fresh output
# layer, then a stretch that looks mostly at the noisiest timesteps.
stage train_decoder.py --config configs/decoder/emoji_64_v.yaml clip="$first" "$familiar" \
    train.run_dir="$RUNS/decoder_v"
stage train_decoder.py --config configs/decoder/emoji_64.yaml clip="$first" "$familiar" \
    train.run_dir="$RUNS/decoder" init_from="$RUNS/decoder_v/model"
stage train_decoder.py --config configs/decoder/emoji_64_last.yaml clip="$first" "$familiar" \
    train.run_dir="$RUNS/decoder_last" init_from="$RUNS/decoder/model"
# From the familiar emoji to all of them, on a CLIP that went on with natural captions.
stage train_clip.py --config configs/clip/emoji_natural.yaml init_from="$first" "$natural" \
    train.run_dir="$RUNS/clip_natural"
# Its image tower alone then learns other styles, and keeps the embeddings that prior and decoder are trained on; at last half
# of what it sees are the plain pictures, a falling rate's second part.
elsewhere=(train_clip.py --config configs/clip/emoji_elsewhere.yaml init_from="$clip" "$natural" \
    train.run_dir="$RUNS/clip_elsewhere")
[ -f "$RUNS/clip_elsewhere/model/open_clip_config.json" ] || stage "${elsewhere[@]}"
stage "${elsewhere[@]}" train.steps=2550 train.optimizer.lr=6.0e-3 data.augment=false data.restyle=0.5
# And once more, held half as tightly: prior and decoder follow it below.
settled=$RUNS/clip_settled/model
stage train_clip.py --config configs/clip/emoji_settled.yaml init_from="$RUNS/clip_elsewhere/model" "$natural" \
    train.run_dir="$RUNS/clip_settled"
stage train_prior.py --config configs/prior/emoji.yaml clip="$clip" "$natural" train.run_dir="$RUNS/prior"
every="data.sources=[{source: $DATA/emoji_natural, weight: 3}, {source: $DATA/emoji_1024, weight: 1}]"
stage train_decoder.py --config configs/decoder/emoji_64_all.yaml clip="$clip" "$every" \
    train.run_dir="$RUNS/decoder_all" init_from="$RUNS/decoder_last/model"
stage train_decoder.py --config configs/decoder/emoji_64_refined.yaml clip="$clip" "$every" \
    train.run_dir="$RUNS/decoder_refined" init_from="$RUNS/decoder_all/model"
stage train_prior.py --config configs/prior/emoji.yaml clip="$settled" "$natural" train.run_dir="$RUNS/prior_settled" \
    init_from="$RUNS/prior/model" train.steps=400 train.optimizer.lr=5.0e-4 train.seed=6
stage train_decoder.py --config configs/decoder/emoji_64_elsewhere.yaml clip="$settled" "$every" \
    train.run_dir="$RUNS/decoder_elsewhere" init_from="$RUNS/decoder_refined/model"
for size in 64_to_256 256_to_1024; do
    stage train_upsampler.py --config "configs/upsampler/emoji_$size.yaml" "$familiar" \
        train.run_dir="$RUNS/upsampler_${size#*_to_}"
done

bundle() {
    unclip bundle --overwrite --name emoji --license Apache-2.0 --clip "$settled" --prior "$RUNS/prior_settled/model" \
        --decoder "$RUNS/decoder_elsewhere/model" --example-prompts examples/emoji/familiar.txt \
        --card examples/emoji/model_card.md "$@"
}

# The first upsampler goes on with the decoder's own drawings.
drafts() {
    [ -d "$2" ] || unclip drafts --model "$RUNS/draws" --data "$1" --out "$2" --samples "$3"
}
bundle --out "$RUNS/draws"
drafts "$DATA/emoji_natural" "$DATA/emoji_drafts" 3100
drafts "$DATA/emoji_1024" "$DATA/emoji_drafts_familiar" 1320
pairs="data.sources=[{source: $DATA/emoji_drafts, low_column: draft, weight: 2},"
pairs+=" {source: $DATA/emoji_drafts_familiar, low_column: draft, weight: 2},"
pairs+=" {source: $DATA/emoji_natural, weight: 3}, {source: $DATA/emoji_1024, weight: 1}]"
stage train_upsampler.py --config configs/upsampler/emoji_64_to_256_drafts.yaml "$pairs" \
    train.run_dir="$RUNS/upsampler_256_drafts" init_from="$RUNS/upsampler_256/model"

# This model draws single emoji on white; CLIP, prior and decoder go on to scenes.
single=$RUNS/single
bundle --out "$single" --upsampler-256 "$RUNS/upsampler_256_drafts/model" --upsampler-1024 "$RUNS/upsampler_1024/model"
export SOURCE PORT DATA OUT
START="$single" RUNS="$RUNS/scenes" examples/emoji/train_scenes.sh
