"""``triflash compile``: fills Triton's cache on disk with what a deployment will launch, in parallel, on a machine without a GPU."""
