#!/usr/bin/env bash
# The paper's stages on two tiny worlds: the same `bash run.sh`, with a stand-in for the hub and one for ChatGPT.
# Environment: RESULTS (results/demo), SEED (0). Called by `bash run.sh demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RESULTS:=results/demo}" "${SEED:=0}" "${MASTER_PORT:=$((20000 + $$ % 10000))}"
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY "${!HF_@}" "${!TRANSFORMERS_@}" # of the real hub
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR NODES NODE_RANK
mkdir -p "$RESULTS"
worlds=()
for family in omni qwen2audio; do
  world="$RESULTS/world/$family"
  worlds+=("$world")
  [ -d "$world" ] && continue
  printf '\n== a tiny %s world: a small model, and questions and clips in the real formats\n' "$family"
  OMP_NUM_THREADS=2 python tests/tiny.py --out "$world.writing" --family "$family" --seed "$SEED"
  mv "$world.writing" "$world"
done

serve() { # serve NAME SCRIPT [options]: start it, and wait until it has written its URL
  local file="$RESULTS/$1"
  rm -f "$file"
  python "${@:2}" --port_file "$file" &
  servers+=($!)
  until [ -s "$file" ]; do sleep 0.1; kill -0 $! || exit 2; done
}
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
printf '\n== a stand-in for the hub (tests/hub.py) and one for ChatGPT (tests/chat_server.py)\n'
serve hub tests/hub.py --worlds "${worlds[@]}" --root "$RESULTS/world/hub"
serve chat tests/chat_server.py

export RESULTS MASTER_PORT DATA="$RESULTS/data" HF_HOME="$(realpath "$RESULTS")/hf" HF_HUB_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
HF_ENDPOINT=$(cat "$RESULTS/hub") URL=$(cat "$RESULTS/chat")
export HF_ENDPOINT URL GPT=stand-in OMNI=Qwen/Qwen2.5-Omni-7B QWEN2AUDIO=Qwen/Qwen2-Audio-7B-Instruct
export GPUS=2 STEPS="${STEPS:-60}" LONG="${LONG:-70}" KEEP_SHORTEST=400 HOLD_OUT=40 RESERVE=1 BENCHES="mmau-mini mmau-mini-v2 mmau-full mmar"
export FETCH="--limit 1000" TRAIN="--lr 5e-4 --max_new_tokens 8 --seed $SEED" EVAL="--max_new_tokens 8"
bash run.sh
TRAIN="--lr 2e-3 --max_new_tokens 8 --seed $SEED" bash run.sh omni-avqa-lora report
echo
sed -n '/^### Table IV/,/^###  *All/p' "$RESULTS/report.md" | grep '^[#|]' | grep -v '### All'
echo "(in parentheses the paper's numbers, of models ten thousand times the size)"
