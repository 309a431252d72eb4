"""The tasks, one file each: how examples are read, what the model is asked, and how an answer is scored."""
