#!/usr/bin/env bash
# The paper, from an empty disk to its tables.
#
#   bash run.sh               every stage of the paper: fetch, base, ..., report; what is finished is skipped
#   bash run.sh NAME...       one stage or several; `fetch` fetches what the others named with it need
#   bash run.sh plan [NAME...]  what it will take: GB, hours, dollars; refuses where the disk is too small
#   bash run.sh list          the stages and the rows of the paper's tables that each fills
#   bash run.sh demo          one run at toy scale on a CPU, before and after, in 3 minutes; sets itself up
#   bash run.sh demo all      every stage of the paper at toy scale, in about 6 minutes
#   bash run.sh test [slow | gpu] [options]   the tests; sets itself up
#
# Environment: GPUS (per node, default as found), NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, DATA (data), RESULTS
# (results), OMNI and QWEN2AUDIO (model folders or hub names; what is not the paper's has its results in RESULTS/ITS-NAME/),
# URL, GPT and OPENAI_API_KEY (question generation), FETCH, TRAIN, EVAL and GENERATE (more options for the four programs),
# BENCHES and AUDIO (to evaluate on), PROMPT, STEPS (1000) and LONG (2000, of VGGS-GPT), KEEP_SHORTEST (questions of it),
# HOLD_OUT (200 questions of each training set, chosen by their id, are scored meanwhile and not learned from). Relative
# DATA and RESULTS are the caller's.

# shellcheck disable=SC2034,SC2046,SC2086,SC2016  # the lists below are made to be split into words, and evaluated
set -euo pipefail
for place in DATA RESULTS OMNI QWEN2AUDIO; do # relative to the folder that the caller is in, models where they are folders
  case ${!place:-/} in /*) ;; *) [[ $place != [DR]* && ! -d ${!place} ]] || printf -v "$place" %s "$PWD/${!place}" ;; esac
done
cd "$(dirname "$0")"
: "${DATA:=data}" "${RESULTS:=results}" "${NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
: "${OMNI:=Qwen/Qwen2.5-Omni-7B}" "${QWEN2AUDIO:=Qwen/Qwen2-Audio-7B-Instruct}" "${AUDIO:=real none}" "${PROMPT:=direct}"
: "${URL:=https://api.openai.com/v1/chat/completions}" "${GPT:=gpt-4o-mini}" "${FETCH:=}" "${TRAIN:=}" "${EVAL:=}" "${GENERATE:=}"
: "${STEPS:=1000}" "${LONG:=2000}" "${KEEP_SHORTEST:=54000}" "${HOLD_OUT:=200}" "${BENCHES:=mmau-mini mmau-mini-v2 mmau-full mmau-full-v2 mmar}"
AVQA=("$DATA/avqa/train_qa.json" "$DATA/avqa/audio") ARC=("$DATA/arc/ARC-Easy-Train.jsonl" "$DATA/arc")
CAPTIONS=("$DATA/audiosetcaps/VGGSound_AudioSetCaps_caption.csv" "$DATA/audiosetcaps/VGGSound_Qwen-Audio_Q&A.csv")
export PYTHONDONTWRITEBYTECODE= # or every start would compile what it imports
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}" # time to write a checkpoint

# name | fills | needs, beside the benchmarks | command. The last six run by name alone: the authors did not run them.
STAGES='
fetch|data/, from the hub||fetch
base-omni|Tables I-IV, Qwen2.5-Omni reproduced|$OMNI|evaluate "$OMNI"
base-qwen2audio|Tables I, III, IV, Qwen2-Audio|$QWEN2AUDIO|evaluate "$QWEN2AUDIO"
omni-avqa|Tables I-IV, Omni-R1 (AVQA)|$OMNI avqa|train "$OMNI" "${AVQA[@]}"
avqa-gpt|questions from captions of AVQA|audiosetcaps avqa|generate "${AVQA[0]}"
omni-avqa-gpt|Tables I-III, Omni-R1 (AVQA-GPT)|$OMNI audiosetcaps avqa|train "$OMNI" "$DATA/avqa-gpt/train_qa.jsonl" "${AVQA[1]}"
vggs-gpt|questions from captions of VGGSound|audiosetcaps vggsound|generate "$DATA/vggsound/vggsound.csv" --keep_shortest $KEEP_SHORTEST
omni-vggs-gpt|Tables I-III, Omni-R1 (VGGS-GPT)|$OMNI audiosetcaps vggsound|train "$OMNI" "$DATA/vggs-gpt/train_qa.shortest.jsonl" "$DATA/vggsound/audio" --steps $LONG
omni-avqa-noaudio|Table IV|$OMNI avqa|train "$OMNI" "${AVQA[@]}" --no_audio
omni-arc|Table IV|$OMNI arc|train "$OMNI" "${ARC[@]}" --no_audio
qwen2audio-avqa|Tables I, IV|$QWEN2AUDIO avqa|train "$QWEN2AUDIO" "${AVQA[@]}"
qwen2audio-avqa-noaudio|Table IV|$QWEN2AUDIO avqa|train "$QWEN2AUDIO" "${AVQA[@]}" --no_audio
qwen2audio-arc|Table IV|$QWEN2AUDIO arc|train "$QWEN2AUDIO" "${ARC[@]}" --no_audio
report|all tables, learning curves, a page to look at and listen to||report
omni-audiomcq|not in the paper: trained on AudioMCQ|$OMNI audiomcq|train "$OMNI" "$DATA/audiomcq/data.jsonl" "$DATA/audiomcq"
omni-avqa-heard|not in the paper: AVQA without what silence gets right|$OMNI avqa|heard "$OMNI" "${AVQA[@]}"
omni-avqa-lora|not in the paper: low-rank, one card is enough|$OMNI avqa|train "$OMNI" "${AVQA[@]}" --lora 64 --lr 1e-5
qwen2audio-r1aqa|beside Table I, R1-AQA: its prompt|$QWEN2AUDIO avqa|PROMPT=answer train "$QWEN2AUDIO" "${AVQA[@]}"
base-omni-think|beside Table I, zero-shot chain of thought|$OMNI|PROMPT=think evaluate "$OMNI" --max_new_tokens 512
base-qwen2audio-think|beside Table I, zero-shot chain of thought|$QWEN2AUDIO|PROMPT=think evaluate "$QWEN2AUDIO" --max_new_tokens 512
'
field() { # NAME COLUMN; a name is itself, not a pattern
  local row
  while read -r row; do [ "${row%%|*}" != "$1" ] || cut -d'|' -f"$2" <<<"$row"; done <<<"$STAGES"
}
paper() { sed '/^report|/q' <<<"$STAGES" | cut -d'|' -f1 | grep .; }
say() { printf '\n== %s\n' "$*"; }

install() { # install FILE: its packages into .venv, once
  ! cmp -s ".venv/$1" "$1" || return 0
  local python=python3
  ! command -v python3.11 >/dev/null || python=python3.11
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
  say "installing $1 into .venv (once)"
  "$python" -m venv .venv
  # What is imported is compiled then, once: all of it now would be a minute more.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r "$1"
  cp "$1" .venv
}
setup() {
  install requirements.txt
  PATH="$PWD/.venv/bin:$PATH"
}

launch() { # torchrun over all GPUs, over several nodes where NODES says so
  if [ "$GPUS" = 1 ] && [ "$NODES" = 1 ]; then python "$@"; return; fi
  python -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
}

fetch() { # what the stages asked for need, where the disk has room for it
  local name
  if [ "$NODE_RANK" != 0 ]; then # the nodes share the disk
    for name in $(needs); do
      until [ -n "$PLAN" ] || [[ $name = */* ]] || [ -d "$name" ] || [ -f "$DATA/$name/complete.json" ]; do sleep 5; done
    done
    return
  fi
  python fetch.py --plan --data "$DATA" $FETCH $(needs)
  [ -n "$PLAN" ] || python fetch.py --data "$DATA" $FETCH $(needs)
}

needs() { # the sets, and the models that are not folders here
  local name OMNI=$OMNI QWEN2AUDIO=$QWEN2AUDIO
  [ ! -d "$OMNI" ] || OMNI=
  [ ! -d "$QWEN2AUDIO" ] || QWEN2AUDIO=
  for name in $ASKED; do eval echo "$(field "$name" 3) $BENCHES"; done | tr ' ' '\n' | sed '/^\//d; /^$/d' | sort -u
}

place() { # the stage's folder: of a model that is not the paper's in one of the model's name, beside no number of the paper's
  local model=$OMNI
  [[ $NAME != *qwen2audio* ]] || model=$QWEN2AUDIO
  [ ! -d "$model" ] || model=$(cd -- "$model" && pwd)
  model=$(basename -- "$model")
  case $model in
    Qwen2.5-Omni-7B | Qwen2-Audio-7B-Instruct | model) echo "$NAME" ;; # `model`, of a run or the tiny world, says nothing
    *) echo "$model/$NAME" ;;
  esac
}

train() { # train MODEL QUESTIONS CLIPS [options]: one run of Section IV, then its evaluation
  local model=$1 questions=$2 clips=$3 out="$RESULTS/$(place)" processes=$((GPUS * NODES)) batch; shift 3
  batch=$(((8 + processes - 1) / processes * processes))
  [ $batch = 8 ] || echo "$NAME: --batch $batch, since $processes processes cannot share the paper's 8 questions evenly"
  set -- train.py --model "$model" --data "$questions" --audio_dir "$clips" --out "$out" --batch $batch --prompt "$PROMPT" \
    --replicas "$NODES" --steps "$STEPS" --hold_out "$HOLD_OUT" "$@" $TRAIN
  if [ -n "$PLAN" ]; then
    echo "$NAME: $(python "$@" --plan --world_size $processes | tail -n 1); the hours of its evaluation are not counted"
    return
  fi
  any_bench
  if [ ! -d "$out/model" ]; then
    say "$NAME: training"
    launch "$@"
  fi
  evaluate "$out/model"
}

heard() { # heard MODEL QUESTIONS CLIPS: as many steps on the questions alone that the model, hearing silence, gets wrong
  local model=$1 questions=$2 clips=$3 folder="$DATA/$(place)"
  if [ -z "$PLAN" ]; then
    any_bench
    if [ ! -f "$folder/never.jsonl" ]; then
      say "$NAME: which questions need the audio"
      launch evaluate.py --model "$model" --data "$questions" --audio_dir "$clips" --audio silence --prompt "$PROMPT" \
        --out "$folder/silence.json" $EVAL
      [ "$NODE_RANK" != 0 ] || python report.py --split "$folder/silence.json" --out "$folder"
      until [ -f "$folder/never.jsonl" ]; do sleep 5; done
    fi
    questions="$folder/never.jsonl"
  fi
  train "$model" "$questions" "$clips"
}

bench_files() { # bench -> its questions|its clips
  case $1 in
    mmau-mini) echo "$DATA/mmau/mmau-test-mini-original.json|$DATA/mmau/original" ;;
    mmau-mini-v2) echo "$DATA/mmau/mmau-test-mini-v05.15.25.json|$DATA/mmau/v05.15.25" ;;
    mmau-full) echo "$DATA/mmau/mmau-test-original.json|$DATA/mmau/original" ;;
    mmau-full-v2) echo "$DATA/mmau/mmau-test-v05.15.25.json|$DATA/mmau/v05.15.25" ;;
    mmar) echo "$DATA/mmar/MMAR-meta.json|$DATA/mmar/audio" ;;
  esac
}

any_bench() { # fails, before hours of training and not after, where no benchmark has its questions
  local bench questions clips
  for bench in $BENCHES; do
    IFS='|' read -r questions clips <<<"$(bench_files "$bench")"
    [ ! -f "$questions" ] || return 0
  done
  echo "error: $NAME: no questions of $BENCHES in $DATA; first: bash run.sh fetch $NAME" >&2
  exit 2
}

evaluate() { # evaluate MODEL [options]: every benchmark, with and without audio, with one loading of the model
  local model=$1 bench audio out questions clips wanted=(); shift
  [ -z "$PLAN" ] || { echo "$NAME: an evaluation, whose hours are not counted"; return; }
  any_bench
  for bench in $BENCHES; do
    IFS='|' read -r questions clips <<<"$(bench_files "$bench")"
    [ -f "$questions" ] || { echo "$NAME: no $questions, so $bench is left out (see: bash run.sh fetch)"; continue; }
    for audio in $AUDIO; do
      out="$RESULTS/$(place)/eval/$bench.$audio.json"
      if [ -f "$out" ] && grep -qs '"unanswered": {}' "${out%.json}.meta"; then continue; fi # else what is missing is asked again
      wanted+=(--and --data "$questions" --audio_dir "$clips" --audio "$audio" --bench "$bench" --out "$out")
    done
  done
  [ ${#wanted[@]} != 0 ] || return 0
  say "$NAME: evaluation"
  launch evaluate.py --model "$model" --prompt "$PROMPT" "$@" $EVAL "${wanted[@]:1}"
}

generate() { # generate IDS [options]: captions -> ChatGPT -> questions (Section III-C)
  local ids=$1 done="$DATA/$NAME/done"; shift
  set -- gen_qa.py --captions "${CAPTIONS[@]}" --ids "$ids" --out "$DATA/$NAME/train_qa.jsonl" --url "$URL" --model "$GPT" $GENERATE "$@"
  if [ -n "$PLAN" ]; then
    ls "$ids" "${CAPTIONS[@]}" >/dev/null 2>&1 || { echo "$NAME: its price is known once its captions are fetched"; return; }
    python "$@" --dry_run | grep -i price
  elif [ "$NODE_RANK" != 0 ]; then
    until [ -f "$done" ]; do sleep 5; done
  elif [ ! -f "$done" ]; then
    say "$NAME: questions from captions"
    mkdir -p "$DATA/$NAME"
    python "$@"
    touch "$done"
  fi
}

report() {
  [ "$NODE_RANK" = 0 ] && [ -z "$PLAN" ] || return 0
  say "report"
  python report.py "$RESULTS" >/dev/null
  echo "written: $RESULTS/report.md and $RESULTS/report.html (open it in a browser)"
}

run() { # run NAME...
  ASKED=$*
  for NAME in "$@"; do [ -n "$(field "$NAME" 1)" ] || { echo "error: no stage named $NAME; see: bash run.sh list" >&2; exit 2; }; done
  [ "$ASKED" != fetch ] || ASKED=$(paper)
  setup
  : "${GPUS:=$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}"
  trap '[ $? = 0 ] || echo "error: $NAME stopped, its reason stands above; once that is mended, the same command goes on" >&2' EXIT
  for NAME in "$@"; do eval "$(field "$NAME" 4)"; done
}

PLAN=
case ${1-all} in
  all) run $(paper) ;;
  plan) PLAN=1; run fetch $(if [ $# = 1 ]; then paper | sed 1d; else echo "${@:2}"; fi) ;;
  list) (echo "stage|fills|needs"; cut -d'|' -f1-3 <<<"$STAGES" | grep .) | column -t -s '|' ;;
  demo) setup; exec bash tests/demo.sh "${@:2}" ;;
  setup)
    setup
    install requirements-dev.txt
    ;;
  test)
    setup
    install requirements-dev.txt
    [ -d "${TMPDIR:-/tmp}/omni-r1-tiny-$(id -u)" ] || say "the tiny worlds are made first, once: a minute or two more"
    case ${2:-} in
      slow) exec python -m pytest -q -n 2 --dist loadfile -m slow "${@:3}" ;;
      gpu) exec python tests/gpu.py "${@:3}" ;;
      *) exec python -m pytest -q -n 2 --dist loadfile "${@:2}" ;;
    esac
    ;;
  -h | --help | help) sed -n '2,/^$/p' "$0" | cut -c3- ;;
  *) run "$@" ;;
esac
