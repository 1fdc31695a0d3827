"""How a model is trained, saved and gone on with."""
