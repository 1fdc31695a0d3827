"""The paper's ablations on any data: planned, trained, scored, compared."""

# Small enough for two cores: eight runs of Table 6 in half an hour.
DEFAULT_BASE, DEFAULT_ITERATIONS = "landcover-demo", 400
