"""Events between requests, processes and machines."""
