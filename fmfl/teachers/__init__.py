"""Teachers: networks of the Segment Anything family, their weights and their known answers."""
