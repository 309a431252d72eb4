"""C kernels for operations that take torch many passes over memory, and the selection of where they are used."""
