"""Serves a model: in a terminal, in a browser, through OpenAI's API."""
