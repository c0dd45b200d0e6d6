"""One kind of allocation per file, registered by `winnow.allocation.base.ALLOCATIONS`."""
