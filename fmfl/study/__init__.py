"""The study around the science: the notebooks' files, the grid, the report and the command line."""
