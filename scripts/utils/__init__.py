"""The parts that the steps share, in floors: each imports only from the floors above it."""
