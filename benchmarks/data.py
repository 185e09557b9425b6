"""Rows per second and peak memory of process, style and render, beside ``datasets.map`` doing the same work.

    make bench-data ROWS=1000,100000,1000000

Rows are generated, the same for both, in a temporary folder. Each measurement is a command of its own, from its start to its
files on disk, ours and theirs in turn on the same machine. The peer does all that the step does but the report
(benchmarks/data_peer.py); "the peer less" is ids, signatures and exact duplicates only: no row checked, none looked for
that is nearly the same, no split, no file of rows.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measured import Measured, run

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded/smollm2-135m-instruct"
STYLE = "Answer in one short sentence."
STEPS = ("process", "style", "render")
_WORDS = (
    "about after again answer because before between block bridge change city clear cloud cold colour copy count "
    "country course cross deep door early earth every example field figure final fire force garden glass green ground "
    "group heat heavy hour house idea island kind large later learn letter light line list little machine map matter "
    "measure minute money moon morning mountain move music name number order paper part people piece place plain plant "
    "point problem product question rain reason record river road room round rule school sea second sentence shape ship "
    "short side simple small snow sound space star start state stone story strong sun surface system table term test "
    "thing time town travel tree true turn under unit use voice wall warm water week wheel white wind wood word work world year"
).split()


def write_rows(path: Path, count: int) -> None:
    """``count`` conversations of one question and one answer, 40 to 1,000 characters, about 2% of them twice."""
    chosen = random.Random(20261125)
    line = ""
    with path.open("w") as file:
        for number in range(count):
            if not line or chosen.random() > 0.02:
                question = " ".join(chosen.choices(_WORDS, k=chosen.randint(4, 40)))
                answer = " ".join(chosen.choices(_WORDS, k=chosen.randint(4, 130)))
                messages = [
                    {"role": "user", "content": f"{question} {number}?"},
                    {"role": "assistant", "content": f"{answer}."},
                ]
                line = json.dumps({"messages": messages})
            file.write(line + "\n")


def measure(count: int, base: Path, alone: bool) -> Iterator[tuple[str, Measured, Measured | None, Measured]]:
    """For each step: ours, the peer's (not with ``alone``), and ours once more, which has nothing to do."""
    folder = base / str(count)
    folder.mkdir()
    write_rows(folder / "rows.jsonl", count)
    (folder / "run.yaml").write_text(f"data: {{raw: rows.jsonl}}\nmodel: {{name: {MODEL}}}\n")
    for step in STEPS:
        command = [sys.executable, str(ROOT / "scripts" / f"{step}.py"), "--config", "run.yaml"]
        command += ["--style", STYLE] if step == "style" else []
        mine = run(command, folder)
        theirs = None if alone else run([sys.executable, "-m", "benchmarks.data_peer", step, str(folder)], folder)
        again = run(command, folder)
        yield step, mine, theirs, again
        if step == "process" and not alone:
            less = run([sys.executable, "-m", "benchmarks.data_peer", "process-less", str(folder)], folder)
            yield "process, the peer less", mine, less, again
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", default=os.environ.get("SFT_ROWS") or "1000,100000,1000000", help="sizes, with commas"
    )
    parser.add_argument("--alone", action="store_true", help="without datasets.map, which takes most of the time")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.rows.split(",")]
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("SFT_MODEL_CACHE", str(ROOT / ".cache" / "models"))
    print("| rows | step | rows/s | datasets.map | ratio | peak memory | datasets.map | second run |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as base:
        for count in sizes:
            for step, mine, theirs, again in measure(count, Path(base), arguments.alone):
                cells = [f"{count:,}", step, f"{count / mine.seconds:,.0f}"]
                cells += (
                    [f"{count / theirs.seconds:,.0f}", f"{theirs.seconds / mine.seconds:.2f}"] if theirs else ["", ""]
                )
                cells += [f"{mine.peak_bytes >> 20:,} MiB", f"{theirs.peak_bytes >> 20:,} MiB" if theirs else ""]
                print(f"| {' | '.join([*cells, f'{again.seconds:.1f} s'])} |", flush=True)


if __name__ == "__main__":
    main()
