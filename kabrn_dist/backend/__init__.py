"""The training back end: DeepSpeed behind one door, sharded optimizer state, sharded ternary matrices."""
