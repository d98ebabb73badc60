"""An OpenAI-compatible server and its playground."""
