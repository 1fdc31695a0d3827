"""Whole models of other projects into our checkpoints, and back.

`source` reads their files, `deduce` tells which model is inside, `names` has one table per project of what
every tensor is called there, `imports` and `exports` use it, `labels` adds recipe, classes and licence, and
`exports` compares logits with the library that they come from.
"""
