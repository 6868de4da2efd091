"""Prediction files -> accuracies with 95 % intervals, the paper's Tables I-IV, a page to look at and hear.

    python evaluate.py --report results       (writes results/report.md, curves.svg and report.html)

Run folders are results/NAME, predictions results/NAME/eval/BENCH.AUDIO.json, logs results/NAME/log.jsonl.
Every number carries an interval: the published differences are often within the noise of 1,000 questions.
"""

import html
import json
import math
import os
from pathlib import Path

import numpy as np

from data import read_questions
from files import InputError, write_text
from reward import string_match

# model | method | our run that fills the row, or - | the paper's numbers, column by column
PAPER = {
    "I": """
- | Human [4] | - | 86.3 78.2 82.2 82.2 - - - -
Audio Flamingo 2 | Direct Inference [13] | audio-flamingo-2 | 61.6 74.0 30.9 55.5 65.1 72.9 40.3 59.4
Phi-4 Multi-Modal | Direct Inference [14] | phi-4-multimodal | 61.0 52.9 52.8 55.6 - - - -
GPT-4o Voice Model | Direct Inference [15] | gpt-4o-audio | 63.4 60.8 53.2 59.1 - - - -
Qwen2-Audio-7B-Instruct | Direct Inference [8] | - | 55.0 51.0 42.0 49.2 45.9 53.3 45.9 52.5
Qwen2-Audio-7B-Instruct | Reproduced [8] | base-qwen2audio | 61.6 54.5 42.0 52.7 - - - -
Qwen2-Audio-7B-Instruct | Zero-Shot-CoT [16] | - | 61.9 56.3 55.3 57.8 - - - -
Qwen2-Audio-7B-Instruct | CoTA [11] | - | 60.1 64.3 60.7 61.7 - - - -
Qwen2-Audio-7B-Instruct | R1-AQA [7] | qwen2audio-avqa | 68.8 64.3 63.7 65.6 69.8 61.4 62.7 64.4
Kimi-Audio | Direct Inference [17] | kimi-audio | 73.3 61.7 60.7 65.2 - - - -
Qwen2.5-Omni-7B | Direct Inference [2] | - | 67.9 69.2 59.8 65.6 - - - -
Qwen2.5-Omni-7B | Reproduced | base-omni | 69.4 66.8 61.6 65.9 71.6 67.1 66.5 68.4
Qwen2.5-Omni-7B | SARI [9] | - | 72.8 67.2 61.3 67.1 - - - -
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 70.9 70.1 64.9 68.6 73.6 68.6 70.1 70.8
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 72.4 73.1 64.3 69.9 74.3 70.2 69.2 71.2
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 73.6 74.3 66.1 71.3 74.1 70.8 68.7 71.2""",
    "II": """
Qwen2.5-Omni-7B | Direct Inference [2] | - | - - - - 74.7 68.6 76.0 73.1
Qwen2.5-Omni-7B | Reproduced | base-omni | 78.1 65.9 70.6 71.5 74.9 68.0 72.4 71.8
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 82.0 70.1 75.4 75.8 77.8 69.1 76.3 74.4
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 82.3 72.8 75.4 76.8 78.9 70.9 76.0 75.3
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 81.7 73.4 76.0 77.0 78.3 70.8 75.8 75.0""",
    "III": """
Gemini 2.0 Flash | Direct Inference [29] | gemini-2.0-flash | 61.2 51.0 72.1 81.8 72.5 65.9 70.8 65.6
GPT-4o Audio | Direct Inference [30] | gpt-4o-audio | 53.9 51.0 70.4 63.6 72.5 62.2 75.0 63.5
Qwen2-Audio-7B-Instruct | Direct Inference [8] | base-qwen2audio | 33.3 24.3 32.3 9.1 31.2 30.5 25.0 30.0
Qwen2.5-Omni-7B | Direct Inference [2] | - | 58.8 40.8 59.9 54.6 61.9 67.1 58.3 56.7
Qwen2.5-Omni-7B | Reproduced | base-omni | 61.2 47.6 59.5 54.6 61.5 61.0 66.7 58.0
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 63.6 51.5 62.2 72.7 65.1 62.2 70.8 61.2
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 58.8 53.4 65.0 45.5 66.1 63.4 66.7 61.5
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 67.3 51.5 64.3 45.5 70.2 64.6 70.8 63.4""",
    "IV": """
Qwen2-Audio | - | base-qwen2audio | 52.7 30.5
Qwen2-Audio | AVQA, with audio | qwen2audio-avqa | 63.2 44.6
Qwen2-Audio | AVQA, without audio | qwen2audio-avqa-noaudio | 58.8 42.4
Qwen2-Audio | ARC-Easy, without audio | qwen2audio-arc | 60.2 42.2
Qwen2.5-Omni | - | base-omni | 65.9 49.3
Qwen2.5-Omni | AVQA, with audio | omni-avqa | 68.6 51.7
Qwen2.5-Omni | AVQA, without audio | omni-avqa-noaudio | 65.6 49.2
Qwen2.5-Omni | ARC-Easy, without audio | omni-arc | 68.2 51.7""",
}
KINDS = ["sound", "music", "speech"]
MIXES = ["mix-sound-music", "mix-sound-speech", "mix-music-speech", "mix-sound-music-speech"]
COLUMNS = {  # table -> (title, (benchmark, audio at inference, group) of each column)
    "I": ("MMAU (original)", [(b, "real", g) for b in ("mmau-mini", "mmau-full") for g in [*KINDS, "all"]]),
    "II": (
        "MMAU (v05.15.25)",
        [(b, "real", g) for b in ("mmau-mini-v2", "mmau-full-v2") for g in [*KINDS, "all"]],
    ),
    "III": ("MMAR", [("mmar", "real", group) for group in [*KINDS, *MIXES, "all"]]),
    "IV": (
        "Fine-tuning with and without audio, MMAU test-mini",
        [("mmau-mini", a, "all") for a in ("real", "none")],
    ),
}


def paper_rows(table):
    """-> [(model, method, run or None, [numbers or None])]."""
    for line in PAPER[table].strip().splitlines():
        model, method, run, numbers = line.split(" | ")
        yield (
            model,
            method,
            None if run == "-" else run,
            [None if n == "-" else float(n) for n in numbers.split()],
        )


# ------------------------------------------------------------------------------------------------- intervals


def wilson(right, total, z=1.959964):
    """Wilson's 95 % interval of a share. (A percentile bootstrap of 11 questions covers 68 %.)"""
    if not total:
        return 0.0, 1.0
    p, spread = right / total, z * z / total
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def bootstrap(values, repeats=2000, seed=0):
    """95 % percentile interval of the mean of (n,) values, one a question, over resampled questions."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(repeats)]
    return tuple(np.percentile(means, [2.5, 97.5]))


def mcnemar(better, worse):
    """Exact two-sided p-value that a change which mended `better` and broke `worse` answers is by chance."""
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


# --------------------------------------------------------------------------------------------------- scoring


def prediction(question):
    row = question.meta["source"]
    said = row.get("answer_prediction", row.get("model_prediction", row.get("model_output")))
    return said if isinstance(said, str) else ""


def correct(question):
    """Share of the orders in which the question was answered right, by the official rule; 0 or 1 for one order."""
    said = question.meta["source"].get("order_predictions") or [prediction(question)]
    return sum(string_match(question.answer, text, question.choices) for text in said) / len(said)


def read_predictions(path):
    """Predictions -> questions with the answers given in their rows. Raises InputError if there are none."""
    questions = read_questions(path)
    keys = questions[0].meta["source"].keys()
    if not keys & {"answer_prediction", "model_prediction", "model_output"}:
        raise InputError(f"{path} holds questions without predictions: give what evaluate.py --out wrote")
    return questions


def score(path):
    """{(what, group): (accuracy, low, high, questions)} of a predictions file; ("all", "all"): the average.

    Grouped by task (MMAU) or modality (MMAR), difficulty, category and sub-category. Wilson's interval, or a
    bootstrap over questions where they were asked in several orders. InputError if the answers are hidden.
    """
    questions = read_predictions(path)
    if any(question.answer is None for question in questions):
        raise InputError(f"{path} holds no right answers (test-full): send it to the benchmark's server")
    groups = {}
    for question in questions:
        row, value = question.meta["source"], correct(question)
        for what in ("task", "modality", "difficulty", "category", "sub-category"):
            if isinstance(row.get(what), str):
                groups.setdefault((what, row[what]), []).append(value)
        groups.setdefault(("all", "all"), []).append(value)
    several = any(len(q.meta["source"].get("order_predictions") or []) > 1 for q in questions)
    summary = {}
    for group, values in groups.items():
        interval = bootstrap(values) if several else wilson(sum(values), len(values))
        summary[group] = (sum(values) / len(values), *interval, len(values))
    return summary


def percent(share, low, high, count=None):
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]" + (f"  n = {count}" if count else "")


def summary_lines(path):
    """What `score` found, as text; and how many questions got no answer, which count as wrong."""
    questions, lines = read_predictions(path), []
    for (what, group), numbers in sorted(
        score(path).items(), key=lambda item: (item[0][0] != "all", item[0])
    ):
        lines.append(f"{what + ': ' + group if what != 'all' else 'average':45} {percent(*numbers)}")
    orders = [row for q in questions if len(row := q.meta["source"].get("order_predictions") or []) > 1]
    if orders:
        same = sum(len(set(said)) == 1 for said in orders)
        lines.append(
            f"answered the same way in all orders: {percent(same / len(orders), *wilson(same, len(orders)))}"
        )
    empty = sum(not prediction(question) for question in questions)
    return lines + ([f"{empty} of {len(questions)} answers are empty, counted as wrong"] if empty else [])


def compare(first, second):
    """The paired difference of two predictions files of one benchmark, as text."""
    a, b = ({q.id: q for q in read_predictions(path)} for path in (first, second))
    if a.keys() != b.keys():
        raise InputError(
            f"{first} and {second} are not of the same questions ({len(a.keys() ^ b.keys())} differ)"
        )
    if any(q.answer is None for q in a.values()):
        raise InputError(f"{first} holds no right answers, so there is nothing to compare")
    before, after = (np.array([correct(side[key]) for key in a]) for side in (a, b))
    difference, interval = after - before, bootstrap(after - before)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return (
        f"{100 * before.mean():.1f} -> {100 * after.mean():.1f}, difference {percent(difference.mean(), *interval)}; "
        f"{better} better, {worse} worse of {len(a)}, McNemar p = {mcnemar(better, worse):.3g}"
    )


# ---------------------------------------------------------------------------------------------------- tables


def find_predictions(folder):
    """{(run, bench, audio): path} of what evaluate.py wrote under `folder`: RUN/eval/BENCH.AUDIO.json, or any
    name, which is then the run's.
    """
    found = {}
    for meta in sorted(Path(folder).rglob("*.meta")):
        path, about = meta.with_suffix(".json"), json.loads(meta.read_text())
        bench, audio, run = about["bench"], about["audio"], path.stem
        if path.parent.name == "eval":
            run, bench = path.parent.parent.name, path.stem.rpartition(".")[0] or bench
        if path.exists():
            found[run, bench, audio] = path
    return found


def scores(found):
    """{(run, bench, audio, group): numbers}; "hidden" in place of numbers where the answers are hidden."""
    cells = {}
    for key, path in found.items():
        try:
            for (what, group), numbers in score(path).items():
                if what in ("all", "task", "modality"):
                    cells[(*key, group)] = numbers
        except InputError:
            cells[(*key, "all")] = "hidden"
    return cells


def table_markdown(table, cells):
    """One table: our number with its interval beside the paper's; what was not run is left open."""
    title, columns = COLUMNS[table]
    names = [f"{bench} {group}" if table != "IV" else {"real": "with audio", "none": "without"}[audio]
             for bench, audio, group in columns]  # fmt: skip
    lines = [f"### Table {table}: {title}", "", "| model | method | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for model, method, run, numbers in paper_rows(table):
        row = []
        for column, number in zip(columns, numbers, strict=True):
            ours = cells.get((run, *column))
            ours = "sent to the server" if ours == "hidden" else f"**{percent(*ours[:3])}**" if ours else ""
            row.append(f"{ours} ({'-' if number is None else number})".strip())
        lines.append(f"| {model} | {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def tables_markdown(folder):
    found = find_predictions(folder)
    cells = scores(found)
    parts = ["# Results", "Ours with its 95 % interval in bold, the paper's in parentheses. Empty: not run."]
    parts += [table_markdown(table, cells) for table in PAPER]
    lines = ["### All runs", "", "| run | benchmark | audio | average |", "|---|---|---|---|"]
    for run, bench, audio in found:
        numbers = cells[run, bench, audio, "all"]
        lines.append(
            f"| {run} | {bench} | {audio} | {numbers if numbers == 'hidden' else percent(*numbers)} |"
        )
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


# -------------------------------------------------------------------------------------------- learning curves

COLORS = ["#0b6", "#06c", "#c60", "#a0a", "#c33", "#555", "#099", "#960"]


def curves_svg(folder, keys=("reward", "kl"), width=520, height=220):
    """Learning curves of every log.jsonl under `folder`, one panel a key, averaged over 1/20 of the run."""
    logs = {
        p.parent.name: [json.loads(r) for r in p.read_text().splitlines()]
        for p in sorted(Path(folder).glob("*/log.jsonl"))
    }
    logs = {name: rows for name, rows in logs.items() if rows}
    parts = []
    for panel, key in enumerate(keys):
        series = {}
        for name, rows in logs.items():
            values, window = [row[key] for row in rows], max(1, len(rows) // 20)
            series[name] = [
                (rows[i]["step"], np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(rows))
            ]
        right = max((points[-1][0] for points in series.values()), default=1)
        top = max((y for points in series.values() for _, y in points), default=1) or 1
        parts.append(f'<text x="{panel * width + 45}" y="16">{key} (0 to {top:.3g}) by step (1 to {right})</text>'
                     f'<rect x="{panel * width + 40}" y="24" width="{width - 60}" height="{height - 40}" fill="none" stroke="#999"/>')  # fmt: skip
        for color, points in zip(COLORS * 9, series.values(), strict=False):
            line = " ".join(f"{panel * width + 40 + x / right * (width - 60):.1f},{height - 16 - y / top * (height - 40):.1f}"
                            for x, y in points)  # fmt: skip
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    for i, (color, name) in enumerate(zip(COLORS * 9, logs, strict=False)):
        parts.append(
            f'<text x="{40 + i % 4 * 250}" y="{height + 14 + i // 4 * 18}" fill="{color}">{html.escape(name)}</text>'
        )
    size = f'width="{width * len(keys)}" height="{height + 24 + len(logs) // 4 * 18}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
        + "".join(parts)
        + "</svg>"
    )


# ---------------------------------------------------------------------------------------------------- page

PAGE = """<!doctype html><meta charset="utf-8"><title>Omni-R1: results</title><style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:3px 6px}
.q{border-top:1px solid #ddd;padding:.7em 0}.right{color:#070}.wrong{color:#b00}li.answer{font-weight:600}
ul{margin:.2em 0}audio{height:32px;display:block}svg{max-width:100%;height:auto}</style>
TABLES<h3>Learning curves</h3>CURVES<h3>Questions</h3><p>benchmark <select id="bench"></select> task <select id="task"></select>
before <select id="before"></select> after <select id="after"></select> show <select id="show"><option value="">all</option>
<option>right, right</option><option>wrong, right</option><option>right, wrong</option><option>wrong, wrong</option></select>
<input id="text" placeholder="words in the question"> <span id="count"></span></p><div id="list"></div>
<script type="application/json" id="data">DATA</script><script>
const data=JSON.parse(document.getElementById('data').textContent), by=id=>document.getElementById(id);
const fill=(id,values,first)=>{by(id).replaceChildren(...(first?[new Option(first,'')]:[]),...values.map(v=>new Option(v,v)))};
fill('bench',Object.keys(data));
function bench(){const b=data[by('bench').value];if(!b)return;fill('task',[...new Set(b.questions.map(q=>q.task))],'all');
fill('before',b.runs);fill('after',b.runs);by('after').selectedIndex=b.runs.length>1?1:0;show()}
function add(parent,tag,text,kind){const e=document.createElement(tag);e.textContent=text;if(kind)e.className=kind;parent.append(e);return e}
function show(){const b=data[by('bench').value],i=b.runs.indexOf(by('before').value),j=b.runs.indexOf(by('after').value);
const word=x=>x===1?'right':'wrong',words=by('text').value.toLowerCase();
const hits=b.questions.filter(q=>(!by('task').value||q.task===by('task').value)&&q.question.toLowerCase().includes(words)&&
(!by('show').value||by('show').value===word(q.correct[i])+', '+word(q.correct[j])));
by('count').textContent=hits.length+' of '+b.questions.length+(hits.length>100?', the first 100 shown':'');
by('list').replaceChildren(...hits.slice(0,100).map(q=>{const d=document.createElement('div');d.className='q';
add(d,'b',q.id+': '+q.question);if(q.audio){const a=add(d,'audio','');a.controls=true;a.preload='none';a.src=q.audio}
const u=add(d,'ul','');q.choices.forEach(c=>add(u,'li',c,c===q.answer?'answer':''));
b.runs.forEach((r,k)=>add(d,'div',r+': '+q.said[k],word(q.correct[k])));return d}))}
for(const id of ['task','before','after','show'])by(id).onchange=show;by('bench').onchange=bench;by('text').oninput=show;bench();
</script>"""


def page_data(folder, found):
    """{"BENCH, audio A": {runs, questions}}: each question with every run's answer, clips relative to `folder`."""
    pages = {}
    for (run, bench, audio), path in found.items():
        meta = path.with_suffix(".meta")
        clips = json.loads(meta.read_text()).get("audio_dir") if meta.exists() else None
        page = pages.setdefault(f"{bench}, audio {audio}", {"runs": [], "by_id": {}})
        page["runs"].append(run)
        for q in read_questions(path, clips):
            row = page["by_id"].setdefault(q.id, {"id": q.id, "question": q.question, "choices": q.choices, "answer": q.answer,
                                                  "said": {}, "correct": {}})  # fmt: skip
            row["task"] = str(q.meta["source"].get("task") or q.meta["source"].get("modality") or "")
            row["audio"] = Path(os.path.relpath(q.audio, folder)).as_posix() if audio == "real" else None
            row["said"][run] = prediction(q)
            row["correct"][run] = correct(q) if q.answer is not None else 0
    for page in pages.values():
        page["questions"] = list(page.pop("by_id").values())
        for row in page["questions"]:
            for key, missing in (("said", ""), ("correct", 0)):
                row[key] = [row[key].get(run, missing) for run in page["runs"]]
    return pages


def markdown_html(text):
    """The little Markdown that tables_markdown writes -> HTML."""
    out = []
    for block in html.escape(text, quote=False).split("\n\n"):
        if block.startswith("|"):
            rows = [
                line.strip("|").split("|")
                for line in block.strip().splitlines()
                if not line.startswith("|---")
            ]
            out.append(
                "<table>"
                + "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
                + "</table>"
            )
        else:
            level = len(block) - len(block.lstrip("#"))
            out.append(f"<h{level}>{block[level:]}</h{level}>" if level else f"<p>{block}</p>")
    bold = "".join(out).split("**")
    return "".join(part + ("<b>" if i % 2 == 0 else "</b>") for i, part in enumerate(bold[:-1])) + bold[-1]


def report(folder):
    """Write report.md, curves.svg and report.html (self-contained, works from disk) into `folder`."""
    folder, found = Path(folder), find_predictions(folder)
    if not found:
        raise InputError(f"{folder} has no predictions that evaluate.py wrote (with their .meta file)")
    tables, curves = tables_markdown(folder), curves_svg(folder)
    write_text(folder / "report.md", f"{tables}\n![learning curves](curves.svg)\n")
    write_text(folder / "curves.svg", curves)
    data = json.dumps(page_data(folder, found)).replace("<", "\\u003c")  # a question may say </script>
    page = PAGE.replace("TABLES", markdown_html(tables)).replace("CURVES", curves).replace("DATA", data)
    write_text(folder / "report.html", page)
    return tables
