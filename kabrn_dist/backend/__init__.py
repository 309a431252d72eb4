"""The training back end, the only part that imports DeepSpeed: engine, sharded state, sharded ternary matrices."""

import logging

# DeepSpeed prints this on every rank when it is imported on a machine without a GPU; its other warnings stay.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
