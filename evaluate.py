"""Greedy answers to a benchmark -> predictions in its own format -> accuracies and the paper's tables.

    python evaluate.py --model M --data mmau-test-mini.json --audio_dir clips --out P.json [--audio none]
    torchrun --nproc_per_node 4 evaluate.py ...                  (spread over GPUs; the same answers)
    python evaluate.py --url http://host/v1/chat/completions --model NAME --data F --audio_dir D --out P.json
    python evaluate.py --score P.json | --compare A.json B.json | --report results

Interrupted, the same command goes on with what is not answered yet, and later with the questions that could
not be answered (P.meta lists them). Batches are formed from the whole sorted list before any work, so that
neither this nor the number of processes can change an answer; their size, which in bfloat16 can, is recorded.
"""

import fsdp  # isort: skip  (before torch: it sets what torch reads when it is imported)

import argparse
import base64
import io
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import predictions
from chat import ChatClient, Refused, Unreachable
from data import (
    PROMPTS,
    Question,
    check_clips,
    load_audio,
    prompt_text,
    questions_hash,
    read_questions,
)
from files import InputError, one_writer, sha256, write_text
from lora import load_adapter
from model import AudioLM, Prompt, PromptEncoder, load_model
from predictions import Answers, Key, Row
from report import report
from reward import final_answer, string_match
from scores import compare, summary_lines
from weights import checkpoint_hash, find_model

log = logging.getLogger("omni_r1")

# In P.meta, beside fingerprints of the model and the questions: what the predictions depend on.
RECORDED = "model adapter url data audio_dir audio prompt orders batch_size max_new_tokens dtype seed"
KEPT = "what was answered is kept, the same command goes on"


# ---------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Asked:
    """One question in one order of its choices, and what is heard with it."""

    key: Key
    question: Question
    clip: str | None  # None: nothing is to be heard
    found: str | float | None  # the clip's seconds, or why it cannot be read

    @property
    def problem(self) -> str | None:
        if isinstance(self.found, str):
            return f"{self.clip}: {self.found}"
        return None

    @property
    def length(self) -> int:
        """About the prompt's tokens: 25 a second, one for 4 letters."""
        tokens = len(prompt_text(self.question)) // 4
        if isinstance(self.found, float):
            tokens += round(25 * self.found)
        return tokens


def make_batches(questions: list[Question], args: argparse.Namespace) -> list[list[Asked]]:
    """Every question in every order, the shortest first, cut into batches."""
    clips = set()
    if args.audio != "none":
        clips.update(question.audio for question in questions)
        clips.discard(None)
    found = check_clips(sorted(clips))
    everything = []
    for i, question in enumerate(questions):
        clip = heard_with(i, questions, args, found)
        for order in range(args.orders):
            key = (i, order)
            asked = reordered(question, key, args.seed)
            everything.append(Asked(key, asked, clip, found.get(clip)))
    everything.sort(key=lambda asked: (asked.length, asked.key))
    batches = []
    for start in range(0, len(everything), args.batch_size):
        batches.append(everything[start : start + args.batch_size])
    return batches


def heard_with(i: int, questions: list[Question], args: argparse.Namespace, found: dict) -> str | None:
    """Question i's clip; with --audio swap another question's, where one has another."""
    own = questions[i].audio
    if args.audio == "none":
        return None
    if args.audio == "swap" and own is not None:
        rng = np.random.default_rng([args.seed, i])
        for j in rng.permutation(len(questions)):
            other = questions[j].audio
            if other != own and isinstance(found.get(other), float):
                return other
    return own


def reordered(question: Question, key: Key, seed: int) -> Question:
    """Order 0 is the published one; the others follow from the seed."""
    if key[1] == 0:
        return question
    rng = np.random.default_rng([seed, *key])
    order = rng.permutation(len(question.choices))
    return replace(question, choices=tuple(question.choices[j] for j in order))


def samples_of(asked: Asked, audio: str, longest: float) -> np.ndarray | None:
    """(n,) at 16 kHz, of at most `longest` seconds; None where nothing is heard. Raises InputError."""
    if asked.clip is None:
        return None
    samples = load_audio(asked.clip, longest)
    if audio == "silence":
        return np.zeros_like(samples)
    return samples


@dataclass(frozen=True)
class Encoded:
    """A question as a checkpoint reads it."""

    asked: Asked
    prompt: Prompt | None
    problem: str | None  # why there is no prompt


class Batches:
    """A Dataset: item b is batch b, encoded. DataLoader workers decode and encode ahead of the model."""

    def __init__(self, batches: list[list[Asked]], prompts: PromptEncoder, audio: str):
        self.batches = batches
        self.prompts = prompts
        self.audio = audio

    def __getitem__(self, b: int) -> list[Encoded]:
        return [self.encode(asked) for asked in self.batches[b]]

    def encode(self, asked: Asked) -> Encoded:
        longest = self.prompts.seconds + 1
        try:
            samples = samples_of(asked, self.audio, longest)
            if samples is not None:
                samples = self.prompts.cut(samples, asked.clip)
            prompt = self.prompts.encode(asked.question, samples is not None, samples)
        except InputError as error:
            return Encoded(asked, None, str(error))
        return Encoded(asked, prompt, None)


# -------------------------------------------------------------------------------------------- one evaluation


class Evaluation:
    """One --out: what is asked, what of it is answered, and where that is written.

    Raises InputError if --out holds anything but answers of the same model to the same questions, asked in
    the same way, or if more than the share --max_bad of the questions has no clip that can be read.
    """

    def __init__(self, args: argparse.Namespace, hashes: dict[str, str], rank: int):
        self.args = args
        self.rank = rank
        self.out = Path(args.out)
        self.questions = read_questions(args.data, args.audio_dir, args.max_bad)
        self.about = {}  # P.meta
        for name in RECORDED.split():
            self.about[name] = getattr(args, name)
        self.about["questions"] = len(self.questions)
        self.about["bench"] = predictions.bench_name(self.questions, args.bench)
        hashes = {**hashes, "questions": questions_hash(self.questions)}
        self.about["fingerprint"] = hashes
        before = predictions.read_meta(self.out, self.about)
        self.done = self.out.exists() and before.get("unanswered") == {} and self.is_as_written(before)
        self.batches = make_batches(self.questions, args)
        self.answers = Answers(self.out, self.about, rank)
        self.refuse_if_many(self.unanswered(known_only=True))
        self.lock = threading.Lock()
        self.right = []  # of each answer since the start, for the progress bar

    def is_as_written(self, before: dict) -> bool:
        """Whether P.json is what P.meta says. If not, after a kill, the parts will tell; else InputError."""
        if before.get("sha256") in (None, sha256(self.out.read_bytes())):
            return True
        if predictions.parts_of(self.out):
            return False
        raise InputError(f"{self.out} is not what was written here: move it and its .meta away")

    def unanswered(self, known_only: bool = False) -> dict[int, str]:
        """Question's number -> why it has no answer; `known_only`: where the clip's header tells why."""
        reasons = {}
        for batch in self.batches:
            for asked in batch:
                why = asked.problem
                if not why and not known_only:
                    why = self.answers.missing.get(asked.key, "not asked")
                if why and asked.key not in self.answers.given:
                    reasons[asked.key[0]] = why
        return reasons

    def refuse_if_many(self, reasons: dict[int, str]) -> None:
        if len(reasons) > self.args.max_bad * len(self.questions):
            i = min(reasons)
            raise InputError(
                f"{self.args.data}: {len(reasons)} of {len(self.questions)} questions have no answer (as "
                f"{self.questions[i].id}: {reasons[i]}); --max_bad is {self.args.max_bad}"
            )

    def todo(self) -> list[int]:
        """The batches with a question that is not answered and could be."""
        numbers = []
        for b, batch in enumerate(self.batches):
            if not self.done and any(self.is_open(asked) for asked in batch):
                numbers.append(b)
        return numbers

    def is_open(self, asked: Asked) -> bool:
        return asked.key not in self.answers.given and not asked.problem

    def answer(self, lm: AudioLM | None, todo: list[int]) -> None:
        """Answer the batches `todo`: this process's share of them."""
        count = sum(len(self.batches[b]) for b in todo)
        quiet = self.rank > 0 or not todo
        with tqdm(total=count, desc=self.out.name, disable=quiet) as bar:
            if lm is not None:
                answer_locally(self, lm, todo, bar)
            elif todo:
                answer_remotely(self, todo, bar)

    def record(self, rows: list[Row], bar: tqdm) -> None:
        """Write some answers down, and show how many are right so far."""
        with self.lock:
            self.answers.write(rows)
            for key, text, _ in rows:
                question = self.questions[key[0]]
                if question.answer is not None:
                    said = final_answer(text, self.args.prompt)
                    self.right.append(string_match(question.answer, said, question.choices))
            bar.set_postfix(accuracy=f"{np.mean(self.right or [0]):.3f}", refresh=False)
            bar.update(len(rows))

    def finish(self, brief: bool) -> None:
        """Write what is not written yet, and print the accuracies, or their average alone."""
        if not self.done:
            self.write()
        lines = ["the right answers are hidden: send the file to the benchmark's server"]
        if any(question.answer is not None for question in self.questions):
            lines = summary_lines(self.out)
        if brief:
            lines = lines[:1]
        print(f"saved {self.out}", *lines, sep="\n")

    def write(self) -> None:
        """P.json and P.meta. The parts stay while an answer is missing."""
        self.answers = Answers(self.out, self.about, self.rank)
        reasons = self.unanswered()
        self.refuse_if_many(reasons)
        said = []
        for i in range(len(self.questions)):
            texts = []
            for order in range(self.args.orders):
                key = (i, order)
                texts.append(self.answers.given.get(key, ""))
            said.append(texts)
        text = predictions.in_own_form(self.args.data, self.questions, said, prompt=self.args.prompt)
        unanswered = {}
        for i, why in sorted(reasons.items()):
            unanswered[self.questions[i].id] = why
            log.warning("unanswered: %s: %s", self.questions[i].id, why)
        self.write_meta({"unanswered": unanswered, "sha256": sha256(text.encode())})
        write_text(self.out, text)
        if not unanswered:
            for part in predictions.parts_of(self.out):
                part.unlink()

    def write_meta(self, more: dict) -> None:
        text = json.dumps({**self.about, **more}, indent=1)
        write_text(predictions.meta_path(self.out), text)


# -------------------------------------------------------------------------------------------------- answering


def answer_locally(job: Evaluation, lm: AudioLM, todo: list[int], bar: tqdm) -> None:
    """Greedy answers of a checkpoint."""
    workers = 1
    if lm.device.type != "cpu":  # a GPU answers faster than one process decodes
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(8, os.cpu_count() // processes))
    batches = Batches(job.batches, lm.prompts, job.args.audio)
    with ctrl_c_remembered() as ctrl_c:
        for batch in DataLoader(batches, None, sampler=todo, **fsdp.loader_options(workers)):
            rows = []
            readable = []
            for item in batch:
                if item.problem:
                    rows.append((item.asked.key, "", item.problem))
                else:
                    readable.append(item)
            responses = []
            if readable:
                prompts = [item.prompt for item in readable]
                responses = lm.generate(prompts, job.args.max_new_tokens)
            for item, group in zip(readable, responses, strict=True):
                text = lm.decode(group[0])
                rows.append((item.asked.key, text, None))
            job.record(rows, bar)
            if ctrl_c.signal:
                raise KeyboardInterrupt


@contextmanager
def ctrl_c_remembered() -> Iterator[fsdp.Stop]:
    """Obeyed at once it would meet workers in the middle of handing a batch over, and they complain."""
    remembered = fsdp.Stop()
    before = signal.signal(signal.SIGINT, remembered)
    try:
        yield remembered
    finally:
        signal.signal(signal.SIGINT, before)


def answer_remotely(job: Evaluation, todo: list[int], bar: tqdm) -> None:
    """Answers of a model behind a chat endpoint that takes base64 wav files, --batch_size at a time."""
    client = ChatClient(job.args.url, job.args.model)
    everything = []
    for b in todo:
        everything += filter(job.is_open, job.batches[b])
    first = everything.pop(0)
    pool = ThreadPoolExecutor(job.args.batch_size)
    futures = []
    try:
        read = ask(client, job, first, bar)
        warn_if_deaf(client, first, job.args.prompt, read)
        for asked in everything:
            futures.append(pool.submit(ask, client, job, asked, bar))
        for future in as_completed(futures):
            future.result()
    except (Unreachable, InputError) as error:
        raise InputError(f"{error}; {KEPT}") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        on_their_way = [future for future in futures if not future.cancelled()]
        try:
            wait(on_their_way, client.timeout)  # they are paid for, and written
        finally:
            client.stop.set()


def ask(client: ChatClient, job: Evaluation, asked: Asked, bar: tqdm) -> int:
    """Ask one question and write its answer down. Returns the tokens that the server says it read, or 0."""
    options = {"temperature": 0, "max_tokens": job.args.max_new_tokens}
    text = ""
    why = None
    read = 0
    try:
        samples = samples_of(asked, job.args.audio, 300)  # seconds: what Qwen2.5-Omni hears
    except InputError as error:
        why = str(error)
    else:
        try:
            text, usage = client.complete(message(asked, job.args.prompt, samples), **options)
            read = usage["prompt_tokens"]
            if not text.strip():
                why = "an empty answer"
        except Refused as error:
            why = str(error)
    job.record([(asked.key, text, why)], bar)
    return read


def warn_if_deaf(client: ChatClient, asked: Asked, prompt: str, read: int) -> None:
    """Ask once more without the clip: a server that reads as many tokens did not hear it."""
    if asked.clip is None or read == 0:
        return
    with suppress(Refused):
        _, usage = client.complete(message(asked, prompt, None), temperature=0, max_tokens=1)
        if usage["prompt_tokens"] == read:
            log.warning("%s reads %d tokens with a clip and without: does it hear?", client.name, read)


def message(asked: Asked, prompt: str, samples: np.ndarray | None) -> list[dict]:
    parts = [{"type": "text", "text": prompt_text(asked.question, prompt)}]
    if samples is not None:
        file = io.BytesIO()
        soundfile.write(file, samples, 16_000, format="WAV", subtype="PCM_16")
        data = base64.b64encode(file.getvalue()).decode()
        audio = {"data": data, "format": "wav"}
        parts.insert(0, {"type": "input_audio", "input_audio": audio})
    return [{"role": "user", "content": parts}]


# ---------------------------------------------------------------------------------------------------- running


def split(args: argparse.Namespace) -> list[argparse.Namespace]:
    """One for each --out; --data, --audio_dir, --audio and --bench stand once or as often. Or InputError."""
    for name in ("model", "data", "out"):
        if not getattr(args, name):
            raise InputError(f"--{name} is needed (see --help)")
    for name, most in {"batch_size": 10**5, "orders": 1000, "max_new_tokens": 10**5}.items():
        if not 1 <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 to {most:,}")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must be at least 0")
    if not 0 <= args.max_bad <= 1:
        raise InputError(f"--max_bad {args.max_bad}: a share is between 0 and 1")
    if args.url and args.adapter:
        raise InputError("--adapter needs a checkpoint, not --url")
    metas = {predictions.meta_path(Path(out)) for out in args.out}
    if len(metas) < len(args.out):
        raise InputError("--out names a file twice")
    jobs = []
    for i, out in enumerate(args.out):
        job = argparse.Namespace(**vars(args))
        job.out = out
        for name in ("data", "audio_dir", "audio", "bench"):
            values = getattr(args, name) or [None]
            if len(values) not in (1, len(args.out)):
                raise InputError(f"--{name}: {len(values)} for {len(args.out)} of --out; give 1 or as many")
            setattr(job, name, values[i % len(values)])
        jobs.append(job)
    return jobs


@contextmanager
def in_agreement() -> Iterator[None]:
    """What goes wrong within, in any process, ends them all with one message, once all have come here."""
    wrong = None
    try:
        yield
    except (InputError, OSError) as error:
        wrong = str(error)
    except RuntimeError as error:  # torch's for memory, and for a process of the DataLoader that is gone
        if not re.search("out of memory|allocate memory|DataLoader worker", str(error)):
            raise
        reason = str(error).splitlines()[0]
        wrong = f"{reason} Too little memory? Lower --batch_size; {KEPT}"
    reasons = [reason for reason in fsdp.gather_objects(wrong) if reason]
    if reasons:
        raise InputError(reasons[0])


def hold(jobs: list[argparse.Namespace], held: ExitStack) -> None:
    """Lock each --out against a second start, for as long as `held` is open."""
    for job in jobs:
        out = Path(job.out)
        predictions.refuse_foreign(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(one_writer(out.with_name(f".{out.name}.lock")))


def model_hashes(args: argparse.Namespace) -> dict[str, str]:
    hashes = {}
    if not args.url:
        hashes["model"] = checkpoint_hash(find_model(args.model))
    if args.adapter:
        hashes["adapter"] = checkpoint_hash(Path(args.adapter))
    return hashes


def load(args: argparse.Namespace, device: torch.device) -> AudioLM:
    dtype = getattr(torch, args.dtype)
    lm = load_model(args.model, dtype, device, prompt=args.prompt)
    if args.adapter:
        load_adapter(lm, Path(args.adapter))
    return lm


def evaluate(args: argparse.Namespace) -> None:
    """Answer every job's questions that are not answered yet, with one loading of the model."""
    several = split(args)
    day = 24 * 60  # minutes: how long the fastest process may wait for the slowest
    rank, world, device = fsdp.start_processes(day)
    dtype = fsdp.compute_dtype(args.dtype, device)
    for one in [args, *several]:
        one.dtype = str(dtype).removeprefix("torch.")
    lm = None
    with ExitStack() as held:
        with in_agreement():
            if rank == 0:
                hold(several, held)
        with in_agreement():
            hashes = model_hashes(args)
            jobs = [Evaluation(one, hashes, rank) for one in several]
        for job in jobs:
            todo = job.todo()
            with in_agreement():
                if rank == 0 and not job.done:
                    job.write_meta({})
                if todo and lm is None and not args.url:
                    lm = load(args, device)
                job.answer(lm, todo[rank::world])
            with in_agreement():
                if rank == 0:
                    job.finish(brief=len(jobs) > 1)


# ---------------------------------------------------------------------------------------------------- options


def parse() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    heard = ["real", "none", "silence", "swap"]
    dtypes = ["auto", "bfloat16", "float32"]
    add("--model", help="checkpoint folder or hub name; with --url the endpoint's name of the model")
    add("--adapter", help="LoRA weights (a run's O/adapter) to evaluate --model with")
    add("--url", help="chat completions endpoint that takes audio, in place of a checkpoint")
    add("--data", nargs="+", help="benchmark(s): MMAU, MMAR, or any format of training questions")
    add("--audio_dir", nargs="+", help="folder(s) of the clips (default: beside the questions)")
    add(
        "--audio",
        nargs="+",
        choices=heard,
        default=["real"],
        help="the clip, or what is heard in its place (real)",
    )
    add("--bench", nargs="+", help="the benchmark's name in the report (default: told by the questions)")
    add("--out", nargs="+", help="predictions to write; several are evaluated with one loading of the model")
    add("--prompt", choices=list(PROMPTS), default="direct", help="how the answer is asked for (%(default)s)")
    add(
        "--orders",
        type=int,
        default=1,
        help="ask each question in so many orders of its choices (%(default)s)",
    )
    add("--batch_size", type=int, default=16, help="questions at a time (%(default)s)")
    add("--max_new_tokens", type=int, default=64, help="longest answer, in tokens (%(default)s)")
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on GPUs that have it, else float32")
    add("--seed", type=int, default=0, help="of --orders and of --audio swap (%(default)s)")
    add(
        "--max_bad",
        type=float,
        default=0.1,
        help="share of bad rows, clips or answers that stops it (%(default)s)",
    )
    add("--score", metavar="P", help="print the accuracies of a predictions file, and stop")
    add("--compare", nargs=2, metavar=("A", "B"), help="print the paired difference of two, and stop")
    add("--report", metavar="DIR", help="write the paper's tables and a page from a folder of runs, and stop")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # ours; httpx tells every request
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a file's name need not be UTF-8
    args = parse()
    code = 0
    last_words = ""
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
        last_words = f"error: {error}"
        code = 2
    except KeyboardInterrupt:
        last_words = f"interrupted: {KEPT}"
        code = 130
    rank = int(os.environ.get("RANK", 0))
    if last_words and rank == 0:
        print(last_words, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
