"""Captions -> ChatGPT -> four-choice questions (Section III-C, Fig. 1): AVQA-GPT and VGGS-GPT.

    python gen_qa.py --captions A.csv B.csv --out Q.jsonl --dry_run       (clips, tokens, price, one prompt)
    OPENAI_API_KEY=... python gen_qa.py --captions A.csv B.csv --ids train_qa.json --out Q.jsonl
    python gen_qa.py --captions A.csv B.csv --out Q.jsonl --sample 5      (to read some, with their captions)

Each finished question is a line of Q.jsonl in AVQA's format, which train.py reads as it is; killed at any
moment, the same command goes on. A clip whose answers stay unusable after five askings, or that the server
refuses, is a line of Q.rejected.jsonl, with the reason.
"""

import argparse
import ast
import collections
import concurrent.futures
import errno
import hashlib
import itertools
import json
import math
import random
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captions import Captions, one_line
from chat import ChatClient, Refused, Unreachable
from files import InputError, as_object, one_writer, parse_json, read_text, write_text

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


def prompt_for(texts: list[str]) -> str:
    """Fig. 1 followed by this clip's four captions (A1 overall, A2 sounds, A3 speech, A4 music)."""
    captions = [f"A{i}: {text}\n" for i, text in enumerate(texts, 1)]
    return PROMPT + "E2. input:\n" + "".join(captions) + "output:"


# --------------------------------------------------------------------------------------------------- answers


def read_json(text: str) -> Any:
    return json.JSONDecoder().raw_decode(text)[0]  # the first value; whatever follows it


def read_loose_json(text: str) -> Any:
    return read_json(re.sub(r",\s*([}\]])", r"\1", text))


def read_python(text: str) -> Any:
    return ast.literal_eval(text[: text.find("}") + 1])


def parse_answer(text: str) -> dict:
    """The question in an answer as models write it: after output:, fenced, single-quoted, extra commas."""
    text = text[:20_000]
    for start in itertools.islice(re.finditer(r"\{", text), 20):
        piece = text[start.start() :]
        for read in (read_json, read_loose_json, read_python):
            try:
                row = read(piece)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(row, dict) and "multi_choice" in row:
                return row
    raise ValueError("no question in the answer")


def usable(row: dict, texts: list[str], no_false_music: bool = False) -> tuple[str, list[str]]:
    """(question, choices with the right one first) of a parsed answer, or ValueError with what is wrong."""
    question = row.get("question_text")
    answer = row.get("answer")
    choices = row["multi_choice"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question_text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices are not a list of texts")
    choices = [one_line(choice) for choice in choices]
    different = {choice.casefold() for choice in choices}
    if len(choices) != 4 or len(different) != 4 or "" in different:
        raise ValueError("not four different choices")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str):
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < 4:
        raise ValueError("answer is no index of a choice")
    silent = re.search(r"\bno\b[^.]*\bmusic", texts[3], re.I)
    if no_false_music and silent and re.search(r"\b(music|song|melod|instrument)", question, re.I):
        raise ValueError("asks about music where the captions say that there is none")
    right = choices.pop(answer)
    return one_line(question), [right, *choices]


def question_row(name: str, question: str, choices: list[str], seed: int) -> dict:
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
    }


# ---------------------------------------------------------------------------------------------------- ledger

REJECTED_KEYS = {"id": str, "reason": str, "answer": str}
DONE_KEYS = {
    "id": str,
    "video_name": str,
    "question_text": str,
    "multi_choice": list,
    "answer": int,
    "question_type": str,
}
FRUITLESS = 100  # rejected clips, each paid for five times: one in ten must have given a question by then


@dataclass
class Outcome:
    """What came of one clip: "done", "rejected", "refused" or "unreached"; the row to write; tokens spent."""

    kind: str
    row: dict
    tokens_in: int = 0
    tokens_out: int = 0


def own_rows(path: Path, keys: dict[str, type]) -> Iterator[dict]:
    """The rows that this program wrote, without the half of one that a kill may have left at the end. Raises
    InputError for any other file.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path} is no regular file")  # a FIFO would be waited for
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = as_object(line.decode("utf-8", "replace"))
            typed = all(isinstance(row.get(name), kind) for name, kind in keys.items())
            if typed and row.get("question_type", "Generated") == "Generated":
                yield row
            elif line.endswith(b"\n") or not is_half_row(line, keys):
                raise InputError(f"{path}, line {number}: not one of our rows; move the file away")


def is_half_row(line: bytes, keys: dict[str, type]) -> bool:
    """Whether a line is the beginning of one of our rows: our keys, in order, with their kinds of value."""
    rest = line.decode("utf-8", "ignore")
    mark = "{"
    for name, kind in keys.items():
        key = f'{mark}"{name}": '
        if not rest.startswith(key):
            return key.startswith(rest)
        rest = rest[len(key) :]
        mark = ", "
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):  # cut within the value
            return rest[:1] in {str: '"', list: "[", int: ""}[kind]
        if not isinstance(value, kind):
            return False
        rest = rest[end:]
    return "}".startswith(rest)


def mend_end(path: Path) -> None:
    """Make ready to append: a half last row is cut off, a whole one gets its line end. For own_rows only."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        whole = 0
        line = b"\n"
        for line in file:
            whole += len(line) * line.endswith(b"\n")
        if line.endswith(b"\n"):
            return
        if as_object(line.decode("utf-8", "replace")):
            file.write(b"\n")
        else:
            file.truncate(whole)


class Ledger:
    """Q.jsonl, Q.rejected.jsonl and Q.summary.json: what is finished, and what it took."""

    def __init__(self, args: argparse.Namespace):
        self.out = args.out
        self.rejected = beside(args.out, "rejected.jsonl")
        self.summary = beside(args.out, "summary.json")
        self.prices = (args.price_in, args.price_out)  # of a million tokens
        self.done_ids = set()
        self.rejected_ids = set()
        self.places = [0, 0, 0, 0]
        self.count = collections.Counter()  # of this start, by kind
        self.failed_in_a_row = 0  # clips that the server failed on
        self.reason = ""  # why the last clip without a question has none
        self.refused = []  # outcomes held back until the server has answered something: see `settle`
        for row in own_rows(self.out, DONE_KEYS):
            self.done_ids.add(row["id"])
            if row["answer"] in range(4):
                self.places[row["answer"]] += 1
        for row in own_rows(self.rejected, REJECTED_KEYS):
            self.rejected_ids.add(row["id"])
        self.tokens_in = self.tokens_out = self.retries = 0
        if self.summary.exists():
            try:
                before = parse_json(read_text(self.summary))
                self.tokens_in, self.tokens_out = map(int, before["tokens"])
                self.retries = int(before["retries"])
            except (ValueError, KeyError, TypeError, OverflowError):
                raise InputError(f"{self.summary} is damaged or not ours: move it away") from None

    @property
    def price(self) -> float:
        per_million_in, per_million_out = self.prices
        cost = self.tokens_in * per_million_in + self.tokens_out * per_million_out
        return round(cost / 1e6, 4)

    def has(self, name: str) -> bool:
        return name in self.done_ids or name in self.rejected_ids

    def total_done(self) -> int:
        return len(self.done_ids) + self.count["done"]

    def total_rejected(self) -> int:
        return len(self.rejected_ids) + self.count["rejected"]

    def record(self, outcome: Outcome) -> None:
        self.count[outcome.kind] += 1
        self.tokens_in += outcome.tokens_in
        self.tokens_out += outcome.tokens_out
        self.reason = outcome.row.get("reason", self.reason)
        self.failed_in_a_row += 1
        if outcome.kind != "unreached":
            self.failed_in_a_row = 0
        if outcome.kind == "done":
            append(self.out, outcome.row)
            self.places[outcome.row["answer"]] += 1
            self.settle()
        elif outcome.kind == "rejected":
            append(self.rejected, outcome.row)
        elif outcome.kind == "refused":
            self.refused.append(outcome.row)

    def settle(self) -> None:
        """Write refused clips down as rejected. Not before the server has answered anything: if it refuses
        all that it is asked, they are not to blame, and the next start asks for them again."""
        for row in self.refused:
            append(self.rejected, row)
        self.count["rejected"] += len(self.refused)
        self.refused.clear()

    def state(self, client: ChatClient) -> dict:
        """Totals so far, also written to the summary file."""
        row = {
            "done": self.total_done(),
            "rejected": self.total_rejected(),
            "unreached": self.count["unreached"],
            "retries": self.retries + client.retries,
            "tokens": [self.tokens_in, self.tokens_out],
            "price": self.price,
            "answer_places": self.places,
        }
        write_text(self.summary, json.dumps(row, indent=1))
        return row


def beside(out: Path, name: str) -> Path:
    """Q.jsonl -> Q.NAME; any other file -> FILE.NAME, so that no two runs share one."""
    if out.suffix == ".jsonl":
        return out.with_suffix(f".{name}")
    return Path(f"{out}.{name}")


def append(path: Path, row: dict) -> None:
    """Append the row in one write, so that a kill cuts at most this line."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if file.write(line) < len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, f"no space left for {path}")


def keep_shortest(path: Path, count: int) -> None:
    """Section III-C's filter by length: the `count` shortest questions with choices, in a file beside."""
    lengths = []
    for row in own_rows(path, DONE_KEYS):
        words = [row["question_text"], *map(str, row["multi_choice"])]
        lengths.append((len("".join(words)), row["id"]))
    lengths.sort()
    kept = {name for _, name in lengths[:count]}
    target = beside(path, "shortest.jsonl")
    lines = []
    for row in own_rows(path, DONE_KEYS):
        if row["id"] in kept:
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(target, "".join(lines))
    longest = lengths[len(kept) - 1][0]
    print(f"{target}: the {len(kept)} shortest of {len(lengths)}, up to {longest} characters")


def print_samples(args: argparse.Namespace, captions: Captions) -> None:
    """--sample: questions for a person to read, with the captions they come from."""
    rows = list(own_rows(args.out, DONE_KEYS))
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


# ------------------------------------------------------------------------------------------------------- run


def ask(client: ChatClient, name: str, texts: list[str], args: argparse.Namespace) -> Outcome:
    """Ask for one clip's question. Raises InputError and Unreachable where no further clip needs asking."""
    row = {"id": name, "reason": "", "answer": ""}
    outcome = Outcome("rejected", row)
    message = {"role": "user", "content": prompt_for(texts)}
    for _ in range(5):  # an unusable answer is asked for 4 more times
        try:
            text, usage = client.complete([message], max_tokens=args.max_tokens)
            outcome.tokens_in += usage["prompt_tokens"]
            outcome.tokens_out += usage["completion_tokens"]
            row["answer"] = text[:20_000]
            question, choices = usable(parse_answer(text), texts, args.no_false_music)
            outcome.row = question_row(name, question, choices, args.seed)
            outcome.kind = "done"
            return outcome
        except ValueError as error:
            row["reason"] = str(error)
        except Refused as error:
            row["reason"] = str(error)
            outcome.kind = "refused"
            return outcome
        except Unreachable as error:
            if client.stop.is_set():
                raise
            row["reason"] = str(error)
            outcome.kind = "unreached"
            return outcome
    return outcome


def ask_all(clips: Iterator, client: ChatClient, args: argparse.Namespace, ledger: Ledger, bar: tqdm) -> None:
    """Ask for every clip; the main thread records what comes. Raises what ends the run, answers recorded."""
    running = set()  # twice as many as there are workers: none has to wait, and few clips are in memory
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        try:
            while True:
                for name, texts in itertools.islice(clips, 2 * args.workers - len(running)):
                    running.add(pool.submit(ask, client, name, texts, args))
                if not running:
                    return
                finished = concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done
                for future in finished:
                    running.remove(future)
                    ledger.record(future.result())
                    bar.update()
                    if bar.n % 200 == 0:
                        ledger.state(client)
                counts = {"rejected": ledger.count["rejected"], "retries": client.retries}
                bar.set_postfix(counts, price=ledger.price, refresh=False)
                if ledger.failed_in_a_row >= args.workers:  # every worker in turn: the server is gone
                    raise Unreachable(ledger.reason)
                rejected = ledger.total_rejected()
                if rejected >= FRUITLESS and 9 * ledger.total_done() < rejected:
                    done = f"{rejected} clips rejected, {ledger.total_done()} questions"
                    raise InputError(f"{done}, the last because: {ledger.reason} (see --retry_rejected)")
        finally:
            client.stop.set()
            for future in running:
                if future.exception() is None:
                    ledger.record(future.result())


def estimate(args: argparse.Namespace, captions: Captions, ledger: Ledger) -> tuple[int, int, list[str]]:
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
        of = f" of the clips in {args.ids}" * bool(args.ids)
        raise InputError(f"{captions.names}: no captions{of}")
    tokens = characters / 4.2
    answers = left * 60
    price = (tokens * args.price_in + answers * args.price_out) / 1e6
    print(
        f"{total:,} clips, {left:,} to ask: about {tokens:,.0f} tokens in, {answers:,} out, price {price:.2f}"
    )
    return total, left, example


def generate(args: argparse.Namespace, captions: Captions) -> None:
    """Ask for every clip that has no question yet."""
    client = ChatClient(args.url, args.model, tries=args.tries, timeout=args.timeout)
    ledger = Ledger(args)
    if args.keep_shortest:
        list(own_rows(beside(args.out, "shortest.jsonl"), DONE_KEYS))  # InputError if it is not ours
    mend_end(ledger.out)
    mend_end(ledger.rejected)
    if args.retry_rejected:
        ledger.rejected.unlink(missing_ok=True)
        ledger.rejected_ids.clear()
    total, left, _ = estimate(args, captions, ledger)
    clips = (clip for clip in captions if not ledger.has(clip[0]))
    try:
        with tqdm(total=total, initial=total - left, unit="clip", dynamic_ncols=True) as bar:
            ask_all(clips, client, args, ledger, bar)
        if ledger.refused and not is_answered(captions, args, ledger):
            raise InputError(f"the server refuses all that it is asked, the last because: {ledger.reason}")
        ledger.settle()
    finally:
        print(json.dumps(ledger.state(client)))
    if ledger.count["unreached"]:
        raise InputError("some clips were not reached; start again to ask for them")
    if not ledger.total_done():
        raise InputError(f"no question came out of {total:,} clips, of the last because: {ledger.reason}")
    if args.keep_shortest:
        keep_shortest(args.out, args.keep_shortest)


def is_answered(captions: Captions, args: argparse.Namespace, ledger: Ledger) -> bool:
    """Whether the server answered anything in this start, or does now, asked for a clip that it knows."""
    if ledger.count["done"] or ledger.count["rejected"]:
        return True
    for name, texts in captions:
        if name in ledger.done_ids:
            client = ChatClient(args.url, args.model, tries=args.tries, timeout=args.timeout)
            return ask(client, name, texts, args).kind != "refused"
    return False


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for a number that no run can be made with."""
    bounds = {
        "workers": (1, 1000),
        "tries": (0, 100),
        "timeout": (0.01, 86_400),
        "max_tokens": (1, 1_000_000),
    }
    bounds["price_in"] = bounds["price_out"] = (0, 1e9)
    bounds["seed"] = bounds["sample"] = bounds["keep_shortest"] = (0, 2**63)
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        if math.isnan(value) or not least <= value <= most:
            raise InputError(f"--{name} {value}: must be {least:,} to {most:,}")
    if not args.out.name or args.out.is_dir():
        raise InputError(f"--out {args.out}: must be a file's name, such as questions.jsonl")


def parse_args() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("--captions", required=True, nargs="+", type=Path, help="CSV or JSON tables, joined by id")
    add("--out", required=True, type=Path, help="questions in AVQA's format; may exist")
    add("--ids", help="only the clips of this list: AVQA's questions, VGGSound's CSV, or names, one a line")
    add("--url", default="https://api.openai.com/v1/chat/completions", help="endpoint (default: %(default)s)")
    add("--model", default="gpt-4o-mini", help="the endpoint's name of the model (default: %(default)s)")
    add("--max_tokens", type=int, default=512, help="longest answer; one has 60 (default: %(default)s)")
    add("--workers", type=int, default=16, help="requests at a time (default: %(default)s)")
    add("--tries", type=int, default=12, help="times a failed request is sent again (default: %(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds for a whole request (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the answers' places and of --sample (default: %(default)s)")
    add("--price_in", type=float, default=0.15, help="of a million input tokens (default: %(default)s)")
    add("--price_out", type=float, default=0.60, help="of a million output tokens (default: %(default)s)")
    add("--dry_run", action="store_true", help="print clips, price and one full prompt; write nothing")
    add("--sample", type=int, default=0, metavar="N", help="print N finished questions; write nothing")
    add(
        "--keep_shortest", type=int, default=0, metavar="N", help="write the N shortest to OUT.shortest.jsonl"
    )
    add("--retry_rejected", action="store_true", help="ask again for what was rejected before")
    add("--no_false_music", action="store_true", help="no question about music where A4 says there is none")
    return parser.parse_args()


def main() -> None:
    warnings.simplefilter("ignore", SyntaxWarning)  # of Python literals in answers
    sys.stdout.reconfigure(errors="replace")
    args = parse_args()
    try:
        check_options(args)
        captions = Captions(args.captions, args.ids)
        if args.sample:
            print_samples(args, captions)
        elif args.dry_run:
            example = estimate(args, captions, Ledger(args))[2]
            print(f"\n{prompt_for(example)}")
        else:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with one_writer(f"{args.out}.lock"):
                generate(args, captions)
    except (InputError, Unreachable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
