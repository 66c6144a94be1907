"""Downloads, read by programs that pip cannot install. ``.ci/files`` runs them."""
