#!/usr/bin/env bash
# The paper, stage by stage.
#
#   bash run.sh demo          the whole pipeline at toy scale on a CPU, about 5 minutes; sets itself up
#   bash run.sh test [slow]   the tests (with "slow", the long ones too); sets itself up
#   bash run.sh list          the stages: the rows of the paper's tables each fills, what it needs, its hours
#   bash run.sh               every stage; finished ones are skipped, interrupted ones go on
#   bash run.sh NAME...       one or several
#
# Environment: GPUS (per node, default as found), NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, DATA (data), RESULTS
# (results), OMNI and QWEN2AUDIO (model folders or hub names), URL, GPT and OPENAI_API_KEY (question generation).
set -euo pipefail
cd "$(dirname "$0")"

: "${DATA:=data}" "${RESULTS:=results}" "${NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
: "${OMNI:=Qwen/Qwen2.5-Omni-7B}" "${QWEN2AUDIO:=Qwen/Qwen2-Audio-7B-Instruct}"
: "${URL:=https://api.openai.com/v1/chat/completions}" "${GPT:=gpt-4o-mini}" "${PRICE_IN:=0.15}" "${PRICE_OUT:=0.60}"
: "${TRAIN:=}" "${EVAL:=}" "${GENERATE:=}" # more options for train.py, evaluate.py and gen_qa.py
: "${BENCHES:=mmau-mini mmau-mini-v2 mmau-full mmau-full-v2 mmar}" "${LONG:=2000}" "${KEEP_SHORTEST:=54000}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}" # time to write a checkpoint

# name | fills | needs | hours on 4 x 48 GB (estimates; not measured)
STAGES="
setup|-|Python 3.11, the package index|0.1
fetch|-|ARC, and MMAU's and MMAR's questions; says where the rest comes from|0.1
base-omni|Tables I-IV, Qwen2.5-Omni reproduced|MMAU, MMAR|3
base-qwen2audio|Table IV, Qwen2-Audio|MMAU|1
omni-avqa|Tables I-IV, Omni-R1 (AVQA)|AVQA, VGGSound clips|12
avqa-gpt|-|AudioSetCaps, an API key|1
omni-avqa-gpt|Tables I-III, Omni-R1 (AVQA-GPT)|avqa-gpt, VGGSound clips|12
vggs-gpt|-|AudioSetCaps, an API key|4
omni-vggs-gpt|Tables I-III, Omni-R1 (VGGS-GPT)|vggs-gpt, VGGSound clips|22
omni-avqa-noaudio|Table IV|AVQA|9
omni-arc|Table IV|ARC|9
qwen2audio-avqa|Table IV|AVQA, VGGSound clips|12
qwen2audio-avqa-noaudio|Table IV|AVQA|9
qwen2audio-arc|Table IV|ARC|9
report|all tables, learning curves, a page to look at and listen to|results|0.1
"

say() { printf '\n== %s\n' "$*"; }

python_here() { # the virtual environment, made and filled once
  if [ ! -f .venv/ready ] || ! cmp -s .venv/ready <(cat requirements.txt requirements-dev.txt); then
    local python=python3
    command -v python3.11 >/dev/null && python=python3.11
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
    say "installing into .venv (once)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
    cat requirements.txt requirements-dev.txt >.venv/ready
  fi
  PATH="$PWD/.venv/bin:$PATH"
}

gpus() { echo "${GPUS:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}"; }

launch() { # torchrun over all GPUs, over several nodes where NODES says so
  local processes; processes=$(gpus)
  if [ "$processes" = 1 ] && [ "$NODES" = 1 ]; then python "$@"; return; fi
  python -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$processes" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
}

train() { # train NAME MODEL QUESTIONS CLIPS [options]: one run of Section IV
  local name=$1 model=$2 questions=$3 clips=$4; shift 4
  if [ ! -d "$RESULTS/$name/model" ]; then
    say "$name: training"
    # 8 questions a step, whatever the number of processes
    launch train.py --model "$model" --data "$questions" --audio_dir "$clips" --out "$RESULTS/$name" \
      --accumulation $((8 / $(gpus) / NODES > 0 ? 8 / $(gpus) / NODES : 1)) --replicas "$NODES" "$@" $TRAIN
  fi
  evaluate "$name" "$RESULTS/$name/model"
}

bench_files() { # bench -> its questions and its clips
  case $1 in
    mmau-mini) echo "$DATA/mmau/mmau-test-mini-original.json $DATA/mmau/original" ;;
    mmau-mini-v2) echo "$DATA/mmau/mmau-test-mini-v05.15.25.json $DATA/mmau/v05.15.25" ;;
    mmau-full) echo "$DATA/mmau/mmau-test-original.json $DATA/mmau/original" ;;
    mmau-full-v2) echo "$DATA/mmau/mmau-test-v05.15.25.json $DATA/mmau/v05.15.25" ;;
    mmar) echo "$DATA/mmar/MMAR-meta.json $DATA/mmar/audio" ;;
  esac
}

evaluate() { # evaluate NAME MODEL: every benchmark with audio, MMAU's original test-mini without as well
  local name=$1 model=$2 bench audio out questions clips
  for bench in $BENCHES; do
    for audio in real none; do
      [ "$audio" = none ] && [ "$bench" != mmau-mini ] && continue
      case $name in *qwen2audio*) [ "$bench" != mmau-mini ] && continue ;; esac # Table IV only
      out="$RESULTS/$name/eval/$bench.$audio.json"
      [ -f "$out" ] && continue
      read -r questions clips <<<"$(bench_files "$bench")"
      say "$name: $bench, audio $audio"
      mkdir -p "$RESULTS/$name/eval"
      launch evaluate.py --model "$model" --data "$questions" --audio_dir "$clips" --audio "$audio" --out "$out" $EVAL
    done
  done
}

generate() { # generate NAME IDS [options]: captions -> ChatGPT -> questions (Section III-C)
  local name=$1 ids=$2; shift 2
  [ -f "$DATA/$name/done" ] && return
  say "$name: questions from captions"
  mkdir -p "$DATA/$name"
  python gen_qa.py --captions "$DATA/audiosetcaps/captions.csv" --ids "$ids" --out "$DATA/$name/train_qa.json" \
    --url "$URL" --model "$GPT" --price_in "$PRICE_IN" --price_out "$PRICE_OUT" "$@" $GENERATE
  touch "$DATA/$name/done"
}
