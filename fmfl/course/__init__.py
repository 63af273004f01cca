"""The course: exercises, checks that name the mistake, and a copy for each participant."""
