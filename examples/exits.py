"""Count the VM exits of a command in the guest, through `softkvm run --json`."""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> None:
    """Run the command line's words (default: `true`) in a guest and print its exits by reason."""
    command = sys.argv[1:] or ["true"]
    result = subprocess.run(["softkvm", "run", "--json", "--", *command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
    outcome = json.loads(result.stdout)
    for reason, count in sorted(outcome["stats"]["exits"].items(), key=lambda item: -item[1]):
        print(f"{count:10,}  {reason}")
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
