#!/usr/bin/env bash
# The second half of train.sh, which calls it: a model of single emoji goes on to scenes of a few things.
#   SOURCE=my/noto-emoji examples/emoji/train_scenes.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA=${DATA:-data}                # the rendered data sets; two of them are train.sh's
RUNS=${RUNS:-runs/emoji/scenes}   # run folders
START=${START:-runs/emoji/single} # the model to begin with
OUT=${OUT:-runs/emoji/model}      # the finished model

python examples/emoji/prepare.py --source "$SOURCE" --size 256 --captions natural --out "$DATA/emoji_natural"
python examples/emoji/prepare.py --source "$SOURCE" --size 1024 --out "$DATA/emoji_1024" \
    --names examples/emoji/familiar.txt
render() { # THINGS OUT COUNT ...
    python examples/emoji/scenes.py --source "$SOURCE" --names "examples/emoji/$1" --tidy --out "$DATA/$2" --count "$3" "${@:4}"
}
render scene_things.txt emoji_scenes_alike 60000 --alike 8
render scene_things.txt emoji_scenes 200000
render scene_things_many.txt emoji_scenes_many_alike 60000 --alike 8 --seed 1
render scene_things_many.txt emoji_scenes_many 100000
render scene_things.txt emoji_scenes_256 4000 --size 256 --seed 31

# Both towers of the CLIP learn scenes: by families alone, with others among them, and with more things.
single="source: $DATA/emoji_natural, restyle: 0.4"
streamed="streaming: true, cache: false"
scene() { printf '{source: %s, weight: %s, %s, plain: false}' "$DATA/emoji_scenes$1" "$2" "$streamed"; }
stage train_clip.py --config configs/clip/emoji_scenes.yaml init_from="$START" train.run_dir="$RUNS/clip" \
    data.sources="[{$single, weight: 1}, $(scene _alike 1)]"
stage train_clip.py --config configs/clip/emoji_scenes_more.yaml init_from="$RUNS/clip/model" \
    train.run_dir="$RUNS/clip_more" data.sources="[{$single, weight: 3}, $(scene _alike 3), $(scene "" 4)]"
stage train_clip.py --config configs/clip/emoji_scenes_more.yaml init_from="$RUNS/clip_more/model" \
    train.run_dir="$RUNS/clip_many" train.steps=750 train.seed=9 train.optimizer.lr=1.0e-3 \
    data.sources="[{$single, weight: 4}, $(scene _alike 1), $(scene "" 1), $(scene _many_alike 2), $(scene _many 2)]"

# Prior and decoder follow, in two stretches each: the second on the CLIP that knows more things.
scenes="source: $DATA/emoji_scenes, $streamed"
prior() { # RUN CLIP ...
    stage train_prior.py --config configs/prior/emoji_scenes.yaml train.run_dir="$RUNS/$1" clip="$RUNS/$2/model" \
        data.sources="[{source: $DATA/emoji_natural, weight: 1}, {$scenes, weight: 1}]" "${@:3}"
}
shares=(3 1 6) # of all emoji, of the familiar ones, of scenes
restyle=0.3    # of the pictures of emoji
decoder() { # RUN CLIP ...
    local every="{source: $DATA/emoji_natural, weight: ${shares[0]}, restyle: $restyle}"
    local familiar="{source: $DATA/emoji_1024, weight: ${shares[1]}, restyle: $restyle}"
    stage train_decoder.py --config configs/decoder/emoji_64_scenes.yaml train.run_dir="$RUNS/$1" clip="$RUNS/$2/model" \
        data.sources="[$every, $familiar, {$scenes, weight: ${shares[2]}}]" "${@:3}"
}
prior prior clip_more init_from="$START"
prior prior_more clip_many init_from="$RUNS/prior/model" train.steps=1700 train.precision=bfloat16
decoder decoder clip_more init_from="$START"
decoder decoder_more clip_many init_from="$RUNS/decoder/model" model.embedding_hidden=768 train.steps=2300 train.seed=14

# What no reader finds in an embedding stands in the words: the decoder is taught to read them, and learns to trust them.
taught=$RUNS/taught
[ -e "$taught" ] || python examples/emoji/teach_words.py --decoder "$RUNS/decoder_more/model" --clip "$RUNS/clip_many/model" \
    --data "$DATA/emoji_scenes" --out "$taught"
decoder decoder_words clip_many init_from="$taught" model.drop_embedding=0.4 model.drop_text=0.2 train.steps=1100 train.seed=17
shares=(4 1.5 4.5)
decoder decoder_last clip_many init_from="$RUNS/decoder_words/model" model.drop_embedding=0.3 model.drop_text=0.3 \
    model.guidance_text=2.0 train.steps=2050 train.seed=18

# Pictures from elsewhere, those that are hardest to recognise: the CLIP's image tower learns line drawings and other colours
# without moving much of what prior and decoder know, the prior what did move, and the decoder what it makes of them. Twice:
# after the first stretch none of the three had levelled off, and turned pictures had lost by it.
clip_styles() { # RUN START ...
    stage train_clip.py --config configs/clip/emoji_styles.yaml init_from="$RUNS/$2/model" train.run_dir="$RUNS/$1" \
        data.sources="[{source: $DATA/emoji_natural, weight: 8, restyle: 0.8}, \
    {source: $DATA/emoji_scenes_alike, weight: 1, $streamed}, {$scenes, weight: 1}]" "${@:3}"
}
short=(train.steps=400 train.precision=bfloat16 train.optimizer.lr=6.0e-4)
words=(model.drop_embedding=0.2 model.drop_text=0.3 model.guidance_text=2.0)
clip_styles clip_styles clip_many
prior prior_styles clip_styles init_from="$RUNS/prior_more/model" "${short[@]}" train.seed=20
shares=(5.5 2 2.5)
decoder decoder_styles clip_styles init_from="$RUNS/decoder_last/model" "${words[@]}" \
    data.restyle_weights="{palette: 2, fine_lines: 3}" train.steps=1450 train.seed=19
clip_styles clip_styles_more clip_styles train.steps=2000 train.seed=21 \
    data.restyle_weights="{palette: 3, fine_lines: 6, turned: 3}"
prior prior_styles_more clip_styles_more init_from="$RUNS/prior_styles/model" "${short[@]}" train.seed=22
shares=(5 1.5 3.5) restyle=0.5
decoder decoder_styles_more clip_styles_more init_from="$RUNS/decoder_styles/model" "${words[@]}" \
    data.restyle_weights="{palette: 2, fine_lines: 3, turned: 2}" train.steps=1500 train.seed=23

bundle() {
    unclip bundle --overwrite --name emoji --license Apache-2.0 --clip "$RUNS/clip_styles_more/model" \
        --prior "$RUNS/prior_styles_more/model" --decoder "$RUNS/decoder_styles_more/model" \
        --example-prompts examples/emoji/familiar.txt --card examples/emoji/model_card.md "$@"
}

# The first upsampler goes on with what this decoder draws, scenes among it, whose glow and grain it knew nothing of.
drafts() { # SOURCE OUT COUNT SEED
    [ -d "$DATA/$2" ] || unclip drafts --model "$RUNS/draws" --data "$DATA/$1" --out "$DATA/$2" --samples "$3" --seed "$4" \
        --max-error 30
}
bundle --out "$RUNS/draws"
drafts emoji_natural emoji_drafts_last 4650 0
drafts emoji_1024 emoji_drafts_last_familiar 1320 7000
drafts emoji_scenes_256 emoji_drafts_scenes 4000 0
upsampler() { # RUN START SHARE ...
    local own="low_column: draft, weight"
    stage train_upsampler.py --config configs/upsampler/emoji_64_to_256_drafts.yaml train.run_dir="$RUNS/$1" init_from="$2" \
        data.sources="[{source: $DATA/emoji_drafts_last, $own: 2}, {source: $DATA/emoji_drafts_last_familiar, $own: 1.5}, \
    {source: $DATA/emoji_drafts_scenes, $own: $3}, {source: $DATA/emoji_natural, weight: 3.5}, \
    {source: $DATA/emoji_1024, weight: 1.5}, {source: $DATA/emoji_scenes_256, weight: 1}]" "${@:4}"
}
upsampler upsampler_256 "$START/upsampler_256" 2.5 train.steps=1500 train.seed=25
upsampler upsampler_256_more "$RUNS/upsampler_256/model" 4 train.steps=1100 train.seed=27

bundle --upsampler-256 "$RUNS/upsampler_256_more/model" --upsampler-1024 "$START/upsampler_1024" --out "$OUT"
unclip fit-pca --overwrite --model "$OUT" --data "$DATA/emoji_natural" --samples 1550
python examples/emoji/evaluate.py --data "$DATA/emoji_natural" --model "$OUT" --names 0 --sheet "$RUNS/sheet.png"
python examples/emoji/measure.py --data "$DATA/emoji_natural" --source "$SOURCE" --model "$OUT" --out "$RUNS/figures"
