"""OpenAI's routes: the models, and chat completions whole or streamed."""
