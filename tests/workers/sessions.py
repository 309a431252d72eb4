"""One of N processes that run several trainings one after another in one process group.

The argument is a JSON file with a list of [configuration file, resume, stop_after].
"""

from __future__ import annotations

import sys

from tests.support.trainers import open_trainers, read_jobs


def main(jobs: str) -> None:
    sessions = read_jobs(jobs)
    trainers = open_trainers([(path, resume) for path, resume, _ in sessions])
    for (_, _, stop_after), trainer in zip(sessions, trainers, strict=True):
        trainer.run(stop_after)


if __name__ == "__main__":
    main(sys.argv[1])
