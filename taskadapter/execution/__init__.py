"""One run in a process of its own: what runs there, and nothing of the agent that started it."""
