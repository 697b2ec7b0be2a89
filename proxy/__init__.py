"""The guest's side of the bus."""
