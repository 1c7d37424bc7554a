"""One module per dataset. Each has `SPLITS`, `spec(root)` and `open_split(root, split)`, and
`COUNTS`, the official number of pictures of each split, where there is one: a dictionary, or a
function of the root where versions differ. `SUBMISSION` says how a benchmark's server takes labels.

A new dataset is a new module here; it is found by its file name.
"""
