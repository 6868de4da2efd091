#!/usr/bin/env bash
# Called by run.sh. `demo`: one tiny model before and after 60 steps of AVQA, with and without audio. `demo all`: the
# paper's stages on two tiny worlds: the same `bash run.sh`, with a stand-in for the hub and one for ChatGPT.
# Environment: RESULTS (results/demo, results/demo-all), SEED (0), STEPS (60). On the CPU, whatever card is there.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RESULTS:=results/demo${1:+-$1}}" "${SEED:=0}" "${MASTER_PORT:=$((20000 + $$ % 10000))}" "${STEPS:=60}"
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY "${!HF_@}" "${!TRANSFORMERS_@}" # of the real hub
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR NODES NODE_RANK
say() { printf '\n== %s\n' "$*"; }

make_world() { # make_world FAMILY: a small model, and questions and clips in the real formats
  local world="$RESULTS/world/$1"
  [ ! -d "$world" ] || return 0
  say "a tiny $1 world: clips, questions in the real formats, and a small model that has learned to hear a little (about a minute)"
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" python tests/tiny.py --out "$world.writing" --family "$1" --seed "$SEED"
  mv "$world.writing" "$world"
}

publish() { # publish FILE PLACE: the world's file where `bash run.sh fetch` puts the published one
  mkdir -p "$(dirname "$DATA/$2")"
  ln -sfn "$(realpath "$RESULTS/world/omni/$1")" "$DATA/$2"
}

mkdir -p "$RESULTS"
export RESULTS SEED STEPS MASTER_PORT CUDA_VISIBLE_DEVICES='' HOLD_OUT=40 DATA="$RESULTS/data" FETCH="--limit 1000"
export TRAIN="--lr 2e-4 --max_new_tokens 8 --seed $SEED" EVAL="--max_new_tokens 8"

if [ "${1:-}" != all ]; then
  make_world omni
  publish train_qa.json avqa/train_qa.json
  publish audio avqa/audio
  publish mmau.json mmau/mmau-test-mini-original.json
  publish audio mmau/original
  export OMNI="$RESULTS/world/omni/model" GPUS=1 BENCHES=mmau-mini AUDIO="real none" OMP_NUM_THREADS=2
  say "next: this base answers the benchmark, with and without audio; then $STEPS steps of GRPO on AVQA's questions, reward 1 for
   the right choice; then it answers again. This is what 'bash run.sh base-omni omni-avqa report' does with the 7B."
  bash run.sh base-omni omni-avqa report
  say "what $STEPS steps did to the $(grep -c '"id"' "$RESULTS/base-omni/eval/mmau-mini.real.json") answers, right in %"
  for audio in real none; do
    printf 'audio %s:  ' $audio
    python report.py --compare "$RESULTS"/{base-omni,omni-avqa}/eval/mmau-mini.$audio.json
  done
  cat <<END

The page (curves, answers, clips to listen to): $RESULTS/report.html
To try next:
  bash run.sh demo all   every stage of the paper at this size
  bash run.sh plan       what the real one takes: GB, hours, dollars
  .venv/bin/python train.py --explain --model $OMNI --data $DATA/avqa/train_qa.json --audio_dir $DATA/avqa/audio
                         one question's step, with all its numbers
END
  exit
fi

export OMP_NUM_THREADS=1 # two programs side by side
make_world omni &
make_world qwen2audio
wait $!
serve() { # serve NAME SCRIPT [options]: start it, and wait until it has written its URL
  local file="$RESULTS/$1"
  rm -f "$file"
  python "${@:2}" --port_file "$file" &
  servers+=($!)
  until [ -s "$file" ]; do sleep 0.1; kill -0 $! || exit 2; done
}
servers=()
trap 'kill -- "${servers[@]}" 2>/dev/null || true' EXIT
say "a stand-in for the hub (tests/hub.py) and one for ChatGPT (tests/chat_server.py)"
serve hub tests/hub.py --worlds "$RESULTS/world/omni" "$RESULTS/world/qwen2audio" --root "$RESULTS/world/hub"
serve chat tests/chat_server.py

HF_ENDPOINT=$(cat "$RESULTS/hub") URL=$(cat "$RESULTS/chat") HF_HOME="$(realpath "$RESULTS")/hf"
export HF_ENDPOINT URL HF_HOME HF_HUB_DISABLE_PROGRESS_BARS=1 GPT=stand-in GPUS=1 LONG="${LONG:-70}"
export OMNI=Qwen/Qwen2.5-Omni-7B QWEN2AUDIO=Qwen/Qwen2-Audio-7B-Instruct KEEP_SHORTEST=400
export BENCHES="mmau-mini mmau-mini-v2 mmau-full mmar"
bash run.sh fetch
set -m # the second has a process group of its own, which ends with this one
say "two at a time, each on one core; what the second says: $RESULTS/second.log"
bash run.sh base-qwen2audio qwen2audio-avqa qwen2audio-avqa-noaudio qwen2audio-arc omni-avqa-noaudio omni-arc >"$RESULTS/second.log" 2>&1 &
set +m
servers+=("-$!")
bash run.sh base-omni omni-avqa avqa-gpt omni-avqa-gpt vggs-gpt omni-vggs-gpt omni-avqa-heard
wait $! || { tail "$RESULTS/second.log"; exit 2; }
TRAIN="--lr 2e-3 --max_new_tokens 8 --seed $SEED" GPUS=2 bash run.sh omni-avqa-lora # by torchrun, two processes
bash run.sh # all of the paper: what is finished is skipped
echo
sed -n '/^### Table IV/,$p' "$RESULTS/report.md" | grep '^[#|]'
echo "(in parentheses the paper's numbers, of models ten thousand times the size)"
