# What the recipes of this folder share; they source it.
SOURCE=${SOURCE:?set SOURCE to the folder that holds svg/ and metadata.jsonl, see examples/emoji/README.md}
SOURCE=$(cd "$SOURCE" && pwd)
PORT=${PORT:-29500} # where deepspeed's processes meet; another one for a second run on this machine
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -x .venv/bin/deepspeed ] && PATH="$PWD/.venv/bin:$PATH"

stage() {
    printf '\n== %s\n' "$*"
    deepspeed --master_port "$PORT" "$@"
}
