"""One recipe over a grid of settings, a cell at a time; how it works is told in sweep.run."""
