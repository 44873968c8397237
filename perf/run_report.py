"""How long the report of a large run takes and what it needs.

python -m perf.run_report            1,500 steps with 60 captions each, 90,000 in all, 20 assertions per caption
python -m perf.run_report --quick    a tenth

Prints a table, and as its last line one JSON object. There is no peer: none makes such a report.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from balcap.report.rollouts import Rollouts
from tests.report_runs import write_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="A tenth of the steps.")
    steps = 150 if parser.parse_args().quick else 1500
    with tempfile.TemporaryDirectory() as work:
        run = write_run(
            Path(work) / "run", steps=steps, groups=10, captions=6, images=200, image_size=512, assertions=20, failed=0.02
        )  # fmt: skip
        train = Rollouts.read(run / "rollouts").train
        assert train is not None
        began = time.monotonic()
        subprocess.run([sys.executable, "main.py", "report", str(run)], check=True)
        figures = {
            "steps": steps,
            "captions": len(train),
            "seconds": round(time.monotonic() - began, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
            "report_mb": round((run / "report.html").stat().st_size / 1e6, 1),
        }
    for name, value in figures.items():
        print(f"{name:12} {value:>10,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
