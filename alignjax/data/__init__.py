"""From rows of a file to packed batches."""
