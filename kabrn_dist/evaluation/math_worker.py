"""The process that compares answers: a line of JSON in, [right answer, given answer], and "true" or "false" out.

Sympy may take forever, or all memory, for an answer such as 9^{9^{9^9}}, in code that no signal interrupts. The process
that started this one ends it by SIGKILL; should that one be gone, the kernel ends it by its limit on processor time.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Compare answers until the input ends.

    Args:
        arguments: Seconds of processor time of an answer, and bytes of memory of the process.
    """
    seconds, memory = int(arguments[0]), int(arguments[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What the libraries print must not become an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import math_verify

    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, -1))
        right, given = json.loads(line)
        # Without its own time limits, which are signals: they would need the main thread, and miss long operations.
        parsed = [math_verify.parse(text, parsing_timeout=None) for text in (right, given)]
        equal = math_verify.verify(*parsed, timeout_seconds=None)
        answers.write("true\n" if equal else "false\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
