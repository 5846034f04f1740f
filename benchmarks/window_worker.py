"""A process that holds an item for a given time: `python -S -E benchmarks/window_worker.py`

Reads `NAME SECONDS` from standard input, answers `NAME` when the seconds are over. A new line in
the meantime abandons the item; the end of the input ends the process.
"""

import os
import select


def main() -> None:
    """Serve until standard input ends."""
    while line := os.read(0, 4096).decode():
        name, seconds = line.splitlines()[-1].split()
        if not select.select([0], [], [], float(seconds))[0]:
            os.write(1, f"{name}\n".encode())


if __name__ == "__main__":
    main()
