"""One module per dataset. Each has `SPLITS`, `spec(root)` and `open_split(root, split)`.

A new dataset is a new module here; it is found by its file name.
"""
