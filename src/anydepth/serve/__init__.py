"""An OpenAI-compatible server, and the page to play with it."""
