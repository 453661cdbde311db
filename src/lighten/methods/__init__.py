"""One file per compression method: a frozen `Step` with `apply(model, job)` and `proposals(model, device)`."""
