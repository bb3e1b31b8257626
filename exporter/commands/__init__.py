"""One module a command: its options, what it runs, what it prints. Heavy imports wait."""
