"""Measurements; from the root of the repository, `python -m benchmarks.NAME`.

With --interpret the kernels' own measurements run on a CPU, tiny, in Triton's interpreter: a rehearsal of the
code, not a measurement. Triton reads that choice when it is imported, hence here.
"""

import os
import sys
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter computes what a mask then leaves out.
    warnings.filterwarnings("ignore", "divide by zero encountered in log", RuntimeWarning)
