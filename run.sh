#!/usr/bin/env bash
# The paper, stage by stage.
#
#   bash run.sh demo          the whole pipeline at toy scale on a CPU, about 5 minutes; sets itself up
#   bash run.sh test [slow]   the tests (with "slow", the long ones alone); sets itself up
#   bash run.sh list          the stages: the rows of the paper's tables each fills, what it needs, its hours
#   bash run.sh               every stage; finished ones are skipped, interrupted ones go on
#   bash run.sh NAME...       one or several
#
# Environment: GPUS (per node, default as found), NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, DATA (data), RESULTS
# (results), OMNI and QWEN2AUDIO (model folders or hub names), URL, GPT and OPENAI_API_KEY (question generation),
# TRAIN, EVAL and GENERATE (more options for train.py, evaluate.py and gen_qa.py), BENCHES and AUDIO (to evaluate on).
set -euo pipefail
cd "$(dirname "$0")"

defaults() {
  : "${DATA:=data}" "${RESULTS:=results}" "${NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
  : "${OMNI:=Qwen/Qwen2.5-Omni-7B}" "${QWEN2AUDIO:=Qwen/Qwen2-Audio-7B-Instruct}"
  : "${URL:=https://api.openai.com/v1/chat/completions}" "${GPT:=gpt-4o-mini}"
  : "${TRAIN:=}" "${EVAL:=}" "${GENERATE:=}" "${AUDIO:=real none}" "${STEPS:=1000}" "${LONG:=2000}" "${KEEP_SHORTEST:=54000}"
  : "${BENCHES:=mmau-mini mmau-mini-v2 mmau-full mmau-full-v2 mmar}"
  VGGSOUND="$DATA/vggsound/audio" AVQA="$DATA/avqa/train_qa.json" ARC="$DATA/arc/ARC-Easy-Train.jsonl"
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}" # time to write a checkpoint
}

# name | fills | needs | hours on 4 x 48 GB (estimates: not measured)
STAGES="
setup|-|Python 3.11, the package index|0.1
fetch|-|the network; says where the rest comes from and counts it|0.1
base-omni|Tables I-IV, Qwen2.5-Omni reproduced|MMAU, MMAR|6
base-qwen2audio|Tables I, III, IV, Qwen2-Audio|MMAU, MMAR|5
omni-avqa|Tables I-IV, Omni-R1 (AVQA)|AVQA, VGGSound clips|18
avqa-gpt|the questions of Omni-R1 (AVQA-GPT)|AudioSetCaps, an API key|1
omni-avqa-gpt|Tables I-III, Omni-R1 (AVQA-GPT)|avqa-gpt, VGGSound clips|18
vggs-gpt|the questions of Omni-R1 (VGGS-GPT)|AudioSetCaps, an API key|4
omni-vggs-gpt|Tables I-III, Omni-R1 (VGGS-GPT)|vggs-gpt, VGGSound clips|30
omni-avqa-noaudio|Table IV|AVQA|12
omni-arc|Table IV|ARC|12
qwen2audio-avqa|Tables I, IV|AVQA, VGGSound clips|17
qwen2audio-avqa-noaudio|Table IV|AVQA|11
qwen2audio-arc|Table IV|ARC|11
report|all tables, learning curves, a page to look at and listen to|results|0.1
"

say() { printf '\n== %s\n' "$*"; }
stages() { cut -d'|' -f1 <<<"$STAGES" | grep .; }

setup() { # the virtual environment, made and filled once
  if ! cmp -s .venv/ready <(cat requirements.txt requirements-dev.txt); then
    local python=python3
    ! command -v python3.11 >/dev/null || python=python3.11
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
    say "installing into .venv (once)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
    cat requirements.txt requirements-dev.txt >.venv/ready
  fi
  PATH="$PWD/.venv/bin:$PATH"
}

gpus() { echo "${GPUS:=$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}"; }

launch() { # torchrun over all GPUs, over several nodes where NODES says so
  if [ "$GPUS" = 1 ] && [ "$NODES" = 1 ]; then python "$@"; return; fi
  python -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
}

train() { # train NAME MODEL QUESTIONS CLIPS [options]: one run of Section IV, then its evaluation
  local name=$1 model=$2 questions=$3 clips=$4 accumulation; shift 4
  if [ ! -d "$RESULTS/$name/model" ]; then
    say "$name: training"
    accumulation=$((8 / (GPUS * NODES))) # 8 questions a step, whatever the number of processes
    launch train.py --model "$model" --data "$questions" --audio_dir "$clips" --out "$RESULTS/$name" \
      --accumulation $((accumulation > 0 ? accumulation : 1)) --replicas "$NODES" --steps "$STEPS" $TRAIN "$@"
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

evaluate() { # evaluate NAME MODEL: every benchmark, with and without audio, with one loading of the model
  local name=$1 model=$2 bench audio out questions clips
  local data=() dirs=() audios=() outs=()
  for bench in $BENCHES; do
    read -r questions clips <<<"$(bench_files "$bench")"
    [ -f "$questions" ] || { echo "$name: no $questions, so $bench is left out (see: bash run.sh fetch)"; continue; }
    for audio in $AUDIO; do
      out="$RESULTS/$name/eval/$bench.$audio.json"
      [ -f "$out" ] || { data+=("$questions"); dirs+=("$clips"); audios+=("$audio"); outs+=("$out"); }
    done
  done
  [ ${#outs[@]} = 0 ] && return
  say "$name: evaluation (${#outs[@]} benchmarks)"
  launch evaluate.py --model "$model" --data "${data[@]}" --audio_dir "${dirs[@]}" --audio "${audios[@]}" --out "${outs[@]}" $EVAL
}

generate() { # generate NAME IDS [options]: captions -> ChatGPT -> questions (Section III-C)
  local name=$1 ids=$2; shift 2
  [ -f "$DATA/$name/done" ] || [ "$NODE_RANK" != 0 ] && return
  say "$name: questions from captions"
  mkdir -p "$DATA/$name"
  python gen_qa.py --captions "$DATA/audiosetcaps/captions.csv" --ids "$ids" --out "$DATA/$name/train_qa.jsonl" \
    --url "$URL" --model "$GPT" $GENERATE "$@"
  touch "$DATA/$name/done"
}

fetch() { # what can be fetched; for the rest the page, the file and its place; then what was found
  [ "$NODE_RANK" = 0 ] || return 0
  mkdir -p "$DATA"/{avqa,arc,mmau/original,mmau/v05.15.25,mmar/audio,audiosetcaps,vggsound/audio}
  get "$DATA/mmar/MMAR-meta.json" https://huggingface.co/datasets/BoJack/MMAR/resolve/main/MMAR-meta.json
  if [ ! -f "$ARC" ] && get "$DATA/arc/arc.zip" https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip; then
    python -c "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); name = next(n for n in z.namelist() if n.endswith('ARC-Easy-Train.jsonl')); open(sys.argv[2], 'wb').write(z.read(name))" "$DATA/arc/arc.zip" "$ARC"
  fi
  need "$ARC" "ARC-Easy-Train.jsonl" https://allenai.org/data/arc
  need "$AVQA" "train_qa.json" https://mn.cs.tsinghua.edu.cn/avqa
  need "$DATA/vggsound/vggsound.csv" "vggsound.csv, and the clips as .wav, .flac, .mp3 or .ogg into $VGGSOUND" https://www.robots.ox.ac.uk/~vgg/data/vggsound
  need "$DATA/audiosetcaps/captions.csv" "the VGGSound captions of AudioSetCaps" https://huggingface.co/datasets/baijs/AudioSetCaps
  for version in original v05.15.25; do
    need "$DATA/mmau/mmau-test-mini-$version.json" "MMAU test-mini ($version) and its clips into $DATA/mmau/$version" https://github.com/Sakshi113/MMAU
    need "$DATA/mmau/mmau-test-$version.json" "MMAU test-full ($version), its clips into the same folder" https://github.com/Sakshi113/MMAU
  done
  need "$DATA/mmar/MMAR-meta.json" "MMAR-meta.json and its clips into $DATA/mmar/audio" https://huggingface.co/datasets/BoJack/MMAR
  count "$AVQA" "$VGGSOUND" "$ARC" - "$(bench_files mmau-mini)" "$(bench_files mmau-mini-v2)" "$(bench_files mmau-full)" \
    "$(bench_files mmau-full-v2)" "$(bench_files mmar)"
}

get() { # get FILE URL: beside the name, then renamed
  [ -f "$1" ] && return
  curl --fail --location --silent --show-error --max-time 600 --output "$1.writing" "$2" && mv "$1.writing" "$1"
}

need() { [ -f "$1" ] || printf 'missing: %s\n  get %s\n  from %s\n' "$1" "$2" "$3"; }

count() { # count FILE CLIPS ...: questions, and clips of theirs that exist
  python - $* <<'PYTHON'
import os, sys
from data import InputError, read_questions
for file, clips in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        questions = read_questions(file, clips) if os.path.exists(file) else []
    except InputError as error:
        print(f"error: {error}")
        continue
    heard = sum(q.audio is not None and os.path.isfile(q.audio) for q in questions)
    print(f"{file}: {len(questions)} questions, {heard} with their clip in {clips}")
PYTHON
}

report() {
  [ "$NODE_RANK" = 0 ] || return 0
  say "report"
  python evaluate.py --report "$RESULTS" >/dev/null
  echo "written: $RESULTS/report.md and $RESULTS/report.html (open it in a browser)"
}

stage() {
  case $1 in
    setup) setup ;;
    fetch) fetch ;;
    base-omni) evaluate base-omni "$OMNI" ;;
    base-qwen2audio) evaluate base-qwen2audio "$QWEN2AUDIO" ;;
    avqa-gpt) generate avqa-gpt "$AVQA" ;;
    vggs-gpt) generate vggs-gpt "$DATA/vggsound/vggsound.csv" --keep_shortest "$KEEP_SHORTEST" ;;
    omni-avqa) train "$1" "$OMNI" "$AVQA" "$VGGSOUND" ;;
    omni-avqa-gpt) train "$1" "$OMNI" "$DATA/avqa-gpt/train_qa.jsonl" "$VGGSOUND" ;;
    omni-vggs-gpt) train "$1" "$OMNI" "$DATA/vggs-gpt/train_qa.shortest.jsonl" "$VGGSOUND" --steps "$LONG" ;;
    omni-avqa-noaudio) train "$1" "$OMNI" "$AVQA" "$VGGSOUND" --no_audio ;;
    omni-arc) train "$1" "$OMNI" "$ARC" "$DATA/arc" --no_audio ;;
    qwen2audio-avqa) train "$1" "$QWEN2AUDIO" "$AVQA" "$VGGSOUND" ;;
    qwen2audio-avqa-noaudio) train "$1" "$QWEN2AUDIO" "$AVQA" "$VGGSOUND" --no_audio ;;
    qwen2audio-arc) train "$1" "$QWEN2AUDIO" "$ARC" "$DATA/arc" --no_audio ;;
    report) report ;;
    *) echo "error: no stage named $1; see: bash run.sh list" >&2; exit 2 ;;
  esac
}

demo() { # the same stages on the tiny world
  : "${SEED:=0}"
  RESULTS="${RESULTS:-results/demo}" GPUS=2 LONG=90 STEPS=60 KEEP_SHORTEST=400 MASTER_PORT="${MASTER_PORT:-29511}"
  DATA="$RESULTS/data" OMNI="$RESULTS/world/omni/model" QWEN2AUDIO="$RESULTS/world/qwen2audio/model" GPT=stand-in
  TRAIN="--lr 5e-4 --max_new_tokens 8 --seed $SEED" EVAL="--max_new_tokens 8"
  export OMP_NUM_THREADS=1
  defaults
  local family file world="../../world/omni"
  for family in omni qwen2audio; do
    [ -d "$RESULTS/world/$family" ] && continue
    say "a tiny $family world (a small model, and questions and clips in the real formats)"
    OMP_NUM_THREADS=2 python tests/tiny.py --out "$RESULTS/world/$family.writing" --family "$family" --seed "$SEED"
    mv "$RESULTS/world/$family.writing" "$RESULTS/world/$family"
  done
  mkdir -p "$DATA"/{avqa,arc,mmau,mmar,audiosetcaps,vggsound}
  for file in avqa/train_qa.json=train_qa.json arc/ARC-Easy-Train.jsonl=arc.jsonl audiosetcaps/captions.csv=captions.csv \
    mmau/mmau-test-mini-original.json=mmau.json mmau/mmau-test-mini-v05.15.25.json=mmau-v05.15.25.json \
    mmau/mmau-test-original.json=mmau-full.json mmau/mmau-test-v05.15.25.json=mmau-full.json mmar/MMAR-meta.json=mmar.jsonl \
    vggsound/audio=audio mmau/original=audio mmau/v05.15.25=audio mmar/audio=audio vggsound/vggsound.csv=vggsound.csv; do
    ln -sfn "$world/${file#*=}" "$DATA/${file%=*}"
  done
  say "questions will come from a stand-in for ChatGPT: tests/chat_server.py"
  rm -f "$RESULTS/server"
  python tests/chat_server.py --port_file "$RESULTS/server" &
  trap 'kill %1 2>/dev/null || true' EXIT
  until [ -s "$RESULTS/server" ]; do sleep 0.1; done
  URL=$(cat "$RESULTS/server")
  BENCHES="mmau-mini mmau-mini-v2 mmau-full mmar"
  for name in $(stages); do stage "$name"; done
  echo
  sed -n '/^### Table IV/,/^###  *All/p' "$RESULTS/report.md" | grep '^[#|]' | grep -v '### All'
  echo "(in parentheses the paper's numbers, of models ten thousand times the size)"
}

defaults_then() { defaults; setup; GPUS=$(gpus); for name in "$@"; do stage "$name"; done; }

case ${1:-all} in
  demo) setup; demo ;;
  test)
    setup
    if [ "${2:-}" = slow ]; then exec python -m pytest -q -m slow; fi
    exec python -m pytest -q
    ;;
  list) (echo "stage|fills|needs|hours"; grep . <<<"$STAGES") | column -t -s '|' ;;
  -h | --help | help) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3- ;;
  all) defaults_then $(stages) ;;
  *) for name in "$@"; do stages | grep -qx "$name" || { echo "error: no stage named $name; see: bash run.sh list" >&2; exit 2; }; done
    defaults_then "$@" ;;
esac
