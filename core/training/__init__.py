"""Training by recipe: the Lightning base module, callbacks, loaders that can resume, and the run's report."""
