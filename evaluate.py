"""Greedy answers to a benchmark -> predictions in its own format, which report.py scores.

    python evaluate.py --model M --data mmau-test-mini.json --audio_dir clips --out P.json [--audio none]
    torchrun --nproc_per_node 4 evaluate.py ...                  (spread over GPUs; the same answers)
    python evaluate.py ... --out P.json --and --audio none --out N.json (both with one loading of the model)
    python evaluate.py --url http://host/v1/chat/completions --model NAME --data F --audio_dir D --out P.json

P.json is the benchmark's rows with the keys that its official script reads; P.meta, beside it, says what was
asked of which model. P.json.part-* hold the answers as they come: interrupted, the same command goes on with
what is not answered yet, and later with the questions that could not be answered (P.meta lists them).
Batches are formed from the whole sorted list before any work, so that neither this nor the number of
processes can change an answer; their size, which in bfloat16 can, is recorded.
"""

import fsdp  # isort: skip  (before torch: it sets what torch reads when it is imported)

import base64
import glob
import io
import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from chat import ChatClient, Refused, public_url
from data import (
    PROMPTS,
    Question,
    ahead,
    check_clips,
    leave_out,
    load_audio,
    prompt_text,
    questions_hash,
    read_questions,
    read_rows,
)
from files import (
    COUNT,
    WHOLE,
    InputError,
    Parser,
    append_rows,
    made_before,
    one_writer,
    rows_of,
    sha256,
    write_text,
)
from lora import load_adapter
from model import AudioLM, Prompt, PromptEncoder, load_model
from report import HEARD, OURS, summary_lines
from reward import final_answer
from weights import checkpoint_hash, find_model

log = logging.getLogger("omni_r1")

# Of four test-mini questions, in all quarters of the file, that MMAU's revision of May 2025 rewrote (the file
# kept its name): the hashes of id and question, first the original's, then the revision's.
MMAU_TOLD_BY = {
    "mmau-mini": "ff92cc5c9c2ecc6b 03593a46aa01d2ff 0b20807605b0de09 fe47fea59eb19cc5",
    "mmau-mini-v2": "9ddb035491abc48a 5a15fc150b29a5a5 e6201797aefe389e 383a617b1d62da43",
}

# The keys that official scripts read: MMAR's, those of MMSU and AIR-Bench, and of MMAU's two versions.
OFFICIAL = {"mmar": ["answer_prediction"], "choices_ad": ["response", "model_prediction"]}
MMAU_KEYS = ["model_output", "model_prediction"]


# ---------------------------------------------------------------------------------------------- what is asked


def ask_everything(questions: list[Question], args: Namespace) -> list:
    """Each question in all orders of its choices, the published one first; its audio is what is heard."""
    everything = []
    for i, question in enumerate(questions):
        clip = question.audio
        if args.audio == "none":
            clip = None
        if args.audio == "swap":  # another question's, where one has another
            places = np.random.default_rng([args.seed, i]).permutation(len(questions))
            others = (questions[j].audio for j in places)
            clip = next((other for other in others if other != clip), clip)
        asked = [replace(question, audio=clip)]
        for order in range(1, args.orders):
            places = np.random.default_rng([args.seed, i, order]).permutation(len(question.choices))
            choices = tuple(question.choices[j] for j in places)
            asked.append(replace(asked[0], id=f"{question.id}, order {order}", choices=choices))
        everything.append(asked)
    return everything


def bench_name(questions: list[Question], given: str | None) -> str:
    """What the report calls the benchmark: `given` (--bench), or what the questions' text says.

    Raises InputError where these are two of MMAU's versions, or none.
    """
    form = questions[0].meta["format"]
    if form != "mmau" or (given and not given.startswith("mmau")):
        return given or form
    hashes = {sha256(f"{question.id} {question.question}".encode()) for question in questions}
    told = [name for name, known in MMAU_TOLD_BY.items() if hashes.intersection(known.split())]
    names = {given, *told} - {None}
    if len(names) > 1:
        raise InputError(f"by --bench and their text these questions are {' and '.join(sorted(names))}")
    if not names and questions[0].id.count("-") == 4:  # MMAU's own ids
        raise InputError(
            "none of these questions tells which version of MMAU they are of: give --bench mmau-mini or "
            "mmau-mini-v2 (of the full test set: mmau-full or mmau-full-v2)"
        )
    return "".join(names) or "mmau-mini"


# -------------------------------------------------------------------------------------------- one evaluation


class Evaluation:
    """One --out: what is asked, what of it is answered, and where that is written. Made by the first process.

    Raises InputError if --out holds anything but answers of the same model to the same questions, asked in
    the same way, or if more than a tenth of the questions has no clip that can be read.
    """

    def __init__(self, args: Namespace, locks: list[IO]):
        """`locks` keep a second start from --out."""
        questions = read_questions(args.data, args.audio_dir)
        bench = bench_name(questions, args.bench)
        out = Path(args.out or default_out(args, bench))
        meta = Path(f"{out}".removesuffix(".json") + ".meta")
        about = {**vars(args), "bench": bench, "questions": questions_hash(questions)}
        if args.adapter:
            about["adapter_weights"] = checkpoint_hash(Path(args.adapter))
        if args.url:
            about["url"] = public_url(args.url)
        else:
            about["weights"] = checkpoint_hash(find_model(args.model))
        out.parent.mkdir(parents=True, exist_ok=True)
        locks.append(one_writer(meta.with_name(f".{meta.name}.lock")))
        before = made_before(meta, [meta, out], about)
        self.args = args
        self.asked = ask_everything(questions, args)
        self.out = out
        self.meta = meta
        self.about = about
        # by this name no part holds another model's answers, nor those to other questions
        self.part = f"{out}.part-{sha256(json.dumps(about).encode())}"
        self.batches = []  # what is to be asked
        self.reasons = {}  # why some cannot be: id -> why
        self.whole = out.exists() and before.get("unanswered") == {}
        if not self.whole:
            self.find_batches()

    def find_batches(self) -> None:
        """What is not answered yet, in batches of about the same length; or why it cannot be asked."""
        found = check_clips(sorted({question.audio for question in chain(*self.asked)} - {None}))
        lengths = []
        for question in chain(*self.asked):
            seconds = found.get(question.audio, 0.0)
            if isinstance(seconds, str):
                self.reasons[question.id] = f"{question.audio}: {seconds}"
                continue
            tokens = len(prompt_text(question)) // 4 + round(25 * seconds)  # about
            lengths.append((tokens, question))
        self.leave_out(self.reasons, "questions have no clip that can be read")
        lengths.sort(key=lambda pair: pair[0])
        answers = self.answers()
        size = self.args.batch_size
        if self.args.url:
            size = 1  # there no answer depends on its neighbours
        for start in range(0, len(lengths), size):
            batch = [question for _, question in lengths[start : start + size]]
            if any(question.id not in answers for question in batch):
                self.batches.append(batch)

    def leave_out(self, reasons: dict[str, str], what: str) -> None:
        """Name the questions in `reasons`. InputError if they are more than a tenth: there is no result."""
        lines = [f"{name}: {why}" for name, why in reasons.items()]
        leave_out(self.args.data, lines, len(self.asked) * self.args.orders, what)

    def record(self, name: str, text: str) -> None:
        append_rows(f"{self.part}-{dist.get_rank()}", [{"id": name, "text": text}])

    def parts(self) -> list[str]:
        return sorted(glob.glob(f"{glob.escape(self.part)}-*"))

    def answers(self) -> dict[str, str]:
        """What is written down: a question's id -> its answer."""
        return {row["id"]: row["text"] for part in self.parts() for row in rows_of(part)}

    def write(self) -> None:
        """Write P.json, and P.meta, which says that it is whole; while an answer is missing the parts stay.

        The rows of --data get the keys that their official script reads, from us alone. They hold the final
        answer; where it stood in more text (--prompt think), that is `raw_output`.
        """
        form = self.asked[0][0].meta["format"]
        rows, is_lines = read_rows(self.args.data)
        for row in rows:
            if isinstance(row, dict):
                for key in OURS.split():
                    row.pop(key, None)  # of another run, or forged
        answers = self.answers()
        unanswered = {}
        for asked in self.asked:
            texts = []
            for question in asked:
                texts.append(answers.get(question.id, ""))
                if question.id not in answers:
                    unanswered[question.id] = self.reasons.get(question.id, "its answer was not found")
            final = [final_answer(text, self.args.prompt) for text in texts]
            row = rows[question.meta["row"]]
            for key in OFFICIAL.get(form, MMAU_KEYS):
                row[key] = final[0]
            if final != texts:
                row["raw_output"] = texts[0]
            if len(texts) > 1:
                row["order_predictions"] = final
        self.leave_out(unanswered, "questions have no answer")
        rows = list(filter(None, rows))  # without lines that are no JSON
        text = json.dumps(rows, indent=1)
        if is_lines and form not in ("mmau", "mmar"):  # their scripts read lists, even if lines are published
            text = "".join(json.dumps(row) + "\n" for row in rows)
        self.out.unlink(missing_ok=True)  # that P.meta never speaks of an older one
        write_text(self.meta, json.dumps({**self.about, "unanswered": unanswered}, indent=1))
        write_text(self.out, text)
        if not unanswered:
            for part in self.parts():
                os.remove(part)

    def finish(self) -> None:
        """Write what is not written yet, and print the accuracies."""
        if not self.whole:
            self.write()
        print(f"saved {self.out}")
        try:
            print(*summary_lines(self.out), sep="\n")
        except InputError as error:  # hidden answers
            print(error)


def default_out(args: Namespace, bench: str) -> Path:
    """results/mine/model -> results/mine/eval/BENCH.AUDIO.json, where the report looks. Or InputError."""
    folder = Path(args.adapter or args.model)
    if args.url or folder.name not in ("model", "adapter"):
        raise InputError("--out is needed, but for a run's own O/model or O/adapter")
    return folder.parent / "eval" / f"{bench}.{args.audio}.json"


# -------------------------------------------------------------------------------------------------- answering


def hear(clip: str, audio: str, seconds: float) -> np.ndarray:
    """(n,) at 16 kHz, of at most so many seconds. Raises Refused."""
    try:
        samples = load_audio(clip, seconds)
    except InputError as error:
        raise Refused(str(error)) from None
    return samples * (audio != "silence")


def encode(batch: list[Question], job: Evaluation, prompts: PromptEncoder) -> dict[str, Prompt]:
    """id -> what a checkpoint reads; of those whose clip cannot be decoded is written why."""
    encoded = {}
    for question in batch:
        samples = None
        try:
            if question.audio and job.args.audio == "silence":
                samples = hear(question.audio, "silence", prompts.seconds)
            encoded[question.id] = prompts.encode(question, waveform=samples)
        except InputError as error:
            job.reasons[question.id] = str(error)
    return encoded


def answer_locally(job: Evaluation, batches: list, lm: AudioLM) -> Iterator:
    """Greedy answers of a checkpoint, a batch at a time."""
    for encoded in ahead(partial(encode, job=job, prompts=lm.prompts), batches, 3):
        if encoded:
            groups = lm.generate(list(encoded.values()), job.args.max_new_tokens)
            for name, group in zip(encoded, groups, strict=True):
                job.record(name, lm.decode(group[0]))
        yield


def answer_remotely(job: Evaluation, batches: list) -> Iterator:
    """Answers of a model behind a chat endpoint that takes base64 wav files, --batch_size at a time."""
    client = ChatClient(job.args.url, job.args.model)
    first, *others = chain(*batches)
    with ThreadPoolExecutor(job.args.batch_size) as pool:
        try:
            read = ask(first, client, job)
            yield
            if read and first.audio:
                with suppress(Refused):
                    content = message(replace(first, audio=None), job.args)
                    _, usage = client.complete(content, temperature=0, max_tokens=1)
                    if usage["prompt_tokens"] == read:
                        log.warning("the server reads %d tokens with a clip and without: does it hear?", read)
            for _ in pool.map(partial(ask, client=client, job=job), others):
                yield
        finally:
            client.stop.set()  # what is on its way is paid for, and written; nothing is tried again


def ask(question: Question, client: ChatClient, job: Evaluation) -> int:
    """Ask one question and write its answer down. Returns the tokens that the server says it read, or 0."""
    try:
        content = message(question, job.args)
        text, usage = client.complete(content, temperature=0, max_tokens=job.args.max_new_tokens)
        if not text.strip():
            raise Refused("an empty answer")
        job.record(question.id, text)
        return usage["prompt_tokens"]
    except Refused as error:
        job.reasons[question.id] = str(error)
        return 0


def message(question: Question, args: Namespace) -> list[dict]:
    """Clip, of which Qwen2.5-Omni hears 300 s, and text. Raises Refused."""
    content = [{"type": "text", "text": prompt_text(question, args.prompt)}]
    if question.audio:
        file = io.BytesIO()
        soundfile.write(file, hear(question.audio, args.audio, 300), 16_000, format="WAV")
        audio = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
        content.insert(0, {"type": "input_audio", "input_audio": audio})
    return [{"role": "user", "content": content}]


# ---------------------------------------------------------------------------------------------------- running


@contextmanager
def in_agreement() -> Iterator:
    """What goes wrong within, in any process, ends them all with one message, once all have come here."""
    wrong = None
    try:
        yield
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        wrong = str(error)
    reasons = [reason for reason in fsdp.gather_objects(wrong) if reason]
    if reasons:
        raise InputError(reasons[0])


def evaluate(several: list[Namespace]) -> None:
    """Answer the questions of each evaluation that are not answered yet."""
    rank, world, device = fsdp.start_processes(24 * 60)  # minutes that the fastest may wait for the slowest
    for args in several:
        args.dtype = fsdp.compute_dtype(args.dtype, device)
    jobs = []
    locks = []
    with in_agreement():
        if rank == 0:
            jobs = [Evaluation(args, locks) for args in several]
    loaded = None
    for job in fsdp.gather_objects(jobs)[0]:
        args = job.args
        mine = job.batches[rank::world]
        answering = []
        with in_agreement():
            if mine and args.url:
                answering = answer_remotely(job, mine)
            elif mine:
                wanted = f"{args.model} {args.adapter} {args.prompt} {args.dtype}"
                if wanted != loaded:
                    lm = load_model(args.model, getattr(torch, args.dtype), device, prompt=args.prompt)
                    if args.adapter:
                        load_adapter(lm, Path(args.adapter))
                    loaded = wanted
                answering = answer_locally(job, mine, lm)
            with logging_redirect_tqdm():
                for _ in tqdm(answering, job.out.name, len(mine), disable=rank > 0):
                    pass
        for reasons in fsdp.gather_objects(job.reasons):
            job.reasons.update(reasons)
        with in_agreement():
            if rank == 0:
                job.finish()


# ---------------------------------------------------------------------------------------------------- options


def parse() -> list[Namespace]:
    """One for each evaluation: after --and come the options of the next that differ from the last one's."""
    parser = Parser(__doc__)
    add = parser.add_argument
    instead = parser.add_mutually_exclusive_group().add_argument
    add("--model", required=True, help="checkpoint folder or hub name; with --url the endpoint's name of it")
    instead("--adapter", help="LoRA weights (a run's O/adapter) to evaluate --model with")
    instead("--url", help="chat completions endpoint that takes audio, in place of a checkpoint")
    add("--data", required=True, help="benchmark: MMAU, MMAR, or any format of training questions")
    parser.table(
        "how it is asked",
        [
            ("--audio_dir", str, None, "folder of the clips (None: beside the questions)"),
            ("--audio", HEARD, "real", "the clip, or what is heard instead"),
            ("--bench", str, None, "the benchmark's name in the report (None: told by the questions)"),
            ("--out", str, None, "predictions to write (None, for O/model: O/eval/BENCH.AUDIO.json)"),
            ("--prompt", list(PROMPTS), "direct", "how the answer is asked for"),
            ("--orders", COUNT, 1, "ask in so many orders of the choices"),
            ("--batch_size", COUNT, 16, "questions at a time: fewer need less memory"),
            ("--max_new_tokens", COUNT, 64, "longest answer, in tokens"),
            ("--dtype", fsdp.DTYPES, "auto", "auto: bfloat16 on GPUs that have it, else float32"),
            ("--seed", WHOLE, 0, "of --orders and of --audio swap"),
        ],
    )
    several = []
    words = []
    for word in [*sys.argv[1:], "--and"]:
        if word == "--and":
            several.append(parser.parse_args(words))
        else:
            words.append(word)
    return several


def main() -> None:
    fsdp.run(lambda: evaluate(parse()))


if __name__ == "__main__":
    main()
