"""What a run writes down while it learns: log.jsonl and samples.jsonl, and the same for those who watch.

A rising reward proves nothing: beside it stand `official` (right by the benchmarks' own rule), `hedged` (more
than one choice named) and the held-out score, and when reward and score part, the log says so in words.
"""

import json
import logging
from pathlib import Path
from typing import Any

from files import InputError, as_object, read_text, sha256

log = logging.getLogger("omni_r1")

WINDOW = 20  # steps of a moving average
DRIFT = 0.10  # by how much reward and official score may part


class Journal:
    """One row a step, each step once, and one a held-out score. TensorBoard and wandb where installed."""

    def __init__(self, out: Path, step: int, settings: dict, wandb_project: str = ""):
        self.path = out / "log.jsonl"
        self.format_weight = settings.get("format_weight", 0.0)
        self.rows = []  # of the steps: what the moving averages are of
        self.warned = False
        for row in read_log(self.path):
            self.notice(row)
        self.log = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held for the life of the run)
        self.samples = open(out / "samples.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.board = tensorboard(out, step)
        self.wandb = start_wandb(wandb_project, out, settings)

    def write(self, row: dict) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        scalars = {name: value for name, value in row.items() if name != "step"}
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(scalars, step=row["step"])
        was_warned = self.warned
        self.notice(row)
        if self.warned and not was_warned:
            log.warning("step %d: %s", row["step"], drift_in_words(self.rows))

    def notice(self, row: dict) -> None:
        """Take a row into the averages, one of now or of an earlier start."""
        if "official" in row:
            self.rows.append(row)
            self.warned = self.warned or drift(self.rows, self.format_weight) > DRIFT

    def show(self, samples: list[dict]) -> None:
        """Questions of the step with what was said, as they stand in samples.jsonl."""
        for sample in samples:
            self.samples.write(json.dumps(sample) + "\n")
        self.samples.flush()
        if self.wandb is not None and samples:
            columns = list(samples[0])
            table = self.wandb.Table(columns=columns)
            for sample in samples:
                table.add_data(*[str(sample[name]) for name in columns])
            self.wandb.log({"samples": table}, step=samples[0]["step"])

    def close(self) -> None:
        self.log.close()
        self.samples.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_log(path: Path) -> list[dict]:
    """The whole rows of a log.jsonl; half a row, which a kill can leave behind, is none."""
    rows = []
    if not path.exists():
        return rows
    for line in read_text(path).split("\n"):
        row = as_object(line)
        if "step" in row:
            rows.append(row)
    return rows


def drift(rows: list[dict], format_weight: float = 0.0) -> float:
    """By how much the reward has run away from the official score: their distance now, less that at first.

    Averages over the last 20 steps and over the first 10; 0 before there are 20. Only the growth counts, so
    that a constant in the reward is no alarm; nor is what --format_weight pays for the form.
    """
    if len(rows) < WINDOW:
        return 0.0
    averages = []
    for some in (rows[: WINDOW // 2], rows[-WINDOW:]):
        gaps = []
        for row in some:
            for_the_form = format_weight * row.get("asked_form", 0.0)
            gaps.append(row["reward"] - for_the_form - row["official"])
        averages.append(mean(gaps))
    return averages[1] - averages[0]


def drift_in_words(rows: list[dict]) -> str:
    """What a person should know when reward and official score part."""
    last = rows[-WINDOW:]
    reward = mean([row["reward"] for row in last])
    official = mean([row["official"] for row in last])
    hedged = mean([row["hedged"] for row in last])
    return (
        f"reward and score part: over the last {WINDOW} steps the reward is {reward:.2f}, but the "
        f"benchmarks' rule finds {official:.2f} of the answers right, and {hedged:.2f} of them name several "
        "choices. The model may be learning to please the reward; look at samples.jsonl"
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def tensorboard(out: Path, step: int) -> Any:
    """A writer of TensorBoard's events that forgets later steps, which will come again; None without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out), purge_step=step + 1)


def start_wandb(project: str, out: Path, settings: dict) -> Any:
    """The wandb module with a run started, which a resumed run goes on with; None without a project."""
    if not project:
        return None
    import wandb

    identity = f"{out.name}-{sha256(str(out.resolve()).encode())}"  # a folder's run, wherever it goes on
    try:
        wandb.init(project=project, name=out.name, id=identity, resume="allow", config=settings)
    except Exception as error:  # no network, no login
        raise InputError(f"--wandb {project}: {error!r:.300}") from None
    return wandb
