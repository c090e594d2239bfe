"""One stage of the GPU check in a process of its own. usage: python benchmarks/gpu STAGE --device cuda --out FILE [--tiny]"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    gc.disable()  # what imports create stays: searching it for garbage takes a fifth of their time
    import torch
    from rows import Machine

    started = time.perf_counter()
    stage = importlib.import_module(f"stage_{options.stage}")
    gc.freeze()
    gc.enable()
    rows = stage.measure(Machine(torch.device(options.device), options.tiny))
    seconds = time.perf_counter() - started
    options.out.write_text(json.dumps({"seconds": seconds, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads can abort the interpreter's own end
