"""Captions -> ChatGPT -> four-choice questions (Section III-C, Fig. 1): AVQA-GPT and VGGS-GPT.

    python gen_qa.py --captions A.csv B.csv --out Q.jsonl --dry_run       (clips, tokens, price, one prompt)
    OPENAI_API_KEY=... python gen_qa.py --captions A.csv B.csv --ids train_qa.json --out Q.jsonl
    python gen_qa.py --captions A.csv B.csv --out Q.jsonl --sample 5      (to read some, with their captions)

The captions are CSV, JSON lines or a JSON list, joined by the clip's id; AudioSetCaps publishes two for
VGGSound: overall captions (id, caption) and answers on sounds, speech and music (id, answer_1 to answer_3).
Each finished question is a line of Q.jsonl in AVQA's format, each unusable answer one of Q.rejected.jsonl
with the reason, both with the tokens that they took; killed at any moment, the same command goes on. After
five of these in a row, or where the server refuses, a clip is rejected: not asked for again.
"""

import collections
import csv
import hashlib
import json
import random
import re
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from chat import ChatClient, Refused
from files import (
    COUNT,
    WHOLE,
    InputError,
    Parser,
    append_rows,
    first_line,
    one_writer,
    parse_json,
    read_text,
    rows_of,
    run_program,
    write_rows,
)

PROMPT = """\
You are given information about acoustic events in an audio as answers to following questions:
Q1: Overall caption of the audio.
Q2: Describe this audio according to the sounds in it.
Q3: Based on the QAs, give some information about the speech, such as the emotion of the speaker, the gender \
of the speaker, and the spoken language, only if speech is present in this audio.
Q4: Based on the QAs, give some information about the music, such as music genre and music instruments, only \
if music is present in this audio.
Your goal is to convert these to question answer pairs in the following format: output: {"question_text": \
"a question related to the audio", "multi_choice": ["a", "b", "c", "d"],"answer": index of the correct choice}
The question must be answerable only by listening to the audio. The incorrect choices should be plausible \
but clearly incorrect compared to the correct answer. Below are example input and output pairs:
E1. input:
A1: An intense engine sound emanates from an approaching aircraft as it prepares for takeoff on the runway.
A2: A plane engine roars as it taxis and takes off.
A3: This is a speech, in a male voice, in a foreign language, possibly English, saying, "'A plane engine \
roars as it taxis and takes off.'".
A4: There is no music in this audio.
output: {"question_text": "What is the source of the sound in the video?","multi_choice": ["aircraft", \
"remote controlled aircraft", "propeller", "Fan"],"answer": 0}
"""  # Fig. 1, word for word

PUBLISHED = [["id"], ["caption"], ["sound", "answer_1"], ["speech", "answer_2"], ["music", "answer_3"]]
ASKINGS = 5  # of one clip, until an answer can be used
LONGEST_ANSWER = 512  # tokens; one has 60
FRUITLESS = 100  # rejected clips, each paid for five times: one in ten must have given a question by then

Captions = dict[str, list[str]]  # a clip's name -> A1 to A4


# -------------------------------------------------------------------------------------------------- captions


def table_rows(path: Path) -> Iterator[dict]:
    """The rows of a CSV, JSON-lines or JSON-list file, one at a time: the tables have 100,000s of rows."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = file.read(1000).lstrip()[:1]
            file.seek(0)
            rows = csv.DictReader(file)
            if start == "[":
                rows = parse_json(read_text(path))
            elif start == "{":
                rows = map(parse_json, filter(str.strip, file))
            for number, row in enumerate(rows, 1):  # noqa: B007 (for the error's line)
                yield dict(row)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path}, after row {number}: not a CSV or JSON table ({first_line(error)})"
        ) from None


def one_line(text: str) -> str:
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def value_of(row: dict, column: str) -> str:
    return one_line(str(row.get(column) or ""))


def same_clip(name: str) -> str:
    """The names of one clip as one: a YouTube id of 11 characters and a start second, whatever follows."""
    name = re.sub(r"\.(wav|flac|mp3|ogg|mp4)$", "", name)
    match = re.fullmatch(r"(.{11})_(\d{1,9})(_\d+)?", name)
    if not match:
        return name
    return f"{match[1]}_{int(match[2])}"


def wanted_clips(path: Path) -> dict[str, str]:
    """--ids: AVQA's questions, VGGSound's list (its train rows) or names, one a line -> {same_clip: name}."""
    text = read_text(path)
    names = []
    if text.lstrip().startswith(("[", "{")):
        for row in table_rows(path):
            names.append(row.get("video_name") or row.get("id"))
    else:
        for row in csv.reader(text.splitlines()):
            if len(row) > 1:
                row[0] += f"_{row[1].zfill(6)}"
            if row and row[-1] != "test":
                names.append(row[0].strip())
    return {same_clip(name): name for name in map(str, names)}


def find_columns(args: Namespace) -> dict[Path, tuple]:
    """Where A1 to A4 stand: table -> (its column of ids, {0 to 3: its column}). Raises InputError."""
    names = PUBLISHED
    if args.columns:
        names = [[column] for column in args.columns]
    tables = {}
    missing = {0, 1, 2, 3}
    found = []
    for path in args.captions:
        header = next(table_rows(path), {})
        found.append(f"{path} has {', '.join(map(str, header))}")
        key, *columns = [next((name for name in one if name in header), None) for one in names]
        used = {i: columns[i] for i in missing if key and columns[i]}
        if used:
            tables[path] = key, used
            missing -= used.keys()
    if missing:
        raise InputError(f"captions need columns of {names}, but {'; '.join(found)}: name them by --columns")
    return tables


def read_captions(args: Namespace) -> Captions:
    """The clips of one table, or of several joined by id, of --ids alone if given: name -> [A1, A2, A3, A4].

    What is left out is counted and named. Raises InputError.
    """
    wanted = {}
    if args.ids:
        wanted = wanted_clips(args.ids)
    clips = {}  # -> name, captions
    left_out = collections.defaultdict(list)  # why -> names
    for path, (key, columns) in find_columns(args).items():
        met = set()
        for row in table_rows(path):
            name = value_of(row, key)
            clip = same_clip(name)
            if args.ids and clip not in wanted:
                continue
            if not name or clip in met:
                left_out["without an id or met before"].append(name)
                continue
            met.add(clip)
            texts = clips.setdefault(clip, [wanted.get(clip, name), None, None, None, None])
            for i, column in columns.items():
                texts[1 + i] = value_of(row, column)
    left_out["of --ids, without captions"] = sorted(wanted.keys() - clips.keys())
    captions = {}
    for name, *texts in clips.values():
        if texts[0] and None not in texts:
            captions[name] = texts
        else:
            left_out["without an overall caption or not in every table"].append(name)
    for why, names in left_out.items():
        if names:
            print(f"{len(names):,} left out, {why}: {', '.join(names[:10])}")
    if not captions:
        raise InputError(f"{path}: no captions of the clips that are asked for")
    return captions


# ------------------------------------------------------------------------------------- prompts and questions


def prompt_for(texts: list[str]) -> str:
    """Fig. 1 followed by this clip's four captions (A1 overall, A2 sounds, A3 speech, A4 music)."""
    captions = [f"A{i}: {text}\n" for i, text in enumerate(texts, 1)]
    return PROMPT + "E2. input:\n" + "".join(captions) + "output:"


def parse_answer(text: str) -> tuple[str, list[str]]:
    """An answer in Fig. 1's format -> (question, choices with the right one first).

    Whatever stands before the first brace and after the object is passed over. Raises ValueError.
    """
    try:
        row, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        question = one_line(row["question_text"])
        choices = list(map(one_line, row["multi_choice"]))
        answer = row["answer"]
        different = {choice.casefold() for choice in choices} - {""}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no question in the answer: {first_line(error)}") from None
    if not question or not len(choices) == len(different) == 4:
        raise ValueError("no question with four different choices")
    if type(answer) is not int or not 0 <= answer < 4:
        raise ValueError("answer is no index of a choice")
    right = choices.pop(answer)
    return question, [right, *choices]


def question_row(name: str, question: str, choices: list[str], *, seed: int, tokens: list[int]) -> dict:
    """AVQA's row. The right answer's place follows from clip and seed: 25 % each, on any machine."""
    right, *others = choices
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") % 4
    others.insert(place, right)
    return {
        "id": name,
        "video_name": name,
        "question_text": question,
        "multi_choice": others,
        "answer": place,
        "question_type": "Generated",
        "tokens": tokens,
    }


# ------------------------------------------------------------------------------------------------------- run


class Ledger:
    """Q.jsonl and Q.rejected.jsonl: what is finished, and the tokens (in, out) that it took."""

    def __init__(self, args: Namespace):
        self.out = args.out
        self.rejected = args.out.with_suffix(".rejected.jsonl")
        self.prices = (args.price_in, args.price_out)
        self.seed = args.seed
        self.lock = threading.Lock()
        self.done = set()
        self.failed = set()  # rejected, and not asked for again
        self.tokens = [0, 0]
        self.reason = ""  # why the last clip without a question has none
        for path in (self.out, self.rejected):
            for row in rows_of(path):
                try:
                    self.count(row)
                except (LookupError, TypeError):
                    raise InputError(f"{path} holds rows that are not ours: take another --out") from None
        self.failed -= self.done
        if args.retry_rejected:
            self.failed.clear()

    def count(self, row: dict) -> None:
        if "reason" not in row:
            self.done.add(row["id"])
        elif "again" not in row:
            self.failed.add(row["id"])
            self.reason = row["reason"]
        for i in range(2):
            self.tokens[i] += row["tokens"][i]

    def record(self, row: dict) -> None:
        with self.lock:
            self.count(row)
            append_rows(self.rejected if "reason" in row else self.out, [row])

    def stop_if_fruitless(self) -> None:
        if len(self.failed) >= FRUITLESS and 9 * len(self.done) < len(self.failed):
            raise InputError(f"nine in ten rejected, the last because: {self.reason} (--retry_rejected)")

    def left(self, captions: Captions) -> list[tuple]:
        """The clips that are neither finished nor rejected; says how many they are, and their price."""
        finished = self.done | self.failed
        left = [clip for clip in captions.items() if clip[0] not in finished]
        characters = sum(len(prompt_for(texts)) for _, texts in left)
        tokens = [characters / 4.2, 60 * len(left)]
        print(f"{len(captions):,} clips, {len(left):,} to ask: {self.price_of(tokens)}")
        return left

    def price_of(self, tokens: list[float]) -> str:
        dollars = (tokens[0] * self.prices[0] + tokens[1] * self.prices[1]) / 1e6
        said = f"{tokens[0]:,.0f} tokens in, {tokens[1]:,} out, price {dollars:.2f} dollars"
        return f"{said} ({self.prices[0]:g} and {self.prices[1]:g} a million)"


def ask(client: ChatClient, ledger: Ledger, clip: tuple) -> None:
    """Record a clip's question, and of each asking before why it gave none. Raises InputError."""
    name, texts = clip
    message = {"role": "user", "content": prompt_for(texts)}
    for asking in range(ASKINGS):
        ledger.stop_if_fruitless()
        row = {"id": name, "tokens": [0, 0]}
        try:
            text, usage = client.complete([message], max_tokens=LONGEST_ANSWER)
            row |= {"answer": text[:2000], "tokens": list(usage.values())}
            row = question_row(name, *parse_answer(text), seed=ledger.seed, tokens=row["tokens"])
        except (ValueError, Refused) as error:
            row["reason"] = str(error)
            if asking < ASKINGS - 1 and not isinstance(error, Refused):
                row["again"] = True
        ledger.record(row)
        if "again" not in row:
            break


def generate(args: Namespace, captions: Captions) -> None:
    """Ask for every clip that has no question yet. What is being answered when it ends is still recorded."""
    client = ChatClient(args.url, args.model)
    ledger = Ledger(args)
    left = ledger.left(captions)
    pool = ThreadPool(args.workers)
    try:
        asked = pool.imap_unordered(partial(ask, client, ledger), left)
        with tqdm(
            asked, total=len(captions), initial=len(captions) - len(left), unit="clip", dynamic_ncols=True
        ) as bar:
            for _ in bar:
                bar.set_postfix_str(f"{len(ledger.failed)} rejected", refresh=False)
    finally:
        client.stop.set()
        pool.terminate()
        pool.join()
        count = f"{len(ledger.done):,} questions, {len(ledger.failed):,} clips rejected"
        print(f"{count}: {ledger.price_of(ledger.tokens)}")
    if not ledger.done:
        raise InputError(
            f"no question came out of {len(captions):,} clips, the last because: {ledger.reason}"
        )
    if args.keep_shortest:
        keep_shortest(args.out, args.keep_shortest)


def keep_shortest(path: Path, count: int) -> None:
    """Section III-C's filter by length: the `count` shortest questions with choices, in a file beside."""
    rows = rows_of(path)
    rows.sort(key=lambda row: (len("".join([row["question_text"], *row["multi_choice"]])), row["id"]))
    target = path.with_suffix(".shortest.jsonl")
    write_rows(target, rows[:count])
    print(f"{target}: the {len(rows[:count])} shortest of {len(rows)}")


def print_samples(args: Namespace, captions: Captions) -> None:
    """--sample: questions for a person to read, with the captions they come from."""
    rows = [row for row in rows_of(args.out) if row.get("id") in captions]
    if not rows:
        raise InputError(f"{args.out}: no questions to sample from")
    for row in random.Random(args.seed).sample(rows, min(args.sample, len(rows))):
        choices = row["multi_choice"]
        asked = [row["question_text"], *choices, f"answer: {choices[row['answer']]}"]
        print("", row["id"], *captions[row["id"]], *asked, sep="\n  ")


def parse() -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--captions", required=True, nargs="+", type=Path, help="CSV or JSON tables, joined by id")
    add("--out", required=True, type=Path, help="questions in AVQA's format; may exist")
    add(
        "--columns",
        nargs=5,
        metavar=("ID", "CAPTION", "SOUND", "SPEECH", "MUSIC"),
        help="the tables' columns (None: the published names)",
    )
    parser.table(
        "what is asked of whom",
        [
            ("--ids", Path, None, "only these clips: AVQA's questions, VGGSound's CSV, or names, one a line"),
            ("--url", str, "https://api.openai.com/v1/chat/completions", "endpoint"),
            ("--model", str, "gpt-4o-mini", "the endpoint's name of the model"),
            ("--workers", COUNT, 16, "requests at a time"),
            ("--seed", WHOLE, 0, "of the answers' places and of --sample"),
            ("--price_in", float, 0.15, "dollars a million input tokens"),
            ("--price_out", float, 0.60, "dollars a million output tokens"),
            ("--dry_run", bool, False, "print clips, price and one full prompt; write nothing"),
            ("--sample", WHOLE, 0, "print so many finished questions; write nothing"),
            ("--keep_shortest", WHOLE, 0, "so many of the shortest to OUT's .shortest.jsonl"),
            ("--retry_rejected", bool, False, "ask again for what was rejected before"),
        ],
    )
    return parser.parse_args()


def program() -> None:
    args = parse()
    captions = read_captions(args)
    if args.sample:
        print_samples(args, captions)
    elif args.dry_run:
        Ledger(args).left(captions)
        print(f"\n{prompt_for(next(iter(captions.values())))}")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        lock = one_writer(f"{args.out}.lock")
        with lock, logging_redirect_tqdm():
            generate(args, captions)


main = partial(run_program, program)

if __name__ == "__main__":
    sys.exit(main())
