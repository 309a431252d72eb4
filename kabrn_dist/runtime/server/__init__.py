"""An HTTP server of a model file, with the interface of OpenAI's. Needs the extra `serve`, and no torch."""
