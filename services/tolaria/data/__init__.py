"""Data sets as whole tensors: readers, splits, batches as a function of (seed, epoch, step), downloads."""
