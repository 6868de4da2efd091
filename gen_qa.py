"""Captions -> ChatGPT -> four-choice questions (Section III-C, Fig. 1): AVQA-GPT and VGGS-GPT.

    python gen_qa.py --captions captions.csv --out Q.jsonl --dry_run       (clips, tokens, price, one prompt)
    OPENAI_API_KEY=... python gen_qa.py --captions captions.csv --ids train_qa.json --out Q.jsonl
    python gen_qa.py --captions captions.csv --out Q.jsonl --sample 5      (to read some, with their captions)

Raw HTTP to an OpenAI-compatible endpoint, a connection per worker. Each finished question is a line of
Q.jsonl in AVQA's format, which train.py reads as it is; killed at any moment, the same command goes on. A
clip whose answers stay unusable after five askings is a line of Q.rejected.jsonl, with the reason.
"""

import argparse
import ast
import collections
import contextlib
import csv
import hashlib
import itertools
import json
import random
import re
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from chat import ChatClient, Refused, Unreachable
from files import InputError, parse_json, read_text, write_text

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


def prompt_for(texts):
    """Fig. 1 followed by this clip's four captions (A1 overall, A2 sounds, A3 speech, A4 music)."""
    return PROMPT + "E2. input:\n" + "".join(f"A{i}: {t}\n" for i, t in enumerate(texts, 1)) + "output:"


def table_rows(path):
    """The rows of a CSV or JSON-lines file as dicts, one at a time: the tables have 100,000s of rows."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.read(1)
            file.seek(0)
            if first == "{":
                yield from (row for line in file if isinstance(row := row_or_none(line), dict))
            else:
                yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV or JSON-lines table: {error}") from None


def row_or_none(line):
    with contextlib.suppress(ValueError):
        return parse_json(line)


def find_columns(path):
    """The columns of id, overall caption, sounds, speech and music, found by what the first rows hold.

    An answer may follow its question, a column that never changes and tells what the answer is about.
    """
    rows = list(itertools.islice(table_rows(path), 200))
    names = [name for name in (rows[0] if rows else {}) if isinstance(rows[0][name], str)]
    if {"id", "caption", "sound", "speech", "music"} <= set(names):
        return "id", "caption", "sound", "speech", "music"
    values = {name: [str(row.get(name) or "") for row in rows] for name in names}

    def share(name, pattern):
        return sum(bool(re.search(pattern, value, re.I)) for value in values[name]) / len(rows)

    ids = [name for name in names if share(name, r"^\S+_\d+(_\d+)?(\.\w+)?$") > 0.9]
    same = [name for name in names if len(rows) > 1 and len(set(values[name])) == 1]
    questions = [name for name in same if share(name, r"\?$|describe|give")]
    texts = [n for n in names if n not in ids + questions and share(n, r"\w+\W+\w+\W+\w+") > 0.5]
    asked = {b: values[a][0].lower() for a, b in itertools.pairwise(names) if a in questions and b in texts}

    def about(pattern):
        fit = {n: (bool(re.search(pattern, asked.get(n, ""))), share(n, pattern)) for n in texts}
        best = max(fit, key=fit.get, default=None)
        if best is None or max(fit[best]) <= 0.5:
            raise InputError(f"{path}: no column of captions about {pattern!r} among {names}")
        return texts.pop(texts.index(best))

    music, speech = about("music"), about("speech|speak|voice")
    texts.sort(key=lambda n: (n in asked, "caption" not in n.lower()))  # the overall caption comes first
    if not ids or len(texts) < 2:
        raise InputError(
            f"{path}: need columns of id, overall caption, sounds, speech and music among {names}"
        )
    return ids[0], texts[0], texts[1], speech, music


def same_clip(name):
    """The names of one clip as one: a YouTube id of 11 characters and a start second, whatever follows."""
    name = re.sub(r"\.(wav|flac|mp3|ogg|mp4)$", "", name)
    match = re.fullmatch(r"(.{11})_(\d+)(_\d+)?", name)
    return f"{match[1]}_{int(match[2])}" if match else name


def wanted_clips(path):
    """--ids: AVQA's questions, VGGSound's list (its train rows) or names, one a line -> {same_clip: name}."""
    text = read_text(path)
    if text.lstrip().startswith(("[", "{")):
        found = re.findall(r'"(?:video_name|id)"\s*:\s*"([^"]+)"', text)
    else:
        rows = [row for row in csv.reader(text.splitlines()) if row and row[3:4] != ["test"]]
        found = [f"{r[0]}_{int(r[1]):06d}" if r[1:] and r[1].isdigit() else r[0] for r in rows]
    if not found:
        raise InputError(f"{path}: no clip names found")
    return {same_clip(name): name for name in found}


def read_captions(path, ids=None):
    """(clip's name, [A1, A2, A3, A4]) one at a time, each name once; those of `ids` only."""
    key, *columns = find_columns(path)
    wanted, seen = wanted_clips(ids) if ids else None, set()
    for row in table_rows(path):
        texts = [" ".join(str(row.get(column) or "").split()) for column in columns]
        name = str(row.get(key) or "").strip()
        if wanted is not None:
            name = wanted.get(same_clip(name), "")
        if name and texts[0] and name not in seen:
            seen.add(name)
            yield name, texts


def parse_answer(text):
    """The question in an answer as models write it: after output:, fenced, single-quoted, extra commas."""
    text = text[:20_000]
    for start in [m.start() for m in re.finditer(r"\{", text)][:20]:
        piece = text[start : text.rfind("}") + 1]
        tidy = re.sub(r",\s*([}\]])", r"\1", piece)
        literal = piece[: piece.find("}") + 1]
        decode = json.JSONDecoder().raw_decode  # -> (value, where it ends)
        for read, source in ((decode, piece), (decode, tidy), (ast.literal_eval, literal)):
            try:
                row = read(source)[0] if read == decode else read(source)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(row, dict) and "multi_choice" in row:
                return row
    raise ValueError("no question in the answer")


def checked(row, texts, no_false_music=False):
    """(question, choices with the right one first) of a parsed answer, or ValueError with what is wrong."""
    question, choices, answer = row.get("question_text"), row.get("multi_choice"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question_text")
    choices = choices if isinstance(choices, list) else []
    choices = [" ".join(choice.split()) if isinstance(choice, str) else "" for choice in choices]
    if len(choices) != 4 or not all(choices) or len({choice.casefold() for choice in choices}) != 4:
        raise ValueError("not four different choices")
    if isinstance(answer, str):  # "2", or the choice itself
        answer = choices.index(answer) if answer in choices else int(answer)
    if type(answer) is not int or not 0 <= answer < 4:
        raise ValueError("answer is no index of a choice")
    silent = re.search(r"\bno\b[^.]*\bmusic", texts[3], re.I)
    if no_false_music and silent and re.search(r"\b(music|song|melod|instrument)", question, re.I):
        raise ValueError("asks about music where the captions say that there is none")
    return " ".join(question.split()), [choices[answer], *choices[:answer], *choices[answer + 1 :]]


def question_row(name, question, choices, seed):
    """AVQA's row. The right answer's place follows from clip and seed: 25 % each, on any machine."""
    place = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") % 4
    choices = [*choices[1 : place + 1], choices[0], *choices[place + 1 :]]
    row = {"id": name, "video_name": name, "question_text": question, "multi_choice": choices}
    return row | {"answer": place, "question_type": "Generated"}


class Ledger:
    """Q.jsonl, Q.rejected.jsonl and Q.summary.json: what is finished, and what it took."""

    def __init__(self, args):
        self.out, self.prices = args.out, (args.price_in, args.price_out)
        self.rejected, self.summary = map(args.out.with_suffix, (".rejected.jsonl", ".summary.json"))
        self.places, self.count = collections.Counter(), collections.Counter()
        before = {"tokens": [0, 0], "retries": 0, "price": 0.0}
        before |= json.loads(self.summary.read_text()) if self.summary.exists() else {}
        self.tokens, self.retries, self.price = before["tokens"], before["retries"], before["price"]
        self.finished = {"done": self.read(self.out), "rejected": self.read(self.rejected)}

    def read(self, path):
        """The ids in a JSON-lines file. A half-written last line, left by a kill, is cut off."""
        ids, good = set(), 0
        if not path.exists():
            return ids
        with open(path, "rb+") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                if not isinstance(row := row_or_none(line), dict) or "id" not in row:
                    raise InputError(f"{path}, line {number}: not one of our rows; move the file away")
                ids.add(row["id"])
                self.places[row.get("answer")] += 1
                good += len(line)
            file.truncate(good)
        return ids

    def has(self, name):
        return any(name in ids for ids in self.finished.values())

    def write(self, outcome, row, tokens):
        """Append the row in one write, so that a kill cuts at most this line."""
        with open(self.out if outcome == "done" else self.rejected, "ab", buffering=0) as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        self.places[row["answer"]] += 1
        self.count[outcome] += 1
        self.tokens = [a + b for a, b in zip(self.tokens, tokens, strict=True)]
        self.price = round((self.tokens[0] * self.prices[0] + self.tokens[1] * self.prices[1]) / 1e6, 4)

    def state(self, client):
        """Totals so far, also written to the summary file."""
        done, rejected = (len(self.finished[k]) + self.count[k] for k in ("done", "rejected"))
        row = {"done": done, "rejected": rejected, "unreached": self.count["unreached"]}
        row |= {"retries": self.retries + client.retries, "tokens": self.tokens, "price": self.price}
        row["answer_places"] = [self.places[i] for i in range(4)]
        write_text(self.summary, json.dumps(row, indent=1))
        return row


def keep_shortest(path, count):
    """Section III-C's filter by length: the `count` shortest questions with choices, in a file beside."""
    with open(path, encoding="utf-8") as file:
        rows = sorted(
            (len("".join([r["question_text"], *r["multi_choice"]])), r["id"]) for r in map(json.loads, file)
        )
    kept, target = {name for _, name in rows[:count]}, path.with_suffix(".shortest.jsonl")
    with open(path, encoding="utf-8") as file:
        write_text(target, "".join(line for line in file if json.loads(line)["id"] in kept))
    print(f"{target}: the {len(kept)} shortest of {len(rows)}, up to {rows[:count][-1][0]} characters")


def print_samples(args):
    """--sample: questions for a person to read, with the captions they come from."""
    rows = [json.loads(line) for line in read_text(args.out).splitlines()]
    rows = random.Random(args.seed).sample(rows, min(args.sample, len(rows)))
    chosen = {row["id"]: row for row in rows}
    for name, texts in read_captions(args.captions, args.ids):
        if row := chosen.get(name):
            print(f"\n{name}", *(f"A{i}: {text}" for i, text in enumerate(texts, 1)), sep="\n  ")
            marked = (f"{'*' if i == row['answer'] else ' '} {c}" for i, c in enumerate(row["multi_choice"]))
            print("", row["question_text"], *marked, sep="\n  ")


def ask(client, name, texts, args):
    """One clip -> ("done", its question) or ("rejected", why and the raw answer), and the tokens spent."""
    spent, raw, reason = [0, 0], "", ""
    for _ in range(5):  # an unusable answer is asked for 4 more times
        try:
            raw, tokens = client.complete([{"role": "user", "content": prompt_for(texts)}])
            spent = [a + b for a, b in zip(spent, tokens, strict=True)]
            question, choices = checked(parse_answer(raw), texts, args.no_false_music)
            return "done", question_row(name, question, choices, args.seed), spent
        except (ValueError, Refused) as error:
            reason = str(error)
    return "rejected", {"id": name, "reason": reason, "answer": raw}, spent


def work(todo, client, args, ledger, bar, lock, failures):
    """One worker: take the next clip, ask, write it down; until none is left or something stops the run."""
    while not client.stop.is_set():
        with lock:
            if (clip := next(todo, None)) is None:
                return
        try:
            outcome, row, tokens = ask(client, *clip, args)
            with lock:
                ledger.write(outcome, row, tokens)
                bar.update()
                counts = {"rejected": ledger.count["rejected"], "retries": client.retries}
                bar.set_postfix(counts, tokens=sum(ledger.tokens), price=ledger.price, refresh=False)
                if bar.n % 200 == 0:
                    ledger.state(client)
                failures["in a row"] = 0
        except Unreachable as error:  # left for the next start; every worker in turn: the server is gone
            with lock:
                ledger.count["unreached"] += 1
                failures["in a row"] += 1
            if failures["in a row"] >= args.workers:
                failures.setdefault("fatal", str(error))
                client.stop.set()
        except Exception as error:  # a thread's own traceback would be lost among the others'
            failures.setdefault(
                "fatal", str(error) if isinstance(error, InputError) else f"{clip[0]}: {error!r}"
            )
            client.stop.set()


def estimate(args, ledger):
    """Say how many clips and tokens, and what price. Returns (clips, clips left, an example's captions)."""
    total, left, characters, example = 0, 0, 0, None
    for name, texts in read_captions(args.captions, args.ids):
        total, example, new = total + 1, example or texts, not ledger.has(name)
        left, characters = left + new, characters + len(prompt_for(texts)) * new
    if not total:
        raise InputError(
            f"{args.captions}: no captions" + (f" of the clips in {args.ids}" if args.ids else "")
        )
    tokens, answers = characters / 4.2, left * 60
    price = (tokens * args.price_in + answers * args.price_out) / 1e6
    print(
        f"{total:,} clips, {left:,} to ask: about {tokens:,.0f} tokens in, {answers:,} out, price {price:.2f}"
    )
    return total, left, example


def generate(args):
    """Ask for every clip that has no question yet. Returns the exit code."""
    if args.workers < 1 or args.keep_shortest < 0:
        raise InputError("--workers must be at least 1, --keep_shortest at least 0")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ledger, lock, failures = Ledger(args), threading.Lock(), {"in a row": 0}
    if args.sample:
        return print_samples(args)
    if args.retry_rejected and not args.dry_run:
        ledger.rejected.unlink(missing_ok=True)
        ledger.finished["rejected"] = set()
    total, left, example = estimate(args, ledger)
    if args.dry_run:
        return print(f"\n{prompt_for(example)}")
    client = ChatClient(args.url, args.model, args.tries, args.timeout)
    todo = (clip for clip in read_captions(args.captions, args.ids) if not ledger.has(clip[0]))
    bar = tqdm(total=total, initial=total - left, unit="clip", dynamic_ncols=True)
    common = (todo, client, args, ledger, bar, lock, failures)
    workers = [threading.Thread(target=work, args=common, daemon=True) for _ in range(args.workers)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        failures["fatal"] = "interrupted; the same command goes on from there"
        client.stop.set()
    bar.close()
    print(json.dumps(ledger.state(client)))
    if "fatal" in failures or ledger.count["unreached"]:
        raise InputError(failures.get("fatal", "some clips were not reached; start again to ask for them"))
    if args.keep_shortest and args.out.exists():
        keep_shortest(args.out, args.keep_shortest)


OPTIONS = {  # name: (default, help)
    "ids": (None, "keep the clips of this list: AVQA's questions, VGGSound's CSV, or names, one a line"),
    "url": ("https://api.openai.com/v1/chat/completions", "chat completions endpoint"),
    "model": ("gpt-4o-mini", "the endpoint's name of the model"),
    "workers": (16, "requests at a time"),
    "tries": (12, "times a failed request is sent again"),
    "timeout": (60.0, "seconds to wait for a reply"),
    "seed": (0, "of the right answers' places and of --sample"),
    "price_in": (0.15, "price of a million input tokens"),
    "price_out": (0.60, "price of a million output tokens"),
    "dry_run": (False, "print clips, tokens, price and one full prompt, and stop"),
    "sample": (0, "print so many finished questions with their captions, and stop"),
    "keep_shortest": (0, "at the end, write the N shortest to OUT.shortest.jsonl (the paper: 54000)"),
    "retry_rejected": (False, "ask again for what was rejected before"),
    "no_false_music": (False, "no question about music where A4 says that there is none"),
}


def main():
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    parser.add_argument("--captions", required=True, help="AudioSetCaps table: CSV or JSON lines")
    parser.add_argument("--out", required=True, type=Path, help="questions in AVQA's format; may exist")
    for name, (default, text) in OPTIONS.items():
        kind = {"type": str if default is None else type(default), "default": default}
        kind = {"action": "store_true"} if default is False else kind
        parser.add_argument(f"--{name}", help=f"{text} (default: {default})", **kind)
    try:
        generate(parser.parse_args())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
