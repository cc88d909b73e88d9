"""Run what a README tells its readers to run, in a directory of its own; the first command that fails ends it.

Blocks marked `bash` run line by line in one shell, blocks marked `python` as programs. A block right after a comment
`<!-- not in CI: reason -->` is left out, and so is the test command, which has run before.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

BLOCK = re.compile(r"(<!-- not in CI: (?P<why>[^>]*) -->\n)?```(?P<kind>bash|python)\n(?P<text>.*?)```", re.DOTALL)
TESTS = "make test"


def main(readme: Path, place: Path) -> None:
    for block in BLOCK.finditer(readme.read_text(encoding="utf-8")):
        text = "\n".join(line for line in block["text"].splitlines() if line.split("#")[0].strip() != TESTS)
        if block["why"]:
            print(f"-- left out, {block['why']}: {text.splitlines()[0]} …", flush=True)
            continue
        if not text.strip():
            continue
        print(f"-- {block['kind']}\n{text}", flush=True)
        command = ["bash", "-euo", "pipefail", "-c", text]
        if block["kind"] == "python":
            command = [str(place / ".venv/bin/python"), "-W", "error", "-c", text]
        began = time.monotonic()
        done = subprocess.run(command, cwd=place, check=False)
        print(f"-- {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            sys.exit(f"README: the block above ended with {done.returncode}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
