"""What holds for every test."""

import os

# As the command line does it: waiting threads give their core away (see cli/main.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
