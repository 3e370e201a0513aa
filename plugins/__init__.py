"""The tasks that knife brings along; they have no privileges over a stranger's plugin."""
