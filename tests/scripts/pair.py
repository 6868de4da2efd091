"""Two processes that are started once and run one program after another, as torchrun would start each.

    torchrun --nproc_per_node 2 tests/scripts/pair.py FOLDER

FOLDER/N.json is a free port, a module that has a `main`, and its arguments. FOLDER/N.RANK is the exit code.
"""

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: F401 (once, for all that is run)


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each run meets at a port of its own
    for number in itertools.count():
        job = folder / f"{number}.json"
        while not job.exists():
            time.sleep(0.01)
        port, module, arguments = json.loads(job.read_text())
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = [module, *arguments]
        code = 0
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
        end = folder / f"{number}.{os.environ['RANK']}"
        end.with_suffix(f"{end.suffix}.writing").write_text(f"exit {code}")
        end.with_suffix(f"{end.suffix}.writing").rename(end)  # whole when it is seen


if __name__ == "__main__":
    main()
