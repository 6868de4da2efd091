"""Captions -> ChatGPT -> four-choice questions (Section III-C, Fig. 1): AVQA-GPT and VGGS-GPT.

    python gen_qa.py --captions A.csv B.csv --out Q.jsonl --dry_run       (clips, tokens, price, one prompt)
    OPENAI_API_KEY=... python gen_qa.py --captions A.csv B.csv --ids train_qa.json --out Q.jsonl
    python gen_qa.py --captions A.csv B.csv --out Q.jsonl --sample 5      (to read some, with their captions)

The captions are CSV, JSON lines or a JSON list, joined by the clip's id; AudioSetCaps publishes two for
VGGSound: overall captions (id, caption) and answers on sounds, speech and music (id, answer_1 to answer_3).
Each finished question is a line of Q.jsonl in AVQA's format with the tokens that it took; killed at any
moment, the same command goes on. A clip whose answers stay unusable after five askings, or that the server
refuses, is a line of Q.rejected.jsonl with the reason.
"""

import argparse
import collections
import concurrent.futures
import csv
import hashlib
import itertools
import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from chat import ChatClient, Refused
from files import InputError, append_rows, first_line, one_writer, parse_json, read_text, rows_of, write_text

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
                row[0] = f"{row[0]}_{int(row[1]):06d}"
            if row and row[-1] != "test":
                names.append(row[0].strip())
    return {same_clip(name): name for name in map(str, names)}


class Captions:
    """The clips of one table, or of several that are joined by id; those of the list `ids` only, if given.

    The largest table is read row by row, at each pass; the captions of the others are held in memory. What is
    left out is counted and named: `print_left_out`.
    """

    def __init__(self, paths: list[Path], ids: Path | None, columns: list[str] | None):
        self.wanted = None
        if ids:
            self.wanted = wanted_clips(ids)
        names = PUBLISHED
        if columns:
            names = [[column] for column in columns]
        self.place = {}  # 0 to 3 for A1 to A4 -> (table, its column of ids, its column of captions)
        found = []
        for path in paths:
            header = list(next(table_rows(path), {}))
            found.append(f"{path} has {', '.join(map(str, header))}")
            (key, *_), *captions = [[name for name in one if name in header] + [None] for one in names]
            for i, (column, *_) in enumerate(captions):
                if key and column:
                    self.place.setdefault(i, (path, key, column))
        if len(self.place) < 4:
            raise InputError(
                f"captions need columns of {names}, but {'; '.join(found)}: name them by --columns"
            )
        used = {path: key for path, key, _ in self.place.values()}
        self.path = max(used, key=lambda path: path.stat().st_size)
        self.key = used[self.path]
        self.held = collections.defaultdict(dict)  # 0 to 3 -> {clip: caption}
        for i, (path, key, column) in self.place.items():
            if path != self.path:
                for row in table_rows(path):
                    clip = same_clip(value_of(row, key))
                    if self.wanted is None or clip in self.wanted:
                        self.held[i].setdefault(clip, value_of(row, column))

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """(clip's name, [A1, A2, A3, A4]) one at a time, each clip once."""
        self.left_out = collections.defaultdict(list)  # why -> names
        wanted = self.wanted or {}
        met = set()
        for row in table_rows(self.path):
            name = value_of(row, self.key)
            clip = same_clip(name)
            if self.wanted is not None and clip not in wanted:
                continue
            texts = []
            for i in range(4):
                text = value_of(row, self.place[i][2])
                if i in self.held:
                    text = self.held[i].get(clip)
                texts.append(text)
            if not name or clip in met:
                self.left_out["without an id or met before"].append(name)
            elif None in texts or not texts[0]:
                self.left_out["without an overall caption or not in every table"].append(name)
            else:
                yield wanted.get(clip, name), texts
            met.add(clip)
        for captions in self.held.values():
            self.left_out["in one table alone"] += sorted(captions.keys() - met)
            met |= captions.keys()
        self.left_out["of --ids, without captions"] += sorted(wanted.keys() - met)

    def print_left_out(self) -> None:
        for why, names in self.left_out.items():
            if names:
                print(f"{len(names):,} left out, {why}: {', '.join(names[:10])}")


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


def ask(client: ChatClient, name: str, texts: list[str], seed: int) -> dict:
    """One clip's row: a question, or a reason why there is none. Raises InputError."""
    tokens = [0, 0]
    message = {"role": "user", "content": prompt_for(texts)}
    for _ in range(ASKINGS):
        text = ""
        try:
            text, usage = client.complete([message], max_tokens=LONGEST_ANSWER)
            tokens[0] += usage["prompt_tokens"]
            tokens[1] += usage["completion_tokens"]
            question, choices = parse_answer(text)
            return question_row(name, question, choices, seed=seed, tokens=tokens)
        except ValueError as error:
            reason = str(error)
        except Refused as error:
            reason = str(error)
            break
    return {"id": name, "reason": reason, "answer": text[:2000], "tokens": tokens}


# ------------------------------------------------------------------------------------------------------- run


class Ledger:
    """Q.jsonl and Q.rejected.jsonl: what is finished, and the tokens (in, out) that it took."""

    def __init__(self, args: argparse.Namespace):
        self.out = args.out
        self.rejected = args.out.with_suffix(".rejected.jsonl")
        self.prices = (args.price_in, args.price_out)
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
        if "reason" in row:
            self.failed.add(row["id"])
            self.reason = row["reason"]
        else:
            self.done.add(row["id"])
        for i in range(2):
            self.tokens[i] += row["tokens"][i]

    def record(self, row: dict) -> None:
        self.count(row)
        append_rows(self.rejected if "reason" in row else self.out, [row])

    def has(self, name: str) -> bool:
        return name in self.done or name in self.failed

    def price_of(self, tokens: list[float]) -> str:
        dollars = (tokens[0] * self.prices[0] + tokens[1] * self.prices[1]) / 1e6
        said = f"{tokens[0]:,.0f} tokens in, {tokens[1]:,} out, price {dollars:.2f} dollars"
        return f"{said} ({self.prices[0]:g} and {self.prices[1]:g} a million)"


def ask_all(clips: Iterator, client: ChatClient, args: argparse.Namespace, ledger: Ledger, bar: tqdm) -> None:
    """Ask for every clip; the main thread records what comes. Raises what ends the run, answers recorded."""
    running = set()  # twice as many as there are workers: none has to wait, and few clips are in memory
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        try:
            while True:
                for name, texts in itertools.islice(clips, 2 * args.workers - len(running)):
                    running.add(pool.submit(ask, client, name, texts, args.seed))
                if not running:
                    return
                finished = concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done
                for future in finished:
                    running.remove(future)
                    ledger.record(future.result())
                    bar.update()
                bar.set_postfix_str(f"{len(ledger.failed)} rejected", refresh=False)
                if len(ledger.failed) >= FRUITLESS and 9 * len(ledger.done) < len(ledger.failed):
                    raise InputError(
                        f"nine in ten rejected, the last because: {ledger.reason} (--retry_rejected)"
                    )
        finally:
            client.stop.set()
            for future in running:
                if future.exception() is None:
                    ledger.record(future.result())


def estimate(captions: Captions, ledger: Ledger) -> tuple[int, int, list[str]]:
    """Say how many clips and tokens, and what price. Returns (clips, clips left, an example's captions)."""
    total = left = characters = 0
    example = []
    for name, texts in captions:
        total += 1
        example = example or texts
        if not ledger.has(name):
            left += 1
            characters += len(prompt_for(texts))
    captions.print_left_out()
    if not total:
        raise InputError(f"{captions.path}: no captions of the clips that are asked for")
    tokens = [characters / 4.2, 60 * left]
    print(f"{total:,} clips, {left:,} to ask: {ledger.price_of(tokens)}")
    return total, left, example


def generate(args: argparse.Namespace, captions: Captions) -> None:
    """Ask for every clip that has no question yet."""
    client = ChatClient(args.url, args.model)
    ledger = Ledger(args)
    total, left, _ = estimate(captions, ledger)
    clips = (clip for clip in captions if not ledger.has(clip[0]))
    try:
        with tqdm(total=total, initial=total - left, unit="clip", dynamic_ncols=True) as bar:
            ask_all(clips, client, args, ledger, bar)
    finally:
        count = f"{len(ledger.done):,} questions, {len(ledger.failed):,} clips rejected"
        print(f"{count}: {ledger.price_of(ledger.tokens)}")
    if not ledger.done:
        raise InputError(f"no question came out of {total:,} clips, of the last because: {ledger.reason}")
    if args.keep_shortest:
        keep_shortest(args.out, args.keep_shortest)


def keep_shortest(path: Path, count: int) -> None:
    """Section III-C's filter by length: the `count` shortest questions with choices, in a file beside."""
    rows = rows_of(path)
    rows.sort(key=lambda row: (len("".join([row["question_text"], *row["multi_choice"]])), row["id"]))
    target = path.with_suffix(".shortest.jsonl")
    write_text(target, "".join(json.dumps(row) + "\n" for row in rows[:count]))
    print(f"{target}: the {len(rows[:count])} shortest of {len(rows)}")


def print_samples(args: argparse.Namespace, captions: Captions) -> None:
    """--sample: questions for a person to read, with the captions they come from."""
    rows = rows_of(args.out)
    if not rows:
        raise InputError(f"{args.out}: no questions to sample from")
    rows = random.Random(args.seed).sample(rows, min(args.sample, len(rows)))
    chosen = {row["id"]: row for row in rows}
    for name, texts in captions:
        if name in chosen:
            row = chosen[name]
            print(f"\n{name}")
            for i, text in enumerate(texts, 1):
                print(f"  A{i}: {text}")
            print(f"\n  {row['question_text']}")
            for i, choice in enumerate(row["multi_choice"]):
                print("  " + " *"[i == row["answer"]] + f" {choice}")


def parse_args() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("--captions", required=True, nargs="+", type=Path, help="CSV or JSON tables, joined by id")
    names = ("ID", "CAPTION", "SOUND", "SPEECH", "MUSIC")
    add("--columns", nargs=5, metavar=names, help="the tables' columns (default: the published names)")
    add("--out", required=True, type=Path, help="questions in AVQA's format; may exist")
    add("--ids", type=Path, help="only these clips: AVQA's questions, VGGSound's CSV, or names, one a line")
    add("--url", default="https://api.openai.com/v1/chat/completions", help="endpoint (default: %(default)s)")
    add("--model", default="gpt-4o-mini", help="the endpoint's name of the model (default: %(default)s)")
    add("--workers", type=int, default=16, help="requests at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the answers' places and of --sample (default: %(default)s)")
    add("--price_in", type=float, default=0.15, help="dollars a million input tokens (default: %(default)s)")
    add(
        "--price_out", type=float, default=0.60, help="dollars a million output tokens (default: %(default)s)"
    )
    add("--dry_run", action="store_true", help="print clips, price and one full prompt; write nothing")
    add("--sample", type=int, default=0, metavar="N", help="print N finished questions; write nothing")
    add("--keep_shortest", type=int, default=0, metavar="N", help="the N shortest to OUT's .shortest.jsonl")
    add("--retry_rejected", action="store_true", help="ask again for what was rejected before")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        captions = Captions(args.captions, args.ids, args.columns)
        if args.sample:
            print_samples(args, captions)
        elif args.dry_run:
            example = estimate(captions, Ledger(args))[2]
            print(f"\n{prompt_for(example)}")
        else:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            lock = one_writer(f"{args.out}.lock")
            with lock, logging_redirect_tqdm():
                generate(args, captions)
    except (InputError, OSError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
