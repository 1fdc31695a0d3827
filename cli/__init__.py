"""The command line: one file per command. Importing it is fast; PyTorch comes in when a command runs."""
