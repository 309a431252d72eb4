"""One process that runs several trainings and writes down the dtypes of each model's working copies.

The argument is a JSON file with a list of configuration files; the answer is `dtypes.json` next to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.trainers import open_trainers, read_jobs


def main(jobs: str) -> None:
    dtypes = []
    for trainer in open_trainers([(path, "never") for path in read_jobs(jobs)]):
        parameters = {name: str(p.dtype) for name, p in trainer.engine.model.named_parameters()}
        states = {name: str(value.dtype) for name, value in trainer.engine.model.routers.named().items()}
        trainer.run(None)
        trainer.engine.close()
        dtypes.append(parameters | states)
    Path(jobs).with_name("dtypes.json").write_text(json.dumps(dtypes))


if __name__ == "__main__":
    main(sys.argv[1])
