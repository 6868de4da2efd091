"""Greedy answers to a benchmark -> predictions in its own format, which report.py scores.

    python evaluate.py --model M --data mmau-test-mini.json --audio_dir clips --out P.json [--audio none]
    torchrun --nproc_per_node 4 evaluate.py ...                  (spread over GPUs; the same answers)
    python evaluate.py --url http://host/v1/chat/completions --model NAME --data F --audio_dir D --out P.json

P.json is the benchmark's rows with the keys that its official script reads; P.meta, beside it, says what was
asked of which model. P.json.part-RANK hold the answers as they come: interrupted, the same command goes on
with what is not answered yet, and later with the questions that could not be answered (P.meta lists them).
Batches are formed from the whole sorted list before any work, so that neither this nor the number of
processes can change an answer; their size, which in bfloat16 can, is recorded.
"""

import fsdp  # isort: skip  (before torch: it sets what torch reads when it is imported)

import argparse
import base64
import io
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from tqdm import tqdm

from chat import ChatClient, Refused
from data import (
    PROMPTS,
    Question,
    check_clips,
    load_audio,
    prompt_text,
    questions_hash,
    read_questions,
    read_rows,
)
from files import (
    InputError,
    append_rows,
    first_line,
    one_writer,
    parse_json,
    read_text,
    refuse_changes,
    rows_of,
    sha256,
    write_text,
)
from lora import load_adapter
from model import AudioLM, Prompt, PromptEncoder, load_model
from report import summary_lines
from reward import final_answer
from weights import checkpoint_hash, find_model

log = logging.getLogger("omni_r1")

Key = tuple[int, int]  # (the question's number, the order of its choices: 0 is the published one)
Answer = tuple[Key, str, str | None]  # the text, or "" and why there is none

# In P.meta, beside fingerprints of the model and the questions: what the predictions depend on.
RECORDED = "model adapter url data audio_dir audio prompt orders batch_size max_new_tokens dtype seed"
SEVERAL = ["data", "audio_dir", "audio", "bench", "out"]  # options that may be given for each evaluation
KEPT = "what was answered is kept, the same command goes on"
MOST_BAD = 0.1  # of the questions: with more that have no answer there is no result
AHEAD = 3  # batches that are encoded while the model answers one

# Of four test-mini questions, in all quarters of the file, that MMAU's revision of May 2025 rewrote (the file
# kept its name): the hashes of id and question, first the original's, then the revision's.
MMAU_TOLD_BY = {
    "mmau-mini": "ff92cc5c9c2ecc6b 03593a46aa01d2ff 0b20807605b0de09 fe47fea59eb19cc5",
    "mmau-mini-v2": "9ddb035491abc48a 5a15fc150b29a5a5 e6201797aefe389e 383a617b1d62da43",
}

# The keys that official scripts read: MMAR's, those of MMSU and AIR-Bench, and of MMAU's two versions.
OFFICIAL = {"mmar": ["answer_prediction"], "choices_ad": ["response", "model_prediction"]}
MMAU_KEYS = ["model_output", "model_prediction"]
OURS = ["answer_prediction", "response", *MMAU_KEYS, "raw_output", "order_predictions"]


# ---------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Asked:
    """One question in one order of its choices, and what is heard with it."""

    key: Key
    question: Question
    clip: str | None  # None: nothing is to be heard
    problem: str | None = None  # why that cannot be read
    seconds: float = 0.0

    @property
    def length(self) -> int:
        """About the prompt's tokens: 25 a second, one for 4 letters."""
        letters = len(prompt_text(self.question))
        return letters // 4 + round(25 * self.seconds)


def make_batches(
    questions: list[Question],
    args: argparse.Namespace,
) -> list[list[Asked]]:
    """Every question in every order, the shortest first, cut into batches."""
    clips = set()
    if args.audio != "none":
        clips = {question.audio for question in questions} - {None}
    found = check_clips(sorted(clips))
    everything = []
    for i, question in enumerate(questions):
        clip = heard_with(i, questions, args, found)
        for order in range(args.orders):
            choices = question.choices
            if order > 0:
                rng = np.random.default_rng([args.seed, i, order])
                choices = tuple(choices[j] for j in rng.permutation(len(choices)))
            asked = Asked((i, order), replace(question, choices=choices), clip)
            if isinstance(found.get(clip), str):
                asked = replace(asked, problem=f"{clip}: {found[clip]}")
            elif clip:
                asked = replace(asked, seconds=found[clip])
            everything.append(asked)
    everything.sort(key=lambda asked: (asked.length, asked.key))
    starts = range(0, len(everything), args.batch_size)
    return [everything[start : start + args.batch_size] for start in starts]


def heard_with(
    i: int,
    questions: list[Question],
    args: argparse.Namespace,
    found: dict,
) -> str | None:
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


def samples_of(
    asked: Asked,
    audio: str,
    longest: float,
) -> np.ndarray | None:
    """(n,) at 16 kHz, of at most `longest` seconds; None where nothing is heard. Raises Refused."""
    if asked.clip is None:
        return None
    try:
        samples = load_audio(asked.clip, longest)
    except InputError as error:
        raise Refused(str(error)) from None
    if audio == "silence":
        return np.zeros_like(samples)
    return samples


def bench_name(
    questions: list[Question],
    given: str | None,
) -> str:
    """What the report calls the benchmark: `given` (--bench), unless the questions' text says otherwise.

    Raises InputError where they are of both of MMAU's versions, or do not tell.
    """
    form = questions[0].meta["format"]
    if form != "mmau" or (given and not given.startswith("mmau")):
        return given or form
    hashes = {sha256(f"{question.id} {question.question}".encode()) for question in questions}
    told = [name for name, known in MMAU_TOLD_BY.items() if hashes.intersection(known.split())]
    if len(told) > 1 or (told and given not in (None, told[0])):
        raise InputError(f"by their text these questions are {' and '.join(told)}: another --bench")
    if told or given:
        return given or told[0]
    if any(question.id.count("-") == 4 for question in questions):  # MMAU's own ids
        raise InputError(
            "none of these questions tells which version of MMAU they are of: give --bench mmau-mini or "
            "mmau-mini-v2 (of the full test set: mmau-full or mmau-full-v2)"
        )
    hidden = all(question.answer is None for question in questions)
    return "mmau-full" if hidden else "mmau-mini"


# -------------------------------------------------------------------------------------------- one evaluation


class Evaluation:
    """One --out: what is asked, what of it is answered, and where that is written.

    Raises InputError if --out holds anything but answers of the same model to the same questions, asked in
    the same way, or if more than a tenth of the questions has no clip that can be read.
    """

    def __init__(self, args: argparse.Namespace, hashes: dict[str, str], rank: int):
        self.args = args
        self.rows = read_rows(args.data)
        self.questions = read_questions(args.data, args.audio_dir)
        bench = bench_name(self.questions, args.bench)
        self.out = Path(args.out or default_out(args, bench))
        self.meta = Path(f"{self.out}.meta")  # so that no two predictions share one
        if self.out.suffix == ".json":
            self.meta = self.out.with_suffix(".meta")
        self.own_part = self.out.with_name(f"{self.out.name}.part-{rank}")
        self.about = {name: getattr(args, name) for name in RECORDED.split()}
        if args.url:  # what follows the path may be a secret
            url = urlsplit(args.url)
            host = url.netloc.rpartition("@")[2]
            self.about["url"] = f"{url.scheme}://{host}{url.path}"
        hashes = {**hashes, "questions": questions_hash(self.questions)}
        self.about["questions"] = len(self.questions)
        self.about["bench"] = bench
        self.about["fingerprint"] = hashes
        self.asked = sha256(json.dumps(self.about).encode())  # in each row of the parts
        self.lock = threading.Lock()

    def resume(self) -> None:
        """See what an earlier start left."""
        before = {}
        if self.meta.exists():
            try:
                before = dict(parse_json(read_text(self.meta)))
            except (ValueError, TypeError):
                raise InputError(f"{self.meta} is damaged: move it and {self.out.name} away") from None
            refuse_changes(self.out, then=before, now=self.about)
        self.done = self.out.exists() and before.get("unanswered") == {}
        self.batches = []
        if not self.done:
            self.batches = make_batches(self.questions, self.args)
            self.read_parts()
            self.missing = {}  # asked again
            self.refuse_if_many(self.unanswered())

    def parts(self) -> list[Path]:
        start = f"{self.out.name}.part-"
        found = []
        for path in sorted(self.out.parent.iterdir()):
            if path.name.startswith(start) and path.name.removeprefix(start).isdigit():
                found.append(path)
        return found

    def read_parts(self) -> None:
        self.given: dict[Key, str] = {}
        self.missing: dict[Key, str] = {}  # why there is no answer
        for part in self.parts():
            for row in rows_of(part):
                if row.get("asked") != self.asked:
                    continue  # of another model, or to other questions
                key = (row["i"], row["order"])
                if row["why"]:
                    self.missing[key] = row["why"]
                else:
                    self.given[key] = row["text"]

    def unanswered(self) -> dict[int, str]:
        """Question's number -> why it has no answer, as far as that is known."""
        reasons = {}
        for asked in chain(*self.batches):
            why = asked.problem or self.missing.get(asked.key)
            if why and asked.key not in self.given:
                reasons[asked.key[0]] = why
        return reasons

    def refuse_if_many(self, reasons: dict[int, str]) -> None:
        if len(reasons) > MOST_BAD * len(self.questions):
            i = min(reasons)
            raise InputError(
                f"{self.args.data}: {len(reasons)} of {len(self.questions)} questions have no answer (as "
                f"{self.questions[i].id}: {reasons[i]}): more than a tenth, so there is no result"
            )

    def is_open(self, asked: Asked) -> bool:
        return asked.key not in self.given and not asked.problem

    def record(
        self,
        answers: list[Answer],
        bar: tqdm,
    ) -> None:
        """Write some answers down at once."""
        rows = []
        for (i, order), text, why in answers:
            row = {"i": i, "order": order, "text": text, "why": why}
            row["asked"] = self.asked
            rows.append(row)
        with self.lock:
            append_rows(self.own_part, rows)
            bar.update(len(rows))

    def write(self) -> None:
        """P.json, then P.meta, which says that it is whole. The parts stay while an answer is missing."""
        self.read_parts()
        reasons = self.unanswered()
        self.refuse_if_many(reasons)
        write_text(self.out, self.in_own_form())
        unanswered = {}
        for i, why in sorted(reasons.items()):
            unanswered[self.questions[i].id] = why
            log.warning("unanswered: %s: %s", self.questions[i].id, why)
        self.write_meta({"unanswered": unanswered})
        if not unanswered:
            for part in self.parts():
                part.unlink()

    def write_meta(self, more: dict) -> None:
        write_text(self.meta, json.dumps({**self.about, **more}, indent=1))

    def in_own_form(self) -> str:
        """The rows of --data, in their order, plus the keys that their official script reads, from us alone.

        The keys hold the final answer; where it stood in more text (--prompt think), that is `raw_output`.
        """
        rows, is_lines = self.rows
        form = self.questions[0].meta["format"]
        for row in rows:
            for key in OURS if isinstance(row, dict) else []:
                row.pop(key, None)  # of another run, or forged
        for i, question in enumerate(self.questions):
            row = rows[question.meta["row"]]
            texts = [self.given.get((i, order), "") for order in range(self.args.orders)]
            final = [final_answer(text, self.args.prompt) for text in texts]
            if not row.keys() & {"id", "uniq_id"}:
                row["id"] = question.id  # made from the row as it came
            for key in OFFICIAL.get(form, MMAU_KEYS):
                row[key] = final[0]
            if final != texts:
                row["raw_output"] = texts[0]
            if len(texts) > 1:
                row["order_predictions"] = final
        rows = [row for row in rows if row is not None]
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        reads_lists = form in ("mmau", "mmar")  # their scripts do, even if lines are published
        if is_lines and not reads_lists:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return text.encode(errors="backslashreplace").decode()  # half a surrogate pair as JSON writes it

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


def default_out(
    args: argparse.Namespace,
    bench: str,
) -> str:
    """results/mine/model -> results/mine/eval/BENCH.AUDIO.json, where the report looks. Or InputError."""
    folder = Path(args.adapter or args.model)
    if args.url or folder.name not in ("model", "adapter"):
        raise InputError("--out is needed, but for a run's own O/model or O/adapter")
    return str(folder.parent / "eval" / f"{bench}.{args.audio}.json")


# -------------------------------------------------------------------------------------------------- answering


def encode(
    asked: Asked,
    prompts: PromptEncoder,
    audio: str,
    lock: threading.Lock,
) -> Prompt | str:
    """A question as a checkpoint reads it, or why it cannot be read. In threads, which share a tokenizer."""
    try:
        samples = samples_of(asked, audio, prompts.seconds + 1)
        with lock:
            if samples is not None:
                samples = prompts.cut(samples, asked.clip)
            return prompts.encode(asked.question, samples is not None, samples)
    except Refused as error:
        return str(error)


def encode_ahead(
    batches: list[list[Asked]],
    encode_one: Callable,
) -> Iterator[list[Prompt | str]]:
    """The batches in turn, encoded while the model answers: in threads: nothing is shared or forked."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    waiting = deque()
    with ThreadPoolExecutor(max(1, cores // processes)) as pool:
        for batch in batches + [[]] * AHEAD:
            waiting.append(pool.map(encode_one, batch))
            if len(waiting) > AHEAD:
                yield list(waiting.popleft())


def answer_locally(
    job: Evaluation,
    lm: AudioLM,
    batches: list[list[Asked]],
    bar: tqdm,
) -> None:
    """Greedy answers of a checkpoint."""
    lock = threading.Lock()
    encode_one = partial(encode, prompts=lm.prompts, audio=job.args.audio, lock=lock)
    for batch, encoded in zip(batches, encode_ahead(batches, encode_one), strict=True):
        prompts = [item for item in encoded if isinstance(item, Prompt)]
        groups = []
        if prompts:
            groups = lm.generate(prompts, job.args.max_new_tokens)
        groups.reverse()
        answers = []
        for asked, item in zip(batch, encoded, strict=True):
            text = ""
            why = item
            if isinstance(item, Prompt):
                with lock:
                    text = lm.decode(groups.pop()[0])
                why = None
            answers.append((asked.key, text, why))
        job.record(answers, bar)


def answer_remotely(
    job: Evaluation,
    batches: list[list[Asked]],
    bar: tqdm,
) -> None:
    """Answers of a model behind a chat endpoint that takes base64 wav files, --batch_size at a time."""
    client = ChatClient(job.args.url, job.args.model)
    first, *others = filter(job.is_open, chain(*batches))
    pool = ThreadPoolExecutor(job.args.batch_size)
    try:
        read = ask(client, job, first, bar)
        if read and first.clip:  # once more without the clip
            with suppress(Refused):
                _, usage = client.complete(message(first, job.args.prompt, None), temperature=0, max_tokens=1)
                if usage.get("prompt_tokens") == read:
                    log.warning("the server reads %d tokens with a clip and without: does it hear?", read)
        futures = []
        for asked in others:
            futures.append(pool.submit(ask, client, job, asked, bar))
        for future in as_completed(futures):
            future.result()
    except InputError as error:
        raise InputError(f"{error}; {KEPT}") from None
    finally:
        try:
            pool.shutdown(cancel_futures=True)  # those on their way are paid for, and written
        finally:
            client.stop.set()  # a second Ctrl-C


def ask(
    client: ChatClient,
    job: Evaluation,
    asked: Asked,
    bar: tqdm,
) -> int:
    """Ask one question and write its answer down. Returns the tokens that the server says it read, or 0."""
    usage = {}
    try:
        samples = samples_of(asked, job.args.audio, 300)  # seconds: what Qwen2.5-Omni hears
        content = message(asked, job.args.prompt, samples)
        text, usage = client.complete(content, temperature=0, max_tokens=job.args.max_new_tokens)
        answer = (asked.key, text, None if text.strip() else "an empty answer")
    except Refused as error:
        answer = (asked.key, "", str(error))
    job.record([answer], bar)
    return usage.get("prompt_tokens", 0)


def message(
    asked: Asked,
    prompt: str,
    samples: np.ndarray | None,
) -> list[dict]:
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
    """One for each evaluation; --data, --audio_dir, --audio, --bench, --out stand once or as often."""
    if not args.model or not args.data:
        raise InputError("--model and --data are needed (see --help)")
    for name, least in {"batch_size": 1, "orders": 1, "max_new_tokens": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.url and args.adapter:
        raise InputError("--adapter needs a checkpoint, not --url")
    lists = {name: getattr(args, name) or [None] for name in SEVERAL}
    count = max(map(len, lists.values()))
    jobs = []
    for i in range(count):
        job = argparse.Namespace(**vars(args))
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise InputError(f"--{name}: {len(values)} for {count} evaluations; give 1 or as many")
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
    except torch.OutOfMemoryError as error:
        wrong = f"{first_line(error)} Lower --batch_size; {KEPT}"
    reasons = [reason for reason in fsdp.gather_objects(wrong) if reason]
    if reasons:
        raise InputError(reasons[0])


def hold(
    jobs: list[Evaluation],
    held: ExitStack,
) -> None:
    """Lock each --out against a second start, for as long as `held` is open. Or InputError."""
    if len({job.meta for job in jobs}) < len(jobs):
        raise InputError("--out names a file twice")
    for job in jobs:
        if job.out.exists() and not job.meta.exists():
            raise InputError(f"{job.out} exists, and no {job.meta.name} says that it is ours: another --out")
        job.out.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(one_writer(job.out.with_name(f".{job.out.name}.lock")))


def load(
    args: argparse.Namespace,
    device: torch.device,
) -> AudioLM:
    lm = load_model(args.model, getattr(torch, args.dtype), device, prompt=args.prompt)
    if args.adapter:
        load_adapter(lm, Path(args.adapter))
    return lm


def evaluate(args: argparse.Namespace) -> None:
    """Answer every job's questions that are not answered yet, with one loading of the model."""
    rank, world, device = fsdp.start_processes(24 * 60)  # minutes that the fastest may wait for the slowest
    args.dtype = str(fsdp.compute_dtype(args.dtype, device)).removeprefix("torch.")
    lm = None
    with ExitStack() as held:
        with in_agreement():
            hashes = {}
            if not args.url:
                hashes["model"] = checkpoint_hash(find_model(args.model))
            if args.adapter:
                hashes["adapter"] = checkpoint_hash(Path(args.adapter))
            jobs = [Evaluation(one, hashes, rank) for one in split(args)]
            if rank == 0:
                hold(jobs, held)
        with in_agreement():
            for job in jobs:
                job.resume()
        for job in jobs:
            batches = [batch for batch in job.batches if any(map(job.is_open, batch))]
            mine = batches[rank::world]
            with in_agreement():
                if rank == 0 and not job.done:
                    job.write_meta({})
                if batches and not lm and not args.url:
                    lm = load(args, device)
                count = sum(map(len, mine))
                quiet = rank > 0 or not mine
                with tqdm(total=count, desc=job.out.name, disable=quiet) as bar:
                    if mine and args.url:
                        answer_remotely(job, mine, bar)
                    elif mine:
                        answer_locally(job, lm, mine, bar)
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
    add("--audio", nargs="+", choices=heard, default=["real"], help="the clip, or what is heard instead")
    add("--bench", nargs="+", help="the benchmark's name in the report (default: told by the questions)")
    add("--out", nargs="+", help="predictions to write (default, of O/model: O/eval/BENCH.AUDIO.json)")
    add("--prompt", choices=list(PROMPTS), default="direct", help="how the answer is asked for (%(default)s)")
    add("--orders", type=int, default=1, help="ask in so many orders of the choices (%(default)s)")
    add("--batch_size", type=int, default=16, help="questions at a time (%(default)s)")
    add("--max_new_tokens", type=int, default=64, help="longest answer, in tokens (%(default)s)")
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on GPUs that have it, else float32")
    add("--seed", type=int, default=0, help="of --orders and of --audio swap (%(default)s)")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # ours; httpx tells every request
    sys.stdout.reconfigure(errors="replace")  # a file's name need not be UTF-8
    args = parse()
    code = 0
    last_words = ""
    try:
        evaluate(args)
    except (InputError, OSError) as error:
        last_words = f"error: {error}"
        code = 2
    except KeyboardInterrupt:
        last_words = f"interrupted: {KEPT}"
        code = 130
    if last_words and os.environ.get("RANK", "0") == "0":
        print(last_words, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
