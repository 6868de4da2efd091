"""Greedy answers to a benchmark -> predictions in its own format -> accuracies and the paper's tables.

    python evaluate.py --model M --data mmau-test-mini.json --audio_dir clips --out P.json [--audio none]
    torchrun --nproc_per_node 4 evaluate.py ...                  (spread over GPUs; the same answers)
    python evaluate.py --url http://host/v1/chat/completions --model NAME --data F --audio_dir D --out P.json
    python evaluate.py --score P.json | --compare A.json B.json | --report results

Interrupted, the same command goes on with what is not answered yet. Batches are formed from the whole sorted
list before any work, so that neither this nor the number of processes can change an answer; P.meta records
the batch size, which in bfloat16 can. A clip that cannot be read is named, unanswered, and counted as wrong.
"""

import argparse
import base64
import io
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from chat import ChatClient, Refused, Unreachable
from data import check_clip, load_audio, prompt_text, read_questions, read_rows
from files import InputError, parse_json, write_text
from model import load_model
from report import compare, report, summary_lines
from reward import string_match
from weights import start_processes

log = logging.getLogger("omni_r1")

RECORDED = ["model", "url", "data", "audio_dir", "audio", "orders", "batch_size", "max_new_tokens", "dtype"]
RECORDED += ["seed"]  # in P.meta: what the predictions depend on


class Jobs:
    """A Dataset of batches: every question in every order, sorted by length and cut into batches.

    Item b is [((question's number, order), the question as asked, its Prompt, why there is none), ...], or
    with the samples that are heard in place of the Prompt where no `prompts` encode it.
    """

    def __init__(self, questions, args, prompts=None):
        self.questions, self.audio, self.seed, self.prompts = questions, args.audio, args.seed, prompts
        self.reasons = {}  # clip -> why it cannot be read
        if args.audio != "none":
            clips = {question.audio for question in questions if question.audio is not None}
            self.reasons = {clip: why for clip in sorted(clips) if (why := check_clip(clip))}
        jobs = [(i, order) for order in range(args.orders) for i in range(len(questions))]
        lengths = [self.length(question) for question in questions]
        jobs.sort(key=lambda job: (lengths[job[0]], job))
        self.batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]

    def length(self, question):
        """About how many tokens the prompt has: 25 for a second, one for four characters."""
        seconds = 0
        if self.audio != "none" and question.audio is not None and question.audio not in self.reasons:
            seconds = soundfile.info(question.audio).duration
        return round(25 * seconds) + len(prompt_text(question)) // 4

    def asked(self, i, order):
        """(samples, None); (None, None) where nothing is to be heard; (None, why the clip cannot be read)."""
        question = self.questions[i]
        if order == 0:
            return question
        shuffled = np.random.default_rng([self.seed, i, order]).permutation(len(question.choices))
        return replace(question, choices=tuple(question.choices[j] for j in shuffled))

    def clip(self, i):
        """The clip that question i is asked with: its own, or with --audio swap that of another question."""
        own = self.questions[i].audio
        if self.audio == "swap" and own is not None:
            for j in np.random.default_rng([self.seed, i]).permutation(len(self.questions)):
                other = self.questions[j].audio
                if other not in (None, own) and other not in self.reasons:
                    return other
        return own

    def heard(self, i):
        """(samples or None where nothing is to be heard, None), or (None, why the clip cannot be read)."""
        clip = None if self.audio == "none" else self.clip(i)
        if clip is None:
            return None, None
        try:
            if clip in self.reasons:
                raise InputError(f"{clip}: {self.reasons[clip]}")
            samples = load_audio(clip, max_seconds=301)
        except InputError as error:
            return None, str(error)
        return np.zeros_like(samples) if self.audio == "silence" else samples, None

    def __getitem__(self, b):
        return [self.item(job, self.asked(*job), *self.heard(job[0])) for job in self.batches[b]]

    def item(self, job, question, samples, why):
        if self.prompts is None or why is not None:
            return job, question, samples, why
        if samples is not None:
            samples = self.prompts.cut(samples, question.audio)
        return job, question, self.prompts.encode(question, samples is not None, samples), None


# ------------------------------------------------------------------------------------------------- answering


class Answers:
    """{(question's number, order): answer}, kept line by line in OUT.part-* until all are there."""

    def __init__(self, out, rank):
        self.given, self.missing = {}, {}
        self.parts = out.parent / f"{out.name}.part-{rank}"
        for part in sorted(out.parent.glob(f"{out.name}.part-*")):
            for line in part.read_text(encoding="utf-8").splitlines():
                try:
                    i, order, text, why = parse_json(line)
                except (ValueError, TypeError):
                    continue  # cut off by a kill: asked again
                self.add(i, order, text, why)

    def add(self, i, order, text, why):
        self.given[i, order] = text
        if why:
            self.missing[i] = why

    def has(self, jobs):
        return all(job in self.given for job in jobs)

    def write(self, rows):
        """rows: [(question's number, order, answer, why there is none)]."""
        with open(self.parts, "a", encoding="utf-8") as file:
            file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self.add(*row)


def answer_locally(lm, args, questions, answers, rank, world, bar):
    """Greedy answers of a checkpoint to this process's batches."""
    jobs = Jobs(questions, args, lm.prompts)
    todo = [b for b in range(rank, len(jobs.batches), world) if not answers.has(jobs.batches[b])]
    for batch in DataLoader(jobs, None, sampler=todo, num_workers=args.workers):
        good = [(job, prompt) for job, _, prompt, why in batch if why is None]
        said = lm.generate([prompt for _, prompt in good], args.max_new_tokens) if good else []
        rows = [(*job, lm.decode(group[0]), None) for (job, _), group in zip(good, said, strict=True)]
        answers.write(rows + [(*job, "", why) for job, _, _, why in batch if why is not None])
        bar(rows, len(batch))


def answer_remotely(args, questions, answers, bar):
    """The answers of a model behind a chat endpoint that takes base64 wav files."""
    client, jobs = ChatClient(args.url, args.model), Jobs(questions, args)

    def one(job, question, samples, why):
        parts = [{"type": "text", "text": prompt_text(question)}]
        if samples is not None:
            file = io.BytesIO()
            soundfile.write(file, samples, 16_000, format="WAV", subtype="PCM_16")
            audio = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
            parts.insert(0, {"type": "input_audio", "input_audio": audio})
        if why is not None:
            return (*job, "", why)
        try:
            options = {"temperature": 0, "max_tokens": args.max_new_tokens}
            return (*job, client.complete([{"role": "user", "content": parts}], **options)[0], None)
        except Refused as error:
            return (*job, "", str(error))

    with ThreadPoolExecutor(args.batch_size) as pool:
        for b, batch in enumerate(jobs.batches):
            if answers.has(batch):
                continue
            try:
                rows = list(pool.map(lambda item: one(*item), jobs[b]))
            except Unreachable as error:
                raise InputError(f"{error}; what was answered is kept, the same command goes on") from None
            answers.write(rows)
            bar(rows, len(rows))


# --------------------------------------------------------------------------------------------------- running


def checked(args):
    """One job per --out, with --data, --audio_dir and --audio given once or once for each, or InputError."""
    for name in ("model", "data", "out"):
        if not getattr(args, name):
            raise InputError(f"--{name} is needed (see --help)")
    if min(args.batch_size, args.orders, args.max_new_tokens) < 1 or args.workers < 0:
        raise InputError(
            "--batch_size, --orders and --max_new_tokens must be at least 1, --workers at least 0"
        )
    jobs = []
    for i, out in enumerate(args.out):
        job = argparse.Namespace(**vars(args) | {"out": out})
        for name in ("data", "audio_dir", "audio"):
            values = getattr(args, name) or [None]
            if len(values) not in (1, len(args.out)):
                raise InputError(f"--{name}: {len(values)} for {len(args.out)} of --out; give 1 or as many")
            setattr(job, name, values[i % len(values)])
        jobs.append(job)
    return jobs


def evaluate(args):
    """Answer every job's questions that are not answered yet, with one loading of the model."""
    lm, processes = None, None
    for job in checked(args):
        out = Path(job.out)
        meta = out.with_suffix(".meta")
        questions = read_questions(job.data, job.audio_dir, job.max_bad)
        about = {name: getattr(job, name) for name in RECORDED} | {"questions": len(questions)}
        about["bench"] = bench_name(job.data, questions)
        before = json.loads(meta.read_text()) if meta.exists() else about
        changed = [f"{n}: {before.get(n)} -> {about[n]}" for n in about if before.get(n) != about[n]]
        if changed:
            raise InputError(f"{out} is of other arguments ({'; '.join(changed)}); take another --out")
        if not (out.exists() and meta.exists()):
            processes = processes or start_processes()
            if lm is None and not job.url:
                lm = load_model(job.model, dtype_of(job, processes[2]), processes[2])
            before = answer(job, questions, lm, processes, about)
        if before is not None and int(os.environ.get("RANK", 0)) == 0:
            lines = summary(out, questions, before.get("unanswered", {}))
            print(f"saved {out}", *lines[: 1 if len(args.out) > 1 else None], sep="\n")


def answer(args, questions, lm, processes, about):
    """One job: answer what is left, write P.meta and predictions. Returns P.meta's content, or None."""
    out, (rank, world, _) = Path(args.out), processes
    out.parent.mkdir(parents=True, exist_ok=True)
    answers, right = Answers(out, rank), []
    progress = tqdm(total=len(questions) * args.orders, initial=len(answers.given), disable=rank > 0)
    progress.set_description(out.name)

    def bar(rows, count):
        for i, _, said, _ in rows:
            choices, answer = questions[i].choices, questions[i].answer
            right.append(answer is not None and string_match(answer, said, choices))
        progress.set_postfix(accuracy=f"{np.mean(right or [0]):.3f}", refresh=False)
        progress.update(count * world)

    if rank == 0:
        write_text(out.with_suffix(".meta"), json.dumps(about, indent=1))
    if lm is not None:
        answer_locally(lm, args, questions, answers, rank, world, bar)
    elif rank == 0:
        answer_remotely(args, questions, answers, bar)
    progress.close()
    dist.barrier()
    if rank > 0:
        return None
    answers = Answers(out, 0)
    about = about | {"unanswered": {questions[i].id: why for i, why in answers.missing.items()}}
    write_text(out.with_suffix(".meta"), json.dumps(about, indent=1))
    write_predictions(args, questions, answers.given)
    for part in out.parent.glob(f"{out.name}.part-*"):
        part.unlink()
    return about


def dtype_of(args, device):
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return getattr(torch, ("bfloat16" if bfloat16 else "float32") if args.dtype == "auto" else args.dtype)


def write_predictions(args, questions, given):
    """The benchmark's own rows, in its order and form, plus the keys that its official script reads."""
    rows, lines = read_rows(args.data)
    for i, question in enumerate(questions):
        said = [given[i, order] for order in range(args.orders)]
        row = rows[question.meta["row"]]
        if question.meta["format"] == "mmar":
            row["answer_prediction"] = said[0]
        else:
            row["model_output"] = row["model_prediction"] = said[0]
        if args.orders > 1:
            row["order_predictions"] = said
    rows = [row for row in rows if row is not None]
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    if lines:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(args.out, text)


def bench_name(path, questions):
    """What report.py calls the benchmark; MMAU's two versions are told apart by the file's name."""
    form, name = questions[0].meta["format"], Path(path).name.lower()
    if form != "mmau":
        return form
    part = "full" if any(question.answer is None for question in questions) else "mini"
    return f"mmau-{part}" + ("-v2" if "05.15.25" in name or "v2" in name else "")


def summary(out, questions, unanswered):
    for name, why in unanswered.items():
        log.warning("unanswered: %s: %s", name, why)
    if any(question.answer is None for question in questions):
        return ["the right answers are hidden: send the file to the benchmark's server"]
    return summary_lines(out)


OPTIONS = {  # name: (default, help)
    "model": (None, "checkpoint folder or hub name; with --url the endpoint's name of the model"),
    "url": (None, "chat completions endpoint that takes audio, in place of a checkpoint"),
    "orders": (1, "ask each question in so many orders of its choices"),
    "batch_size": (16, "questions at a time"),
    "max_new_tokens": (64, "longest answer, in tokens"),
    "seed": (0, "of --orders and of --audio swap"),
    "workers": (1, "processes that decode audio ahead of time"),
    "max_bad": (0.1, "share of malformed rows that stops the evaluation"),
    "score": (None, "print the accuracies of a predictions file, and stop"),
    "report": (None, "write the paper's tables and a page from a folder of runs, and stop"),
}


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    for name, (default, text) in OPTIONS.items():
        text = text if default is None else f"{text} (default: {default})"
        add(f"--{name}", type=str if default is None else type(default), default=default, help=text)
    text = "benchmark(s): MMAU, MMAR, or any format of training questions"
    add("--data", nargs="+", help=text)
    add("--audio_dir", nargs="+", help="folder(s) of the clips (default: beside the questions)")
    text = "what is heard: the clip, nothing, silence of its length, another question's clip (default: real)"
    add("--audio", nargs="+", choices=["real", "none", "silence", "swap"], default=["real"], help=text)
    text = "predictions to write; several are several evaluations with one loading of the model"
    add("--out", nargs="+", help=text)
    text = "auto is bfloat16 on GPUs that have it, else float32"
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=text)
    text = "print the paired difference of two predictions files, and stop"
    add("--compare", nargs=2, metavar=("A", "B"), help=text)
    args, code = parser.parse_args(), 0
    try:
        if args.compare:
            print(compare(*args.compare))
        elif args.score:
            print(*summary_lines(args.score), sep="\n")
        elif args.report:
            print(report(args.report))
        else:
            evaluate(args)
    except (InputError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
