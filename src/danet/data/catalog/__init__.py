"""One module per dataset, named as the dataset; its `ENTRY` is a `CatalogEntry`.

A new dataset is a new module here; it is found by its file name.
"""
